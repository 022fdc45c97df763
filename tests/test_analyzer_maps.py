"""Loss direction, blocks, cell path and blocks, each against dense products or autograd."""

from __future__ import annotations

import math

import cases
import loops
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seam import (
    Blocks,
    DenseOperator,
    log_diagonal_gains,
    log_gains,
    log_loss_gains,
    loss_vectors,
    operator_of,
)
from test_analyzer_products import SEEDS, constant, gaussian, orthogonal
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import analyze, core, plan, products, step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import Parity, Recording, Track

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
BLOCKS = ["hh", "hc", "ch", "cc"]


def assert_logs_close(actual: object, expected: object, bound: float = 1e-9) -> None:
    """Equal where NaN or infinite, elsewhere within the bound."""
    got, want = np.asarray(actual), np.asarray(expected)
    assert np.array_equal(np.isnan(got), np.isnan(want)), "not undefined at the same places"
    assert np.array_equal(np.isinf(got), np.isinf(want)), "not exactly 0 at the same places"
    finite = np.isfinite(want)
    assert np.array_equal(got[np.isinf(want)], want[np.isinf(want)])
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    assert error <= bound, f"ln gains differ by up to {error:.3g}, allowed {bound:.3g}"


def test_the_comparison_sees_an_error() -> None:
    with pytest.raises(AssertionError, match="differ by up to"):
        assert_logs_close([0.0, 1.0], [0.0, 1.0 + 1e-6])
    with pytest.raises(AssertionError, match="exactly 0"):
        assert_logs_close([0.0, -800.0], [0.0, -math.inf])


def record(module: nn.RNNBase, steps: int, batch: int = 2) -> Recording:
    """One training step whose loss reads the last output."""
    x = torch.randn(steps, batch, module.input_size, dtype=module.weight_hh_l0.dtype)
    with gradflow.record(module) as recording:
        module(x)[0][-1].sum().backward()
    return recording


def product(jacobians: Tensor, t: int, target: int) -> Tensor:
    """P(t'←t) of one sequence, jacobians (T, S, S)."""
    result = torch.eye(jacobians.shape[-1], dtype=F64)
    for step in range(t + 1, target + 1):
        result = jacobians[step] @ result
    return result


# ------------------------------------------------------------------------------- loss direction


def loss_plane(jacobians: Tensor, vectors: Tensor) -> np.ndarray:
    """The slow, obvious plane: ‖Pᵀ a‖/‖a‖ for one sequence, (T, T)."""
    steps = len(jacobians)
    result = np.full((steps, steps), np.nan)
    for t in range(steps):
        for target in range(t, steps):
            a = vectors[target]
            if bool((a != 0).any()) and bool(torch.isfinite(a).all()):
                gain = (product(jacobians, t, target).T @ a).norm() / a.norm()
                result[t, target] = gain.log()
    return result


@pytest.mark.parametrize("loss", ["last", "all"])
@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(3, 4, dtype=F64),
        nn.LSTM(3, 4, proj_size=2, dtype=F64),
        nn.GRU(3, 4, dtype=F64),
        nn.RNN(3, 4, dtype=F64),
    ],
    ids=["LSTM", "projected LSTM", "GRU", "RNN"],
)
def test_state_partial_gradients_are_those_of_a_run_that_starts_there(
    module: nn.RNNBase, loss: str
) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 2, 3, dtype=F64)
    with gradflow.record(module) as recording:
        output = module(x)[0]
        weight = torch.randn_like(output)
        if loss == "last":
            weight[:-1] = 0
        (weight * output).sum().backward()
    track = recording["l0"]
    vectors = loss_vectors(track, [0, 1])
    assert vectors is not None
    for t in range(6):
        state = [value[t].clone().requires_grad_() for value in track.states.values()]
        total = (weight[t] * state[0]).sum()
        if t < 5:
            hx = tuple(s[None] for s in state) if len(state) == 2 else state[0][None]
            total = total + (weight[t + 1 :] * module(x[t + 1 :], hx)[0]).sum()
        found = torch.autograd.grad(total, state, allow_unused=True)
        zipped = zip(found, state, strict=True)
        expected = torch.cat([torch.zeros_like(s) if g is None else g for g, s in zipped], 1)
        assert torch.allclose(vectors[t], expected, rtol=1e-10, atol=1e-14 * float(expected.norm()))


