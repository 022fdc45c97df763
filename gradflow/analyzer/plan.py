"""Which method and which sources: the gain map that fits a budget, and what was chosen in words.

Letters: S the state's width, L a sequence's steps. Costs are predicted from operation counts
and never measured by a clock, so that the same input always gives the same map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analyzer.blocks import SPEED
from gradflow.analyzer.direction import log_cell_path, loss_map
from gradflow.analyzer.jacobians import HostOperator, operator_of, state_size
from gradflow.analyzer.products import NORMS, log_gains, spectral_work
from gradflow.analyzer.spread import each
from gradflow.limits import (
    MAP_BYTES,
    NORM_TOLERANCE,
    RANK_CALL_SECONDS,
    SKETCH_LEVELS,
    SKETCH_SPOILED,
    SKETCH_TRUNCATION,
    SKETCH_WIDE,
    SKETCHED,
)
from gradflow.recording.track import Track

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Maps:
    """ln gain of the mapped sequences from every source to every target, and how it was made."""

    log_gain: dict[str, np.ndarray]  # norm -> (sequence, source, target)
    blocks: np.ndarray  # (block, sequence, source, target), rms gains from state to state
    block_names: tuple[str, ...]  # rows first: "hc" is ∂h_t'/∂c_t; none of a single state
    cell_path: np.ndarray  # (sequence, source, target)
    sources: np.ndarray
    method: str  # "exact", "sketch", "products" of a wide state, or "none"
    stride: int
    dtype: torch.dtype
    words: str
    # (sequence, source, target) nats, where probes gave the rms
    rms_error: np.ndarray | None = None

    @property
    def planes(self) -> list[np.ndarray]:
        """Every (sequence, source, target) array."""
        return [*self.log_gain.values(), *self.blocks, self.cell_path]


def make_maps(
    track: Track,
    sequences: Sequence[int],
    *,
    method: str,
    stride: int | None,
    seed: int,
    seconds: float,
    withheld: bool,
    progress: Progress,
    executor: Executor | None = None,
    norms: Sequence[str] = tuple(NORMS),
) -> Maps:
    """ln gain from every chosen source to every later step of the mapped sequences.

    Method "auto" without a stride makes the map with the most sources that is predicted to take no
    longer than `seconds` and to fit 256 MiB: exact, if a sketch has no more. The direction of the
    loss is left out, NaN, where it is withheld. Of an exact map of fewer norms nothing else is made.
    """
    size = state_size(track)
    predicted = sum(exact_seconds(size, int(track.lengths[b])) for b in sequences)
    auto = method == "auto" and stride is None
    begun = functools.partial(_Making, track, sequences, seed=seed, executor=executor, norms=norms)
    if auto:
        making = _fitting(begun, seconds, progress)
    else:
        making = begun(method == "sketch" or (method == "auto" and predicted > seconds))
        making.add(stride or 1)
    sources = np.arange(0, track.steps, making.stride)
    loss, every = loss_map(
        track, sequences, sources, making.dtype, seconds / 4 if auto else math.inf, withheld
    )
    names = list(track.states)
    return Maps(
        log_gain={norm: making.gains[norm] for norm in making.norms} | {"loss": loss},
        blocks=making.gains.get("blocks", np.zeros((0, *loss.shape))),
        block_names=tuple(b + a for b in names for a in names) if len(names) > 1 else (),
        cell_path=log_cell_path(track, sequences, sources)
        if making.whole
        else np.full(loss.shape, np.nan),
        sources=sources,
        method="sketch" if making.sketch else "exact",
        stride=making.stride,
        dtype=making.dtype,
        words=_words(making, every, predicted if method == "auto" else None),
    )


def exact_seconds(size: int, length: int, stride: int = 1) -> float:
    """Predicted seconds of an exact map with every stride-th step a source, in float64."""
    pairs = length * (length - 1) / 2 / stride
    work = pairs * (2.0 * size**3 + spectral_work(size, size))
    return work / SPEED[torch.float64] + length * 5e-4


def _fitting(begun: Callable[[bool], _Making], seconds: float, progress: Progress) -> _Making:
    """The map with the most sources that fits time and memory."""
    exact = begun(False)
    lengths = [operator.length for operator in exact.operators]
    least = exact.least_stride()
    strides = [least << power for power in range(1 + max(lengths).bit_length())]
    cheap = [
        stride
        for stride in strides
        if sum(exact_seconds(exact.size, length, stride) for length in lengths) <= seconds
    ]
    if cheap and (cheap[0] == least or max(lengths) * SKETCH_LEVELS * RANK_CALL_SECONDS > seconds):
        exact.add(cheap[0])
        return exact
    sketch = begun(True)
    if sketch.fit(seconds, least, cheap[0] if cheap else math.inf, progress):
        return sketch
    exact.add(cheap[0])
    return exact


class _OverBudget(Exception):
    """A map turned out dearer than foretold."""


class _Making:
    """A map under way, and what it has cost so far."""

    def __init__(
        self,
        track: Track,
        sequences: Sequence[int],
        sketch: bool,
        seed: int,
        executor: Executor | None = None,
        norms: Sequence[str] = tuple(NORMS),
    ) -> None:
        self.name, self.executor = track.name, executor
        self.steps, self.sketch, self.seed = track.steps, sketch, seed
        wide = sketch and state_size(track) > SKETCH_WIDE
        self.dtype = torch.float32 if wide else torch.float64
        self.operators = [operator_of(track, self.dtype, [b]) for b in sequences]
        widths = [int(state.shape[-1]) for state in track.states.values()]
        # the cost of a sketch is foretold by that of all norms
        self.norms = tuple(NORMS) if sketch else tuple(norms)
        self.whole = len(self.norms) == len(NORMS)
        self.blocks = len(widths) ** 2 if len(widths) > 1 else 0
        self.size, self.widths = sum(widths), tuple(widths) if self.blocks and self.whole else ()
        self.stride = 1
        self.total, self.limit = 0.0, math.inf  # predicted seconds of this map so far, and at most
        self.tell: Progress | None = None
        self.gains: dict[str, np.ndarray] = {}  # norm -> (..., sequence, source, target)
        self.piloted: list[dict[str, np.ndarray]] = []  # of the first step of each sequence alone

    def least_stride(self) -> int:
        """The least power of two at which the maps fit the memory."""
        planes = len(NORMS) + self.blocks + 2  # and the loss direction, the cell path
        row = 8.0 * planes * len(self.operators) * self.steps
        stride = 1
        while row * math.ceil(self.steps / stride) > MAP_BYTES and stride < self.steps:
            stride *= 2
        return stride

    def add(self, stride: int) -> None:
        """Make the maps of every stride-th source."""
        self.stride, places = stride, np.arange(0, self.steps, stride)
        shape = (len(self.operators), len(places), self.steps)
        self.gains = {norm: np.full(shape, np.nan) for norm in self.norms}
        if self.widths:
            self.gains["blocks"] = np.full((self.blocks, *shape), np.nan)
        inside = [places[places < operator.length].tolist() for operator in self.operators]
        known = self.piloted if self.piloted and all(len(some) == 1 for some in inside) else None
        for number, made in enumerate(known or (gains for gains, _ in self._made(inside))):
            for name, values in made.items():
                length = self.operators[number].length
                self.gains[name][..., number, : len(inside[number]), :length] = values

    def _made(
        self, sources: Sequence[list[int]]
    ) -> Iterator[tuple[dict[str, np.ndarray], list[float]]]:
        """The gains of each sequence from its sources, and the predicted seconds of each step.

        It ends where the sequences so far have cost more than the limit, which is the same whether they
        are made one after the other or side by side.
        """
        self.total = 0.0
        tell = self.tell if self.executor is None else None
        parts = (
            (
                operator,
                some,
                self.norms,
                self.widths,
                self.sketch,
                self.seed,
                self.total,
                self.limit,
                tell,
            )
            for operator, some in zip(self.operators, sources, strict=True)
        )
        for gains, spent in each(self.executor, self.name, _of_sequence, parts):
            for seconds in spent:
                self.total += seconds
            if self.total > self.limit:
                raise _OverBudget
            yield gains, spent

    def fit(self, seconds: float, least: int, most: float, progress: Progress) -> bool:
        """Follow the first step as a pilot, and choose the stride that its cost by lag allows.

        False, and no map, where that is `most` or more.
        """
        longest = max(operator.length for operator in self.operators)
        pilots = []
        for gains, spent in self._made([[0]] * len(self.operators)):
            self.piloted.append(gains)
            pilots.append(np.array(spent))
        piloted = float(sum(pilot.sum() for pilot in pilots))
        stride = least
        while stride < longest and _foretold(pilots, stride) > seconds - piloted:
            stride *= 2
        self.tell = progress
        while stride < most:
            self.limit = 1.5 * seconds if stride < longest else math.inf
            try:
                self.add(stride)
            except _OverBudget:
                # ranks that fell along the pilot stay high later on
                stride = min(4 * stride, 1 << longest.bit_length())
                continue
            return True
        return False


def _of_sequence(
    operator: HostOperator,
    sources: list[int],
    norms: tuple[str, ...],
    widths: tuple[int, ...],
    sketch: bool,
    seed: int,
    total: float,
    limit: float,
    tell: Progress | None,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The gains of one sequence, and the predicted seconds of each step, which come on top of a total."""
    spent: list[float] = []

    def spend(seconds: float) -> None:
        nonlocal total
        spent.append(seconds)
        total += seconds
        if tell is not None:
            tell(min(1.0, total / limit))
        if total > limit:
            raise _OverBudget

    gains = log_gains(
        operator, sources, norms, widths=widths, sketch=sketch, seed=seed, spend=spend
    )
    return {name: values.squeeze(-3).numpy() for name, values in gains.items()}, spent


