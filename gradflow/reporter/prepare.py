"""What the figures draw, made ready: pure functions from a `LayerAnalysis` to small arrays.

Drawing functions compute nothing, so tests look at these. Everything is in powers of ten.
Letters as in `gradflow.recording`: T timesteps, H units; k = t' − t is the lag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from gradflow.analysis import LayerAnalysis
from gradflow.limits import GONE_DECADES, GONE_WORDS, GREW_DECADES, GREW_WORDS
from gradflow.reporter.numbers import count_words

LN10 = math.log(10)
MAP_CELLS = 128  # a gain map has at most 128 × 128
HEAT_ROWS, HEAT_COLUMNS = 128, 400


@dataclass(frozen=True)
class Heat:
    """Units × steps of log10 of a gradient, the longest memory on top, the loss on the right."""

    state: str
    values: np.ndarray  # (rows, columns) log10; NaN undefined, -inf exactly zero
    bad: np.ndarray  # (rows, columns) true where the gradient is NaN or Inf
    numbers: tuple[int, ...]  # of the units from top to bottom, counted from 1
    units: int
    steps: int
    unit_pool: int  # units in a row of the picture; the largest is shown
    step_pool: int  # steps in a column of the picture; the largest is shown
    note: str  # words that stand in place of the picture, or ""
    broken: str  # where NaN or Inf begin, or ""
    labels: tuple[str, ...] = ()  # of the steps 0, 1, … back from the loss; none: their numbers
    beyond: int = 0  # how many columns on the left have no step so far back
    whole: bool = False  # of the whole loss, since its last step alone is not known


@dataclass(frozen=True)
class LagLine:
    """The lag curve of a layer, in powers of ten over the lag."""

    lag: np.ndarray  # (K,)
    median: np.ndarray  # (K,) NaN where exactly zero
    low: np.ndarray  # (K,) 10 % quantile
    high: np.ndarray  # (K,) 90 % quantile
    fit: np.ndarray  # (K,)
    slope: np.ndarray  # (K,) local slope, nats per step
    dot: tuple[float, float] | None  # where it is gone, or has grown a thousandfold
    words: str  # "no direction left after 7 steps"
    zero_from: int | None  # first lag at which half of the gains are exactly zero
    note: str  # words that stand in place of the curve, or ""


def pooled(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The largest of every rows × columns block; NaN only where a whole block is NaN."""
    # fmax skips NaN without the warning nanmax gives for an empty block
    return np.fmax.reduce(np.fmax.reduce(in_blocks(values, rows, columns), axis=3), axis=1)


