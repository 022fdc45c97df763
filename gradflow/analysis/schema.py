"""What a saved run must hold: every variable with its dims, every field of a header with its type.

A file that was edited, or made to do harm, holds anything under these names. `checked_data` and `built` turn
it into what the rest may trust, and raise ValueError, TypeError or KeyError where it is something else.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import xarray as xr

from gradflow.errors import plain_name, plain_text, plain_value
from gradflow.limits import MOST_SENTENCES

# without these no picture of a layer can be drawn; older runs may lack others
ESSENTIAL = ("log_gain", "lag_median", "sequence_rate", "log10_grad", "unit_order", "grad_norm")
# fmt: off
DIMS: dict[str, tuple[str, ...]] = {  # of every variable, as `gradflow.analysis` lists them
    "log_gain": ("norm", "sequence", "source", "target"),
    "log_rms_error": ("sequence", "source", "target"),
    "log_block_gain": ("block", "sequence", "source", "target"),
    "log_cell_path": ("sequence", "source", "target"),
    "log10_triangle": ("state", "sequence", "loss_step", "step"),
    "log10_grad": ("state", "unit", "back"), "grad_norm": ("kind", "state", "step"),
    "log_singular": ("sequence", "index"), "lyapunov_trace": ("index_k", "step"),
    "gate_value": ("gate", "unit", "step"), "path_gain": ("path", "step"),
    "truncation_window": ("parameter", "tolerance"), "head_log_gain": ("head", "head_lag"),
    "rate_settling": (), "loss_reach": (), "sum_rule": ("side",), "decay": ("decay_fact",),
    "rate_factor": ("factor",), "segment_length": ("segment",),
    **dict.fromkeys(("rank_stable", "rank_effective", "rank_surviving"), ("rank_lag",)),
    **dict.fromkeys(("lag_median", "lag_low", "lag_high", "lag_count", "lag_zero_share", "lag_slope",
                     "lag_fit"), ("lag",)),
    **dict.fromkeys(("sequence_gain", "sequence_steps", "sequence_rate", "length"), ("batch",)),
    **dict.fromkeys(("file_gain", "file_rate"), ("file",)),
    **dict.fromkeys(("lyapunov", "lyapunov_low", "lyapunov_high", "lyapunov_settling"), ("index_k",)),
    **dict.fromkeys(("unit_order", "memory_steps", "unit_saturated"), ("state", "unit")),
    **dict.fromkeys(("lag_contribution", "truncation_error"), ("parameter", "lag")),
    **dict.fromkeys(("cancellation", "gradient_depth"), ("parameter",)),
    **dict.fromkeys(("gate_mean", "gate_closed", "gate_open"), ("gate", "step")),
    **dict.fromkeys(("gate_unit_closed", "gate_unit_open"), ("gate", "unit")),
    "state_norm": ("state", "step"),
    **dict.fromkeys(("time_scale", "unit_idle"), ("unit",)),
    **dict.fromkeys(("step_growth", "grad_input_norm"), ("step",)),
    **dict.fromkeys(("head_gain", "head_gain_low", "head_gain_high", "head_rate", "head_rate_low",
                     "head_rate_high", "head_verdict", "head_erased"), ("head",)),
}
WORD_DIMS = ("norm", "block", "side", "kind", "parameter", "state", "gate", "decay_fact", "path", "factor")
# fmt: on
LABELLED = {dim for dims in DIMS.values() for dim in dims} - {"segment"}
NEEDED_WORDS = {"norm": {"spectral", "rms", "loss"}, "kind": {"total", "direct", "last"}}
NAMES = ("name", "title", "cell", "layer", "layers", "part_of", "module")  # fields that are names
WORDS = "step_labels"
T = TypeVar("T")


def checked_data(data: xr.Dataset, steps: int, sequences: int) -> xr.Dataset:
    """The arrays of a layer, all of numbers, and coordinates that label their dims."""
    data[list(ESSENTIAL)]  # KeyError where one is missing
    for name, values in data.data_vars.items():
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{name} is no array of a run")
    coordinates = {str(name): _checked_labels(str(name), data[name]) for name in data.coords}
    if {*data.dims} & {*WORD_DIMS} - set(coordinates):
        raise ValueError("a dimension has no labels")
    sizes = data.sizes
    if sizes["step"] != steps or sizes["batch"] != sequences:
        raise ValueError("arrays of another length than the header says")
    if 0 in (sizes["lag"], sizes["unit"], sizes["state"], sizes["back"], sizes["sequence"]):
        raise ValueError("an array is empty")
    if not _is_permutations(data["unit_order"].values):
        raise ValueError("units in no order")
    return data.drop_vars([str(name) for name in data.coords]).assign_coords(coordinates)


def _is_permutations(order: np.ndarray) -> bool:
    """Whether each row has every unit once; −1 fills up those of states that have fewer."""
    rows = [row[row != -1] for row in order.reshape(-1, order.shape[-1])]
    return all(bool((np.sort(row) == np.arange(len(row))).all()) for row in rows)


def _checked_labels(name: str, values: xr.DataArray) -> np.ndarray:
    """Labels of a dimension: words that can be printed, or rising whole numbers."""
    labels = values.values
    if name in WORD_DIMS:
        words = [word for word in labels.tolist() if isinstance(word, str) and word.isprintable()]
        known = NEEDED_WORDS.get(name, set())
        if len(set(words)) != len(labels) or not known <= set(words):
            raise ValueError(f"{name} has labels that no run has")
        return np.array(words, dtype=str)
    if labels.dtype.kind not in ("f" if name == "tolerance" else "iu"):
        raise ValueError(f"{name} has labels that no run has")
    in_order = (
        np.sort(labels) if name == "sequence" else labels
    )  # the one in the middle stands first
    rising = bool((np.diff(in_order) > 0).all()) and (not labels.size or in_order[0] >= 0)
    if not rising or (labels.size and in_order[-1] > 10**9):
        raise ValueError(f"{name} has labels out of order")
    return labels if name == "tolerance" else labels.astype(np.int64)


def built(kind: type[T], header: object, **own: Any) -> T:
    """A dataclass from the fields that a JSON header holds, each of the type that it must have.

    Args:
        kind: the class.
        header: a mapping of its fields; those with a default may be missing.
        own: fields that do not come from the header.
    """
    if not isinstance(header, Mapping):
        raise TypeError(f"{kind.__name__} is no mapping")
    values, hints = dict(own), get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in own:
            continue
        if field.name in header:
            values[field.name] = _typed(hints[field.name], header[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(field.name)
    return kind(**values)


def _typed(hint: Any, value: Any, name: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [one for one in get_args(hint) if one is not type(None)]
        if value is None:
            if len(inner) < len(get_args(hint)):
                return None
            raise TypeError(name)
        return _typed(inner[0], value, name)
    if is_dataclass(hint):
        return built(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is dict:
        return {
            plain_name(key): plain_value(inner) for key, inner in _typed(dict, value, name).items()
        }
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or (len(value) > MOST_SENTENCES and name != WORDS):
            raise TypeError(name)
        return tuple(_typed(get_args(hint)[0], one, name) for one in value)
    if hint is np.ndarray:
        return np.array([_typed(float, one, name) for one in _typed(list, value, name)])
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not hint or (hint is int and abs(value) >= 2**63):
        raise TypeError(name)
    if (
        hint is str and name != WORDS
    ):  # words of a text are what they are: pictures make them legible
        return plain_name(value) if name in NAMES else plain_text(value)
    return value
