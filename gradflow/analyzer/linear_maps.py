"""Gain maps of a linear recurrence: every pair of steps, by sums of logarithms or on the key axis.

Letters: T steps, B sequences, M of them mapped, n sources, S the numbers of a state, D its distinct
decays, G heads, d_k keys, d_v value columns, K distances, P_g the (d_k, d_k) product of head g.

With rank-one corrections all value columns share the products on the key axis of their head: P of the
whole state is P_g for each head and column, so ‖P‖₂ = max_g ‖P_g‖₂ and ‖P‖_F² = d_v Σ_g ‖P_g‖_F².
Heads are taken as sequences of their own, so all that goes through a `LinearSteps` of one head of one
column goes through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.direction import log_loss_gains
from gradflow.analyzer.gains import Norms, Window, log_norms
from gradflow.analyzer.linear_logs import Logs, LogsOf, linear_steps
from gradflow.analyzer.plan import Maps, every_step, exact_seconds
from gradflow.analyzer.products import NORMS, log_gains
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.timeline import cuts_before, in_processing_order
from gradflow.cells.linear import HEAD_AXES, LinearSteps
from gradflow.errors import RecordingError
from gradflow.limits import (
    HEAD_LAGS,
    LOSS_BYTES,
    MAP_BYTES,
    MAP_SECONDS,
    PAIR_SECONDS,
    PRODUCT_FLOAT32,
    PRODUCT_FLOAT64,
    VECTOR_SPEED,
)
from gradflow.recording.track import Track


def on_key_axis(steps: LinearSteps) -> LinearSteps:
    """The same on one value column, (T, B·G, 1, d_k, 1): sequence b's head g is b·G + g.

    Raises:
        RecordingError: it is complex.
    """
    if steps.left is None or steps.right is None or steps.decay.is_complex():
        raise RecordingError("products of complex rank-one steps are not taken")
    heads, keys, _ = steps.shape
    length, batch = steps.length, steps.batch
    decay = steps.decay.expand(length, batch, heads, *steps.decay.shape[3:])
    vectors = (
        vector.reshape(length, batch * heads, 1, keys) for vector in (steps.left, steps.right)
    )
    left, right = vectors
    return LinearSteps(
        shape=(1, keys, 1),
        decay=decay.reshape(length, batch * heads, 1, -1, 1),
        left=left,
        right=right,
    )


def head_norms(keys: LinearSteps, windows: list[Window], heads: int) -> tuple[Tensor, Tensor]:
    """ln ‖P_g‖₂ and ln ‖P_g‖_F of every window of a sequence and every head, (N, G) each."""
    each = [
        Window(window.sequence * heads + head, window.first, window.last, window.part)
        for window in windows
        for head in range(heads)
    ]
    norms: Norms = log_norms(keys, each)
    shape = len(windows), heads
    return norms.spectral.reshape(shape), norms.frobenius.reshape(shape)


def erasing(steps: LinearSteps) -> Tensor:
    """|1 + Σ_i left_i right_i/decay_i| of every step, sequence and head, (T, B, G).

    It is |det A|/|det diag(decay)|, for a delta rule |1 − β ‖k‖²|: 0 where a step erases a direction.
    NaN where a decay is exactly 0.
    """
    if steps.left is None or steps.right is None:
        raise RecordingError("there is no rank-one part")
    product = steps.left * steps.right / steps.decay[..., 0]
    return (1 + product.sum(-1)).abs()


PLANES = len(NORMS) + 2  # and the loss direction, the cell path


@dataclass(frozen=True)
class LinearMaps:
    """The maps of a layer, and of its heads what falls with the distance."""

    maps: Maps
    lags: np.ndarray  # (K,)
    head_gain: np.ndarray  # (G, K) median over pairs of ln ‖P_g‖₂; NaN where there is no pair


@dataclass(frozen=True)
class _MapPlan:
    """What of the maps fits the budget."""

    stride: int  # of the sources
    dtype: torch.dtype  # of sums over entries
    seconds: float  # that every step as a source would take


def linear_maps(
    track: Track, logs: LogsOf, mapped: Sequence[int], settings: Settings, withheld: bool
) -> LinearMaps:
    """ln gain from every chosen source to every later step of the mapped sequences."""
    first = linear_steps(track, [mapped[0]])
    plan = _planned(track, first, mapped, settings)
    sources = np.arange(0, track.steps, plan.stride)
    shape = (len(mapped), len(sources), track.steps)
    planes = {name: np.full(shape, np.nan) for name in (*NORMS, "loss")}
    segments = cuts_before(track)[:, list(mapped)].T.numpy()
    lags = _lags(track.steps)
    heads: list[list[np.ndarray]] = []  # sequence, head -> (K, n)
    for place, b in enumerate(mapped):
        length = int(track.lengths[b])
        inside = torch.from_numpy(sources[sources < length])
        crossed = segments[place][inside, None] != segments[place][None, :length]
        vectors = None if withheld else _vectors(track, b)
        one = _Sequence(first, length, inside, plan, vectors, lags, crossed)
        if first.left is None:
            found = one.elementwise(logs(b))
        else:
            whole = linear_steps(track, [b])
            found = one.ranked(whole)
        for name, values in found.items():
            values[torch.from_numpy(crossed)] = torch.nan
            planes[name][place, : len(inside), :length] = values.numpy()
        heads.append(one.by_lag)
        settings.progress(f"{track.name}: gains", (place + 1) / len(mapped))
    maps = Maps(
        log_gain=planes,
        blocks=np.zeros((0, *shape)),
        block_names=(),
        cell_path=np.full(shape, np.nan),
        sources=sources,
        method="exact",
        stride=plan.stride,
        dtype=plan.dtype,
        words=_words(track, plan),
    )
    count = len(heads[0])
    curves = [np.concatenate([own[head] for own in heads], axis=1) for head in range(count)]
    gains = np.array([_medians(curve) for curve in curves]).reshape(count, len(lags))
    return LinearMaps(maps, lags, gains)


def _lags(steps: int) -> np.ndarray:
    """Distances at which heads are told apart: all of few, else evenly spread in their logarithms."""
    if steps < 2:
        return np.zeros(0, dtype=int)
    return np.unique(np.geomspace(1, steps - 1, min(HEAD_LAGS, steps - 1)).round().astype(int))


def _medians(values: np.ndarray) -> np.ndarray:
    """(K,) of (K, n), of what is known."""
    found = np.full(len(values), np.nan)
    for place, row in enumerate(values):
        known = np.sort(row[~np.isnan(row)])
        if len(known):
            low, high = known[(len(known) - 1) // 2], known[len(known) // 2]
            found[place] = low if np.isinf(low) else (low + high) / 2
    return found


def _vectors(track: Track, b: int) -> Tensor | None:
    """∂L/∂S_t of a sequence in processing order, (T, S); None where it is not known."""
    grads = track.partial_grads
    if grads is None:
        return None
    (name,) = track.states
    return in_processing_order(track, grads[name])[:, b]


# ------------------------------------------------------------------------------------- the budget


def _planned(
    track: Track, steps: LinearSteps, mapped: Sequence[int], settings: Settings
) -> _MapPlan:
    lengths = [int(track.lengths[b]) for b in mapped]
    seconds = MAP_SECONDS / settings.layers
    least = 1
    extra = 2 * track.state_shape[0] if steps.left is not None else 0  # planes of every head
    row = 8.0 * (PLANES * len(mapped) + extra) * track.steps
    while row * math.ceil(track.steps / least) > MAP_BYTES and least < track.steps:
        least *= 2
    if steps.left is not None:
        heads, width, _ = track.state_shape
        whole = heads * sum(exact_seconds(width, length) for length in lengths)
        dtype = torch.float64
    else:
        whole, dtype = _elementwise_seconds(steps, lengths, seconds, least)
    stride = settings.stride or least
    while settings.stride is None and whole / stride > seconds and stride < track.steps:
        stride *= 2
    return _MapPlan(stride, dtype, whole)


def _elementwise_seconds(
    steps: LinearSteps, lengths: list[int], seconds: float, stride: int
) -> tuple[float, torch.dtype]:
    """Predicted, of every pair; sums in float32 where that brings it into the budget."""
    distinct = math.prod(steps.decay.shape[2:])
    pairs = sum(length * (length - 1) / 2 for length in lengths)
    found = math.inf
    for dtype, speed in ((torch.float64, PRODUCT_FLOAT64), (torch.float32, PRODUCT_FLOAT32)):
        sums = 2 * 2.0 * distinct / speed  # rms and the loss direction
        found = pairs * (PAIR_SECONDS * distinct / max(1, steps.shape[-1]) + sums)
        if found / stride <= seconds:
            return found, dtype
    return found, torch.float32


def _words(track: Track, plan: _MapPlan) -> str:
    words = f"exact, {every_step(plan.stride)} a source"
    if plan.dtype == torch.float32:
        words += ", sums over entries in float32"
    if plan.stride > 1:
        words += f": every step would take about {max(1, round(plan.seconds))} s"
    return words


# ---------------------------------------------------------------------------------- one sequence


@dataclass
class _Sequence:
    """One mapped sequence."""

    like: LinearSteps  # of some sequence: shapes alone are read
    length: int
    sources: Tensor  # (n,)
    plan: _MapPlan
    vectors: Tensor | None  # (T, S)
    lags: np.ndarray
    crossed: np.ndarray  # (n, T) true across a cut

    def __post_init__(self) -> None:
        self.by_lag: list[np.ndarray] = []  # head -> (K, n)

    def elementwise(self, logs: Logs) -> dict[str, Tensor]:
        """By sums of logarithms."""
        total = logs.total[: self.length]
        logs = Logs(
            total,
            None if logs.zeros is None else logs.zeros[: self.length],
            logs.copies,
            logs.groups,
            logs.inner,
        )
        width = total.shape[1]
        found = {"spectral": self._maxima(logs)}
        sums = logs.sums(self.sources, dtype=self.plan.dtype)
        found["rms"] = (sums - math.log(width)) / 2
        weights = None if self.vectors is None else self._weights()
        if weights is not None:
            found["loss"] = logs.sums(self.sources, weights, self.plan.dtype) / 2
        places = torch.arange(len(self.sources))
        for name, values in found.items():
            known = ~values[places, self.sources].isnan() | (name != "loss")
            values[places[known], self.sources[known]] = 0.0
        return found

    def _maxima(self, logs: Logs) -> Tensor:
        if logs.groups == 1:
            return logs.maxima(self.sources)
        whole: Tensor | None = None
        for head in range(logs.groups):
            own = logs.of_group(head).maxima(self.sources)
            self._note(own)
            whole = own if whole is None else torch.maximum(whole, own)
        assert whole is not None
        return whole

    def _note(self, own: Tensor) -> None:
        """What of a head's map (n, T) lies at the distances."""
        values = np.full((len(self.lags), len(self.sources)), np.nan)
        numbers = np.where(self.crossed, np.nan, own.numpy())
        sources = self.sources.numpy()
        for place, lag in enumerate(self.lags):
            inside = np.flatnonzero(sources + lag < self.length)
            values[place, inside] = numbers[inside, sources[inside] + lag]
        self.by_lag.append(values)

    def _weights(self) -> Tensor:
        """The share of ‖a_t‖² that lies at each distinct decay, (T, D); NaN where a_t is 0 or NaN."""
        assert self.vectors is not None
        size = self.vectors[: self.length].abs().double()
        peak = size.amax(1, keepdim=True)
        square = (size / peak).square()  # 0/0 is NaN
        square = square / square.sum(1, keepdim=True)
        shaped = square.unflatten(1, self.like.shape)
        axes = list(self.like.decay.shape[2:])
        if len(axes) == HEAD_AXES:
            axes[0] = self.like.shape[0]
        shared = [axis + 1 for axis, width in enumerate(axes) if width == 1]
        return (shaped.sum(shared) if shared else shaped).reshape(len(square), -1)

    def ranked(self, steps: LinearSteps) -> dict[str, Tensor]:
        """By products on the key axis of every head."""
        heads = steps.shape[0]
        keys = on_key_axis(steps)
        made = log_gains(keys, self.sources.tolist())
        spectral, rms = (made[norm][:, :, : self.length] for norm in NORMS)
        for head in range(heads):
            if heads > 1:
                self._note(spectral[head])
        # ‖P‖_F²/S = Σ_g ‖P_g‖_F² d_v/(G d_k d_v), of which rms_g² is ‖P_g‖_F²/d_k
        found = {
            "spectral": spectral.amax(0),
            "rms": (torch.logsumexp(2 * rms, 0) - math.log(heads)) / 2,
        }
        if self.vectors is not None:
            found["loss"] = self._loss(steps, self.vectors.double().unsqueeze(1))
        return found

    def _loss(self, steps: LinearSteps, vectors: Tensor) -> Tensor:
        """Pulled back through the whole state, every so-manieth target."""
        stride, size = 1, steps.size
        seconds = MAP_SECONDS / 4
        while stride < self.length and (
            8.0 * size * self.length / stride > LOSS_BYTES
            or 4.0 * size * self.length**2 / 2 / stride / VECTOR_SPEED > seconds
        ):
            stride *= 2
        targets = range(self.length - 1, -1, -stride)
        short = LinearSteps(
            shape=steps.shape,
            decay=steps.decay[: self.length],
            left=None if steps.left is None else steps.left[: self.length],
            right=None if steps.right is None else steps.right[: self.length],
        )
        return log_loss_gains(short, vectors[: self.length], self.sources.tolist(), targets)[0]