def in_blocks(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Values as (blocks down, rows, blocks across, columns), NaN where a block is not full."""
    height = -(-values.shape[0] // rows) * rows
    width = -(-values.shape[1] // columns) * columns
    padded = np.full((height, width), np.nan)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.reshape(height // rows, rows, width // columns, columns)


def heat(layer: LayerAnalysis, state: str | None = None) -> Heat:
    """Units × steps of log10 |∂L/∂s| of the last loss step, ÷ the layer's own rms value there.

    Columns run from the earliest step to the loss. Where there are more units or steps than a
    picture can show, neighbours are pooled by their largest, so that no survivor is lost.
    """
    state = state or layer.main_state
    order = layer.data["unit_order"].sel(state=state).values
    order = order[order >= 0].astype(int)
    raw = layer.data["log10_grad"].sel(state=state).values[order]  # (units, back)
    bad = np.isposinf(raw)
    if "not finite" in layer.labels and not layer.gradient_note:
        bad |= np.isnan(raw)
    units, steps = raw.shape
    unit_pool = max(1, math.ceil(units / HEAT_ROWS))
    step_pool = max(1, math.ceil(steps / HEAT_COLUMNS))
    values = pooled(np.where(bad, np.nan, raw), unit_pool, step_pool)[:, ::-1]
    bad_blocks = (pooled(bad.astype(float), unit_pool, step_pool) > 0)[:, ::-1]
    return Heat(
        state=state,
        values=values,
        bad=bad_blocks,
        numbers=tuple((order + 1).tolist()),
        units=units,
        steps=steps,
        unit_pool=unit_pool,
        step_pool=step_pool,
        note=_missing(layer, raw, bad),
        broken=_broken(layer, bad),
        labels=_labels_back(layer),
        beyond=_beyond(values, bad_blocks),
        whole=is_whole(layer),
    )


def cropped(heats: Sequence[Heat]) -> list[Heat]:
    """The same, without most of the steps that none of them has: of a rollout an episode is short."""
    known = [(one.values.shape[1] - one.beyond) * one.step_pool for one in heats if not one.note]
    found = []
    for one in heats:
        left = one.values.shape[1] - math.ceil(1.5 * max(known, default=0) / one.step_pool)
        if left > 0 and not one.note:
            steps = (one.values.shape[1] - left) * one.step_pool
            one = replace(one, values=one.values[:, left:], bad=one.bad[:, left:], steps=steps,
                          labels=one.labels[:steps], beyond=one.beyond - left)  # fmt: skip
        found.append(one)
    return found


def is_whole(layer: LayerAnalysis) -> bool:
    """Whether the profile is that of the whole loss: its last step alone is not known."""
    norms = layer.data["grad_norm"]
    known = ~np.isnan(layer.data["log10_grad"].values).all()
    return bool(known and np.isnan(norms.sel(kind="last").values).all())


def _beyond(values: np.ndarray, bad: np.ndarray) -> int:
    """Columns on the left without a value: the layer starts, or its state was cut, right of them."""
    known = np.flatnonzero((~np.isnan(values) | bad).any(axis=0))
    return int(known[0]) if len(known) else 0


def _labels_back(layer: LayerAnalysis) -> tuple[str, ...]:
    """Labels from the loss step backwards; none for several sequences, aligned at steps of their own."""
    kind = "total" if is_whole(layer) else "last"
    norms = layer.data["grad_norm"].sel(kind=kind).values  # (state, step)
    reached = np.flatnonzero((norms != 0).any(axis=0) & ~np.isnan(norms).all(axis=0))
    if layer.sequences != 1 or not layer.step_labels or not len(reached):
        return ()
    if layer.reverse:
        return layer.step_labels[reached[0] :]
    return layer.step_labels[reached[-1] :: -1]


def _missing(layer: LayerAnalysis, raw: np.ndarray, bad: np.ndarray) -> str:
    if layer.gradient_note:
        return layer.gradient_note
    if raw.size == 0 or (np.isnan(raw).all() and not bad.any()):
        return "The gradient of the loss was not measured for this layer; record a backward."
    return ""


def _broken(layer: LayerAnalysis, bad: np.ndarray) -> str:
    """Where NaN or Inf begin, named as a step where all sequences end at the same one."""
    backs = np.flatnonzero(bad.any(axis=0))
    if not len(backs):
        return ""
    back = int(backs[0])
    words = "at the loss itself" if back == 0 else f"{count_words(back, 'step')} back from the loss"
    lengths = layer.data["length"].values
    if len(np.unique(lengths)) != 1:
        return f"NaN or Inf {words}"
    step = 1 + back if layer.reverse else int(lengths[0]) - back
    return f"NaN or Inf at step {step}, {words}"


def lag_line(layer: LayerAnalysis) -> LagLine:
    """The median spectral gain against the lag, its 10–90 % band, the fit, and what to say of it."""
    data = layer.data
    lag = data["lag"].values.astype(float)
    raw = joined(data["lag_median"].values, data["lag_count"].values) / LN10
    zeros = np.flatnonzero(np.isneginf(raw))
    zero_from = int(lag[zeros[0]]) if len(zeros) else None
    median = np.where(np.isfinite(raw), raw, np.nan)
    dot, words = _reading(layer, lag, median, zero_from)
    nothing = not np.isfinite(median[lag >= 1]).any() and zero_from is None
    return LagLine(
        lag=lag,
        median=median,
        low=_floor(joined(data["lag_low"].values, data["lag_count"].values) / LN10),
        high=_floor(joined(data["lag_high"].values, data["lag_count"].values) / LN10),
        fit=data["lag_fit"].values / LN10,
        slope=_slope(data),
        dot=dot,
        words=words,
        zero_from=zero_from,
        note=_no_curve(layer) if nothing else "",
    )


def joined(values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Distances that were not measured, by the straight line between their measured neighbours.

    >>> joined(np.array([0.0, np.nan, -2.0, np.nan]), np.array([1, 0, 1, 0]))
    array([ 0., -1., -2., nan])
    """
    known = np.flatnonzero((count > 0) & np.isfinite(values))
    if len(known) < 2:
        return values
    lags = np.arange(len(values))
    between = (count == 0) & (lags < known[-1]) & (lags > known[0])
    return np.where(between, np.interp(lags, known, values[known]), values)


def measured_distances(layer: LayerAnalysis) -> str:
    """The distances at which gains were measured, in words, where some were left out."""
    known = np.flatnonzero(layer.data["lag_count"].values[1:]) + 1
    if not len(known) or known[-1] == len(known):
        return ""
    return ", ".join(str(lag) for lag in known)


def _slope(data: xr.Dataset) -> np.ndarray:
    """Local slope of the lag curve, nats per step; along the line where distances are left out."""
    count = data["lag_count"].values
    if (count[1:] > 0).all():
        return np.asarray(data["lag_slope"].values)
    with np.errstate(invalid="ignore"):
        return np.diff(joined(data["lag_median"].values, count), prepend=np.nan)


def _no_curve(layer: LayerAnalysis) -> str:
    """Why there is no lag curve."""
    if layer.steps <= 1:
        return "one step: no distance to measure"
    if layer.verdict == "dead" and not layer.gain.steps:
        return "cut at every step"
    return "gains are not known" if "no gains" in layer.labels else "no finite gain to show"


def _floor(values: np.ndarray) -> np.ndarray:
    """A band may reach down to an exact zero; far below every axis stands for it in a drawing."""
    return np.where(np.isneginf(values), -400.0, values)


def _reading(
    layer: LayerAnalysis, lag: np.ndarray, median: np.ndarray, zero_from: int | None
) -> tuple[tuple[float, float] | None, str]:
    grown = np.flatnonzero(median >= GREW_DECADES)
    if layer.horizon is not None:
        exactly = zero_from == layer.horizon
        gone = "exactly 0" if exactly else "no direction left"
        words = f"{gone} after {count_words(layer.horizon, 'step')}"
        return (_crossing(lag, median, layer.horizon, GONE_DECADES), GONE_DECADES), words
    if len(grown):
        at = int(lag[grown[0]])
        return (
            _crossing(lag, median, at, GREW_DECADES),
            GREW_DECADES,
        ), f"{GREW_WORDS} × after {count_words(at, 'step')}"
    below = np.isfinite(median[1:]) & (median[1:] < GONE_DECADES)
    if below.any() or not np.isfinite(layer.rate.value):
        return None, ""
    return None, f"{'never' if layer.never_gone else 'not yet'} below {GONE_WORDS}"


def _crossing(lag: np.ndarray, median: np.ndarray, at: int, level: float) -> float:
    """Where, between lag at − 1 and at, the straight line between the two medians meets a level."""
    here = np.flatnonzero(lag == at)
    if not len(here) or here[0] == 0:
        return float(at)
    before, after = median[here[0] - 1], median[here[0]]
    if not np.isfinite([before, after]).all() or before == after:
        return float(at)
    share = min(1.0, max(0.0, (level - before) / (after - before)))
    return float(lag[here[0] - 1] + share * (at - lag[here[0] - 1]))


def span_share(layer: LayerAnalysis) -> float:
    """How much of the span the gradient reaches, 0 to 1: the bar on the page."""
    if layer.verdict == "inconclusive" and not math.isfinite(layer.rate.value):
        return 0.0
    reach = layer.searched if layer.horizon is None else layer.horizon
    if layer.horizon is None and layer.searched >= layer.span - 1:
        return 1.0
    return min(1.0, reach / max(1, layer.span))
