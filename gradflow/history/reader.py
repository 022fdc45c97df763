"""Reads a history's file from where it was left, so that it can be followed while it is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from gradflow.errors import FileError, one_sentence, plain_record, plain_value
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
    unpacked,
)
from gradflow.history.probe import Note, Source
from gradflow.limits import ANNOUNCED, LINE_BYTES

LINE_OF_PROBE = PROBE.encode()
PIECE_READ = 2**18  # bytes that are unpacked at a time: what a processor keeps at hand


@dataclass
class ProbeBlock:
    """Probes in a row that have one layout; their numbers are unpacked some lines at a time."""

    layout: ProbeLayout  # what the arrays hold
    steps: list[int] = field(default_factory=list)  # the training step of each probe
    numbers: bytearray = field(default_factory=bytearray)  # of the probes, unpacked
    packed: list[bytes] = field(default_factory=list)  # of the last ones, not yet unpacked
    sources: list[Source | None] = field(default_factory=list)  # of each probe; None of a training

    def take(self, text: bytes, source: Source | None = None) -> bool:
        """The line of a probe; whether it is whole."""
        found = read_probe(text)
        if found is None or len(found[1]) != self.size:
            return False
        self.steps.append(found[0])
        self.sources.append(source)
        self.packed.append(found[1])
        return True

    def __post_init__(self) -> None:
        self.size = packed_size(self.layout)

    def unpack(self) -> int:
        """Take the numbers of the last lines out of their text; how many lines were none and are left out."""
        if not self.packed:
            return 0
        first = len(self.steps) - len(self.packed)
        found, fine = unpacked(self.packed)
        self.packed = []
        self.steps[first:] = compress(self.steps[first:], fine)
        self.sources[first:] = compress(self.sources[first:], fine)
        try:
            self.numbers += found.data
        except BufferError:  # a table was made of them, which stays as it is
            self.numbers = self.numbers + found.data
        return int((~fine).sum())

    def table(self) -> np.ndarray:
        """The numbers of every probe, (probe,) of the layout's dtype."""
        self.unpack()
        return np.frombuffer(self.numbers, dtype=self.layout.dtype)

    def only(self, run: str) -> ProbeBlock:
        """Those of one run of a sweep."""
        kept = [at for at, one in enumerate(self.sources) if one is not None and one.run == run]
        return ProbeBlock(
            self.layout,
            steps=[self.steps[at] for at in kept],
            numbers=bytearray(self.table()[kept].data),
            sources=[self.sources[at] for at in kept],
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
        found = 0
        if self.path.exists() and not self.path.is_file():  # of a pipe the end is waited for
            raise FileError(self._not_a_history())
        try:
            with self.path.open("rb") as opened:
                self._begin_again_if_replaced(os.fstat(opened.fileno()))
                opened.seek(self._offset)
                checked = self._offset
                while (text := opened.readline(LINE_BYTES)).endswith(b"\n"):
                    self._offset += len(text)
                    found += self._take(text.rstrip(b"\r\n"))
                    if self._offset > checked + PIECE_READ:
                        checked = self._offset
                        found -= self._check()
                found -= self._check()
                if len(text) == LINE_BYTES:
                    raise FileError(self._not_a_history())
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
                self._source = plain_record(Source, content)
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

    def _check(self) -> int:
        """Unpack what was read; how many lines of probes were none.

        Probes that each have layers of their own would make a table of far more than the file holds.
        """
        damaged = self._unpack()
        blocks = [block for block in self.read.blocks if block.steps]
        if len(blocks) < 2:
            return damaged
        layers = len({name for block in blocks for name in block.layout.layers})
        lags = len({lag for block in blocks for lag in block.layout.lags})
        gates = len({name for block in blocks for name in block.layout.gates})
        numbers = 8 * len(OF_LAYER) + 4 * len(OF_GATE) * gates + 4 * len(OF_LAG) * lags
        if (
            sum(len(block.steps) for block in blocks) * layers * numbers
            > 8 * self._offset + ANNOUNCED
        ):
            raise FileError(self._not_a_history())
        return damaged

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
            return bool(json.loads(file.readline(LINE_BYTES)).get("swept"))
        except (ValueError, AttributeError, RecursionError):
            return False
