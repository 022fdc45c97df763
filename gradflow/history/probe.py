"""What one probe measured: a `Probe` of a training step holds a `LayerProbe` of each layer.

In a sweep a probe is of one checkpoint: its `Source` says which.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gradflow.limits import HISTORY_DENSE, HISTORY_LAGS, HISTORY_RATIO


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


def lag_grid(steps: int) -> np.ndarray:
    """The lags kept of sequences of so many steps, at most 64: all first ones, then even in their logarithm.

    The grid does not depend on the length, so that probes and runs can be laid upon each other.

    Args:
        steps: T of the longest sequence.

    Returns:
        Lags in steps; of longer sequences a part of the same grid.

    >>> lag_grid(5).tolist(), lag_grid(24).tolist()[-4:]
    ([0, 1, 2, 3, 4], [16, 18, 20, 22])
    >>> len(lag_grid(4000)), len(lag_grid(1_000_000)), set(lag_grid(50)) <= set(lag_grid(300))
    (63, 63, True)
    """
    near = list(range(min(steps, HISTORY_DENSE + 1)))
    far: list[int] = []
    place = HISTORY_DENSE * HISTORY_RATIO
    while place < steps:
        far.append(int(place))
        place *= HISTORY_RATIO
    every = 1
    while len(near) + len(far) // every > HISTORY_LAGS:
        every *= 2
    return np.array(near + far[every - 1 :: every], dtype=np.int64)
