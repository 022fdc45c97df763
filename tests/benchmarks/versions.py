"""This version against an earlier one: what a recorded step, an analysis and a command line run cost.

Each version runs in a process of its own, which does the same work when it is told to; they are told in
turn, so that a machine that drifts drifts for both. Times are processor seconds of one thread.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import gradflow
from benchmarks.recorded_steps import BASE, Case, Step
from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent.parent
LEAST = 0.05  # seconds that one turn takes, at least
Work = Callable[[], object]


# ------------------------------------------------------------------------------------ what is done


class Own(nn.Module):
    """A cell of one's own."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(inputs, 2 * hidden), nn.Linear(hidden, 2 * hidden)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gate, new = (self.ih(x) + self.hh(h)).chunk(2, 1)
        share = torch.sigmoid(gate)
        return share * h + (1 - share) * torch.tanh(new)


class Loop(nn.Module):
    """A model that runs a cell, or a step written by hand, over time."""

    def __init__(self, kind: str, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.hidden = kind, case.hidden
        self.cell: nn.Module | None = None
        if kind == "LSTMCell":
            self.cell = nn.LSTMCell(case.inputs, case.hidden)
        elif kind == "own cell":
            self.cell = Own(case.inputs, case.hidden)
        else:
            self.ih = nn.Parameter(torch.randn(case.hidden, case.inputs) / case.inputs**0.5)
            self.hh = nn.Parameter(torch.randn(case.hidden, case.hidden) / case.hidden**0.5)
        self.head = nn.Linear(case.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], self.hidden)
        found = []
        for row in x:
            if self.kind == "LSTMCell":
                h, c = self.cell(row, (h, c))  # type: ignore[misc]
            elif self.cell is not None:
                h = self.cell(row, h)
            elif self.kind == "parallel":  # one weight, used as often, and no recurrence
                h = torch.tanh(row @ self.ih.T + 1)
            else:
                h = torch.tanh(row @ self.ih.T + h @ self.hh.T)
            if self.kind == "tap":
                h = gradflow.tap(h=h)
            found.append(h)
        return self.head(torch.stack(found)).square().mean()


def loop(kind: str, case: Case, *, recorded: bool = True) -> Work:
    """A step of a loop over time, and its totals read."""
    model = Loop(kind, case)
    if kind == "parallel":  # beside a layer that is recorded
        layer = nn.GRU(case.inputs, case.hidden)
        model.add_module("layer", layer)
    data = torch.randn(case.steps, case.batch, case.inputs)

    def step() -> None:
        model.zero_grad()
        loss = model(data)
        if kind == "parallel":
            loss = loss + layer(data[:8])[0].square().mean()
        loss.backward()

    def work() -> None:
        with gradflow.record(model) as recording:
            step()
        assert len(recording) == 1, recording
        for track in recording.tracks.values():
            for grad in track.grads.values():
                assert grad.shape[0] > 0

    return work if recorded else step


def analysis(case: Case) -> Work:
    """All of `analyze` on one recording, made anew, as its arrays are kept by it."""
    step = Step(case)

    def work() -> None:
        with gradflow.record(step.model) as recording:
            step.plain()
        gradflow.analyze(recording)

    return work


def command_line(_: Case) -> Work:
    """`gradflow analyze` on a file of two layers, to the page."""
    folder = tempfile.mkdtemp()
    torch.save(nn.LSTM(10, 20, 2, batch_first=True).state_dict(), Path(folder) / "model.pt")
    command = [sys.executable, "-m", "gradflow", "analyze", "model.pt", "--force"]

    def work() -> None:
        subprocess.run(command, capture_output=True, check=True, cwd=folder)

    return work


SMALL = Case(hidden=32)
WORKS: dict[str, tuple[Callable[..., Work], Case]] = {
    "recorded step": (lambda case: Step(case).recorded, BASE),
    "recorded step, GRU": (lambda case: Step(case).recorded, Case(cell="GRU")),
    "recorded step, narrow": (lambda case: Step(case).recorded, SMALL),
    "recorded step, 3 layers": (lambda case: Step(case).recorded, Case(layers=3)),
    "recorded loop over LSTMCell": (lambda case: loop("LSTMCell", case), SMALL),
    "recorded loop over a cell of one's own": (lambda case: loop("own cell", case), SMALL),
    "recorded loop that is tapped": (lambda case: loop("tap", case), SMALL),
    "recorded layer beside parallel uses of one weight": (
        lambda case: loop("parallel", case),
        Case(hidden=32, steps=300),
    ),
    "recorded and analyzed": (analysis, Case(hidden=64, steps=100, batch=32)),
    "gradflow analyze model.pt": (command_line, Case(hidden=20, layers=2, inputs=10)),
}
QUICK = ("recorded step, narrow",)


# ------------------------------------------------------------------------------------ how it is timed


def spent() -> float:
    """Processor seconds of this process and of those it ran and waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def serve(name: str) -> None:
    """Do a work as often as each line says; answer with processor and wall seconds of one."""
    make, case = WORKS[name]
    torch.set_num_threads(1)
    work = make(case)
    for line in sys.stdin:
        count = int(line)
        before, start = spent(), time.perf_counter()
        for _ in range(count):
            work()
        print((spent() - before) / count, (time.perf_counter() - start) / count, flush=True)


class Version:
    """A process in which one version does one work."""

    def __init__(self, tree: Path, name: str) -> None:
        paths = os.pathsep.join((str(tree), str(ROOT / "tests")))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def seconds(self, count: int) -> tuple[float, float]:
        """Processor and wall seconds of one work, over so many in a row."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(count, file=self.process.stdin, flush=True)
        processor, wall = self.process.stdout.readline().split()
        return float(processor), float(wall)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """The package as it was in a revision, in a folder of its own."""
    command = ["git", "archive", revision, "gradflow"]
    packed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
        yield Path(folder)


def compared(name: str, before: Path, *, rounds: int, pairs: int) -> Row:
    """This version's processor time over that of the one before, in new processes every round."""
    times: list[tuple[float, float, float, float]] = []
    for _ in range(rounds):
        versions = [Version(ROOT, name), Version(before, name)]
        try:
            first = [version.seconds(1) and version.seconds(1)[1] for version in versions]
            count = max(1, round(LEAST / max(first)))
            for number in range(pairs):
                order = versions if number % 2 else versions[::-1]
                found = {id(version): version.seconds(count) for version in order}
                (new, new_wall), (old, old_wall) = (found[id(v)] for v in versions)
                times.append((new, old, new_wall, old_wall))
        finally:
            for version in versions:
                version.close()
    new, old, new_wall, old_wall = np.array(times).T
    low, median, high = np.quantile(new / old, [0.25, 0.5, 0.75])
    wall = float(np.median(new_wall / old_wall))
    note = (
        f"{np.median(new):.3g} s against {np.median(old):.3g} s of processor time, {len(times)} pairs; "
        f"wall {wall:.3f} ×"
    )
    case = asdict(WORKS[name][1])
    return Row("versions", name, float(median), "×", case, float(low), float(high), note=note)


def measure(
    *, quick: bool = False, against: str = "HEAD", picked: list[str] | None = None
) -> Iterator[Row]:
    """Every work in this version, over the same in another."""
    with unpacked(against) as before:
        for name in picked or (QUICK if quick else WORKS):
            rounds, pairs = (1, 2) if quick else (3, 5 if "analyze" in name else 15)
            yield compared(name, before, rounds=rounds, pairs=pairs)


if __name__ == "__main__":
    serve(sys.argv[1])
