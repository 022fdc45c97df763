"""Pictures of trainings: `plot_histories` looks its kind up in `HISTORY_KINDS` and draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.errors import InputError, must_be
from gradflow.history import History
from gradflow.reporter import panels
from gradflow.reporter.histories.across import colour_words, shared_by
from gradflow.reporter.histories.course import Course, courses
from gradflow.reporter.histories.groups import RunGroup, groups_of
from gradflow.reporter.histories.kinds import HISTORY_KINDS
from gradflow.reporter.layout import PanelBlock, bare, draw_blocks, finish_axes, title
from gradflow.reporter.picture import look
from gradflow.reporter.scale import narrowed


def plot_histories(
    histories: Sequence[History],
    kind: str = "waterfall",
    *,
    layer: str | None = None,
    layers: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    by: str = "seed",
    ax: Axes | None = None,
    limits: Sequence[float] | None = None,
    captions: bool = True,
) -> Figure:
    """Draw one or several histories on one scale.

    Args:
        histories: as `gradflow.load` reads them.
        kind: one of `HISTORY_KINDS`.
        layer: one layer by name; all by default.
        layers: or some by name.
        names: what each history is called; by default its model's name.
        by: of "groups", what the runs of one group differ in, as their folders name it.
        ax: axes of your own for the main panel of one layer; it has its colour bar beside it.
        limits: powers of ten at which the colours end instead; the picture says so.
        captions: whether what is seen is explained below the panels.

    Returns:
        The figure; with ``ax`` the one that they are part of.

    Raises:
        InputError: the kind or the layer is unknown, there is no probe yet, or ``ax`` is given for
            more than one layer.
    """
    if not isinstance(kind, str) or kind not in HISTORY_KINDS:
        advice = "the waterfall is the one to look at first"
        raise InputError(
            must_be("kind of a history", f"one of {', '.join(HISTORY_KINDS)}", repr(kind), advice)
        )
    for history in histories:
        history.require_probes(f"the run of {history.title}")
    shown = courses(histories, layer, names)
    if layers is not None:
        shown = [one for one in shown if one.layer in layers]
    return draw_courses(kind, shown, by=by, ax=ax, limits=limits, captions=captions)


def draw_courses(
    kind: str,
    shown: Sequence[Course],
    *,
    by: str = "seed",
    ax: Axes | None = None,
    limits: Sequence[float] | None = None,
    captions: bool = True,
) -> Figure:
    """Draw some layers of some runs on one scale; see `plot_histories`."""
    with narrowed(limits), look():
        blocks = blocks_of(kind, shown, by)
        blocks = blocks if captions else [bare(block) for block in blocks]
        if ax is not None:
            return _draw_into(ax, kind, blocks, shown)
        return draw_blocks(HISTORY_KINDS[kind], blocks)


def blocks_of(kind: str, shown: Sequence[Course], by: str = "seed") -> list[PanelBlock]:
    """A block of panels for each layer, on axes in common; the first of each run has its loss."""
    shared = shared_by(shown)
    if HISTORY_KINDS[kind].together:
        layers: dict[str, list[RunGroup]] = {}
        for group in groups_of(shown, by):
            layers.setdefault(group.layer, []).append(group)
        return [
            PanelBlock(layer, HISTORY_KINDS[kind].prepare(some, shared), unwritten=False)
            for layer, some in layers.items()
        ]
    charts = [
        HISTORY_KINDS[kind].prepare(
            one, shared, first=place == 0 or shown[place - 1].run != one.run
        )
        for place, one in enumerate(shown)
    ]
    drawn = [chart for chart in charts if not chart.note]
    colours = "" if HISTORY_KINDS[kind].scale else colour_words(drawn)
    for place, chart in enumerate(charts):
        # what several pictures say of themselves is said below the last of them
        last = not any(other.reading == chart.reading for other in charts[place + 1 :])
        said = [chart.reading * last, colours * (bool(drawn) and chart is drawn[-1])]
        charts[place] = replace(chart, reading=" ".join(filter(None, said)))
    return [
        PanelBlock(one.name, chart, unwritten=False)
        for one, chart in zip(shown, charts, strict=True)
    ]


def _draw_into(
    ax: Axes, kind: str, blocks: Sequence[PanelBlock], shown: Sequence[Course]
) -> Figure:
    if len(blocks) > 1:
        names = ", ".join(one.name for one in shown)
        advice = "give layer= as well, or leave ax out"
        raise InputError(must_be("ax", "given for one layer", f"{len(blocks)} ({names})", advice))
    block = blocks[0]
    if block.chart.note:
        panels.say(ax, block.chart.note)
    else:
        HISTORY_KINDS[kind].draw([ax], block.chart)
    return finish_axes(ax, HISTORY_KINDS[kind].scale, block.chart, (title(block), block.name))
