"""ln gain of products, against closed forms, one SVD per pair, and what must hold of any product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seam import DenseOperator, log_gains, log_singular_along, survivors
from torch import Tensor

from gradflow.analyzer import log_gain_map
from gradflow.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = st.integers(0, 10_000)


def repeated(matrix: Tensor, steps: int) -> Tensor:
    """The same A at every step, one sequence."""
    return matrix.expand(steps, 1, *matrix.shape).contiguous()


def constant(value: float, steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A scalar linear map."""
    return torch.full((steps, 1, 1, 1), value, dtype=dtype)


def gaussian(steps: int, size: int, *, batch: int = 1, gain: float = 1.0, seed: int = 0) -> Tensor:
    """Independent Gaussian matrices of entry variance gain²/size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, batch, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * gain / math.sqrt(size)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def pair_by_pair(jacobians: Tensor, norm: str) -> Tensor:
    """The slow, obvious map: one product and one SVD for each pair."""
    steps, batch, size, _ = jacobians.shape
    result = torch.full((batch, steps, steps), torch.nan, dtype=torch.float64)
    for b in range(batch):
        for t in range(steps):
            product = torch.eye(size, dtype=jacobians.dtype)
            for target in range(t, steps):
                if target > t:
                    product = jacobians[target, b] @ product
                values = torch.linalg.svdvals(product)
                gain = values[0] if norm == "spectral" else values.norm() / math.sqrt(size)
                result[b, t, target] = gain.log()
    return result


def assert_maps_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Equal where undefined, and ln gains within the bound: a relative error of the gains."""
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual - expected).nan_to_num().abs().max().item()
    assert error <= bound, f"ln gains differ by up to {error:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("norm", ["spectral", "rms"])
@pytest.mark.parametrize(
    ("size", "steps", "batch"),
    [(1, 9, 2), (3, 12, 2), (8, 10, 1), (17, 8, 3), (32, 7, 1), (64, 6, 1)],
)
def test_map_equals_one_svd_per_pair(norm: str, size: int, steps: int, batch: int) -> None:
    jacobians = gaussian(steps, size, batch=batch, gain=1.2)
    assert_maps_close(log_gain_map(jacobians, norm), pair_by_pair(jacobians, norm), 1e-9)


def test_the_comparison_sees_an_error() -> None:
    expected = pair_by_pair(gaussian(4, 3), "rms")
    with pytest.raises(AssertionError, match="differ by up to"):
        assert_maps_close(expected * (1 + 1e-6), expected, 1e-9)


@pytest.mark.parametrize(
    "jacobians",
    [gaussian(7, 96), repeated(0.9 * gaussian(1, 80)[0, 0], 8), repeated(orthogonal(80), 6)],
    ids=["independent", "one matrix", "orthogonal"],
)
def test_wide_spectral_norms_are_within_1e_4_and_rms_exact(jacobians: Tensor) -> None:
    expected = pair_by_pair(jacobians, "spectral")
    assert_maps_close(log_gain_map(jacobians), expected, 1e-4)
    assert_maps_close(log_gain_map(jacobians, "rms"), pair_by_pair(jacobians, "rms"), 1e-9)


def test_a_wide_direction_that_takes_over_is_found() -> None:
    # from step 3 on, the direction that was best is cut and another one takes over
    first, second = (
        torch.full((70,), 0.5, dtype=torch.float64),
        torch.full((70,), 0.5, dtype=torch.float64),
    )
    first[0], second[0], second[41] = 1.0, 1e-6, 1.0
    turn = orthogonal(70)
    jacobians = torch.stack(
        [turn @ torch.diag(d) @ turn.T for d in (first, first, first, second, second, second)]
    )[:, None]
    expected = pair_by_pair(jacobians, "spectral")
    assert_maps_close(log_gain_map(jacobians), expected, 1e-4)


@pytest.mark.parametrize("norm", ["spectral", "rms"])
def test_scalar_linear(norm: str) -> None:
    gains = log_gain_map(constant(0.9, 80), norm)[0]
    lags = torch.arange(80).double()
    assert torch.allclose(gains[0], lags * math.log(0.9), rtol=1e-12, atol=0)
    assert int((gains[0] < math.log(1e-3)).int().argmax()) == 66


def test_diagonal() -> None:
    jacobians = repeated(torch.diag(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)), 40)
    k = torch.arange(40).double()
    rms = 0.5 * ((0.25**k + 0.81**k + 0.9801**k) / 3).log()
    spectral = k * math.log(0.99)
    assert torch.allclose(log_gain_map(jacobians)[0, 0], spectral, rtol=1e-9, atol=1e-15)
    assert torch.allclose(log_gain_map(jacobians, "rms")[0, 0], rms, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("scale", "rate"), [(1.0, 0.0), (0.95, -0.0512933)])
