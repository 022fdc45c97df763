"""Gates that shorten the memory, or that sit shut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from gradflow.analysis import Finding, Rate
from gradflow.analyzer.activity import between, masked_mean, over_all, sigmoid_and_other
from gradflow.analyzer.causes.remedies import (
    FOREIGN,
    MAJORITY,
    OVER_BAND,
    calmer,
    chrono,
    foreign_biases,
    own,
)
from gradflow.analyzer.evidence import Evidence, number, over_sequences
from gradflow.limits import GATE_CLOSED, GATE_MOSTLY, WALL_STEPS


def keeping_gates(e: Evidence) -> Iterator[Finding]:
    """A cell whose gates that keep the state alone shorten the memory below the span."""
    keeper = e.keeper
    if keeper is None or not e.fades:
        return
    gate = sigmoid_and_other(e.track)[keeper.gate]
    mean, pace = over_all(gate, e.track.mask), over_sequences(gate.log(), e.track)
    # the whole layer forgets faster than the band over the span through this gate alone
    fast = pace.value < -e.band if keeper.overwritten is None else mean < keeper.overwritten
    if not (fast and _at_most_steps(gate.log(), e) < -e.band):
        return
    yield Finding(
        name=f"{keeper.name}-gates-{keeper.fault}",
        layer=e.track.name,
        message=f"{keeper.name} gates average {mean:.2f}: {keeper.keeps} for "
        f"{number(-1 / pace.value)} steps, of your {e.span}",
        where=_shut(keeper.gate, f"{keeper.shut}below", gate, e),
        **_scale(e, pace),
        basis=OVER_BAND,
        source="" if foreign_biases(e) else "Tallec & Ollivier 2018",
        code=chrono(e),
        advice=FOREIGN if foreign_biases(e) else keeper.chrono,
    )


def _at_most_steps(logs: Tensor, e: Evidence) -> float:
    """Mean of ln gate without the tenth of the steps that are lowest: those would be walls."""
    steps = np.sort(masked_mean(logs, e.track.mask))
    known = steps[~np.isnan(steps)]
    return float(known[int(WALL_STEPS * len(known)) :].mean())


def _scale(e: Evidence, pace: Rate) -> dict[str, float]:
    """The time-scale −1/mean ln gate with its interval, in steps, and what it costs in decades."""
    return {
        "value": -1 / pace.value,
        "low": -1 / pace.low,
        "high": -1 / pace.high if pace.high < 0 else math.inf,
        "threshold": 1 / e.band,
        "severity": pace.value * e.span / math.log(10),
    }


def saturated_gates(e: Evidence) -> Iterator[Finding]:
    """Gates shut in most units; those that keep the state have a finding of their own."""
    if not e.fades:
        return
    for name, values in sigmoid_and_other(e.track).items():
        if name in between(e.track) or (e.keeper is not None and name == e.keeper.gate):
            continue
        shut = values < GATE_CLOSED
        share = over_sequences(shut.double(), e.track)
        if not share.value > GATE_MOSTLY:
            continue
        closed = e.data["gate_unit_closed"].sel(gate=name)
        most = int((closed > GATE_MOSTLY).sum())
        advice, code = _open_again(e, name)
        yield Finding(
            name="saturated-gates",
            layer=e.track.name,
            message=f"{share.value:.0%} of the gates {name} are saturated ({name} < {GATE_CLOSED:g}): "
            f"{most} of {e.track.hidden} units most of the time",
            where=f"gates {name}",
            value=share.value,
            low=share.low,
            high=share.high,
            threshold=GATE_MOSTLY,
            basis=MAJORITY,
            advice=advice,
            source="Ba et al. 2016",
            code=code,
        )


def _open_again(e: Evidence, gate: str) -> tuple[str, str]:
    """Advice and code for a gate that is shut: by its biases alone, or by what it reads."""
    names = [name for name in e.track.weights if name.startswith("bias")]
    rows = slice(0) if e.spec is None else e.spec.block(gate, e.track.hidden)
    bias = sum(float(e.track.weights[name].detach().double()[rows].mean()) for name in names)
    if not bias < math.log(GATE_CLOSED / (1 - GATE_CLOSED)):
        return calmer(e, "scale the inputs or the weights down, or add layer normalisation", gate)
    if not all(own(e, name) for name in names):
        return "change what makes its biases: they are no parameters of its own", ""
    return (
        f"set its biases to 0, and train again: they average {number(bias)}, which alone shuts it",
        "\n".join(f"{e.parameter(name)}.data[{rows.start}:{rows.stop}] = 0.0" for name in names),
    )


def _shut(name: str, what: str, gate: Tensor, e: Evidence) -> str:
    """Which gate, and how often it is all but shut, if it ever is."""
    share = over_all((gate < GATE_CLOSED).double(), e.track.mask)
    often = f", {share:.0%} of its values {what} {GATE_CLOSED:g}" if share >= 0.005 else ""
    return f"gate {name}{often}"
