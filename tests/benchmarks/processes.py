"""Whole processes: starting Python, `gradflow --help`, `import gradflow`, a whole analysis."""

from __future__ import annotations

import os
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

STARTS = (
    ("gradflow --help", ("-m", "gradflow", "--help"), 0.25),
    ("import gradflow", ("-c", "import gradflow"), 0.25),
    ("import torch, for comparison", ("-c", "import torch"), None),
)


def run(*arguments: str, folder: str | None = None) -> float:
    """Wall-clock seconds of one process."""
    command = [sys.executable, *arguments]
    return seconds(lambda: subprocess.run(command, capture_output=True, check=True, cwd=folder))


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Seconds beyond those of Python itself, pair by pair."""
    rounds = 1 if quick else 9
    for what, arguments, most in STARTS[:2] if quick else STARTS:
        run(*arguments)
        more = [run(*arguments) - run("-c", "pass") for _ in range(rounds)]
        low, median, high = np.quantile(more, [0.25, 0.5, 0.75])
        yield Row(
            "processes", f"{what}, beyond starting Python", float(median), "s",
            low=float(low), high=float(high), most=None if quick else most,
        )  # fmt: skip
    if not quick:
        yield whole_analysis()
        yield page_over_torch()


def whole_analysis() -> Row:
    """The command on a state_dict: three probes, the report with all its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        model = nn.LSTM(10, 64, 2, batch_first=True)
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        times = [run("-m", "gradflow", "analyze", "model.pt", folder=folder) for _ in range(3)]
        case = {"cell": "LSTM", "H": 64, "layers": 2, "T": 100}
        what = "gradflow analyze model.pt, a whole process"
        return Row("whole runs", what, float(np.median(times)), "s", case)


def page_over_torch(rounds: int = 5) -> Row:
    """Processor seconds of the command on two small layers over those of importing torch, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(nn.LSTM(10, 20, 2).state_dict(), Path(folder) / "model.pt")
        command = ("-m", "gradflow", "analyze", "model.pt")
        found = [
            (spent(*command, folder=folder), spent("-c", "import torch", folder=folder))
            for _ in range(rounds + 1)
        ][1:]  # the first one compiles what is imported
    pages, imports = np.array(found).T
    low, median, high = np.quantile(pages / imports, [0.25, 0.5, 0.75])
    return Row(
        "whole runs", "a page from weights alone over importing torch, processor time", float(median), "×",
        {"cell": "LSTM", "H": 20, "layers": 2, "T": 100}, float(low), float(high), most=3.0,
        note=f"{np.median(pages):.3g} s against {np.median(imports):.3g} s, {rounds} pairs",
    )  # fmt: skip


def spent(*arguments: str, folder: str) -> float:
    """Processor seconds of one process; what it imports stays compiled, as where it is installed."""
    before = os.times()
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
    environment = {**os.environ, **compiled}
    command = [sys.executable, *arguments]
    subprocess.run(command, capture_output=True, check=True, cwd=folder, env=environment)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
