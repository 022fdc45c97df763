"""Cells of the user's own, found by themselves.

Oracles: retain_grad on the states of the user's own graph, dense Jacobians of one step with
independent states by torch.autograd.functional.jacobian. All in float64.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from compare import assert_jacobians_close, assert_steps_close
from own_cells import BATCH, CELLS, HIDDEN, INPUTS, STEPS, Case, FromScratch, MinimalGated
from seam import KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.errors import GradflowWarning, RecordingError
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
States = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    if "torch._dynamo" in sys.modules:  # of what other tests compiled
        torch._dynamo.reset()


@dataclass
class Run:
    """One loop over a cell, and what it looked like from the user's side."""

    track: Track
    entered: list[States]  # what each call was given
    returned: list[States]  # the tensors of the graph, with their gradients kept
    module: nn.Module
    case: Case
    x: Tensor

    def states(self, name: str) -> Tensor:
        return torch.stack([s[name].detach().reshape(BATCH, -1) for s in self.returned])

    def grads(self, name: str) -> Tensor:
        return torch.stack([or_zero(s[name]).reshape(BATCH, -1) for s in self.returned])


def or_zero(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def nothing(_: int, states: States) -> States:
    return states


def run(
    kind: str,
    between: Callable[[int, States], States] = nothing,
    reads: tuple[int, ...] = (2, STEPS - 1),
    **options: Any,
) -> Run:
    case = CELLS[kind]
    module = case.make().double()
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=F64)
    state = {name: torch.randn_like(s) * 0.3 for name, s in case.initial().items()}
    entered, returned = [], []
    with gradflow.record(module, **options) as recording:
        loss = torch.zeros((), dtype=F64)
        for t, x_t in enumerate(x):
            entered.append(state)
            result = case.take(case.call(module, x_t, state))
            state = {name: result[name] for name in case.names}
            for tensor in state.values():
                tensor.retain_grad()
            returned.append(state)
            if t in reads:
                loss = loss + sum((s**3 + s).sum() for n, s in state.items() if n != "c")
            state = between(t, state)
        loss.backward()
    return Run(recording["cell"], entered, returned, module, case, x)


def step_jacobian(found: Run, t: int, between: Callable[[int, States], States]) -> Tensor:
    """∂(states that call t returns)/∂(those call t − 1 returned), (B, S, S), one sequence each."""
    case, rows = found.case, []
    given = found.returned[t - 1] if t else found.entered[0]
    for b in range(BATCH):
        flat = torch.cat([given[n].detach().reshape(BATCH, -1)[b] for n in case.names])

        def one(v: Tensor, b: int = b) -> Tensor:
            parts = v.split(case.widths)
            whole = {n: given[n].detach().clone() for n in case.names}
            for name, part in zip(case.names, parts, strict=True):
                lone = whole[name].reshape(BATCH, -1)
                rest = torch.arange(BATCH).unsqueeze(1) == b
                whole[name] = torch.where(rest, part, lone).reshape(whole[name].shape)
            whole = between(t - 1, whole) if t else whole
            new = case.take(case.call(found.module, found.x[t], whole))
            return torch.cat([new[n].reshape(BATCH, -1)[b] for n in case.names])

        rows.append(torch.autograd.functional.jacobian(one, flat))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("kind", CELLS)
def test_states_and_totals_are_those_of_autograd(kind: str) -> None:
    found = run(kind)
    track = found.track
    assert track.cell == type(found.module).__name__
    assert (track.steps, track.batch) == (STEPS, BATCH)
    assert tuple(track.states) == found.case.names
    assert not track.cuts.any()
    for name in found.case.names:
        assert torch.equal(track.states[name], found.states(name))
        assert_steps_close(track.grads[name], found.grads(name), track.mask, what=name)
        assert bool((track.grads[name][0] != 0).any())
    assert track.backwards == 1


@pytest.mark.parametrize("kind", CELLS)
def test_step_jacobians_are_those_of_independent_states(kind: str) -> None:
    found = run(kind)
    got = gradflow.analyzer.step_jacobians(found.track)
    want = torch.stack([step_jacobian(found, t, nothing) for t in range(STEPS)])
    assert_jacobians_close(got, want, found.track.mask)
    assert found.track.notes == []
    for name, initial in found.track.initial.items():
        assert torch.equal(initial, found.entered[0][name].reshape(BATCH, -1))


def test_a_wrong_jacobian_would_be_seen() -> None:
    found = run("from scratch")
    want = torch.stack([step_jacobian(found, t, nothing) for t in range(1, STEPS)])
    want[3, 1, 0, 0] *= 1 + 1e-6
    got = gradflow.analyzer.step_jacobians(found.track)[1:]
    with pytest.raises(AssertionError, match="1 of"):
        assert_jacobians_close(got, want, found.track.mask[1:])


