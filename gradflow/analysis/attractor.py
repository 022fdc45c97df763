"""Two numbers of a whole Lyapunov spectrum: how large the attractor is, how fast it forgets where it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gradflow.errors import InputError, must_be


def kaplan_yorke_dimension(exponents: Any, size: int | None = None) -> float:
    """How many dimensions of the state the motion fills: j + (λ_1 + … + λ_j) / |λ_{j+1}|.

    j is the largest number of leading exponents whose sum is not negative (Kaplan & Yorke 1979;
    Engelken, Wolf & Abbott 2023 for recurrent networks). It is not the number of units that matter.

    Args:
        exponents: (k,) nats per step or per any time, in any order.
        size: the state's width, where only its largest k exponents are given.

    Returns:
        From 0 (every direction contracts) to the state's width; NaN where an exponent is unknown, or
        so few are given that their sum is not yet negative.

    Raises:
        InputError: they are not one spectrum.

    >>> from gradflow.analyzer import kaplan_yorke_dimension
    >>> round(kaplan_yorke_dimension([0.9056, 0.0, -14.5723]), 3)    # Lorenz 1963
    2.062
    """
    values = _spectrum(exponents)
    if not len(values) or np.isnan(values).any():
        return math.nan
    sums = np.cumsum(values)
    negative = np.flatnonzero(sums < 0)
    if not len(negative):
        return float(len(values)) if len(values) == (size or len(values)) else math.nan
    kept = int(negative[0])
    before = float(sums[kept - 1]) if kept else 0.0
    return kept + before / abs(float(values[kept]))


def entropy_rate(exponents: Any, size: int | None = None) -> float:
    """Sum of the positive exponents: how much per step nearby states tell themselves apart.

    The most that the Kolmogorov–Sinai entropy can be (Ruelle 1978), and the entropy itself where
    Pesin's identity holds (Pesin 1977). It is not the entropy of the outputs.

    Args:
        exponents: (k,) nats per step, in any order.
        size: the state's width, where only its largest k exponents are given.

    Returns:
        Nats per step, 0 where nothing grows; NaN where an exponent is unknown, or so few are given
        that the last is still positive.

    Raises:
        InputError: they are not one spectrum.

    >>> from gradflow.analyzer import entropy_rate
    >>> round(entropy_rate([0.9624, -0.9624]), 4)                    # Arnold's cat map
    0.9624
    """
    values = _spectrum(exponents)
    cut_short = len(values) != (size or len(values)) and bool((values > 0).all())
    if not len(values) or np.isnan(values).any() or cut_short:
        return math.nan
    return float(values[values > 0].sum())


def _spectrum(exponents: Any) -> np.ndarray:
    """The exponents of one spectrum, the largest first."""
    values = np.asarray(exponents, dtype=float)
    if values.ndim != 1:
        advice = "give those of one sequence, or their mean over sequences"
        raise InputError(must_be("exponents", "one spectrum, (k,)", str(values.shape), advice))
    return -np.sort(-values)