def test_rotation(scale: float, rate: float) -> None:
    gains = log_gain_map(repeated(scale * orthogonal(5), 30))[0, 0]
    assert torch.allclose(gains, rate * torch.arange(30).double(), rtol=1e-6, atol=1e-12)


def test_nilpotent_shift_is_exactly_zero_from_lag_8() -> None:
    shift = torch.diag(torch.ones(7).double(), diagonal=1)
    gains = log_gain_map(repeated(shift, 12))[0, 0]
    assert torch.equal(gains[:8], torch.zeros(8).double())
    assert torch.isneginf(gains[8:]).all()


def test_powers_of_a_gaussian_matrix_grow_though_the_rate_is_zero() -> None:
    gains = log_gain_map(repeated(gaussian(1, 400)[0, 0], 4))[0, 0].exp()
    expected = [math.sqrt((k + 1) ** (k + 1) / k**k) for k in (1, 2, 3)]
    assert gains[1:].tolist() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("weight", "rate"), [(2, -math.log(2)), (4, 0.0), (8, math.log(2))])
def test_sigmoid_scalar(weight: float, rate: float) -> None:
    slope = weight * 0.25  # h stays at ½
    gains = log_gain_map(constant(slope, 50))[0, 0]
    assert gains[-1].item() / 49 == pytest.approx(rate, rel=1e-12)


def test_critical_tanh_is_a_power_law_and_a_map_starts_at_the_first_state() -> None:
    h, slopes = 1.0, []
    for _ in range(1001):
        h = math.tanh(h)
        slopes.append(1 - h * h)
    jacobians = torch.tensor(slopes, dtype=torch.float64)[:, None, None, None]
    gains = log_gain_map(jacobians)[0, 0]
    assert sum(math.log(a) for a in slopes[:100]) == pytest.approx(-6.4427616, abs=1e-6)
    assert sum(math.log(a) for a in slopes[:1000]) == pytest.approx(-9.8698693, abs=1e-6)
    assert gains[100].item() == pytest.approx(-5.5898493, abs=1e-6)
    assert gains[1000].item() == pytest.approx(-9.0038035, abs=1e-6)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_5000_steps_in_float32_neither_underflow_nor_overflow(factor: float) -> None:
    operator = DenseOperator(constant(factor, 5001, torch.float32))
    gains = log_gains(operator, [0])
    for values in gains.values():
        assert values[0, 0, -1].item() == pytest.approx(5000 * math.log(factor), rel=1e-12)


@pytest.mark.parametrize("wall", [1e-30, 1e-300, 1e30, 1e300])
def test_a_wall_in_the_middle_is_not_smeared(wall: float) -> None:
    jacobians = constant(1.0, 9)
    jacobians[4] = wall
    gains = log_gain_map(jacobians)[0]
    for t in range(9):
        for target in range(t, 9):
            expected = math.log(wall) if t < 4 <= target else 0.0
            assert gains[t, target].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_exact_zeros_padding_and_overflow_stay_what_they_are() -> None:
    jacobians = gaussian(8, 3, batch=3)
    jacobians[4, 0] = 0.0
    jacobians[6:, 1] = torch.nan
    jacobians[5, 2, 0, 0] = torch.inf
    gains = log_gain_map(jacobians)
    below = torch.tril(torch.ones(8, 8), -1).bool()
    assert gains[:, below].isnan().all()
    assert torch.isneginf(gains[0, :4, 4:]).all()
    assert torch.isfinite(gains[0, 4, 4:]).all()
    assert gains[1, :, 6:].isnan().all()
    assert torch.isfinite(gains[1, 0, :6]).all()
    assert not torch.isfinite(gains[2, 0, 5:]).any()
    assert torch.isfinite(gains[2, 5:].diagonal(5)).all()


