"""Whole spectra: known systems, an independent iteration, intervals, how they settle, sum rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import exact_log_singular, gram_schmidt_exponents
from seam import DenseOperator, Growth, burn_in, log_growth, rate_over_sequences, spectrum
from systems import SYSTEMS, System, gaussian, newman
from torch import Tensor, nn

import gradflow
from gradflow.analysis import LayerAnalysis, Rate
from gradflow.analyzer import log_gain_map, lyapunov_spectrum, step_jacobians
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


def observe(module: nn.Module, x: Tensor | nn.utils.rnn.PackedSequence) -> Recording:
    """One forward and backward pass."""
    with gradflow.record(module) as recording:
        output = module(x)[0]
        (
            output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
        ).sum().backward()
    return recording


def layer_of(module: nn.Module, x: Tensor | nn.utils.rnn.PackedSequence) -> LayerAnalysis:
    return next(iter(gradflow.analyze(observe(module, x)).values()))


# -------------------------------------------------------------------------------- known exponents


MAPS = [system for system in SYSTEMS if system.time == 1.0]


@pytest.mark.parametrize("system", MAPS, ids=lambda system: system.name)
def test_known_maps(system: System) -> None:
    found = lyapunov_spectrum(system.jacobians(400, 8)).numpy()
    for known, column in zip(system.known, found.T, strict=True):
        rate = rate_over_sequences(column)
        error = max((rate.high - rate.low) / 2 / 2.365, 1e-6)  # one standard error of eight orbits
        assert abs(rate.value - known) < 4.5 * error


def test_the_tangent_flow_of_lorenz() -> None:
    system = next(system for system in SYSTEMS if system.name == "Lorenz flow")
    found = lyapunov_spectrum(system.jacobians(1200, 12)).mean(0).numpy() / system.time
    assert found[0] == pytest.approx(0.9056, abs=0.12)
    assert found[1] == pytest.approx(0.0, abs=0.08)
    assert found.sum() == pytest.approx(-10 - 1 - 8 / 3, abs=1e-4), "its divergence is constant"


@pytest.mark.parametrize(("name", "total"), [("Hénon map", 0.3), ("Ikeda map, u = 0.9", 0.81)])
def test_sums_are_the_constant_determinants(name: str, total: float) -> None:
    system = next(system for system in SYSTEMS if system.name == name)
    found = lyapunov_spectrum(system.jacobians(300, 4)).sum(1)
    assert found.tolist() == pytest.approx([math.log(total)] * 4, abs=1e-10)


def test_interval_covers_known_exponents_of_random_products() -> None:
    found = lyapunov_spectrum(gaussian(2, seed=3)(60, 4 * 400)).numpy()
    for known, column in zip(newman(2), found.T, strict=True):
        rates = [rate_over_sequences(row) for row in column.reshape(400, 4)]
        assert 0.92 <= np.mean([rate.low <= known <= rate.high for rate in rates]) <= 0.97


def test_small_exponents_are_no_zeros_when_the_first_step_is_cut() -> None:
    stack = torch.diag(torch.tensor([1.0, 1e-20], dtype=F64)).expand(40, 2, 2, 2)
    cuts = torch.zeros(40, 2, dtype=torch.bool)
    cuts[0, 0] = True
    growth = log_growth(DenseOperator(stack), torch.tensor([40, 40]), 2, cuts=cuts)
    for row in growth.exponents:
        assert row.tolist() == pytest.approx([0.0, math.log(1e-20)], abs=1e-6)


# ------------------------------------------------------------------------------------- the oracle


def graded(steps: int, size: int, seed: int) -> np.ndarray:
    """Random steps whose exponents lie apart, so that every basis aligns fast."""
    random = np.random.default_rng(seed)
    scales = np.diag(0.3 ** np.arange(size))
    return scales @ (np.eye(size) + 0.3 * random.normal(size=(steps, size, size)))


@pytest.mark.parametrize("seed", range(3))
def test_modified_gram_schmidt_in_extended_precision(seed: int) -> None:
    steps = graded(300, 4, seed)
    found = lyapunov_spectrum(torch.from_numpy(steps)[:, None])[0]
    expected = gram_schmidt_exponents(steps, burn_in(300))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert expected[0] - expected[3] > 1


def test_the_oracle_on_networks() -> None:
    for module in (nn.LSTM(2, 3, dtype=F64), nn.GRU(2, 4, dtype=F64), nn.RNN(2, 4, dtype=F64)):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.8)
        recording = observe(module, torch.randn(300, 1, 2, dtype=F64))
        expected = gram_schmidt_exponents(step_jacobians(recording["l0"])[:, 0].numpy(), 60)
        found = gradflow.analyze(recording)["l0"].lyapunov
        assert found is not None
        # both bases align, yet pairs of close exponents do so slowly
        assert found.tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_the_oracle_can_differ() -> None:
    steps = graded(100, 3, 0)
    wrong = gram_schmidt_exponents(1.001 * steps, 20)
    found = lyapunov_spectrum(torch.from_numpy(steps)[:, None])[0]
    assert found.tolist() != pytest.approx(wrong.tolist(), rel=1e-5)


def test_singular_values_of_exact_products_end_at_the_exponents() -> None:
    steps = graded(150, 3, 7)
    exact = np.array(exact_log_singular(steps))
    gains = log_gain_map(torch.from_numpy(np.concatenate([np.eye(3)[None], steps]))[:, None])
    assert gains[0, 0, -1].item() == pytest.approx(exact[0], rel=1e-10)
    found = lyapunov_spectrum(torch.from_numpy(steps)[:, None])[0].numpy()
    assert found == pytest.approx(exact / 150, abs=0.15)
    assert found.tolist() == pytest.approx((exact / 150).tolist(), rel=0.06)


# ------------------------------------------------------------------------------------- invariants

SEEDS = st.integers(0, 2**31 - 1)


def random_steps(seed: int, steps: int = 120, size: int = 3) -> Tensor:
    return torch.from_numpy(graded(steps, size, seed))[:, None]


@given(SEEDS, st.floats(0.01, 100))
@settings(max_examples=8, deadline=None)
def test_scaling_every_step_adds_its_logarithm(seed: int, factor: float) -> None:
    steps = random_steps(seed)
    shifted = lyapunov_spectrum(factor * steps) - lyapunov_spectrum(steps)
    assert shifted[0].tolist() == pytest.approx([math.log(factor)] * 3, abs=1e-9)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_change_of_basis_leaves_the_spectrum_alone(seed: int) -> None:
    steps = random_steps(seed)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(3, 3, generator=generator, dtype=F64) + 3 * torch.eye(3)
    turned = basis @ steps @ torch.linalg.inv(basis)
    # past the burn-in only the two ends differ, by what the basis stretches
    bound = 2 * math.log(torch.linalg.cond(basis).item()) / 96 + 1e-9
    assert lyapunov_spectrum(turned)[0].tolist() == pytest.approx(
        lyapunov_spectrum(steps)[0].tolist(), abs=bound
    )
    orthogonal = torch.linalg.qr(basis)[0]
    gains = log_gain_map(orthogonal @ steps[:30] @ orthogonal.T)
    torch.testing.assert_close(gains, log_gain_map(steps[:30]), equal_nan=True)


@given(SEEDS)
@settings(max_examples=4, deadline=None)
def test_inverse_steps_in_reverse_negate_the_spectrum(seed: int) -> None:
    steps = random_steps(seed, steps=200)
    backward = torch.linalg.inv(steps.flip(0))
    forward = lyapunov_spectrum(steps)[0]
    # each leaves out its own first fifth
    assert (-lyapunov_spectrum(backward)[0].flip(0)).tolist() == pytest.approx(
        forward.tolist(), abs=0.2
    )


@given(SEEDS)
@settings(max_examples=8, deadline=None)
def test_the_sum_is_the_mean_log_determinant(seed: int) -> None:
    steps = random_steps(seed)
    expected = torch.linalg.slogdet(steps[burn_in(120) :])[1].mean()
    assert lyapunov_spectrum(steps).sum().item() == pytest.approx(expected.item(), rel=1e-10)


@given(st.floats(0.2, 3.0), st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_scaling_a_linear_networks_weight_adds_its_logarithm(a: float, size: int) -> None:
    def spectrum_of(factor: float) -> np.ndarray:
        torch.manual_seed(size)
        module = nn.RNN(1, size, bias=False, dtype=F64)
        with torch.no_grad():
            module.weight_hh_l0.mul_(factor)
        found = layer_of(module, torch.zeros(40, 2, 1, dtype=F64)).lyapunov  # tanh at 0 is linear
        assert found is not None
        return found

    assert spectrum_of(a) - spectrum_of(1.0) == pytest.approx(math.log(a), abs=1e-9)


# ------------------------------------------------------------------------- the layer's own arrays


def test_every_exponent_has_a_t_interval_over_sequences() -> None:
    recording = observe(nn.RNN(2, 5, dtype=F64), torch.randn(60, 4, 2, dtype=F64))
    layer = gradflow.analyze(recording)["l0"]
    each = lyapunov_spectrum(step_jacobians(recording["l0"])).numpy()
    data = layer.data
    assert data["lyapunov"].values.tolist() == layer.lyapunov.tolist()  # type: ignore[union-attr]
    first = Rate(*(float(data[f"lyapunov{end}"][0]) for end in ("", "_low", "_high")))
    assert first == layer.rate
    assert (np.diff(data["lyapunov"].values[1:]) <= 0).all()
    half = (data["lyapunov_high"] - data["lyapunov"]).values
    assert half == pytest.approx((data["lyapunov"] - data["lyapunov_low"]).values)
    # the smallest is far from the others: in each sequence it is the last; what has not settled widens
    spread = 3.1824 * each[:, -1].std(ddof=1) / 2
    settling = float(data["lyapunov_settling"][-1])
    assert 0.99 * math.hypot(spread, settling) <= half[-1] <= 1.5 * math.hypot(spread, settling)


def test_the_trace_ends_at_the_exponents() -> None:
    module = nn.LSTM(2, 6, dtype=F64)
    x = nn.utils.rnn.pack_padded_sequence(
        torch.randn(50, 3, 2, dtype=F64), torch.tensor([50, 31, 12])
    )
    layer = layer_of(module, x)
    trace = layer.data["lyapunov_trace"].values
    assert trace.shape == (12, 50)
    assert trace[:8, -1] == pytest.approx(layer.data["lyapunov"].values[:8], rel=1e-12)
    assert np.isnan(trace[8:]).all()
    # the shortest sequence begins to count first, after its own fifth
    assert np.isnan(trace[:8, : burn_in(12)]).all()
    assert np.isfinite(trace[:8, burn_in(12) :]).all()


def test_the_trace_is_the_running_mean() -> None:
    logs = torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 0.0], [1.0, 1.0]], dtype=F64)[..., None]
    counted = torch.tensor([[False, False], [True, True], [True, False], [True, True]])
    core = SimpleNamespace(
        growth=Growth(logs, counted),
        rate=Rate(0.75, -1.0, 2.0),
        sequence_rates=np.array([3.0, -1.5]),
        constant=None,
        settling=0.0,
    )
    found = spectrum(core)  # type: ignore[arg-type]
    expected = [math.nan, (3 - 4) / 2, (4 - 4) / 2, (3 - 1.5) / 2]
    assert found.trace[0].tolist() == pytest.approx(expected, nan_ok=True)


def test_dead_and_missing_layers() -> None:
    relu = nn.RNN(1, 3, nonlinearity="relu")
    nn.init.constant_(relu.bias_ih_l0, -5.0)
    dead = layer_of(relu, torch.zeros(30, 2, 1)).data
    assert np.isneginf(dead["lyapunov"]).all() and np.isneginf(dead["lyapunov_high"]).all()
    assert np.isnan(dead["sum_rule"]).all()
    broken = torch.randn(20, 2, 1)
    broken[4, 0] = math.nan
    with pytest.warns(gradflow.errors.GradflowWarning, match="not finite"):
        layer = layer_of(nn.GRU(1, 3), broken)
    assert layer.lyapunov is None
    assert layer.data["lyapunov"].isnull().all() and layer.data["lyapunov_trace"].isnull().all()


def test_a_sequence_of_one_step_enters_no_exponent() -> None:
    torch.manual_seed(1)
    module = nn.RNN(2, 3, dtype=F64)
    x = torch.randn(30, 3, 2, dtype=F64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([30, 30, 1]))
    with_it, without = layer_of(module, packed), layer_of(module, x[:, :2])
    for name in ("lyapunov", "lyapunov_low", "lyapunov_high", "sum_rule"):
        assert with_it.data[name].values == pytest.approx(without.data[name].values, rel=1e-12)


def test_one_usable_sequence_is_judged_as_one_sequence() -> None:
    module = nn.RNN(1, 1, bias=False, dtype=F64)
    nn.init.constant_(module.weight_hh_l0, 0.9)
    x = nn.utils.rnn.pack_padded_sequence(torch.zeros(60, 2, 1, dtype=F64), torch.tensor([60, 1]))
    layer = layer_of(module, x)
    assert layer.verdict == "vanishing" and "one sequence" in layer.labels
    assert layer.rate.low == layer.rate.high == pytest.approx(math.log(0.9))


def test_growth_that_goes_on_is_no_transient() -> None:
    module = nn.RNN(1, 2, bias=False, nonlinearity="relu", dtype=F64)
    with torch.no_grad():
        module.weight_hh_l0.copy_(1.2 * torch.eye(2))
        module.weight_ih_l0.fill_(1.0)
    layer = layer_of(module, torch.ones(60, 3, 1, dtype=F64))
    assert layer.verdict == "exploding" and layer.labels == ()


# --------------------------------------------------------------------------------------- sum rules


def lively(module: nn.RNNBase) -> nn.RNNBase:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


SUMS: dict[str, Callable[[], nn.RNNBase]] = {
    "RNN": lambda: nn.RNN(2, 5, dtype=F64),
    "LSTM": lambda: nn.LSTM(2, 4, dtype=F64),
    "LSTM with a projection": lambda: nn.LSTM(2, 4, proj_size=2, dtype=F64),
    "reverse": lambda: nn.LSTM(2, 3, bidirectional=True, num_layers=2, dtype=F64),
}


@pytest.mark.parametrize("name", SUMS)
def test_sum_rule(name: str) -> None:
    module = lively(SUMS[name]())
    x = nn.utils.rnn.pack_padded_sequence(
        torch.randn(40, 3, 2, dtype=F64), torch.tensor([40, 33, 11])
    )
    recording = observe(module, x)
    for layer in gradflow.analyze(recording).values():
        measured, exact = layer.data["sum_rule"].sel(side=["measured", "exact"]).values
        assert measured == pytest.approx(exact, rel=1e-9)
        assert layer.lyapunov is not None
        assert layer.lyapunov.sum() == pytest.approx(exact, rel=1e-9)
        # and the determinants themselves
        stack, total = step_jacobians(recording[layer.name]), 0.0
        for b, length in enumerate((40, 33, 11)):
            logs = torch.linalg.slogdet(stack[burn_in(length) : length, b])[1]
            total += float(logs.mean()) / 3
        assert exact == pytest.approx(total, rel=1e-9)


def test_the_sum_rule_would_show_a_wrong_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradflow.cells.lstm.LSTMSteps.push

    def without_the_cell_path(self: gradflow.cells.Steps, t: int, block: Tensor) -> Tensor:
        block = block.clone()
        block[..., self.weight_hh.shape[1] :] *= 0.9
        return right(self, t, block)  # type: ignore[arg-type]

    monkeypatch.setattr(gradflow.cells.lstm.LSTMSteps, "push", without_the_cell_path)
    analysis = gradflow.analyze(observe(nn.LSTM(2, 4, dtype=F64), torch.randn(40, 2, 2, dtype=F64)))
    measured, exact = analysis["l0"].data["sum_rule"].values
    assert measured == pytest.approx(exact + 4 * math.log(0.9), rel=1e-9)
    assert any("the smallest exponents lie below rounding" in note for note in analysis.warnings)


def test_sum_rule_of_loops_and_where_there_is_none() -> None:
    class Loop(nn.Module):
        def __init__(self, keep: float) -> None:
            super().__init__()
            self.cell, self.keep = nn.LSTMCell(2, 3, dtype=F64), keep

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            h = c = torch.zeros(x.shape[1], 3, dtype=F64)
            for step in x:
                h, c = self.cell(step, (h * self.keep, c))
            return h, None

    x = torch.randn(30, 2, 2, dtype=F64)
    for keep in (1.0, 0.5):  # what happens between two calls belongs to the step
        layer = layer_of(Loop(keep), x)
        measured, exact = layer.data["sum_rule"].values
        assert measured == pytest.approx(exact, rel=1e-9)
    gru = layer_of(nn.GRU(2, 4, dtype=F64), x).data["sum_rule"]
    assert np.isfinite(gru.sel(side="measured")) and np.isnan(gru.sel(side="exact"))


def test_no_sum_of_a_part_of_the_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradflow.analyzer.core.RATE_SECONDS", 0.03)
    layer = layer_of(nn.LSTM(2, 16), torch.randn(60, 4, 2))
    assert layer.lyapunov is not None and 1 <= len(layer.lyapunov) < 32
    assert layer.data["sum_rule"].isnull().all()
