"""A cell added as one file, `min_gru`, is recorded and judged in closed form, exactly.

Oracle: autograd in float64 on the unrolled loop, and on every pair of its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import min_gru
import pytest
import torch
from min_gru import MinGRUCell
from torch import Tensor

import gradflow
from gradflow.cells import CELLS
from gradflow.recording import Track

STEPS, BATCH, INPUTS, HIDDEN = 9, 3, 2, 4


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CELLS, min_gru.SPEC.name, min_gru.SPEC)


def unrolled(cell: MinGRUCell) -> Iterator[Tensor]:
    """The states of a loop over the cell, the first one the initial."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    yield h
    for x_t in torch.randn(STEPS, BATCH, INPUTS, generator=generator, dtype=torch.float64):
        h = cell(x_t, h)
        yield h


def loss_of(states: list[Tensor]) -> Tensor:
    return states[-1].square().sum() + states[4].sin().sum()


@pytest.fixture
def cell() -> MinGRUCell:
    torch.manual_seed(0)
    return MinGRUCell(INPUTS, HIDDEN).double()


@pytest.fixture
def track(cell: MinGRUCell) -> Track:
    with gradflow.record(cell) as recording:
        loss_of(list(unrolled(cell))[1:]).backward()
    return recording["cell"]


def test_a_spec_is_a_track_with_closed_form_steps(track: Track) -> None:
    assert (track.cell, track.spec, track.hidden) == ("minGRU", min_gru.SPEC, HIDDEN)
    assert track.weights.keys() == {"weight_ih", "bias_ih"}
    assert track.parity.status == "passed"
    assert track.trains_recurrence is None  # it has no recurrent weights


def test_totals_are_those_of_autograd(track: Track, cell: MinGRUCell) -> None:
    states = list(unrolled(cell))[1:]
    expected = torch.autograd.grad(loss_of(states), states)
    torch.testing.assert_close(track.grad_h, torch.stack(expected), rtol=1e-12, atol=0)


def test_gains_are_those_of_the_product_of_steps(track: Track, cell: MinGRUCell) -> None:
    states = list(unrolled(cell))
    each = [states[-1][:, unit].sum() for unit in range(HIDDEN)]
    rows = [torch.autograd.grad(one, states[1], retain_graph=True)[0] for one in each]
    operator = track.operator(torch.float64)
    block = torch.eye(HIDDEN, dtype=torch.float64).expand(BATCH, -1, -1)
    for t in reversed(range(1, STEPS)):
        block = operator.pull(t, block)
    torch.testing.assert_close(block, torch.stack(rows, 1), rtol=1e-12, atol=0)


def test_the_comparison_can_fail(track: Track, cell: MinGRUCell) -> None:
    states = list(unrolled(cell))[1:]
    wrong = torch.autograd.grad(loss_of(states) * (1 + 1e-9), states)
    assert not torch.allclose(track.grad_h, torch.stack(wrong), rtol=1e-12, atol=0)


def test_the_verdict_names_its_gate_and_a_remedy_that_was_tried(cell: MinGRUCell) -> None:
    with gradflow.record(cell) as recording:
        h = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
        for x_t in torch.randn(40, BATCH, INPUTS, dtype=torch.float64):
            h = cell(x_t, h)
        h.sum().backward()
    layer = gradflow.analyze(recording)["cell"]
    found = {finding.name: finding for finding in layer.findings}
    assert layer.verdict == "vanishing"
    assert found["vanishing"].advice.startswith("draw the keep biases from the range of distances")
    assert found["vanishing"].code == found["keep-gates-leak"].code  # raised by 1 is not enough
    assert found["keep-gates-leak"].code == f"model.bias_ih.data[:{HIDDEN}].uniform_(1, 39).log_()"


def test_it_takes_one_short_file() -> None:
    lines = Path(min_gru.__file__).read_text().partition("from __future__")[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60