@pytest.mark.parametrize("kind", ["from scratch", "three states", "minimal gated"])
def test_the_last_loss_step_alone(kind: str) -> None:
    torch.manual_seed(5)
    both = run(kind).track
    torch.manual_seed(5)
    alone = run(kind, reads=(STEPS - 1,)).track
    assert both.last_grads is not None
    for name, values in both.last_grads.items():
        assert_steps_close(values, alone.grads[name], both.mask, what=name)


class PeepholeOnForget(nn.Module):
    """U = 0: c' = σ(p c + b) c + i."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.b = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (1.3, 0.2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.sigmoid(self.p * c + self.b) * c + x


def test_a_peephole_opens_a_path_of_its_own() -> None:
    cell = PeepholeOnForget()
    with gradflow.record(cell) as recording:
        c = torch.full((1, 1), 0.7, dtype=F64)
        for _ in range(2):
            c = cell(torch.zeros(1, 1, dtype=F64), c)
        c.sum().backward()
    found = gradflow.analyzer.step_jacobians(recording["cell"])[0].item()
    assert found == pytest.approx(0.9217812, abs=5e-8)


class CoupledAlone(nn.Module):
    """U = 0: c' = f c + (1 − f) g."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(1.0, dtype=F64))

    def forward(self, g: Tensor, *, c: Tensor) -> Tensor:
        f = torch.sigmoid(self.b)
        return f * c + (1 - f) * g


def test_the_path_of_coupled_gates_is_a_power_of_the_forget_gate() -> None:
    cell = CoupledAlone()
    with gradflow.record(cell) as recording:
        c = torch.zeros(1, 2, dtype=F64)
        for _ in range(20):
            c = cell(torch.ones(1, 2, dtype=F64), c=c)
        c.sum().backward()
    gains = gradflow.analyzer.log_gain_map(gradflow.analyzer.step_jacobians(recording["cell"]))
    want = torch.arange(20) * torch.nn.functional.logsigmoid(torch.ones((), dtype=F64))
    assert torch.allclose(gains[0, 0], want, rtol=1e-12, atol=1e-14)
    assert gradflow.analyze(recording)["cell"].half_life == pytest.approx(2.2127, abs=5e-5)


# --------------------------------------------------------------------- what lies between two calls


def done_mask(t: int, states: States) -> States:
    keep = torch.ones(BATCH, 1, dtype=F64)
    keep[1] = float(t != 3)
    return {name: keep * state for name, state in states.items()}


def detached(t: int, states: States) -> States:
    return {name: s.detach() for name, s in states.items()} if t == 3 else states


def joined_and_split(_: int, states: States) -> States:
    whole = torch.cat(list(states.values()), dim=-1)
    return dict(zip(states, whole.split([s.shape[-1] for s in states.values()], -1), strict=True))


@pytest.mark.parametrize("between", [done_mask, detached, joined_and_split])
@pytest.mark.parametrize("kind", ["from scratch", "leaky", "dict"])
def test_what_lies_between_two_calls_is_part_of_the_step(
    kind: str, between: Callable[[int, States], States]
) -> None:
    found = run(kind, between)
    track = found.track
    assert track.steps == STEPS
    want = torch.stack([step_jacobian(found, t, between) for t in range(1, STEPS)])
    if between is detached:
        want[3] = 0.0
    got = gradflow.analyzer.step_jacobians(track)[1:]
    assert_jacobians_close(got, want, track.mask[1:])
    for name in found.case.names:
        assert_steps_close(track.grads[name], found.grads(name), track.mask, what=name)
    cuts = {done_mask: [[4, 1]], detached: [[4, 0], [4, 1]], joined_and_split: []}
    assert track.cuts.nonzero().tolist() == cuts[between]


def test_a_state_that_starts_from_zeros_again_is_a_loop_of_its_own() -> None:
    cell, zeros = MinimalGated().double(), torch.zeros(BATCH, HIDDEN, dtype=F64)
    with gradflow.record(cell) as recording:
        h, loss = zeros, torch.zeros((), dtype=F64)
        for t, x_t in enumerate(torch.randn(STEPS, BATCH, INPUTS, dtype=F64)):
            loss = loss + h.sum() if t == 3 else loss
            h = cell(x_t, zeros if t == 3 else h)
        (loss + h.sum()).backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"cell": 3, "cell@2": 4}


def test_dropout_between_two_calls_is_part_of_the_step() -> None:
    torch.manual_seed(3)
    drop = nn.Dropout(0.5)
    found = run("minimal gated", lambda _, s: {n: drop(v) for n, v in s.items()})
    got = gradflow.analyzer.step_jacobians(found.track)
    for t in range(1, STEPS):
        factor = found.entered[t]["h"].detach() / found.returned[t - 1]["h"].detach()
        want = step_jacobian(found, t, lambda _, s, f=factor: {"h": f * s["h"]})
        assert_jacobians_close(got[t : t + 1], want[None], found.track.mask[:1])


