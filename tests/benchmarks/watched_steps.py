"""What watching costs: a probe against a plain step, and a training at several intervals.

A probe's cost is what it adds to its step. The grid runs as many steps as the interval, one of them
probed, without a budget; the last row of each shape is a step between two probes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import histories
import torch
from torch import Tensor, nn

import gradflow
from benchmarks.rows import Row, ratio_row
from benchmarks.timing import Ratio, in_pairs, seconds
from gradflow.history import History, Writer

MODULES = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
PRESETS = ("pulse", "rate", "full")
INTERVALS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class WatchedShape:
    """One shape of a recurrent model whose training is watched."""

    cell: str = "LSTM"
    hidden: int = 128
    steps: int = 100
    batch: int = 16
    inputs: int = 32


BASE = WatchedShape()
STATED = WatchedShape(hidden=256, steps=256, batch=32, inputs=64)  # design, section 11
SHAPES = [
    STATED,
    BASE,
    replace(BASE, cell="GRU"),
    replace(BASE, cell="RNN"),
    replace(BASE, hidden=32),
]
TINY = WatchedShape(hidden=8, steps=6, batch=2)


class Net(nn.Module):
    """A recurrent layer and a head on its last state."""

    def __init__(self, shape: WatchedShape) -> None:
        super().__init__()
        self.rnn = MODULES[shape.cell](shape.inputs, shape.hidden)
        self.head = nn.Linear(shape.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class Training:
    """Steps of a training on fixed data."""

    def __init__(self, shape: WatchedShape) -> None:
        torch.manual_seed(0)
        self.model = Net(shape)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.data = torch.randn(shape.steps, shape.batch, shape.inputs)

    def steps(self, count: int) -> Callable[[], None]:
        """So many steps."""

        def run() -> None:
            for _ in range(count):
                self.optimizer.zero_grad()
                self.model(self.data).square().mean().backward()
                self.optimizer.step()

        return run

    def watched(self, folder: Path, preset: str, every: int) -> Training:
        """The same training under a watch."""
        asked = {"preset": preset, "every": every, "budget": None, "optimizer": self.optimizer}
        self.watch = gradflow.watch(self.model, folder, **asked)  # type: ignore[arg-type]
        return self


def against_plain(shape: WatchedShape, preset: str, every: int, count: int, pairs: int) -> Ratio:
    """So many steps under a watch over as many without one."""
    folder = Path(tempfile.mkdtemp())
    try:
        watched = Training(shape).watched(folder / "run", preset, every)
        plain, warm_up = Training(shape), pairs > 1
        ratio = in_pairs(watched.steps(count), plain.steps(count), pairs=pairs, warm_up=warm_up)
        watched.watch.close()
    finally:
        shutil.rmtree(folder)
    return ratio


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Probes of every shape, the grid of one, and the steps in between."""
    for shape in [TINY] if quick else SHAPES:
        for preset in PRESETS:
            pairs = 1 if preset == "full" else 2 if quick else 7  # a whole analysis takes long
            ratio = against_plain(shape, preset, 1, 1, pairs)
            probe = replace(ratio, median=ratio.median - 1, low=ratio.low - 1, high=ratio.high - 1)
            goal = {"most": 3.0} if (shape, preset) == (STATED, "rate") else {}
            what = f"what a probe adds to its step, preset {preset}, in plain steps"
            yield ratio_row("watching", what, probe, asdict(shape), **goal)
        ratio = against_plain(shape, "pulse", 10**9, 1 if quick else 5, 2 if quick else 31)
        what = "a step between two probes against the plain step"
        yield ratio_row("watching", what, ratio, asdict(shape), most=1.005)
    yield opening(1000 if quick else 100_000)
    shape = TINY if quick else BASE
    for preset in PRESETS:
        for every in (1, 2) if quick else INTERVALS:
            pairs = 1 if preset == "full" else 2 if quick or every > 16 else 5
            ratio = against_plain(shape, preset, every, every, pairs)
            what = f"training probed every {every} steps, preset {preset}, against the same without"
            yield ratio_row("watching", what, ratio, asdict(shape) | {"interval": every})


def opening(count: int) -> Row:
    """Seconds until a history of so many probes of four layers is read and laid out."""
    made = histories.probes(1)[0]
    layers = {f"{stack}.{name}": one for stack in "ab" for name, one in made.layers.items()}
    folder = Path(tempfile.mkdtemp())
    try:
        writer = Writer(folder, title="Net")
        writer.probe(replace(made, layers=layers), {})
        writer.close()
        file = folder / "history.jsonl"
        *head, probe, _ = file.read_text().splitlines(keepends=True)
        before, _, after = probe.partition('"step": 1,')
        with file.open("w") as opened:
            opened.writelines(head)
            opened.writelines(f'{before}"step": {n},{after}' for n in range(1, count + 1))
        assert len(History.read(folder).data["step"]) == count
        taken = seconds(lambda: History.read(folder).data)
    finally:
        shutil.rmtree(folder)
    what = f"opening a history of {count:,} probes of four layers"
    return Row("watching", what, taken, "s", most=3.0)
