"""What the graph of a backward shows: which weights repeat, and what crosses from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from seam import Unrolled, chains, recurrences, uses_of
from seam import edges_between as crossing
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def graph_of(loss: Tensor, model: nn.Module) -> tuple[Unrolled, dict[int, str]]:
    graph = Unrolled([loss.grad_fn])
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {
        place: names[id(node.variable)]
        for place, node in enumerate(graph.nodes)
        if hasattr(node, "variable")
    }
    return graph, weights


class Parts(nn.Module):
    """Weights to loop over by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h, self.g = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.a = nn.Parameter(torch.rand(4))
        self.mask = torch.ones(4, 4)
        self.act = nn.PReLU()
        self.stack = nn.Parameter(torch.randn(5, 4, 4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.conv = nn.Conv1d(1, 1, 3, padding=1)


def vanilla(m: Parts, x: Tensor) -> Tensor:
    h = torch.zeros(2, 4)
    for u in x:
        h = torch.tanh(m.x(u) + m.h(h))
    return h


def masked(m: Parts, x: Tensor) -> Tensor:
    h = torch.zeros(2, 4)
    for u in x:
        h = torch.tanh(u + h @ (m.h.weight.abs() * m.mask).T)
    return h


def depth(m: Parts, x: Tensor) -> Tensor:
    y = x
    for _ in range(5):
        y = y + m.g(torch.relu(m.h(y)))
    return y


def decay(m: Parts, x: Tensor) -> Tensor:
    h = torch.zeros(2, 4)
    for u in x:
        h = torch.sigmoid(m.a) * h + m.x(u)
    return h


def convolved(m: Parts, x: Tensor) -> Tensor:
    y = x[0].unsqueeze(1)
    for _ in range(4):
        y = torch.tanh(m.conv(y))
    return y


def in_parallel(m: Parts, x: Tensor) -> Tensor:
    return torch.stack([m.h(torch.tanh(m.x(u))) for u in x])


def siamese(m: Parts, x: Tensor) -> Tensor:
    return sum((m.h(torch.relu(m.x(u))) for u in x), torch.zeros(2, 4))


def tied(m: Parts, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.h.weight) @ m.h.weight.T


def slices(m: Parts, x: Tensor) -> Tensor:
    for weight in m.stack:
        x = torch.tanh(x @ weight)
    return x


def one_slice(m: Parts, x: Tensor) -> Tensor:
    h = torch.zeros(2, 4)
    for u in x:
        h = torch.tanh(u + h @ m.stack[1])
    return h


def shared_activation(m: Parts, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = m.act(layer(x + m.a))
    return x


@pytest.mark.parametrize(
    ("run", "expected", "steps"),
    [
        (vanilla, {"h.weight", "h.bias"}, 6),
        (masked, {"h.weight"}, 6),
        (depth, {"h.weight", "h.bias", "g.weight", "g.bias"}, 5),
        (decay, {"a"}, 6),
        (convolved, {"conv.weight", "conv.bias"}, 4),
        (one_slice, {"stack"}, 6),
        (slices, set(), 0),
        (in_parallel, set(), 0),
        (siamese, set(), 0),
        (tied, set(), 0),
        (shared_activation, set(), 0),
    ],
)
def test_weights_whose_uses_follow_one_another(
    run: Callable[[Parts, Tensor], Tensor], expected: set[str], steps: int
) -> None:
    torch.manual_seed(0)
    model = Parts()
    graph, weights = graph_of(run(model, torch.randn(6, 2, 4)).sum(), model)
    found = chains(graph, uses_of(graph, weights), ())
    names = {weights[chain.weight] for chain in found}
    assert names == expected
    groups = recurrences(graph, found)
    assert [group.steps for group in groups] == ([steps] if expected else [])


def test_a_recorded_state_between_two_uses_ends_the_chain() -> None:
    model = Parts()
    h, made = torch.zeros(2, 4), []
    for u in torch.randn(6, 2, 4):
        h = torch.tanh(model.x(u) + model.h(h))
        made.append(h.grad_fn)
    graph, weights = graph_of(h.sum(), model)
    places = graph.places()
    assert chains(graph, uses_of(graph, weights), ())
    assert not chains(graph, uses_of(graph, weights), {places[node] for node in made})


def crossed(loss: Tensor, uses: list[Any]) -> list[set[str]]:
    """Kinds of operations whose results cross into every step, cut before each use."""
    graph = Unrolled([loss.grad_fn])
    places = graph.places()
    marks = {places[node]: step for step, node in enumerate(uses)}
    found = crossing(graph, marks, [node._sequence_nr() for node in uses[1:]])
    return [{type(node).__name__ for node, _ in edges} for edges in found]


def test_what_crosses_is_what_the_next_step_knows_of_the_past() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 16, requires_grad=True)
    h, c, uses, read = torch.zeros(2, 4), torch.zeros(2, 4), [], []
    for _ in range(4):
        gates = (h + 1) @ w
        uses.append(gates.grad_fn)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        read.append(h.exp())  # read by the loss alone: it does not cross
    # c is the result of an addition, h + 1 as well, h itself is not needed any more
    assert crossed(torch.stack(read).sum(), uses) == [{"AddBackward0"}] * 3


def test_a_memory_of_all_steps_crosses_as_it_grows() -> None:
    w = torch.randn(4, 4, requires_grad=True)
    h, uses, memory = torch.ones(2, 4), [], []
    for _ in range(4):
        u = h @ w
        uses.append(u.grad_fn)
        memory.append(u.tanh())
        h = torch.stack(memory).mean(0).exp()
    graph = Unrolled([h.sum().grad_fn])
    places = graph.places()
    marks = {places[node]: step for step, node in enumerate(uses)}
    found = crossing(graph, marks, [node._sequence_nr() for node in uses[1:]])
    assert [len(edges) for edges in found] == [2, 3, 1]  # h alone where no later use is left