@pytest.mark.parametrize("start", ["zeros", "random", "learned"])
@pytest.mark.parametrize("kind", ["from scratch", "minimal gated", "leaky"])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_states_that_go_around_the_cell_compose_as_they_enter(
    kind: str, start: str, first: int
) -> None:
    """A padded step keeps its state: ∂e_{t+1}/∂e_t with e what enters, the last ∂r_T/∂e_T."""
    case = CELLS[kind]
    module = case.make().double()
    keep = torch.rand(STEPS, BATCH, HIDDEN, dtype=F64)
    keep[:, 1] = (keep[:, 1] > 0.4).double()
    state = {
        n: s + 0.3 * torch.randn_like(s) * (start != "zeros") for n, s in case.initial().items()
    }
    state = {n: s.requires_grad_(start == "learned") for n, s in state.items()}
    data, entered, returned = x(), [], []
    with gradflow.record(module) as recording:
        for t, x_t in enumerate(data):
            entered.append(state)
            new = case.take(case.call(module, x_t, state))
            new = {n: new[n] for n in case.names}
            for s in new.values():
                s.retain_grad()
            returned.append(new)
            k = keep[t]
            state = {n: k * new[n] + (1 - k) * s for n, s in state.items()} if t >= first else new
        sum((s**3 + s).sum() for s in state.values()).backward()
    track = recording["cell"]
    got = gradflow.analyzer.step_jacobians(track)
    for name in case.names:
        grads = torch.stack([or_zero(s[name]) for s in returned])
        assert_steps_close(track.grads[name], grads, track.mask, what=name)

    def step(t: int, states: States, b: int) -> Tensor:
        new = case.take(case.call(module, data[t], states))
        k = keep[t]
        if first <= t < STEPS - 1:
            new = {n: k * new[n] + (1 - k) * states[n] for n in case.names}
        return torch.cat([new[n][b] for n in case.names])

    want = []
    for t in range(STEPS):
        for b in range(BATCH):

            def one(v: Tensor, t: int = t, b: int = b) -> Tensor:
                own = torch.arange(BATCH).unsqueeze(1) == b
                parts = dict(zip(case.names, v.split(case.widths), strict=True))
                mixed = {n: torch.where(own, parts[n], s.detach()) for n, s in entered[t].items()}
                return step(t, mixed, b)

            flat = torch.cat([entered[t][n][b].detach() for n in case.names])
            want.append(torch.autograd.functional.jacobian(one, flat))
    stack = torch.stack(want).view(STEPS, BATCH, *want[0].shape)
    assert_jacobians_close(got, stack, track.mask)
    assert "mixed with the one before" in " ".join(track.notes)
    assert track.last_grads is None
    assert not track.has_direct


def test_attention_between_two_calls_is_part_of_the_step() -> None:
    """The input of a step is read off the state before it, with broadcast and softmax."""
    cell = MinimalGated().double()
    memory, project = torch.randn(6, BATCH, HIDDEN, dtype=F64), nn.Linear(HIDDEN, INPUTS).double()

    def attended(h: Tensor) -> Tensor:
        weight = (memory * h).sum(-1, keepdim=True).softmax(0)
        return project((weight * memory).sum(0))

    states = [torch.randn(BATCH, HIDDEN, dtype=F64)]
    with gradflow.record(cell) as recording:
        for _ in range(STEPS):
            states.append(cell(attended(states[-1]), states[-1]))
        states[-1].sum().backward()
    got = gradflow.analyzer.step_jacobians(recording["cell"])
    for t in range(1, STEPS):
        jacobian = torch.autograd.functional.jacobian(
            lambda h: cell(attended(h), h), states[t].detach()
        )
        want = torch.stack([jacobian[b, :, b] for b in range(BATCH)])
        assert_jacobians_close(got[t : t + 1], want[None], recording["cell"].mask[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_part_of_the_step(dtype: torch.dtype) -> None:
    cell = MinimalGated()
    with gradflow.record(cell) as recording, torch.autocast("cpu", dtype, dtype != torch.float32):
        h = torch.zeros(BATCH, HIDDEN)
        for x_t in x().float():
            h = cell(x_t, h)
        h.float().sum().backward()
    assert recording["cell"].notes == []
    assert bool(gradflow.analyzer.step_jacobians(recording["cell"]).isfinite().all())


# ------------------------------------------------------------------------ which modules are tracks


class Layer(nn.Module):
    """A loop over a cell, with an output at every step."""

    def __init__(self, width: int = INPUTS, reverse: bool = False) -> None:
        super().__init__()
        self.cell = FromScratch()
        self.cell.W_x = nn.Linear(width, 4 * HIDDEN)
        self.reverse = reverse

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        zeros = x.new_zeros(x.shape[1], HIDDEN)
        state = (zeros, zeros) if state is None else state
        outputs = []
        for x_t in x.flip(0) if self.reverse else x:
            y, state = self.cell(x_t, state)
            outputs.append(y)
        return torch.stack(outputs), state


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.head = Layer(), Layer(HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)[0])[0])


def x(steps: int = STEPS, width: int = INPUTS) -> Tensor:
    return torch.randn(steps, BATCH, width, dtype=F64)


