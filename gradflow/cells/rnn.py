"""The vanilla RNN: h_t = φ(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh), A_t = diag(φ'(a_t)) W_hh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradflow.cells.base import Scan, Steps, Weights


@dataclass(frozen=True)
class RNNSteps(Steps):
    """diag(slope_t) W_hh, slope = φ'(a_t)."""

    per_step: ClassVar[tuple[str, ...]] = ("slope",)

    slope: Tensor  # (T, B, H)

    def push(self, t: int, block: Tensor) -> Tensor:
        return (block @ self.weight_hh.T).mul_(self.slope[t].unsqueeze(1))

    def pull(self, t: int, block: Tensor) -> Tensor:
        return (block * self.slope[t].unsqueeze(1)) @ self.weight_hh

    def log_volume(self) -> Tensor:
        """ln |det W_hh| + Σ ln φ'(a_t)."""
        return self.slope.abs().log().sum(-1) + torch.linalg.slogdet(self.weight_hh)[1]

    def scan(
        self, direct: Tensor, final_c: Tensor | None, last: Tensor, *, c_is_total: bool = False
    ) -> Scan:
        grad_h, delta = direct.clone(), torch.empty_like(self.slope)
        for t in reversed(range(self.length)):
            torch.mul(grad_h[t], self.slope[t], out=delta[t])
            if t:
                grad_h[t - 1].addmm_(delta[t], self.weight_hh)
        return Scan({"h": grad_h}, delta, delta)


@dataclass(frozen=True)
class RNNCell:
    """A vanilla cell; both its slopes can be read off the state itself."""

    slope: Callable[[Tensor], Tensor]  # φ'(a) as a function of φ(a)

    def linearise(
        self, weights: Weights, x: Tensor, h: Tensor, h0: Tensor, c0: Tensor | None
    ) -> RNNSteps:
        return RNNSteps(weights.weight_hh, {}, {"h": h}, self.slope(h))


def tanh_slope(h: Tensor) -> Tensor:
    """1 − h²."""
    return 1 - h * h


def relu_slope(h: Tensor) -> Tensor:
    """1 where the unit is on, 0 where it is off; NaN stays NaN."""
    return torch.where(h.isnan(), h, (h > 0).to(h.dtype))
