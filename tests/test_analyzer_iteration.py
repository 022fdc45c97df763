"""Spectral norms of wide blocks by iteration, against singular values: from any start, at any lag."""

from __future__ import annotations

import math

import pytest
import torch
from seam import DenseOperator, log_gains, spectral_by_iteration
from torch import Tensor

from gradflow.analyzer import norms
from gradflow.limits import NORM_KEPT, NORM_TOLERANCE

F64 = torch.float64
ROWS, COLUMNS = 70, 90


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_singular_values(sizes: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two blocks (2, 70, 90) with these singular values, and their left singular vectors."""
    left = torch.linalg.qr(torch.randn(2, ROWS, ROWS, generator=generator(seed), dtype=F64))[0]
    right = torch.linalg.qr(torch.randn(2, COLUMNS, COLUMNS, generator=generator(2), dtype=F64))[0]
    full = torch.zeros(ROWS, dtype=F64)
    full[: len(sizes)] = sizes
    return left @ torch.diag(full) @ right[:, :, :ROWS].mT, left


def random_start(count: int = 2, rows: int = ROWS) -> Tensor:
    start = torch.randn(count, rows, NORM_KEPT, generator=generator(3), dtype=F64)
    return torch.linalg.qr(start)[0]


SPECTRA = {
    "one direction": torch.tensor([1.0]),
    "one far above": torch.tensor([1e6, 1e-6, 1e-7]),
    "two alike": torch.tensor([1.0, 1.0 - 1e-9, 0.1]),
    "all the same": torch.full((ROWS,), 0.7),
    "half the same": torch.full((ROWS // 2,), 0.7),
    "evenly spread": torch.linspace(1, 0.01, ROWS),
    "hardly spread": torch.linspace(1, 0.98, ROWS),
    "graded": torch.logspace(0, -12, ROWS),
    "an edge": 1 - torch.linspace(0, 1, ROWS) ** 2 * 0.5,
    "tiny": torch.tensor([1e-120, 1e-125], dtype=F64),
    "one above a crowd": torch.cat([torch.tensor([1.02]), torch.ones(ROWS - 1)]),
}


@pytest.mark.parametrize("sizes", SPECTRA.values(), ids=list(SPECTRA))
@pytest.mark.parametrize("begin", ["anywhere", "at the last"])
def test_a_norm_is_within_1e_4_from_any_start(sizes: Tensor, begin: str) -> None:
    blocks, left = with_singular_values(sizes.to(F64))
    start = random_start()
    if begin == "at the last":
        start = left[..., -NORM_KEPT:]
    found, carried, images = spectral_by_iteration(blocks, start)
    error = found / sizes[0] - 1
    assert error.max() <= 1e-12, "a Ritz value is never too large"
    assert error.min() >= -NORM_TOLERANCE
    assert torch.allclose(images, carried.mT @ blocks, rtol=0, atol=1e-12 * float(sizes[0]))
    assert torch.allclose(
        carried.mT @ carried, torch.eye(NORM_KEPT, dtype=F64).expand(2, -1, -1), atol=1e-12
    )


@pytest.mark.parametrize("name", ["evenly spread", "graded", "an edge", "one above a crowd"])
def test_a_direction_that_the_basis_left_out_is_found(name: str) -> None:
    """A basis of the exact singular vectors 2 to 13 sees nothing beside itself."""
    sizes = SPECTRA[name].to(F64)
    blocks, left = with_singular_values(sizes)
    found, basis, _ = spectral_by_iteration(blocks, left[..., 1 : 1 + NORM_KEPT])
    assert (1 - found / sizes[0]).max() <= NORM_TOLERANCE
    if name in ("evenly spread", "graded"):  # the others lie within the tolerance
        assert (basis[..., 0] * left[..., 0]).sum(-1).abs().min() > 0.999


def test_the_tolerance_is_what_is_reached() -> None:
    """A bound a thousand times weaker lets an error through that the comparison above would see."""
    blocks, _ = with_singular_values(SPECTRA["evenly spread"].to(F64))
    found = spectral_by_iteration(blocks, random_start(), tolerance=0.1)[0]
    assert (1 - found).max() > NORM_TOLERANCE


def test_rows_of_very_different_sizes_are_one_block() -> None:
    blocks, _ = with_singular_values(SPECTRA["evenly spread"].to(F64))
    scale = torch.logspace(0, -250, ROWS, dtype=F64).expand(2, -1)
    found, carried, images = spectral_by_iteration(blocks, random_start(), scale=scale)
    scaled = blocks * scale[..., None]
    assert torch.allclose(found, torch.linalg.matrix_norm(scaled, 2), rtol=NORM_TOLERANCE, atol=0)
    assert torch.allclose(images, carried.mT @ scaled, rtol=0, atol=1e-12)


def test_single_precision_is_enough_for_1e_4() -> None:
    blocks, _ = with_singular_values(SPECTRA["an edge"].to(F64))
    found = spectral_by_iteration(blocks.float(), random_start().float())[0]
    assert (found.double() - 1).abs().max() <= NORM_TOLERANCE


def test_the_eigenvectors_are_left_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    exactly = norms._by_eigenvectors
    monkeypatch.setattr(
        norms, "_by_eigenvectors", lambda block: asked.append(block) or exactly(block)
    )
    blocks, left = with_singular_values(SPECTRA["graded"].to(F64))
    spectral_by_iteration(blocks, left[..., :NORM_KEPT])
    assert asked == []
    monkeypatch.setattr(norms, "NORM_STEPS", 1)
    blocks, _ = with_singular_values(SPECTRA["hardly spread"].to(F64))
    spectral_by_iteration(blocks, random_start())
    assert len(asked) == 2


def systems() -> dict[str, Tensor]:
    """Step Jacobians (T, 1, S, S) whose leading direction is hard to follow."""
    size, steps = 72, 30
    noise = torch.randn(steps, size, size, generator=generator(4), dtype=F64) / math.sqrt(size)
    turns = torch.linalg.qr(noise)[0]
    late = torch.full((steps, size), 0.9, dtype=F64)
    late[:15, :14] = 1.0  # these lead first,
    late[15:, 40] = 3.0  # then one that was like all others
    hidden = torch.full((steps, size), 0.9, dtype=F64)
    hidden[:12, 50] = 1e-3  # one that nothing could see any more
    hidden[12:, 50] = 4.0
    crowd = torch.ones(steps, size, dtype=F64)
    crowd[1] = torch.linspace(1, 0.9, size)
    crowd[2:12, 40] = 0.6  # one that is forgotten, and comes back
    crowd[12:22, 40] = 1 / 0.6
    crowd[22:, 40] = 1.03  # to overtake a crowd slowly
    projection = turns.clone()
    projection[10] = projection[10] @ torch.diag((torch.arange(size) % 3 == 0).to(F64))
    matrices = {
        "gaussian": noise,
        "rotations": turns,
        "a projection among rotations": projection,
        "nearly one": torch.eye(size).double() + 0.01 * noise,
        "one overtakes": torch.diag_embed(late),
        "one returns from nothing": torch.diag_embed(hidden),
        "one overtakes a crowd": torch.diag_embed(crowd),
        "the same matrix": noise[:1].expand(steps, -1, -1),
        "shear": (torch.eye(size) + torch.eye(size).roll(1, 0).triu()).double().expand(steps, -1, -1),
    }  # fmt: skip
    return {name: values[:, None].contiguous() for name, values in matrices.items()}


@pytest.mark.parametrize("jacobians", systems().values(), ids=list(systems()))
def test_every_lag_of_a_map_is_within_1e_4(jacobians: Tensor) -> None:
    steps, _, size, _ = jacobians.shape
    found = log_gains(DenseOperator(jacobians), range(steps), ("spectral",))["spectral"][0]
    for source in range(0, steps, 5):
        product = torch.eye(size, dtype=F64)
        for target in range(source + 1, steps):
            product = jacobians[target, 0] @ product
            error = found[source, target].exp() / torch.linalg.matrix_norm(product, 2) - 1
            assert -NORM_TOLERANCE <= error <= 1e-9, (source, target)


def test_images_follow_a_block_whose_largest_rows_die() -> None:
    """Rows with powers of two of their own: the block's scale falls by 300 decades at once."""
    size, steps = 80, 12
    gains = torch.full((steps, size), 0.5, dtype=F64)
    gains[:6, :4] = 1e30
    gains[6, :4] = 0.0
    jacobians = torch.diag_embed(gains)[:, None]
    found = log_gains(DenseOperator(jacobians), [0], ("spectral",))["spectral"][0, 0]
    expected = torch.arange(12, dtype=F64) * math.log(0.5)
    expected[:6] = torch.arange(6, dtype=F64) * math.log(1e30)
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)


def test_sequences_side_by_side_are_maps_of_their_own() -> None:
    jacobians = torch.randn(10, 3, 66, 66, generator=generator(6), dtype=F64) / 8
    jacobians[5:, 1] = math.nan
    together = log_gains(DenseOperator(jacobians), range(10), ("spectral",))["spectral"]
    for b in range(3):
        alone = log_gains(DenseOperator(jacobians[:, b : b + 1]), range(10), ("spectral",))
        assert torch.allclose(
            together[b], alone["spectral"][0], rtol=0, atol=NORM_TOLERANCE, equal_nan=True
        )
