"""Loops written by hand that mark their states with `tap`.

Oracles: retain_grad on the marked tensors of the user's own graph, dense Jacobians of a pure step
function by torch.autograd.functional.jacobian, closed forms. All in float64.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from compare import assert_jacobians_close, assert_steps_close, assert_whole_close
from seam import KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning, InputError, RecordingError
from gradflow.recording import Track

STEPS, BATCH, INPUTS, HIDDEN = 7, 3, 2, 4
F64 = torch.float64

States = dict[str, Tensor]
StepFunction = Callable[[Tensor, States], States]


def weights(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=F64).mul(0.7).requires_grad_()


def lstm(peephole: bool) -> StepFunction:
    w, u, p = weights(4 * HIDDEN, INPUTS), weights(4 * HIDDEN, HIDDEN), weights(3, HIDDEN)

    def step(x: Tensor, s: States) -> States:
        i, f, g, o = (x @ w.T + s["h"] @ u.T).chunk(4, dim=-1)
        if peephole:
            i, f = i + p[0] * s["c"], f + p[1] * s["c"]
        c = f.sigmoid() * s["c"] + i.sigmoid() * g.tanh()
        o = o + p[2] * c if peephole else o
        return {"h": o.sigmoid() * c.tanh(), "c": c}

    return step


def leaky() -> StepFunction:
    w, u = weights(HIDDEN, INPUTS), weights(HIDDEN, HIDDEN)

    def step(x: Tensor, s: States) -> States:
        return {"h": 0.8 * s["h"] + 0.2 * torch.tanh(x @ w.T + s["h"] @ u.T)}

    return step


def three() -> StepFunction:
    """Three states of different widths, each made from another one of the same step."""
    w, u, v = weights(HIDDEN, INPUTS), weights(HIDDEN, HIDDEN), weights(2, HIDDEN)

    def step(x: Tensor, s: States) -> States:
        m = 0.9 * s["m"] + torch.tanh(s["h"] @ v.T)
        c = s["c"] * torch.sigmoid(m @ v) + x @ w.T
        return {"h": torch.tanh(c @ u.T + s["h"]), "c": c, "m": m}

    return step


STEP_FUNCTIONS = {
    "lstm": (lambda: lstm(peephole=False), ("h", "c")),
    "peephole": (lambda: lstm(peephole=True), ("h", "c")),
    "leaky": (leaky, ("h",)),
    "three": (three, ("h", "c", "m")),
}


def zeros(names: tuple[str, ...], batch: int = BATCH) -> States:
    return {n: torch.zeros(batch, 2 if n == "m" else HIDDEN, dtype=F64) for n in names}


@dataclass
class Run:
    """One tapped loop, and what it looked like from the user's side."""

    track: Track
    marked: list[States]  # the tensors of the graph, with their gradients kept
    read: list[States]  # copies that the loss reads
    x: Tensor
    step: StepFunction

    def kept(self, name: str) -> Tensor:
        return torch.stack([or_zero(s[name]) for s in self.marked])

    def direct(self, name: str) -> Tensor:
        return torch.stack([or_zero(s[name]) for s in self.read])


def or_zero(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def run(kind: str, reads: tuple[int, ...] = (2, STEPS - 1), **options: object) -> Run:
    make, names = STEP_FUNCTIONS[kind]
    step, state = make(), zeros(names)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=F64)
    marked: list[States] = []
    read: list[States] = []
    with gradflow.record(nn.Module(), **options) as recording:  # type: ignore[arg-type]
        loss = torch.zeros((), dtype=F64)
        for t, x_t in enumerate(x):
            state = step(x_t, state)
            values = gradflow.tap(**state)
            state = dict(zip(names, values if len(names) > 1 else (values,), strict=True))
            read.append({n: s.clone() for n, s in state.items()})
            for tensor in [*state.values(), *read[-1].values()]:
                tensor.retain_grad()
            marked.append(state)
            if t in reads:
                loss = loss + sum((s**3 + s).sum() for n, s in read[-1].items() if n != "c")
        loss.backward()
    return Run(recording["loop"], marked, read, x, step)


def side_by_side(step: StepFunction, x: Tensor, before: States) -> Tensor:
    """∂s_t/∂s_{t−1} of every sequence by autograd on a pure function, (B, S, S)."""
    widths = [s.shape[1] for s in before.values()]
    rows = []
    for b in range(len(x)):

        def one(v: Tensor, b: int = b) -> Tensor:
            new = step(x[b : b + 1], dict(zip(before, v.split(widths, dim=1), strict=True)))
            return torch.cat(list(new.values()), dim=1)[0]

        flat = torch.cat([s[b : b + 1].detach() for s in before.values()], dim=1)
        rows.append(torch.autograd.functional.jacobian(one, flat)[:, 0])
    return torch.stack(rows)


# ------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("kind", STEP_FUNCTIONS)
def test_states_and_totals_are_those_of_autograd(kind: str) -> None:
    found = run(kind)
    track = found.track
    assert track.cell == "tap"
    assert (track.steps, track.batch) == (STEPS, BATCH)
    assert not track.cuts.any()
    assert list(track.states) == list(found.marked[0])
    for name, values in track.states.items():
        assert torch.equal(values, torch.stack([s[name].detach() for s in found.marked]))
        assert torch.equal(track.grads[name], found.kept(name))
    assert torch.equal(track.grad_h, found.kept("h"))
    assert track.backwards == 1


