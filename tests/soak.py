"""Many recordings, analyses and reports in one process: what grows.

`python tests/steadiness.py soak` is the whole of it; the suite runs a small version.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from interrupts import RECURRENCES, Model
from torch import Tensor, nn

import gradflow

WARM_UP = 0.25  # of all that is done: allocators and caches fill up


@dataclass(frozen=True)
class Growth:
    """What many repetitions of one thing left behind."""

    bytes_each: float  # slope of the resident memory over the repetitions after the warm-up
    noise: float  # its standard error
    more: dict[str, int]  # what is counted -> by how much more of it there is


def resident() -> int:
    """Bytes of this process in memory, after everything that can be is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counted(models: list[nn.Module]) -> dict[str, int]:
    """What must not become more."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at the class of some lazy objects warns
        tensors = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
    modules = [module for model in models for module in model.modules()]
    hooks = [vars(module)[name] for module in modules for name in vars(module) if "hooks" in name]
    hooks += [p._backward_hooks or () for model in models for p in model.parameters()]
    return {
        "tensors": tensors,
        "hooks": sum(map(len, hooks)),
        "open files": len(os.listdir("/proc/self/fd")),
        "figures": len(plt.get_fignums()),
        "threads": threading.active_count(),
    }


def growth(
    work: Callable[[], object], times: int, models: list[nn.Module], *, samples: int = 40
) -> Growth:
    """What so many repetitions leave behind, after a warm-up; the memory is looked at that often."""
    for _ in range(max(1, int(times * WARM_UP))):
        work()
    before, seen, every = counted(models), [(0, resident())], max(1, times // samples)
    for done in range(1, times + 1):
        work()
        if done % every == 0:
            seen.append((done, resident()))
    after = counted(models)
    done_by, memory = np.array(seen, dtype=float).T
    (slope, _), covariance = np.polyfit(
        done_by, memory, 1, cov="unscaled" if len(seen) < 4 else True
    )
    more = {name: after[name] - before[name] for name in before if after[name] > before[name]}
    return Growth(float(slope), float(covariance[0, 0] ** 0.5), more)


def recordings() -> tuple[Callable[[], object], list[nn.Module]]:
    """Steps of every kind of recurrence, each recorded and read."""
    models = [Model(kind) for kind in RECURRENCES]
    turns, x = itertools.cycle(models), torch.randn(5, 2, 3)

    def work() -> None:
        model = next(turns)
        model.zero_grad()
        with gradflow.record(model) as recording:
            model(x, lambda: None).pow(2).sum().backward()
        assert all(track.has_gradient and track.grad_h.numel() for track in recording.values())

    return work, [*models]


def recorded(steps: int = 12) -> gradflow.Recording:
    """One recording of a fused layer."""
    model = nn.LSTM(2, 4)
    with gradflow.record(model) as recording:
        model(torch.randn(steps, 3, 2))[0][-1].pow(2).sum().backward()
    return recording


def analyses() -> tuple[Callable[[], object], list[nn.Module]]:
    """Analyses, each of a new recording."""
    return lambda: gradflow.analyze(recorded()), []


def reports() -> tuple[Callable[[], object], list[nn.Module]]:
    """Whole reports of one analysis, with all pictures."""
    analysis = gradflow.analyze(recorded())

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            gradflow.report(analysis, Path(folder) / "run")

    return work, []


def long(kind: str, steps: int) -> Callable[[], object]:
    """A recording of one very long sequence, read."""
    model = Model(kind)
    x = torch.randn(steps, 2, 3)

    def work() -> None:
        model.zero_grad()
        with gradflow.record(model) as recording:
            model(x, lambda: None).pow(2).sum().backward()
        assert {len(track.grad_h) for track in recording.values()} == {steps}

    return work


PARTS = {"recordings": recordings, "analyses": analyses, "reports": reports}
LONG = {"fused": 20_000, "cells": 8_000, "own": 8_000, "tap": 8_000}  # steps of one sequence
