"""All arrays of a layer, as the table in `gradflow.analysis` lists them.

A measurement that is to be shown or saved adds a function here to `PARTS`: from what was measured to
variables and the coordinates they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from gradflow.analyzer.activity import (
    gate_census,
    gate_statistics,
    idleness,
    saturation,
    sigmoid_and_other,
    state_norms,
    time_scales,
)
from gradflow.analyzer.evidence import Measured
from gradflow.analyzer.exponents import FACTORS, step_growth
from gradflow.analyzer.flow import input_gradient_norms
from gradflow.analyzer.linear_units import DECAY_FACTS, decay_facts
from gradflow.analyzer.loss import GRADIENTS, grad_norms, loss_reach
from gradflow.analyzer.paths import PATHS, path_gains
from gradflow.analyzer.ranks import stable_rank
from gradflow.analyzer.rates import rate_over_sequences
from gradflow.analyzer.spectrum import SIDES, sum_rule
from gradflow.analyzer.timeline import segment_lengths
from gradflow.limits import LAG_TOLERANCES, VERDICTS


@dataclass(frozen=True)
class Variables:
    """Variables with the names of their dimensions, and the coordinates of new dimensions."""

    variables: dict[str, tuple[tuple[str, ...], Any]]
    coords: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # of a variable: what limits it, in words


def dataset(measured: Measured) -> xr.Dataset:
    """Everything measured on a layer, in float64."""
    variables: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {}
    coords: dict[str, Any] = {}
    for make in PARTS:
        part = make(measured)
        for name, (dims, values) in part.variables.items():
            notes = {"note": part.notes[name]} if part.notes.get(name) else {}
            variables[name] = (dims, np.asarray(values, dtype=np.float64), notes)
        coords |= part.coords
    return xr.Dataset(variables, coords=coords)


def _gains(m: Measured) -> Variables:
    """The maps and the singular values of the mapped sequences."""
    maps, pair = m.maps, ("sequence", "source", "target")
    return Variables(
        {
            "log_gain": (("norm", *pair), np.stack(list(maps.log_gain.values()))),
            "log_block_gain": (("block", *pair), maps.blocks),
            "log_cell_path": (pair, maps.cell_path),
            "log_singular": (("sequence", "index"), m.ranks.singular),
        }
        | ({} if maps.rms_error is None else {"log_rms_error": (pair, maps.rms_error)}),
        {
            "norm": list(maps.log_gain),
            "block": np.array(maps.block_names, dtype=str),
            "sequence": np.array(m.mapped),
            "source": maps.sources,
            "target": np.arange(m.track.steps),
            "index": np.arange(m.ranks.singular.shape[1]),
        },
    )


def _ranks(m: Measured) -> Variables:
    """How many directions are left against the lag."""
    stable = stable_rank(m.maps, m.ranks.lags, m.ranks.singular.shape[1])
    ranks = {"stable": stable, "effective": m.ranks.effective, "surviving": m.ranks.surviving}
    return Variables(
        {f"rank_{name}": (("rank_lag",), values) for name, values in ranks.items()},
        {"rank_lag": m.ranks.lags.astype(int)},
    )


def _curve(m: Measured) -> Variables:
    """The lag curve and the line of the rate beside it."""
    curve = m.curve
    values = {
        "median": curve.median,
        "low": curve.low,
        "high": curve.high,
        "count": curve.count,
        "zero_share": curve.zero_share,
        "slope": curve.slope,
        "fit": curve.line(m.rate.value if m.settled else math.nan),
    }
    return Variables(
        {f"lag_{name}": (("lag",), array) for name, array in values.items()},
        {"lag": np.arange(m.track.steps)},
    )


def _sequences(m: Measured) -> Variables:
    """Gain over the span, rate and length of every sequence."""
    lengths = m.track.lengths.cpu().numpy()
    of_files: dict[str, tuple[tuple[str, ...], Any]] = {}
    if m.batches:
        of_files = {f"file_{name}": (("file",), [getattr(one, name).value for one in m.batches])
                    for name in ("gain", "rate")}  # fmt: skip
    return Variables(
        {
            **of_files,
            "sequence_gain": (("batch",), m.sequence_gains.values),
            "sequence_steps": (("batch",), m.sequence_gains.steps),
            "sequence_rate": (("batch",), m.sequence_rates),
            "rate_settling": ((), np.array(m.settling)),
            "length": (("batch",), lengths),
        },
        {"batch": np.arange(m.track.batch)}
        | ({"file": np.arange(len(m.batches))} if m.batches else {}),
    )


def _exponents(m: Measured) -> Variables:
    """Every exponent with its interval, how it settled, and what all of them must add up to."""
    found, steps = m.spectrum, m.track.steps
    trace = np.full((len(found.values), steps), np.nan)
    trace[: len(found.trace), : found.trace.shape[1]] = found.trace
    alive = np.isfinite(m.sequence_rates) & math.isfinite(m.rate.value)
    return Variables(
        {
            "lyapunov": (("index_k",), found.values),
            "lyapunov_low": (("index_k",), found.low),
            "lyapunov_high": (("index_k",), found.high),
            "lyapunov_settling": (("index_k",), found.settling),
            "lyapunov_trace": (("index_k", "step"), trace),
            "sum_rule": (("side",), sum_rule(m.track, m.growth, alive)),
        },
        {"index_k": np.arange(len(found.values)), "side": list(SIDES)},
    )


def _gradients(m: Measured) -> Variables:
    """The profile of the last loss step, the memory of units, the norms at every step."""
    profile = m.profile
    return Variables(
        {
            "log10_grad": (("state", "unit", "back"), profile.log10_grad),
            "unit_order": (("state", "unit"), profile.unit_order),
            "memory_steps": (("state", "unit"), profile.memory_steps),
            "grad_norm": (("kind", "state", "step"), grad_norms(m.track, m.withheld)),
            "loss_reach": ((), loss_reach(profile, list(m.track.states).index(m.track.main_state))),
        },
        {
            "back": np.arange(m.track.steps),
            "unit": np.arange(profile.log10_grad.shape[1]),
            "kind": list(GRADIENTS),
        },
    )


def _loss_steps(m: Measured) -> Variables:
    """Where the loss acts: the triangle of loss steps, and the gradient of the weights by lag."""
    seen = m.contributed
    return Variables(
        {
            "log10_triangle": (("state", "sequence", "loss_step", "step"), m.triangle.log10_norm),
            "lag_contribution": (("parameter", "lag"), seen.norm),
            "truncation_error": (("parameter", "lag"), seen.error),
            "cancellation": (("parameter",), seen.cancellation),
            "gradient_depth": (("parameter",), seen.depth),
            "truncation_window": (("parameter", "tolerance"), seen.window),
        },
        {
            "loss_step": m.triangle.loss_steps,
            "parameter": np.array(seen.parameters, dtype=str),
            "tolerance": list(LAG_TOLERANCES),
        },
        {"lag_contribution": seen.note},
    )


def _activity(m: Measured) -> Variables:
    """Gates and states over the steps."""
    gates = gate_statistics(m.track)
    return Variables(
        {
            **{name: (("gate", "step"), values) for name, values in gates.items()},
            "state_norm": (("state", "step"), state_norms(m.track)),
        },
        {
            "step": np.arange(m.track.steps),
            "state": list(m.track.states),
            "gate": np.array(list(sigmoid_and_other(m.track)), dtype=str),
        },
    )


def _units(m: Measured) -> Variables:
    """How every unit sits: its gates, its time-scale, how often it is saturated or idle."""
    units = m.profile.log10_grad.shape[1]
    gates = gate_census(m.track, units)
    return Variables(
        {
            "gate_value": (("gate", "unit", "step"), gates["gate_value"]),
            "gate_unit_closed": (("gate", "unit"), gates["gate_unit_closed"]),
            "gate_unit_open": (("gate", "unit"), gates["gate_unit_open"]),
            "time_scale": (
                ("unit",),
                time_scales(m.track, units) if m.linear is None else m.linear.time_scale,
            ),
            "unit_saturated": (("state", "unit"), saturation(m.track, units)),
            "unit_idle": (("unit",), idleness(m.track, units)),
        }
    )


def _linear(m: Measured) -> Variables:
    """How the decays of a linear recurrence lie, and what each of its heads keeps."""
    heads = None if m.linear is None else m.linear.heads
    count = 0 if heads is None else len(heads.gain)
    columns: dict[str, tuple[tuple[str, ...], Any]] = {}
    for name in ("gain", "rate"):
        found = [] if heads is None else list(getattr(heads, name))
        for end, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            columns[f"head_{name}{end}"] = (("head",), [getattr(one, part) for one in found])
    verdicts = [] if heads is None else [VERDICTS.index(one.name) for one in heads.verdict]
    curves = np.zeros((0, 0)) if heads is None else heads.log_gain
    facts = np.full(len(DECAY_FACTS), np.nan)
    if m.linear is not None:
        facts = np.array(decay_facts(m.linear.decays))
    return Variables(
        {
            **columns,
            "head_verdict": (("head",), verdicts),
            "head_log_gain": (("head", "head_lag"), curves),
            "head_erased": (("head",), [] if heads is None else heads.erased),
            "decay": (("decay_fact",), facts),
        },
        {
            "head": np.arange(1, count + 1),
            "head_lag": np.zeros(0, dtype=int) if heads is None else heads.lags,
            "decay_fact": list(DECAY_FACTS),
        },
    )


def _paths(m: Measured) -> Variables:
    """The four paths of an LSTM's cell state."""
    none = np.zeros((0, m.track.steps))
    gains = none if m.no_gains else path_gains(m.track, m.mapped, m.share)
    names = np.array(PATHS[: len(gains)], dtype=str)
    return Variables({"path_gain": (("path", "step"), gains)}, {"path": names})


def _leading(m: Measured) -> Variables:
    """The leading direction step by step, and the factors of an RNN's rate."""
    factors = [rate_over_sequences(column).value for column in m.factors.T]
    return Variables(
        {
            "step_growth": (("step",), step_growth(m.track, m.growth)),
            "rate_factor": (("factor",), np.array(factors)),
        },
        {"factor": list(FACTORS)},
    )


def _flow(m: Measured) -> Variables:
    """What is passed down, and the stretches between cuts."""
    lengths = [length for sequence in segment_lengths(m.track) for length in sequence]
    return Variables(
        {
            "segment_length": (("segment",), np.array(lengths)),
            "grad_input_norm": (("step",), input_gradient_norms(m.track, m.withheld)),
        }
    )


PARTS: list[Callable[[Measured], Variables]] = [
    _gains, _curve, _sequences, _exponents, _gradients, _loss_steps, _activity, _units, _linear, _paths,
    _leading, _flow, _ranks,
]  # fmt: skip