@pytest.mark.parametrize("kind", STEP_FUNCTIONS)
def test_step_jacobians_are_those_of_independent_states(kind: str) -> None:
    found = run(kind)
    got = step_jacobians(found.track)
    eye = torch.eye(got.shape[-1], dtype=F64).expand(BATCH, -1, -1)
    assert torch.equal(got[0], eye)  # nothing before the first tap was seen
    want = [eye] + [
        side_by_side(found.step, found.x[t], found.marked[t - 1]) for t in range(1, STEPS)
    ]
    assert_jacobians_close(got, torch.stack(want), found.track.mask, bound=1e-14)


@pytest.mark.parametrize("kind", STEP_FUNCTIONS)
def test_the_operator_pushes_and_pulls(kind: str) -> None:
    track = run(kind).track
    stack = step_jacobians(track)
    chosen = torch.tensor([2, 0])
    operator = track.operator(torch.float64, chosen)
    assert (operator.length, operator.batch, operator.size) == (STEPS, 2, stack.shape[-1])
    block = torch.randn(2, 5, operator.size, dtype=F64)
    assert torch.allclose(operator.push(3, block), block @ stack[3, chosen].mT, rtol=1e-14, atol=0)
    assert torch.allclose(operator.pull(3, block), block @ stack[3, chosen], rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", STEP_FUNCTIONS)
def test_the_direct_part_is_what_the_loss_reads(kind: str) -> None:
    found = run(kind)
    got = found.track.grad_h_direct
    want = found.direct("h")
    assert_steps_close(got, want, found.track.mask, what="direct")
    assert bool((got[3:-1] == 0).all())


@pytest.mark.parametrize("kind", STEP_FUNCTIONS)
def test_the_last_loss_step_alone(kind: str) -> None:
    torch.manual_seed(5)
    both = run(kind).track
    torch.manual_seed(5)
    alone = run(kind, reads=(STEPS - 1,)).track
    assert both.last_grads is not None
    for name, values in both.last_grads.items():
        assert_steps_close(values, alone.grads[name], both.mask, what=name)
    assert both.grad_h_last is not None
    assert not torch.equal(both.grad_h_last, both.grad_h)


def test_the_formulas_of_the_lstm_equations() -> None:
    """∂L/∂c_t = o ⊙ (1 − tanh² c_t) ⊙ ∂L/∂h_t + f_{t+1} ⊙ ∂L/∂c_{t+1} + what comes through h."""
    steps, width = 6, 3
    w, x = weights(4 * width, INPUTS), torch.randn(steps, BATCH, INPUTS, dtype=F64)
    w_y = weights(2, width)
    c = torch.zeros(BATCH, width, dtype=F64)
    gates, z = [], []
    with gradflow.record(nn.Module()) as recording:
        loss = torch.zeros((), dtype=F64)
        for x_t in x:  # no path through h: the gates see the input alone
            i, f, g, o = (x_t @ w.T).chunk(4, dim=1)
            f, o = f.sigmoid(), o.sigmoid()
            c = f * c + i.sigmoid() * g.tanh()
            h, c = gradflow.tap(h=o * c.tanh(), c=c)
            gates.append((f.detach(), o.detach()))
            o.retain_grad()
            z.append((h @ w_y.T, o))
            loss = loss + z[-1][0].exp().sum()
        loss.backward()
    track = recording["loop"]
    carried = torch.zeros(BATCH, width, dtype=F64)
    for t in reversed(range(steps)):
        f, o = gates[t]
        grad_h = z[t][0].detach().exp() @ w_y.detach()  # ∂L_t/∂Z_t W_y
        assert_one(track.grad_h[t], grad_h)
        tanh = track.states["c"][t].tanh()
        grad_c = o * (1 - tanh**2) * grad_h + carried
        assert track.grad_c is not None
        assert_one(track.grad_c[t], grad_c)
        assert z[t][1].grad is not None
        assert_one(z[t][1].grad, track.grad_h[t] * tanh)
        carried = f * grad_c


def assert_one(got: Tensor, want: Tensor) -> None:
    mask = torch.ones(1, len(got), dtype=torch.bool)
    assert_steps_close(got.unsqueeze(0), want.unsqueeze(0), mask, bound=1e-13)


# ---------------------------------------------------------------------------- the lecture notes


INPUT_ROWS = (
    (1, 0, 0, 1), (3, 1, 0, 1), (2, 0, 0, 1), (4, 1, 0, 1), (2, 0, 0, 1),
    (1, 0, 1, 1), (3, -1, 0, 1), (6, 1, 0, 1), (1, 0, 1, 1),
)  # fmt: skip


def worked_lstm() -> tuple[gradflow.Recording, list[float], list[float]]:
    """The worked LSTM by hand, in torch: hard gates, linear candidate and output."""
    candidate, write, forget, read = torch.tensor(
        [[1, 0, 0, 0], [0, 100, 0, -10], [0, 100, 0, 10], [0, 0, 100, -10]], dtype=F64
    ).requires_grad_()
    c = torch.zeros(1, 1, dtype=F64, requires_grad=True)
    memory, outputs = [], []
    with gradflow.record(nn.Module()) as recording:
        loss = torch.zeros((), dtype=F64)
        for row in torch.tensor(INPUT_ROWS, dtype=F64):
            memory.append(c.item())
            i, f, o = (((row @ gate) > 0).to(F64) for gate in (write, forget, read))
            c = f * c + i * (row @ candidate)
            h, c = gradflow.tap(h=o * c, c=c)
            outputs.append(h.item())
            loss = loss + h.sum()
        loss.backward()
    return recording, memory, outputs


def test_the_worked_lstm_has_one_wall() -> None:
    recording, memory, outputs = worked_lstm()
    assert memory == [0, 0, 3, 3, 7, 7, 7, 0, 6]
    assert outputs == [0, 0, 0, 0, 0, 7, 0, 0, 6]
    track = recording["loop"]
    assert not track.cuts.any()  # a gate that shuts is no cut
    stack = step_jacobians(track)
    cc = stack[:, :, 1:, 1:]
    gains = gradflow.analyzer.log_gain_map(cc)[0]
    for t in range(9):
        for later in range(t, 9):
            wall = t < 6 <= later
            assert gains[t, later] == (-math.inf if wall else 0.0)
    data = gradflow.analyze(recording)["loop"].data["log_gain"].sel(norm="spectral")[0].values
    assert np.isneginf(data[:6, 6:]).all()
    assert np.isfinite(data[0, :6]).all()
    assert np.isfinite(data[6, 6:]).all()


@pytest.mark.parametrize(("w", "rate"), [(4.0, -2.575), (8.0, -5.919), (-8.0, -0.427)])
def test_a_scalar_sigmoid_loop_never_explodes(w: float, rate: float) -> None:
    weight = torch.tensor(w, dtype=F64, requires_grad=True)
    with gradflow.record(nn.Module()) as recording:
        h = torch.tensor(0.5, dtype=F64)
        for _ in range(100):
            h = gradflow.tap(h=torch.sigmoid(weight * h))
        h.backward()
    track = recording["loop"]
    assert track.h.shape == (100, 1, 1)
    assert gradflow.analyze(recording)["loop"].rate.value == pytest.approx(rate, abs=5e-4)
    got = step_jacobians(track)[1:].flatten()
    want = w * track.h[1:].flatten() * (1 - track.h[1:].flatten())
    assert_steps_close(got[:, None, None], want[:, None, None], track.mask[1:], bound=1e-13)


# --------------------------------------------------------------------- what is one track, and cuts


def test_two_loops_by_name_and_by_start() -> None:
    u = weights(HIDDEN, HIDDEN)

    def loop(steps: int, name: str) -> Tensor:
        h = torch.ones(BATCH, HIDDEN, dtype=F64)
        for _ in range(steps):
            h = gradflow.tap(name, h=torch.tanh(h @ u.T))
        return h.sum()

    with gradflow.record(nn.Module()) as recording:
        (loop(4, "encoder") + loop(3, "decoder") + loop(5, "encoder")).backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {
        "encoder": 4, "decoder": 3, "encoder@2": 5
    }  # fmt: skip
    assert all(t.has_gradient and not t.cuts.any() for t in recording.values())


def test_interleaved_layers_are_told_apart() -> None:
    u, v = weights(HIDDEN, HIDDEN), weights(HIDDEN, HIDDEN, seed=4)
    x = torch.randn(STEPS, BATCH, HIDDEN, dtype=F64)
    with gradflow.record(nn.Module()) as recording:
        low = high = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for x_t in x:
            low = gradflow.tap("low", h=torch.tanh(x_t + low @ u.T))
            high = gradflow.tap("high", h=torch.tanh(low + high @ v.T))
        high.sum().backward()
    stack = step_jacobians(recording["high"])
    slope = 1 - recording["high"].h ** 2
    want = slope[1:].unsqueeze(3) * v.detach()
    assert_jacobians_close(stack[1:], want, recording["high"].mask[1:], bound=1e-14)
    assert recording["low"].steps == STEPS


@pytest.mark.parametrize("how", ["detach", "clone", "data"])
def test_truncation_is_a_cut(how: str) -> None:
    u, x = weights(HIDDEN, HIDDEN), torch.randn(9, BATCH, HIDDEN, dtype=F64)
    ways = {
        "detach": Tensor.detach,
        "data": lambda h: h.data,
        "clone": lambda h: h.detach().clone(),
    }
    with gradflow.record(nn.Module()) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for t, x_t in enumerate(x):
            h = ways[how](h) if t and t % 3 == 0 else h
            h = gradflow.tap(h=torch.tanh(x_t + h @ u.T))
        h.sum().backward()
    track = recording["loop"]
    assert track.steps == 9
    assert track.cuts.nonzero()[:, 0].unique().tolist() == [3, 6]
    assert bool((track.grad_h[:6] == 0).all())
    analysis = gradflow.analyze(recording)
    assert "cut" in {f.name for f in analysis["loop"].findings}
    gains = analysis["loop"].data["log_gain"]
    assert np.isnan(gains[..., 0, 3]).all()
    assert np.isfinite(gains.sel(norm=["spectral", "rms"])[..., 3, 5]).all()
    assert np.isnan(gains.sel(norm="loss")[..., 3, 5]).all()  # no gradient comes there


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_state_multiplied_by_zero_is_cut_for_its_sequence_alone(where: str) -> None:
    u, x = weights(HIDDEN, HIDDEN), torch.randn(STEPS, BATCH, HIDDEN, dtype=F64)
    keep = torch.ones(STEPS, BATCH, 1, dtype=F64)
    keep[4, 1] = 0.0
    with gradflow.record(nn.Module()) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for x_t, k in zip(x, keep, strict=True):
            if where == "before":
                h = gradflow.tap(h=0.5 * (k * h) + torch.tanh(x_t + (k * h) @ u.T))
            else:
                h = gradflow.tap(h=k * torch.tanh(x_t + h @ u.T))
        h.sum().backward()
    assert recording["loop"].cuts.nonzero().tolist() == [[4, 1]]


def test_dead_units_are_no_cut() -> None:
    u = (-weights(HIDDEN, HIDDEN).abs()).detach().requires_grad_()
    with gradflow.record(nn.Module()) as recording:
        h = torch.ones(BATCH, HIDDEN, dtype=F64)
        for _ in range(12):
            h = gradflow.tap(h=torch.relu(h @ u.T))
        h.sum().backward()
    assert not recording["loop"].cuts.any()
    assert gradflow.analyze(recording)["loop"].verdict == "dead"


def test_tapping_at_the_head_of_the_loop() -> None:
    """The first marked state is a constant start: a note, not a finding."""
    u, x = weights(HIDDEN, HIDDEN), torch.randn(40, BATCH, HIDDEN, dtype=F64)
    with gradflow.record(nn.Module()) as recording:
        for _ in range(2):
            h = torch.zeros(BATCH, HIDDEN, dtype=F64)
            for x_t in x:
                h = gradflow.tap(h=h)
                h = torch.tanh(x_t + h @ u.T)
            h.sum().backward()
    assert {n: t.steps for n, t in recording.tracks.items()} == {"loop": 40, "loop@2": 40}
    layer = gradflow.analyze(recording)["loop"]
    assert "cut" not in {f.name for f in layer.findings}
    assert "constant start" in " ".join(recording["loop"].notes)


def test_tapping_at_the_head_where_the_state_is_detached() -> None:
    u, x = weights(HIDDEN, HIDDEN), torch.randn(9, BATCH, HIDDEN, dtype=F64)
    with gradflow.record(nn.Module()) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=F64)
        for t, x_t in enumerate(x):
            h = gradflow.tap(h=h.detach() if t == 5 else h)
            h = torch.tanh(x_t + h @ u.T)
        h.sum().backward()
    assert list(recording.tracks) == ["loop"]
    # the detached state has no gradient either, so nothing reaches it from the step after
    assert recording["loop"].cuts[:, 0].nonzero().flatten().tolist() == [1, 5, 6]


