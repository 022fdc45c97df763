"""Linear recurrences against explicit float64 loops under autograd, with no absolute tolerance."""

from __future__ import annotations

import pytest
import torch
from linear_oracles import CASES, Case, elementwise, gated_delta, graded, matrices, unrolled
from seam import LinearSteps, side_by_side
from torch import Tensor

from gradflow.errors import InputError

EXACT = 1e-12


def same(found: Tensor, expected: Tensor, bound: float = EXACT) -> bool:
    """Every step within `bound` of its own largest entry: a vanished step counts as much as any."""
    found, expected = found.flatten(1), expected.flatten(1)
    size = expected.abs().amax(1, keepdim=True)
    return bool(((found - expected).abs() <= bound * size).all())


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found = request.param
    assert isinstance(found, Case)
    return found


def test_states_and_totals_are_those_of_the_loop(case: Case) -> None:
    steps = case.steps()
    states, y = unrolled(steps)
    loss = graded(y)
    (grad,) = torch.autograd.grad(loss, y, retain_graph=True)
    loss.backward()
    with torch.no_grad():
        found = steps.states()
        total = steps.totals(steps.direct(found, grad))
    assert same(found.flatten(2), torch.stack(states))
    expected = torch.stack([state.grad for state in states])  # type: ignore[misc]
    assert same(total.flatten(2), expected)


def test_a_wrong_decay_would_be_seen(case: Case) -> None:
    steps = case.steps()
    states, _ = unrolled(steps)
    changed = steps.decay.clone()
    changed[2] *= 1 + 1e-9
    other = LinearSteps(**vars(steps) | {"decay": changed})
    assert not same(other.states().flatten(2), torch.stack(states))


def test_push_and_pull_are_products_with_the_matrix(case: Case) -> None:
    steps, every = case.steps(), matrices(case.steps())
    block = torch.randn(steps.batch, 5, steps.size, dtype=torch.float64).to(steps.dtype)
    for t in range(steps.length):
        assert same(steps.push(t, block), block @ every[t].mT)
        assert same(steps.pull(t, block), block @ every[t].conj())


def test_of_some_sequences_and_in_another_precision() -> None:
    steps = gated_delta()
    one = steps.of(torch.tensor([1])).to(torch.float32)
    block = torch.randn(1, 2, steps.size)
    expected = block.double() @ matrices(steps)[3, 1:].mT
    assert one.dtype == torch.float32
    assert same(one.push(3, block).double(), expected, 1e-5)


def test_masked_steps_let_nothing_through() -> None:
    steps = gated_delta()
    kept = torch.ones(steps.length, steps.batch, dtype=torch.bool)
    kept[2, 0] = False
    found = steps.masked(kept).push(2, torch.ones(2, 1, steps.size, dtype=torch.float64))
    assert not bool(found[0].any())
    assert bool(found[1].any())


def test_pieces_one_after_the_other_are_the_whole() -> None:
    steps = elementwise()
    cut = [
        LinearSteps(shape=steps.shape, decay=steps.decay[a:b]) for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    assert torch.equal(side_by_side(cut, time=True).decay, steps.decay)


def test_gated_delta_steps_have_the_singular_values_of_the_papers() -> None:
    """σ = e^g, d − 1 times, and e^g |1 − β| (Yang et al. 2024, gated delta networks)."""
    steps = gated_delta()
    assert steps.left is not None
    assert steps.right is not None
    heads, d_k, d_v = steps.shape
    decay = steps.decay[4, 1, :, 0, 0]
    beta = (-steps.left / (steps.decay[..., 0] * steps.right)).mean(-1)[4, 1]
    for h in range(heads):
        block = matrices(steps)[4, 1].unflatten(0, steps.shape).unflatten(-1, steps.shape)
        one = block[h, :, 0, h, :, 0]
        values = torch.linalg.svdvals(one)
        assert torch.allclose(values[: d_k - 1], decay[h].expand(d_k - 1), rtol=1e-12, atol=0)
        smallest = decay[h] * (1 - beta[h]).abs()
        assert torch.allclose(values[-1], smallest, rtol=1e-10, atol=0)
    assert d_v == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decay": torch.ones(7, 2, 3, 1, 1)}, r"^decay must be of shape \(T, B, 2, 4, 3\), or 1"),
        ({"decay": torch.ones(7, 2, 2, 4, 3)}, "^decay beside left must be shared by all value"),
        ({"left": None}, "^left and right must be given together"),
        ({"right": torch.ones(7, 2, 2, 5)}, r"^right must be of shape \(T, B, heads, d_k\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | None], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        LinearSteps(**vars(gated_delta()) | change)
