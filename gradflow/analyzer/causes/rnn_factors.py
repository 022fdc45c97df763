"""Which factor of an RNN's product of Jacobians does it: its weights or its activations.

The two summands of its growth along the leading direction, mean ln ‖W q‖ and
mean ln (‖D W q‖/‖W q‖), see `gradflow.analyzer.leading`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from gradflow.analysis import Finding, Rate
from gradflow.analyzer.causes.remedies import OVER_BAND, calmer, orthogonal, shrunk
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.analyzer.rates import rate_over_sequences


def weights_contract(e: Evidence) -> Iterator[Finding]:
    """A vanilla RNN that fades chiefly because its weights shrink the leading direction."""
    weight, activation = _factors(e)
    if not e.fades or not weight.value < -e.band or activation.value < weight.value:
        return
    yield replace(
        _finding(e, "weights-contract", weight, activation),
        threshold=-e.band,
        advice="start the recurrent weights orthogonal, then they shrink nothing, and train again",
        source="Arjovsky et al. 2016",
        code=orthogonal(e),
    )


def activations_contract(e: Evidence) -> Iterator[Finding]:
    """A vanilla RNN that fades chiefly because its activations are flat along the way."""
    weight, activation = _factors(e)
    if not e.fades or not activation.value < -e.band or not activation.value < weight.value:
        return
    if activation.value == -math.inf:
        return  # `dead` says so
    advice, code = calmer(
        e,
        "smaller inputs or biases keep the activations where they are steep; larger recurrent weights "
        "would only flatten them further",
    )
    yield replace(
        _finding(e, "activations-contract", weight, activation),
        threshold=-e.band,
        advice=advice,
        source="Pascanu et al. 2013",
        code=code,
    )


def weights_expand(e: Evidence) -> Iterator[Finding]:
    """A vanilla RNN that explodes: its weights do it, since no slope exceeds 1."""
    weight, activation = _factors(e)
    if e.verdict.name != "exploding" or not weight.value > e.band:
        return
    code = shrunk(e, math.exp(-e.gain.pace))
    yield replace(
        _finding(e, "weights-expand", weight, activation),
        threshold=e.band,
        advice="shrink the recurrent weights until the growth is gone"
        if code
        else "start the recurrent weights smaller, and train again",
        source="Pascanu et al. 2013",
        code=code,
    )


def _factors(e: Evidence) -> tuple[Rate, Rate]:
    """Rate and interval of the two; NaN, which compares false, for other cells."""
    weight, activation = (rate_over_sequences(column) for column in e.factors.T)
    return weight, activation


def _finding(e: Evidence, name: str, weight: Rate, activation: Rate) -> Finding:
    shown = activation if name == "activations-contract" else weight
    return Finding(
        name=name,
        layer=e.track.name,
        message="at every step the weights multiply the leading direction by "
        f"{number(math.exp(weight.value))}, the activations by {number(math.exp(activation.value))}: "
        f"it grows by {_sum(weight.value, activation.value)} per step",
        where=counted(e.track.batch, "sequence"),
        value=shown.value,
        low=shown.low,
        high=shown.high,
        basis=OVER_BAND,
        severity=shown.value * e.span / math.log(10),
    )


def _sum(weight: float, activation: float) -> str:
    """The two summands and what they make; rounding errors of a vanishing one are no digits.

    >>> _sum(-0.5, -0.25), _sum(1e-9, -2.0), _sum(0.3, 1e-17)
    ('−0.5 − 0.25 = −0.75', '0 − 2 = −2', '0.3 + 0 = 0.3')
    """
    weight, activation = (value if abs(value) > 5e-5 else 0.0 for value in (weight, activation))
    sign = "−" if activation < 0 else "+"
    return f"{number(weight)} {sign} {number(abs(activation))} = {number(weight + activation)}"
