"""Loops by hand whose states are odd: two that start as one tensor, several in one, seen in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_loops import INPUTS, H, Parts
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
F64, T, B = torch.float64, 10, 3


class Marked(Parts):
    """Its states are kept with their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[Tensor]] = []

    def keep(self, *states: Tensor) -> None:
        for state in states:
            state.retain_grad()
        self.kept.append(list(states))

    def rows(self, part: Callable[[Tensor], Any]) -> Tensor:
        """(T, B, S) of what is taken from every kept state."""
        return torch.stack([torch.cat([part(s) for s in states], 1) for states in self.kept])


class Oscillators(Marked):
    """Position and velocity start as one tensor of zeros, so the first step lacks what comes of them."""

    def forward(self, x: Tensor) -> Tensor:
        y = v = self.zeros(x)
        for u in x:
            v = v + 0.1 * (torch.tanh(self.x(u) + self.h(y) + self.hr(v)) - 2.0 * y - 3.0 * v)
            y = y + 0.1 * v
            self.keep(v, y)
        return self.out(y)


class Packed(Marked):
    """Two states in one tensor (2, B, H), the batch in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        s = torch.stack([self.start.expand(x.shape[1], H), self.start.expand(x.shape[1], H)])
        for u in x:
            h, m = s.unbind(0)
            new = torch.maximum(torch.tanh(self.x(u) + self.h(h)), m - 1)
            s = torch.stack([new, 0.9 * m + 0.1 * new])
            self.keep(s)
        return self.out(s[0]) + self.out(s[1])


class Hidden(Marked):
    """Into what the last state goes keeps no values of it."""

    def forward(self, x: Tensor) -> Tensor:
        v = self.start.expand(x.shape[1], H)
        for u in x:
            v = v + torch.logaddexp(self.h(v), self.x(u)) * 0.1
            self.keep(v)
        return v.sum().unsqueeze(0)


def flat(state: Tensor) -> Tensor:
    return state if state.dim() == 2 else state.movedim(1, 0).flatten(1)


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [(Oscillators, 0, T), (Packed, 0, T), (Hidden, 0, T - 1)],
)
def test_the_totals_and_the_product_are_those_of_autograd(
    make: Callable[[], Marked], first: int, last: int
) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(T, B, INPUTS, dtype=F64)
    with gradflow.record(model) as recording:
        model(x).pow(2).sum().backward(retain_graph=True)
    (track,) = recording.values()
    assert track.steps == last - first
    assert bool(track.notes) == (track.steps < T)
    states, totals = model.rows(lambda s: flat(s.detach())), model.rows(lambda s: flat(s.grad))
    assert torch.equal(side_by_side(track.states), states[first:last])
    torch.testing.assert_close(side_by_side(track.grads), totals[first:last], rtol=1e-12, atol=0)
    check_product(track, model.kept[first], model.kept[last - 1])


def side_by_side(parts: Any) -> Tensor:
    return torch.cat(list(parts.values()), 2)


def check_product(track: Track, start: list[Tensor], end: list[Tensor]) -> None:
    """Rows of ∂s_last/∂s_first by autograd; where one state is made from the other, it is not read."""
    product = torch.eye(sum(s.shape[-1] for s in track.states.values()), dtype=F64)
    for matrix in step_jacobians(track)[1:, 0]:
        product = matrix @ product
    if len(start) > 1:
        # y' = y + 0.1 v': autograd's ∂/∂v holds what goes through y, the state Jacobian does not
        product[:, :H] += 0.1 * product[:, H:]
    for number, state in enumerate(end):
        for unit in range(flat(state).shape[1]):
            found = torch.autograd.grad(flat(state)[0, unit], start, retain_graph=True)
            truth = torch.cat([flat(grad)[0] for grad in found])
            mine = product[number * H + unit]
            torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-13)


class Membrane(nn.Module):
    """A leaky neuron without weights, whose first state may be of any shape that fits, or empty."""

    def forward(self, x: Tensor, mem: Tensor) -> Tensor:
        mem = torch.zeros_like(x) if not mem.numel() else mem.expand_as(x)
        return 0.9 * mem + torch.tanh(x) * torch.cos(mem)


@pytest.mark.parametrize("width", [(3,), (1, 4), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("start", [(0,), (1,), "last", "one row", "whole"], ids=str)
def test_a_first_state_that_is_stretched_hides_no_sequence(
    start: object, width: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    batch, steps = 5, 4
    shapes = {"last": width[-1:], "one row": (1, *width), "whole": (batch, *width)}
    mem = torch.zeros(shapes.get(start, start)).double()  # type: ignore[call-overload]
    cell = Membrane()
    gain = nn.Parameter(torch.ones(()).double())
    x = torch.randn(steps, batch, *width).double()
    kept = []
    with gradflow.record(nn.ModuleList([cell])) as recording:
        for t in range(steps):
            mem = cell(x[t] * gain, mem)
            mem.retain_grad()
            kept.append(mem)
        (mem**2).sum().backward()
    (track,) = recording.values()
    assert track.lengths.tolist() == [steps] * batch
    states = torch.stack(kept).flatten(2)
    assert torch.equal(track.states["mem"], states)
    grads = torch.stack([state.grad for state in kept]).flatten(2)
    torch.testing.assert_close(track.grads["mem"], grads, rtol=1e-12, atol=0)
    slope = 0.9 - torch.tanh(x[1:].flatten(2)) * torch.sin(states[:-1])
    torch.testing.assert_close(
        step_jacobians(track)[1:], torch.diag_embed(slope).detach(), rtol=1e-12, atol=0
    )
