"""All arrays of a layer, as the table in `gradflow.analysis` lists them.

A measurement that is to be shown or saved adds a function here to `PARTS`: from what was measured to
variables and the coordinates they need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from gradflow.analyzer.activity import gate_statistics, sigmoid_and_other, state_norms
from gradflow.analyzer.loss import KINDS, grad_norms
from gradflow.analyzer.measured import Measured
from gradflow.analyzer.ranks import stable_rank


@dataclass(frozen=True)
class Part:
    """Variables with the names of their dimensions, and the coordinates of new dimensions."""

    variables: dict[str, tuple[tuple[str, ...], Any]]
    coords: dict[str, Any] = field(default_factory=dict)


def dataset(measured: Measured) -> xr.Dataset:
    """Everything measured on a layer, in float64."""
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    coords: dict[str, Any] = {}
    for make in PARTS:
        part = make(measured)
        for name, (dims, values) in part.variables.items():
            variables[name] = (dims, np.asarray(values, dtype=np.float64))
        coords |= part.coords
    return xr.Dataset(variables, coords=coords)


def _gains(m: Measured) -> Part:
    """The maps and the singular values of the mapped sequences."""
    maps, pair = m.maps, ("sequence", "source", "target")
    return Part(
        {
            "log_gain": (("norm", *pair), np.stack(list(maps.log_gain.values()))),
            "log_block_gain": (("block", *pair), maps.blocks),
            "log_cell_path": (pair, maps.cell_path),
            "log_singular": (("sequence", "index"), m.singular),
        },
        {
            "norm": list(maps.log_gain),
            "block": np.array(maps.block_names, dtype="<U8"),
            "sequence": np.array(m.mapped),
            "source": maps.sources,
            "target": np.arange(m.track.steps),
            "index": np.arange(m.singular.shape[1]),
        },
    )


def _ranks(m: Measured) -> Part:
    """How many directions are left against the lag."""
    stable = stable_rank(m.maps, m.ranks.lags, m.singular.shape[1])
    ranks = {"stable": stable, "effective": m.ranks.effective, "surviving": m.ranks.surviving}
    return Part(
        {f"rank_{name}": (("rank_lag",), values) for name, values in ranks.items()},
        {"rank_lag": m.ranks.lags.astype(int)},
    )


def _curve(m: Measured) -> Part:
    """The lag curve and the line of the rate beside it."""
    curve = m.curve
    values = {
        "median": curve.median,
        "low": curve.low,
        "high": curve.high,
        "count": curve.count,
        "zero_share": curve.zero_share,
        "slope": curve.slope,
        "fit": curve.line(m.rate.value),
    }
    return Part(
        {f"lag_{name}": (("lag",), array) for name, array in values.items()},
        {"lag": np.arange(m.track.steps)},
    )


def _sequences(m: Measured) -> Part:
    """Rate and length of every sequence."""
    lengths = m.track.lengths.cpu().numpy()
    return Part(
        {"sequence_rate": (("batch",), m.sequence_rates), "length": (("batch",), lengths)},
        {"batch": np.arange(m.track.batch)},
    )


def _gradients(m: Measured) -> Part:
    """The profile of the last loss step, the memory of units, the norms at every step."""
    profile = m.profile
    return Part(
        {
            "log10_grad": (("state", "unit", "back"), profile.log10_grad),
            "unit_order": (("state", "unit"), profile.unit_order),
            "memory_steps": (("state", "unit"), profile.memory_steps),
            "grad_norm": (("kind", "state", "step"), grad_norms(m.track, m.withheld)),
        },
        {
            "back": np.arange(m.track.steps),
            "unit": np.arange(profile.log10_grad.shape[1]),
            "kind": list(KINDS),
        },
    )


def _activity(m: Measured) -> Part:
    """Gates and states over the steps."""
    gates = gate_statistics(m.track)
    return Part(
        {
            **{name: (("gate", "step"), values) for name, values in gates.items()},
            "state_norm": (("state", "step"), state_norms(m.track)),
        },
        {
            "step": np.arange(m.track.steps),
            "state": list(m.track.states),
            "gate": np.array(list(sigmoid_and_other(m.track)), dtype="<U8"),
        },
    )


PARTS: list[Callable[[Measured], Part]] = [
    _gains,
    _ranks,
    _curve,
    _sequences,
    _gradients,
    _activity,
]
