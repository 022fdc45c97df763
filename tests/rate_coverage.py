"""How often the 95 % interval of a rate holds the long-run exponent, by simulation.

    python tests/rate_coverage.py          # half an hour on one core; prints the table
    python tests/rate_coverage.py tanh     # one kind of network

Letters: T steps, B sequences of a batch. Every network is drawn anew, and every batch of it starts from
zero states under new inputs, as a recording does. Known is the exponent of linear networks, by their
eigenvalues; that of the others is the mean of 32 sequences of 3000 steps. A rate that is labelled
"not settled" is no rate: it is counted apart. The functions are those that `analyze` calls.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from seam import (
    DenseOperator,
    Growth,
    Leading,
    Norms,
    SpanGains,
    constant_exponents,
    enough,
    log_growth,
    log_norms,
    mean_steps,
    operator_of,
    parted,
    settled,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import gradflow
from gradflow.analysis import Rate
from gradflow.analyzer import keeping
from gradflow.recording import Operator

STEPS = (20, 40, 60, 100, 300)
BATCHES = (1, 4, 32)
LONG, MANY = (
    3000,
    32,
)  # steps and sequences of the long run; with 8 its own error shows at 300 steps
ROUNDING = 1e-6  # nats per step, of eigenvalues of a matrix that is far from normal
F64 = torch.float64


# ----------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class System:
    """One network: step Jacobians of any number of sequences, and its exponent where that is known."""

    run: Callable[[int, Tensor], Operator]  # steps, lengths (B,) -> A_t
    exponent: float | None = None


def linear(normal: bool) -> System:
    """A_t = exp(0.2 ε_t) W with W nearly normal, or triangular with large entries above."""
    size = 12
    turn = torch.linalg.qr(torch.randn(size, size, dtype=F64))[0]
    moduli = torch.empty(size, dtype=F64).uniform_(0.5, 0.98)
    above = torch.randn(size, size, dtype=F64).triu(1) * (0.02 if normal else 0.4)
    weight = turn @ (moduli.diag() + above) @ turn.T

    def run(steps: int, lengths: Tensor) -> Operator:
        noise = 0.2 * torch.randn(steps, len(lengths), 1, 1, dtype=F64)
        return DenseOperator(noise.exp() * weight)

    return System(run, math.log(float(moduli.max())))


def constant(normal: bool) -> System:
    """The same without noise: one step Jacobian for all."""
    made = linear(normal)
    one = made.run(1, torch.ones(1))
    assert isinstance(one, DenseOperator)
    step = one.jacobians[0, 0]
    step = step * math.exp(made.exponent or 0.0) / torch.linalg.eigvals(step).abs().max()
    return System(lambda steps, lengths: DenseOperator(step.expand(steps, len(lengths), -1, -1)),
                  made.exponent)  # fmt: skip


def recorded(module: nn.Module) -> System:
    """A network of PyTorch under N(0, 1) noise."""

    def run(steps: int, lengths: Tensor) -> Operator:
        x = torch.randn(steps, len(lengths), 3, dtype=F64)
        with gradflow.record(module) as recording:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            module(packed)
        return operator_of(recording["l0"], F64)

    return System(run)


def uniform(low: float, high: float) -> float:
    """Drawn by torch's seed, as everything here is."""
    return float(torch.empty(()).uniform_(low, high))


def tanh() -> System:
    """From fading to the edge of chaos."""
    module = nn.RNN(3, 16, dtype=F64)
    module.weight_hh_l0.data *= uniform(1.0, 3.0)
    module.weight_ih_l0.data *= 0.5
    return recorded(module)


def lstm() -> System:
    """Forget biases spread as by chrono initialisation."""
    module = nn.LSTM(3, 8, dtype=F64)
    module.bias_ih_l0.data[8:16] += torch.empty(8).uniform_(1, 60).log()
    module.weight_hh_l0.data *= uniform(0.5, 2.0)
    return recorded(module)


def gru() -> System:
    """Update gates that mostly keep."""
    module = nn.GRU(3, 12, dtype=F64)
    module.bias_ih_l0.data[12:24] += uniform(1.0, 4.0)
    return recorded(module)


def lstm_of_bias_one() -> System:
    """Forget biases of 1, as is usual, on torch's own weights."""
    module = nn.LSTM(3, 8, dtype=F64)
    module.bias_ih_l0.data[8:16] += 1.0
    return recorded(module)


KINDS: dict[str, Callable[[], System]] = {
    "linear, constant": lambda: constant(True),
    "linear, constant, far from normal": lambda: constant(False),
    "linear, driven": lambda: linear(True),
    "linear, driven, far from normal": lambda: linear(False),
    "tanh": tanh,
    "LSTM, spread time scales": lstm,
    "GRU, slow gates": gru,
    "LSTM, forget bias 1": lstm_of_bias_one,
}


# ------------------------------------------------------------------------------------- the intervals


