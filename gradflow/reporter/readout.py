"""What a panel says under the pointer: its numbers in 8 bits, and the words around them.

A drawing function hands a panel's numbers to `tell`; `page.js` reads what `packed` makes of them. A number
that is told is that of the data, within what `error_words` says.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.reporter.picture import VECTORS, Drawn, Picture, png, vector, webp
from gradflow.reporter.scale import ANCHORS

FARTHEST = 8.0  # powers of ten on either side of 1 that are told apart
CODES = {"zero": 0, "none": 1, "bad": 2, "below": 3, "above": 4}  # cells that are no number
NUMBERS = 255 - len(CODES)  # steps between the least number and the largest
TOLD_DIGITS = 0.05  # two digits are within so much of a number
CURVE_POINTS = 1000  # of a curve, at most


@dataclass(frozen=True)
class Cells:
    """The cells along one side of a grid, and what they are called."""

    # (n + 1,) where they begin and end, as the axis counts; two if all are as long
    edges: np.ndarray
    first: np.ndarray  # (n,) the number of each, or of the first of what it stands for
    more: int = 0  # how much further the last of what it stands for is
    noun: str = ""  # "step": the number is a count of steps
    labels: tuple[str, ...] = ()  # (n,) words of the user's own beside the number
    names: tuple[str, ...] = ()  # (n,) said in place of the number


@dataclass(frozen=True)
class Grid:
    """A picture of log10 ratios, row by row."""

    values: np.ndarray  # (rows, columns) log10; −inf exactly zero, NaN undefined
    bad: np.ndarray | None  # (rows, columns) true where it is NaN or Inf
    across: Cells  # its columns
    down: Cells  # its rows
    # "some", "less", "more", "zero", "none" … -> sentence with {x} {y} {value}
    words: Mapping[str, str]
    row: bool = False  # whether the row under the pointer is coloured across the whole picture


@dataclass(frozen=True)
class Curves:
    """Lines over one axis."""

    x: np.ndarray  # (n,) as the axis counts
    lines: Sequence[tuple[str, np.ndarray]]  # name and (n,) values
    log10: bool  # whether they are powers of ten
    share: bool = False  # whether they are ratios, said as percent
    names: tuple[str, ...] = ()  # (n,) what each place is called; none: its number


def tell(ax: Axes, said: Grid | Curves) -> None:
    """Let a panel of one of gradflow's own figures answer; axes of a reader's own have no page."""
    figure = ax.get_figure(root=True)
    if isinstance(figure, Picture):
        figure.readouts.append((ax, said))


def drawn(figure: Figure, formats: Iterable[str] = ("html",), message: str = "") -> Drawn:
    """A figure with what it says under the pointer, ready for what is to be written of a report."""
    pixels = png(figure)  # axes that keep an aspect have their place once they are drawn
    told = packed(figure) if isinstance(figure, Picture) else {"panels": [], "places": []}
    vectors = {kind: vector(figure, kind) for kind in VECTORS if kind in formats}
    web = webp(pixels) if "html" in formats else b""
    return Drawn(pixels, web, told, vectors, message)


def as_json(picture: Drawn, narrow: Drawn | None = None) -> Markup:
    """What a picture says, as page.js reads it; with the places on its form for a narrow screen.

    Nothing in it ends the element or runs, whatever a layer is called.
    """
    if not picture.told["panels"]:
        return Markup("")
    told = dict(picture.told)
    if narrow is not None and len(narrow.told["places"]) == len(told["places"]):
        told["narrow"] = narrow.told["places"]
    said = htmlsafe_json_dumps(told, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup('<script type="application/json">') + said + Markup("</script>")


def packed(figure: Picture) -> dict[str, list[dict[str, Any]]]:
    """The panels of a drawn figure, ready for JSON, and the place of each on the picture."""
    shown = [(ax, said) for ax, said in figure.readouts if ax.get_visible()]
    panels = [_grid(said) if isinstance(said, Grid) else _curves(ax, said) for ax, said in shown]
    return {"panels": panels, "places": [_place(ax) for ax, _ in shown]}


def _place(ax: Axes) -> dict[str, Any]:
    """Left, top, width and height as shares of the picture; what the axes count at their edges."""
    box = ax.get_position()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return {
        "box": _rounded([box.x0, 1 - box.y1, box.width, box.height], 5),
        "x": _rounded([left, right], 5),
        "y": _rounded([top, bottom], 5),
    }


def _grid(said: Grid) -> dict[str, Any]:
    codes, low, by = quantised(said.values, said.bad)
    found = {
        "cells": base64.b64encode(codes.tobytes()).decode("ascii"),
        "low": low,
        "by": by,
        "across": _cells(said.across),
        "down": _cells(said.down),
        "words": dict(said.words),
        "error": error_words(by),
    }
    return found | ({"colours": list(ANCHORS)} if said.row else {})


def quantised(values: np.ndarray, bad: np.ndarray | None) -> tuple[np.ndarray, float, float]:
    """Codes of the cells (uint8), the least number and the step: number = low + step · (code − 5).

    1 itself is always among the numbers. Beyond 10⁻⁸ and 10⁸ only that is told.

    >>> codes, low, by = quantised(np.array([[0.0, -2.5, -np.inf, np.nan, -99.0]]), None)
    >>> codes.tolist(), low, by
    ([[253, 5, 0, 1, 3]], -2.5048, 0.0101)
    """
    known = values[np.isfinite(values) & (np.abs(values) <= FARTHEST)]
    low, high = min(0.0, *known.tolist()), max(0.0, *known.tolist())
    by = round(math.ceil((high - low) / (NUMBERS - 1) * 1e4) / 1e4, 4) or 1e-4
    low = round(math.floor(low / by + 1e-9) * by, 4)
    with np.errstate(invalid="ignore"):
        codes = np.rint((np.clip(values, -FARTHEST, FARTHEST) - low) / by) + len(CODES)
    codes = np.where(values < -FARTHEST, CODES["below"], codes)
    codes = np.where(values > FARTHEST, CODES["above"], codes)
    codes = np.where(np.isneginf(values), CODES["zero"], codes)
    codes = np.where(np.isnan(values), CODES["none"], codes)
    if bad is not None:
        codes = np.where(bad, CODES["bad"], codes)
    return codes.astype(np.uint8), low, by


def error_words(by: float) -> str:
    """How far a number that is told, of two digits and with such a step, may be from that of the data.

    >>> error_words(0.024)
    'within 8 % of the exact number'
    """
    off = 10 ** (by / 2) * (1 + TOLD_DIGITS) - 1
    return f"within {math.ceil(100 * off)} % of the exact number"


def _cells(cells: Cells) -> dict[str, Any]:
    found: dict[str, Any] = {"edges": _rounded(cells.edges, 5), "first": _rounded(cells.first, 5)}
    extra = {"more": cells.more, "noun": cells.noun, "labels": list(cells.labels),
             "names": list(cells.names)}  # fmt: skip
    return found | {name: value for name, value in extra.items() if value}


def _curves(ax: Axes, said: Curves) -> dict[str, Any]:
    every = max(1, math.ceil(len(said.x) / CURVE_POINTS))
    lines = [(name, np.asarray(values, float)[::every]) for name, values in said.lines]
    return {
        "across": _across_words(ax),
        "of": ax.get_ylabel().replace("\n", " "),
        "at": _rounded(said.x[::every], 5),
        "log10": said.log10,
        "share": said.share,
        "lines": [
            {"name": name, "values": [_number(value, said.log10) for value in values.tolist()]}
            for name, values in lines
            if not np.isnan(values).all()
        ],
    } | ({"names": list(said.names[::every])} if said.names else {})


def _across_words(ax: Axes) -> str:
    """What the axis counts: panels one below the other have one label, at the last of them."""
    if ax.get_xlabel() or ax.figure is None:
        return ax.get_xlabel()
    below = [other for other in ax.figure.axes
             if other.get_xlabel() and other.get_position().y0 <= ax.get_position().y0
             and math.isclose(other.get_position().x0, ax.get_position().x0, abs_tol=0.01)]  # fmt: skip
    return max(below, key=lambda other: other.get_position().y0).get_xlabel() if below else ""


def _number(value: float, log10: bool) -> float | str | None:
    """A value of a curve for JSON: three digits; "0" for an exact zero, None where there is none."""
    if math.isnan(value) or value == math.inf:
        return None
    if value == -math.inf:
        return "0"
    return round(value, 3) if log10 else float(f"{value:.4g}")


def _rounded(values: Sequence[float] | np.ndarray, digits: int) -> list[float]:
    """Numbers for JSON, whole ones without a point."""
    found = [round(float(value), digits) for value in values]
    return [int(value) if value.is_integer() else value for value in found]
