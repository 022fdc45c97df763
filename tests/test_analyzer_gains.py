"""The gain over the span against the product of dense steps, and rates against the long run.

Oracles: the product of all steps kept with a logarithm, eigenvalues of a constant step, and the same
network over many more steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from seam import DenseOperator, SpanGains, Window, collected, common_steps, log_norms, span_windows
from seam import gains_crossing as crossing
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.analysis import LayerAnalysis
from gradflow.analyzer import lyapunov_spectrum, step_jacobians

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def log_norm(steps: Tensor) -> float:
    """ln ‖A_n … A_1‖₂ of steps (n, S, S)."""
    product, scale = torch.eye(steps.shape[1], dtype=F64), 0.0
    for step in steps:
        product = step @ product
        peak = float(product.abs().max())
        if peak == 0:
            return -math.inf
        product, scale = product / peak, scale + math.log(peak)
    return math.log(float(torch.linalg.matrix_norm(product, 2))) + scale


def span_gains(
    steps: Tensor, lengths: list[int], span: int, cuts: Tensor | None = None
) -> SpanGains:
    """ln of the largest gain over the span of every sequence of steps (T, B, S, S)."""
    crossed = crossing(len(steps), torch.tensor(lengths), cuts)
    over = common_steps(crossed, span)
    windows = span_windows(crossed, over, 2**20)
    return collected(windows, log_norms(DenseOperator(steps), windows), crossed, over)


STEPS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda size: torch.randn(30, 3, size, size, dtype=F64) / math.sqrt(size),
    "orthogonal": lambda size: torch.linalg.qr(torch.randn(30, 3, size, size, dtype=F64))[0],
    "far from normal": lambda size: (
        0.5 * torch.eye(size, dtype=F64) + 0.7 * torch.diag(torch.ones(size - 1, dtype=F64), 1)
    ).expand(30, 3, -1, -1),
    "crowded": lambda size: torch.linspace(0.9, 1, size, dtype=F64).diag().expand(30, 3, -1, -1),
    "tiny": lambda size: 1e-30 * torch.randn(30, 3, size, size, dtype=F64),
}


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("kind", STEPS)
def test_norms_of_windows_are_those_of_the_dense_product(kind: str, size: int) -> None:
    torch.manual_seed(0)
    steps = STEPS[kind](size)
    windows = [Window(b, 1, 30) for b in range(3)]
    windows += [Window(b, 1 + 7 * i, 8 + 7 * i, 1) for b in range(3) for i in range(4)]
    found = log_norms(DenseOperator(steps), windows).spectral.tolist()
    expected = [log_norm(steps[w.first : w.last, w.sequence]) for w in windows]
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [5, 40])
def test_an_exact_zero_is_minus_infinity_where_it_lies_in_the_window(size: int) -> None:
    steps = torch.randn(30, 1, size, size, dtype=F64)
    steps[10] = 0.0
    windows = [Window(0, 1, 10), Window(0, 10, 12), Window(0, 12, 30)]
    found = log_norms(DenseOperator(steps), windows).spectral
    assert torch.isneginf(found).tolist() == [False, True, False]


def test_long_sequences_count_by_windows_and_cuts_are_never_crossed() -> None:
    steps = torch.randn(41, 2, 6, 6, dtype=F64)
    cuts = torch.zeros(41, 2, dtype=torch.bool)
    cuts[13, 1] = True
    found = span_gains(steps, [41, 41], 10, cuts)
    whole = [log_norm(steps[first : first + 10, 0]) for first in (1, 11, 21, 31)]
    parts = [log_norm(steps[first : first + 10, 1]) for first in (3, 21, 31)]
    assert found.values == pytest.approx([np.median(whole), np.median(parts)], abs=1e-9)
    assert found.steps.tolist() == [10, 10]


LENGTHS: dict[str, tuple[list[int], int, int, int]] = {
    "of one length": ([40] * 4, 40, 39, 4),
    "far shorter ones": ([40, 35, 20, 8], 28, 28, 2),
    "a longer span than most are": ([40, 35, 20, 8], 100, 34, 2),
    "hardly shorter ones": ([30, 29, 28, 27], 28, 26, 4),
    "one long": ([200] + [8] * 5, 100, 7, 6),
    "two": ([40, 30], 35, 29, 2),
    "one": ([25], 100, 24, 1),
}


@pytest.mark.parametrize(("lengths", "span", "over", "votes"), LENGTHS.values(), ids=LENGTHS)
def test_what_a_verdict_rests_on_is_over_one_number_of_steps(
    lengths: list[int], span: int, over: int, votes: int
) -> None:
    steps = torch.randn(max(lengths), len(lengths), 3, 3, dtype=F64)
    found = span_gains(steps, lengths, span)
    assert (found.over, int(found.voting.sum())) == (over, votes)
    for b, length in enumerate(lengths):
        width = min(over, length - 1)  # the shorter ones have the gain of what they are
        last = range(length, width, -over)
        expected = np.median([log_norm(steps[end - width : end, b]) for end in last])
        assert (found.values[b], found.steps[b]) == (pytest.approx(expected, abs=1e-9), width)
    assert np.isnan(found.votes).sum() == len(lengths) - votes


# ----------------------------------------------------------------------------- verdicts and rates


def layer_of(module: nn.Module, x: Tensor, **options: object) -> LayerAnalysis:
    with gradflow.record(module) as recording:
        module(x)[0][-1].pow(2).mean().backward()
    return next(iter(gradflow.analyze(recording, **options).values()))  # type: ignore[arg-type]


def crowded(kept: float) -> nn.RNN:
    """One direction keeps so much at every step, 49 keep 0.93."""
    turn = torch.linalg.qr(torch.randn(50, 50))[0]
    each = torch.full((50,), 0.93)
    each[0] = kept
    rnn = nn.RNN(3, 50, bias=False)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(turn @ each.diag() @ turn.T)
        rnn.weight_ih_l0.mul_(0.01)
    return rnn


@pytest.mark.parametrize("steps", [60, 100])
def test_one_direction_that_keeps_everything_is_stable(steps: int) -> None:
    torch.manual_seed(0)
    rnn = crowded(1.0)
    with gradflow.record(rnn) as recording:
        rnn(torch.randn(steps, 8, 3))[0][-1].pow(2).mean().backward()
    stack = step_jacobians(recording["l0"])
    exact = np.mean([log_norm(stack[1:, b]) for b in range(8)])
    for seed in (0, 1):
        layer = next(iter(gradflow.analyze(recording, seed=seed).values()))
        assert layer.verdict == "stable" and layer.gain.steps == steps - 1
        assert layer.gain.value == pytest.approx(exact, abs=1e-4)
        assert layer.lyapunov is not None and (np.diff(layer.lyapunov) <= 0).all()
        assert layer.rate.low <= exact / (steps - 1) <= layer.rate.high


class Linear(nn.Module):
    """h' = W h + U x, called step by step."""

    def __init__(self, hidden: int, exponent: float) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(hidden, hidden).double(), nn.Linear(3, hidden).double()
        self.w.weight.data *= math.exp(exponent) / torch.linalg.eigvals(self.w.weight).abs().max()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.w(h) + self.u(x)


