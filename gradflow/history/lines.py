"""The file of a history: lines of JSON, one a probe, with the numbers as packed arrays.

A line is appended with one write, and is valid alone, so that another process may read while it is
written, on any file system, and whatever ends the writer costs at most the last line. A line that was cut
off is skipped; what follows it begins on a line of its own. The numbers of a probe stand in base64, a
multiple of three bytes each, so that those of many are unpacked together. (SQLite would need
shared memory, which network file systems lack, or more than one fsync a probe; HDF5 leaves a file that is
cut off unreadable; zarr makes a file of every chunk.)

Kinds of lines:

=========  ===================================================================================
header     how the run is watched; one each time that a writer opened the file
layout     what the arrays of the lines after it hold: layers, gates, lags, names of numbers
probe      ``step`` and ``numbers``, in base64 the arrays ``values`` (name,), ``learning_rates``
           (group,), ``layers`` (layer, name), all float64, ``gates`` (layer, gate, name) and
           ``lags`` (layer, name, lag), float32, one behind the other, little-endian
note       a sentence on a training step
source     the checkpoint that the next probe is of, in a sweep
end        the writer was closed
=========  ===================================================================================
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import numpy as np

from gradflow.errors import plain_name, plain_record
from gradflow.history.fields import OF_GATE, OF_LAG, OF_LAYER, OF_STEP, VERDICT
from gradflow.history.probe import Note, Probe, Source
from gradflow.limits import GROUPS, VERDICTS

HISTORY_SCHEMA = 1  # of the file; raised when a reader would be misled
HISTORY_FILE = "history.jsonl"  # its name in the folder of a run


@dataclass(frozen=True)
class ProbeLayout:
    """What the arrays of a probe's line hold, in order."""

    layers: tuple[str, ...]  # names
    cells: tuple[str, ...]  # kind of cell of each layer
    gates: tuple[str, ...]  # names of the gates of any layer
    lags: tuple[int, ...]  # steps back from the loss
    groups: int  # parameter groups that have a learning rate
    of_step: tuple[str, ...] = tuple(OF_STEP)  # names of numbers
    of_layer: tuple[str, ...] = tuple(OF_LAYER)  # the same of a layer
    of_gate: tuple[str, ...] = tuple(OF_GATE)  # of a gate
    of_lag: tuple[str, ...] = tuple(OF_LAG)  # of a lag

    def holds(self, other: ProbeLayout) -> bool:
        """Whether a probe of the other layout can be written in this one."""
        return (
            self.groups >= other.groups
            and set(self.layers) >= set(other.layers)
            and set(self.gates) >= set(other.gates)
            and set(self.lags) >= set(other.lags)
        )

    def joined(self, other: ProbeLayout) -> ProbeLayout:
        """One that holds the probes of both."""
        cells = dict(zip(self.layers, self.cells, strict=True)) | dict(
            zip(other.layers, other.cells, strict=True)
        )
        return ProbeLayout(
            layers=tuple(cells),
            cells=tuple(cells.values()),
            gates=tuple(dict.fromkeys([*self.gates, *other.gates])),
            lags=tuple(sorted({*self.lags, *other.lags})),
            groups=max(self.groups, other.groups),
        )

    @property
    def dtype(self) -> np.dtype:
        """How the numbers of a probe stand in the file."""
        layers = len(self.layers)
        fields: list[Any] = [
            ("values", "<f8", (len(self.of_step),)),
            ("learning_rates", "<f8", (self.groups,)),
            ("layers", "<f8", (layers, len(self.of_layer))),
            ("gates", "<f4", (layers, len(self.gates), len(self.of_gate))),
            ("lags", "<f4", (layers, len(self.of_lag), len(self.lags))),
        ]
        rest = -np.dtype(fields).itemsize % 3
        return np.dtype([*fields, ("rest", "u1", (rest,))])


def layout_of(probe: Probe, cells: dict[str, str]) -> ProbeLayout:
    """The least layout that holds a probe."""
    layers = probe.layers
    return ProbeLayout(
        layers=tuple(layers),
        cells=tuple(cells.get(name, "") for name in layers),
        gates=tuple(dict.fromkeys(gate for one in layers.values() for gate in one.gates)),
        lags=tuple(sorted({int(lag) for one in layers.values() for lag in one.lags})),
        groups=len(probe.learning_rates),
    )


def line(kind: str, **content: Any) -> str:
    """One line of the file."""
    return json.dumps({"kind": kind} | content, ensure_ascii=False, allow_nan=False) + "\n"


def line_of(said: ProbeLayout | Note | Source) -> str:
    """The line of a layout, a note or a source."""
    kind = {ProbeLayout: "layout", Note: "note", Source: "source"}[type(said)]
    return line(kind, **asdict(said))


