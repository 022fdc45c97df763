"""Every picture: `plot` looks its kind up in `gradflow.reporter.kinds.KINDS` and draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.errors import InputError, must_be
from gradflow.limits import OVERVIEW_ROWS
from gradflow.reporter import panels, prepare
from gradflow.reporter.charts import states
from gradflow.reporter.charts.chart import writable
from gradflow.reporter.kinds import KINDS, OVERVIEW_SCALE, Kind
from gradflow.reporter.layout import PanelBlock, bare, draw_blocks, finish_axes, title
from gradflow.reporter.overview import NARROW, Entry, draw_overview
from gradflow.reporter.picture import look
from gradflow.reporter.scale import narrowed


def plot(
    x: Analysis | Sequence[Analysis],
    kind: str = "overview",
    *,
    layer: str | None = None,
    ax: Axes | None = None,
    limits: Sequence[float] | None = None,
    captions: bool = True,
) -> Figure:
    """Draw an analysis, or several on one scale; the figure is unknown to pyplot.

    Colours are log10 ratios, ± six powers of ten, fixed.

    Args:
        x: one analysis, or a list of them.
        kind: one of `KINDS`.
        layer: one layer by name; all by default.
        ax: axes of your own for the kind's main panel of one layer; it has its colour bar beside it.
        limits: powers of ten at which the colours end instead, (-2, 2) say; the picture says so.
        captions: whether what is seen is explained below the panels.

    Returns:
        The figure; with ``ax`` the one that they are part of.

    Raises:
        InputError: the kind or the layer is unknown, ``ax`` is given for more than one layer, or the
            limits are wider than the fixed ones.

    >>> import torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> len(plot(run, "gain-map").axes) >= 1
    True
    """
    if not isinstance(kind, str) or kind not in KINDS:
        advice = "the overview is the one to look at first"
        raise InputError(must_be("kind", f"one of {', '.join(KINDS)}", repr(kind), advice))
    entries = _entries(x, layer)
    with narrowed(limits), look():
        if ax is not None:
            return _draw_into(ax, kind, entries)
        drawn = KINDS[kind]
        if drawn is None:
            rows = _worst(entries)
            return draw_overview(rows, captioned=captions, left_out=len(entries) - len(rows))
        blocks = _blocks(drawn, entries)
        return draw_blocks(drawn, blocks if captions else [bare(block) for block in blocks])


def plot_narrow(x: Analysis | Sequence[Analysis]) -> Figure:
    """The overview for a narrow screen: every curve below its heat map."""
    with look():
        return draw_overview(_entries(x, None), NARROW)


def blocks_of(kind: Kind, analysis: Analysis) -> list[PanelBlock]:
    """What is drawn of all layers of an analysis, made ready."""
    return _blocks(kind, _entries(analysis, None))


def _entries(x: Analysis | Sequence[Analysis], layer: str | None) -> list[Entry]:
    """The layers to draw, with a prefix where they come from several analyses."""
    many = [x] if isinstance(x, Analysis) else list(x) if isinstance(x, Sequence) else [x]
    for one in many:
        if not isinstance(one, Analysis):
            advice = "analyze the recording first"
            what = "an Analysis or a list of Analyses"
            raise InputError(must_be("what is plotted", what, type(one).__name__, advice))
    named = len(many) > 1
    entries = [
        _entry(one.title if named else "", picked)
        for one in many
        for picked in ([one[layer]] if layer is not None else one.values())
    ]
    if not entries:
        advice = "record a model that has a recurrent layer"
        raise InputError(must_be("what is plotted", "an analysis with layers", "none", advice))
    return entries


def _worst(entries: list[Entry]) -> list[Entry]:
    """Of more than fit a picture those with the worst verdicts, in their order."""
    if len(entries) <= OVERVIEW_ROWS:
        return entries
    named = {str(number): entry.layer for number, entry in enumerate(entries)}
    worst = Analysis("", named, (), {}).worst_first[:OVERVIEW_ROWS]
    return [entry for entry in entries if any(entry.layer is layer for layer in worst)]


def _entry(group: str, layer: LayerAnalysis) -> Entry:
    """A layer to draw; without its labels where they would be a row of boxes."""
    if writable(layer.step_labels):
        return Entry(group, layer)
    return Entry(group, replace(layer, step_labels=()), unwritten=True)


def _blocks(kind: Kind, entries: Sequence[Entry]) -> list[PanelBlock]:
    """A block per layer, or one for all layers of an analysis."""
    if not kind.together:
        return [
            PanelBlock(entry.name, kind.prepare(entry.layer), entry.unwritten and kind.stepped)
            for entry in entries
        ]
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return [
        PanelBlock(
            group,
            kind.prepare([entry.layer for entry in some]),
            any(entry.unwritten for entry in some),
        )
        for group, some in groups.items()
    ]


def _draw_into(ax: Axes, kind: str, entries: list[Entry]) -> Figure:
    drawn = KINDS[kind]
    if len(entries) > 1 and not (drawn and drawn.together):
        names = ", ".join(entry.layer.name for entry in entries)
        advice = "give layer= as well, or leave ax out"
        raise InputError(must_be("ax", "given for one layer", f"{len(entries)} ({names})", advice))
    if drawn is None:
        heat = prepare.heat(entries[0].layer)
        panels.draw_heat(ax, heat)
        shown = states.States(heats=(heat,), note=heat.note)
        return finish_axes(ax, OVERVIEW_SCALE, shown, (entries[0].title, entries[0].layer.name))
    block = _blocks(drawn, entries)[0]
    if block.chart.note:
        panels.say(ax, block.chart.note)
    else:
        drawn.draw([ax], block.chart)
    headline = title(block) or drawn.what
    return finish_axes(ax, drawn.scale, block.chart, (headline, block.name))
