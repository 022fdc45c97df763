"""A comparison of runs as a page, as a notebook shows it, and as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from gradflow._version import __version__
from gradflow.analysis import SCHEMA, Analysis
from gradflow.reporter.digest import strict, summary
from gradflow.reporter.page import template

SHOWN = ["run", "layer", "verdict", "gain", "gain_low", "gain_high", "rate", "rate_low", "rate_high",
         "half_life", "window", "horizon", "channels"]  # fmt: skip


def comparison_page(
    runs: Sequence[str],
    sentences: Sequence[str],
    notes: Sequence[str],
    picture: bytes,
    table: pd.DataFrame,
) -> str:
    """One file that reads offline: what changed, the picture, all numbers."""
    return template("comparison.html").render(
        runs=runs,
        window_title=f"{', '.join(runs)}: gradient flow compared",
        sentences=sentences,
        notes=notes,
        source=_source(picture),
        alt=f"{len(runs)} runs on one scale: {sentences[0]}",
        table=_table(table),
        version=__version__,
    )


def comparison_html(
    sentences: Sequence[str], notes: Sequence[str], picture: bytes, table: pd.DataFrame
) -> str:
    """The same at the end of a notebook's cell."""
    words = "".join(Markup("<li>{}</li>").format(sentence) for sentence in sentences)
    small = "".join(Markup("<p><small>Note: {}</small></p>").format(note) for note in notes)
    return (
        f'<div class="gradflow" style="max-width:60em;text-align:left"><ul>{words}</ul>'
        f'<img alt="runs on one scale" src="{_source(picture)}" style="width:100%;max-width:44em">'
        f"{small}<details><summary>all numbers</summary>{_table(table)}</details></div>"
    )


def comparison_summary(
    runs: Mapping[str, Analysis],
    changes: pd.DataFrame,
    sentences: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Everything a script wants to know of a comparison, ready for strict JSON."""
    made = {
        "schema": SCHEMA,
        "gradflow": __version__,
        "runs": {name: summary(run) for name, run in runs.items()},
        "changes": changes.to_dict("records"),
        "sentences": list(sentences),
        "notes": list(notes),
    }
    strictly = strict(made)
    assert isinstance(strictly, dict)
    return strictly


def _table(table: pd.DataFrame) -> Markup:
    shown = table[[column for column in SHOWN if column in table]]
    # pandas escapes
    return Markup(shown.to_html(index=False, border=0, float_format="{:.4g}".format, na_rep=""))


def _source(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
