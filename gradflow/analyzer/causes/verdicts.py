"""Findings that put a verdict or a label into words, with the remedy for this kind of cell."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradflow.analysis import Finding
from gradflow.analyzer.causes.remedies import (
    BAND,
    CLIP,
    against_vanishing,
    calmer_input,
    identity,
    orthogonal,
)
from gradflow.analyzer.evidence import Evidence, counted, number


def dead(e: Evidence) -> Iterator[Finding]:
    """Exact zeros on every path."""
    if e.verdict.name != "dead":
        return
    cut_off = int(sum(rate == -math.inf for rate in e.sequence_rates))
    share = f"{cut_off} of {counted(len(e.sequence_rates), 'sequence')}"
    relu, extra = e.track.cell == "RNN_RELU", ""
    if relu:
        idle = int((e.data["unit_idle"] == 1).sum())
        extra = f"; {idle} of {e.track.hidden} ReLU units are 0 at every step" if idle else ""
    yield Finding(
        name="dead",
        layer=e.track.name,
        message=f"exact zeros cut every path in {share}{extra}",
        where=share,
        value=-math.inf,
        advice="start from an identity recurrent matrix and zero biases, lower the learning rate, "
        "or use a gated cell, and train again"
        if relu
        else "look for gates or activations that saturate to exactly 0: scale inputs and weights down",
        source="Le et al. 2015" if relu else "",
        severity=-math.inf,
        code=identity(e) if relu else calmer_input(e),
    )


def vanishing(e: Evidence) -> Iterator[Finding]:
    """The rate lies below the band, with the remedy for this kind of cell."""
    if e.verdict.name != "vanishing":
        return
    advice, source, code = against_vanishing(e)
    yield Finding(
        name="vanishing",
        layer=e.track.name,
        message=f"the gradient loses {number(-e.decades)} decades over {counted(e.span, 'step')}: "
        f"rate {_interval(e)} per step (vanishing: below −{number(e.band)})",
        where=_sequences(e),
        value=e.rate.value,
        low=e.rate.low,
        high=e.rate.high,
        threshold=-e.band,
        basis=BAND,
        source=source,
        severity=e.decades,
        advice=advice,
        code=code,
    )


def exploding(e: Evidence) -> Iterator[Finding]:
    """The rate lies above the band."""
    if e.verdict.name != "exploding":
        return
    steps = max(1, round(math.log(2) / e.rate.value))
    yield Finding(
        name="exploding",
        layer=e.track.name,
        message=f"the gradient gains {number(e.decades)} decades over {counted(e.span, 'step')}: "
        f"rate {_interval(e)} per step (exploding: above {number(e.band)})",
        where=_sequences(e),
        value=e.rate.value,
        low=e.rate.low,
        high=e.rate.high,
        threshold=e.band,
        basis=BAND,
        source="Pascanu et al. 2013; Mikhaeil et al. 2022",
        severity=e.decades,
        advice="clip the norm of the gradient, never its parts; that does not cure chaos: a positive "
        f"rate also asks to cut or teacher-force every ln 2/λ₁ = {counted(steps, 'step')}",
        code=CLIP,
    )


def transient(e: Evidence) -> Iterator[Finding]:
    """Growth by more than a decade that the rate does not show."""
    if "transient growth" not in e.labels or e.verdict.name in ("exploding", "stable"):
        return
    peak = float(max(value for value in e.curve.median if not math.isnan(value)))
    lag = int(list(e.curve.median).index(peak))
    yield Finding(
        name="transient-growth",
        layer=e.track.name,
        message=f"the gain rises by {number(peak / math.log(10))} decades over {counted(lag, 'step')}"
        f"{_afterwards(e, peak)}",
        where=f"lag {lag}",
        value=peak,
        low=float(e.curve.low[lag]),
        high=float(e.curve.high[lag]),
        threshold=math.log(10),
        basis="a rise by one decade",
        severity=peak / math.log(10),
        source="Pascanu et al. 2013",
        advice="clip the norm of the gradient, or shrink the norm of the recurrent weights",
        code=CLIP,
    )


def _afterwards(e: Evidence, peak: float) -> str:
    """Whether a gain that rose comes down again within what was measured."""
    last = next(value for value in reversed(e.curve.median) if not math.isnan(value))
    if peak - last > math.log(10):
        return " before it fades"
    return f" and has not faded after the {counted(e.curve.searched, 'step')} measured"


def few_channels(e: Evidence) -> Iterator[Finding]:
    """Hardly any direction survives where the verdict is open."""
    few = e.channels is not None and e.channels <= max(1, e.size // 20) and e.size >= 8
    if e.verdict.name not in ("inconclusive", "exploding") or not few:
        return
    assert e.channels is not None
    yield Finding(
        name="few-channels",
        layer=e.track.name,
        message=f"{e.channels} of {e.size} directions {'survives' if e.channels == 1 else 'survive'} "
        f"{counted(e.ranks.reach, 'step')}",
        where=counted(len(e.mapped), "mapped sequence"),
        value=float(e.channels),
        threshold=float(max(1, e.size // 20)),
        basis="one direction in twenty still at 10⁻³",
        source="Engelken 2023",
        advice="start the recurrent weights orthogonal, so that more directions keep their gradient, "
        "and train again",
        code=orthogonal(e) if e.kind == "RNN" else "",
    )


def _interval(e: Evidence) -> str:
    return f"{number(e.rate.value)} [{number(e.rate.low)}, {number(e.rate.high)}]"


def _sequences(e: Evidence) -> str:
    return "one sequence" if e.track.batch == 1 else f"{e.track.batch} sequences"
