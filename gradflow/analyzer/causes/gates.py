"""Gates that shorten the memory, or that sit shut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from gradflow.analysis import Finding, Rate
from gradflow.analyzer.activity import CANDIDATES, masked_mean, over_all, sigmoid_and_other
from gradflow.analyzer.causes.remedies import (
    BAND,
    FOREIGN,
    MAJORITY,
    calmer,
    chrono,
    foreign_biases,
    own,
)
from gradflow.analyzer.census import KEEPERS
from gradflow.analyzer.evidence import Evidence, number, over_sequences
from gradflow.limits import GATE_CLOSED, GATE_MOSTLY, OVERWRITTEN, WALL_STEPS


def forget_gates(e: Evidence) -> Iterator[Finding]:
    """An LSTM whose forget gates alone shorten the memory below the span."""
    if e.kind != "LSTM" or not e.fades:
        return
    forget = sigmoid_and_other(e.track)["f"]
    mean, pace = over_all(forget, e.track.mask), over_sequences(forget.log(), e.track)
    # the whole layer forgets faster than one decade over the span through this gate alone
    if not pace.value < -e.band or not _at_most_steps(forget.log(), e) < -e.band:
        return
    yield Finding(
        name="forget-gates-closed",
        layer=e.track.name,
        message=f"forget gates average {mean:.2f}: cells keep their memory for "
        f"{number(-1 / pace.value)} steps, of your {e.span}",
        where=_shut("f", "closed, below", forget, e),
        **_scale(e, pace),
        basis=BAND,
        source="" if foreign_biases(e) else "Tallec & Ollivier 2018",
        code=chrono(e),
        advice=FOREIGN
        if foreign_biases(e)
        else (
            "draw the forget biases from the range of distances in the task (chrono initialisation) and "
            "train again; of the two bias vectors, which add up, set one to zero"
        ),
    )


def update_gates(e: Evidence) -> Iterator[Finding]:
    """A GRU whose update gates overwrite the state at every step."""
    if e.kind != "GRU" or not e.fades:
        return
    update = sigmoid_and_other(e.track)["z"]
    mean, pace = over_all(update, e.track.mask), over_sequences(update.log(), e.track)
    if not (_at_most_steps(update.log(), e) < -e.band and mean < OVERWRITTEN):
        return
    yield Finding(
        name="update-gates-overwrite",
        layer=e.track.name,
        message=f"update gates average {mean:.2f}: units keep their state for "
        f"{number(-1 / pace.value)} steps, of your {e.span}",
        where=_shut("z", "below", update, e),
        **_scale(e, pace),
        basis=BAND,
        source="" if foreign_biases(e) else "Tallec & Ollivier 2018",
        code=chrono(e),
        advice=FOREIGN
        if foreign_biases(e)
        else (
            "draw the update biases from the range of distances in the task (chrono initialisation), so "
            "that units keep their state, and train again; of the two bias vectors set one to zero"
        ),
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
        if name in CANDIDATES or name == KEEPERS.get(e.kind):
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
    block = list(e.track.gates).index(gate)
    bias = sum(
        float(e.track.weights[name].detach().double().chunk(len(e.track.gates))[block].mean())
        for name in ("bias_ih", "bias_hh")
        if name in e.track.weights
    )
    if not bias < math.log(GATE_CLOSED / (1 - GATE_CLOSED)):
        return calmer(e, "scale the inputs or the weights down, or add layer normalisation", gate)
    if not all(own(e, name) for name in ("bias_ih", "bias_hh")):
        return "change what makes its biases: they are no parameters of its own", ""
    first, last = block * e.track.hidden, (block + 1) * e.track.hidden
    return (
        f"set its biases to 0, and train again: they average {number(bias)}, which alone shuts it",
        "\n".join(
            f"{e.parameter(name)}.data[{first}:{last}] = 0.0" for name in ("bias_ih", "bias_hh")
        ),
    )


def _shut(name: str, what: str, gate: Tensor, e: Evidence) -> str:
    """Which gate, and how often it is all but shut, if it ever is."""
    share = over_all((gate < GATE_CLOSED).double(), e.track.mask)
    often = f", {share:.0%} of its values {what} {GATE_CLOSED:g}" if share >= 0.005 else ""
    return f"gate {name}{often}"
