"""Findings that put a verdict or a label into words, with the remedy for this kind of cell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradflow.analysis.results import Finding
from gradflow.analyzer.causes.remedies import (
    CLIP_CODE,
    OVER_BAND,
    against_vanishing,
    calmer_input,
    started_as,
)
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.limits import BAND_WORDS, FEW_CHANNELS, FEW_CHANNELS_UNITS, GONE_WORDS, LN_BAND


def dead(e: Evidence) -> Iterator[Finding]:
    """Exact zeros on every path."""
    if e.verdict.name != "dead":
        return
    if not e.gain.steps:
        return  # by cuts, which have a finding of their own
    cut_off = int(sum(gain == -math.inf for gain in e.sequence_gains.values))
    share = f"{cut_off} of {counted(len(e.sequence_gains.values), 'sequence')}"
    relu, extra = e.spec is not None and e.spec.relu, ""
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
        code=started_as(e.track, "eye") if relu else calmer_input(e),
    )


def vanishing(e: Evidence) -> Iterator[Finding]:
    """The gain over the span is below a tenth, with the remedy for this kind of cell."""
    if e.verdict.name != "vanishing":
        return
    yield _of_verdict(e, "loses", *against_vanishing(e))


def exploding(e: Evidence) -> Iterator[Finding]:
    """The gain over the span is above ten."""
    if e.verdict.name != "exploding":
        return
    advice = "clip the norm of the gradient, never its parts"
    if e.linear is not None:
        advice += "; a linear recurrence grows only where |a| > 1: bound what makes the decay"
        advice += " (a sigmoid, or exp(−softplus(·)))"
        if e.linear.rank_one:
            advice += ", and β‖k‖² below 2: normalise the keys"
    elif e.settled and e.rate.value > 0:
        steps = counted(max(1, round(math.log(2) / e.rate.value)), "step")
        advice += (
            "; that does not cure chaos: " if "chaotic" in e.labels else "; the growth stays: "
        )
        advice += f"a positive rate also asks to cut or teacher-force every ln 2/λ₁ = {steps}"
    yield _of_verdict(e, "gains", advice, "Pascanu et al. 2013; Mikhaeil et al. 2022", CLIP_CODE)


def _of_verdict(e: Evidence, moves: str, advice: str, source: str, code: str) -> Finding:
    return Finding(
        name=e.verdict.name,
        layer=e.track.name,
        message=f"the gradient {moves} {number(abs(e.decades))} decades over {e.over}{_gain(e)} "
        f"({e.verdict.name}: more than one){_rate(e)}",
        where=_sequences(e),
        value=e.decades,
        low=e.gain.low / math.log(10),
        high=e.gain.high / math.log(10),
        threshold=math.copysign(1.0, e.decades),
        basis=OVER_BAND,
        source=source,
        severity=e.severity,
        advice=advice,
        code=code,
    )


def transient(e: Evidence) -> Iterator[Finding]:
    """Growth by more than the band that the rate does not show."""
    if "transient growth" not in e.labels or e.verdict.name == "stable":
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
        threshold=LN_BAND,
        basis=f"a rise by {BAND_WORDS}",
        severity=peak / math.log(10),
        source="Pascanu et al. 2013",
        advice="clip the norm of the gradient, or shrink the norm of the recurrent weights",
        code=CLIP_CODE,
    )


def _afterwards(e: Evidence, peak: float) -> str:
    """Whether a gain that rose comes down again within what was measured."""
    last = next(value for value in reversed(e.curve.median) if not math.isnan(value))
    if peak - last > LN_BAND:
        return " before it fades"
    return f" and has not faded after the {counted(e.curve.searched, 'step')} measured"


def few_channels(e: Evidence) -> Iterator[Finding]:
    """Hardly any direction survives where the verdict is open."""
    most = max(1, e.size // FEW_CHANNELS)
    few = e.channels is not None and e.channels <= most and e.size >= FEW_CHANNELS_UNITS
    if e.verdict.name not in ("inconclusive", "exploding") or not few or "chaotic" in e.labels:
        return  # most directions of a chaotic network contract
    assert e.channels is not None
    yield Finding(
        name="few-channels",
        layer=e.track.name,
        message=f"{e.channels} of {e.size} directions {'survives' if e.channels == 1 else 'survive'} "
        f"{counted(e.ranks.reach, 'step')}",
        where=counted(len(e.mapped), "mapped sequence"),
        value=float(e.channels),
        threshold=float(most),
        basis=f"one direction in {FEW_CHANNELS} still at {GONE_WORDS}",
        source="Engelken 2023",
        advice="start the recurrent weights orthogonal, so that more directions keep their gradient, "
        "and train again; not tried here",
        code=started_as(e.track, "orthogonal") if e.spec and e.spec.vanilla else "",
    )


def _gain(e: Evidence) -> str:
    """The interval of the decades, where they are more than a point."""
    if e.gain.low == e.gain.high:
        return ""
    low, high = sorted(abs(end) / math.log(10) for end in (e.gain.low, e.gain.high))
    return f" [{number(low)}, {number(high)}]"


def _rate(e: Evidence) -> str:
    """The rate with its interval, where it has settled."""
    if not e.settled or not math.isfinite(e.rate.value):
        return ""
    return f"; rate {number(e.rate.value)} [{number(e.rate.low)}, {number(e.rate.high)}] per step"


def _sequences(e: Evidence) -> str:
    if e.batches:
        return f"{len(e.batches)} batches"
    if e.track.batch == 1:
        return "one sequence"
    voting = int(e.sequence_gains.voting.sum())
    return (
        f"{voting} of {e.track.batch} sequences"
        if voting < e.track.batch
        else f"{voting} sequences"
    )


def hidden_paths(e: Evidence) -> Iterator[Finding]:
    """An LSTM that grows, at most steps through the gates and h rather than along its cells.

    ‖∂c_t/∂c_{t−1}‖ minus that of its forget path is the least that the paths through h can have; a
    step counts where this alone exceeds the forget path.
    """
    grows = e.verdict.name == "exploding" or "transient growth" in e.labels
    if e.spec is None or e.spec.paths is None or e.verdict.name == "stable" or not grows:
        return
    gain = e.data["path_gain"]
    total, forget = gain.sel(path="total").values, gain.sel(path="forget gate").values
    known = ~np.isnan(total)
    if not known.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (total[known] - forget[known]) / forget[known]
    if not np.median(ratio) > 1:
        return
    through = {name: float(np.nanmedian(gain.sel(path=f"through {name}"))) for name in "fig"}
    widest = max(through, key=lambda name: through[name])
    low, middle, high = (float(value) for value in np.quantile(ratio, [0.1, 0.5, 0.9]))
    yield Finding(
        name="hidden-paths-drown-cell",
        layer=e.track.name,
        message=f"∂c/∂c of one step has norm {number(float(np.median(total[known])))}, of which the "
        f"forget gates give {number(float(np.median(forget[known])))}: the paths through h carry the "
        f"growth, chiefly through {widest} ({number(through[widest])})",
        where=f"{float((ratio > 1).mean()):.0%} of the steps",
        value=middle,
        low=low,
        high=high,
        threshold=1.0,
        basis="the paths through h exceed the cell's own",
        source="Kanuparthi et al. 2019",
        advice="block the gradient through h at random steps (h-detach), or shrink the recurrent "
        "weights",
        code="h = h.detach() if torch.rand(()) < 0.25 else h  # at every step of the loop"
        + (" over torch's cell of this kind" if e.fused else ""),
    )
