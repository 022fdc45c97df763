"""Loops whose state is wider than a step Jacobian is written out for, small enough to write it out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradflow
from gradflow.recording import Track

F64 = torch.float64
INPUTS = 3


class Convolutional(nn.Module):
    """A ConvLSTM."""

    def __init__(self, channels: int, inputs: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs + channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(torch.cat([x, state[0]], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Written(nn.Module):
    """A memory (B, N, M) with soft addresses, as a neural Turing machine writes to it."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.key, self.new = nn.Linear(INPUTS, width), nn.Linear(width, width)
        self.start = nn.Parameter(torch.randn(places, width))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        share = torch.softmax(memory @ self.key(x).unsqueeze(2), dim=1)  # (B, N, 1)
        read = (share * memory).sum(1)
        return memory * (1 - share) + share * torch.tanh(self.new(read)).unsqueeze(1)


def convolved(jacobians: bool | None, steps: int = 4) -> Track:
    torch.manual_seed(0)
    cell = Convolutional(2).double()
    with gradflow.record(cell, jacobians=jacobians) as recording:
        state = (torch.randn(3, 2, 5, 5, dtype=F64), torch.randn(3, 2, 5, 5, dtype=F64))
        for _ in range(steps):
            state = cell(torch.randn(3, 1, 5, 5, dtype=F64), state)
        state[0].pow(2).sum().backward()
    return recording["cell"]


def addressed(jacobians: bool | None, steps: int = 4) -> Track:
    torch.manual_seed(0)
    cell = Written(9, 8).double()
    with gradflow.record(cell, jacobians=jacobians) as recording:
        memory = cell.start.expand(2, -1, -1)
        for _ in range(steps):
            memory = cell(torch.randn(2, INPUTS, dtype=F64), memory)
        memory.pow(2).sum().backward()
    return recording["cell"]


def tapped(jacobians: bool | None, steps: int = 4) -> Track:
    torch.manual_seed(0)
    weight = (torch.randn(65, 65, dtype=F64) / 8).requires_grad_()
    with gradflow.record(nn.Module(), jacobians=jacobians) as recording:
        h = torch.randn(3, 65, dtype=F64)
        for _ in range(steps):
            h = gradflow.tap(h=torch.relu(h @ weight.T))
        h.pow(2).sum().backward()
    return recording["loop"]


WIDE = (convolved, addressed, tapped)
