"""Whole processes: starting Python, `gradflow --help`, `import gradflow`, a whole analysis."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.rows import Row
from benchmarks.timing import seconds


def run(*arguments: str, folder: str | None = None) -> float:
    """Wall-clock seconds of one process."""
    command = [sys.executable, *arguments]
    return seconds(lambda: subprocess.run(command, capture_output=True, check=True, cwd=folder))


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Seconds beyond those of Python itself, pair by pair."""
    rounds = 1 if quick else 9
    for what, arguments, most in (
        ("gradflow --help", ("-m", "gradflow", "--help"), 0.25),
        ("import gradflow", ("-c", "import gradflow"), 0.25),
        ("import torch, for comparison", ("-c", "import torch"), None),
    ):
        run(*arguments)
        more = [run(*arguments) - run("-c", "pass") for _ in range(rounds)]
        low, median, high = np.quantile(more, [0.25, 0.5, 0.75])
        yield Row(
            "processes", f"{what}, beyond starting Python", float(median), "s",
            low=float(low), high=float(high), most=None if quick else most,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        size = 4 if quick else 64
        model = nn.LSTM(10, size, 2, batch_first=True)
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        steps = "6" if quick else "100"
        times = [
            run("-m", "gradflow", "analyze", "model.pt", "--seq-len", steps, folder=folder)
            for _ in range(1 if quick else 3)
        ]
        case = {"cell": "LSTM", "H": size, "layers": 2, "T": int(steps)}
        what = "gradflow analyze model.pt, a whole process"
        yield Row("whole runs", what, float(np.median(times)), "s", case)