def _foretold(pilots: list[np.ndarray], stride: int) -> float:
    """Seconds of all sources: what lag k cost the pilot, times how many sources reach lag k."""
    total = 0.0
    for pilot in pilots:
        length = len(pilot)
        reached = np.ceil((length - np.arange(length)) / stride)
        calls = SKETCH_LEVELS * RANK_CALL_SECONDS  # of each step, shared by all sources
        own = (pilot - calls).clip(RANK_CALL_SECONDS / 8)
        total += float((own * reached).sum()) + length * calls
    return total


def _words(making: _Making, every: int, predicted: float | None) -> str:
    method = "sketch" if making.sketch else "exact"
    words = f"{method}, {every_step(making.stride)} a source"
    if every > 1:
        words += f", {every_step(every)} a target of the loss direction"
    if making.sketch:
        words += (
            f", at most {SKETCH_TRUNCATION:g} of a block dropped at a time; gains of which more than "
            f"{SKETCH_SPOILED:g} may be missing are left out"
        )
    if making.size > 64:
        words += f", spectral norms iterated to {SKETCHED if making.sketch else NORM_TOLERANCE:.0e}"
    if making.dtype == torch.float32:
        words += ", products in float32"
    if predicted is not None and (making.sketch or making.stride > 1):
        words += f": the exact map of every step would take about {seconds_words(predicted)} s"
    return words


def every_step(stride: int) -> str:
    """Every how many steps, in words."""
    return "every step" if stride == 1 else f"every {ordinal(stride)} step"


def seconds_words(seconds: float) -> str:
    """Seconds to two digits, rounded up."""
    digits = max(0, len(str(int(seconds))) - 2)
    return f"{round(math.ceil(seconds), -digits)}"


def ordinal(number: int) -> str:
    """A number with its English ending.

    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