def test_one_product_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    together = step_jacobians(run("three").track)

    def refuses(*_: object, **__: object) -> object:
        raise RuntimeError("an operation that cannot be batched")

    monkeypatch.setattr(torch, "vmap", refuses)
    torch.manual_seed(2)
    found = run("three")
    one_by_one = step_jacobians(found.track)
    assert_jacobians_close(together, one_by_one, found.track.mask, bound=1e-15)


def test_without_gradient_states_alone() -> None:
    u = weights(HIDDEN, HIDDEN)

    def once(h: Tensor) -> Tensor:
        return gradflow.tap(h=torch.tanh(h @ u.T))

    def evaluated() -> gradflow.Recording:
        with gradflow.record(nn.Module()) as recording, torch.no_grad():
            h = torch.ones(BATCH, HIDDEN, dtype=F64)
            for _ in range(5):
                h = once(h)
        return recording

    with pytest.warns(GradflowWarning, match="no_grad"):
        recording = evaluated()
    track = recording["loop"]
    assert track.h.shape == (5, BATCH, HIDDEN)
    assert not track.cuts.any()
    assert not track.has_gradient
    assert re.search("run the loop with gradients enabled", without_gains(recording))


def test_a_leaf_state_after_the_users_hook() -> None:
    start = torch.full((1, 2), 0.3, dtype=F64, requires_grad=True)
    start.register_hook(lambda grad: 3 * grad)
    with gradflow.record(nn.Module()) as recording:
        h = gradflow.tap(h=start)
        for _ in range(3):
            h = gradflow.tap(h=h * 0.5)
        h.sum().backward()
    assert start.grad is not None
    assert torch.equal(recording["loop"].grad_h[0], start.grad)
    assert bool((start.grad == 0.375).all())
    assert recording["loop"].steps == 4


