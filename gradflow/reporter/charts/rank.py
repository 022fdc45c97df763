"""Rank against lag: how many directions of the state still carry a gradient k steps on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.limits import GONE_WORDS
from gradflow.reporter.charts.chart import (
    DASHED,
    DOTTED,
    Chart,
    Line,
    absent,
    count_ticks,
    draw_log_lines,
    key,
    measured,
)
from gradflow.reporter.numbers import count_words, number_words
from gradflow.reporter.picture import FAINT
from gradflow.reporter.scale import SERIES

RANKS = (
    ("rank_surviving", f"directions with gain ≥ {GONE_WORDS}", SERIES[0], "-"),
    ("rank_effective", "effective rank", SERIES[1], DASHED),
    ("rank_stable", "stable rank ‖P‖²_F ÷ ‖P‖²", SERIES[2], DOTTED),
)


@dataclass(frozen=True, kw_only=True)
class Rank(Chart):
    """Three counts of directions over the lag."""

    lag: np.ndarray  # (K,)
    values: np.ndarray  # (3, K) surviving, effective, stable; NaN where unknown
    size: int  # S: as many as there can be


def prepare(layer: LayerAnalysis) -> Rank:
    """Stable, effective and surviving rank of P over the lags that were measured."""
    rows = [measured(layer, name) for name, *_ in RANKS]
    if all(row is None for row in rows) or layer.steps <= 1:
        why = "No product over several steps was measured, so its rank is not known."
        note = absent(layer, "rank_surviving", why)
        return Rank(note=note, lag=np.empty(0), values=np.empty((3, 0)), size=layer.size)
    lag = next(row["rank_lag"].values.astype(float) for row in rows if row is not None)
    values = np.stack([np.full(len(lag), np.nan) if row is None else row.values for row in rows])
    order = np.argsort(lag)
    lag, values = lag[order], values[:, order]
    return Rank(
        message=_message(lag, values, layer.size),
        reading=(
            f"How many of the {layer.size} directions of the state pass k steps: those that keep "
            f"{GONE_WORDS}, and two averages, in which a direction counts by its share (effective rank: "
            "Roy & Vetterli 2007)."
        ),
        lag=lag,
        values=values,
        size=layer.size,
    )


def _message(lag: np.ndarray, values: np.ndarray, size: int) -> str:
    surviving, effective = values[0], values[1]
    known = np.flatnonzero(~np.isnan(surviving))
    said = []
    if len(known):
        at = known[-1]
        left = f"{number_words(surviving[at])} of {size} directions"
        many = "survives" if surviving[at] == 1 else "survive"
        said.append(f"{left} {many} {count_words(int(lag[at]), 'step')}")
    known = np.flatnonzero(~np.isnan(effective))
    if len(known) > 1:
        first, last = effective[known[0]], effective[known[-1]]
        goes = "falls" if last < first else "goes"
        ends = number_words(first), number_words(last)
        way = f"stays at {ends[0]}" if ends[0] == ends[1] else f"{goes} from {ends[0]} to {ends[1]}"
        said.append(f"the effective rank {way}")
    return "; ".join(said)


def draw(axes: Sequence[Axes], rank: Rank) -> None:
    """The three ranks, both axes logarithmic; no direction at all sits on the lower edge."""
    ax = axes[0]
    with np.errstate(divide="ignore"):
        lag, values = np.log10(rank.lag), np.log10(np.maximum(rank.values, 0))
    lines = [
        Line(row, name, colour, 1.6, dash)
        for row, (_, name, colour, dash) in zip(values, RANKS, strict=True)
    ]
    zeros = bool(np.isneginf(values).any())
    bottom, top = -0.35 if zeros else -0.08, float(np.log10(max(rank.size, 2))) + 0.08
    names = tuple(f"{distance:g}" for distance in rank.lag.tolist())
    draw_log_lines(ax, lag, lines, limits=(bottom, top), names=names)
    places, words = count_ticks(0, top)
    ax.set_yticks([bottom, *places] if zeros else places, ["0", *words] if zeros else words)
    ax.axhline(np.log10(max(rank.size, 1)), color=FAINT, lw=0.7, zorder=0)
    ax.set_xlim(lag[0] - 0.05, lag[-1] + 0.05)
    ax.set_xticks(*count_ticks(lag[0], lag[-1]))
    ax.set_xlabel("distance t′ − t in steps", labelpad=2)
    ax.set_ylabel("directions", labelpad=2)
    key(ax, 3)
