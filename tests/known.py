"""What the page of validation figures shows: known numbers, and the same as gradflow measures them.

Letters: T steps, B sequences. Seeds are fixed and were not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import systems
import torch
from scipy import signal
from seam import log_growth, operator_of, rate_of_one, rate_over_sequences
from torch import Tensor, nn

import gradflow
from gradflow.analysis import LayerAnalysis, Rate
from gradflow.analyzer import lyapunov_spectrum

F64 = torch.float64


# ----------------------------------------------------------------------------------- exponents


@dataclass(frozen=True)
class Row:
    """One exponent: what is known, what was measured."""

    group: str
    name: str
    known: float
    rate: Rate
    within: float = 0.0  # how far a limit of large networks may be off at this size
    source: str = "closed form"

    @property
    def holds(self) -> bool:
        """Whether the interval meets the known value; a point must equal it to rounding."""
        room = self.within + 1e-6
        return self.rate.low - room <= self.known <= self.rate.high + room


def literature() -> Iterator[Row]:
    """Sixteen orbits of each system."""
    for system in systems.SYSTEMS:
        found = lyapunov_spectrum(system.jacobians(system.steps, 16)).numpy() / system.time
        group = "systems from the literature"
        for j, known in enumerate(system.known):
            name = system.name if j == 0 else ""
            if system.time < 1 and j == 0:
                name += ", per unit of time"
            rate = rate_over_sequences(found[:, j])
            yield Row(group, name, known, rate, source=system.source)


def sigmoid_loop(w: float) -> nn.Module:
    """h' = σ(w h − w/2), a loop written by hand."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(w, dtype=F64))

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            h = torch.full_like(x[0], 0.5) + 0 * self.w
            for _ in x:
                h = gradflow.tap(h=torch.sigmoid(self.w * h - self.w / 2))
            return h, None

    return Loop()


def without_recurrence(module: nn.RNNBase, gate: int, bias: float) -> nn.RNNBase:
    """All weights zero but the bias of one gate: the state decays by σ(bias) at every step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[gate * module.hidden_size : (gate + 1) * module.hidden_size] = bias
    return module


def linear(weight: float) -> nn.RNNBase:
    """One unit at zero input, where tanh is linear."""
    module = nn.RNN(1, 1, bias=False, dtype=F64)
    nn.init.constant_(module.weight_hh_l0, weight)
    return module


def chaotic(gain: float, size: int = 400) -> nn.RNNBase:
    """h' = tanh(g J h), J with variance 1/N."""
    module = nn.RNN(1, size, bias=False, dtype=F64)
    nn.init.normal_(module.weight_hh_l0, std=gain / math.sqrt(size))
    return module


def observe(module: nn.Module, steps: int, start: bool = False) -> gradflow.Recording:
    """Zero input, two sequences, from zero or random states."""
    x = torch.zeros(steps, 2, 1, dtype=next(module.parameters()).dtype)
    h0 = 0.5 * torch.randn(1, 2, module.hidden_size, dtype=F64) if start else None
    with gradflow.record(module) as recording:
        (module(x, h0) if start else module(x))[0].sum().backward()
    return recording


def rate_of_network(module: nn.Module, steps: int, start: bool = False) -> Rate:
    """The largest exponent of its only layer."""
    track = next(iter(observe(module, steps, start).values()))
    cuts = torch.zeros(steps, 2, dtype=torch.bool)
    cuts[0] = not track.initial
    growth = log_growth(operator_of(track), track.lengths, 1, cuts=cuts)
    return rate_over_sequences(growth.exponents[:, 0].numpy())


def networks() -> Iterator[Row]:
    """Recorded by gradflow; where the known value is a limit, six networks are drawn."""
    group = "networks in PyTorch"
    log2 = math.log(2)
    exact: list[tuple[str, float, nn.Module]] = [
        ("linear RNN, w = 0.9", math.log(0.9), linear(0.9)),
        ("h' = σ(2h − 1) (tapped loop)", -log2, sigmoid_loop(2.0)),
        ("h' = σ(8h − 4), at h = ½", log2, sigmoid_loop(8.0)),
        ("LSTM, W = 0, forget bias 1", -math.log1p(math.exp(-1)),
         without_recurrence(nn.LSTM(1, 4, dtype=F64), 1, 1.0)),
        ("GRU, W = 0, update bias 1", -math.log1p(math.exp(-1)),
         without_recurrence(nn.GRU(1, 4, dtype=F64), 1, 1.0)),
    ]  # fmt: skip
    for name, known, module in exact:
        yield Row(group, name, known, rate_of_network(module, 100))
    gated = math.log(0.5 + 0.25 / math.sqrt(3))
    limits: list[tuple[str, float, Callable[[], nn.Module], float]] = [
        (
            "RNN as PyTorch initialises it, H = 256",
            -0.5 * math.log(3),
            lambda: nn.RNN(1, 256),
            0.06,
        ),
        ("LSTM, likewise", gated, lambda: nn.LSTM(1, 256), 0.06),
        ("GRU, likewise", gated, lambda: nn.GRU(1, 256), 0.06),
        ("tanh network, N = 400, g = 1.5", 0.065, lambda: chaotic(1.5), 0.03),
        ("g = 2", 0.155, lambda: chaotic(2.0), 0.03),
        ("g = 3", 0.310, lambda: chaotic(3.0), 0.03),
    ]
    for name, known, make, within in limits:
        wild = within == 0.03
        drawn = [make().double() for _ in range(6)]
        found = [rate_of_network(one, 250 if wild else 60, wild).value for one in drawn]
        yield Row(
            group, name, known, rate_over_sequences(np.array(found)), within, "limit of large N"
        )