def test_an_unbatched_loop_is_a_batch_of_one() -> None:
    step = lstm(peephole=True)
    state: States = {n: s[0] for n, s in zeros(("h", "c")).items()}
    x = torch.randn(STEPS, INPUTS, dtype=F64)
    marked = []
    with gradflow.record(nn.Module()) as recording:
        for x_t in x:
            state = step(x_t, state)
            state["h"], state["c"] = gradflow.tap(**state)
            assert state["h"].shape == (HIDDEN,)
            marked.append({n: s.unsqueeze(0) for n, s in state.items()})
        state["h"].sum().backward()
    track = recording["loop"]
    assert track.h.shape == (STEPS, 1, HIDDEN)
    want = [side_by_side(step, x[t : t + 1], marked[t - 1]) for t in range(1, STEPS)]
    got = step_jacobians(track)[1:]
    assert_jacobians_close(got, torch.stack(want), track.mask[1:], bound=1e-14)


def test_lengths_of_a_padded_batch() -> None:
    lengths = [7, 3, 5]
    track = run("lstm", reads=(1,), lengths=lengths).track
    assert track.lengths.tolist() == lengths
    assert bool(track.h[3:, 1].isnan().all())
    assert bool(track.grad_h[3:, 1].isnan().all())
    assert not bool(track.h[:3, 1].isnan().any())
    assert bool(step_jacobians(track)[3:, 1].isnan().all())
    with pytest.raises(InputError, match="one length per sequence"):
        run("lstm", lengths=[7, 3])