def long_run(system: System) -> float:
    """The exponent, known or from a long run."""
    if system.exponent is not None:
        return system.exponent
    operator = system.run(LONG, torch.full((MANY,), LONG))
    return float(log_growth(operator, torch.full((MANY,), LONG), 1).exponents.mean())


def intervals(
    system: System, steps: int, batch: int, batches: int, *, uneven: bool = False
) -> list[Rate | None]:
    """The interval of every batch as `analyze` gives it; None where it gives no rate."""
    count = batch * batches
    lengths = torch.full((count,), steps)
    if uneven:
        lengths = torch.randint(steps // 3, steps + 1, (count,))
        lengths[::batch] = steps
    operator = system.run(steps, lengths)
    cuts = torch.zeros(steps, count, dtype=torch.bool)
    cuts[0] = True
    counted = keeping.counted_steps(lengths, cuts)
    windows = parted(counted, 0)
    norms = log_norms(operator, windows)
    leading = keeping.leading_of(windows, norms, count, 0)
    growth = log_growth(operator, lengths, 1, cuts=cuts, leading=leading)
    exponents = constant_exponents(operator, counted)
    seen = mean_steps(operator, counted)
    owner = np.array([window.sequence for window in windows])
    found = []
    for first in range(0, count, batch):
        mine = slice(first, first + batch)
        places = np.flatnonzero((owner >= first) & (owner < first + batch))
        own = [replace(windows[n], sequence=owner[n] - first) for n in places]
        part = Norms(norms.spectral[places], norms.frobenius[places], norms.leading[places], 0.0)
        rated = settled(own, part, batch, 0)
        led = Leading(leading.rows[mine], leading.at[mine])
        gains = SpanGains(np.zeros(0), np.zeros(0), 0)  # no rate needs them
        kept = keeping.Keeping(gains, rated.rates, rated.common, led, exponents, seen=seen[:, mine])
        grown = Growth(growth.log_growth[:, mine], growth.counted[:, mine])
        span = max(1, round(float(np.median(lengths[mine]))))
        found.append(_interval(kept, grown, span))
    return found


def _interval(kept: keeping.Keeping, growth: Growth, span: int) -> Rate | None:
    rates = kept.rates_with(growth)
    common = kept.unsettled(growth, np.flatnonzero(np.isfinite(rates)))
    rate = keeping.interval_of_rates(rates, common, kept.constant is not None, growth)
    told = enough(common, rate.value, span) and math.isfinite(rate.low)
    return rate if told else None


@dataclass(frozen=True)
class Row:
    """One kind of network and number of steps."""

    kind: str
    steps: int
    uneven: bool
    share: dict[int, float]  # B -> share of the given intervals that hold the exponent
    given: dict[int, float]  # B -> share of batches that are given an interval
    off: dict[int, float]  # B -> mean of (value − exponent)/half the interval


def drawn(kind: str, networks: int) -> list[tuple[System, float]]:
    """So many networks of a kind, with their exponents."""
    torch.manual_seed(list(KINDS).index(kind))
    systems = [KINDS[kind]() for _ in range(networks)]
    return [(system, long_run(system)) for system in systems]


def row(
    kind: str, known: list[tuple[System, float]], steps: int, batches: int, *, uneven: bool = False
) -> Row:
    """So many batches of each network, counted."""
    share: dict[int, float] = {}
    given: dict[int, float] = {}
    off: dict[int, float] = {}
    torch.manual_seed(steps)
    for batch in BATCHES:
        held, told, number, away = 0, 0, 0, 0.0
        for system, truth in known:
            for rate in intervals(system, steps, batch, batches, uneven=uneven):
                number += 1
                if rate is None:
                    continue
                told += 1
                held += rate.low - ROUNDING <= truth <= rate.high + ROUNDING
                away += (rate.value - truth) / max((rate.high - rate.low) / 2, ROUNDING)
        share[batch] = held / told if told else math.nan
        given[batch] = told / number
        off[batch] = away / told if told else math.nan
    return Row(kind, steps, uneven, share, given, off)


def rows(kinds: list[str], networks: int = 12, batches: int = 6) -> Iterator[Row]:
    """Of every kind and number of steps; uneven lengths at 60 steps."""
    for kind in kinds:
        known = drawn(kind, networks)
        for steps in STEPS:
            yield row(kind, known, steps, batches)
        yield row(kind, known, 60, batches, uneven=True)


def line(found: Row) -> str:
    """A row of the table: coverage, and in brackets how many are given an interval."""
    steps = f"{found.steps}, uneven" if found.uneven else str(found.steps)
    cells = [
        "–"
        if math.isnan(found.share[b])
        else f"{100 * found.share[b]:.0f} ({100 * found.given[b]:.0f})"
        for b in BATCHES
    ]
    return f"| {found.kind} | {steps} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = [kind for kind in KINDS if not sys.argv[1:] or kind.startswith(sys.argv[1])]
    for found in rows(chosen):
        print(line(found), {b: round(v, 2) for b, v in found.off.items()}, flush=True)