@pytest.mark.parametrize(
    ("jacobians", "norm", "message"),
    [
        (torch.ones(3, 2, 2), "rms", r"jacobians must be of shape \(T, B, S, S\), got \(3, 2, 2\)"),
        (torch.ones(3, 1, 2, 3), "rms", "got"),
        (torch.ones(3, 1, 2, 2).long(), "rms", "jacobians must be floating point, got torch.int64"),
        (torch.ones(3, 1, 2, 2), "l2", "norm must be 'spectral' or 'rms', got 'l2'; choose"),
        (np.ones((3, 1, 2, 2)), "rms", "jacobians must be a torch tensor"),
    ],
)
def test_wrong_arguments_get_a_sentence(jacobians: Tensor, norm: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        log_gain_map(jacobians, norm)


@pytest.mark.parametrize(("size", "steps"), [(24, 60), (200, 30)])
def test_products_in_float32_are_those_in_float64(size: int, steps: int) -> None:
    """Matrices that lose rank as a recurrent layer does: spread gains along turning directions."""
    turn, spread = orthogonal(size), torch.logspace(0, -0.5, size, dtype=torch.float64)
    jacobians = turn @ torch.diag(spread) @ turn.T + gaussian(steps, size, gain=0.1, seed=3)
    exact = log_gains(DenseOperator(jacobians), range(0, steps, 5))
    rough = log_gains(DenseOperator(jacobians.float()), range(0, steps, 5))
    for norm, values in exact.items():
        assert (rough[norm] - values).abs().nan_to_num().max() < 2e-4


def test_strided_sources_are_rows_of_the_full_map() -> None:
    jacobians = gaussian(20, 6)
    full = log_gains(DenseOperator(jacobians), range(20))
    strided = log_gains(DenseOperator(jacobians), range(0, 20, 3))
    for norm, values in full.items():
        assert torch.allclose(strided[norm], values[:, ::3], rtol=1e-12, atol=0, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(2, 12))
def test_gains_do_not_depend_on_the_basis(seed: int, size: int, steps: int) -> None:
    jacobians, turn = gaussian(steps, size, seed=seed), orthogonal(size, seed)
    for norm in ("spectral", "rms"):
        turned = log_gain_map(turn @ jacobians @ turn.T, norm)
        assert_maps_close(turned, log_gain_map(jacobians, norm), 1e-9)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(-60, 60))
def test_scaling_every_step_tilts_the_map(seed: int, log_scale: float) -> None:
    jacobians = gaussian(10, 4, seed=seed)
    tilted = log_gain_map(jacobians * math.exp(log_scale))
    lags = torch.arange(10)[None, :] - torch.arange(10)[:, None]
    assert_maps_close(tilted, log_gain_map(jacobians) + lags.double() * log_scale, 1e-8)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_push_and_pull_are_adjoint(seed: int) -> None:
    operator = DenseOperator(gaussian(3, 5, batch=2, seed=seed))
    u, v = gaussian(1, 5, batch=2, seed=seed + 1)[0], gaussian(1, 5, batch=2, seed=seed + 2)[0]
    pushed, pulled = operator.push(1, v), operator.pull(1, u)
    left, right = (u * pushed).sum(-1), (pulled * v).sum(-1)
    assert torch.allclose(left, right, rtol=1e-10, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.2, 3.0))
def test_tanh_network_never_exceeds_the_norm_of_its_weights(seed: int, gain: float) -> None:
    weight, h = gaussian(1, 6, gain=gain, seed=seed)[0, 0], torch.zeros(6).double()
    steps = []
    for x in gaussian(15, 6, gain=2.0, seed=seed + 1)[:, 0, 0]:
        h = torch.tanh(weight @ h + x)
        steps.append((1 - h * h)[:, None] * weight)
    gains = log_gain_map(torch.stack(steps)[:, None])[0]
    lags = torch.arange(15)[None, :] - torch.arange(15)[:, None]
    bound = lags * torch.linalg.matrix_norm(weight, 2).log()
    assert ((gains <= bound + 1e-9) | gains.isnan()).all()


# ----------------------------------------------------------------------------- singular values


def log_singular(jacobians: Tensor, most_work: float = math.inf) -> np.ndarray:
    """ln of the singular values of the product of all steps."""
    steps = len(jacobians)
    operator = DenseOperator(jacobians)
    return log_singular_along(operator, range(steps), [steps], most_work=most_work)[0][-1]


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.6])
def test_singular_values_equal_those_of_the_product(gain: float) -> None:
    jacobians = gaussian(6, 12, gain=gain)
    product = torch.linalg.multi_dot([jacobians[t, 0] for t in reversed(range(6))])
    values = log_singular(jacobians)
    assert values == pytest.approx(torch.linalg.svdvals(product).log().numpy(), abs=1e-6)


def test_small_directions_are_counted_beside_huge_ones() -> None:
    sizes = torch.tensor([2.0, 1.0, 0.9, 0.5], dtype=torch.float64)
    turn = orthogonal(4)
    jacobians = repeated(turn @ torch.diag(sizes) @ turn.T, 200)
    values = log_singular(jacobians)
    # float64 alone would drown all but the first, 2^200, in its rounding
    assert values == pytest.approx(200 * sizes.log().numpy(), abs=1e-6)
    assert survivors(values) == 2


def test_singular_values_of_a_cut_product_are_zero() -> None:
    jacobians = gaussian(5, 3)
    jacobians[2] = 0
    assert np.isneginf(log_singular(jacobians)).all()


def test_singular_values_give_up_where_the_work_is_too_much() -> None:
    values = log_singular(gaussian(5, 4), most_work=100.0)
    assert np.isnan(values).all()
