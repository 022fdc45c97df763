"""One netCDF file for one analysis, written and read back exactly."""

from __future__ import annotations

import difflib
import io
import json
import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import xarray as xr

from gradflow.analysis.results import UNMEASURED, LayerAnalysis
from gradflow.analysis.schema import DIMS, LABELLED, built, checked_data
from gradflow.errors import FileError, InputError, checked_path, must_be, one_sentence, plain_text
from gradflow.limits import ANNOUNCED, RUN_LAYERS, UNPACKED_TIMES, VERDICTS
from gradflow.recording.tracks import Unseen
from gradflow.writing import clear, put_back, whole_file

if TYPE_CHECKING:
    from gradflow.analysis.run import Analysis

SCHEMA = 1  # of a saved run and of summary.json; raised when a reader would be misled
# large arrays in a file; loses nothing
COMPRESSED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
LARGE = 1000  # entries
# fields of a layer that are written in a way of their own
APART = ("data", "lyapunov", "rate", "gain", "parity", "findings", "predictions", "alone")


def save(analysis: Analysis, path: Path) -> Path:
    if len(analysis.layers) > RUN_LAYERS:
        most = f"at most {RUN_LAYERS} layers"
        raise InputError(must_be("a saved run", most, len(analysis.layers), "record fewer at once"))
    header = {
        "schema": SCHEMA,
        "title": analysis.title,
        "warnings": list(analysis.warnings),
        "provenance": dict(analysis.provenance),
        "unseen": [asdict(one) for one in analysis.unseen],
        "layers": list(analysis.layers),
    }
    made = io.BytesIO()  # in memory: on a full disk HDF5 ends the process
    with h5py.File(made, "w", track_order=True) as file:
        file.attrs["gradflow"] = json.dumps(header)
        for number, layer in enumerate(analysis.values()):
            group = file.create_group(f"layer{number}", track_order=True)
            group.attrs["gradflow"] = json.dumps(_layer_header(layer))
            _write(group, layer.data)
    clear(Path(os.path.realpath(path)).parent)
    with whole_file(path, binary=True) as packed:
        packed.write(made.getbuffer())
    return path


def _write(group: h5py.Group, data: xr.Dataset) -> None:
    """The arrays of a layer as netCDF-4 has them; xarray's own way takes ten times as long."""
    scales: dict[Any, h5py.Dataset] = {}
    for name in dict.fromkeys([*data.coords, *data.sizes]):  # in this order they come back
        known, size = name in data.coords, data.sizes[name]
        scales[name] = _array(group, name, data[name].values if known else np.zeros(size, ">f4"))
        said = f"This is a netCDF dimension but not a netCDF variable.{size:10}"
        scales[name].make_scale(name if known else said)
    for name, array in data.data_vars.items():
        made = _array(group, name, array.values)
        for place, dim in enumerate(array.dims):
            made.dims[place].attach_scale(scales[dim])
        made.attrs.update(array.attrs)


def _array(group: h5py.Group, name: Any, values: np.ndarray) -> h5py.Dataset:
    kind = h5py.string_dtype() if values.dtype.kind == "U" else values.dtype
    values = values.astype(object) if values.dtype.kind == "U" else values
    grows = tuple(size or None for size in values.shape) if 0 in values.shape else None
    packed = COMPRESSED if values.size >= LARGE else {}
    return group.create_dataset(name, data=values, dtype=kind, maxshape=grows, **packed)


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


