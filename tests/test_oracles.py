"""The oracles are held against torch's fused modules, each other and closed forms."""

from __future__ import annotations

import cases
import compare
import oracles
import pytest
import torch
from cases import CASES, EXACT_CASES, Case
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_the_unrolled_loop_returns_what_the_fused_module_returns(case: Case) -> None:
    setup = cases.build(case)
    torch.manual_seed(5)
    returned, _ = cases.call(setup)
    unrolled = cases.oracle(case)
    for fused, slow in zip(returned, (unrolled.output, unrolled.h_n, unrolled.c_n), strict=True):
        if slow is None:
            assert fused is None
            continue
        compare.assert_whole_close(slow, fused, bound=1e-12)


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_its_gradients_rebuild_the_fused_parameter_gradients(case: Case) -> None:
    setup = cases.build(case)
    torch.manual_seed(5)
    returned, _ = cases.call(setup)
    cases.loss_of(setup, returned).backward()
    unrolled, grads = cases.oracle(case), cases.oracle_grads(case)
    for suffix, layer in unrolled.layers.items():
        found = grads[suffix]
        x, h = torch.stack(layer.inputs), torch.stack(layer.h_before)
        compare.assert_whole_close(
            torch.einsum("tbg,tbi->gi", found.delta, x),
            getattr(setup.module, f"weight_ih_{suffix}").grad,
            what=f"weight_ih_{suffix}",
        )
        compare.assert_whole_close(
            torch.einsum("tbg,tbh->gh", found.delta_hh, h),
            getattr(setup.module, f"weight_hh_{suffix}").grad,
            what=f"weight_hh_{suffix}",
        )


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_phantom_inputs_give_the_same_totals(case: Case) -> None:
    unrolled, grads = cases.oracle(case), cases.oracle_grads(case)
    grad_c_n = cases.arriving(case)[2]
    for place, (suffix, layer) in enumerate(unrolled.layers.items()):
        end = None if grad_c_n is None else grad_c_n[place]
        totals = oracles.phantom_totals(layer, grads[suffix].direct, end)
        totals[~layer.mask] = float("nan")
        compare.assert_steps_close(totals, grads[suffix].h, layer.mask, what=suffix)


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_jacobians_pull_a_seed_at_the_end_back_as_autograd_does(case: Case) -> None:
    """a_{t−1} = A_tᵀ a_t composes, and its h block is what e.g. grad_h − direct must be."""
    for layer in cases.oracle(case).layers.values():
        jacobians = oracles.dense_jacobians(layer)
        assert jacobians.shape[:2] == layer.mask.shape
        ends = [layer.h] if layer.c0 is None else [layer.h, layer.c]
        starts = [layer.h0] if layer.c0 is None else [layer.h0, layer.c0]
        for b, length in enumerate(layer.lengths.tolist()):
            end = 0 if layer.reverse else length - 1
            seeds = [torch.zeros_like(x[end]) for x in ends]
            for seed, weight in zip(seeds, (1.0, -0.5), strict=False):
                seed[b] = weight
            # through h only where h depends on c in the graph: seed h, c of the joint state
            pulled = torch.cat([seed[b] for seed in seeds])
            for p in reversed(range(length)):
                pulled = jacobians[p, b].T @ pulled
            heads = [x[end] for x in ends]
            found = torch.autograd.grad(heads, starts, seeds, retain_graph=True, allow_unused=True)
            want = torch.cat([g[b] for g in found if g is not None])
            compare.assert_whole_close(pulled, want, what=f"{layer.name} sequence {b}")


def test_a_scalar_linear_network_has_its_closed_form() -> None:
    """h_t = 0.9 h_{t−1}, L = h_T: ∂L/∂h_t = 0.9^(T−t), and a hook on the output shows only 0."""
    rnn = nn.RNN(1, 1, nonlinearity="relu", bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(0.9)
        rnn.weight_ih_l0.fill_(1.0)
    unrolled = oracles.unroll(rnn, torch.ones(50, 1, 1))
    grads = oracles.pull_back(unrolled, (None, torch.ones(1, 1, 1), None))["l0"]
    powers = 0.9 ** torch.arange(49, -1, -1, dtype=torch.float64)
    compare.assert_steps_close(grads.h, powers[:, None, None], torch.ones(50, 1, dtype=torch.bool))
    assert grads.direct[:-1].count_nonzero() == 0


def test_keep_one_step_keeps_one_step() -> None:
    lengths = torch.tensor([3, 1])
    output = torch.ones(3, 2, 4)
    output[:, 1][1:] = 0
    h_n = torch.ones(2, 2, 2)
    last = oracles.keep_one_step((output, h_n, None), lengths, True, last=True)
    assert last[0][:, :, 0].tolist() == [[0, 1], [0, 0], [1, 0]]
    assert last[1][:, :, 0].tolist() == [[1, 1], [0, 1]]
    first = oracles.keep_one_step((output, h_n, None), lengths, True, last=False)
    assert first[0][:, :, 0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert first[1][:, :, 0].tolist() == [[0, 1], [1, 1]]


def test_case_ids_are_unique() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


def test_the_vanishing_cases_vanish() -> None:
    """Or the matrix would not hold a gradient that an absolute tolerance cannot see."""
    smallest = [
        float(grads.h[0].abs().max())
        for case in CASES
        for grads in cases.oracle_grads(case).values()
        if case.loss == "last"
    ]
    assert any(0 < value < 1e-200 for value in smallest)
    assert any(value > 1e50 for value in smallest)