def test_two_layers_are_two_tracks_of_their_cells() -> None:
    model = Stack().double()
    with gradflow.record(model) as recording:
        model(x())[-1].sum().backward()
    assert {n: (t.cell, t.steps) for n, t in recording.tracks.items()} == {
        "low.cell": ("FromScratch", STEPS), "high.cell": ("FromScratch", STEPS)
    }  # fmt: skip


def test_interleaved_layers() -> None:
    model = nn.ModuleList([MinimalGated(), MinimalGated()]).double()
    model[1].forget = nn.Linear(2 * HIDDEN, HIDDEN).double()
    model[1].candidate = nn.Linear(2 * HIDDEN, HIDDEN).double()
    states: list[list[Tensor]] = [[], []]
    with gradflow.record(model) as recording:
        h = [torch.zeros(BATCH, HIDDEN, dtype=F64)] * 2
        for x_t in x():
            h[0] = model[0](x_t, h[0])
            h[1] = model[1](h[0], h[1])
            for kept, state in zip(states, h, strict=True):
                state.retain_grad()
                kept.append(state)
        h[1].sum().backward()
    assert list(recording.tracks) == ["0", "1"]
    for track, kept in zip(recording.values(), states, strict=True):
        grads = torch.stack([or_zero(s) for s in kept])
        assert_steps_close(track.grad_h, grads, track.mask)
        gradflow.analyzer.step_jacobians(track)


def test_a_layer_called_with_its_state_goes_on_with_the_cells_track() -> None:
    layer = Layer().double()
    with gradflow.record(layer) as recording:
        y, state = layer(x(4))
        for _ in range(2):
            y, state = layer(x(3), state)
        y.sum().backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"cell": 10}


def test_a_bidirectional_use_of_two_cells_and_of_one() -> None:
    both = nn.ModuleDict({"f": Layer(), "b": Layer(reverse=True)}).double()
    with gradflow.record(both) as recording:
        data = x()
        (both["f"](data)[0].sum() + both["b"](data)[0].sum()).backward()
    assert list(recording.tracks) == ["f.cell", "b.cell"]
    layer = Layer().double()
    with gradflow.record(layer) as recording:
        (layer(data)[0].sum() + layer(data.flip(0))[0].sum()).backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"cell": STEPS, "cell@2": STEPS}


class Normed(nn.Module):
    """A stock cell whose state is changed: a cell of its own around torch's."""

    def __init__(self, stock: nn.Module, change: bool) -> None:
        super().__init__()
        self.stock, self.norm, self.change = stock, nn.LayerNorm(HIDDEN), change

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.stock(x, state)
        return (self.norm(h), c) if self.change else (h, c)


@pytest.mark.parametrize("change", [True, False])
@pytest.mark.parametrize("stock", [True, False])
def test_of_nested_cells_the_outer_is_kept_if_it_changes_the_states(
    change: bool, stock: bool
) -> None:
    inner = nn.LSTMCell(INPUTS, HIDDEN) if stock else LayerNormInside()
    model = Normed(inner, change).double()
    with gradflow.record(model) as recording:
        state = (torch.zeros(BATCH, HIDDEN, dtype=F64),) * 2
        for x_t in x():
            state = model(x_t, state)
        state[0].sum().backward()
    names = {(True, True): ["stock", "cell"], (False, True): ["stock"],
             (True, False): ["cell"], (False, False): ["stock.cell"]}  # fmt: skip
    assert list(recording.tracks) == names[change, stock]
    for track in recording.values():
        assert track.steps == STEPS
        gradflow.analyzer.step_jacobians(track)


class LayerNormInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = FromScratch()

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.cell(x, state)[1]


class Agent(nn.Module):
    """The whole model carries the state from call to call, and returns torch's own as it is."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.into, self.core, self.out = nn.Linear(2, INPUTS), core, nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        y, state = self.core(self.into(x).unsqueeze(0), state)
        return self.out(y[0]), state


def test_a_model_that_hands_on_the_states_of_a_stock_layer_is_no_track() -> None:
    model = Agent(nn.LSTM(INPUTS, HIDDEN)).double()
    with gradflow.record(model) as recording:
        state = None
        for x_t in x(width=2):
            y, state = model(x_t, state)
        y.sum().backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"core.l0": STEPS}


def test_so_without_gradient() -> None:
    model = Agent(nn.LSTM(INPUTS, HIDDEN)).double()

    def acting() -> gradflow.Recording:
        with gradflow.record(model) as recording, torch.no_grad():
            state = None
            for x_t in x(width=2):
                _, state = model(x_t, state)
        return recording

    with pytest.warns(GradflowWarning, match="no_grad"):
        recording = acting()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"core.l0": STEPS}


def test_without_gradient_states_alone() -> None:
    layer, data = Layer().double(), x()

    def evaluated() -> gradflow.Recording:
        with gradflow.record(layer) as recording, torch.no_grad():
            layer(data)
        return recording

    with pytest.warns(GradflowWarning, match="no_grad"):
        recording = evaluated()
    track = recording["cell"]
    assert torch.equal(track.h, layer(data)[0])
    assert not track.cuts.any()
    with pytest.raises(RecordingError, match="run the loop with gradients enabled"):
        track.operator()


# ------------------------------------------------------------------ the step from the initial state


class Uncopied(MinimalGated):
    """Cannot be copied, or gives something else each time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.times = how, 0
        self.held = torch.ones(1, requires_grad=True) * 2 if how == "holds a result" else None
        self.double()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.times += 1
        return super().forward(x, h) * (self.times if self.how == "counts" else 1)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("holds a result", "cannot be run on a copy"), ("counts", "gives other numbers")],
)
def test_a_cell_that_does_not_repeat_itself_keeps_the_identity_and_says_so(
    how: str, reason: str
) -> None:
    cell = Uncopied(how)
    with gradflow.record(cell) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for x_t in x():
            h = cell(x_t, h)
        h.sum().backward()
    assert cell.times == STEPS
    track = recording["cell"]
    assert reason in " ".join(track.notes)
    eye = torch.eye(HIDDEN, dtype=F64).expand(BATCH, -1, -1)
    assert torch.equal(gradflow.analyzer.step_jacobians(track)[0], eye)