def read(path: str | os.PathLike[str]) -> tuple[Header, list[LayerAnalysis]]:
    """The header of a saved run, and its layers."""
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise InputError(f"path must be a path, got {kind}; give a report folder or its run.nc")
    path = checked_path(path)
    put_back(path.parent if path.name == "run.nc" else path)
    file = path / "run.nc" if path.is_dir() else path
    if not file.is_file():
        near = _near_runs(path)
        such = f", such as {near[0]}" if near else ""
        raise FileError(
            f"there is no run at {file}; give a folder written by gradflow, or its run.nc{such}"
        )
    try:
        with h5py.File(file, "r") as opened:
            header = _header_of(opened, file)
            layers = []
            for number, name in enumerate(header.layers):
                layers.append(_layer_from(opened[f"/layer{number}"], file.stat().st_size))
                if layers[-1].name != name:
                    raise ValueError("another layer than the header says")
    except DAMAGES as error:
        raise FileError(one_sentence(_unreadable(file), str(path))) from error
    return header, layers


# what h5py, xarray and json raise on a damaged or edited file
DAMAGES = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, MemoryError,
)  # fmt: skip


def _arrays(group: h5py.Group, size: int) -> xr.Dataset:
    """The arrays of a group that a run may have, in memory; of a file of this many bytes.

    Read by h5py: xarray's reader has it name every dimension, for which it searches all of the file.
    """
    known = {name: group[name] for name in group if name in DIMS or name in LABELLED}
    # A compressed array that announces gigabytes takes a few bytes
    if sum(one.nbytes for one in known.values()) > max(ANNOUNCED, UNPACKED_TIMES * size):
        raise ValueError("it announces more numbers than such a file holds")
    arrays, labels = {}, {}
    for name, one in known.items():
        if one.external or one.is_virtual:
            raise ValueError("its numbers are in another file")
        values = one.asstr()[()] if h5py.check_string_dtype(one.dtype) else one[()]
        note = one.attrs.get("note")
        notes = {"note": plain_text(note)} if isinstance(note, str) else {}
        if name in DIMS:
            arrays[name] = (DIMS[name], values, notes)
        elif b"a netCDF dimension but not" not in np.bytes_(one.attrs.get("NAME", b"")[:99]):
            labels[name] = (name, values)
    return xr.Dataset(arrays, labels)


@dataclass(frozen=True)
class Header:
    """What a file says of the whole run."""

    title: str  # the model's name
    warnings: tuple[str, ...]  # as of an `Analysis`
    provenance: dict[str, Any]  # likewise
    layers: tuple[str, ...]  # names, in the order of the groups
    unseen: tuple[Unseen, ...] = ()  # likewise; older runs do not have it


def _header_of(opened: h5py.File, file: Path) -> Header:
    header = json.loads(opened.attrs["gradflow"])
    if header["schema"] != SCHEMA:
        raise FileError(one_sentence(_other_schema(file, header["schema"]), str(file)))
    found = built(Header, header)
    if not found.layers or len(set(found.layers)) < len(found.layers):
        raise ValueError("no layers, or two of one name")
    if len(found.layers) > RUN_LAYERS:
        said = (
            f"{file} holds {len(found.layers):,} layers, more than the {RUN_LAYERS} that are read"
        )
        raise FileError(one_sentence(f"{said}; record fewer at once", str(file)))
    return found


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


def _layer_from(group: h5py.Group, size: int) -> LayerAnalysis:
    header, data = json.loads(group.attrs["gradflow"]), _arrays(group, size)
    arrays = header.pop("arrays", {})  # older runs do not list them
    if any(list(data[name].shape) != shape for name, shape in arrays.items()):
        raise ValueError("an array of another shape than it was saved with")
    header.setdefault("gain", asdict(UNMEASURED))  # which older runs do not have either
    layer = built(LayerAnalysis, header, data=data)
    judged = [layer.verdict, *(prediction.verdict for prediction in layer.predictions)]
    sizes = (layer.steps, layer.sequences, layer.hidden, layer.size, layer.span)
    if not set(judged) <= set(VERDICTS) or min(sizes) < 1 or layer.searched < 0:
        raise ValueError("a verdict or a number that no run has")
    if layer.step_labels and len(layer.step_labels) != layer.steps:
        raise ValueError("labels of other steps")
    return replace(layer, data=checked_data(data, layer.steps, layer.sequences))
