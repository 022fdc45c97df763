"""Watching a training changes no bit of it, and leaves nothing behind."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BFLOAT16_LSTM, torch_is_as_found
from torch import Tensor, nn

import gradflow

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """An embedding, two recurrent layers with dropout between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        layer = nn.LSTM if BFLOAT16_LSTM else nn.GRU
        self.rnn = layer(8, 12, 2, dropout=0.3, batch_first=True)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.rnn(self.embedding(x))[0][:, -1]))


def trained(folder: Path | None, steps: int, **asked: Any) -> tuple[list[Tensor], Tensor]:
    """The weights after a training with clipping, autocast and a scheduler, and the random state."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    watch = None if folder is None else gradflow.watch(net, folder, **asked)
    for _ in range(steps):
        x = torch.randint(0, 20, (4, 10))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), x[:, 0] % 5)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    if watch is not None:
        watch.close()
    return [parameter.detach() for parameter in net.parameters()], torch.get_rng_state()


@pytest.mark.parametrize(
    ("preset", "every", "steps"),
    [("pulse", 1, 300), ("rate", 30, 300), ("full", 2, 4)],
    ids=["pulse", "rate", "full"],
)
def test_a_watched_training_is_the_same_to_the_last_bit(
    preset: str, every: int, steps: int, tmp_path: Path
) -> None:
    plain, random = trained(None, steps)
    watched, after = trained(tmp_path, steps, preset=preset, every=every, budget=None)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert torch.equal(random, after)
    assert len(gradflow.load(tmp_path)) == steps // every  # type: ignore[arg-type]
    assert torch_is_as_found()


def test_the_whole_analysis_of_a_probe_is_beside_the_history(tmp_path: Path) -> None:
    trained(tmp_path, 3, preset="full", every=2, budget=None)
    assert {path.name for path in tmp_path.glob("*.nc")} == {"step-1.nc", "step-3.nc"}
    analysis = gradflow.load(tmp_path / "step-3.nc")
    history = gradflow.load(tmp_path)
    assert history["rnn.l0"]["rate"].sel(step=3).item() == analysis["rnn.l0"].rate.value  # type: ignore[union-attr]
    trained(tmp_path, 1, preset="full", every=2, budget=None, force=True)
    assert {path.name for path in tmp_path.glob("*.nc")} == {"step-1.nc"}


def test_the_comparison_would_see_one_random_number(tmp_path: Path) -> None:
    def draws(step: int, scalars: object, figures: object) -> None:
        torch.rand(1)

    plain, random = trained(None, 3)
    watched, after = trained(tmp_path, 3, preset="pulse", every=2, budget=None, to=draws)
    assert not torch.equal(random, after)
    assert not all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def test_between_two_probes_nothing_is_patched_and_one_hook_remains(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters())
    watch = gradflow.watch(net, tmp_path, optimizer=optimizer, every=100, preset="pulse")
    for _ in range(2):
        net(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
        optimizer.step()
    assert torch_is_as_found()
    assert len(net._forward_pre_hooks) == 1 and not net._forward_hooks
    assert not any(m._forward_pre_hooks for m in net.modules() if m is not net)
    watch.close()
    assert not net._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_a_watched_model_is_copied_saved_and_forgotten(tmp_path: Path) -> None:
    net = Net()
    gradflow.watch(net, tmp_path / "a", preset="pulse", every=1, budget=None)
    other = copy.deepcopy(net)
    again = pickle.loads(pickle.dumps(net))  # noqa: S301  our own
    torch.save(net.state_dict(), io.BytesIO())
    for one in (other, again):
        one(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
        torch.optim.SGD(one.parameters()).step()
    assert len(gradflow.load(tmp_path / "a")) == 0  # type: ignore[arg-type]
