"""Scale and precision: autocast, half weights, a GradScaler, several backwards, gradients of gradients."""

# ruff: noqa: PT031, SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import copy

import compare
import loops
import oracles
import pytest
import torch
from conftest import BFLOAT16_LSTM
from torch import Tensor, nn

import gradflow
from gradflow.errors import GradflowWarning, RecordingError
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}
HALVES = [torch.bfloat16, torch.float16]
HALF_BOUND = 0.1  # of the largest entry of a step, over six steps at 8 bits


def data(steps: int = 6) -> Tensor:
    return torch.randn(steps, 2, 3)


def states_of(cell: nn.Module, x: Tensor) -> list[Tensor]:
    """The h of every step of a loop over a cell."""
    kept, state = [], None
    for x_t in x:
        state = cell(x_t, state)
        kept.append(state[0] if isinstance(state, tuple) else state)
    return kept


def true_totals(module: nn.Module, x: Tensor) -> Tensor:
    """∂L/∂h_t of L = Σ h_T in float64, (T, B, H)."""
    if isinstance(module, nn.RNNBase):
        unrolled = oracles.unroll(module, x.double())
        at_output = torch.zeros_like(unrolled.output)
        at_output[-1] = 1.0
        return oracles.pull_back(unrolled, (at_output, None, None))["l0"].h
    kept = states_of(copy.deepcopy(module).double(), x.double())
    for h in kept:
        h.retain_grad()
    kept[-1].sum().backward()
    return torch.stack([h.grad for h in kept])