@pytest.mark.parametrize("proj", [0, 2])
def test_the_last_cell_state_is_reached_through_h_alone(proj: int) -> None:
    recording = record(nn.LSTM(3, 5, proj_size=proj), 7)
    partial = recording["l0"].partial_grads
    assert partial is not None
    assert bool((partial["c"][-1] == 0).all())  # exactly, though the total is not
    assert bool((recording["l0"].grads["c"][-1] != 0).any())
    assert torch.equal(partial["h"], recording["l0"].grad_h)


CASES = [
    case
    for case in cases.EXACT_CASES
    if case.steps == 7 and (case.layers == 2 or case.proj or case.packed != "no")
][::3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_direction_equals_dense_products(case: cases.Case) -> None:
    analysis = analyze(cases.seen(case).recording, maps=2)
    for layer in analysis.values():
        track = cases.seen(case).recording[layer.name]
        jacobians = step_jacobians(track).nan_to_num()
        for b in layer.data["sequence"].values:
            vectors = loss_vectors(track, [b])
            assert vectors is not None
            expected = loss_plane(jacobians[:, b], vectors[:, 0])
            actual = layer.data["log_gain"].sel(norm="loss", sequence=b)
            assert_logs_close(actual, expected, 1e-8)


@pytest.mark.parametrize("kind", loops.CELLS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_direction_of_a_loop_of_cells(kind: str, masked: bool) -> None:
    cell, x = loops.cell_of(kind), torch.randn(6, 2, loops.INPUTS, dtype=F64)
    mask = torch.rand(2, loops.HIDDEN, dtype=F64)

    def between(t: int, state: loops.State, before: loops.State) -> loops.State:
        return (state[0] * mask, *state[1:])

    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, between if masked else None)
        loops.loss_of(found).backward()
    (track,) = recording.values()
    jacobians, vectors = step_jacobians(track), loss_vectors(track, [0, 1])
    assert vectors is not None
    gains = log_loss_gains(operator_of(track), vectors, range(6), range(6))
    for b in range(2):
        assert_logs_close(gains[b], loss_plane(jacobians[:, b], vectors[:, b]))
    if kind == "LSTM":
        c = track.states["c"]
        through = track.gates["o"] * (1 - c.tanh() ** 2) * track.grad_h
        partial = track.partial_grads
        assert partial is not None
        assert torch.allclose(partial["c"], track.grads["c"] - through, rtol=1e-12, atol=1e-15)


def tapped(lstm: nn.LSTM, x: Tensor, weight: Tensor) -> Track:
    """The same LSTM written by hand, its states marked."""
    u, w, bias = lstm.weight_hh_l0, lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0
    h = c = torch.zeros(x.shape[1], lstm.hidden_size, dtype=F64, requires_grad=True)
    with gradflow.record(nn.Module()) as recording:
        loss = torch.zeros((), dtype=F64)
        for t, x_t in enumerate(x):
            i, f, g, o = (x_t @ w.T + h @ u.T + bias).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h, c = gradflow.tap(h=o.sigmoid() * c.tanh(), c=c)
            loss = loss + (weight[t] * h).sum()
        loss.backward()
    return recording["loop"]


def test_a_tapped_loop_has_the_same_maps_as_the_module_but_no_gates() -> None:
    lstm, x = nn.LSTM(3, 4, dtype=F64), torch.randn(7, 2, 3, dtype=F64)
    weight = torch.randn(7, 2, 4, dtype=F64)
    with gradflow.record(lstm) as recording:
        (weight * lstm(x)[0]).sum().backward()
    track = tapped(lstm, x, weight)
    for name, values in (track.partial_grads or {}).items():
        other = (recording["l0"].partial_grads or {})[name]
        assert torch.allclose(values, other, rtol=1e-11, atol=1e-15)
    for maps, want in zip((make(track), make(recording["l0"])), (False, True), strict=True):
        assert list(maps.block_names) == BLOCKS
        assert np.isfinite(maps.cell_path).any() == want
    loop, module = make(track), make(recording["l0"])
    for actual, expected in zip(loop.planes[:-1], module.planes[:-1], strict=True):
        assert_logs_close(actual, expected, 1e-8)


def make(track: Track, **changes: object) -> plan.Maps:
    """Maps of the first sequence."""
    options = {
        "method": "exact",
        "stride": None,
        "seed": 0,
        "seconds": 8.0,
        "withheld": False,
        "progress": lambda share: None,
    } | changes
    return plan.make_maps(track, [0], **options)  # type: ignore[arg-type]


def test_no_loss_direction_without_a_backward_or_when_withheld(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lstm = nn.LSTM(2, 3)
    with pytest.warns(GradflowWarning), gradflow.record(lstm) as recording:
        lstm(torch.randn(5, 2, 2))
    gains = analyze(recording)["l0"].data["log_gain"]
    assert np.isnan(gains.sel(norm="loss")).all()
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(5, 2, 2))[0].sum().backward()
    assert np.isfinite(analyze(recording)["l0"].data["log_gain"].sel(norm="loss")).any()
    failed = Parity("failed", 1.0, "made up")
    monkeypatch.setattr(Track, "parity", property(lambda track: failed))
    assert np.isnan(analyze(recording)["l0"].data["log_gain"].sel(norm="loss")).all()


def test_loss_direction_leaves_out_steps_that_the_loss_does_not_reach() -> None:
    rnn, x = nn.RNN(2, 3, dtype=F64), torch.randn(6, 1, 2, dtype=F64)
    with gradflow.record(rnn) as recording:
        rnn(x)[0][3].sum().backward()
    gains = analyze(recording)["l0"].data["log_gain"].sel(norm="loss")[0].values
    assert np.isnan(gains[:, 4:]).all()
    assert np.isfinite(gains[:4, 3]).all()
    assert gains[3, 3] == 0


def test_loss_direction_neither_underflows_nor_overflows() -> None:
    for factor in (0.5, 2.0):
        operator = DenseOperator(constant(factor, 1501, torch.float32))
        loss = torch.zeros(1501, 1, 1, dtype=F64)
        loss[-1] = 1e-300
        gain = log_loss_gains(operator, loss, [0], [1500])[0, 0, -1].item()
        assert gain == pytest.approx(1500 * math.log(factor), rel=1e-12)


def test_few_targets_where_the_budget_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(nn.RNN(2, 3, dtype=F64), 40)
    whole = make(recording["l0"]).log_gain["loss"]
    monkeypatch.setattr(plan, "exact_seconds", lambda *sizes: 0.0)
    few = make(recording["l0"], method="auto", seconds=1e-6)
    chosen = np.flatnonzero(np.isfinite(few.log_gain["loss"][0, 0]))
    stride = 39 - chosen[-2]
    assert chosen.tolist() == list(range(39, -1, -stride))[::-1]
    assert f"{plan.ordinal(stride)} step a target of the loss direction" in few.words
    assert_logs_close(few.log_gain["loss"][..., chosen], whole[..., chosen], 1e-12)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 6), st.floats(-40, 40))
