"""Exponents of maps whose exponents are known, and their certificates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import systems
import torch
from hypothesis import given
from hypothesis import strategies as st
from seam import burn_in
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import (
    entropy_rate,
    kaplan_yorke_dimension,
    lyapunov_spectrum,
    step_jacobians,
)
from gradflow.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def scalars(slopes: list[float]) -> Tensor:
    """Slopes of a one-dimensional map as a stack."""
    return torch.tensor(slopes, dtype=torch.float64)[:, None, None, None]


def logistic(r: float, steps: int) -> Tensor:
    x, slopes = 0.3, []
    for _ in range(steps + 500):
        slopes.append(r * (1 - 2 * x))
        x = r * x * (1 - x)
    return scalars(slopes[500:])


@pytest.mark.parametrize(
    ("jacobians", "expected", "bound"),
    [
        (logistic(4.0, 20_000), [math.log(2)], 2e-3),
        (logistic(3.2, 4_000), [-0.9162907], 1e-6),
        (scalars([1.9] * 3_000), [math.log(1.9)], 1e-12),
    ],
    ids=["logistic r=4", "logistic r=3.2", "tent"],
)
def test_maps_of_the_interval(jacobians: Tensor, expected: list[float], bound: float) -> None:
    assert lyapunov_spectrum(jacobians)[0].tolist() == pytest.approx(expected, abs=bound)


def test_cat_map() -> None:
    cat = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double().expand(200, 1, 2, 2)
    assert lyapunov_spectrum(cat)[0].tolist() == pytest.approx([0.9624237, -0.9624237], abs=1e-7)


@pytest.mark.parametrize(("system", "start", "dimension", "entropy", "bound"), [
    (systems.cat, (0.1, 0.2), 2.0, 0.9624237, 1e-6),
    (systems.henon, (0.1, 0.1), 1.2583, 0.41922, 4e-3),  # Sprott 2003
])  # fmt: skip
def test_dimension_and_entropy_of_known_maps(
    system: Any, start: tuple[float, float], dimension: float, entropy: float, bound: float
) -> None:
    state, jacobians = np.array([start]), []
    for _ in range(20_000):
        state, jacobian = system(state)
        jacobians.append(jacobian[0])
    spectrum = lyapunov_spectrum(torch.from_numpy(np.stack(jacobians))[:, None])[0]
    assert kaplan_yorke_dimension(spectrum) == pytest.approx(dimension, abs=bound)
    assert entropy_rate(spectrum) == pytest.approx(entropy, abs=bound)


def slow_dimension(exponents: list[float]) -> float:
    """The line through the sums of the leading exponents, followed to where it crosses 0."""
    ordered, total = sorted(exponents, reverse=True), 0.0
    for count, exponent in enumerate(ordered):
        if total + exponent < 0:
            return count + total / -exponent
        total += exponent
    return float(len(ordered))


@given(st.lists(st.floats(-3, 3).filter(lambda one: abs(one) > 1e-6), min_size=1, max_size=8))
def test_dimension_and_entropy_by_the_slow_way(exponents: list[float]) -> None:
    assert kaplan_yorke_dimension(exponents) == pytest.approx(slow_dimension(exponents), rel=1e-9)
    assert entropy_rate(exponents) == pytest.approx(sum(max(0.0, one) for one in exponents))
    mixed = exponents[::-1]
    assert kaplan_yorke_dimension(mixed) == kaplan_yorke_dimension(exponents)


def test_too_few_exponents_have_no_dimension() -> None:
    leading = [0.5, 0.1, -0.2]
    assert math.isnan(kaplan_yorke_dimension(leading, size=10))
    assert entropy_rate(leading, size=10) == pytest.approx(0.6)
    assert math.isnan(entropy_rate(leading[:2], size=10))
    assert kaplan_yorke_dimension([*leading, -0.8], size=10) == pytest.approx(3 + 0.4 / 0.8)
    assert kaplan_yorke_dimension([0.3, -math.inf]) == 1 and kaplan_yorke_dimension([-0.3]) == 0
    assert math.isnan(kaplan_yorke_dimension([0.3, math.nan])) and math.isnan(entropy_rate([]))


@pytest.mark.parametrize("number_of", [kaplan_yorke_dimension, entropy_rate])
def test_several_spectra_at_once_are_refused(number_of: Any) -> None:
    with pytest.raises(InputError, match=r"exponents must be one spectrum, \(k,\), got \(4, 2\)"):
        number_of(torch.zeros(4, 2))


def test_a_chaotic_network_has_both() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(1, 40, bias=False).double()
    nn.init.normal_(rnn.weight_hh_l0, 0, 3 / 40**0.5)
    run = gradflow.diagnose(rnn, 0.1 * torch.randn(200, 4, 1, dtype=torch.float64))
    layer = run["l0"]
    assert layer.lyapunov is not None and len(layer.lyapunov) == 40
    assert layer.kaplan_yorke == pytest.approx(slow_dimension(layer.lyapunov.tolist()))
    row = run.frame("layers").iloc[0]
    assert (row["kaplan_yorke"], row["entropy_rate"]) == (layer.kaplan_yorke, layer.entropy_rate)
    assert layer.entropy_rate > 0 and 1 < layer.kaplan_yorke < 40


def test_diagonal_comes_sorted() -> None:
    jacobians = torch.diag(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).expand(600, 2, 3, 3)
    expected = [-0.0100503, -0.1053605, -0.6931472]
    for row in lyapunov_spectrum(jacobians):
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_5000_steps_in_float32(factor: float) -> None:
    jacobians = torch.full((5000, 1, 1, 1), factor)
    assert lyapunov_spectrum(jacobians).item() == pytest.approx(math.log(factor), rel=1e-6)


def test_exact_zeros_are_minus_infinity_one_by_one() -> None:
    jacobians = torch.diag(torch.tensor([0.9, 0.0], dtype=torch.float64)).expand(50, 1, 2, 2)
    first, second = lyapunov_spectrum(jacobians)[0].tolist()
    assert first == pytest.approx(math.log(0.9), rel=1e-9)
    assert second == -math.inf
    shift = torch.diag(torch.ones(3).double(), 1).expand(30, 1, 4, 4)
    assert torch.isneginf(lyapunov_spectrum(shift)).all()


def test_averages_end_at_the_first_nan() -> None:
    jacobians = torch.full((60, 2, 1, 1), 0.5, dtype=torch.float64)
    jacobians[30:, 1] = torch.nan
    jacobians[:30, 1] = 0.25
    rates = lyapunov_spectrum(jacobians)[:, 0]
    assert rates.tolist() == pytest.approx([math.log(0.5), math.log(0.25)])
    assert lyapunov_spectrum(torch.full((5, 1, 2, 2), torch.nan)).isnan().all()


def test_the_first_fifth_is_left_out_of_long_sequences_only() -> None:
    jacobians = torch.full((50, 1, 1, 1), 0.5, dtype=torch.float64)
    jacobians[: burn_in(50)] = 4.0
    assert lyapunov_spectrum(jacobians).item() == pytest.approx(math.log(0.5), rel=1e-12)
    short = jacobians[burn_in(50) - 1 :][:9]
    assert lyapunov_spectrum(short).item() == pytest.approx(math.log(4 * 0.5**8) / 9, rel=1e-12)


def test_k_of_the_spectrum_are_the_first_of_all() -> None:
    jacobians = torch.randn(400, 1, 6, 6, dtype=torch.float64) / math.sqrt(6)
    everything = lyapunov_spectrum(jacobians)
    for k in (1, 3):
        first = lyapunov_spectrum(jacobians, k)[0].tolist()
        assert first == pytest.approx(everything[0, :k].tolist(), abs=0.03)


@pytest.mark.parametrize("k", [0, 4, True, 1.5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(InputError, match="k must be a whole number from 1 to 3, got"):
        lyapunov_spectrum(torch.ones(4, 1, 3, 3), k)


@pytest.mark.parametrize(("gain", "expected"), [(1.5, 0.065), (2.0, 0.155), (3.0, 0.310)])
def test_random_tanh_network(gain: float, expected: float) -> None:
    size = 400
    weight = torch.randn(size, size) * gain / math.sqrt(size)
    h = torch.randn(size)
    direction = torch.randn(size)
    # the slow obvious way would hold 300 dense Jacobians of this size: follow one direction instead
    logs = []
    for _ in range(500):
        h = torch.tanh(weight @ h)
        direction = (1 - h * h) * (weight @ direction)
        logs.append(direction.norm().log().item())
        direction = direction / direction.norm()
    reference = sum(logs[100:]) / 400
    assert reference == pytest.approx(expected, abs=0.03)
    rnn = nn.RNN(1, size, bias=False)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(weight)
        rnn.weight_ih_l0.zero_()
    with gradflow.record(rnn) as recording:
        rnn(torch.zeros(300, 1, 1), 0.5 * torch.randn(1, 1, size))[0][-1].sum().backward()
    layer = gradflow.analyze(recording, stride=300)["l0"]
    assert layer.rate.value == pytest.approx(expected, abs=0.03)


def test_sum_of_a_tanh_networks_spectrum_is_its_log_determinant() -> None:
    rnn = nn.RNN(2, 5, dtype=torch.float64)
    with gradflow.record(rnn) as recording:
        rnn(torch.randn(60, 1, 2, dtype=torch.float64))[0][-1].sum().backward()
    track = recording["l0"]
    total = lyapunov_spectrum(step_jacobians(track)).sum()
    slopes = (1 - track.h[12:, 0] ** 2).log().sum(1).mean()
    expected = torch.linalg.slogdet(rnn.weight_hh_l0.detach())[1] + slopes
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)


def test_sum_of_an_lstms_spectrum_is_its_log_determinant() -> None:
    lstm = nn.LSTM(2, 4, dtype=torch.float64)
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(40, 1, 2, dtype=torch.float64))[0][-1].sum().backward()
    track = recording["l0"]
    total = lyapunov_spectrum(step_jacobians(track)).sum()
    f, o = track.gates["f"][8:, 0], track.gates["o"][8:, 0]
    assert track.c is not None
    through = (track.c[8:, 0].tanh() * o * (1 - o)).abs()
    u_o = lstm.weight_hh_l0.detach()[12:]
    expected = (f.log() + through.log()).sum(1).mean() + torch.linalg.slogdet(u_o)[1]
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
