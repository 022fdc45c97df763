"""What gain maps cost: against the peak of a matrix product, and against what torch offers.

An exact all-pairs map of T steps pushes T(T−1)/2 blocks of S × S through one step each: 2 S³
operations a block. Its speed is held against a plain matrix product of the same dtype in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from seam import log_gains, operator_of
from torch import Tensor, nn
from torch.func import jacrev, vmap

import gradflow
from benchmarks.rows import Row, ratio_row
from benchmarks.timing import in_pairs, seconds
from gradflow.recording import Track


def track_of(hidden: int, steps: int, batch: int = 1) -> Track:
    """A default LSTM on noise, recorded: S = 2 H."""
    torch.manual_seed(0)
    model = nn.LSTM(8, hidden)
    with gradflow.record(model) as recording:
        model(torch.randn(steps, batch, 8))[0][-1].sum().backward()
    return recording["l0"]


def peak(size: int, dtype: torch.dtype) -> Callable[[], object]:
    """A matrix product of 2 · 4 S · S · S operations, as a map's sweep makes them."""
    rows, step = torch.randn(4 * size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    out = torch.empty_like(rows)
    return lambda: torch.mm(rows, step, out=out)


def speeds(*, quick: bool) -> Iterator[Row]:
    """Share of the peak that exact maps reach, rms alone and with spectral norms."""
    shapes = [(8, 6)] if quick else [(128, 80), (256, 40)]
    for hidden, steps in shapes:
        track = track_of(hidden, steps)
        size = 2 * hidden
        operations = steps * (steps - 1) / 2 * 2.0 * size**3
        operator = operator_of(track, torch.float64, [0])
        product = peak(size, torch.float64)
        for norms, least in ((("rms",), 60.0), (("spectral", "rms"), 40.0)):
            name = " and ".join(norms)
            times, peaks = [], []
            for _ in range(2 if quick else 3):
                peaks.append(min(seconds(product) for _ in range(20)))
                times.append(seconds(partial(log_gains, operator, range(steps), norms)))
                peaks.append(min(seconds(product) for _ in range(20)))
            fastest = 2.0 * 4 * size**3 / np.median(peaks)
            share = 100 * operations / np.median(times) / fastest
            note = f"{np.median(times):.3g} s; peak {fastest / 1e9:.0f} GFLOP/s"
            case = {"S": size, "T": steps, "norms": name}
            what = f"exact map, {name}, share of the matrix-product peak"
            yield Row("gain maps", what, float(share), "%", case, least=least, note=note)


def against_functional(*, quick: bool) -> Iterator[Row]:
    """One pair by `torch.autograd.functional.jacobian`, times all pairs, against the whole map."""
    hidden, steps = (4, 6) if quick else (32, 100)
    torch.manual_seed(0)
    cell = nn.LSTMCell(8, hidden).double()
    data = torch.randn(steps, 8, dtype=torch.float64)
    chosen = [(0, steps - 1), (steps // 2, steps - 1), (steps // 4, steps // 2)]

    def pair(source: int, target: int) -> None:
        def run(state: Tensor) -> Tensor:
            h, c = state[None].chunk(2, 1)
            for t in range(source + 1, target + 1):
                h, c = cell(data[t, None], (h, c))
            return torch.cat([h, c], 1)[0]

        torch.autograd.functional.jacobian(run, torch.zeros(2 * hidden, dtype=torch.float64))

    track = track_of(hidden, steps)
    operator = operator_of(track, torch.float64, [0])
    whole = lambda: log_gains(operator, range(steps), ("rms",))  # noqa: E731
    whole()
    each = np.mean([np.median([seconds(lambda p=p: pair(*p)) for _ in range(3)]) for p in chosen])
    pairs = steps * (steps - 1) / 2
    ratio = each * pairs / np.median([seconds(whole) for _ in range(5)])
    note = f"{each:.3g} s a pair, {pairs:.0f} pairs; one pair measured at three distances"
    case = {"S": 2 * hidden, "T": steps}
    what = "functional.jacobian of every pair, against the exact map"
    yield Row(
        "gain maps", what, float(ratio), "×", case, least=None if quick else 1000.0, note=note
    )


def against_vmap(*, quick: bool) -> Iterator[Row]:
    """`vmap(jacrev)` for all step Jacobians, then cumulative products, against the whole map."""
    hidden, steps = (4, 6) if quick else (64, 100)
    torch.manual_seed(0)
    cell = nn.LSTMCell(8, hidden).double()
    weights = [w.detach() for w in cell.parameters()]
    data = torch.randn(steps, 8, dtype=torch.float64)
    states = torch.randn(steps, 2 * hidden, dtype=torch.float64)

    def step(state: Tensor, x: Tensor) -> Tensor:  # vmap cannot enter the fused cell
        h, c = state.chunk(2)
        gates = weights[0] @ x + weights[2] + weights[1] @ h + weights[3]
        i, f, g, o = gates.chunk(4)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.cat([o.sigmoid() * new.tanh(), new])

    def theirs() -> Tensor:
        jacobians = vmap(jacrev(step))(states, data)
        gains = torch.full((steps, steps), torch.nan, dtype=torch.float64)
        for t in range(steps - 1):
            product = jacobians[t + 1]
            gains[t, t + 1] = torch.linalg.matrix_norm(product)
            for later in range(t + 2, steps):
                product = jacobians[later] @ product
                gains[t, later] = torch.linalg.matrix_norm(product)
        return gains

    operator = operator_of(track_of(hidden, steps), torch.float64, [0])
    ratio = in_pairs(
        theirs, lambda: log_gains(operator, range(steps), ("rms",)), pairs=2 if quick else 5
    )
    what = "vmap(jacrev) and cumulative products, against the exact map"
    yield ratio_row("gain maps", what, ratio, {"S": 2 * hidden, "T": steps})


def in_float32(*, quick: bool) -> Iterator[Row]:
    """What an analysis of a wide state saves by products in float32, and the median error of its gains."""
    hidden, steps = (8, 8) if quick else (128, 128)
    track = track_of(hidden, steps)
    exact, rough = (operator_of(track, kind, [0]) for kind in (torch.float64, torch.float32))
    found: dict[bool, dict[str, Tensor]] = {}

    def make(of_float32: bool) -> None:
        found[of_float32] = log_gains(rough if of_float32 else exact, range(0, steps, 4))

    ratio = in_pairs(lambda: make(False), lambda: make(True), pairs=2, warm_up=quick)
    case = {"S": 2 * hidden, "T": steps}
    yield ratio_row("gain maps", "map in float64 against float32", ratio, case)
    for norm, true in found[False].items():
        known = torch.isfinite(true) & (true != 0)
        error = (found[True][norm][known] - true[known]).exp().sub(1).abs()
        what = f"map in float32, {norm}: median error in gain"
        yield Row("gain maps", what, 100 * float(error.median()), "%", case, most=0.1)


def measure(*, quick: bool = False) -> Iterator[Row]:
    """All of the above."""
    for part in (speeds, against_functional, against_vmap, in_float32):
        yield from part(quick=quick)