PROBE = '{"kind": "probe", "step": '  # how the line of a probe begins
NUMBERS = ', "numbers": "'  # what stands between step and numbers
CLOSE = '"}'  # how it ends


def probe_line(probe: Probe, layout: ProbeLayout) -> str:
    """The line of a probe."""
    numbers = np.zeros((), dtype=layout.dtype)
    for name in ("values", "learning_rates", "layers", "gates", "lags"):
        numbers[name] = np.nan
    numbers["values"] = [probe.values.get(name, np.nan) for name in layout.of_step]
    numbers["learning_rates"][: len(probe.learning_rates)] = probe.learning_rates
    for name, layer in probe.layers.items():
        place = layout.layers.index(name)
        values = layer.values | {VERDICT: _code(layer.verdict)}
        numbers["layers"][place] = [values.get(field, np.nan) for field in layout.of_layer]
        for gate, some in layer.gates.items():
            numbers["gates"][place, layout.gates.index(gate)] = [
                some.get(field, np.nan) for field in layout.of_gate
            ]
        at = np.searchsorted(layout.lags, layer.lags)
        for number, field in enumerate(layout.of_lag):
            numbers["lags"][place, number, at] = getattr(layer, field)
    return numbers_line(probe.step, numbers)


def numbers_line(step: int, numbers: np.ndarray) -> str:
    """The line of a probe from its numbers, of its layout's dtype."""
    packed = base64.b64encode(numbers.tobytes()).decode()
    return f"{PROBE}{step}{NUMBERS}{packed}{CLOSE}\n"


def _code(verdict: str) -> float:
    return float(VERDICTS.index(verdict)) if verdict in VERDICTS else np.nan


def read_probe(text: bytes) -> tuple[int, bytes] | None:
    """Step and packed numbers of the line of a probe; None where it is no such line.

    As a JSON parser would read it, ten times as fast.
    """
    start, between, close = PROBE.encode(), NUMBERS.encode(), CLOSE.encode()
    end = text.find(b",", len(start), len(start) + 24)
    if not text.startswith(start) or not text.endswith(close) or end < 0:
        return None
    step, at = text[len(start) : end], end + len(between)
    if not step.isdigit() or len(step) > 18 or text[end:at] != between:
        return None
    return int(step), text[at : -len(close)]


@functools.cache
def _pairs() -> np.ndarray:
    """Of two characters of base64, read as one number, the 12 bits that they stand for; else 2¹² or more."""
    six = np.arange(64, dtype=np.uint16)
    letters = np.frombuffer((ascii_uppercase + ascii_lowercase + digits + "+/").encode(), np.uint8)
    found = np.full(2**16, 2**12, np.uint16)
    found[letters[:, None] + 2**8 * letters.astype(int)] = six[:, None] << 6 | six
    return found


def unpacked(packed: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of those texts in base64 that are whole, and which these are; all have one length.

    >>> found, fine = unpacked([b"AAEC", b"A?EC"])
    >>> found.tolist(), fine.tolist()
    ([0, 1, 2], [True, False])
    """
    twelve = _pairs().take(np.frombuffer(b"".join(packed), "<u2")).reshape(len(packed), -1)
    fine = np.ones(len(packed), dtype=bool)
    if twelve.max() >= 2**12:
        fine = twelve.max(1) < 2**12
        twelve = twelve[fine]
    first, second = twelve.reshape(-1, 2).T
    found = np.empty((len(first), 3), np.uint8)
    found[:, 0], found[:, 1], found[:, 2] = first >> 4, first << 4 | second >> 8, second
    return found.reshape(-1), fine


def packed_size(layout: ProbeLayout) -> int:
    """Characters of the packed numbers of a probe."""
    return layout.dtype.itemsize // 3 * 4


def layout_from(content: dict[str, Any]) -> ProbeLayout:
    """A layout as a line holds it; ValueError, TypeError or KeyError where it is none."""
    groups, lags = content["groups"], content["lags"]
    if type(groups) is not int or not 0 <= groups <= GROUPS:
        raise ValueError("groups")
    if not all(type(lag) is int and 0 <= lag < 2**31 for lag in lags) or lags != sorted(set(lags)):
        raise ValueError("lags")
    names = {
        field: tuple(plain_name(name) for name in content[field])  # AttributeError: no text
        for field in ProbeLayout.__dataclass_fields__
        if field not in ("groups", "lags")
    }
    layers, gates = names["layers"], names["gates"]
    if len(set(layers)) < len(layers) or len(set(gates)) < len(gates):
        raise ValueError("two of one name")
    if len(names["cells"]) != len(layers):
        raise ValueError("cells")
    return ProbeLayout(groups=groups, lags=tuple(lags), **names)


def note_from(content: dict[str, Any]) -> Note:
    """A note as a line holds it; ValueError, TypeError or KeyError where it is none."""
    note = plain_record(Note, content)
    return replace(note, layer=plain_name(note.layer))
