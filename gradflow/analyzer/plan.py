"""Which method and which sources: the gain map that fits a budget, and what was chosen in words.

Letters: S the state's width, L a sequence's steps. Costs are predicted from operation counts
and never measured by a clock, so that the same input always gives the same map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analyzer.blocks import SPEED
from gradflow.analyzer.direction import log_cell_path, loss_map
from gradflow.analyzer.jacobians import HostOperator, operator_of, state_size
from gradflow.analyzer.products import NORMS, log_gains, spectral_work
from gradflow.analyzer.spread import each
from gradflow.limits import EXACT_ROWS, MAP_BYTES, NORM_TOLERANCE, ROUGH_WIDE, SEED
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
    method: str  # "exact", "products" of a wide state, or "none"
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

    Method "auto" makes the map with the most sources that is predicted to take no longer than `seconds`
    and to fit 256 MiB, of wide states in float32 where float64 is too dear; "exact" makes all in
    float64. The direction of the loss is left out, NaN, where it is withheld. Of fewer norms than
    all nothing else is made.
    """
    auto = method == "auto" and stride is None
    size = state_size(track)
    whole = sum(exact_seconds(size, int(track.lengths[b])) for b in sequences)
    wide = method == "auto" and size > ROUGH_WIDE and whole > seconds
    dtype = torch.float32 if wide else torch.float64
    making = _Making(track, sequences, dtype, seed=seed, executor=executor, norms=norms)
    making.add(making.fitting(seconds) if auto else stride or 1, progress)
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
        method="exact",
        stride=making.stride,
        dtype=making.dtype,
        words=_words(making, every, whole if auto else None),
    )


def exact_seconds(
    size: int, length: int, stride: int = 1, dtype: torch.dtype = torch.float64
) -> float:
    """Predicted seconds of an exact map with every stride-th step a source."""
    pairs = length * (length - 1) / 2 / stride
    # of small matrices, which are no faster in float32
    spectral = spectral_work(size, size) / SPEED[torch.float64]
    return pairs * (2.0 * size**3 / SPEED[dtype] + spectral) + length * 5e-4


class _Making:
    """A map under way."""

    def __init__(
        self,
        track: Track,
        sequences: Sequence[int],
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = SEED,
        executor: Executor | None = None,
        norms: Sequence[str] = tuple(NORMS),
    ) -> None:
        self.name, self.executor = track.name, executor
        self.steps, self.seed, self.dtype = track.steps, seed, dtype
        self.operators = [operator_of(track, self.dtype, [b]) for b in sequences]
        widths = [int(state.shape[-1]) for state in track.states.values()]
        self.norms = tuple(norms)
        self.whole = len(self.norms) == len(NORMS)
        self.blocks = len(widths) ** 2 if len(widths) > 1 else 0
        self.size, self.widths = sum(widths), tuple(widths) if self.blocks and self.whole else ()
        self.stride = 1
        self.gains: dict[str, np.ndarray] = {}  # norm -> (..., sequence, source, target)

    def least_stride(self) -> int:
        """The least power of two at which the maps fit the memory."""
        planes = len(NORMS) + self.blocks + 2  # and the loss direction, the cell path
        row = 8.0 * planes * len(self.operators) * self.steps
        stride = 1
        while row * math.ceil(self.steps / stride) > MAP_BYTES and stride < self.steps:
            stride *= 2
        return stride

    def seconds(self, stride: int) -> float:
        """Predicted seconds of the map of all sequences."""
        lengths = [operator.length for operator in self.operators]
        return sum(exact_seconds(self.size, n, stride, self.dtype) for n in lengths)

    def fitting(self, seconds: float) -> int:
        """The least stride with which the map fits time and memory."""
        stride = self.least_stride()
        while stride < self.steps and self.seconds(stride) > seconds:
            stride *= 2
        return stride

    def add(self, stride: int, progress: Progress) -> None:
        """Make the maps of every stride-th source."""
        self.stride, places = stride, np.arange(0, self.steps, stride)
        shape = (len(self.operators), len(places), self.steps)
        self.gains = {norm: np.full(shape, np.nan) for norm in self.norms}
        if self.widths:
            self.gains["blocks"] = np.full((self.blocks, *shape), np.nan)
        inside = [places[places < operator.length].tolist() for operator in self.operators]
        parts = (
            (operator, some, self.norms, self.widths, self.seed)
            for operator, some in zip(self.operators, inside, strict=True)
        )
        for number, made in enumerate(each(self.executor, self.name, _of_sequence, parts)):
            for name, values in made.items():
                length = self.operators[number].length
                self.gains[name][..., number, : len(inside[number]), :length] = values
            progress((number + 1) / len(inside))


def _of_sequence(
    operator: HostOperator,
    sources: list[int],
    norms: tuple[str, ...],
    widths: tuple[int, ...],
    seed: int,
) -> dict[str, np.ndarray]:
    """The gains of one sequence."""
    gains = log_gains(operator, sources, norms, widths=widths, seed=seed)
    return {name: values.squeeze(-3).numpy() for name, values in gains.items()}


def _words(making: _Making, every: int, predicted: float | None) -> str:
    words = f"exact, {every_step(making.stride)} a source"
    if every > 1:
        words += f", {every_step(every)} a target of the loss direction"
    if making.size > EXACT_ROWS:
        words += f", spectral norms iterated to {NORM_TOLERANCE:.0e}"
    if making.dtype == torch.float32:
        words += ", products in float32"
    if predicted is not None and (making.stride > 1 or making.dtype == torch.float32):
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
