"""A linear recurrence as it is shown: its decays, its heads, and entries that belong together as one unit.

A state may have 262,144 numbers, complex ones among them. Shown is one unit for each channel of
(channels, N), each key of (heads, d_k, d_v): its size is the root of the sum of squares over its
entries, so norms over units are norms over entries.

Letters: T steps, B sequences, S the numbers of a state, U units, w entries of each, S = U w,
G heads, D distinct decays, K distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis.results import Gain, Rate
from gradflow.analyzer.rates import Verdict
from gradflow.cells.linear import HEAD_AXES
from gradflow.limits import LN_GONE, LOSS_BYTES, NEVER_FORGETS, UNITS_EACH, UNITS_MOST
from gradflow.recording.source import Backward, Forward, OfStates
from gradflow.recording.track import Track


@dataclass(frozen=True)
class Heads:
    """What each head keeps."""

    gain: tuple[Gain, ...]  # (G,) over the span, with its interval over sequences
    rate: tuple[Rate, ...]  # (G,) nats per step, likewise
    verdict: tuple[Verdict, ...]  # (G,)
    lags: np.ndarray  # (K,) distances
    log_gain: np.ndarray  # (G, K) median over pairs of the mapped sequences, nats
    erased: np.ndarray  # (G,) share of steps whose rank-one part all but erases a direction


@dataclass(frozen=True)
class Decays:
    """How the decays of the batch lie, over all real steps and sequences."""

    mean_log: np.ndarray  # (D,) mean ln |a|
    low: np.ndarray  # (D,) smallest |a|
    high: np.ndarray  # (D,) largest |a|
    copies: int  # entries of the state that share each
    floor: float  # smallest |a| of all
    at_floor: float  # share of all decays that are hardly larger
    moves: bool  # whether a decay ever changes, by step or by sequence

    @property
    def time_scale(self) -> np.ndarray:
        """−1/mean ln |a| in steps, (D,): inf where it is always 1, 0 where it is ever exactly 0."""
        with np.errstate(divide="ignore"):
            found = -1 / self.mean_log
        return np.where(self.mean_log >= 0, np.inf, found)


DECAY_FACTS = ("forget", "keep", "floor", "at floor", "moves")


def decay_facts(decays: Decays) -> tuple[float, ...]:
    """As in `DECAY_FACTS`: shares of entries whose mean is below 10⁻³ a step, and never below 0.9999;
    the smallest decay, the share of all that lie at it, and 1 if any ever changes."""
    known = ~np.isnan(decays.mean_log)
    if not known.any():
        return (math.nan,) * len(DECAY_FACTS)
    forget = float((decays.mean_log[known] < LN_GONE).mean())
    keep = float((decays.low[known] > NEVER_FORGETS).mean())
    return forget, keep, decays.floor, decays.at_floor, float(decays.moves)


@dataclass(frozen=True)
class LinearFacts:
    """Beside the verdict of a linear recurrence."""

    shape: tuple[int, ...]  # of one state
    decays: Decays
    heads: Heads | None  # None without heads, or with one
    time_scale: np.ndarray  # (U,) of the slowest decay of each unit that is shown
    rank_one: bool  # whether a step has a rank-one part beside its decay


def entries_of(shape: tuple[int, ...]) -> int:
    """w: how many entries of the state, one behind the other, are one unit.

    >>> entries_of((32,)), entries_of((8, 4)), entries_of((1536, 16)), entries_of((4, 16, 16))
    (1, 1, 16, 16)
    """
    if len(shape) == 1 or (len(shape) < HEAD_AXES and math.prod(shape) <= UNITS_EACH):
        return 1
    width = shape[-1]
    return width if math.prod(shape) // width <= UNITS_MOST else math.prod(shape[1:])


def as_units(track: Track) -> Track:
    """The track whose states are the sizes of its units, all real; its step maps stay the whole's."""
    width = entries_of(track.state_shape)
    complex_ = any(state.is_complex() for state in track.states.values())
    if width == 1 and not complex_:
        return track
    return replace(track, source=UnitsSource(track.source, width, track.state_shape), _cache={})


def slowest_of_units(shape: tuple[int, ...], axes: Sequence[int], decays: Decays) -> np.ndarray:
    """−1/mean ln |a| of the slowest decay of every unit, (U,) steps."""
    if decays.mean_log.shape == (1,) and math.isnan(decays.mean_log[0]):
        return np.full(math.prod(shape) // entries_of(shape), math.nan)
    wide = [
        shape[0] if len(shape) == HEAD_AXES and not place else n for place, n in enumerate(axes)
    ]
    scales = np.broadcast_to(decays.time_scale.reshape(wide), shape)
    found: np.ndarray = scales.reshape(-1, entries_of(shape)).max(1)
    return found


@dataclass(frozen=True, eq=False)
class UnitsSource(OfStates):
    """A source whose states are sizes of units."""

    width: int  # w
    shape: tuple[int, ...]  # of one state

    def _of(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.linalg.vector_norm(value.unflatten(-1, (-1, self.width)), dim=-1)
            for name, value in values.items()
        }

    def forward(self) -> Forward:
        """Sizes of the states; of the decays the largest of a unit."""
        found = self.inner.forward()
        gates = {name: self._largest(gate) for name, gate in found.gates.items()}
        states, initial = self._of(found.states), self._of(found.initial)
        return replace(found, states=states, initial=initial, gates=gates)

    def _largest(self, gate: Tensor) -> Tensor:
        units = math.prod(self.shape) // self.width
        if gate.shape[-1] <= units:
            return gate.repeat_interleave(units // gate.shape[-1], dim=-1)
        return gate.unflatten(-1, (units, -1)).amax(-1)

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Of single loss steps, a few at a time."""
        states = self.inner.forward().states
        each = 16 * sum(state.shape[0] * state.shape[2] for state in states.values())
        few = max(1, LOSS_BYTES // (each * len(sequences)))
        parts = [self.inner.loss_steps(sequences, some, dtype) for some in loss_steps.split(few)]
        if any(part is None for part in parts):
            return None
        sized = [self._of(part.grads) for part in parts]
        grads = {name: torch.cat([one[name] for one in sized]) for name in sized[0]}
        return Backward(grads, None, None, None)