# ---------------------------------------------------------------------------------- nothing changes


class Loop(nn.Module):
    """An LSTM by hand with dropout on the state, tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUTS + HIDDEN, 4 * HIDDEN)
        self.drop = nn.Dropout(0.3)
        self.hooked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], HIDDEN)
        outputs = []
        for x_t in x:
            i, f, g, o = self.gates(torch.cat([x_t, h], dim=1)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = self.drop(o.sigmoid() * c.tanh())
            h.register_hook(self.hooked.append)
            h, c = gradflow.tap(h=h, c=c)
            outputs.append(h)
        return torch.stack(outputs)


def trained(recorded: bool) -> tuple[list[Tensor], Tensor, int]:
    torch.manual_seed(11)
    model = Loop()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        x = torch.randn(STEPS, BATCH, INPUTS)
        if recorded:
            with gradflow.record(model):
                loss = model(x).pow(2).sum()
                loss.backward()
        else:
            loss = model(x).pow(2).sum()
            loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *model.parameters()], torch.get_rng_state(), len(model.hooked)


def test_bits_random_numbers_and_hooks_are_as_without_a_recording() -> None:
    plain, rng, fired = trained(recorded=False)
    seen, rng_seen, fired_seen = trained(recorded=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert torch.equal(rng, rng_seen)
    assert fired == fired_seen == 3 * STEPS


def test_dropout_is_part_of_the_jacobian() -> None:
    model = Loop().double()
    with gradflow.record(model) as recording:
        y = model(torch.randn(STEPS, BATCH, INPUTS, dtype=F64))
        y[-1].sum().backward()
    stack = step_jacobians(recording["loop"])
    dropped = recording["loop"].h == 0
    assert bool(dropped[1:].any())
    assert bool((stack[1:, :, :HIDDEN][dropped[1:]] == 0).all())
    assert bool((recording["loop"].grad_h_direct[:-1] == 0).all())


def test_outside_a_recording_tap_returns_what_it_was_given() -> None:
    h, c = torch.ones(2), torch.ones(3, dtype=torch.int64)
    assert gradflow.tap(h=h) is h
    one, other = gradflow.tap("any", h=h, c=c)
    assert one is h
    assert other is c
    assert gradflow.tap(h="not a tensor") == "not a tensor"  # type: ignore[arg-type]


def test_a_recording_of_another_thread_sees_nothing() -> None:
    def elsewhere() -> gradflow.Recording:
        with gradflow.record(nn.Linear(1, 1)) as recording:
            thread = threading.Thread(target=lambda: gradflow.tap(h=torch.ones(2, 2)))
            thread.start()
            thread.join()
        return recording

    with pytest.warns(GradflowWarning, match="tap"):
        assert len(elsewhere()) == 0


def test_nested_recordings_both_see_the_loop() -> None:
    u = weights(HIDDEN, HIDDEN)
    with gradflow.record(nn.Module()) as outer, gradflow.record(nn.Module()) as inner:
        h = torch.ones(BATCH, HIDDEN, dtype=F64)
        for _ in range(4):
            h = gradflow.tap(h=torch.tanh(h @ u.T))
        h.sum().backward()
    assert torch.equal(outer["loop"].grad_h, inner["loop"].grad_h)
    assert torch.equal(
        step_jacobians(outer["loop"]),
        step_jacobians(inner["loop"]),
    )


def test_nothing_stays_alive() -> None:
    u = weights(HIDDEN, HIDDEN)
    kept: list[weakref.ref[Tensor]] = []

    def record() -> gradflow.Recording:
        with gradflow.record(nn.Module()) as recording:
            h = torch.ones(BATCH, HIDDEN, dtype=F64)
            for _ in range(4):
                h = gradflow.tap(h=torch.tanh(h @ u.T))
                kept.append(weakref.ref(h))
            h.sum().backward()
        return recording

    recording = record()
    gc.collect()
    assert all(ref() is None for ref in kept)  # the recording itself holds copies
    track = weakref.ref(recording["loop"])
    del recording
    gc.collect()
    assert track() is None


def test_an_accumulated_and_a_scaled_backward() -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 8.0

    u = weights(HIDDEN, HIDDEN)
    with gradflow.record(nn.Module(), scaler=Scaler()) as recording:
        h = torch.ones(BATCH, HIDDEN, dtype=F64)
        for _ in range(4):
            h = gradflow.tap(h=torch.tanh(h @ u.T))
        h.retain_grad()
        (8 * h.sum()).backward(retain_graph=True)
        (8 * h.sum()).backward()
    assert recording["loop"].backwards == 2
    assert bool((recording["loop"].grad_h[-1] == 2).all())


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_nothing_is_invented(reentrant: bool) -> None:
    u = weights(HIDDEN, HIDDEN)

    def loop(h: Tensor) -> Tensor:
        for _ in range(STEPS):
            h = gradflow.tap(h=torch.tanh(h @ u.T))
        return h

    def recorded() -> gradflow.Recording:
        with gradflow.record(nn.Module()) as recording:
            checkpoint(loop, x, use_reentrant=reentrant).pow(2).sum().backward()
        return recording

    x = torch.randn(BATCH, HIDDEN, dtype=F64, requires_grad=True)
    plain = torch.autograd.grad(loop(x).pow(2).sum(), x)[0]
    if reentrant:
        with pytest.warns(GradflowWarning, match="no_grad"):
            recording = recorded()
    else:
        recording = recorded()
        assert bool((recording["loop"].grad_h != 0).all())
    assert x.grad is not None
    assert torch.equal(x.grad, plain)
    assert list(recording.tracks) == ["loop"]
    assert recording["loop"].steps == STEPS
    with pytest.raises(RecordingError, match=r"a checkpoint recomputes|gradients enabled"):
        recording["loop"].operator()


# --------------------------------------------------------------------------------- refused in words


def without_gains(recording: gradflow.Recording) -> str:
    """The sentence on a loop whose gains are not known; everything else of it is there."""
    layer = gradflow.analyze(recording)["loop"]
    assert (layer.verdict, "no gains" in layer.labels) == ("inconclusive", True)
    assert math.isnan(layer.rate.value) and layer.channels is None and layer.horizon is None
    return layer.sentence


def test_a_forgotten_state_is_named_as_the_reason() -> None:
    step, state = lstm(peephole=False), zeros(("h", "c"))
    with gradflow.record(nn.Module()) as recording:
        for x_t in torch.randn(STEPS, BATCH, INPUTS, dtype=F64):
            state = step(x_t, state)
            state["h"] = gradflow.tap(h=state["h"])
        state["h"].sum().backward()
    assert bool((recording["loop"].grad_h[0] != 0).any())
    assert re.search("the loop carries more than its marked states", without_gains(recording))
    assert recording["loop"].last_grads is None
    with pytest.raises(RecordingError, match="no direct part of the gradient"):
        _ = recording["loop"].grad_h_direct


def test_a_state_made_together_with_one_that_is_not_marked() -> None:
    u = weights(2 * HIDDEN, 2 * HIDDEN)
    with gradflow.record(nn.Module()) as recording:
        h = other = torch.ones(BATCH, HIDDEN, dtype=F64)
        for _ in range(5):
            h, other = torch.tanh(torch.cat([h, other], dim=1) @ u.T).chunk(2, dim=1)
            h = gradflow.tap(h=h)
        h.sum().backward()
    with pytest.raises(RecordingError, match="another result of what made those before it"):
        recording["loop"].operator()


def test_a_fused_layer_of_one_step_inside_a_tapped_loop() -> None:
    module, x = nn.LSTM(INPUTS, HIDDEN).double(), torch.randn(STEPS, BATCH, INPUTS, dtype=F64)
    with gradflow.record(module) as recording:
        state = None
        for x_t in x:
            _, state = module(x_t.unsqueeze(0), state)
            h, c = gradflow.tap("tapped", h=state[0][0], c=state[1][0])
            state = h.unsqueeze(0), c.unsqueeze(0)
        h.sum().backward()
    mine, theirs = recording["tapped"], recording["l0"]
    stacks = [step_jacobians(track)[1:] for track in (mine, theirs)]
    assert_jacobians_close(*stacks, mine.mask[1:])
    assert_steps_close(mine.grad_h, theirs.grad_h, mine.mask)


def test_sequences_that_are_mixed_have_no_jacobian() -> None:
    u, norm = weights(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN).double()
    with gradflow.record(norm) as recording:
        h = torch.randn(BATCH, HIDDEN, dtype=F64)
        for _ in range(5):
            h = gradflow.tap(h=torch.tanh(norm(h @ u.T)))
        h.sum().backward()
    assert re.search("mixes the sequences of a batch", without_gains(recording))


class Spike(torch.autograd.Function):
    """A step, whose derivative is taken to be that of a smooth one (Zenke and Ganguli 2018)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.slope = slope
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        result = grad.clone()
        result.mul_((1 + ctx.slope * v.abs()) ** -2)
        return result, None


