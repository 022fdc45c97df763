"""A cell that gradflow does not know, in one file: the module, its steps, its spec.

A minGRU (Feng et al. 2024): h_t = k_t ⊙ h_{t−1} + (1 − k_t) ⊙ n_t, with k = σ(a_k) and n = a_n of the
input alone, a = W_ih x_t + b_ih. k = 1 − z is what it keeps.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from gradflow.cells import CellSpec, Keeper, Named, Steps, Weights, previous


def min_gru_cell(x: Tensor, h: Tensor, weight_ih: Tensor, bias_ih: Tensor) -> Tensor:
    """One step: x (B, I), h (B, H)."""
    a_k, n = nn.functional.linear(x, weight_ih, bias_ih).chunk(2, dim=-1)
    return torch.lerp(n, h, a_k.sigmoid())


class MinGRUCell(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        made = nn.Linear(inputs, 2 * hidden)
        self.weight_ih, self.bias_ih = made.weight, made.bias

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return min_gru_cell(x, h, self.weight_ih, self.bias_ih)


def linearise(weights: Weights, x: Tensor, h: Tensor, initial: Named) -> Steps:
    """A_t = diag(k_t)."""
    a_k, n = weights.project_input(x).chunk(2, dim=2)
    k = a_k.sigmoid()
    factor = torch.stack([(previous(h, initial["h"]) - n) * k * (1 - k), 1 - k], dim=2)
    no_weights = h.new_empty(0, h.shape[2])
    return Steps(weight_hh=no_weights, gates={"k": k}, states={"h": h}, factor=factor, keep=k)


SPEC = CellSpec(
    name="minGRU",
    kind="minGRU",
    linearise=linearise,
    step=min_gru_cell,
    holders=(sys.modules[__name__],),
    gates=("k", "n"),
    weights=("weight_ih", "bias_ih"),
    keeper=Keeper(gate="k", name="keep", source="Feng et al. 2024"),
)
