"""Recurrent weights that are no parameters, beside another layer; what a stack is given again is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand_loops import INPUTS, H
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")
F64, T, B = torch.float64, 12, 3


class Beside(nn.Module):
    """A GRU, and after it a loop over a weight that is made in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.kind = nn.GRU(INPUTS, H), kind
        self.make, self.seed = nn.Linear(INPUTS, H * H), nn.Parameter(torch.randn(H))
        self.w = torch.randn(H, H, dtype=F64).mul_(0.3).requires_grad_()
        self.register_buffer("kept", torch.randn(H, H) * 0.3)
        self.stopped = nn.Linear(H, H, bias=False).requires_grad_(False)
        self.several = [torch.randn(H, H, dtype=F64).mul_(0.3).requires_grad_()]

    def weight(self, x: Tensor) -> Tensor:
        made: dict[str, Any] = {
            "a plain tensor": lambda: self.w,
            "a buffer": lambda: self.kept,
            "a frozen layer": lambda: self.stopped.weight.T,
            "one in a list": lambda: self.several[0],
            "an outer product": lambda: torch.outer(self.seed, self.seed).tanh(),
            "a hypernetwork": lambda: self.make(x.mean((0, 1))).view(H, H),
            "one per sequence": lambda: self.make(x.mean(0)).view(-1, H, H),
        }
        weight: Tensor = made[self.kind]()
        return weight

    def forward(self, x: Tensor, tap: Any = None) -> Tensor:
        w, h = self.weight(x), x.new_zeros(x.shape[1], H)
        for u in self.rnn(x)[0]:
            through = torch.bmm(w, h.unsqueeze(2)).squeeze(2) if w.dim() == 3 else h @ w
            h = torch.tanh(u + through)
            h = tap(h=h) if tap else h
        return h


def recorded(model: nn.Module, *given: Any) -> Recording:
    with gradflow.record(model) as recording:
        (model(*given) ** 2).sum().backward()
    return recording


KINDS = ["a plain tensor", "one in a list", "an outer product", "a hypernetwork"]


@pytest.mark.parametrize("kind", [*KINDS, "one per sequence"])
def test_a_loop_over_a_weight_that_is_no_parameter_is_a_track(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Beside(kind).double(), torch.randn(T, B, INPUTS, dtype=F64)
    found, tapped = recorded(model, x), recorded(model, x, gradflow.tap)
    assert list(found.tracks) == ["rnn.l0", "loop"] and not found.unseen
    mine, theirs = found["loop"], tapped["loop"]
    assert torch.equal(mine.grads["h"], theirs.grads["h"])
    assert torch.equal(step_jacobians(mine), step_jacobians(theirs))


class Remembering(Beside):
    """The same, and more and more goes from step to step."""

    def forward(self, x: Tensor, tap: Any = None) -> Tensor:
        w, h, memory = self.weight(x), x.new_zeros(x.shape[1], H), []
        for u in self.rnn(x)[0]:
            memory.append(torch.tanh(u + h @ w))
            h = torch.stack(memory).mean(0)
        return h


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_taken_up_is_named(kind: str) -> None:
    model, x = Remembering(kind).double(), torch.randn(T, B, INPUTS, dtype=F64)
    with pytest.warns(GradflowWarning, match="12 times, each time on what came of the use before"):
        (found,) = recorded(model, x).unseen
    named = {
        "a plain tensor": ("w",),
        "one in a list": ("several",),
        "an outer product": ("seed",),
    }
    assert (found.weights, found.steps) == (named.get(kind, ()), T)


@pytest.mark.parametrize(
    ("kind", "name"), [("a buffer", "kept"), ("a frozen layer", "stopped.weight")]
)
def test_a_loop_over_a_weight_that_needs_no_gradient_is_named(kind: str, name: str) -> None:
    model, x = Beside(kind).double(), torch.randn(T, B, INPUTS, dtype=F64)
    with pytest.warns(GradflowWarning, match="its weight needs no gradient"):
        recording = recorded(model, x)
    assert list(recording.tracks) == ["rnn.l0"]
    (found,) = recording.unseen
    assert (found.weights, found.steps) == ((name,), T - 1)  # the first is a use on zeros


class Stack(nn.Module):
    """Layers of weights of their own are all given one computed matrix; heads share one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(INPUTS, H), nn.Linear(H, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(6))
        self.heads = nn.ModuleList(nn.Linear(H, H) for _ in range(4))
        self.nodes = nn.Parameter(torch.randn(B, H))

    def forward(self, x: Tensor) -> Tensor:
        y, adjacency = self.rnn(x)[1][0], torch.softmax(self.nodes @ self.nodes.T, 1)
        for layer in self.layers:
            y = y + torch.relu(adjacency @ layer(y))
        return self.out(sum((head(y).tanh() for head in self.heads), y))


def test_a_matrix_that_layers_of_their_own_weights_share_is_no_recurrence() -> None:
    recording = recorded(Stack(), torch.randn(T, B, INPUTS))
    assert list(recording.tracks) == ["rnn.l0"] and not recording.unseen
