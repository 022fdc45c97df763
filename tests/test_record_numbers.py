"""Every number of a `Track`, over the matrix of cases, against the unrolled oracle."""

from __future__ import annotations

import itertools

import cases
import compare
import oracles
import pytest
import torch
from cases import CASES, EXACT_CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradflow
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
matrix = pytest.mark.parametrize("case", CASES, ids=str)
exact_matrix = pytest.mark.parametrize("case", EXACT_CASES, ids=str)


def tracks_and_layers(case: Case) -> list[tuple[Track, oracles.UnrolledLayer]]:
    tracks, layers = cases.seen(case).recording.tracks, cases.oracle(case).layers
    assert list(tracks) == list(layers)
    return [(tracks[name], layers[name]) for name in layers]


def check_names_and_masks(case: Case) -> None:
    for track, layer in tracks_and_layers(case):
        assert track.name == layer.name
        assert track.cell == case.cell
        assert track.reverse is layer.reverse
        assert track.lengths.tolist() == layer.lengths.tolist()
        assert track.mask.dtype == torch.bool
        assert torch.equal(track.mask, layer.mask)
        assert track.cuts.shape == layer.mask.shape
        assert not track.cuts.any()
        assert track.backwards == 1
        assert track.training is True
        assert (track.steps, track.batch, track.hidden) == (*layer.mask.shape, cases.HIDDEN)


def check_states(case: Case) -> None:
    for track, layer in tracks_and_layers(case):
        for array in [*track.states.values(), *track.initial.values(), *track.gates.values()]:
            assert array.dtype == case.torch_dtype
            assert not array.requires_grad
        compare.assert_steps_close(track.h, torch.stack(layer.h), layer.mask, what="h")
        compare.assert_whole_close(track.h0, layer.h0, what="h0")
        inputs = torch.stack(layer.inputs)
        compare.assert_steps_close(track.inputs, inputs, layer.mask, what="inputs")
        if layer.c0 is None:
            assert track.c is None
            assert track.c0 is None
            assert set(track.states) == {"h"}
            continue
        assert set(track.states) == {"h", "c"}
        compare.assert_steps_close(track.c, torch.stack(layer.c), layer.mask, what="c")
        compare.assert_whole_close(track.c0, layer.c0, what="c0")


def check_gates(case: Case) -> None:
    for track, layer in tracks_and_layers(case):
        assert list(track.gates) == list(layer.gates[0])
        for gate, values in track.gates.items():
            expected = torch.stack([gates[gate] for gates in layer.gates])
            compare.assert_steps_close(values, expected, layer.mask, what=f"gate {gate}")


def check_totals(case: Case) -> None:
    found = cases.oracle_grads(case)
    for track, layer in tracks_and_layers(case):
        compare.assert_steps_close(track.grad_h, found[layer.name].h, layer.mask, what="grad_h")
        if layer.c0 is None:
            assert track.grad_c is None
            assert set(track.grads) == {"h"}
        else:
            compare.assert_steps_close(track.grad_c, found[layer.name].c, layer.mask, what="grad_c")


def check_direct_and_delta(case: Case) -> None:
    found = cases.oracle_grads(case)
    for track, layer in tracks_and_layers(case):
        want, mask = found[layer.name], layer.mask
        compare.assert_steps_close(track.grad_h_direct, want.direct, mask, what="grad_h_direct")
        compare.assert_steps_close(track.delta, want.delta, mask, what="delta")
        compare.assert_steps_close(track.delta_hh, want.delta_hh, mask, what="delta_hh")


def check_last(case: Case) -> None:
    for track, layer in tracks_and_layers(case):
        want = cases.oracle_last(case, layer.reverse)[layer.name]
        assert track.grad_h_last is not None
        compare.assert_steps_close(track.grad_h_last, want.h, layer.mask, what="grad_h_last")
        if layer.c0 is None:
            assert track.grad_c_last is None
        else:
            compare.assert_steps_close(track.grad_c_last, want.c, layer.mask, what="grad_c_last")


def check_parameter_gradients(case: Case) -> None:
    seen = cases.seen(case)
    for track, layer in tracks_and_layers(case):
        assert track.parity.status == "passed", track.parity
        assert track.parity.error is not None
        assert track.parity.error <= (1e-8 if case.dtype == "float64" else 1e-3)
        x, before = track.inputs.nan_to_num(), states_before(track).nan_to_num()
        delta, delta_hh = track.delta.nan_to_num(), track.delta_hh.nan_to_num()
        rebuilt = {
            "weight_ih": torch.einsum("tbg,tbi->gi", delta, x),
            "weight_hh": torch.einsum("tbg,tbh->gh", delta_hh, before),
            "bias_ih": delta.sum((0, 1)),
            "bias_hh": delta_hh.sum((0, 1)),
        }
        for name, value in rebuilt.items():
            grad = seen.param_grads.get(f"{name}_{layer.name}")
            if name.startswith("weight") or case.bias:
                assert grad is not None
                compare.assert_whole_close(value, grad, what=name)
            else:
                assert grad is None