@pytest.mark.parametrize("width", [HIDDEN, 70], ids=["dense", "wide"])
def test_an_autograd_function_is_read_by_its_backward(width: int) -> None:
    """A spiking neuron: the product of A_t is what autograd gives over the whole loop."""
    torch.manual_seed(0)
    u, first = weights(width, width), torch.randn(BATCH, width, dtype=F64).requires_grad_()
    with gradflow.record(nn.Module()) as recording:
        v = gradflow.tap(v=first)
        for _ in range(5):
            spikes = Spike.apply(v - 1.0, 5.0)
            v = gradflow.tap(v=0.9 * v * (1 - spikes) + spikes @ u.T)
        v.pow(2).sum().backward(retain_graph=True)
    track = recording["loop"]
    product = torch.eye(width, dtype=F64).expand(BATCH, -1, -1)
    for matrix in step_jacobians(track)[1:]:
        product = matrix @ product
    for unit in range(0, width, 11):
        (wanted,) = torch.autograd.grad(v[:, unit].sum(), first, retain_graph=True)
        assert_whole_close(product[:, unit], wanted)
    assert_whole_close(track.grads["v"][0], first.grad)


class Sly(torch.autograd.Function):
    """A backward that does more than compute."""

    weight = torch.ones(1, dtype=F64, requires_grad=True)

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward(noise)
        return 2 * x