@pytest.mark.parametrize("seed", [1, 9])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_constant_step_gives_its_exponent_as_a_point(seed: int, batch: int) -> None:
    torch.manual_seed(seed)
    cell = Linear(32, -0.04)
    with gradflow.record(cell) as recording:
        h = torch.zeros(batch, 32, dtype=F64)
        for x in torch.randn(40, batch, 3, dtype=F64):
            h = cell(x, h)
        h.pow(2).mean().backward()
    layer = next(iter(gradflow.analyze(recording).values()))
    power = torch.linalg.matrix_power(cell.w.weight.detach(), 39)
    assert layer.rate.low == layer.rate.high == pytest.approx(-0.04, abs=1e-9)
    assert layer.gain.value == pytest.approx(
        float(torch.linalg.matrix_norm(power, 2).log()), abs=1e-9
    )
    assert layer.verdict == "stable" and "long run" in layer.sentence


@pytest.mark.parametrize("steps", [20, 60])
def test_the_interval_of_a_rate_holds_the_long_run(steps: int) -> None:
    held = []
    for seed in range(6):
        torch.manual_seed(seed)
        rnn = nn.RNN(3, 16).double()
        rnn.weight_hh_l0.data *= 1.7
        rnn.weight_ih_l0.data *= 0.3
        rate = layer_of(rnn, torch.randn(steps, 6, 3, dtype=F64)).rate
        with gradflow.record(rnn) as recording:
            rnn(torch.randn(800, 2, 3, dtype=F64))[0][-1].sum().backward()
        long = float(lyapunov_spectrum(step_jacobians(recording["l0"]), k=1).mean())
        held.append(rate.low <= long <= rate.high)
    assert sum(held) >= 5


