"""A training step that passes every point where user code calls into gradflow, and faults put there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import gradflow


class Cell(nn.Module):
    """A cell of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.x(x) + self.h(h))


class Everything(nn.Module):
    """A fused layer, loops over a stock cell and one's own, a tapped loop, scans of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2, dropout=0.3)
        self.stock = nn.GRUCell(3, 4)
        self.cell = Cell()
        self.w = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = self.rnn(x)[0][-1]
        for step in (self.stock, self.cell, self.tapped):
            h = x.new_zeros(x.shape[1], 4)
            for x_t in x:
                h = step(x_t, h)
            total = total + h
        for share in (0.3, 0.6, 0.9):
            total = total + self.scanned(total, share)[-1]
        return total

    def scanned(self, x: Tensor, share: float) -> Tensor:
        h = torch.cumsum(x.expand(5, *x.shape) / share ** torch.arange(5.0).view(5, 1, 1), 0)
        h = h * share ** torch.arange(5.0).view(5, 1, 1)
        return gradflow.scan(h, decay=share, time=0, name=f"scan{share}")

    def tapped(self, x: Tensor, h: Tensor) -> Tensor:
        return gradflow.tap(h=torch.tanh(self.w(torch.cat([x, h], 1))))


def step(model: nn.Module, *, recorded: bool = True) -> tuple[dict[str, Any], Any]:
    """One step with a GradScaler: all that could differ, and the recording."""
    torch.manual_seed(5)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    block = gradflow.record(model) if recorded else nullcontext()
    with block as recording:
        output = model(torch.randn(5, 2, 3))
        loss = output.pow(2).sum() + torch.rand(())
        scaler.scale(loss).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found = {"output": output.detach(), "loss": loss.detach(), "rng": torch.get_rng_state()}
    return found | {f"grad {i}": grad for i, grad in enumerate(grads)}, recording


def same(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
