"""Reads a history's file from where it was left, so that it can be followed while it is written."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradflow.errors import FileError, one_sentence, plain_value
from gradflow.history.fields import OF_GATE, OF_LAG, OF_LAYER
from gradflow.history.lines import (
    HISTORY_FILE,
    HISTORY_SCHEMA,
    PROBE,
    ProbeLayout,
    layout_from,
    note_from,
    packed_size,
    read_probe,
    read_probes,
    source_from,
    unpack_into,
)
from gradflow.history.probe import Note, Source
from gradflow.limits import ANNOUNCED, LINE_BYTES

LINE_OF_PROBE = PROBE.encode()
PIECE_READ = 2**22  # bytes that are read at a time: the same memory is used again


@dataclass
class ProbeBlock:
    """Probes in a row that have one layout; the arrays are unpacked a few lines at a time."""

    layout: ProbeLayout  # what the arrays hold
    steps: list[int] = field(default_factory=list)  # the training step of each probe
    sources: list[Source | None] = field(default_factory=list)  # of each probe; None of a training
    packed: list[bytes] = field(default_factory=list)  # of the last ones, not yet unpacked
    room: np.ndarray | None = None  # bytes (probe or more, size) of those that are unpacked

    def __post_init__(self) -> None:
        self.size = packed_size(self.layout)

    def take(self, text: bytes, source: Source | None = None) -> bool:
        """The line of a probe; whether it is whole."""
        found = read_probe(text)
        if found is None or len(found[1]) != self.size:
            return False
        self.steps.append(found[0])
        self.sources.append(source)
        self.packed.append(found[1])
        return True

    def take_many(self, text: bytes, start: int, stop: int, more: int) -> tuple[int, int]:
        """Lines of probes that follow one another as one table: how many, and how many of them are whole.

        Args:
            text: of the file.
            start: place of the first line.
            stop: behind the last line that is whole.
            more: characters that follow in the file.
        """
        steps, packed = read_probes(text, start, stop, self.size)
        known = len(self.steps)
        if steps:
            self._keep(steps, [None] * len(steps), packed, more // self.size)
        return len(steps), len(self.steps) - known

    def unpack(self) -> int:
        """Take the numbers of the last lines out of their text; how many lines were none and are left out."""
        packed, self.packed = self.packed, []
        first = len(self.steps) - len(packed)
        steps, sources = self.steps[first:], self.sources[first:]
        del self.steps[first:], self.sources[first:]
        if packed:
            rows = np.frombuffer(b"".join(packed), np.uint8).reshape(len(packed), self.size)
            self._keep(steps, sources, rows, first // 2)
        return first + len(packed) - len(self.steps)

    def _keep(
        self, steps: list[int], sources: list[Source | None], packed: np.ndarray, more: int
    ) -> None:
        """The probes of those lines that hold numbers, with room for so many more."""
        known = len(self.steps)
        needed = known + len(steps)
        if self.room is None or needed > len(self.room):
            room = np.empty((needed + more, self.layout.dtype.itemsize), np.uint8)
            room[:known] = self._rows
            self.room = room
        fine = unpack_into(self.room[known:], packed)
        if not fine.all():
            steps = [*itertools.compress(steps, fine)]
            sources = [*itertools.compress(sources, fine)]
        self.steps += steps
        self.sources += sources

    @property
    def _rows(self) -> np.ndarray:
        """The bytes of the probes that are unpacked, (probe, size)."""
        room = (
            np.zeros((0, self.layout.dtype.itemsize), np.uint8) if self.room is None else self.room
        )
        return room[: len(self.steps) - len(self.packed)]

    def table(self) -> np.ndarray:
        """The numbers of every probe, (probe,) of the layout's dtype."""
        self.unpack()
        return self._rows.reshape(-1).view(self.layout.dtype)

    def only(self, run: str) -> ProbeBlock:
        """Those of one run of a sweep."""
        self.unpack()
        kept = [at for at, one in enumerate(self.sources) if one is not None and one.run == run]
        return ProbeBlock(
            self.layout,
            steps=[self.steps[at] for at in kept],
            sources=[self.sources[at] for at in kept],
            room=self._rows[kept],
        )


@dataclass
class Read:
    """Everything that was read of a file so far."""

    headers: list[dict[str, Any]] = field(default_factory=list)  # one for each writer
    blocks: list[ProbeBlock] = field(default_factory=list)  # in the order of the file
    notes: list[Note] = field(default_factory=list)  # in the order of the file
    ended: bool = False  # whether the last writer closed it
    damaged: int = 0  # lines that were cut off


