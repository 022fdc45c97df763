"""Activations at their flat ends, and ReLU units that are never on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gradflow.analysis import Finding
from gradflow.analyzer.activity import between
from gradflow.analyzer.causes.remedies import MAJORITY, calmer, identity
from gradflow.analyzer.evidence import Evidence, over_sequences
from gradflow.limits import SATURATED, UNITS_AT_FAULT


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
        code=identity(e),
    )
