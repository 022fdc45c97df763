"""What only a linear recurrence has: decays that the input writes, and heads beside each other.

Letters: G heads, D distinct decays, U units as they are shown, K distances, B sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradflow.analysis import Gain, Rate
from gradflow.analyzer.rates import Verdict
from gradflow.limits import LN_GONE, NEVER_FORGETS


@dataclass(frozen=True)
class Heads:
    """What each head keeps."""

    gain: tuple[Gain, ...]  # (G,) over the span, with its interval over sequences
    rate: tuple[Rate, ...]  # (G,) nats per step, likewise
    verdict: tuple[Verdict, ...]  # (G,)
    lags: np.ndarray  # (K,) distances
    log_gain: np.ndarray  # (G, K) median over pairs of the mapped sequences, nats
    erased: (
        np.ndarray
    )  # (G,) share of steps whose rank-one part all but erases a direction; NaN without


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
