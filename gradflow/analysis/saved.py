"""One netCDF file for one analysis, written and read back exactly."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from gradflow.analysis.results import (
    UNMEASURED,
    Alone,
    Finding,
    Gain,
    LayerAnalysis,
    Prediction,
    Rate,
)
from gradflow.errors import FileError, InputError
from gradflow.limits import VERDICTS
from gradflow.recording import Parity

if TYPE_CHECKING:
    from gradflow.analysis.run import Analysis

SCHEMA = 1  # of a saved run and of summary.json; raised when a reader would be misled
# without these no picture of a layer can be drawn; older runs may lack others
ESSENTIAL = ("log_gain", "lag_median", "sequence_rate", "log10_grad", "unit_order", "grad_norm")
COMPRESSED = {
    "zlib": True,
    "complevel": 1,
    "shuffle": True,
}  # of large arrays in a file; loses nothing
LARGE = 1000  # entries
HEADER = {"title": str, "warnings": list, "provenance": dict, "layers": list}
PLAIN_TYPES = {"str": str, "int": int, "float": (int, float), "tuple[str, ...]": list}
LAYER = {  # the fields of `LayerAnalysis` whose types are plain
    name: PLAIN_TYPES[str(field.type)]
    for name, field in LayerAnalysis.__dataclass_fields__.items()
    if field.type in ("str", "int", "float") or name == "labels"
}
# fields of a layer that are written in a way of their own
APART = ("data", "lyapunov", "rate", "gain", "parity", "findings", "predictions", "alone")


def save(analysis: Analysis, path: Path) -> Path:
    header = {
        "schema": SCHEMA,
        "title": analysis.title,
        "warnings": list(analysis.warnings),
        "provenance": dict(analysis.provenance),
        "unseen": [asdict(one) for one in analysis.unseen],
        "layers": list(analysis.layers),
    }
    tree = {"/": xr.Dataset(attrs={"gradflow": json.dumps(header)})}
    packed: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(analysis.values()):
        packed[f"/layer{number}"] = {
            str(name): COMPRESSED for name, values in layer.data.items() if values.size >= LARGE
        }
        tree[f"/layer{number}"] = layer.data.assign_attrs(gradflow=json.dumps(_layer_header(layer)))
    # made in memory: on a full disk HDF5 ends the process
    made = xr.DataTree.from_dict(tree).to_netcdf(engine="h5netcdf", encoding=packed)
    place = path.resolve()
    part = place.with_name(f".gradflow-{uuid.uuid4().hex}")
    try:
        part.write_bytes(made)
        part.replace(place)
    except OSError as error:
        there = "it is as it was" if place.exists() else "nothing was written"
        why = error.strerror or error
        raise FileError(f"cannot write {path}: {why}; {there}, give another place") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return path


def _layer_header(layer: LayerAnalysis) -> dict[str, Any]:
    header = {
        name: getattr(layer, name)
        for name in LayerAnalysis.__dataclass_fields__
        if name not in APART
    }
    header["lyapunov"] = None if layer.lyapunov is None else layer.lyapunov.tolist()
    header["rate"], header["gain"] = asdict(layer.rate), asdict(layer.gain)
    header["parity"] = asdict(layer.parity)
    header["findings"] = [asdict(finding) for finding in layer.findings]
    header["alone"] = None if layer.alone is None else asdict(layer.alone)
    header["predictions"] = [asdict(prediction) for prediction in layer.predictions]
    header["arrays"] = {str(name): list(values.shape) for name, values in layer.data.items()}
    return header


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[LayerAnalysis]]:
    """The header of a saved run, and its layers."""
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise InputError(f"path must be a path, got {kind}; give a report folder or its run.nc")
    path = Path(path)
    file = path / "run.nc" if path.is_dir() else path
    if not file.exists():
        near = _near_runs(path)
        such = f", such as {near[0]}" if near else ""
        raise FileError(
            f"there is no run at {file}; give a folder written by gradflow, or its run.nc{such}"
        )
    try:
        with xr.open_datatree(file, engine="h5netcdf") as tree:
            tree.load()
            header = json.loads(tree.attrs["gradflow"])
            if header["schema"] != SCHEMA:
                raise FileError(_other_schema(file, header["schema"]))
            _check_types(header, HEADER)
            groups = [tree[f"/layer{number}"] for number in range(len(header["layers"]))]
            layers = [_layer_from(group.to_dataset()) for group in groups]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, RuntimeError) as error:
        raise FileError(_unreadable(file)) from error
    return header, layers


def _check_types(header: dict[str, Any], kinds: Mapping[str, Any]) -> None:
    """A header that was edited may hold other types than gradflow writes: TypeError names the field."""
    for name, kind in kinds.items():
        value = header[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(name)
        if isinstance(value, list) and not all(isinstance(part, str) for part in value):
            raise TypeError(name)


def _near_runs(path: Path) -> list[Path]:
    """Runs inside a folder that is none itself, or beside a path that does not exist."""
    if path.is_dir():
        found = [file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/run.nc")]
        return sorted(found)
    beside = {file.parent.name: file.parent for file in path.parent.glob("*/run.nc")}
    return [beside[name] for name in difflib.get_close_matches(path.name, sorted(beside), n=1)]


def _other_schema(file: Path, schema: object) -> str:
    """What to do with a run of another version, newer or older."""
    newer = isinstance(schema, int) and schema > SCHEMA
    todo = "update gradflow, or analyze" if newer else "analyze"
    whose = "by a newer gradflow, " if newer else ""
    return (
        f"{file} was saved {whose}with schema {schema}, this gradflow reads {SCHEMA}; {todo} the "
        "model again"
    )


def _unreadable(file: Path) -> str:
    """Why a file is no run, by its first bytes, and what to do."""
    try:
        with file.open("rb") as opened:
            head = opened.read(8)
    except OSError as error:
        return f"cannot read {file}: {error.strerror or error}; check its permissions"
    if not head:
        return f"{file} is empty (0 bytes): its copy failed; copy it or analyze the model again"
    if head.startswith(b"\x89HDF"):
        return f"{file} is damaged, or is not a run saved by gradflow; copy it or analyze the model again"
    return (
        f"{file} is not a run saved by gradflow; give a report folder or its run.nc, or, if it is a "
        f"model: gradflow analyze {shlex.quote(str(file))}"
    )


def _layer_from(data: xr.Dataset) -> LayerAnalysis:
    header = json.loads(data.attrs.pop("gradflow"))
    data[list(ESSENTIAL)]  # KeyError where one is missing
    arrays = header.pop("arrays", {})  # older runs do not list them
    if any(list(data[name].shape) != shape for name, shape in arrays.items()):
        raise ValueError("an array of another shape than it was saved with")
    _check_types(header, LAYER)
    if header["verdict"] not in VERDICTS or header["steps"] < 1 or header["sequences"] < 1:
        raise ValueError("a verdict or a number that no run has")
    lyapunov = header.pop("lyapunov")
    return LayerAnalysis(
        **header
        | {
            "labels": tuple(header["labels"]),
            "step_labels": tuple(header.get("step_labels", ())),
            "rate": Rate(**header["rate"]),
            "gain": _gain_from(header),
            "parity": Parity(**header["parity"]),
            "findings": tuple(Finding(**finding) for finding in header["findings"]),
            "predictions": tuple(_prediction_from(p) for p in header.get("predictions", ())),
            "lyapunov": None if lyapunov is None else np.asarray(lyapunov, dtype=float),
            "alone": _alone_from(header.get("alone")),
            "data": data,
        }
    )


def _alone_from(header: dict[str, Any] | None) -> Alone | None:
    if header is None:
        return None
    return Alone(**header | {"rate": Rate(**header["rate"]), "gain": _gain_from(header)})


def _prediction_from(header: dict[str, Any]) -> Prediction:
    return Prediction(**header | {"rate": Rate(**header["rate"]), "gain": _gain_from(header)})


def _gain_from(header: dict[str, Any]) -> Gain:
    """Older runs do not have it."""
    return Gain(**header["gain"]) if "gain" in header else UNMEASURED