class Keeping(Sly):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen = grad
        return 2 * grad, None


class InPlace(Sly):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.saved_tensors[0].add_(1.0)
        return 2 * grad, None


class Drawing(Sly):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad * torch.rand(()), None


class AddingUp(Sly):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            (Sly.weight * 2.0).sum().backward()
        return 2 * grad, None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (Keeping, "changes what it keeps"),
        (InPlace, "changes a tensor in place"),
        (Drawing, "draws random numbers"),
        (AddingUp, "adds to the gradients of weights"),
    ],
)
def test_a_backward_that_does_more_than_compute_is_never_run_once_more(
    function: type[Sly], words: str
) -> None:
    Sly.weight.grad = None
    u, noise = weights(HIDDEN, HIDDEN), torch.zeros(1, dtype=F64)
    quiet = pytest.warns(GradflowWarning) if function is InPlace else contextlib.nullcontext()
    with quiet, gradflow.record(nn.Module()) as recording:
        h, before = torch.ones(BATCH, HIDDEN, dtype=F64), torch.get_rng_state()
        for _ in range(5):
            h = gradflow.tap(h=torch.tanh(function.apply(h @ u.T, noise)))
        assert torch.equal(torch.get_rng_state(), before)
        assert not bool(noise)
        assert Sly.weight.grad is None
        if function is not InPlace:  # which torch itself refuses
            h.sum().backward()
            assert bool((recording["loop"].grad_h != 0).all())
    assert words in " ".join(recording["loop"].notes)


@pytest.mark.parametrize(
    ("width", "jacobians", "reason"),
    [
        (64, None, None),
        (65, None, None),
        (65, True, None),
        (4, False, "jacobians=False"),
    ],
)
def test_states_of_any_width_have_jacobians_unless_they_are_turned_off(
    width: int, jacobians: bool | None, reason: str | None
) -> None:
    u = weights(width, width)
    with gradflow.record(nn.Module(), jacobians=jacobians) as recording:
        h = torch.ones(2, width, dtype=F64)
        for _ in range(3):
            h = gradflow.tap(h=torch.tanh(h @ u.T))
        h.sum().backward()
    assert recording["loop"].has_gradient
    if reason is None:
        recording["loop"].operator()
        return
    with pytest.raises(RecordingError, match=reason):
        recording["loop"].operator()
    assert reason.split(".*")[0] in " ".join(recording["loop"].notes)


def test_what_a_tap_does_not_have_is_said() -> None:
    track = run("lstm").track
    for name in ("delta", "delta_hh", "inputs", "h0"):
        with pytest.raises(RecordingError, match=r"marked with gradflow\.tap"):
            getattr(track, name)
    assert track.c0 is None
    assert track.gates == {}
    assert track.weights == {}
    assert track.hidden == HIDDEN
    assert track.parity.status == "not applicable"
    assert "its weights were not seen" in track.parity.reason


def test_a_loop_without_an_h(tmp_path: Path) -> None:
    u = weights(HIDDEN, HIDDEN)
    with gradflow.record(nn.Module()) as recording:
        s = torch.ones(BATCH, HIDDEN, dtype=F64)
        for _ in range(20):
            s = gradflow.tap("memory", s=torch.tanh(s @ u.T))
        s.sum().backward()
    track = recording["memory"]
    for name in ("h", "grad_h", "grad_h_direct", "grad_h_last"):
        with pytest.raises(RecordingError, match="no state named h; its states are s"):
            getattr(track, name)
    layer = gradflow.analyze(recording)["memory"]
    assert layer.main_state == "s"
    assert layer.title.startswith("memory: ")
    analysis = gradflow.analyze(recording)
    for kind in KINDS:
        gradflow.plot(analysis, kind)
        plt.close("all")
    assert {"grad_s_total", "grad_s_last"} <= set(analysis.frame("steps").columns)
    gradflow.report(analysis, f"{tmp_path}/run")


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"h": [1.0]}, r"the state h of tap must be a tensor, got list; call it as h, c ="),
        ({"h": torch.ones(2, 3, 4)}, r"of shape \(B, width\) or \(width,\), got torch.float32 of"),
        ({"h": torch.ones(2, dtype=torch.int64)}, "must be floating point"),
        ({"h": torch.ones(2, 3), "c": torch.ones(3, 3)}, r"of one batch.* h \(2, 3\), c \(3, 3\)"),
    ],
)
def test_bad_states(states: States, message: str) -> None:
    with pytest.raises(InputError, match=message), gradflow.record(nn.Module()):
        gradflow.tap(**states)


