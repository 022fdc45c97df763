"""What `analyze` was asked for, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from gradflow.analyzer.rates import Vote
from gradflow.errors import InputError, must_be
from gradflow.recording.tracks import Recording

Progress = Callable[[str, float], None]  # a phase in words, and the share done


@dataclass(frozen=True)
class Settings:
    """What `analyze` was asked for, checked."""

    span: int | None
    sequences: tuple[int, ...] | None
    maps: int
    method: str
    stride: int | None
    seed: int
    layers: int  # how many share the budgets
    progress: Progress
    brief: bool = False  # the numbers of a verdict alone are wanted: nothing that is only shown
    # layer -> votes of all batches, of which this recording is one; none where there is one batch
    batches: Mapping[str, tuple[Vote, ...]] = field(default_factory=dict)
    executor: Executor | None = None  # that makes the mapped sequences of a layer side by side
    probed: bool = False  # the batch is a probe, and its loss not the user's


def checked(
    recording: Recording,
    span: int | None = None,
    sequences: Sequence[int] | None = None,
    maps: int = 1,
    method: str = "auto",
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Settings:
    """The arguments of `analyze`, each refused in a sentence where it is out of its range."""
    if span is not None:
        _whole("span", span, 1, "leave it out for the median length")
    _whole("maps", maps, 1, "leave it out for one map")
    if stride is not None:
        _whole("stride", stride, 1, "leave it out to let the predicted cost choose")
    _whole("seed", seed, 0, "leave it out for 0")
    if method not in ("auto", "exact"):
        raise InputError(must_be("method", "auto or exact", repr(method), "leave it out for auto"))
    batch = min(track.batch for track in recording.values())
    chosen: tuple[int, ...] | None = None
    if sequences is not None:
        if isinstance(sequences, str) or not isinstance(sequences, Iterable):
            raise InputError(
                must_be("sequences", "a list of indices", repr(sequences), "write it as [0]")
            )
        chosen = tuple(dict.fromkeys(sequences))
        if not chosen:
            raise InputError(
                must_be("sequences", "at least one index", "none", "leave it out for all of them")
            )
        for index in chosen:
            _whole("every index in sequences", index, 0, f"this recording has {batch} sequences")
            if index >= batch:
                raise InputError(
                    must_be(
                        "every index in sequences",
                        f"below {batch}, the number of sequences",
                        index,
                        "count sequences from 0",
                    )
                )
    return Settings(
        span,
        None if chosen is None else tuple(int(index) for index in chosen),
        maps,
        method,
        stride,
        seed,
        len(recording),
        progress or (lambda phase, share: None),
        probed="probe" in recording.provenance,
    )


def _whole(name: str, value: object, least: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(must_be(name, f"a whole number of at least {least}", repr(value), advice))
