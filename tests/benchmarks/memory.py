"""Memory: what a recording holds, and the peak of whole runs, each in a process of its own."""

from __future__ import annotations

import gc
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import gradflow
from benchmarks.rows import Row

MIB = 2**20
COMMAND = Path(__file__).parent.parent / "benchmark.py"


def own_bytes(recording: gradflow.Recording) -> int:
    """Bytes of its tracks' states, gates, inputs and gradients."""
    own: dict[int, int] = {}
    for track in recording.values():
        tensors = [*track.states.values(), *track.grads.values(), *track.gates.values()]
        for tensor in [*tensors, track.delta, track.inputs]:
            own[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(own.values())


def recordings(*, quick: bool) -> Iterator[Row]:
    """Bytes that stay alive with a recording whose tracks were read, over those of its tensors."""
    hidden, steps = (8, 6) if quick else (128, 100)
    model = nn.LSTM(32, hidden, 2, dropout=0.1)
    data = torch.randn(steps, 16, 32)
    before = alive()
    with gradflow.record(model) as recording:
        model(data)[0].square().mean().backward()
    own = own_bytes(recording)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = alive() - before - 2 * weights  # its copies of the weights, and .grad of the model
    case = {"H": hidden, "T": steps, "layers": 2}
    note = f"{kept / MIB:.3g} MiB held, {own / MIB:.3g} MiB are states, gates, inputs and gradients"
    what = "memory of a recording without its copies of weights, over its own tensors"
    yield Row("memory", what, kept / own, "×", case, most=None if quick else 3.0, note=note)
    assert len(recording) == 2


def alive() -> int:
    """Bytes of all tensor storages that Python can reach."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            if thing.grad_fn is None and thing.grad is not None:
                storage = thing.grad.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def plain_step(hidden: int, steps: int) -> None:
    """Forward and backward."""
    model, data = nn.LSTM(32, hidden), torch.randn(steps, 16, 32)
    model(data)[0].square().mean().backward()


def recorded_step(hidden: int, steps: int) -> None:
    """The same, recorded, its totals read."""
    model, data = nn.LSTM(32, hidden), torch.randn(steps, 16, 32)
    with gradflow.record(model) as recording:
        model(data)[0].square().mean().backward()
    assert recording["l0"].grad_c is not None


def analysis(hidden: int, steps: int) -> None:
    """The same, analyzed."""
    model, data = nn.LSTM(32, hidden), torch.randn(steps, 16, 32)
    with gradflow.record(model) as recording:
        model(data)[0].square().mean().backward()
    gradflow.analyze(recording)


WORKS = {"plain step": plain_step, "recorded step": recorded_step, "analysis": analysis}


def child(name: str, hidden: int, steps: int) -> None:
    """Run one work in this process and print its seconds and its peak above the start, as JSON."""
    from benchmarks.timing import seconds

    for work in WORKS.values():  # what is loaded at a first step is nobody's
        work(4, 12)
    start = highest()
    spent = seconds(lambda: WORKS[name](hidden, steps))
    print(json.dumps({"seconds": spent, "rise": highest() - start, "peak": highest()}))


def highest() -> float:
    """The most memory this process has held so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the process that started this one
        return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(*, quick: bool) -> Iterator[Row]:
    """Peak memory of a plain step, a recorded one and an analysis."""
    shapes = [(16, 20)] if quick else [(128, 100), (128, 400), (256, 2000)]
    for hidden, steps in shapes:
        for name in ["recorded step"] if quick else list(WORKS):
            command = [sys.executable, str(COMMAND), "--child", name, str(hidden), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            case = {"cell": "LSTM", "H": hidden, "T": steps, "B": 16}
            goal = 4096.0 if (hidden, steps, name) == (256, 2000, "analysis") else None
            note = f"{found['peak']:.0f} MiB whole process, {found['seconds']:.3g} s"
            yield Row(
                "memory", f"peak above the start: {name}", found["rise"], "MiB", case,
                most=goal, note=note,
            )  # fmt: skip
            if goal is not None:
                what = "LSTM of 256 units, 2000 steps: recorded and analyzed"
                yield Row("whole runs", what, found["seconds"], "s", case, most=120.0)


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Both."""
    yield from recordings(quick=quick)
    yield from peaks(quick=quick)