def test_the_first_call_is_run_again_with_its_own_dropout_and_without_hooks() -> None:
    torch.manual_seed(4)
    cell, drop = MinimalGated().double(), nn.Dropout(0.5)
    cell.candidate = nn.Sequential(cell.candidate, drop)
    fired: list[int] = []
    cell.candidate.register_forward_hook(lambda *_: fired.append(1))
    h0 = torch.randn(BATCH, HIDDEN, dtype=F64, requires_grad=True)
    with gradflow.record(cell) as recording:
        h = first = cell(x(1)[0], h0)
        for x_t in x(3):
            h = cell(x_t, h)
        want = [
            torch.autograd.grad(first[0, i], h0, retain_graph=True)[0][0] for i in range(HIDDEN)
        ]
        h.sum().backward()
    assert len(fired) == 4
    got = gradflow.analyzer.step_jacobians(recording["cell"])[0, 0]
    assert torch.allclose(got, torch.stack(want), rtol=1e-14, atol=0)
    assert torch.equal(recording["cell"].h0, h0)


# -------------------------------------------------------------------------------- no false positives


class Shared(nn.Module):
    """A module of the user's own, used again in other places of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.w(x))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.block = kind, Shared()
        self.linear, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.act = nn.Sequential(nn.Dropout(0.0), nn.Tanh())
        self.embed = nn.Embedding(4, HIDDEN)
        self.conv = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.ReLU())
        layer = nn.TransformerEncoderLayer(HIDDEN + 1, 2, 8, batch_first=True, dropout=0.0)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "an MLP called twice":
            return self.block(x) + self.block(-x)
        if self.kind == "a siamese CNN":
            return self.conv(x.unsqueeze(1)) - self.conv(x.flip(1).unsqueeze(1))
        if self.kind == "weights shared in a graph":
            return self.block(self.linear(self.block(x)))
        if self.kind == "an attention encoder":
            return self.transformer(torch.cat([x, x[:, :1]], 1).unsqueeze(1))
        h = torch.zeros_like(x)
        for _ in range(4):
            if self.kind == "a hand-written loop of torch's own modules":
                h = self.act(self.norm(x + self.linear(h)))
            else:
                h = torch.tanh(self.linear(h) + self.embed(h.argmax(1)))
        return h


KINDS_OF_NETS = (
    "an MLP called twice",
    "a siamese CNN",
    "weights shared in a graph",
    "an attention encoder",
)
LOOPS = ("a hand-written loop of torch's own modules", "an embedding in a loop")


@pytest.mark.parametrize("kind", KINDS_OF_NETS)
@pytest.mark.parametrize("times", [1, 2])
def test_what_is_no_recurrent_cell_is_no_track(kind: str, times: int) -> None:
    net = Net(kind).double()

    def recorded() -> gradflow.Recording:
        with gradflow.record(net) as recording:
            for _ in range(times):
                net(torch.randn(BATCH, HIDDEN, dtype=F64)).sum().backward()
        return recording

    with pytest.warns(GradflowWarning, match=r"no recurrent layer ran.*gradflow\.tap"):
        assert len(recorded()) == 0


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_without_a_cell_is_a_track_of_the_module_that_loops(kind: str) -> None:
    net = Net(kind).double()
    with gradflow.record(net) as recording:
        for _ in range(2):
            net(torch.randn(BATCH, HIDDEN, dtype=F64)).sum().backward()
    assert [(track.name, track.cell, track.steps) for track in recording.values()] == [
        ("loop", "Net", 4),
        ("loop@2", "Net", 4),
    ]


def test_a_constant_that_is_handed_through_is_no_state() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(INPUTS, HIDDEN)

        def forward(self, x: Tensor, memory: Tensor) -> Any:
            return self.w(x) * memory, memory

    net, memory = Attends().double(), torch.randn(BATCH, HIDDEN, dtype=F64)

    def recorded() -> gradflow.Recording:
        with gradflow.record(net) as recording:
            for x_t in x():
                y, memory_again = net(x_t, memory)
                assert memory_again is memory
            y.sum().backward()
        return recording

    with pytest.warns(GradflowWarning, match="was called 7 times, but nothing that it returned"):
        assert len(recorded()) == 0


# -------------------------------------------------------------------------------------- in words


def test_called_once() -> None:
    cell = FromScratch().double()
    zeros = torch.zeros(BATCH, HIDDEN, dtype=F64)
    text = r"cell \(FromScratch\) was called once, so no state came back"

    def recorded() -> gradflow.Recording:
        with gradflow.record(cell) as recording:
            cell(x(1)[0], (zeros, zeros))[0].sum().backward()
        return recording

    with pytest.warns(GradflowWarning, match=text):
        recording = recorded()
    for ask in (lambda: recording["cell"], lambda: gradflow.analyze(recording)):
        with pytest.raises(RecordingError, match=text):
            ask()


@pytest.mark.parametrize(("wide", "jacobians"), [(33, None), (33, True), (5, False)])
def test_states_of_any_width_have_jacobians_unless_they_are_turned_off(
    wide: int, jacobians: bool | None
) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Linear(wide, wide)

        def forward(self, h: Tensor, c: Tensor) -> Any:
            c = c + torch.tanh(self.u(h))
            return c.tanh(), c

    cell = Wide().double()
    with gradflow.record(cell, jacobians=jacobians) as recording:
        h = c = torch.ones(BATCH, wide, dtype=F64)
        for _ in range(4):
            h, c = cell(h, c)
        h.sum().backward()
    if jacobians is not False:
        assert recording["cell"].operator().size == 2 * wide
        return
    with pytest.raises(RecordingError, match="jacobians=False"):
        recording["cell"].operator()
    assert bool((recording["cell"].grads["c"] != 0).all())


def test_what_is_not_known_of_such_a_cell_is_said() -> None:
    track = run("from scratch").track
    for name in ("delta", "inputs"):
        with pytest.raises(RecordingError, match="came back to your cell"):
            getattr(track, name)
    assert track.weights == {}
    assert track.gates == {}
    assert track.parity.status == "not applicable"
    assert "a cell of your own" in track.parity.reason


def test_a_class_named_as_one_of_torchs_own_is_told_apart() -> None:
    class LSTM(FromScratch):
        pass

    cell = LSTM().double()
    with gradflow.record(cell) as recording:
        state = (torch.zeros(BATCH, HIDDEN, dtype=F64),) * 2
        for x_t in x():
            y, state = cell(x_t, state)
        y.sum().backward()
    assert recording["cell"].cell.endswith(".LSTM")
    assert recording["cell"].hidden == HIDDEN
    gradflow.analyze(recording)


def test_layers_picks_cells_too() -> None:
    model = Stack().double()
    with gradflow.record(model, layers="low*") as recording:
        model(x()).sum().backward()
    assert list(recording.tracks) == ["low.cell"]


def test_lengths_of_a_padded_batch() -> None:
    track = run("from scratch", reads=(1,), lengths=[7, 3]).track
    assert track.lengths.tolist() == [7, 3]
    assert bool(track.h[3:, 1].isnan().all())
    assert not bool(track.h[:3, 1].isnan().any())


# ------------------------------------------------------------------------------- nothing disturbed


class Dropped(nn.Module):
    """A layer over a cell with dropout inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.head = Inner(), nn.Dropout(0.3), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        for x_t in x:
            h = self.drop(self.cell(x_t, h))
        return self.head(h)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.w(x) + self.drop(self.u(h)))


