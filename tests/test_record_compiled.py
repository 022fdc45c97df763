"""Models compiled with torch.compile: fused layers run eagerly, are recorded, and change by no bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import gradflow

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Net(nn.Module):
    """A recurrent stack between layers that torch.compile does compile."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 8)
        self.rnn = nn.LSTM(8, 6, 2, dropout=0.2)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.rnn(torch.tanh(self.before(x)))[0]))


def train(recorded: bool) -> tuple[list[float], Tensor, Tensor]:
    """Losses, final parameters and random state of a few steps of a compiled model."""
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters())
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = compiled(torch.randn(6, 4, 3)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for _ in range(4):
        if not recorded:
            step()
            continue
        with gradflow.record(compiled) as recording:
            step()
        assert list(recording.tracks) == ["rnn.l0", "rnn.l1"]
        assert [track.parity.status for track in recording] == ["passed", "passed"]
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, parameters, torch.get_rng_state()


def test_a_compiled_model_is_recorded_and_not_disturbed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch._dynamo's own imports
        plain, seen = train(False), train(True)
    assert plain[0] == seen[0]
    assert torch.equal(plain[1], seen[1])
    assert torch.equal(plain[2], seen[2])


def test_a_compiled_loop_over_a_cell_is_one_track() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for x_t in x:
                state = self.cell(x_t, state)
            assert state is not None
            return state[0]

    model, x = Loop(), torch.randn(3, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(model, backend="aot_eager")
        before = compiled(x)
        with gradflow.record(compiled) as recording:
            during = compiled(x)
            during.sum().backward()
        after = compiled(x)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    (track,) = recording
    assert (track.name, track.steps, track.parity.status) == ("cell", 3, "passed")
