"""What `gradflow.watch` was asked for, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradflow.errors import InputError, must_be
from gradflow.hooks.guard import foreign_code
from gradflow.hooks.lengths import Lengths
from gradflow.hooks.observe import patterns_of

PRESETS = ("pulse", "rate", "full")


@dataclass(frozen=True)
class WatchArguments:
    """The arguments of `gradflow.watch`, each as it must be."""

    folder: Path  # of the run
    optimizer: Optimizer | None  # whose steps are counted; None: the first that updates the model
    every: int  # the fewest steps between two probes
    budget: float | None  # share of the wall time
    preset: str  # one of `PRESETS`
    layers: list[str] | None  # names or globs
    lengths: Lengths  # real steps of padded sequences
    scaler: Any  # a GradScaler


def checked(
    model: object,
    folder: object,
    optimizer: object,
    every: object,
    budget: object,
    preset: object,
    layers: object,
    lengths: Any,
    scaler: Any,
) -> WatchArguments:
    """The arguments, each refused in a sentence where it is out of its range.

    Raises:
        InputError: one is.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise InputError(must_be("model", "a torch.nn.Module", kind, "pass the model itself"))
    if isinstance(model, torch.jit.ScriptModule):
        expected = "a module whose layers run in Python"
        raise InputError(must_be("model", expected, type(model).__name__, foreign_code([model])))
    if not isinstance(folder, str | Path):
        kind = type(folder).__name__
        raise InputError(must_be("folder", "a path", kind, "give one such as 'runs/a'"))
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        expected = "a whole number of steps of at least 1"
        raise InputError(must_be("every", expected, repr(every), "leave it out for 100"))
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if budget is not None and not (number and 0 < float(budget) <= 1):  # type: ignore[arg-type]
        expected = "a share of the wall time above 0 and up to 1, or None for any"
        raise InputError(must_be("budget", expected, repr(budget), "leave it out for 0.02"))
    if preset not in PRESETS:
        expected = f"one of {', '.join(PRESETS)}"
        raise InputError(must_be("preset", expected, repr(preset), "leave it out for rate"))
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        kind = type(scaler).__name__
        raise InputError(must_be("scaler", "a GradScaler", kind, "leave it out: one is found"))
    return WatchArguments(
        folder=Path(folder),
        optimizer=_optimizer(optimizer),
        every=every,
        budget=None if budget is None else float(budget),  # type: ignore[arg-type]
        preset=str(preset),
        layers=patterns_of(layers),
        lengths=lengths,
        scaler=scaler,
    )


def _optimizer(given: Any) -> Optimizer | None:
    """The optimizer itself, also where a wrapper of another library holds it."""
    for _ in range(3):
        if given is None or isinstance(given, Optimizer):
            return given
        given = getattr(given, "optimizer", math.nan)
    expected = "a torch.optim.Optimizer"
    advice = "leave it out: the first one that updates the model is found"
    raise InputError(must_be("optimizer", expected, "something else", advice))
