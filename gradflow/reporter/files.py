"""The folder of a report: written whole beside its place, then moved there, or not at all."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from gradflow.analysis import FRAMES, OPTIONAL, Analysis
from gradflow.errors import InputError, must_be
from gradflow.limits import OVERVIEW_ROWS
from gradflow.reporter.digest import summary
from gradflow.reporter.figures import blocks_of, plot, plot_narrow
from gradflow.reporter.folders import check_folder, whole_folder
from gradflow.reporter.kinds import KINDS
from gradflow.reporter.layout import draw_blocks
from gradflow.reporter.page import TOP, FigureKey, page
from gradflow.reporter.picture import VECTORS, Drawn, look, write_pictures
from gradflow.reporter.readout import drawn

FORMATS = ("html", "json", "csv", "png", "nc")  # written unless others are asked for


def report(
    analysis: Analysis, folder: str | Path, *, formats: Iterable[str] = FORMATS, force: bool = False
) -> dict[str, Path]:
    """Write page, summary, tables, pictures and run into a folder; `gradflow.report` says all of it.

    Name in the folder -> path of every file.
    """
    if not isinstance(analysis, Analysis):
        kind = type(analysis).__name__
        advice = "give what gradflow.analyze or gradflow.diagnose returns"
        raise InputError(must_be("the analysis", "an Analysis", kind, advice))
    chosen = _chosen(formats)
    if not len(analysis):
        advice = "record a model that has a recurrent layer"
        raise InputError(must_be("the analysis", "one with layers", "none", advice))
    folder = Path(folder)
    check_folder(folder, force=force)
    with whole_folder(folder, force=force) as new:
        pictures = draw(analysis, chosen) if {"html", "png", *VECTORS} & chosen else {}
        for name, write in _WRITERS.items():
            if name in chosen:
                write(analysis, new, pictures)
        names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    return {name.as_posix(): folder / name for name in names}


@look()  # put on once for all pictures
def draw(analysis: Analysis, formats: Iterable[str] = ("html",)) -> dict[FigureKey, Drawn]:
    """Every picture of an analysis, by (kind, layer name); as PDF or SVG too where asked for."""
    made = functools.partial(drawn, formats=formats)
    worst = [layer.name for layer in analysis.told]
    top = _part(analysis, worst[:TOP])
    pictures = {
        ("overview", "top"): made(plot(top)),
        ("overview", "narrow"): made(plot_narrow(top)),
    }
    if len(analysis) > len(top):
        pictures["overview", ""] = made(plot(analysis))
    for name, kind in KINDS.items():
        if kind is None:
            continue
        for layers in [list(analysis)] if kind.together else [[layer] for layer in analysis]:
            layer = analysis.layers[layers[0]]
            if not kind.together and layer.part_of in analysis.layers and kind.of_gains:
                continue  # they are those of its loop
            # a picture with only words in its place is left out, and so is the detail of all
            # but the worst layers of a deep stack, which would take minutes and megabytes
            shown = worst[: OVERVIEW_ROWS if kind.always else TOP]
            if not (kind.together or {layer.name, layer.part_of} & set(shown)):
                continue
            blocks = blocks_of(kind, _part(analysis, layers))
            chart = blocks[0].chart
            if kind.always or not chart.note:
                key = (name, "" if kind.together else layer.name)
                pictures[key] = made(draw_blocks(kind, blocks), message=chart.message)
    return pictures


def _part(analysis: Analysis, names: list[str]) -> Analysis:
    """The analysis of some layers only, in the order they ran."""
    layers = {name: layer for name, layer in analysis.layers.items() if name in names}
    return replace(analysis, layers=layers)


# ------------------------------------------------------------------------------------- the writers


def _write_page(analysis: Analysis, folder: Path, pictures: dict[FigureKey, Drawn]) -> None:
    text = page(analysis, pictures)
    (folder / "report.html").write_text(text, encoding="utf-8", newline="\n")


def _write_summary(analysis: Analysis, folder: Path, _: dict[FigureKey, Drawn]) -> None:
    text = json.dumps(summary(analysis), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def _write_tables(analysis: Analysis, folder: Path, _: dict[FigureKey, Drawn]) -> None:
    for kind in FRAMES:
        table = analysis.frame(kind)
        if kind not in OPTIONAL or len(table):
            table.to_csv(folder / f"{kind}.csv", index=False, lineterminator="\n")


def _write_figures(
    analysis: Analysis, folder: Path, pictures: dict[FigureKey, Drawn], *, kind: str = "png"
) -> None:
    names = file_names(list(analysis.layers))
    # the overview of all layers; that of the worst only where there are more
    whole = ("overview", "") if ("overview", "") in pictures else ("overview", "top")
    stems = {"overview": pictures[whole]}
    for (what, name), picture in pictures.items():
        if name in names:
            stems[f"{names[name]}-{what}"] = picture
        elif what != "overview":  # of all layers together
            stems[what] = picture
    write_pictures(folder / "figures", stems, kind)


def _write_run(analysis: Analysis, folder: Path, _: dict[FigureKey, Drawn]) -> None:
    analysis.save(folder / "run.nc")


_WRITERS: dict[str, Callable[[Analysis, Path, dict[FigureKey, Drawn]], None]] = {
    "html": _write_page,
    "json": _write_summary,
    "csv": _write_tables,
    "png": _write_figures,
    "pdf": functools.partial(_write_figures, kind="pdf"),
    "svg": functools.partial(_write_figures, kind="svg"),
    "nc": _write_run,
}


def file_names(names: list[str]) -> dict[str, str]:
    """Layer name → a name that is safe in any file system, unique also where case is ignored.

    >>> file_names(["rnn.l0", "a/b", "A?b"])
    {'rnn.l0': 'rnn.l0', 'a/b': 'a_b', 'A?b': 'A_b-2'}
    """
    safe: dict[str, str] = {}
    taken = {"overview", "layers"}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._@-]+", "_", name).strip("._-")[:80] or "layer"
        made, number = stem, 1
        while made.lower() in taken:
            number += 1
            made = f"{stem}-{number}"
        taken.add(made.lower())
        safe[name] = made
    return safe


# ---------------------------------------------------------------------------------- whole or not


def _chosen(formats: Iterable[str]) -> set[str]:
    chosen = {formats} if isinstance(formats, str) else set(formats)
    wrong = sorted(str(name) for name in chosen - set(_WRITERS))
    if wrong or not chosen:
        advice = f"leave it out for {', '.join(FORMATS)}"
        expected = f"one or more of {', '.join(_WRITERS)}"
        raise InputError(must_be("formats", expected, ", ".join(wrong) or "none", advice))
    return chosen
