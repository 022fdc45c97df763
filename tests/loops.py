"""Hand-written loops over cells, and what autograd says about them on the user's own graph.

A loop gives every step the state of the one before, after something `between`: nothing, a mask, a
detachment. The loss reads a copy of each h (and c), so that what reaches that copy is the direct
part; the tensors that the cell returned keep their gradients, which are the totals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]  # h, or h and c
Between = Callable[[int, State, State], State]  # t, what was returned, what that step began with

CELLS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
INPUTS, HIDDEN = 3, 4


def cell_of(kind: str, bias: bool = True, inputs: int = INPUTS) -> nn.RNNCellBase:
    """A float64 cell with weights large enough to see errors."""
    options = {"bias": bias, "dtype": torch.float64}
    if kind == "LSTM":
        return nn.LSTMCell(inputs, HIDDEN, **options)
    if kind == "GRU":
        return nn.GRUCell(inputs, HIDDEN, **options)
    return nn.RNNCell(inputs, HIDDEN, nonlinearity=kind[4:].lower(), **options)


def as_state(returned: Tensor | State) -> State:
    return returned if isinstance(returned, tuple) else (returned,)


def as_argument(state: State | None) -> object:
    return state if state is None or len(state) == 2 else state[0]


@dataclass
class Run:
    """One loop, with the graph tensors a test asks about, one entry per step."""

    returned: list[State] = field(default_factory=list)
    began: list[State | None] = field(default_factory=list)
    read: list[State] = field(default_factory=list)

    def keep(self) -> Run:
        """Have every tensor keep its gradient, as far as it has one."""
        for tensor in [t for state in self.returned + self.read for t in state]:
            if tensor.requires_grad:
                tensor.retain_grad()
        return self

    def grad(self, which: str, place: int) -> Tensor:
        """(T, B, ·): totals of h (place 0) or c (1), or with "read" their direct parts."""
        tensors = [state[place] for state in getattr(self, which)]
        return torch.stack([_grad(t) for t in tensors])

    def values(self, place: int) -> Tensor:
        return torch.stack([state[place].detach() for state in self.returned])

    def last(self, steps: Tensor, place: int) -> Tensor:
        """Totals of the loss at the given step of each sequence alone, from what was read there."""
        heads, seeds = [], []
        for t, state in enumerate(self.read):
            here = (steps == t).unsqueeze(1)
            for tensor in state:
                if tensor.requires_grad:
                    heads.append(tensor)
                    seeds.append(torch.where(here, _grad(tensor), 0.0))
        wanted = [state[place] for state in self.returned]
        everything = [t for state in self.returned + self.read for t in state]
        kept = [(t, t.grad.clone()) for t in everything if t.retains_grad and t.grad is not None]
        found = torch.autograd.grad(heads, wanted, seeds, retain_graph=True, allow_unused=True)
        for tensor, grad in kept:  # a kept gradient grows with every pass
            tensor.grad = grad
        return torch.stack(
            [
                torch.zeros_like(tensor) if grad is None else grad
                for tensor, grad in zip(wanted, found, strict=True)
            ]
        )


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def run(
    cell: nn.Module,
    x: Tensor,
    between: Between | None = None,
    start: State | None = None,
) -> Run:
    """Go over x (T, B, I); `between` makes the next state from the returned one."""
    found, state = Run(), start
    for t, x_t in enumerate(x):
        if t and between is not None:
            assert state is not None
            before = found.began[-1]
            zero = tuple(torch.zeros_like(s) for s in state)
            state = between(t, state, zero if before is None else before)
        found.began.append(state)
        state = as_state(cell(x_t, as_argument(state)))
        found.returned.append(state)
        found.read.append(tuple(s.clone() for s in state))
    return found.keep()


def loss_of(found: Run, steps: list[int] | None = None, with_c: bool = False) -> Tensor:
    """A curved loss with its own weight on every entry, of h (and c) at the given steps (all)."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for t, state in enumerate(found.read):
        for tensor in state[: 1 + with_c]:
            weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if steps is None or t in steps:
                total = total + (weight * tensor).sum() + 0.5 * (tensor**2).sum()
    return total


def dense_step(cell: nn.Module, x_t: Tensor, began: State) -> Tensor:
    """∂(returned state)/∂(the state the call began with), (B, S, S), by autograd."""
    return dense_map(lambda *s: as_state(cell(x_t, as_argument(s))), began)


def dense_map(function: Callable[..., State], at: State) -> Tensor:
    """The Jacobian of a map of states whose sequences do not mix, (B, S, S)."""
    flat = torch.cat([s.detach() for s in at], dim=1)
    widths = [s.shape[1] for s in at]

    def summed(v: Tensor) -> Tensor:
        return torch.cat(function(*v.split(widths, dim=1)), dim=1).sum(0)

    return torch.autograd.functional.jacobian(summed, flat).permute(1, 0, 2)
