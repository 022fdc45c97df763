"""A comparison of runs as a page, as a notebook shows it, as JSON, and of many runs as a trend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow._version import __version__
from gradflow.analysis import SCHEMA, Analysis
from gradflow.history import History
from gradflow.limits import BAND
from gradflow.reporter.digest import strict, summary
from gradflow.reporter.histories.files import history_summary
from gradflow.reporter.page import template
from gradflow.reporter.picture import INK, SOFT, Picture, data_url, ending, look
from gradflow.reporter.scale import SERIES
from gradflow.reporter.text import Numbers


def comparison_page(
    runs: Sequence[str],
    sentences: Sequence[str],
    notes: Sequence[str],
    pictures: tuple[bytes, bytes],  # the second for a telephone, empty where there is none
    numbers: Numbers,
) -> str:
    """One file that reads offline: what changed, the picture, all numbers with their units in words."""
    picture, narrow = pictures
    return template("comparison.html").render(
        runs=runs,
        window_title=f"{', '.join(runs)}: gradient flow compared",
        sentences=sentences,
        notes=notes,
        source=data_url(picture, "png"),
        narrow=narrow and data_url(narrow, "png"),
        alt=f"{len(runs)} runs on one scale: {sentences[0]}",
        table=_table(numbers),
        units=numbers.units,
        version=__version__,
    )


def comparison_html(
    sentences: Sequence[str], notes: Sequence[str], picture: bytes, numbers: Numbers
) -> str:
    """The same at the end of a notebook's cell."""
    words = "".join(Markup("<li>{}</li>").format(sentence) for sentence in sentences)
    small = "".join(Markup("<p><small>Note: {}</small></p>").format(note) for note in notes)
    return (
        f'<div class="gradflow" style="max-width:60em;text-align:left"><ul>{words}</ul>'
        f'<img alt="runs on one scale" src="{data_url(picture, "png")}" style="width:100%;max-width:44em">'
        f"{small}<details><summary>all numbers</summary>{_table(numbers)}</details></div>"
    )


def _table(numbers: Numbers) -> Markup:
    said = [one.heading.replace("-\n", "-").replace("\n", " ") for one in numbers.columns]
    named = list(zip(said, (one.value for one in numbers.columns), strict=True))
    head = Markup().join(map(Markup("<th>{}").format, said))
    cell, row = Markup('<td data-of="{}">{}'), Markup("<tr>{}</tr>\n")
    rows = [
        Markup().join(cell.format(n, value(one)) for n, value in named) for one in numbers.things
    ]
    body = Markup().join(map(row.format, rows))
    return Markup("<table><thead><tr>{}</tr></thead><tbody>\n{}</tbody></table>").format(head, body)


def comparison_summary(
    runs: Mapping[str, Analysis] | Mapping[str, History],
    changes: pd.DataFrame,
    sentences: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything a script wants to know of a comparison, ready for strict JSON."""
    made = {
        "schema": SCHEMA,
        "gradflow": __version__,
        "runs": {
            name: summary(run) if isinstance(run, Analysis) else history_summary(run)
            for name, run in runs.items()
        },
        "changes": changes.to_dict("records"),
        "sentences": list(sentences),
        "notes": list(notes),
    }
    strictly = strict(made)
    assert isinstance(strictly, dict)
    return strictly


def draw_trend(runs: Mapping[str, Analysis], wide: float = 7.2) -> Figure:
    """Runs from left to right in the order given; a colour for each layer, up to five in turn."""
    with look():
        figure = Picture(wide + 1.05, 5.05)
        gain = figure.inches(0.75, 0.45, wide, 1.7)
        reach = figure.inches(0.75, 2.5, wide, 1.7)
        names = list(dict.fromkeys(name for run in runs.values() for name in run))
        for place, name in enumerate(names):
            _layer(gain, reach, runs, name, SERIES[place % len(SERIES)])
        gain.axhspan(-BAND, BAND, color="#ededed", lw=0, zorder=0)
        gain.set_ylabel("gain over the span\nin decades")
        reach.set_ylabel("horizon in steps")
        places = range(len(runs))
        for ax in (gain, reach):
            ax.set_xlim(-0.5, len(runs) - 0.5)
            ax.set_xticks(places, [""] * len(runs))
        reach.set_xticks(places, [_short(name) for name in runs], rotation=30, ha="right")
        said = f"{len(runs)} runs in the order given; grey: stable; open circle: not gone as far as measured"
        said = textwrap.fill(said, int(wide / 0.058))
        figure.words(0.75, 0.1, said, fontsize=8, color=SOFT)
        reach.set_ylim(bottom=0)
        if len(names) > 1:
            gain.legend(loc="best", frameon=False, fontsize=7.5)
        return figure


def _layer(gain: Axes, reach: Axes, runs: Mapping[str, Analysis], name: str, colour: str) -> None:
    """One layer in both panels, where a run has it."""
    found = [
        (place, run.layers[name]) for place, run in enumerate(runs.values()) if name in run.layers
    ]
    known = [(place, layer.gain) for place, layer in found if math.isfinite(layer.gain.value)]
    at = [place for place, _ in known]
    middle = [one.decades for _, one in known]
    gain.plot(at, middle, "o-", color=colour, lw=1.2, ms=4, label=name)
    for place, one in known:
        if math.isfinite(one.low) and math.isfinite(one.high):
            ends = [end / math.log(10) for end in (one.low, one.high)]
            gain.plot([place, place], ends, color=colour, lw=1)
    steps = [(place, layer.horizon or layer.searched, layer.horizon) for place, layer in found]
    drawn = [(place, far, gone) for place, far, gone in steps if far]
    reach.plot([p for p, _, _ in drawn], [far for _, far, _ in drawn], color=colour, lw=1.2)
    for place, far, gone in drawn:
        face = colour if gone is not None else "white"
        reach.plot([place], [far], "o", color=colour, mfc=face, mec=colour if colour else INK, ms=4)


def _short(name: str) -> str:
    """A run's name, as much of its end as fits below its place."""
    return name if len(name) <= 14 else ending(name, 13)
