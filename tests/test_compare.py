"""Each comparison helper is shown to fail, or its passing would say nothing."""

from __future__ import annotations

from collections.abc import Callable

import compare
import pytest
import torch
from torch import Tensor

MASK = torch.ones(4, 2, dtype=torch.bool)
MASK[3, 1] = False


def steps_array() -> Tensor:
    torch.manual_seed(0)
    # each step is 1e-60 of the next: the first is a vanished gradient
    levels = torch.tensor([1e-200, 1e-140, 1e-70, 1.0], dtype=torch.float64)
    array = torch.rand(4, 2, 3, dtype=torch.float64).add(0.5) * levels[:, None, None]
    array[~MASK] = float("nan")
    return array


def zero_vanished(x: Tensor) -> None:
    x[0] = 0


def nudge(x: Tensor) -> None:
    x[1, 0, x[1, 0].argmax()] *= 1 + 1e-9


def put_nan(x: Tensor) -> None:
    x[2, 1, 0] = float("nan")


def put_inf(x: Tensor) -> None:
    x[2, 1, 0] = float("inf")


def fill_padding(x: Tensor) -> None:
    x[3, 1, 0] = 0


def flip_sign(x: Tensor) -> None:
    x[0, 0, 0] *= -1


PERTURBATIONS = [zero_vanished, nudge, put_nan, put_inf, fill_padding, flip_sign]


def test_equal_arrays_pass() -> None:
    compare.assert_steps_close(steps_array(), steps_array(), MASK)


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=lambda f: f.__name__)
def test_a_perturbed_step_fails(perturb: Callable[[Tensor], None]) -> None:
    wrong = steps_array()
    perturb(wrong)
    with pytest.raises(AssertionError, match=r"entries (differ|of real steps|of padded steps)"):
        compare.assert_steps_close(wrong, steps_array(), MASK)


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=lambda f: f.__name__)
def test_a_perturbed_jacobian_fails(perturb: Callable[[Tensor], None]) -> None:
    right = steps_array()[..., None].expand(-1, -1, -1, 3).clone()
    compare.assert_jacobians_close(right.clone(), right, MASK)
    wrong = right.clone()
    perturb(wrong[..., 0])
    with pytest.raises(AssertionError, match=r"entries (differ|of real steps|of padded steps)"):
        compare.assert_jacobians_close(wrong, right, MASK)


def test_a_jacobian_in_float32_fails() -> None:
    right = steps_array()[..., None]
    with pytest.raises(AssertionError, match="float64 is expected"):
        compare.assert_jacobians_close(right.float(), right, MASK)


def test_a_value_where_the_oracle_is_exactly_zero_fails() -> None:
    with pytest.raises(AssertionError, match="differ"):
        compare.assert_steps_close(
            torch.full((1, 1, 2), 5e-324, dtype=torch.float64),
            torch.zeros(1, 1, 2, dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.bool),
        )


@pytest.mark.parametrize("factor", [1 + 2e-4, 0.0, float("nan")])
def test_float32_fails_on_what_float32_can_hold(factor: float) -> None:
    right = torch.tensor([[[1e-28, 2e-28]]])
    one = torch.ones(1, 1, dtype=torch.bool)
    compare.assert_steps_close(right * (1 + 1e-5), right, one)
    with pytest.raises(AssertionError, match=r"differ|not finite"):
        compare.assert_steps_close(right * factor, right, one)


def test_float32_below_its_range_must_still_be_small() -> None:
    right = torch.tensor([[[1e-40]]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    compare.assert_steps_close(torch.zeros(1, 1, 1), right, one)
    with pytest.raises(AssertionError, match="differ"):
        compare.assert_steps_close(torch.full((1, 1, 1), 1e-20), right, one)


def test_a_wrong_shape_fails() -> None:
    with pytest.raises(AssertionError, match=r"shape \(4, 2, 2\) where \(4, 2, 3\) is expected"):
        compare.assert_steps_close(steps_array()[..., :2], steps_array(), MASK)


@pytest.mark.parametrize("perturb", [nudge, put_nan], ids=lambda f: f.__name__)
def test_a_perturbed_sum_fails(perturb: Callable[[Tensor], None]) -> None:
    right = torch.rand(3, 2, 3, dtype=torch.float64).add(1)
    compare.assert_whole_close(right, right.clone())
    wrong = right.clone()
    wrong[1, 0, 0] = right.max()
    right = wrong.clone()
    perturb(wrong)
    with pytest.raises(AssertionError, match=r"differ|not finite"):
        compare.assert_whole_close(wrong, right)


def test_a_failure_says_where_and_by_what_ratio() -> None:
    wrong = steps_array()
    wrong[1, 0, 2] *= 2
    text = r"grad_h: 1 of 24 entries differ(.|\n)*\(1, 0, 2\).*ratio 2,"
    with pytest.raises(AssertionError, match=text):
        compare.assert_steps_close(wrong, steps_array(), MASK, what="grad_h")
