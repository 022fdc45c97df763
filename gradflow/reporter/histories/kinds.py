"""The menu of pictures of a training: adding a kind is one entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gradflow.limits import GONE_WORDS
from gradflow.reporter.histories import groups, lines, waterfall
from gradflow.reporter.histories.across import unwritten
from gradflow.reporter.kinds import Kind, Scale, ratios
from gradflow.reporter.overview import special_colours

STRIP_NAMES = 0.95  # inches for the names of the strips


def _waterfall_specials(charts: Sequence[waterfall.Waterfall]) -> dict[str, str]:
    images = [(chart.values, chart.bad) for chart in charts]
    none = f"no such step, or no {charts[0].course.noun}"
    return special_colours(images, none) | unwritten(charts)


def _curves(what: str, prepare: Callable[..., Any]) -> Kind:
    """A kind that draws curves below the strips."""
    return Kind(
        what=f"{what}, over the training",
        prepare=prepare,
        draw=lines.draw,
        heights=lines.heights,
        gap=lines.gap,
        left=STRIP_NAMES,
        above=0.05,
    )


HISTORY_KINDS: dict[str, Kind] = {
    "waterfall": Kind(
        what="|∂L/∂s| of the last loss step, so many steps back ÷ its size at the loss, over the training",
        prepare=waterfall.prepare,
        draw=waterfall.draw,
        heights=waterfall.heights,
        gap=waterfall.gap,
        left=STRIP_NAMES,
        above=0.05,
        scale=Scale(ratios("as at the loss"), _waterfall_specials),
    ),
    "rates": _curves("growth of ln gain per step, in nats", lines.prepare_rates),
    "horizons": _curves(
        f"how far back the gain and the gradient stay above {GONE_WORDS}", lines.prepare_horizons
    ),
    "groups": replace(
        _curves("rate and steps reached of every run of a sweep, and of groups of them", groups.prepare),
        together=True,
        above=0.22,
    ),
    "gates": _curves("where the gates stand", lines.prepare_gates),
    "norms": _curves("size of the gradient of the parameters", lines.prepare_norms),
}  # fmt: skip
