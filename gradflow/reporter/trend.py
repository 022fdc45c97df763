"""Many runs, one after the other: the gain over the span and the horizon of every layer, run by run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.analysis import Analysis
from gradflow.limits import BAND
from gradflow.reporter.picture import INK, SOFT, Picture, look
from gradflow.reporter.scale import SERIES

PANEL, WIDTH = 1.7, 7.2  # inches
LEFT, HEAD, BETWEEN, FOOT = 0.75, 0.45, 0.35, 0.85
LETTERS = 14  # of a run's name that fit below its place


def draw_trend(runs: Mapping[str, Analysis]) -> Figure:
    """Runs from left to right in the order given; a colour for each layer, up to five in turn."""
    with look():
        figure = Picture(WIDTH + LEFT + 0.3, HEAD + 2 * PANEL + BETWEEN + FOOT)
        gain = figure.inches(LEFT, HEAD, WIDTH, PANEL)
        reach = figure.inches(LEFT, HEAD + PANEL + BETWEEN, WIDTH, PANEL)
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
        figure.words(LEFT, 0.1, said, fontsize=8, color=SOFT)
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
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"