def check_half(recording: Recording, name: str, want: Tensor) -> None:
    track = recording[name]
    found = track.grad_h.float()
    compare.assert_steps_close(found, want, track.mask, what="grad_h", bound=HALF_BOUND)
    assert track.parity.status == "passed", track.parity
    assert track.parity.reason == "within 0.05 of the largest entry"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_over_a_cell_under_autocast(kind: str, dtype: torch.dtype) -> None:
    cell, x = CELLS[kind](3, 4), data()
    with gradflow.record(cell) as recording:
        with torch.autocast("cpu", dtype=dtype):
            last = states_of(cell, x)[-1]
        last.float().sum().backward()
    check_half(recording, "cell", true_totals(cell, x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_under_autocast(kind: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[kind](3, 4), data()
    if kind == "LSTM" and (dtype is torch.float16 or not BFLOAT16_LSTM):
        with torch.autocast("cpu", dtype=dtype), pytest.raises(RuntimeError, match="primitive"):
            layer(x)  # torch itself does not run this
        return
    with gradflow.record(layer) as recording:
        with torch.autocast("cpu", dtype=dtype):
            last = layer(x)[0][-1]
        last.float().sum().backward()
    check_half(recording, "l0", true_totals(layer, x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_over_a_cell_with_half_weights(kind: str, dtype: torch.dtype) -> None:
    cell, x = CELLS[kind](3, 4).to(dtype), data().to(dtype)
    with gradflow.record(cell) as recording:
        states_of(cell, x)[-1].sum().backward()
    assert recording["cell"].grad_h.dtype is dtype
    check_half(recording, "cell", true_totals(cell, x))


def test_autocast_does_not_loosen_the_parity_of_a_call_outside_it() -> None:
    model, x = nn.ModuleDict({"a": nn.GRU(3, 4), "b": nn.GRU(3, 4)}), data()
    with gradflow.record(model) as recording:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = model["a"](x)[0].float()
        (first.sum() + model["b"](x)[0].sum()).backward()
    assert recording["a.l0"].parity.reason == "within 0.05 of the largest entry"
    assert recording["b.l0"].parity.reason == "within 0.001 of the largest entry"


# ----------------------------------------------------------------------------- a GradScaler


def train_scaled(
    model: nn.Module, x: Tensor, scaler: torch.amp.GradScaler, given: object
) -> Recording:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradflow.record(model, scaler=given) as recording:
        scaler.scale(model(x)[0][-1].sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return recording


def test_a_scaler_that_was_given_is_divided_out() -> None:
    model, x = nn.LSTM(3, 4), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    recording = train_scaled(model, x, scaler, scaler)
    assert scaler.get_scale() == 2048.0  # after the backward, whose scale counts
    with gradflow.record(model) as plain:
        model(x)[0][-1].sum().backward()
    assert torch.equal(recording["l0"].grad_h, plain["l0"].grad_h)
    assert recording.notes == []


def test_a_scaler_that_was_not_given_is_noticed() -> None:
    model, x = nn.LSTM(3, 4), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.warns(GradflowWarning, match=r"perhaps scaled: .*by 1024 .*pass scaler=scaler"):
        recording = train_scaled(model, x, scaler, None)
    assert "perhaps scaled" in recording.notes[0]
    assert recording["l0"].parity.status == "passed"
    analysis = gradflow.analyze(recording)
    assert any("perhaps scaled" in note for note in analysis.warnings)


def test_nothing_is_said_without_a_scaler_in_use() -> None:
    """One that is switched off, one of another thread's loss, one used outside the block."""
    model, x = nn.LSTM(3, 4), data()
    off = torch.amp.GradScaler("cpu", enabled=False)
    on = torch.amp.GradScaler("cpu")
    on.scale(model(x)[0].sum()).backward()
    with gradflow.record(model) as recording:
        off.scale(model(x)[0].sum()).backward()
    on.scale(model(x)[0].sum()).backward()
    assert recording.notes == []


def test_the_scaler_itself_is_left_as_found() -> None:
    before, model, x = torch.amp.GradScaler.scale, nn.LSTM(3, 4), data()
    with gradflow.record(model):
        model(x)[0].sum().backward()
        with pytest.raises(KeyboardInterrupt), gradflow.record(model):
            raise KeyboardInterrupt
        assert torch.amp.GradScaler.scale is not before
    assert torch.amp.GradScaler.scale is before


# ------------------------------------------------------- several backwards, gradients of gradients


def test_gradients_that_accumulate_over_chunks_of_a_loop() -> None:
    """Micro-batches, each with a backward of its own: a track each, whose weights have one parity."""
    model = nn.GRU(3, 4, dtype=torch.float64)
    batches = [torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(3)]
    with gradflow.record(model) as recording:
        for x in batches:
            (model(x)[0][-1].sum() / 3).backward()
    assert list(recording.tracks) == ["l0", "l0@2", "l0@3"]
    for track, x in zip(recording.values(), batches, strict=True):
        want = true_totals(model, x) / 3
        compare.assert_steps_close(track.grad_h, want, track.mask, what="grad_h")
        assert (track.backwards, track.parity.status) == (1, "passed")


def test_two_backwards_through_one_loop_over_a_cell_add_up() -> None:
    cell, x = loops.cell_of("GRU"), torch.randn(5, 2, 3, dtype=torch.float64)
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x)
        (found.read[-1][0] ** 2).sum().backward(retain_graph=True)
        found.read[2][0].sum().backward()
    track = recording["cell"]
    compare.assert_steps_close(track.grad_h, found.grad("returned", 0), track.mask)
    assert (track.backwards, track.parity.status) == (2, "passed")


def test_a_penalty_in_one_of_two_calls_spoils_only_that_ones_totals() -> None:
    model = nn.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with gradflow.record(model) as plain:
        model(x)[0].sum().backward()
    with pytest.warns(GradflowWarning, match=r"l0@2: a backward with create_graph=True"):
        with gradflow.record(model) as recording:
            model(x)[0].sum().backward()
            (slope,) = torch.autograd.grad(model(x)[0].sum(), x, create_graph=True)
            slope.pow(2).sum().backward()
    assert torch.equal(recording["l0"].grad_h, plain["l0"].grad_h)
    with pytest.raises(RecordingError, match="create_graph=True"):
        _ = recording["l0@2"].grad_h
    second = recording["l0@2"]
    assert second.parity.status == "not applicable"
    assert second.parity.reason == "a backward with create_graph=True came through the layer"
    assert second.h.isfinite().all()
    assert second.operator().length == 5
