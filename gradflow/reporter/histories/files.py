"""The report of a training: page, summary, tables and pictures, written whole or not at all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gradflow._version import __version__
from gradflow.errors import InputError, must_be
from gradflow.history import History
from gradflow.reporter.digest import strict
from gradflow.reporter.folders import check_folder, whole_folder
from gradflow.reporter.histories.course import Course, courses
from gradflow.reporter.histories.figures import blocks_of, draw_courses
from gradflow.reporter.histories.groups import GroupRow, rows_of
from gradflow.reporter.histories.kinds import HISTORY_KINDS
from gradflow.reporter.histories.now import Now, now
from gradflow.reporter.histories.page import DRAWN_LAYERS, HEAD_LAYERS, history_page, worst_layers
from gradflow.reporter.picture import VECTORS, Drawn, look, write_pictures
from gradflow.reporter.readout import drawn

SCHEMA = 1  # of summary.json of a history; raised when a reader would be misled
HISTORY_FORMATS = ("html", "json", "csv", "png")
TABLES = ("layers", "steps", "lags", "gates", "notes")

FigureKey = tuple[str, str]  # (kind, layer name); "top" for the layers named first on the page


@dataclass(frozen=True)
class ToWrite:
    """What is written of a history."""

    history: History  # as it was given
    layers: list[Now]  # in the order in which they ran
    groups: list[GroupRow]  # of a sweep, the one that reaches least first
    pictures: dict[FigureKey, Drawn]  # all of them


def report_history(
    history: History,
    folder: Path,
    *,
    formats: Iterable[str] = HISTORY_FORMATS,
    force: bool = False,
    by: str = "seed",
) -> dict[str, Path]:
    """Write page, summary, tables and pictures of a training into a folder.

    Args:
        history: as `gradflow.load` reads it.
        folder: where the files go; it is made.
        formats: which of "html", "json", "csv" and "png", and "pdf" or "svg" where asked for.
        force: replace an earlier report.
        by: of a sweep, what the runs of one group differ in.

    Returns:
        Name in the folder -> path of every file.

    Raises:
        InputError: a format is unknown, or there is no probe yet.
        FileError: the folder exists, or cannot be written.
    """
    chosen = {formats} if isinstance(formats, str) else set(formats)
    wrong = sorted(str(name) for name in chosen - {*_WRITERS, "nc"})
    if wrong or not chosen:
        expected = f"one or more of {', '.join(_WRITERS)}"
        advice = f"leave it out for {', '.join(HISTORY_FORMATS)}"
        raise InputError(
            must_be("formats of a history", expected, ", ".join(wrong) or "none", advice)
        )
    history.require_probes("the run")
    check_folder(folder, force=force)
    with whole_folder(folder, force=force) as new:
        layers = [now(one) for one in courses([history])]
        wanted = {"html", "png", *VECTORS} & chosen
        pictures = draw(history, layers, chosen, by) if wanted else {}
        shown = ToWrite(history, layers, rows_of(history, by) if history.swept else [], pictures)
        for name, write in _WRITERS.items():
            if name in chosen:
                write(shown, new)
        names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    return {name.as_posix(): folder / name for name in names}


@look()  # put on once for all pictures
def draw(
    history: History, layers: list[Now], formats: Iterable[str] = ("html",), by: str = "seed"
) -> dict[FigureKey, Drawn]:
    """Every picture: of the layers at the head of the page together, of others alone."""
    top = [one.course for one in worst_layers(layers, HEAD_LAYERS)]
    found: dict[FigureKey, Drawn] = {}
    if len(history.runs) > 1:
        every = [one.course for one in layers]
        found["groups", "top"] = drawn(draw_courses("groups", every, by=by), formats)
    for kind in [name for name, one in HISTORY_KINDS.items() if not one.together]:
        for one in worst_layers(layers, DRAWN_LAYERS):  # of a deep stack all would take minutes
            if _has(kind, one.course):
                found[kind, one.course.name] = drawn(draw_courses(kind, [one.course]), formats)
    if len(top) > 1:
        found["waterfall", "top"] = drawn(draw_courses("waterfall", top), formats)
    return found


def _has(kind: str, course: Course) -> bool:
    """Whether a picture shows more than words in its place."""
    return not blocks_of(kind, [course])[0].chart.note


def history_summary(history: History, by: str = "seed") -> dict[str, Any]:
    """Everything a script wants to know of a training, ready for strict JSON.

    A half-life or horizon that is never reached is ``{"value": null, "never": true}``.
    """
    data = history.data
    made = {
        "schema": SCHEMA,
        "kind": "history",
        "gradflow": __version__,
        "title": history.title,
        "probes": len(history),
        "first_step": int(data["step"].values.min()) if len(history) else None,
        "last_step": int(data["step"].values.max()) if len(history) else None,
        "ended": history.ended,
        "verdicts": {one.course.name: one.verdict for one in map(now, courses([history]))},
        "layers": [_layer(now(one)) for one in courses([history])],
        "groups": [row.numbers for row in rows_of(history, by)] if history.swept else [],
        "notes": [vars(note) for note in history.notes],
        "header": history.header,
    }
    return dict(strict(made))


def _layer(one: Now) -> dict[str, Any]:
    numbers = {name: float(values[one.place]) for name, values in one.course.numbers.items()}
    reached = {
        name: {"value": numbers[name], "never": numbers[name] == float("inf")}
        for name in ("half_life", "horizon")
    }
    return {
        "name": one.course.layer,
        "run": one.course.run,
        "cell": one.course.cell,
        "step": int(one.course.step[one.place]),
        "verdict": one.verdict,
        "sentence": one.sentence,
        "rate": {
            "value": numbers["rate"],
            "low": numbers["rate_low"],
            "high": numbers["rate_high"],
        },
        **reached,
        "searched": numbers["searched"],
        "span": numbers["span"],
        "grad_norm": numbers["grad_norm"],
    }


def _write_page(shown: ToWrite, folder: Path) -> None:
    text = history_page(shown.history, shown.layers, shown.pictures, shown.groups)
    (folder / "report.html").write_text(text, encoding="utf-8", newline="\n")


def _write_summary(shown: ToWrite, folder: Path) -> None:
    made = history_summary(shown.history, shown.groups[0].group.by if shown.groups else "seed")
    text = json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def _write_tables(shown: ToWrite, folder: Path) -> None:
    for kind in TABLES:
        table = shown.history.frame(kind)
        table.to_csv(folder / f"{kind}.csv", index=False, lineterminator="\n")
    if shown.groups:
        table = pd.DataFrame([row.numbers for row in shown.groups])
        table.to_csv(folder / "groups.csv", index=False, lineterminator="\n")


def _write_figures(shown: ToWrite, folder: Path, *, kind: str = "png") -> None:
    from gradflow.reporter.files import file_names

    names = file_names([one.course.name for one in shown.layers])
    stems = {
        f"{names[layer]}-{what}" if layer in names else what: picture
        for (what, layer), picture in shown.pictures.items()
    }
    write_pictures(folder / "figures", stems, kind)


_WRITERS: dict[str, Callable[[ToWrite, Path], None]] = {
    "html": _write_page,
    "json": _write_summary,
    "csv": _write_tables,
    "png": _write_figures,
    "pdf": functools.partial(_write_figures, kind="pdf"),
    "svg": functools.partial(_write_figures, kind="svg"),
}