class Pair(NamedTuple):
    v: Tensor
    i: Tensor


@pytest.mark.parametrize(
    "make", [list, tuple, lambda pair: Pair(*pair), lambda p: {"v": p[0], "i": p[1]}]
)
def test_states_in_a_container_are_marked_one_by_one(make: Callable[[Any], Any]) -> None:
    w = nn.Linear(3, 3)
    with gradflow.record(w) as recording:
        state = make([torch.ones(2, 3), torch.zeros(2, 3)])
        for _ in range(4):
            v, i = state.values() if isinstance(state, dict) else state
            given = make([w(v), i + v])
            state = gradflow.tap(state=given)
            assert state is given
        total = sum(one.sum() for one in (state.values() if isinstance(state, dict) else state))
        total.backward()
    (track,) = recording.values()
    named = {"state_v", "state_i"} if isinstance(state, dict | Pair) else {"state_0", "state_1"}
    assert set(track.states) == named
    assert track.steps == 4


def test_no_state_at_all() -> None:
    with pytest.raises(InputError, match="the states of tap must be at least one tensor, got none"):
        gradflow.tap("loop")


def test_jacobians_must_be_a_bool() -> None:
    message = "jacobians must be True, False or left out, got 'yes'"
    with (
        pytest.raises(InputError, match=message),
        gradflow.record(nn.Module(), jacobians="yes"),  # type: ignore[arg-type]
    ):
        pass


def test_a_loop_by_hand_is_told_how_to_tap() -> None:
    untapped = nn.Linear(2, 2)
    message = r"mark its states: h, c = gradflow\.tap\(h=h, c=c\) inside the loop"
    with pytest.warns(GradflowWarning, match=message), gradflow.record(untapped) as recording:
        untapped(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RecordingError, match=message):
        gradflow.analyze(recording)


def test_a_tap_outside_the_loop_is_told() -> None:
    w = weights(2, 2)
    message = "loop was tapped once, so no state came back"
    with pytest.warns(GradflowWarning, match=message), gradflow.record(nn.Module()):
        gradflow.tap(h=torch.ones(3, 2, dtype=F64) @ w).sum().backward()


def test_layers_picks_taps_too() -> None:
    w = weights(2, 2)
    with gradflow.record(nn.Module(), layers="a*") as recording:
        one = other = torch.ones(3, 2, dtype=F64)
        for _ in range(3):
            one, other = gradflow.tap("ab", h=one @ w), gradflow.tap("b", h=other @ w)
        (one + other).sum().backward()
    assert list(recording.tracks) == ["ab"]
    with (
        pytest.warns(GradflowWarning, match="no recurrent layer fits layers"),
        gradflow.record(nn.Module(), layers="c"),
    ):
        gradflow.tap("ab", h=one)


# ------------------------------------------------------------------------------ through every stage


def test_diagnose_plot_and_report(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(30, 6, INPUTS)
    analysis = gradflow.diagnose(Loop().eval(), x)
    layer = analysis["loop"]
    assert (layer.cell, layer.hidden, layer.size) == ("tap", HIDDEN, 2 * HIDDEN)
    assert layer.verdict == "vanishing"
    assert np.isfinite(layer.rate.value)
    assert layer.gradient_note == ""
    assert set(layer.data["state"].values) == {"h", "c"}
    kinds = layer.data["grad_norm"].sel(state="c", kind="direct")
    assert np.isnan(kinds.values).all()
    assert np.isfinite(layer.data["grad_norm"].sel(state="h", kind="direct").values).all()
    for kind in KINDS:
        gradflow.plot(analysis, kind)
        plt.close("all")
    gradflow.report(analysis, f"{tmp_path}/run")
    assert gradflow.load(f"{tmp_path}/run/run.nc")["loop"].verdict == layer.verdict


def test_the_rate_is_that_of_the_same_cell_in_torch() -> None:
    cell, x = nn.LSTMCell(INPUTS, HIDDEN).double(), torch.randn(40, 8, INPUTS, dtype=F64)
    with gradflow.record(cell) as recording:
        h = c = torch.zeros(8, HIDDEN, dtype=F64)
        for x_t in x:
            h, c = cell(x_t, (h, c))
            h, c = gradflow.tap("tapped", h=h, c=c)
        h.sum().backward()
    analysis = gradflow.analyze(recording)
    assert analysis["tapped"].rate.value == pytest.approx(analysis["cell"].rate.value, rel=1e-3)
    mine, theirs = recording["tapped"], recording["cell"]
    assert torch.equal(mine.grad_h, theirs.grad_h)
    stacks = [step_jacobians(track)[1:] for track in (mine, theirs)]
    assert_jacobians_close(*stacks, mine.mask[1:])
    assert mine.last_grads is not None
    assert theirs.last_grads is not None
    for name in ("h", "c"):
        assert_steps_close(mine.last_grads[name], theirs.last_grads[name], mine.mask)