def states_before(track: Track) -> Tensor:
    """h of the step processed before, (T, B, P): h_{t−1}, or h_{t+1} for a reverse direction."""
    before = torch.empty_like(track.h)
    for b, length in enumerate(track.lengths.tolist()):
        order = list(range(length))[:: -1 if track.reverse else 1]
        before[:, b] = float("nan")
        before[order[0], b] = track.h0[b]
        for earlier, later in itertools.pairwise(order):
            before[later, b] = track.h[earlier, b]
    return before


def check_operator(case: Case) -> None:
    """push and pull are the dense autograd Jacobian and its transpose, on chosen sequences too."""
    bound = 1e-4 if case.dtype == "float32" else None
    for track, layer in tracks_and_layers(case):
        chosen = torch.tensor([layer.lengths.shape[0] - 1, 0]).unique()
        dense, mask = cases.oracle_jacobians(case)[layer.name][:, chosen], layer.mask[:, chosen]
        operator = track.operator(torch.float64, chosen)
        size = dense.shape[-1]
        assert (operator.length, operator.batch, operator.size) == (len(dense), len(chosen), size)
        assert operator.dtype == torch.float64
        block, other = torch.randn(2, len(chosen), 3, size, dtype=torch.float64)
        pushed = torch.stack([operator.push(p, block) for p in range(len(dense))])
        pulled = torch.stack([operator.pull(p, other) for p in range(len(dense))])
        inner = (pushed * other - block * pulled).sum((2, 3)).abs()
        limit = 1e-12 * ((pushed * other).abs() + (block * pulled).abs()).sum((2, 3))
        assert (inner <= limit)[mask].all(), "pull is not the transpose of push"
        pushed[~mask] = pulled[~mask] = float("nan")  # what they give past the end is not promised
        want = block @ dense.transpose(2, 3)
        compare.assert_steps_close(pushed, want, mask, what="push", bound=bound)
        compare.assert_steps_close(pulled, other @ dense, mask, what="pull", bound=bound)


def check_jacobians(case: Case) -> None:
    bound = 1e-4 if case.dtype == "float32" else None
    for track, layer in tracks_and_layers(case):
        found = gradflow.analyzer.step_jacobians(track)
        dense = cases.oracle_jacobians(case)[layer.name]
        compare.assert_jacobians_close(found, dense, layer.mask, bound=bound)


def check_phantom(case: Case) -> None:
    """The second oracle, which runs the fused kernel itself."""
    grad_c_n = cases.arriving(case)[2]
    for place, (track, layer) in enumerate(tracks_and_layers(case)):
        end = None if grad_c_n is None else grad_c_n[place]
        totals = oracles.phantom_totals(layer, track.grad_h_direct.nan_to_num(), end)
        compare.assert_steps_close(track.grad_h, totals, layer.mask, what="grad_h")


CHECKS = [
    check_names_and_masks,
    check_states,
    check_gates,
    check_totals,
    check_direct_and_delta,
    check_last,
    check_parameter_gradients,
    check_operator,
    check_jacobians,
]


@matrix
def test_names_lengths_masks_and_cuts(case: Case) -> None:
    check_names_and_masks(case)


@matrix
def test_states(case: Case) -> None:
    check_states(case)


@matrix
def test_gates(case: Case) -> None:
    check_gates(case)


@matrix
def test_total_gradients(case: Case) -> None:
    check_totals(case)


@matrix
def test_direct_part_and_pre_activation_gradients(case: Case) -> None:
    check_direct_and_delta(case)


@matrix
def test_the_last_loss_step_alone(case: Case) -> None:
    check_last(case)


@matrix
def test_parameter_gradients_are_rebuilt(case: Case) -> None:
    check_parameter_gradients(case)


@exact_matrix
def test_totals_against_the_phantom_input(case: Case) -> None:
    check_phantom(case)


@matrix
def test_push_and_pull(case: Case) -> None:
    check_operator(case)


@matrix
def test_step_jacobians(case: Case) -> None:
    check_jacobians(case)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Any combination torch itself accepts."""
    cell = draw(st.sampled_from(cases.CELLS))
    layers = draw(st.integers(1, 3))
    layout = draw(st.sampled_from(["time_first", "batch_first", "unbatched"]))
    packings = ["no"] if layout == "unbatched" else ["no", "sorted", "unsorted"]
    return Case(
        cell=cell,
        layers=layers,
        bidirectional=draw(st.booleans()),
        layout=layout,
        packed=draw(st.sampled_from(packings)),
        proj=draw(st.integers(0, cases.HIDDEN - 1)) if cell == cases.LSTM else 0,
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])) if layers > 1 else 0.0,
        initial=draw(st.booleans()),
        loss=draw(st.sampled_from(cases.LOSSES)),
        dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        steps=draw(st.integers(2, 9)),
        batch=draw(st.integers(1, 5)),
        scale=draw(st.sampled_from([1.0, 0.01, 3.0])),
        seed=draw(st.integers(0, 50)),
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=drawn_cases())
def test_any_drawn_combination(case: Case) -> None:
    for check in CHECKS:
        check(case)
    if case.dtype == "float64":
        check_phantom(case)
