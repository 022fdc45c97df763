"""What linear recurrences cost: recording against the plain step, and the map of every pair of steps."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from functools import partial

import torch
from seam import logs_of
from torch import Tensor, nn

import gradflow
from benchmarks.rows import Row, ratio_row
from benchmarks.timing import in_pairs, seconds
from gradflow.cells.linear import LinearSteps


class MinGRU(nn.Module):
    """A loop over h_t = (1 − z_t) h_{t−1} + z_t n_t, its states marked at once."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.z, self.n, self.out = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.z(x).sigmoid()
        written, h, states = z * self.n(x), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = (1 - z[:, t]) * h + written[:, t]
            states.append(h)
        return self.out(gradflow.scan(torch.stack(states, 1), decay=1 - z))


def recording(*, quick: bool) -> Iterator[Row]:
    """A recorded step, with totals at every step, against the same step without."""
    hidden, steps, batch = (4, 6, 2) if quick else (256, 256, 16)
    model, x = MinGRU(hidden), torch.randn(batch, steps, hidden)

    def plain() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    def recorded() -> None:
        model.zero_grad()
        with gradflow.record(model) as found:
            model(x).square().mean().backward()
        _ = found["scan"].grad_h

    ratio = in_pairs(recorded, plain, pairs=3 if quick else 9)
    case = {"H": hidden, "T": steps, "B": batch}
    yield ratio_row(
        "linear", "a marked scan recorded, against the plain step", ratio, case, most=1.5
    )


def mamba(steps: int, channels: int, inner: int) -> LinearSteps:
    """Decays exp(−Δ_t n) of one sequence, Δ about its initial values."""
    torch.manual_seed(0)
    base = 0.001 * 100 ** torch.rand(channels, 1)
    noise = 0.5 * torch.randn(steps, 1, channels, 1)
    delta = nn.functional.softplus(noise + torch.log(torch.expm1(base)))
    decay = torch.exp(-delta * torch.arange(1.0, inner + 1))
    return LinearSteps(shape=(channels, inner), decay=decay)


def maps(*, quick: bool) -> Iterator[Row]:
    """The largest gain of every pair of an elementwise recurrence, and of strided sources."""
    channels, inner = (6, 4) if quick else (1536, 16)
    steps = 12 if quick else 2048
    made = mamba(steps, channels, inner)
    every = torch.arange(steps)
    taken = seconds(partial(_largest, made, every))
    case = {"channels": channels, "N": inner, "T": steps}
    what = "all pairs of an elementwise recurrence, largest gain"
    unit = 2**20 if sys.platform != "darwin" else 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    yield Row(
        "linear", what, taken, "s", case, most=5.0, note=f"peak {peak:.1f} GiB of the process"
    )
    logs = logs_of(made)
    taken = seconds(partial(logs.sums, every, dtype=torch.float32))
    yield Row("linear", "the same, mean gain (sums in float32)", taken, "s", case)
    del logs, made
    steps, channels = (40, 4) if quick else (100_000, 64)
    long = mamba(steps, channels, 1)
    sources = torch.arange(0, steps, max(1, steps // 64))
    taken = seconds(partial(_strided, long, sources))
    case = {"channels": channels, "N": 1, "T": steps, "sources": len(sources)}
    yield Row("linear", "strided sources of a long sequence", taken, "s", case, most=10.0)


def _largest(steps: LinearSteps, sources: Tensor) -> None:
    logs_of(steps).maxima(sources)


def _strided(steps: LinearSteps, sources: Tensor) -> None:
    logs = logs_of(steps)
    logs.maxima(sources)
    logs.sums(sources)


def measure(*, quick: bool) -> Iterator[Row]:
    """Both."""
    yield from recording(quick=quick)
    yield from maps(quick=quick)
