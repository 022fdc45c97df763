"""Tidy tables of an analysis; the CSVs are the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from gradflow.analysis.results import Finding, LayerAnalysis
from gradflow.limits import LN_GONE, VERDICTS

FRAMES = ("layers", "steps", "lags", "units", "heads", "head_lags", "findings")
OPTIONAL = ("heads", "head_lags")  # tables that most analyses have no row for
HEADLINE = [
    "layer", "verdict", "gain", "gain_low", "gain_high", "rate", "rate_low", "rate_high", "half_life",
    "horizon", "channels",
]  # fmt: skip


def _layers_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    rows = [
        {
            "layer": layer.name,
            "cell": layer.cell,
            "hidden": layer.hidden,
            "state_size": layer.size,
            "steps": layer.steps,
            "sequences": layer.sequences,
            "span": layer.span,
            "verdict": layer.verdict,
            "labels": "; ".join(layer.labels),
            "gain": layer.gain.value,
            "gain_low": layer.gain.low,
            "gain_high": layer.gain.high,
            "gain_steps": layer.gain.steps,
            "rate": layer.rate.value,
            "rate_low": layer.rate.low,
            "rate_high": layer.rate.high,
            "decades_over_span": layer.decades_over_span,
            "half_life": layer.half_life,
            "window": layer.window,
            "loss_reach": layer.loss_reach,
            "horizon": layer.horizon,
            "searched": layer.searched,
            "channels": layer.channels,
            "channel_steps": layer.channel_steps,
            "kaplan_yorke": layer.kaplan_yorke,
            "entropy_rate": layer.entropy_rate,
            "parity": layer.parity.status,
            "parity_error": layer.parity.error,
            "sentence": layer.sentence,
        }
        for layer in layers
    ]
    frame = pd.DataFrame(rows)
    return (
        frame.astype(
            {"window": "Int64", "horizon": "Int64", "channels": "Int64", "channel_steps": "Int64"}
        )
        if rows
        else frame
    )


def _steps_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    tables = []
    for layer in layers:
        data = layer.data
        columns: dict[str, Any] = {
            "layer": layer.name,
            "step": np.arange(1, data.sizes["step"] + 1),
        }
        if layer.step_labels:
            columns["label"] = layer.step_labels
        for state in data["state"].values:
            columns[f"norm_{state}"] = data["state_norm"].sel(state=state).values
            for kind in data["kind"].values:
                if kind == "direct" and state != "h":
                    continue
                columns[f"grad_{state}_{kind}"] = (
                    data["grad_norm"].sel(kind=kind, state=state).values
                )
        for gate in data["gate"].values:
            for what in ("mean", "closed", "open"):
                columns[f"gate_{gate}_{what}"] = data[f"gate_{what}"].sel(gate=gate).values
        for name in ("step_growth", "grad_input_norm"):
            if name in data:  # older runs do not have it
                columns[name] = data[name].values
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _lags_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    names = ("median", "low", "high", "count", "zero_share", "slope", "fit")
    tables = [
        pd.DataFrame(
            {"layer": layer.name, "lag": layer.data["lag"].values}
            | {name: layer.data[f"lag_{name}"].values for name in names}
            | _by_parameter(layer)
        )
        for layer in layers
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _by_parameter(layer: LayerAnalysis) -> dict[str, np.ndarray]:
    """What every lag brings to a weight's gradient, and what is lost without the lags beyond it."""
    if "lag_contribution" not in layer.data:  # older runs do not have it
        return {}
    each = [str(name) for name in layer.data["parameter"].values]
    return {
        f"{column}_{name}": layer.data[variable].sel(parameter=name).values
        for column, variable in (
            ("contribution", "lag_contribution"),
            ("truncation_error", "truncation_error"),
        )
        for name in each
    }


def _units_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    tables = []
    for layer in layers:
        for state in layer.data["state"].values:
            order = layer.data["unit_order"].sel(state=state).values
            rank = {int(unit): place for place, unit in enumerate(order[order >= 0], start=1)}
            units = sorted(rank)
            table = pd.DataFrame({"layer": layer.name, "state": state, "unit": np.add(units, 1)})
            table["memory_rank"] = [rank[unit] for unit in units]
            table["memory_steps"] = layer.data["memory_steps"].sel(state=state).values[units]
            for name in ("time_scale", "unit_saturated", "unit_idle"):
                if name in layer.data:  # older runs do not have it
                    table[name] = _of_state(layer, name, str(state))[units]
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _of_state(layer: LayerAnalysis, name: str, state: str) -> np.ndarray:
    """A quantity of every unit; one that no state is named for belongs to the main state."""
    values = layer.data[name]
    if "state" in values.dims:
        return np.asarray(values.sel(state=state).values)
    own = np.asarray(values.values)
    return own if state == layer.main_state else np.full_like(own, np.nan)


def _heads_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    columns = ["layer", "head", "verdict", "gain", "gain_low", "gain_high"]
    columns += ["rate", "rate_low", "rate_high", "horizon", "erased"]
    tables = []
    for layer in layers:
        data = layer.data
        if "head_gain" not in data or not data.sizes["head"]:  # older runs do not have it
            continue
        table = pd.DataFrame({"layer": layer.name, "head": data["head"].values})
        codes = data["head_verdict"].values.astype(int)
        table["verdict"] = [VERDICTS[code] for code in codes]
        for name in ("gain", "gain_low", "gain_high", "rate", "rate_low", "rate_high", "erased"):
            table[name] = data[f"head_{name}"].values
        gone = data["head_log_gain"].values < LN_GONE
        lags = data["head_lag"].values
        reached = [int(lags[row.argmax()]) if row.any() else None for row in gone]
        table["horizon"] = pd.array(reached, dtype="Int64")
        tables.append(table[columns])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _head_lags_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    """What the picture of the heads is drawn from: their gain at the distances that were measured."""
    tables = [pd.DataFrame(columns=["layer", "head", "lag", "median"])]
    for layer in layers:
        if "head_log_gain" in layer.data and layer.data.sizes["head"]:  # older runs do not have it
            table = layer.data["head_log_gain"].rename(head_lag="lag").to_dataframe("median")
            tables = [*tables[len(tables[0]) == 0 :], table.reset_index().assign(layer=layer.name)]
    return pd.concat(tables, ignore_index=True)[["layer", "head", "lag", "median"]]


def _findings_frame(layers: Iterable[LayerAnalysis]) -> pd.DataFrame:
    columns = list(Finding.__dataclass_fields__)
    return pd.DataFrame(
        [asdict(finding) for layer in layers for finding in layer.findings], columns=columns
    )


BUILDERS = {
    "layers": _layers_frame,
    "steps": _steps_frame,
    "lags": _lags_frame,
    "units": _units_frame,
    "heads": _heads_frame,
    "head_lags": _head_lags_frame,
    "findings": _findings_frame,
}
