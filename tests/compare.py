"""Comparison helpers for gradients: never an absolute tolerance.

A gradient of 1e-200 passes any ``atol``, also when it should have been 0 or 1e-150. So every step
of every sequence is held against the largest entry of that same step and sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT64_BOUND = 1e-10
FLOAT32_BOUND = 1e-4
FLOAT32_SMALLEST = 1e-30  # float32 arithmetic holds no ratios below this
SHOWN = 5  # entries that a failure prints


def assert_steps_close(
    actual: Tensor,
    expected: Tensor,
    mask: Tensor,
    *,
    what: str = "array",
    bound: float | None = None,
    smallest: float | None = None,
) -> None:
    """|actual − expected| ≤ bound · max|expected of that step and sequence|; NaN only on padding.

    Both are (T, B, ·), mask is (T, B). The bound follows actual's dtype; expected is the oracle and
    may be anything on padding. A step whose oracle is exactly 0 must be exactly 0. In float32,
    steps whose largest entry is below 1e-30 must merely be that small too.
    """
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(actual.shape)} where {tuple(expected.shape)} is expected"
    )
    single = actual.dtype != torch.float64
    bound = (FLOAT32_BOUND if single else FLOAT64_BOUND) if bound is None else bound
    smallest = (FLOAT32_SMALLEST if single else 0.0) if smallest is None else smallest
    assert_nan_exactly_on_padding(actual, mask, what=what)
    got = actual.detach().double().flatten(2).cpu()
    want = expected.detach().double().flatten(2)
    scale = want.abs().amax(dim=2, keepdim=True).expand_as(want)
    limit = torch.where(scale > smallest, bound * scale, torch.full_like(scale, smallest))
    wrong = ((got - want).abs() > limit) & mask[:, :, None]
    _report(wrong, got, want, scale, what)


def assert_nan_exactly_on_padding(actual: Tensor, mask: Tensor, *, what: str = "array") -> None:
    """Every entry of a padded step is NaN, and no entry of a real step is NaN or infinite."""
    flat = actual.detach().flatten(2).cpu()
    not_finite = ~torch.isfinite(flat) & mask[:, :, None]
    assert not not_finite.any(), (
        f"{what}: {int(not_finite.sum())} entries of real steps are not finite, first at "
        f"(step, sequence, entry) {tuple(not_finite.nonzero()[0].tolist())}"
    )
    filled = ~torch.isnan(flat) & ~mask[:, :, None]
    assert not filled.any(), (
        f"{what}: {int(filled.sum())} entries of padded steps are not NaN, first at "
        f"(step, sequence, entry) {tuple(filled.nonzero()[0].tolist())}"
    )


def assert_whole_close(
    actual: Tensor, expected: Tensor, *, what: str = "array", bound: float | None = None
) -> None:
    """|actual − expected| ≤ bound · max|expected| over the whole array: for sums over steps."""
    one = torch.ones(1, 1, dtype=torch.bool)
    assert_steps_close(
        actual.reshape(1, 1, -1), expected.reshape(1, 1, -1), one, what=what, bound=bound
    )


def assert_jacobians_close(
    actual: Tensor, expected: Tensor, mask: Tensor, *, what: str = "A", bound: float | None = None
) -> None:
    """Like `assert_steps_close`, for (T, B, S, S); the scale is each matrix's largest entry."""
    assert actual.dtype == torch.float64, f"{what}: dtype {actual.dtype} where float64 is expected"
    assert actual.dim() == 4, f"{what}: {actual.dim()} axes where (T, B, S, S) is expected"
    assert_steps_close(actual, expected, mask, what=what, bound=bound)


def _report(wrong: Tensor, got: Tensor, want: Tensor, scale: Tensor, what: str) -> None:
    if not wrong.any():
        return
    count = f"{int(wrong.sum())} of {wrong.numel()}"
    lines = [f"{what}: {count} entries differ (step, sequence, entry):"]
    for place in wrong.nonzero()[:SHOWN].tolist():
        a, e, s = (float(x[tuple(place)]) for x in (got, want, scale))
        ratio = a / e if e else float("nan")
        error = abs(a - e) / s if s else float("inf")
        lines.append(
            f"  {tuple(place)}: got {a:.17g}, expected {e:.17g}, ratio {ratio:.12g}, "
            f"error / largest entry of the step {error:.3g}"
        )
    raise AssertionError("\n".join(lines))