def trained(recorded: bool) -> tuple[list[Tensor], Tensor, int]:
    torch.manual_seed(11)
    model = Dropped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    hooked: list[int] = []
    model.cell.register_forward_hook(lambda *_: hooked.append(1))
    for _ in range(10):
        data = torch.randn(STEPS, BATCH, INPUTS)
        if recorded:
            with gradflow.record(model) as recording:
                loss = model(data).pow(2).sum()
                loss.backward()
            assert recording["cell"].steps == STEPS
        else:
            loss = model(data).pow(2).sum()
            loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert len(hooked) == model.cell.calls
    return [*losses, *model.parameters()], torch.get_rng_state(), model.cell.calls


def test_training_is_bit_for_bit_as_without_a_recording() -> None:
    plain, rng, calls = trained(recorded=False)
    seen, rng_seen, calls_seen = trained(recorded=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert torch.equal(rng, rng_seen)
    assert calls == calls_seen == 10 * STEPS


def test_copies_and_pickles_made_inside_the_block_are_plain() -> None:
    model = Dropped().eval()
    before = dict(vars(Inner))
    data = torch.randn(STEPS, BATCH, INPUTS)
    with gradflow.record(model) as recording:
        y = model(data)
        names = [name for name, _ in model.named_modules()]
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))  # noqa: S301
        buffer = io.BytesIO()
        torch.save(model, buffer)
        y.sum().backward()
    assert vars(Inner)["forward"] is before["forward"]
    assert recording["cell"].steps == STEPS
    assert names == [name for name, _ in model.named_modules()]
    for other in (copied, pickled):
        assert torch.equal(other(data), y)
        assert set(vars(other.cell)) == set(vars(model.cell))
        assert "forward" not in vars(other.cell)


