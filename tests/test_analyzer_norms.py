"""Spectral norms that start from the previous lag, against singular values; medians over masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from seam import masked_median
from torch import Tensor

from gradflow.analyzer import norms

ROWS, COLUMNS = 32, 40


def with_singular_values(*values: float) -> tuple[Tensor, Tensor]:
    """Three blocks (3, 32, 40) with these singular values first and 0 after, and their row vectors."""
    generator = torch.Generator().manual_seed(5)
    left = torch.linalg.qr(torch.randn(3, ROWS, ROWS, generator=generator).double())[0]
    right = torch.linalg.qr(torch.randn(3, COLUMNS, COLUMNS, generator=generator).double())[0]
    sizes = torch.zeros(ROWS, dtype=torch.float64)
    sizes[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return left @ torch.diag(sizes) @ right[:, :, :ROWS].mT, left


CASES = {
    "one direction": [1.0],
    "one far above": [1e6, 1e-6, 1e-7],
    "one above": [1.0, 0.8, 0.2],
    "two alike": [1.0, 1.0 - 1e-9, 0.1],
    "two the same": [1.0, 1.0],
    "two outweigh one": [1.0, 0.9, 0.9, 0.9],
    "all the same": [0.7] * ROWS,
    "tiny": [1e-120, 1e-125],
}


@pytest.mark.parametrize("values", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("begin", ["anywhere", "at the second", "at nothing"])
def test_a_spectral_norm_is_exact_from_any_start(values: list[float], begin: str) -> None:
    blocks, left = with_singular_values(*values)
    start = {
        "anywhere": torch.ones(3, ROWS, dtype=torch.float64),
        "at the second": left[:, :, 1],
        "at nothing": torch.zeros(3, ROWS, dtype=torch.float64),
    }[begin]
    found, following = norms.spectral_from(blocks, start)
    error = (found / values[0] - 1).abs().max().item()
    assert error <= 1e-13, f"relative error {error:.3g}"
    again, _ = norms.spectral_from(blocks, following)
    assert (again / values[0] - 1).abs().max().item() <= 1e-13
    assert torch.isfinite(following).all()


def test_a_smaller_singular_value_is_never_taken_for_certain() -> None:
    blocks, left = with_singular_values(1.0, 0.9)
    gram = blocks @ blocks.mT / (1 + 0.9**2)
    theta, _, sure = norms._power(gram, left[:, :, 1])
    assert torch.allclose(
        theta, torch.tensor(0.9**2 / (1 + 0.9**2)).double()
    )  # the iteration is stuck
    assert not sure.any()


def test_the_eigenvalues_of_a_collapsed_product_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    largest = norms._largest
    monkeypatch.setattr(norms, "_largest", lambda gram: asked.append(len(gram)) or largest(gram))
    blocks, _ = with_singular_values(1.0, 0.1)
    norms.spectral_from(blocks, torch.ones(3, ROWS, dtype=torch.float64))
    assert sum(asked) == 0


def test_a_masked_median_is_the_median_of_what_is_real() -> None:
    values = np.array([[3.0, 1.0, 9.0], [3.0, 1.0, 9.0], [-math.inf, 2.0, 5.0], [math.nan, 1, 2]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 1, 1]], dtype=bool)
    assert masked_median(values, mask).tolist() == [3.0, 2.0, -math.inf, 1.5]
    mask = np.array([[True, True], [False, False]])
    unknown = masked_median(np.array([[math.nan, 1.0], [1.0, 2.0]]), mask)
    assert np.isnan(unknown).all()
