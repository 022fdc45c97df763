"""What happens to a state between two calls, however long: the product of A_t against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import RecordingError
from gradflow.hooks import graph

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, STEPS, INPUTS, HIDDEN = 3, 5, 2, 4


class Own(nn.Module):
    """A cell of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(INPUTS + HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.map(torch.cat([x, h], dim=1)))


class Between(nn.Module):
    """A loop whose state goes through a residual network between two calls: h + g(h), no ODE needed."""

    def __init__(self, cell: nn.Module, deep: int, residual: bool) -> None:
        super().__init__()
        self.cell, self.residual = cell, residual
        self.weights = nn.ParameterList(
            torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(deep)
        )

    def between(self, h: Tensor) -> Tensor:
        out = h
        for weight in self.weights:
            out = torch.tanh(out @ weight + 0.1)
        return h + out if self.residual else out

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        for t, x_t in enumerate(x):
            h = self.cell(x_t, self.between(h) if t else h)
            h = first if t == 0 and first is not None else h
        return h


CELLS = {"stock": lambda: nn.GRUCell(INPUTS, HIDDEN), "own": Own}


WAYS = [("stock", deep, True) for deep in (2, 12, 300)] + [("own", deep, True) for deep in (2, 12)]


@pytest.mark.parametrize(("cell", "deep", "residual"), [*WAYS, ("stock", 12, False)])
def test_a_long_way_between_two_calls_is_read_whole(cell: str, deep: int, residual: bool) -> None:
    torch.manual_seed(0)
    model, x = (
        Between(CELLS[cell](), deep, residual).double(),
        torch.randn(STEPS, BATCH, INPUTS).double(),
    )
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    matrices = step_jacobians(recording["cell"])
    first = recording["cell"].h[0]
    for b in range(BATCH):
        product = torch.linalg.multi_dot(list(matrices[1:, b].flip(0)))
        exact = torch.autograd.functional.jacobian(
            lambda row, b=b: model(x, torch.cat([first[:b], row[None], first[b + 1 :]]))[b],
            first[b],
        )
        torch.testing.assert_close(product, exact, rtol=1e-9, atol=1e-12 * float(exact.abs().max()))
        assert not torch.allclose(product * (1 + 1e-6), exact, rtol=1e-9, atol=0)


def test_more_than_is_looked_at_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_BETWEEN", 500)
    torch.manual_seed(0)
    model, x = (
        Between(nn.GRUCell(INPUTS, HIDDEN), 300, True).double(),
        torch.randn(STEPS, BATCH, INPUTS).double(),
    )
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    with pytest.raises(RecordingError, match="more than 500 operations"):
        step_jacobians(recording["cell"])
