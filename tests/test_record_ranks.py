"""Models trained by several processes: gradients are one rank's own, and the report says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gradflow

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not distributed.is_available(), reason="torch was built without it"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2)
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 4)
        for y in self.rnn(x)[0]:
            h = self.cell(y, h)
        return h


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A group of a single process, on the CPU."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_distributed_model_is_recorded_under_its_own_names() -> None:
    model, x = Net(), torch.randn(5, 2, 3)
    with gradflow.record(model) as plain:
        model(x).pow(2).sum().backward()
    assert plain.notes == []
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second time with the buckets rebuilt
        model.zero_grad()
        with gradflow.record(wrapped) as recording:
            wrapped(x).pow(2).sum().backward()
        assert list(recording.tracks) == ["rnn.l0", "rnn.l1", "cell"]
        for track in recording.values():
            assert torch.equal(track.grad_h, plain[track.name].grad_h)
            assert track.parity.status == "passed"
        for found, want in zip(model.parameters(), expected, strict=True):
            assert torch.equal(found.grad, want)
    assert recording.notes[0].startswith("per-rank gradients: these are of rank 0 of 1 on its own")
    analysis = gradflow.analyze(recording)
    assert any("per-rank gradients" in warning for warning in analysis.warnings)


def test_without_a_group_nothing_is_said() -> None:
    model, x = Net(), torch.randn(5, 2, 3)
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    assert recording.notes == []
