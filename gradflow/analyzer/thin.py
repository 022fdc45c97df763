"""Gains of a wide state, through which only few directions can be sent: pairs at chosen distances.

Letters: M mapped sequences, T timesteps, S the state's width, t source, t' target, k = t' − t lag.
A gain map of all pairs takes S directions at every step. Here a few go to and fro over windows of
1, 2, 4, … steps and of as many as there are: their largest gain is ‖P‖₂ to 1 %, and random probes
beside them give ‖P‖_F/√S. Windows of one lag lie one behind the other, so that all of them take one
sweep over time. Everything between the measured distances is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.direction import log_cell_path, loss_map
from gradflow.analyzer.gains import Norms, Window, WindowSweep, log_norms
from gradflow.analyzer.jacobians import HostOperator, operator_of, vector_seconds
from gradflow.analyzer.plan import NORMS, Maps
from gradflow.analyzer.ranks import Ranks, dyadic
from gradflow.analyzer.timeline import cuts_before
from gradflow.limits import (
    LN_GONE,
    LN_HALF,
    MAP_BYTES,
    THIN_SECONDS,
    THIN_SEED,
    THIN_SOURCES,
    THIN_TOLERANCE,
)
from gradflow.recording.track import Track

Progress = Callable[[float], None]


@dataclass(frozen=True)
class _Effort:
    """How much is done for each distance."""

    rows: int  # of the block that goes to and fro, see `log_norms`
    rounds: int
    probes: int  # random directions a window

    def seconds(self, operator: HostOperator, lags: int) -> float:
        """Predicted: each lag is one block that goes over all steps, to and fro and probed."""
        vectors = lags * (2 * self.rows * self.rounds + self.probes)
        return operator.length * vectors * vector_seconds(operator)


EFFORTS = (_Effort(2, 12, 12), _Effort(2, 8, 12), _Effort(2, 6, 8), _Effort(1, 6, 4))


@dataclass
class _Pairs:
    """What was measured of pairs of steps: (mapped sequence, source, target) -> ln gains."""

    spectral: dict[tuple[int, int, int], float] = field(default_factory=dict)
    rms: dict[tuple[int, int, int], float] = field(default_factory=dict)
    error: dict[tuple[int, int, int], float] = field(default_factory=dict)  # of rms, nats
    missing: float = 0.0  # what the last round still added to some ln ‖P‖₂

    def median(self, lag: int) -> float:
        """L(k) over the measured pairs; NaN without any."""
        found = sorted(v for (_, t, u), v in self.spectral.items() if u - t == lag)
        return found[(len(found) - 1) // 2] if found else math.nan

    @property
    def lags(self) -> list[int]:
        """The distances that were measured."""
        return sorted({u - t for _, t, u in self.spectral})


def thin_maps(
    track: Track,
    mapped: Sequence[int],
    span: int,
    *,
    seconds: float,
    withheld: bool,
    progress: Progress,
) -> tuple[Maps, Ranks]:
    """ln gain of the mapped sequences over windows of 1, 2, 4, … steps, and ranks as far as known.

    Where the median gain falls below GONE or below a half between two of these distances, the
    distances between are halved until the crossing is known to the step. The span is measured, too.
    Most pairs of the maps are NaN, and the ranks know no singular value.
    """
    operator = operator_of(track, torch.float64, mapped)
    runs = _runs(track, mapped)
    reach = max((last - first for _, first, last in runs), default=0)
    stride = _stride(track, len(mapped))
    pairs = _Pairs()
    lags = sorted({*dyadic(reach), min(span, reach)}) if reach else []
    lags, effort = _affordable(operator, lags, seconds)
    measuring = _Measuring(operator, runs, stride, effort, pairs)
    if lags:
        measuring.measure(lags, progress)
        left = max(seconds - effort.seconds(operator, len(lags)), seconds / 2)
        for level in (LN_GONE, LN_HALF):
            left = measuring.cross(level, left)
    maps = _filled(track, mapped, pairs, stride, seconds / 4, withheld)
    words = _words(measuring, reach)
    return replace(maps, words=words + maps.words), _ranks(
        operator, len(mapped), pairs.lags, min(span, reach)
    )


def _runs(track: Track, mapped: Sequence[int]) -> list[tuple[int, int, int]]:
    """(place among the mapped, first state, last state) of every stretch without a cut."""
    segments = cuts_before(track)
    found = []
    for place, b in enumerate(mapped):
        own = segments[: int(track.lengths[b]), b]
        counts = torch.unique_consecutive(own, return_counts=True)[1].tolist()
        start = 0
        for count in counts:
            if count > 1:
                found.append((place, start, start + count - 1))
            start += count
    return found


def _stride(track: Track, mapped: int) -> int:
    """Of the sources, the least power of two at which the maps fit the memory."""
    states = len(track.states)
    row = 8.0 * (len(NORMS) + states**2 + 3) * mapped * track.steps
    stride = 1
    while row * math.ceil(track.steps / stride) > MAP_BYTES and stride < track.steps:
        stride *= 2
    return stride


# ------------------------------------------------------------------------------------- the cost


def _affordable(
    operator: HostOperator, lags: list[int], seconds: float
) -> tuple[list[int], _Effort]:
    """The distances and the effort that fit the budget; the farthest alone if that is what fits."""
    for wanted in (lags, [*lags[:-1][::2], *lags[-1:]], [*lags[:1], *lags[-1:]], lags[-1:]):
        for effort in EFFORTS:
            if effort.seconds(operator, len(wanted)) <= seconds:
                return wanted, effort
    least = EFFORTS[-1]
    return (lags[-1:] if least.seconds(operator, 1) <= THIN_SECONDS else []), least


# --------------------------------------------------------------------------------- the measuring


@dataclass(frozen=True)
class _Measuring:
    """Windows of one operator, and what is known of them so far."""

    operator: HostOperator
    runs: list[tuple[int, int, int]]
    stride: int
    effort: _Effort
    pairs: _Pairs

    def measure(self, lags: Sequence[int], progress: Progress) -> None:
        """Gains over windows of these lags."""
        windows = [
            Window(place, start + 1, start + lag + 1, part)
            for part, lag in enumerate(lags)
            for place, first, last in self.runs
            for start in _starts(first, last, lag, self.stride)
        ]
        if not windows:
            return
        norms = log_norms(
            self.operator,
            windows,
            rows=self.effort.rows,
            rounds=self.effort.rounds,
            tolerance=THIN_TOLERANCE,
            progress=progress,
        )
        total, error = _probed(self.operator, windows, norms, self.effort.probes)
        pairs = self.pairs
        pairs.missing = max(pairs.missing, norms.missing)
        for number, window in enumerate(windows):
            key = window.sequence, window.first - 1, window.last - 1
            pairs.spectral[key] = float(norms.spectral[number])
            pairs.rms[key] = float(total[number]) - math.log(self.operator.size) / 2
            pairs.error[key] = float(error[number])

    def cross(self, level: float, seconds: float) -> float:
        """Find the first distance whose median lies below a level, to the step; what is left."""
        each = self.effort.seconds(self.operator, 1)
        while seconds >= each:
            known = self.pairs.lags
            below = next((k for k in known if self.pairs.median(k) < level), None)
            above = max((k for k in known if below is not None and k < below), default=0)
            if below is None or below - above <= 1:
                return seconds
            middle = (above + below) // 2
            self.measure([middle], lambda share: None)
            if math.isnan(self.pairs.median(middle)):
                return seconds
            seconds -= each
        return seconds


def _starts(first: int, last: int, lag: int, stride: int) -> list[int]:
    """Source states of disjoint windows of a stretch, at most `SOURCES`, on the grid of sources."""
    step = math.ceil(lag / stride) * stride
    every = range(math.ceil(first / stride) * stride, last - lag + 1, step)
    if len(every) <= THIN_SOURCES:
        return list(every)
    chosen = np.linspace(0, len(every) - 1, THIN_SOURCES).round().astype(int)
    return [every[int(place)] for place in chosen]


def _probed(
    operator: HostOperator, windows: list[Window], norms: Norms, count: int
) -> tuple[Tensor, Tensor]:
    """ln ‖P‖_F of every window, (N,), and its standard error in nats, (N,).

    ‖P‖_F² = ‖P v‖² + E ‖P z⊥‖², z⊥ Gaussian without its share along the leading direction v: what
    would make the mean of few probes most uneven is known already (Hutch++, Meyer et al. 2021).
    """
    generator = torch.Generator().manual_seed(THIN_SEED)
    spectral, leading = norms.spectral, norms.leading
    probes = torch.randn(count, operator.size, generator=generator, dtype=torch.float64)
    along = (probes @ leading.T).T.unsqueeze(2) * leading.unsqueeze(1)  # (N, m, S)
    pushed, scale = WindowSweep(operator, windows).push((probes - along).to(operator.dtype))
    lengths = pushed.square().sum(2)  # (N, m)
    top = (2 * (spectral - scale)).exp()  # (N,)
    total = top + lengths.mean(1)
    spread = lengths.std(1) / math.sqrt(count)
    nothing = torch.isneginf(spectral)
    logs = torch.where(nothing, -torch.inf, total.log() / 2 + scale)
    return logs, torch.where(nothing, 0.0, spread / total / 2)


# --------------------------------------------------------------------------------------- the maps


def _filled(
    track: Track, mapped: Sequence[int], pairs: _Pairs, stride: int, seconds: float, withheld: bool
) -> Maps:
    sources = np.arange(0, track.steps, stride)
    shape = (len(mapped), len(sources), track.steps)
    unknown = np.full(shape, np.nan)
    planes = {name: unknown.copy() for name in ("spectral", "rms", "error")}
    for name, plane in planes.items():
        for (place, source, target), value in getattr(pairs, name).items():
            plane[place, source // stride, target] = value
        if name != "error":
            lengths = track.lengths.cpu().numpy()[list(mapped)]
            for number, source in enumerate(sources):
                plane[source < lengths, number, source] = 0.0
    loss, every = loss_map(track, mapped, sources, torch.float64, seconds, withheld)
    names = list(track.states)
    blocks = tuple(b + a for b in names for a in names) if len(names) > 1 else ()
    return Maps(
        log_gain={norm: planes.get(norm, unknown) for norm in NORMS} | {"loss": loss},
        blocks=np.full((len(blocks), *shape), np.nan),
        block_names=blocks,
        cell_path=log_cell_path(track, mapped, sources),
        sources=sources,
        method="products",
        stride=stride,
        dtype=torch.float64,
        words=f", one in {every} targets of the loss direction" if every > 1 else "",
        rms_error=planes["error"],
    )


def _words(measuring: _Measuring, reach: int) -> str:
    effort, pairs = measuring.effort, measuring.pairs
    if not pairs.lags:
        if not reach:
            return "by products with few directions"
        seconds = round(effort.seconds(measuring.operator, 1))
        return (
            f"gains between steps not measured: those of one distance would take about {seconds} s; "
            "record fewer sequences"
        )
    within = max(0.01, 2 * pairs.missing)
    known = [error for error in pairs.error.values() if math.isfinite(error)]
    off = float(np.median(known)) if known else 0.0
    words = (
        "by products with few directions over windows of "
        f"{', '.join(str(lag) for lag in pairs.lags)} steps, distances between them by the line from one "
        f"to the next: largest gains by block iteration to {within:.0%}"
    )
    if pairs.missing > THIN_TOLERANCE:
        words += f" after {effort.rounds} rounds"
    return words + f", rms gains by {effort.probes} random probes to {off:.1%} (one standard error)"


def _ranks(operator: HostOperator, mapped: int, lags: list[int], reach: int) -> Ranks:
    nothing = np.full(len(lags), np.nan)
    singular = np.full((mapped, operator.size), np.nan)
    return Ranks(singular, reach, np.array(lags, dtype=float), nothing, nothing.copy())
