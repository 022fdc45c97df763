"""Which part of a step loses the gradient: activations, gates, an RNN's weights, or a few steps alone.

An RNN's two summands of growth along the leading direction are mean ln ‖W q‖ and
mean ln (‖D W q‖/‖W q‖), see `gradflow.analyzer.exponents`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from gradflow.analysis.results import Finding, Rate
from gradflow.analyzer.activity import between, masked_mean, over_all, sigmoid_and_other
from gradflow.analyzer.causes.remedies import (
    MAJORITY,
    OVER_BAND,
    calmer,
    chrono,
    inputs_at,
    orthogonal,
    own,
    parameter_of,
    shrunk,
    started_as,
)
from gradflow.analyzer.evidence import Evidence, counted, number, over_sequences
from gradflow.analyzer.rates import rate_over_sequences
from gradflow.limits import (
    GATE_CLOSED,
    GATE_MOSTLY,
    SATURATED,
    UNITS_AT_FAULT,
    WALL_LEAST,
    WALL_LOSS,
    WALL_STEPS,
)


def saturated_activations(e: Evidence) -> Iterator[Finding]:
    """tanh at its flat ends in most units: h of an RNN, the candidate of a gated cell."""
    if not e.fades:
        return
    for name, values in _squashed(e).items():
        flat = (values.abs() > SATURATED).double()
        share = over_sequences(flat, e.track)
        if not share.value > UNITS_AT_FAULT:
            continue
        advice, code = calmer(e, "scale the inputs or the weights down, or add layer normalisation")
        often = int((flat[e.track.mask.cpu()].mean(0) > UNITS_AT_FAULT).sum())
        yield Finding(
            name="saturated-activations",
            layer=e.track.name,
            message=f"{share.value:.0%} of the activations {name} are saturated "
            f"(|{name}| > {SATURATED:g}): {often} of {values.shape[-1]} units most of the time",
            where=f"activations {name}",
            value=share.value,
            low=share.low,
            high=share.high,
            threshold=UNITS_AT_FAULT,
            basis=MAJORITY,
            advice=advice,
            code=code,
            source="Pascanu et al. 2013",
        )


def _squashed(e: Evidence) -> dict[str, Tensor]:
    """What has limits at ±1: what a tap marks may have none, and a ReLU has none above."""
    names = between(e.track) if e.spec is None else e.spec.tanh
    every = e.track.states | e.track.gates
    return {name: every[name].detach().cpu().double() for name in names}


def idle_units(e: Evidence) -> Iterator[Finding]:
    """ReLU units that are 0 at every step; where all paths are cut, `dead` counts them."""
    if not e.fades or e.verdict.name == "dead" or e.spec is None or not e.spec.relu:
        return
    idle = int((e.data["unit_idle"] == 1).sum())
    hidden = e.track.hidden
    if not idle > UNITS_AT_FAULT * hidden:
        return
    shown = (e.data["unit_idle"] == 1).values.nonzero()[0]
    listed = ", ".join(str(unit + 1) for unit in shown[:5]) + (", …" if len(shown) > 5 else "")
    yield Finding(
        name="idle-units",
        layer=e.track.name,
        message=f"{idle} of {hidden} ReLU units are 0 at every step: no gradient passes them",
        where=f"units {listed}",
        value=idle / hidden,
        threshold=UNITS_AT_FAULT,
        basis=MAJORITY,
        source="Le et al. 2015",
        advice="start from an identity recurrent matrix and zero biases, and train again, with a lower "
        "learning rate",
        code=started_as(e.track, "eye"),
    )


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
    advice, source, code = chrono(e, keeper)
    yield Finding(
        name=f"{keeper.name}-gates-{keeper.fault}",
        layer=e.track.name,
        message=f"{keeper.name} gates average {mean:.2f}: {keeper.keeps} for "
        f"{number(-1 / pace.value)} steps, of {e.span_words}",
        where=_shut(keeper.gate, f"{keeper.shut}below", gate, e),
        **_scale(e, pace),
        basis=OVER_BAND,
        source=source,
        code=code,
        advice=advice,
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
    """Gates shut in most units; those that keep the state have a finding of their own, as decays have."""
    if not e.fades or e.linear is not None:
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
    if not all(own(e.track, name) for name in names):
        return "change what makes its biases: they are no parameters of its own", ""
    return (
        f"set its biases to 0, and train again: they average {number(bias)}, which alone shuts it",
        "\n".join(
            f"{parameter_of(e.track, name)}.data[{rows.start}:{rows.stop}] = 0.0" for name in names
        ),
    )


def _shut(name: str, what: str, gate: Tensor, e: Evidence) -> str:
    """Which gate, and how often it is all but shut, if it ever is."""
    share = over_all((gate < GATE_CLOSED).double(), e.track.mask)
    often = f", {share:.0%} of its values {what} {GATE_CLOSED:g}" if share >= 0.005 else ""
    return f"gate {name}{often}"


def weights_contract(e: Evidence) -> Iterator[Finding]:
    """A vanilla RNN that fades chiefly because its weights shrink the leading direction."""
    weight, activation = _factors(e)
    if not e.fades or not weight.value < -e.band or activation.value < weight.value:
        return
    advice, source, code = orthogonal(e)
    yield replace(
        _finding(e, "weights-contract", weight, activation),
        threshold=-e.band,
        advice=advice,
        source=source,
        code=code,
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
        "smaller inputs or biases keep the activations where they are steep",
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
    both = weight.value + activation.value
    return Finding(
        name=name,
        layer=e.track.name,
        message="at every step the weights multiply the leading direction by "
        f"{number(math.exp(weight.value))}, the activations by {number(math.exp(activation.value))}: "
        f"together by {number(math.exp(both))}, so it {'shrinks' if both < 0 else 'grows'} by "
        f"{number(abs(both))} nats per step",
        where=counted(e.track.batch, "sequence"),
        value=shown.value,
        low=shown.low,
        high=shown.high,
        basis=OVER_BAND,
        severity=shown.value * e.span / math.log(10),
    )


def walls(e: Evidence) -> Iterator[Finding]:
    """At most a tenth of the steps account for half of what the leading direction loses."""
    if not e.fades:
        return
    growth = e.data["step_growth"].values
    known = int((~np.isnan(growth)).sum())
    lost = np.where(growth < 0, -growth, 0.0)  # NaN compares false
    steps = _highest(lost)
    if (
        known < WALL_LEAST
        or len(steps) > max(1, int(WALL_STEPS * known))
        or not _late_enough(e, steps)
    ):
        return
    within, total = float(lost[steps].sum()), float(lost.sum())
    if within < WALL_LOSS * math.log(10):
        return
    share = 1.0 if math.isinf(total) else within / total
    noun, verb = ("step", "accounts") if len(steps) == 1 else ("steps", "account")
    named = ", ".join(str(step + 1) for step in steps[:5]) + (", …" if len(steps) > 5 else "")
    yield Finding(
        name="walls",
        layer=e.track.name,
        message=f"{len(steps)} of {counted(known, 'step')} {verb} for {share:.0%} of what is lost: "
        f"{_decades(within)}",
        where=f"{noun} {named}",
        value=share,
        threshold=WALL_LOSS,
        basis=f"{100 * WALL_LOSS:g} % of the loss within {100 * WALL_STEPS:g} % of the steps",
        severity=-within / math.log(10),
        advice="look at what is read at these steps: an input far larger than the others, a token "
        "that shuts the gates, a reset",
        code=inputs_at(e, steps[:5]),
    )


def _highest(lost: np.ndarray) -> list[int]:
    """The fewest steps that lose half of everything, and all that are half as high as these."""
    order = np.argsort(-lost, kind="stable")
    if math.isinf(lost[order[0]]):
        return [int(step) for step in np.flatnonzero(np.isinf(lost))]
    reached = np.cumsum(lost[order]) >= WALL_LOSS * lost.sum()
    least = lost[order[int(reached.argmax())]]
    return [int(step) for step in np.flatnonzero(lost >= WALL_LOSS * least)] if least > 0 else []


def _late_enough(e: Evidence, steps: list[int]) -> bool:
    """Whether the steps are no mere beginning: a layer that is dead at once has no wall."""
    leading = e.growth.log_growth[..., 0].numpy()
    return bool(steps) and not np.isneginf(leading[0]).any()


def _decades(lost: float) -> str:
    if math.isinf(lost):
        return "an exact zero"
    return f"{number(lost / math.log(10))} decades"
