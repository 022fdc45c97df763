"""What a notebook shows of an analysis, a layer or a finding that stands at the end of a cell."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from gradflow.analysis import Analysis, Finding, LayerAnalysis
from gradflow.errors import InputError
from gradflow.reporter.digest import top_findings
from gradflow.reporter.figures import plot
from gradflow.reporter.page import template
from gradflow.reporter.picture import png
from gradflow.reporter.scale import VERDICT_COLOURS

SHOWN = 6  # sentences before the others are folded
DOTS = 90  # an inch of the picture

Told = tuple[LayerAnalysis, list[str]]  # a layer, and what it does with its inputs held fixed


def analysis_html(analysis: Analysis) -> str:
    """A sentence per layer, the overview, at most three findings with what to try; the rest folded."""
    told = [(layer, analysis.alone_of(layer)) for layer in analysis.told]
    table = analysis.frame("layers").to_html(index=False, border=0)
    return _rendered(
        title=analysis.title,
        told=told,
        findings=top_findings(analysis),
        warnings=analysis.warnings,
        picture=_overview(analysis),
        alt=f"overview of {analysis.title}",
        table=table,
    )


def layer_html(layer: LayerAnalysis) -> str:
    """Its sentence, its overview and all of its findings."""
    analysis = Analysis(layer.name, {layer.name: layer}, (), {})
    return _rendered(
        told=[(layer, analysis.alone_of(layer))],
        findings=layer.findings,
        picture=_overview(analysis),
        alt=f"overview of {layer.name}",
        table=analysis.frame("layers").to_html(index=False, border=0),
    )


def finding_html(finding: Finding) -> str:
    """What is wrong, where, what to try, and a line to paste."""
    return _rendered(findings=[finding])


def _overview(analysis: Analysis) -> str:
    """The overview as base64, or nothing where there is none to draw."""
    try:
        return base64.b64encode(png(plot(analysis), DOTS)).decode()
    except InputError:  # no layers
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
