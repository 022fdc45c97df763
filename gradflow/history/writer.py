"""Appends to a history's file: one write and at most one fsync a probe."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from gradflow.errors import FileError, InputError, checked_path, must_be
from gradflow.history.lines import (
    HISTORY_FILE,
    HISTORY_SCHEMA,
    ProbeLayout,
    layout_of,
    line,
    line_of,
    probe_line,
)
from gradflow.history.probe import Note, Probe
from gradflow.history.reader import Reader
from gradflow.writing import claim


class Writer:
    """The one process that writes the history in a folder.

    Args:
        folder: of the run; it is made. Other files in it are left alone.
        resume: go on behind what an earlier writer left there.
        force: throw that away.
        header: how the run is watched, for whoever reads it.

    Raises:
        FileError: there is a history already, another process is writing it, or it cannot be written.
        InputError: both ``resume`` and ``force``.
    """

    def __init__(
        self, folder: Path, *, resume: bool = False, force: bool = False, **header: Any
    ) -> None:
        if resume and force:
            advice = "resume goes on with a history, force throws it away"
            raise InputError(must_be("resume and force", "not both true", "both", advice))
        self.folder, self.path = checked_path(folder), folder / HISTORY_FILE
        self.last_step = 0  # of an earlier writer
        self._layout: ProbeLayout | None = None
        self._process = os.getpid()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = self.path.exists() and self.path.stat().st_size > 0
            if there and not (resume or force):
                raise FileError(
                    f"{folder} must be a folder without a history, got one that holds "
                    f"{_known(self.path)}; give another folder, resume=True to go on with it, or "
                    "force=True to throw it away"
                )
            self._file = self._open()
            if there and resume:
                self._go_on()
            else:
                os.ftruncate(self._file, 0)
            self._append(line("header", schema=HISTORY_SCHEMA, **header))
        except OSError as error:
            raise FileError(_cannot(self.path, error)) from error

    def _go_on(self) -> None:
        """Begin on a line of its own, behind the last step that is there."""
        with self.path.open("rb") as opened:
            opened.seek(-1, os.SEEK_END)
            if opened.read(1) != b"\n":
                self._append("\n")
        reader = Reader(self.path)
        reader.more()
        self.last_step = max((n for block in reader.read.blocks for n in block.steps), default=0)

    def _open(self) -> int:
        opened = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if claim(opened) is False:
            os.close(opened)
            raise FileError(
                f"{self.path} is being written by another run; give each run a folder of its own"
            )
        return opened

    def probe(self, probe: Probe, cells: dict[str, str]) -> None:
        """Append a probe and its notes.

        Args:
            probe: what was measured.
            cells: layer name -> kind of cell.

        Raises:
            OSError: it could not be written, wholly or in part.
        """
        layout, text = layout_of(probe, cells), ""
        if self._layout is None or not self._layout.holds(layout):
            self._layout = layout if self._layout is None else self._layout.joined(layout)
            text = line_of(self._layout)
        text += "" if probe.source is None else line_of(probe.source)
        text += probe_line(probe, self._layout) + "".join(map(line_of, probe.notes))
        self._append(text)
        os.fsync(self._file)

    def note(self, note: Note) -> None:
        """Append a note.

        Args:
            note: a sentence on a training step.

        Raises:
            OSError: it could not be written.
        """
        self._append(line_of(note))

    def close(self) -> None:
        """Say that the run ended."""
        if os.getpid() == self._process:
            with contextlib.suppress(OSError):
                self._append(line("end"))
            os.close(self._file)
            self._process = -1

    def _append(self, text: str) -> None:
        if os.getpid() != self._process:
            return  # a process forked from the one that writes, or it is closed
        rest = text.encode()
        while rest:  # once, but where the disk is nearly full
            rest = rest[os.write(self._file, rest) :]


def _known(path: Path) -> str:
    """What is in a history that would be written over."""
    reader = Reader(path)
    try:
        reader.more()
    except FileError:
        return f"a file {HISTORY_FILE} that is none of this gradflow's"
    steps = [n for block in reader.read.blocks for n in block.steps]
    return f"probes of steps {steps[0]} to {steps[-1]}" if steps else "one without a probe yet"


def _cannot(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error.strerror or error}; give a folder that can be written"
