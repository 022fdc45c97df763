"""The four paths of an LSTM's cell state: through the forget gate alone, and through h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.cells import CELLS, kinds
from gradflow.reporter.charts.chart import (
    DASHED,
    DOTTED,
    Chart,
    Line,
    absent,
    draw_log_lines,
    key,
    label_steps,
    measured,
    running_median,
)
from gradflow.reporter.numbers import ratio_words
from gradflow.reporter.picture import FAINT, INK
from gradflow.reporter.scale import SERIES

TOTAL = "total"
FOUR = next(kind for kind, spec in kinds().items() if spec.paths is not None)
DASHES = ("-", DASHED, DOTTED, (0, (4, 1.5, 1, 1.5)))


@dataclass(frozen=True, kw_only=True)
class Paths(Chart):
    """log10 of the spectral norm of every term of ∂c_t/∂c_{t−1}, input-time order."""

    names: tuple[str, ...]  # P, the total last
    step: np.ndarray  # (T,) counted from 1
    gain: np.ndarray  # (P, T) log10
    last: int  # the last step of the sequences measured


def prepare(layer: LayerAnalysis) -> Paths:
    """The four terms and their sum at every step."""
    array = measured(layer, "path_gain")
    if array is None:
        why = f"{layer.cell} is no {FOUR}; the four paths are those of an {FOUR}'s cell state c."
        if layer.cell in CELLS and CELLS[layer.cell].paths is not None:
            why = "No step has a previous cell state, so there is no path to show."
        note = absent(layer, "path_gain", why)
        return Paths(note=note, names=(), step=np.empty(0), gain=np.empty((0, 0)), last=0)
    array = array.transpose("path", "step")
    names = tuple(str(name) for name in array["path"].values)
    with np.errstate(divide="ignore"):
        gain = np.log10(np.where(array.values >= 0, array.values, np.nan))
    return Paths(
        message=_message(names, gain),
        reading=(
            "Each line is the largest gain of one way from c(t−1) to c(t), median over sequences; "
            "above 1 (grey line) that way alone grows."
        ),
        names=names,
        step=np.arange(1, gain.shape[1] + 1),
        gain=gain,
        last=_last(gain),
        labels=layer.step_labels,
    )


def _last(gain: np.ndarray) -> int:
    known = np.flatnonzero(~np.isnan(gain).all(axis=0))
    return int(known[-1]) + 1 if len(known) else gain.shape[1]


def _message(names: Sequence[str], gain: np.ndarray) -> str:
    """Which path is the largest, at how many steps, and what all of them gain."""
    single = [number for number, name in enumerate(names) if name != TOTAL]
    known = ~np.isnan(gain[single]).all(axis=0)
    ways = np.where(np.isnan(gain[single]), -np.inf, gain[single])[:, known]
    winners = np.bincount(ways.argmax(axis=0), minlength=len(single))
    best = int(winners.argmax())
    name = names[single[best]]
    said = f"the path {name} is" if name.startswith("through") else f"the {name} is"
    middle = running_median(gain, 1)
    words = f"{said} the largest at {winners[best]} of {int(known.sum())} steps"
    words += f", gain {ratio_words(middle[single[best]])} per step"
    if TOTAL in names:
        words += f"; all paths {ratio_words(middle[list(names).index(TOTAL)])}"
    return words


def draw(axes: Sequence[Axes], paths: Paths) -> None:
    """Every path over the steps on one axis of powers of ten."""
    ax = axes[0]
    ax.axhline(0, color=FAINT, lw=0.8, zorder=0)
    looks = iter(zip(SERIES, DASHES, strict=False))
    lines = []
    for name, values in zip(paths.names, paths.gain, strict=True):
        colour, dash = (INK, "-") if name == TOTAL else next(looks)
        label = "all together" if name == TOTAL else name
        lines.append(Line(values, label, colour, 0.9 if name == TOTAL else 1.6, dash))
    draw_log_lines(ax, paths.step, lines, decades=8, share=True)
    ax.set_xlim(0.5, paths.last + 0.5)
    label_steps(ax.xaxis, paths.labels, paths.step[: len(paths.labels)])
    ax.set_xlabel("step", labelpad=2)
    ax.set_ylabel("gain per step", labelpad=2)
    key(ax, 5)