def test_loss_gains_in_another_basis_and_scaled(seed: int, size: int, log_scale: float) -> None:
    jacobians, turn = gaussian(7, size, batch=2, seed=seed), orthogonal(size, seed)
    vectors = gaussian(7, size, batch=2, seed=seed + 1)[:, :, 0]
    plain = log_loss_gains(DenseOperator(jacobians), vectors, range(7), range(7))
    turned = turn @ jacobians @ turn.T * math.exp(log_scale)
    found = log_loss_gains(DenseOperator(turned), vectors @ turn.T, range(7), range(7))
    lags = torch.arange(7)[None, :] - torch.arange(7)[:, None]
    assert_logs_close(found, plain + lags.double() * log_scale, 1e-8)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(["LSTM", "GRU", "RNN"]))
def test_products_of_a_layer_are_adjoint(seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    module = getattr(nn, kind)(2, 4, dtype=F64)
    operator = operator_of(record(module, 6)["l0"])
    u, v = torch.randn(2, 2, 3, operator.size, dtype=F64)
    pushed, pulled = v, u
    for t in range(1, 6):
        pushed = operator.push(t, pushed)
        pulled = operator.pull(6 - t, pulled)
    left, right = (u * pushed).sum(-1), (pulled * v).sum(-1)
    assert torch.allclose(left, right, rtol=1e-9, atol=1e-13)


# ------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("proj", [0, 2])
def test_blocks_of_the_product(proj: int) -> None:
    recording = record(nn.LSTM(2, 5, proj_size=proj, dtype=F64), 9)
    layer = analyze(recording, maps=2)["l0"]
    jacobians = step_jacobians(recording["l0"])
    h = proj or 5
    parts = {"h": slice(0, h), "c": slice(h, None)}
    data = layer.data["log_block_gain"]
    assert data["block"].values.tolist() == BLOCKS
    for b in data["sequence"].values:
        for row, column in BLOCKS:
            expected = np.full((9, 9), np.nan)
            for t in range(9):
                for target in range(t, 9):
                    block = product(jacobians[:, b], t, target)[parts[row], parts[column]]
                    expected[t, target] = (block.norm() / math.sqrt(block.shape[1])).log()
            assert_logs_close(data.sel(block=row + column, sequence=b), expected)


def test_products_of_blocks_are_not_blocks_of_the_product() -> None:
    recording = record(nn.LSTM(2, 6, dtype=F64), 40)
    whole = make(recording["l0"])
    hh = step_jacobians(recording["l0"])[:, :1, :6, :6].contiguous()
    alone = log_gains(DenseOperator(hh), [0], ("rms",))["rms"][0, 0, -1].item()
    of_product = whole.blocks[0, 0, 0, -1]
    assert of_product - alone > 10  # e^10 times too small: the path through c is dropped


def test_a_single_state_has_no_blocks_and_no_cell_path() -> None:
    data = analyze(record(nn.GRU(2, 3), 6))["l0"].data
    assert data["log_block_gain"].shape == (0, 1, 6, 6)
    assert np.isnan(data["log_cell_path"]).all()


def test_sizes_of_blocks_add_up_to_the_joint_gain() -> None:
    maps = make(record(nn.LSTM(2, 4, dtype=F64), 12)["l0"])
    squares = np.exp(2 * maps.blocks).sum(0) * 4
    with np.errstate(invalid="ignore"):
        assert_logs_close(np.log(squares / 8) / 2, maps.log_gain["rms"], 1e-9)


# ---------------------------------------------------------------------------------- cell path


def test_cell_path_is_the_product_of_forget_gates() -> None:
    recording = record(nn.LSTM(2, 5, dtype=F64), 12)
    f = recording["l0"].gates["f"]
    for b in range(2):
        expected = np.full((12, 12), np.nan)
        for t in range(12):
            for target in range(t, 12):
                path = f[t + 1 : target + 1, b].prod(0)
                expected[t, target] = (path.norm() / math.sqrt(5)).log()
        maps = plan.make_maps(
            recording["l0"], [b], method="exact", stride=None, seed=0, seconds=1.0,
            withheld=False, progress=lambda share: None,
        )  # fmt: skip
        assert_logs_close(maps.cell_path[0], expected, 1e-12)


def test_without_recurrent_weights_the_cell_path_is_all_there_is() -> None:
    lstm = nn.LSTM(2, 4, dtype=F64)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    maps = make(record(lstm, 30)["l0"])
    share = np.exp(maps.cell_path - maps.blocks[BLOCKS.index("cc")])
    assert np.nanmax(np.abs(share - 1)) < 1e-12


def test_a_shut_forget_gate_is_no_smear() -> None:
    gates = torch.rand(9, 1, 3, dtype=F64)
    gates[4, 0] = 0.0
    gates[6, 0, 1] = 0.0
    gains = log_diagonal_gains(gates, torch.arange(9))[0]
    assert bool(torch.isneginf(gains[:4, 4:]).all())
    for t in range(4, 9):
        for target in range(t, 9):
            path = gates[t + 1 : target + 1, 0].prod(0)
            expected = path.norm().log().item() - math.log(3) / 2
            assert gains[t, target].item() == pytest.approx(expected, abs=1e-12)


def test_units_that_fell_far_behind_are_still_there() -> None:
    gates = torch.full((3001, 1, 2), 0.5, dtype=F64)
    gates[:, 0, 0] = 1.0
    gates[3000, 0, 0] = 0.0  # the leading unit shuts: the other is at 2^-3000
    gains = log_diagonal_gains(gates, torch.tensor([0]))[0, 0]
    assert gains[-1].item() == pytest.approx(-3000 * math.log(2) - math.log(2) / 2, rel=1e-12)


# -------------------------------------------------------------------------------------- walls


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_directions_that_fell_far_behind_are_still_there(dtype: torch.dtype) -> None:
    steps = torch.diag(torch.tensor([1.0, 2.0**-20], dtype=dtype)).expand(101, 1, 2, 2).clone()
    steps[100, 0, 0, 0] = 0.0
    gains = log_gains(DenseOperator(steps), [0, 40], widths=(1, 1))
    for place, lag in enumerate((100, 60)):
        expected = -20 * lag * math.log(2)
        assert gains["spectral"][0, place, -1].item() == pytest.approx(expected, rel=1e-9)
        assert gains["rms"][0, place, -1].item() == pytest.approx(expected - math.log(2) / 2)
        found = gains["blocks"][:, 0, place, -1].tolist()
        assert found == pytest.approx([-math.inf, -math.inf, -math.inf, expected], rel=1e-9)


@pytest.mark.parametrize("wall", [0.0, 1e-30, 1e-300, 1e30])
def test_a_wall_of_matrices_is_not_smeared(wall: float) -> None:
    jacobians = gaussian(24, 8, gain=0.9)
    plain = log_gains(DenseOperator(jacobians), range(24), widths=(3, 5))
    jacobians[12] *= wall
    walled = log_gains(DenseOperator(jacobians), range(24), widths=(3, 5))
    source, target = torch.arange(24)[:, None], torch.arange(24)
    across = (source < 12) & (target >= 12)
    for name, values in walled.items():
        expected = plain[name].masked_fill(across, -math.inf)
        if wall:
            expected = plain[name] + across.double() * math.log(wall)
        assert_logs_close(values, expected, 1e-9)


# ------------------------------------------------------------------------------- long sequences


def test_4096_steps_by_strided_sources_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = nn.RNN(1, 1, dtype=F64)
    track = record(rnn, 4096, 1)["l0"]
    assert plan._Making(track, [0]).least_stride() == 2
    monkeypatch.setattr(plan, "MAP_BYTES", 2**20)
    maps = make(track, method="auto", withheld=True)
    assert maps.words.startswith("exact, every 512th step a source")
    assert sum(plane.nbytes for plane in maps.planes) <= 2**20
    f = step_jacobians(track)[:, 0, 0, 0].abs().log()
    for place, source in enumerate(maps.sources):
        expected = f[source + 1 :].cumsum(0)
        assert_logs_close(maps.log_gain["rms"][0, place, source + 1 :], expected, 1e-9)


def test_blocks_stay_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    jacobians = orthogonal(12).expand(40, 1, -1, -1)
    whole = log_gains(DenseOperator(jacobians), range(40))
    most: list[int] = []
    plain = Blocks.advance

    def watched(blocks: Blocks, step: Tensor) -> None:
        most.append(2 * blocks._now.numel() * 8)
        plain(blocks, step)

    monkeypatch.setattr(products, "BLOCK_BYTES", 8 * 12 * 12 * 16)
    monkeypatch.setattr(Blocks, "advance", watched)
    parts = log_gains(DenseOperator(jacobians), range(40))
    assert max(most) <= products.BLOCK_BYTES
    for norm, values in whole.items():
        assert_logs_close(parts[norm], values, 1e-9)


# -------------------------------------------------------------------------------------- ranks


def linear(weight: Tensor, steps: int) -> Recording:
    """A layer whose step Jacobians are this matrix: tanh at zero."""
    rnn = nn.RNN(1, len(weight), bias=False, dtype=F64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(weight)
    with gradflow.record(rnn) as recording:
        rnn(torch.zeros(steps, 2, 1, dtype=F64))[0][-1].sum().backward()
    return recording


def test_ranks_of_a_diagonal_layer() -> None:
    sizes = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    turn = orthogonal(3)
    data = analyze(linear(turn @ torch.diag(sizes) @ turn.T, 12))["l0"].data
    assert data["rank_lag"].values.tolist() == [1, 2, 4, 8, 11]
    for place, lag in enumerate(data["rank_lag"].values):
        sigma = sizes**lag
        share = sigma / sigma.sum()
        stable = (sigma.square().sum() / sigma[0] ** 2).item()
        effective = (-(share * share.log()).sum()).exp().item()
        assert data["rank_stable"].values[place] == pytest.approx(stable, rel=1e-9)
        assert data["rank_effective"].values[place] == pytest.approx(effective, rel=1e-6)
        assert data["rank_surviving"].values[place] == int((sigma >= 1e-3).sum())


def test_ranks_of_an_orthogonal_layer_do_not_fall() -> None:
    data = analyze(linear(orthogonal(6), 20))["l0"].data
    for name in ("stable", "effective", "surviving"):
        assert data[f"rank_{name}"].values == pytest.approx(np.full(6, 6.0), rel=1e-9)


def test_ranks_of_a_dead_layer() -> None:
    data = analyze(linear(torch.zeros(3, 3, dtype=F64), 5))["l0"].data
    assert data["rank_surviving"].values.tolist() == [0, 0, 0]
    assert np.isnan(data["rank_stable"]).all()
    assert np.isnan(data["rank_effective"]).all()


def test_ranks_within_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "CHANNEL_WORK", 1.0)
    data = analyze(linear(orthogonal(4), 9))["l0"].data
    assert np.isnan(data["rank_effective"]).all()
    assert np.isnan(data["log_singular"]).all()
    assert data["rank_stable"].values == pytest.approx(np.full(4, 4.0))


def test_one_step_has_no_ranks() -> None:
    with pytest.warns(GradflowWarning, match="T = 1"):
        recording = linear(orthogonal(4), 1)
    data = analyze(recording)["l0"].data
    assert data["rank_stable"].shape == (0,)
