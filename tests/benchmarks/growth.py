"""How recording and mapping grow with T, H and B: fitted powers beside the theoretical ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from seam import log_gains, operator_of

from benchmarks.gain_maps import track_of
from benchmarks.recorded_steps import Case, Step
from benchmarks.rows import Row
from benchmarks.timing import exponent, seconds

Make = Callable[[int], Callable[[], object]]


def record_with(**fixed: int) -> Callable[[str], Make]:
    """Recorded steps of one size after the other."""

    def along(name: str) -> Make:
        def make(size: int) -> Callable[[], object]:
            return Step(replace(Case(), **fixed, **{name: size})).recorded

        return make

    return along


def map_of_steps(steps: int) -> Callable[[], object]:
    """The exact rms map of an LSTM with 64 units."""
    operator = operator_of(track_of(64, steps), sequences=[0])
    return lambda: log_gains(operator, range(steps), ("rms",))


def map_of_units(hidden: int) -> Callable[[], object]:
    """The exact rms map over 24 steps."""
    operator = operator_of(track_of(hidden, 24), sequences=[0])
    return lambda: log_gains(operator, range(24), ("rms",))


def map_of_sequences(batch: int) -> Callable[[], object]:
    """The exact rms map of several sequences, 32 units, 50 steps."""
    operator = operator_of(track_of(32, 50, batch), sequences=list(range(batch)))
    return lambda: log_gains(operator, range(50), ("rms",))


SERIES: list[tuple[str, str, Make, list[int], str]] = [
    ("recorded step", "T", record_with()("steps"), [100, 200, 400, 800], "1"),
    ("recorded step", "H", record_with()("hidden"), [128, 256, 512], "1 to 2"),
    ("recorded step", "B", record_with()("batch"), [16, 32, 64, 128], "1"),
    ("exact map", "T", map_of_steps, [50, 100, 200], "2"),
    ("exact map", "S", map_of_units, [48, 96, 192], "3"),
    ("exact map", "B", map_of_sequences, [2, 4, 8], "1"),
]


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Median seconds at every size, and the power fitted through them."""
    for what, letter, make, sizes, theory in SERIES:
        chosen = [2, 4] if quick else sizes
        works = [make(size) for size in chosen]
        for work in works:
            work()
        times = [[seconds(work) for work in works] for _ in range(2 if quick else 5)]
        medians = np.median(times, axis=0)
        shown = [2 * s for s in chosen] if letter == "S" else chosen
        note = f"in theory {theory}; " + ", ".join(
            f"{letter} = {size}: {value:.3g} s" for size, value in zip(shown, medians, strict=True)
        )
        case = {"sizes": shown, "seconds": [float(m) for m in medians], "along": letter}
        power = exponent(shown, medians)
        yield Row("growth", f"{what}, with {letter}", power, "power", case, note=note)
