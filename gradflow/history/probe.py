"""What one probe measured: a `Probe` of a training step holds a `LayerProbe` of each layer.

In a sweep a probe is of one checkpoint: its `Source` says which.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class LayerProbe:
    """The numbers of one layer at one training step; names as in `gradflow.history.fields`."""

    values: dict[str, float]  # name of `OF_LAYER` -> number; those not measured are left out
    verdict: str = ""  # one of gradflow.limits.VERDICTS, "" without one
    gates: dict[str, dict[str, float]] = field(default_factory=dict)  # gate -> of `OF_GATE`
    lags: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))  # (K,) of `lag_grid`
    profile: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (K,) log10
    direct: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (K,) log10
    sentence: str = ""  # the verdict in words, for whoever is told of it; not kept in the file


@dataclass(frozen=True)
class Note:
    """Something that was said at a training step."""

    step: int  # the training step; 0 before the first
    about: str  # "verdict", "nonfinite", "alert", "interval", "resumed", "warning", "failed"
    text: str  # one sentence
    layer: str = ""  # its name, "" of the whole run


@dataclass(frozen=True)
class TrainingStep:
    """A training step, and where it stands."""

    number: int  # of updates, or of epochs
    found: str  # "global_step in the checkpoint"
    counts: str = ""  # what it counts: "update", "epoch"; "" where that is not known


@dataclass(frozen=True)
class Source:
    """Where a row of a sweep is from: one checkpoint of one run."""

    checkpoint: str  # its path as it was found, or the name that a model was given
    run: str  # its folder, below the one that all have in common: a seed, a run; "" where there is one
    step_from: str = ""  # where its training step stands, in words
    failed: str = ""  # why it could not be measured, one sentence; "" where it was
    counts: str = (
        ""  # what its training step counts: "update", "epoch", "checkpoint"; "" if not known
    )


@dataclass(frozen=True)
class Probe:
    """All that one probe measured."""

    step: int  # the training step, counted in updates from 1
    values: dict[str, float]  # name of `OF_STEP` -> number
    layers: dict[str, LayerProbe]  # layer name -> its numbers
    learning_rates: tuple[float, ...] = ()  # one of each parameter group
    notes: tuple[Note, ...] = ()  # what was said at it
    source: Source | None = None  # of a sweep
