"""A history of rows that were measured apart: each stands alone in a text or file, and all become one file.

A row is the history of one probe: the same lines, with the training step 0 where it is not known yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradflow.errors import FileError, plain_record
from gradflow.history.lines import (
    HISTORY_FILE,
    HISTORY_SCHEMA,
    ProbeLayout,
    layout_of,
    line,
    line_of,
    numbers_line,
    probe_line,
)
from gradflow.history.probe import Note, Probe, Source, TrainingStep
from gradflow.history.reader import Reader
from gradflow.writing import whole_file


@dataclass(frozen=True)
class Row:
    """One row of a sweep, as it stands in the joined file."""

    step: int  # the training step
    source: Source  # where it is from
    text: Path | None  # the file of its numbers; None where it could not be measured


def row_text(probe: Probe | None, cells: dict[str, str], **header: Any) -> str:
    """The history of one probe, None where it could not be measured and the header says why, as lines."""
    text = line("header", schema=HISTORY_SCHEMA, **header)
    if probe is not None:
        layout = layout_of(probe, cells)
        text += line_of(layout) + probe_line(probe, layout) + "".join(map(line_of, probe.notes))
    return text + line("end")


@dataclass(frozen=True)
class RowFacts:
    """What a row's file says besides its numbers."""

    name: str  # of the checkpoint that it was first measured of
    title: str  # of the model
    trained: TrainingStep | None  # the training step that the checkpoint says
    kind: str  # the architecture in words
    failed: str  # why it holds no probe; "" where it holds one


def row_facts(path: Path) -> RowFacts | None:
    """What a row's file says besides its numbers; None where it is none of a row, or cut off, or gone."""
    reader = Reader(path)
    try:
        reader.more()
        read, (header, *more) = reader.read, reader.read.headers
        texts = [header.get(name, "") for name in ("name", "title", "failed")]
        trained = header.get("trained")
        cells = [cell for block in read.blocks for cell in block.layout.cells]
        kind = " ".join([*dict.fromkeys(cells), ", ".join(map(str, header.get("widths", [])))])
        kind = f"{kind} ({len(cells)} layers)" if len(cells) > 1 else kind
        found = RowFacts(
            name=texts[0],
            title=texts[1],
            trained=None if trained is None else plain_record(TrainingStep, trained),
            kind=kind.strip() if cells else "",
            failed=texts[2],
        )
    except (FileError, ValueError, TypeError, LookupError):
        return None
    rows = [len(block.steps) for block in read.blocks]
    whole = read.ended and not more and not read.damaged and rows == ([] if texts[2] else [1])
    return found if whole and all(type(text) is str for text in texts) else None


def join_rows(
    folder: Path, rows: Iterable[Row], notes: Iterable[Note], *, ended: bool, **header: Any
) -> Path:
    """Write rows as one history, one after the other, in the memory of one.

    Args:
        folder: where the file goes; it takes the place of an earlier one when all is written.
        rows: in the order of the file.
        notes: said of the whole.
        ended: whether all rows are there.
        header: how they were measured.

    Returns:
        The path of the file.

    Raises:
        FileError: it cannot be written, or the file of a row cannot be read.
    """
    path = folder / HISTORY_FILE
    said: set[str] = set()
    with whole_file(path) as file:
        file.write(line("header", schema=HISTORY_SCHEMA, **header))
        file.writelines(map(line_of, notes))
        layout: ProbeLayout | None = None
        for row in rows:
            for text, found in _lines_of(row, layout, said):
                file.write(text)
                layout = found
        if ended:
            file.write(line("end"))
    return path


def _lines_of(
    row: Row, layout: ProbeLayout | None, said: set[str]
) -> Iterable[tuple[str, ProbeLayout]]:
    """The lines of one row, each with the layout that holds from there on; no sentence a second time."""
    if row.text is None:
        empty = layout if layout is not None else layout_of(Probe(0, {}, {}), {})
        if layout is None:
            yield line_of(empty), empty
        yield line_of(row.source) + probe_line(Probe(row.step, {}, {}), empty), empty
        return
    reader = Reader(row.text)
    reader.more()
    (block,) = reader.read.blocks
    if block.layout != layout:
        yield line_of(block.layout), block.layout
    yield line_of(row.source) + numbers_line(row.step, block.table()), block.layout
    for note in reader.read.notes:
        if note.text not in said:
            said.add(note.text)
            yield line_of(replace(note, step=0)), block.layout