def test_a_forward_of_one_modules_own_is_seen_copied_and_put_back() -> None:
    cell = MinimalGated().double()
    plain = cell.forward
    cell.forward = plain  # type: ignore[method-assign]
    with gradflow.record(cell) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for x_t in x():
            h = cell(x_t, h)
        copied = copy.deepcopy(cell)
        pickled = pickle.loads(pickle.dumps(cell))  # noqa: S301
        h.sum().backward()
    assert recording["cell"].steps == STEPS
    assert vars(cell)["forward"] is plain
    for other in (copied, pickled):
        assert vars(other)["forward"].__self__ is other
        assert vars(other)["forward"].__func__ is MinimalGated.forward


def test_an_exception_inside_forward_restores() -> None:
    class Raises(MinimalGated):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            if bool((x == 1).all()):
                raise ValueError("of the user's own")
            return super().forward(x, h)

    cell, before = Raises(), Raises.forward
    seen: list[gradflow.Recording] = []

    def raising() -> None:
        h = torch.zeros(BATCH, HIDDEN)
        with gradflow.record(cell) as recording:
            seen.append(recording)
            for t in range(3):
                h = cell(torch.full((BATCH, INPUTS), float(t == 2)), h)

    with pytest.raises(ValueError, match="of the user's own"):
        raising()
    assert Raises.forward is before
    assert seen[0]["cell"].steps == 2


def test_an_exception_that_the_user_catches_is_no_step() -> None:
    class Raises(MinimalGated):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            if bool((x == 1).all()):
                raise ValueError("of the user's own")
            return super().forward(x, h)

    cell, h = Raises(), torch.zeros(BATCH, HIDDEN)
    with gradflow.record(cell) as recording:
        for t in range(6):
            try:
                h = cell(torch.full((BATCH, INPUTS), float(t == 2)), h)
            except ValueError:
                continue
        h.sum().backward()
    assert recording["cell"].steps == 5


def test_forward_called_directly_is_seen() -> None:
    cell = MinimalGated().double()
    with gradflow.record(cell) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for x_t in x():
            h = cell.forward(x_t, h)
        h.sum().backward()
    assert recording["cell"].steps == STEPS


def test_nested_and_repeated_recordings() -> None:
    layer, before = Layer().double(), FromScratch.forward
    with gradflow.record(layer) as outer:
        with gradflow.record(layer) as inner:
            layer(x())[0].sum().backward()
        layer(x(4))[0].sum().backward()
    assert FromScratch.forward is before
    assert {n: t.steps for n, t in outer.tracks.items()} == {"cell": STEPS, "cell@2": 4}
    assert torch.equal(outer["cell"].grad_h, inner["cell"].grad_h)
    assert torch.equal(
        gradflow.analyzer.step_jacobians(outer["cell"]),
        gradflow.analyzer.step_jacobians(inner["cell"]),
    )


def test_another_thread_and_another_instance_are_not_seen() -> None:
    layer, other = Layer().double(), Layer().double()
    with gradflow.record(layer) as recording:
        other(x())
        thread = threading.Thread(target=lambda: layer(x(3)))
        thread.start()
        thread.join()
        layer(x())[0].sum().backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"cell": STEPS}


def test_nothing_stays_alive() -> None:
    layer = Layer()
    kept: list[weakref.ref[Tensor]] = []

    def record() -> gradflow.Recording:
        with gradflow.record(layer) as recording:
            y, (h, c) = layer(torch.randn(STEPS, BATCH, INPUTS))
            kept.extend(weakref.ref(t) for t in (y, h, c))
            y.sum().backward()
        return recording

    recording = record()
    gc.collect()
    assert all(ref() is None for ref in kept)
    track = weakref.ref(recording["cell"])
    del recording
    gc.collect()
    assert track() is None


def test_a_backward_after_every_step() -> None:
    """Truncated after one step: the first gradient comes before a second call tells that it is a cell."""
    cell = FromScratch().double()
    want = []
    with gradflow.record(cell) as recording:
        state = (torch.zeros(BATCH, HIDDEN, dtype=F64),) * 2
        for x_t in x():
            y, (h, c) = cell(x_t, tuple(s.detach() for s in state))
            for s in (h, c):
                s.retain_grad()
            (y**2).sum().backward()
            want.append((or_zero(h), or_zero(c)))
            state = (h, c)
    track = recording["cell"]
    assert bool(track.cuts[1:].all())
    assert track.backwards == STEPS
    for place, name in enumerate(("h", "c")):
        assert_steps_close(track.grads[name], torch.stack([w[place] for w in want]), track.mask)
    gradflow.analyzer.step_jacobians(track)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_nothing_is_invented(reentrant: bool) -> None:
    layer, data = Layer().double(), x().requires_grad_()
    plain = torch.autograd.grad(layer(data)[0].sum(), data)[0]

    def recorded() -> gradflow.Recording:
        with gradflow.record(layer) as recording:
            checkpoint(lambda d: layer(d)[0], data, use_reentrant=reentrant).sum().backward()
        return recording

    if reentrant:
        with pytest.warns(GradflowWarning, match="no_grad"):
            recording = recorded()
    else:
        recording = recorded()
        assert bool((recording["cell"].grad_h != 0).all())
    assert torch.equal(or_zero(data), plain)
    assert {n: t.steps for n, t in recording.tracks.items()} == {"cell": STEPS}