class Reader:
    """Follows one file."""

    def __init__(self, path: Path) -> None:
        self.path = file_of(path)
        self.read = Read()
        self._offset = 0
        self._inode = 0
        self._source: Source | None = None  # of the next probe

    def more(self) -> int:
        """Take in the lines that were completed since the last time; how many probes they hold."""
        found, rest = 0, b""
        try:
            with self.path.open("rb") as opened:
                stat = os.fstat(opened.fileno())
                self._begin_again_if_replaced(stat)
                size = stat.st_size
                opened.seek(self._offset)
                while some := opened.read(PIECE_READ):
                    whole = rest + some
                    complete = whole.rfind(b"\n") + 1
                    rest = whole[complete:]
                    self._offset += complete
                    if len(rest) > (
                        LINE_BYTES if self.read.headers or complete else PIECE_READ // 2
                    ):
                        raise FileError(self._not_a_history())
                    found += self._take_all(whole, complete, max(0, size - self._offset))
                    found -= self._unpack()
                    self._check_extent(self._offset)
        except OSError as error:
            raise FileError(
                f"cannot read {self.path}: {error.strerror or error}; give the folder of a run that "
                "gradflow.watch writes"
            ) from error
        return found

    def _begin_again_if_replaced(self, stat: os.stat_result) -> None:
        """Where another history took the place of the one that was read so far (``force``)."""
        if self._offset and (stat.st_size < self._offset or stat.st_ino != self._inode):
            self._offset = 0
            vars(self.read).update(vars(Read()))
        self._inode = stat.st_ino

    def _take_all(self, text: bytes, stop: int, more: int) -> int:
        """The lines up to a place, behind which there are so many bytes; how many probes they hold."""
        place = found = 0
        while place < stop:
            end = text.index(b"\n", place)
            if self._source is None and self.read.blocks and text.startswith(LINE_OF_PROBE, place):
                found -= self._unpack()
                lines, whole = self.read.blocks[-1].take_many(text, place, stop, more)
                if lines:
                    self.read.damaged += lines - whole
                    self.read.ended = False
                    place, found = place + lines * (end + 1 - place), found + whole
                    continue
            found += self._take(text[place:end].removesuffix(b"\r"))
            place = end + 1
        return found

    def _take(self, text: bytes) -> bool:
        """One line; whether it is a probe."""
        if text.startswith(LINE_OF_PROBE):
            return self._take_probe(text)
        if not text:
            return False
        try:
            content = json.loads(text)
            kind = content.pop("kind")
            if kind == "header":
                self._take_header(content)
            elif kind == "layout":
                block = ProbeBlock(layout_from(content))
                self._unpack()
                self.read.blocks.append(block)
            elif kind == "note":
                self.read.notes.append(note_from(content))
            elif kind == "source":
                self._source = source_from(content)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self._cut_off()
            return False
        self.read.ended = kind == "end"
        return False

    def _unpack(self) -> int:
        """Of the last probes; how many were none."""
        damaged = sum(block.unpack() for block in self.read.blocks[-1:])
        self.read.damaged += damaged
        return damaged

    def _check_extent(self, size: int) -> None:
        """Probes that each have layers of their own would make a table of far more than the file holds."""
        blocks = [block for block in self.read.blocks if block.steps]
        if len(blocks) < 2:
            return
        layers = len({name for block in blocks for name in block.layout.layers})
        lags = len({lag for block in blocks for lag in block.layout.lags})
        gates = len({name for block in blocks for name in block.layout.gates})
        numbers = 8 * len(OF_LAYER) + 4 * len(OF_GATE) * gates + 4 * len(OF_LAG) * lags
        if sum(len(block.steps) for block in blocks) * layers * numbers > 8 * size + ANNOUNCED:
            raise FileError(self._not_a_history())

    def _not_a_history(self) -> str:
        return one_sentence(
            f"{self.path} is not the history of a run; give the folder of a run that gradflow.watch "
            "writes",
            str(self.path),
        )

    def _cut_off(self) -> None:
        if not self.read.headers:
            raise FileError(self._not_a_history())
        self.read.damaged += 1

    def _take_header(self, content: dict[str, Any]) -> None:
        if content.get("schema") != HISTORY_SCHEMA:
            said = (
                f"{self.path} was written with schema {content.get('schema')}, this gradflow reads "
                f"{HISTORY_SCHEMA}; update gradflow, or watch into another folder"
            )
            raise FileError(one_sentence(said, str(self.path)))
        self.read.headers.append(plain_value(content, 4))

    def _take_probe(self, text: bytes) -> bool:
        source, self._source = self._source, None
        if not self.read.blocks or not self.read.blocks[-1].take(text, source):
            self._cut_off()
            return False
        self.read.ended = False
        return True


def file_of(path: Path) -> Path:
    """The file of a run, given its folder or the file itself."""
    return path / HISTORY_FILE if path.is_dir() else path


def holds_history(path: Path) -> bool:
    """Whether there is a history at a path, a folder or its file."""
    return file_of(path).name == HISTORY_FILE and file_of(path).is_file()


def is_swept(path: Path) -> bool:
    """Whether there is the history of a sweep at a path."""
    if not holds_history(path):
        return False
    with file_of(path).open("rb") as file:
        try:
            return bool(json.loads(file.readline()).get("swept"))
        except (ValueError, AttributeError):
            return False