# ------------------------------------------------------------------------------------ coverage

COUNTS = (2, 3, 4, 8, 32)
REPEATS = 3000
KINDS = {"independent": 0.0, "AR(0.8)": 0.8, "drifting mean": 0.0}


def increments(kind: str, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """ln growth of each step, mean −0.05 over the sequence."""
    rho = KINDS[kind]
    noise = random.normal(0, 0.5 * math.sqrt(1 - rho**2), (shape[0], shape[1] + 100))
    walk = signal.lfilter([1], [1, -rho], noise, axis=1)[:, 100:] - 0.05
    if kind == "drifting mean":
        walk += np.linspace(-0.2, 0.2, shape[1])
    return walk


def covered(rates: list[Rate]) -> float:
    return float(np.mean([rate.low <= -0.05 <= rate.high for rate in rates]))


def coverage(repeats: int = REPEATS, steps: int = 100) -> dict[str, list[float]]:
    """Share of intervals that hold the truth, for each kind of increments and number of sequences."""
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        found[kind] = []
        for count in COUNTS:
            means = increments(kind, (repeats * count, steps), random).mean(1)
            rates = [rate_over_sequences(row) for row in means.reshape(repeats, count)]
            found[kind].append(covered(rates))
    return found


def coverage_of_one() -> float:
    """One sequence of 800 steps, AR(0.5): batch means, where they are given at all."""
    noise = np.random.default_rng(1).normal(0, 0.4, (REPEATS, 900))
    walks = signal.lfilter([1], [1, -0.5], noise, axis=1)[:, 100:] - 0.05
    rates = [rate_of_one(walk) for walk in walks]
    return covered([rate for rate in rates if not math.isnan(rate.low)])


def coverage_of_a_regression(repeats: int = REPEATS, steps: int = 100) -> float:
    """What one straight line through ln gain against the lag would claim, for contrast."""
    walks = increments("independent", (repeats, steps), np.random.default_rng(2)).cumsum(1)
    lags = np.arange(1, steps + 1) - (steps + 1) / 2
    slopes = walks @ lags / (lags @ lags)
    left = walks - walks.mean(1, keepdims=True) - slopes[:, None] * lags
    half = 1.984 * np.sqrt((left**2).sum(1) / (steps - 2) / (lags @ lags))
    return float(np.mean(np.abs(slopes + 0.05) <= half))


# --------------------------------------------------------------------------- half-life, horizon


@dataclass(frozen=True)
class Memory:
    """Half-life and horizon of one layer: known and measured."""

    name: str
    half_life: tuple[float, float]
    horizon: tuple[float, float | None]
    searched: int


def memories(steps: int = 300) -> Iterator[Memory]:
    """Decay by a known factor at every step: scalar RNNs, LSTM cells by their forget bias.

    The gain of the LSTM is √(1 + ¼) f^k: a unit of c is a unit of c and o (1 − tanh² 0) = ½ of h.
    """
    layers: list[tuple[str, float, float, nn.RNNBase]] = [
        (f"RNN, w = {w:g}", w, 1.0, linear(w))
        for w in (0.3, 0.6, 0.8, 0.9, 0.95, 0.97, 0.99, 0.997)
    ]
    for bias in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        module = without_recurrence(nn.LSTM(1, 1, dtype=F64), 1, bias)
        factor = 1 / (1 + math.exp(-bias))
        layers.append((f"LSTM, forget bias {bias:g}", factor, math.sqrt(1.25), module))
    for name, factor, level, module in layers:
        layer: LayerAnalysis = gradflow.analyze(observe(module, steps))["l0"]
        yield Memory(
            name,
            (math.log(2) / -math.log(factor), layer.half_life),
            (math.floor(math.log(1e-3 / level) / math.log(factor)) + 1, layer.horizon),
            layer.searched,
        )
