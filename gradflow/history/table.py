"""From the lines of a history to one labelled table, and to tidy frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from gradflow.errors import InputError, must_be
from gradflow.history.fields import COUNTED, OF_GATE, OF_LAG, OF_LAYER, OF_STEP, VERDICT
from gradflow.history.lines import ProbeLayout
from gradflow.history.probe import Source
from gradflow.history.reader import Read
from gradflow.limits import VERDICTS

if TYPE_CHECKING:
    from gradflow.history.series import History

HISTORY_TABLES = ("layers", "steps", "lags", "gates", "notes")
VERDICT_WORDS = np.array([*VERDICTS, ""])  # the last one where there is no verdict


def dataset(read: Read) -> xr.Dataset:
    """Every number of a history, NaN where it was not measured; `verdict` in words."""
    blocks = [block for block in read.blocks if block.steps]
    layouts = [block.layout for block in blocks]
    layers = list(dict.fromkeys(name for layout in layouts for name in layout.layers))
    gates = list(dict.fromkeys(name for layout in layouts for name in layout.gates))
    lags = sorted({lag for layout in layouts for lag in layout.lags})
    axes = {
        "values": ((tuple(OF_STEP), "of_step"),),
        "learning_rates": ((tuple(range(max((one.groups for one in layouts), default=0))), ""),),
        "layers": ((tuple(layers), "layers"), (tuple(OF_LAYER), "of_layer")),
        "gates": ((tuple(layers), "layers"), (tuple(gates), "gates"), (tuple(OF_GATE), "of_gate")),
        "lags": ((tuple(layers), "layers"), (tuple(OF_LAG), "of_lag"), (tuple(lags), "lags")),
    }
    numbers = [block.table() for block in blocks]
    whole = {name: _joined(name, some, numbers, layouts) for name, some in axes.items()}
    codes = np.ascontiguousarray(whole["layers"][:, :, 0])
    codes = np.where((codes >= 0) & (codes < len(VERDICTS)), codes, len(VERDICTS))  # NaN: none
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        VERDICT: (("step", "layer"), VERDICT_WORDS[codes.astype(int)])
    }
    for place, name in enumerate(OF_LAYER):
        if name != VERDICT:
            variables[name] = (("step", "layer"), _possible(name, whole["layers"][:, :, place]))
    for place, name in enumerate(OF_STEP):
        variables[name] = (("step",), whole["values"][:, place])
    for place, name in enumerate(OF_GATE):
        variables[name] = (("step", "layer", "gate"), whole["gates"][..., place])
    for place, name in enumerate(OF_LAG):
        variables[name] = (("step", "layer", "lag"), whole["lags"][:, :, place])
    variables["learning_rate"] = (("step", "group"), whole["learning_rates"])
    return xr.Dataset(
        variables,
        coords=_of_sweep([source for block in blocks for source in block.sources])
        | {
            "step": np.array([step for block in blocks for step in block.steps], dtype=np.int64),
            "layer": np.array(layers, dtype=str),
            "gate": np.array(gates, dtype=str),
            "lag": np.array(lags, dtype=np.int64),
            "group": np.arange(whole["learning_rates"].shape[1]),
        },
        attrs={"title": str(read.headers[-1].get("title", "")) if read.headers else ""},
    )


def _of_sweep(sources: Sequence[Source | None]) -> dict[str, Any]:
    """What is said of every probe of a sweep; nothing of a training."""
    if not any(sources):
        return {}
    return {
        name: ("step", np.array([getattr(source, name, "") for source in sources], dtype=str))
        for name in ("run", "checkpoint", "step_from", "failed")
    }


def _possible(name: str, numbers: np.ndarray) -> np.ndarray:
    """NaN, not measured, where a file says what no count can be."""
    if name not in COUNTED:
        return numbers
    numbers = np.ascontiguousarray(numbers)  # it is read several times
    fine = ((numbers >= COUNTED[name]) & (numbers < 2**53)) | np.isinf(numbers) & (numbers > 0)
    return numbers if (fine | np.isnan(numbers)).all() else np.where(fine, numbers, np.nan)


def _joined(
    name: str,
    axes: Sequence[tuple[tuple[Any, ...], str]],
    numbers: Sequence[np.ndarray],
    layouts: Sequence[ProbeLayout],
) -> np.ndarray:
    """One array of all probes, (probe, …), along axes with these labels; NaN where it has none."""
    labels = [labels for labels, _ in axes]
    own = [
        [getattr(layout, held) if held else tuple(range(layout.groups)) for _, held in axes]
        for layout in layouts
    ]
    if len(numbers) == 1 and own[0] == labels:  # as it is, without a copy
        return numbers[0][name]
    shape = (sum(map(len, numbers)), *map(len, labels))
    whole = np.full(shape, np.nan, dtype=np.float32 if name in ("gates", "lags") else np.float64)
    start = 0
    for some, found in zip(numbers, own, strict=True):
        there = [
            [place for place, one in enumerate(axis) if one in labels[n]]
            for n, axis in enumerate(found)
        ]
        to = [[labels[n].index(axis[place]) for place in there[n]] for n, axis in enumerate(found)]
        rows = range(start, start + len(some))
        whole[np.ix_(rows, *to)] = some[name][np.ix_(range(len(some)), *there)]
        start += len(some)
    return whole


# ------------------------------------------------------------------------------------------ tables


def frame(history: History, kind: str) -> pd.DataFrame:
    """A tidy table of the history; see `History.frame`."""
    if kind not in HISTORY_TABLES:
        advice = "leave it out for layers"
        raise InputError(must_be("kind", f"one of {', '.join(HISTORY_TABLES)}", repr(kind), advice))
    if kind == "notes":
        columns = ["step", "layer", "about", "text"]
        return pd.DataFrame([vars(note) for note in history.notes], columns=columns)
    data = history.data
    if kind == "steps":
        found = data[list(OF_STEP)].to_dataframe().reset_index()
        rates = data["learning_rate"].values
        for group in range(rates.shape[1]):
            found["learning_rate" if group == 0 else f"learning_rate_{group}"] = rates[:, group]
        return found
    names = {"layers": OF_LAYER, "lags": OF_LAG, "gates": OF_GATE}[kind]
    dims = {"layers": [], "lags": ["lag"], "gates": ["gate"]}[kind]
    found = data[list(names)].to_dataframe(dim_order=["step", "layer", *dims]).reset_index()
    measured = found[list(names)].replace("", np.nan).notna().any(axis=1)
    return found[measured].reset_index(drop=True)


def extent(history: History) -> str:
    """How many probes or checkpoints there are, and of which training steps, in words."""
    steps, swept = history.steps, history.swept
    if not len(steps):
        return "no probe yet"
    first, last, word = steps.min(), steps.max(), "checkpoint" if swept else "probe"
    said = f"{len(steps):,} {word}{'s' if len(steps) > 1 else ''}"
    if len(history.runs) > 1:
        said += f" of {len(history.runs):,} runs"
    if history.counted_in == "checkpoint":  # numbered by their places, which say nothing
        return said
    where = f"s {first:,} to {last:,}" if first != last else f" {first:,}"
    return f"{said}, {'at ' if len(steps) == 1 and not swept else ''}{history.counted_in}{where}"


def latest(history: History, most: int) -> list[str]:
    """A line for each layer of each run, with its last verdict; of so many."""
    every = [(run, one, name) for run, one in history.runs.items() for name in one.layers]
    lines = []
    for run, one, name in every[:most]:
        of_layer = one.data.sel(layer=name)
        told = np.flatnonzero(of_layer[VERDICT].values != "")
        last = of_layer.isel(step=told[-1] if len(told) else -1)
        rate, horizon = float(last["rate"]), float(last["horizon"])
        said = str(last[VERDICT].item()) or "no verdict"
        if np.isfinite(rate) and float(last["rate_settled"]) != 0:
            said += f", rate {rate:.4g} nats per step"
        if np.isfinite(horizon):
            said += f", horizon {horizon:g} steps"
        lines.append("  ".join(["", *filter(None, [run, name, one.cells[name], said])]))
    more = len(every) - most
    return [*lines, f"  and {more} more, see .frame()"] if more > 0 else lines
