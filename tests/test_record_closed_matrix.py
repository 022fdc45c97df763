"""The closed-loop column of the matrix of fused layers, cells and loops: each run on its own output.

The input of every step is a given one plus what the state before makes of it. The product of all A_t
is held against autograd over the whole loop, run again from an independent state, per sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import cases
import loops
import pytest
import torch
from cases import Case, Setup
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians

State = dict[str, Tensor]
Step = Callable[[State, int], State]

pytestmark = pytest.mark.usefixtures("one_thread")
# a direction back has no step of its own, packed steps begin together, dropout draws anew
FUSED = [
    case
    for case in cases.EXACT_CASES
    if not case.bidirectional and case.packed == "no" and not case.dropout
]
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda h: h,
    "masked": lambda h: h * torch.tensor([[1.0], [0.5], [0.0]], dtype=h.dtype),
    "mixed": lambda h: h.roll(1, 1) - 0.2 * h,
}
WAYS = ("cell", "one's own", "tapped")


def feedback(width: int, inputs: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return 0.6 * scale * torch.randn(width, inputs, generator=generator, dtype=torch.float64)


def fused_step(setup: Setup) -> tuple[State, Step]:
    """A layer called with one step at a time."""
    case, module = setup.case, setup.module
    batch, unbatched = setup.x.shape[1], setup.case.layout == "unbatched"
    names = ["h", "c"] if case.cell == cases.LSTM else ["h"]
    keys = [
        (i, s, s if case.layers == 1 else f"l{i}.{s}") for i in range(case.layers) for s in names
    ]
    back = feedback(case.proj or cases.HIDDEN, cases.INPUTS, case.scale)
    hx = setup.hx or [torch.zeros(case.layers, batch, case.proj or cases.HIDDEN).double(), None]
    if len(names) == 2 and hx[1] is None:
        hx = [hx[0], torch.zeros(case.layers, batch, cases.HIDDEN).double()]
    initial = {key: hx[names.index(s)][i] for i, s, key in keys}

    def step(state: State, t: int) -> State:
        top = [state[key] for i, s, key in keys if s == "h"][-1]
        x = setup.x[t] + top @ back
        parts = [torch.stack([state[key] for _, s, key in keys if s == name]) for name in names]
        x = x.unsqueeze(1 if case.layout == "batch_first" else 0)
        if unbatched:
            x, parts = x[:, 0], [part[:, 0] for part in parts]
        _, end = module(x, tuple(parts) if len(parts) == 2 else parts[0])
        ends = dict(zip(names, end if isinstance(end, tuple) else (end,), strict=True))
        found = {key: ends[s][i] for i, s, key in keys}
        return {key: row[None] if unbatched else row for key, row in found.items()}

    return initial, step


class Wrapped(nn.Module):
    """A cell of one's own around a stock one's equations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Linear(2 * width, width, dtype=torch.float64)
        self.g = nn.Linear(2 * width, width, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        both = torch.cat([x, h], 1)
        gate = torch.sigmoid(self.g(both))
        return gate * h + (1 - gate) * torch.tanh(self.f(both))


def cell_step(
    way: str, kind: str, bias: bool, between: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, State, Step]:
    """A loop over a cell, with something between two calls."""
    width = loops.HIDDEN
    cell = loops.cell_of(kind, bias, width) if way == "cell" else Wrapped(width)
    names = ["h", "c"] if way == "cell" and kind == "LSTM" else ["h"]
    given, back = torch.randn(9, 3, width).double(), feedback(width, width)
    initial = {name: torch.zeros(3, width).double() for name in names}

    def step(state: State, t: int) -> State:
        x = given[t] + state["h"] @ back
        start = {name: between(value) for name, value in state.items()}
        if way == "tapped":
            h = start["h"] + 0.5 * torch.tanh(cell.f(torch.cat([x, start["h"]], 1)))
            return {"h": gradflow.tap(h=h)}
        argument = tuple(start.values()) if len(names) == 2 else start["h"]
        return dict(zip(names, loops.as_state(cell(x, argument)), strict=True))

    return cell, initial, step


def check(model: nn.Module, initial: State, step: Step, steps: int) -> None:
    """Gains, totals and composition of one loop."""
    with gradflow.record(model) as recording:
        state, states = initial, []
        for t in range(steps):
            state = step(state, t)
            states.append(state)
        for each in states:
            each["h" if "h" in each else list(each)[-1]].retain_grad()
        loss = sum((1.0 + n) * v.pow(2).sum() for n, v in enumerate(states[-1].values()))
        loss.backward()
    track = next(
        (t for t in recording.values() if t.cell == "loop"), recording[next(iter(recording.tracks))]
    )
    assert list(track.states) == list(initial)
    matrices = step_jacobians(track)
    assert len(matrices) == steps
    start, end = steps // 3, steps - 1
    leaves = {name: v.detach().requires_grad_() for name, v in states[start].items()}
    now = leaves
    for t in range(start + 1, end + 1):
        now = step(now, t)
    wide = torch.cat(list(now.values()), dim=1)
    rows = [
        torch.cat(
            torch.autograd.grad(wide[:, i].sum(), list(leaves.values()), retain_graph=True), 1
        )
        for i in range(wide.shape[1])
    ]
    exact = torch.stack(rows, dim=1)  # (B, S, S)
    mine = torch.eye(exact.shape[1], dtype=exact.dtype).expand_as(exact)
    for t in range(start + 1, end + 1):
        mine = matrices[t] @ mine
    bound = exact.abs().amax((1, 2), keepdim=True)

    def same(one: Tensor) -> bool:
        return bool(((one - exact).abs() <= 1e-9 * bound).all())

    assert same(mine) and bool(bound.isfinite().all())
    assert not same(mine * (1 + 1e-8)) or not bool(bound.any())
    if "h" in track.grads:  # h is one tensor, so autograd has its total
        totals = torch.stack([each["h"].grad for each in states])
        size = totals.abs().amax(2, keepdim=True)
        assert bool(((track.grads["h"] - totals).abs() <= 1e-9 * size).all())


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_layers(case: Case) -> None:
    setup = cases.build(case)
    check(setup.module, *fused_step(setup), case.steps)


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("kind", "bias"), list(product(loops.CELLS, (True, False))))
def test_cells(kind: str, bias: bool, between: str) -> None:
    torch.manual_seed(4)
    check(*cell_step("cell", kind, bias, BETWEEN[between]), 9)


@pytest.mark.parametrize("between", ["as it is", "mixed"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_loops(way: str, between: str) -> None:
    torch.manual_seed(4)
    check(*cell_step(way, "", True, BETWEEN[between]), 9)
