"""The vanilla RNN: h_t = φ(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh), A_t = diag(φ'(a_t)) W_hh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradflow.cells.base import Scan, Steps, Weights
from gradflow.cells.spec import CellSpec, Linearise, Named


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

    def scan(self, direct: Tensor, final: Named, last: Tensor, *, totals: bool = False) -> Scan:
        grad_h, delta = direct.clone(), torch.empty_like(self.slope)
        for t in reversed(range(self.length)):
            torch.mul(grad_h[t], self.slope[t], out=delta[t])
            if t:
                grad_h[t - 1].addmm_(delta[t], self.weight_hh)
        return Scan({"h": grad_h}, delta, delta)


def _linearise(slope: Callable[[Tensor], Tensor]) -> Linearise:
    """Both slopes φ'(a) can be read off the state φ(a) itself."""

    def linearise(weights: Weights, x: Tensor, h: Tensor, initial: Named) -> RNNSteps:
        return RNNSteps(weights.weight_hh, {}, {"h": h}, slope(h))

    return linearise


def tanh_slope(h: Tensor) -> Tensor:
    """1 − h²."""
    return 1 - h * h


def relu_slope(h: Tensor) -> Tensor:
    """1 where the unit is on, 0 where it is off; NaN stays NaN."""
    return torch.where(h.isnan(), h, (h > 0).to(h.dtype))


TANH = CellSpec(
    name="RNN_TANH",
    kind="RNN",
    linearise=_linearise(tanh_slope),
    step=torch._C._VariableFunctions.rnn_tanh_cell,
    whole=torch._C._VariableFunctions.rnn_tanh,
    layer=nn.RNN,
    cell=nn.RNNCell,
    options={"nonlinearity": "tanh"},
    tanh=("h",),
    limits={"h": lambda states, _: states["h"]},
    vanilla=True,
)
RELU = CellSpec(
    name="RNN_RELU",
    kind="RNN",
    linearise=_linearise(relu_slope),
    step=torch._C._VariableFunctions.rnn_relu_cell,
    whole=torch._C._VariableFunctions.rnn_relu,
    layer=nn.RNN,
    cell=nn.RNNCell,
    options={"nonlinearity": "relu"},
    shown="RNN relu",
    vanilla=True,
    relu=True,
)