def test_a_state_cut_off_at_every_step_is_dead() -> None:
    cell = nn.GRUCell(2, 4)
    with gradflow.record(cell) as recording:
        h, total = torch.zeros(3, 4), torch.zeros(())
        for x in torch.randn(6, 3, 2):
            h = cell(x, h.detach())
            total = total + h.sum()
        total.backward()
    layer = next(iter(gradflow.analyze(recording).values()))
    assert layer.verdict == "dead" and "cut off from its past at every step" in layer.sentence


@pytest.mark.parametrize("lengths", [[40, 40, 40, 40], [40, 35, 20, 8], [40, 36, 30, 5, 4]])
def test_short_sequences_do_not_blur_what_long_ones_show(lengths: list[int]) -> None:
    gru, x = nn.GRU(3, 8), torch.randn(40, len(lengths), 3)
    with gradflow.record(gru) as recording:
        packed = pack_padded_sequence(x, torch.tensor(lengths))
        pad_packed_sequence(gru(packed)[0])[0].pow(2).sum().backward()
    layer = next(iter(gradflow.analyze(recording).values()))
    short = int((layer.data["sequence_steps"] < layer.gain.steps).sum())
    assert layer.verdict == "vanishing"
    said = f"{short} of {len(lengths)} sequences {'is' if short == 1 else 'are'} too short for the gain over"
    assert (said in layer.sentence) == bool(short) == (len(set(lengths)) > 1)


@pytest.mark.parametrize("falls", [False, True])
def test_a_rate_that_has_not_settled_tells_no_half_life(falls: bool) -> None:
    """It is where the curve has fallen by half, and where that has not, nothing is known."""
    torch.manual_seed(0)
    rnn = nn.RNN(3, 32) if falls else crowded(1.0)
    rnn.weight_hh_l0.data *= 1.6 if falls else 1.0
    layer = layer_of(rnn, torch.randn(30, 6, 3))
    assert "not settled" in layer.labels and math.isfinite(layer.rate.value)
    fallen = np.flatnonzero(layer.data["lag_median"].values <= -math.log(2))
    row = str(gradflow.Analysis("", {"l0": layer}, (), {})).splitlines()[-1]
    if not falls:
        assert not len(fallen) and math.isnan(layer.half_life) and "none" in row
    else:
        assert fallen[0] - 1 <= layer.half_life <= fallen[0] and f"{layer.half_life:.4g}" in row


class Driven(nn.Module):
    """h' = exp(0.02 x) Q h with Q orthogonal, so that the exponent is exactly 0."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.linalg.qr(torch.randn(hidden, hidden, dtype=F64))[0])

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return (0.02 * x[:, :1]).exp() * (h @ self.q.T) + x


def test_a_rate_that_may_be_0_is_told_and_tells_no_half_life() -> None:
    torch.manual_seed(0)
    cell, x = Driven(6), torch.randn(100, 8, 6, dtype=F64)
    with gradflow.record(cell) as recording:
        h = torch.zeros(8, 6, dtype=F64)
        for step in x:
            h = cell(step, h)
        h.pow(2).mean().backward()
    layer = next(iter(gradflow.analyze(recording).values()))
    assert layer.rate_told and layer.rate.low < 0 < layer.rate.high < 0.005
    assert layer.verdict == "stable" and math.isnan(layer.half_life)
    assert "halves" not in layer.sentence and "half" not in layer.title


@pytest.mark.parametrize("how", ["begins later", "is reset"])
def test_a_sequence_that_begins_later_than_others_is_not_cut_off(how: str) -> None:
    torch.manual_seed(0)
    cell, x, h0 = (
        nn.GRUCell(3, 4).double(),
        torch.randn(8, 3, 3, dtype=F64),
        torch.zeros(3, 4).double(),
    )
    mask = torch.ones(8, 3, 1, dtype=torch.bool)
    mask[0 if how == "begins later" else 3, 1] = False  # of torch.where(mask, new, h0)
    with gradflow.record(cell) as recording:
        h = h0
        for t in range(8):
            h = torch.where(mask[t], cell(x[t], h), h if how == "begins later" else h0)
        h.sum().backward()
    (layer,) = gradflow.analyze(recording).values()
    assert ("cut off from its past" in layer.sentence) == (how == "is reset")
    assert ("cut" in [finding.name for finding in layer.findings]) == (how == "is reset")
