"""What a notebook shows of an analysis, a layer, a finding or a history at the end of a cell."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from gradflow.analysis import Analysis, Finding, LayerAnalysis
from gradflow.errors import InputError
from gradflow.history import History
from gradflow.reporter.digest import top_findings
from gradflow.reporter.figures import plot
from gradflow.reporter.histories.course import courses
from gradflow.reporter.histories.figures import plot_histories
from gradflow.reporter.histories.now import Now, now, worst_first
from gradflow.reporter.histories.text import NOW_COLUMNS
from gradflow.reporter.page import template
from gradflow.reporter.picture import png
from gradflow.reporter.scale import VERDICT_COLOURS

SHOWN = 6  # sentences before the others are folded
DOTS = 90  # an inch of the picture

Told = tuple[LayerAnalysis | Now, list[str]]  # a layer, and what it does with its inputs held fixed


def analysis_html(analysis: Analysis) -> str:
    """A sentence per layer, the overview, at most three findings with what to try; the rest folded."""
    told = [(layer, analysis.alone_of(layer)) for layer in analysis.told]
    table = analysis.frame("layers").to_html(index=False, border=0)
    return _rendered(
        title=analysis.title,
        told=told,
        findings=top_findings(analysis),
        warnings=analysis.warnings,
        picture=_picture(analysis),
        alt=f"overview of {analysis.title}",
        table=table,
    )


def layer_html(layer: LayerAnalysis) -> str:
    """Its sentence, its overview and all of its findings."""
    analysis = Analysis(layer.name, {layer.name: layer}, (), {})
    return _rendered(
        told=[(layer, analysis.alone_of(layer))],
        findings=layer.findings,
        picture=_picture(analysis),
        alt=f"overview of {layer.name}",
        table=analysis.frame("layers").to_html(index=False, border=0),
    )


def finding_html(finding: Finding) -> str:
    """What is wrong, where, what to try, and a line to paste."""
    return _rendered(findings=[finding])


def history_html(history: History) -> str:
    """What happened to each layer, the waterfall; the numbers of the last probe folded."""
    layers = worst_first([now(one) for one in courses([history])])
    rows = [
        {c.heading.replace("-\n", "-").replace("\n", " "): c.value(one) for c in NOW_COLUMNS}
        for one in layers
    ]
    return _rendered(
        title=history.title,
        told=[(one, []) for one in layers],
        picture=_picture(history),
        alt=f"waterfall of {history.title}",
        table=pd.DataFrame(rows).to_html(index=False, border=0) if rows else "",
    )


def _picture(shown: Analysis | History) -> str:
    """The overview or the waterfall as base64, or nothing where there is none to draw."""
    try:
        figure = plot(shown) if isinstance(shown, Analysis) else plot_histories([shown])
        return base64.b64encode(png(figure, DOTS)).decode()
    except InputError:  # no layers, no probe
        return ""


def _rendered(
    *,
    title: str = "",
    told: Sequence[Told] = (),
    findings: Sequence[Finding] = (),
    warnings: Sequence[str] = (),
    picture: str = "",
    alt: str = "",
    table: str = "",
) -> str:
    values: dict[str, Any] = {
        "title": title,
        "rows": told[:SHOWN],
        "folded": told[SHOWN:],
        "findings": findings,
        "warnings": warnings,
        "picture": picture,
        "alt": alt,
        "table": Markup(table),  # pandas escapes
        "colours": VERDICT_COLOURS,
    }
    return template("notebook.html").render(**values)