# ------------------------------------------------------------------------------ through every stage


def test_analyze_plot_and_report_speak_of_the_users_class(tmp_path: Path) -> None:
    class MyCell(FromScratch):
        pass

    layer = Layer().double()
    layer.cell = MyCell().double()
    with gradflow.record(layer) as recording:
        layer(torch.randn(30, 6, INPUTS, dtype=F64))[0][-1].sum().backward()
    analysis = gradflow.analyze(recording)
    found = analysis["cell"]
    assert (found.cell, found.hidden, found.size) == ("MyCell", HIDDEN, 2 * HIDDEN)
    assert found.title.startswith("MyCell: ")
    assert found.verdict == "vanishing"
    assert np.isfinite(found.rate.value)
    for kind in KINDS:
        gradflow.plot(analysis, kind)
        plt.close("all")
    gradflow.report(analysis, f"{tmp_path}/run")
    assert gradflow.load(f"{tmp_path}/run/run.nc")["cell"].cell == "MyCell"
    assert "MyCell" in Path(f"{tmp_path}/run/report.html").read_text()


def test_diagnose_finds_the_cell() -> None:
    class Last(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[-1]

    analysis = gradflow.diagnose(Last(), torch.randn(20, BATCH, INPUTS))
    assert [layer.name for layer in analysis.values()] == ["low.cell", "high.cell"]
    assert analysis["low.cell"].title.startswith("low.cell (FromScratch): ")


class Adding(nn.Module):
    """Its states are whole numbers, from 2⁵³ on whatever is added."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.ones(INPUTS, dtype=torch.float64)), size

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + self.weight * (x.abs() * self.size).ceil()


@pytest.mark.parametrize(
    ("size", "how"),  # small ones in memory of their own may be met by chance
    [(s, how) for s in (1.0, 1e17) for how in ("detach", "data", "no_grad")] + [(1e17, "clone")],
)
def test_detached_states_that_are_whole_numbers_go_on_as_one_track(size: float, how: str) -> None:
    cell, h, loss = Adding(size), torch.zeros(BATCH, INPUTS, dtype=torch.float64), 0.0
    ways = {"data": lambda h: h.data, "clone": lambda h: h.detach().clone()}
    with warnings.catch_warnings(), gradflow.record(cell) as recording:
        warnings.simplefilter("ignore", GradflowWarning)
        with torch.set_grad_enabled(how != "no_grad"):
            for x_t in x():
                h = cell(x_t, h)
                loss = loss + h.sum()
                h = ways.get(how, Tensor.detach)(h)
        if how != "no_grad":
            loss.backward()
    (track,) = recording.values()
    assert track.lengths.tolist() == [STEPS] * BATCH
    assert bool(track.cuts[1:].all()) is (how != "no_grad")


class NodesWithEmbeddings(nn.Module):
    """A cell on a graph of 5 nodes that learns who is whose neighbour (AGCRN), batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 + 4, 4)

    def forward(self, x: Tensor, nodes: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(*x.shape[:2], 4) if h is None else h
        near = torch.softmax(nodes @ nodes.T, dim=1)
        return torch.tanh(self.mix(near @ torch.cat([x, h], 2)))


def test_the_batch_is_what_goes_on_by_itself_and_not_the_nodes_of_a_graph() -> None:
    torch.manual_seed(3)
    cell, nodes = NodesWithEmbeddings().double(), torch.randn(5, 3, dtype=F64)
    states: list[Tensor] = []
    with gradflow.record(cell) as recording:
        h = None
        for x in torch.randn(6, 2, 5, 3, dtype=F64):
            h = cell(x, nodes, h)
            states.append(h)
        seed = torch.randn(2, 5, 4, dtype=F64)
        (seed * h).sum().backward(retain_graph=True)
    (track,) = recording.values()
    assert (track.name, track.batch, track.hidden) == ("cell", 2, 20)
    pulled = seed.flatten(1)
    for step in gradflow.analyzer.step_jacobians(track)[1:].flip(0):
        pulled = torch.einsum("bij,bi->bj", step, pulled)
    (truth,) = torch.autograd.grad((seed * states[-1]).sum(), states[0])
    torch.testing.assert_close(pulled, truth.flatten(1), rtol=1e-12, atol=0)
