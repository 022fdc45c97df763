"""The vanilla RNN: h_t = φ(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh), A_t = diag(φ'(a_t)) W_hh."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradflow.cells.spec import CellSpec, Linearise, Named, Steps, Weights


def _linearise(slope: Callable[[Tensor], Tensor]) -> Linearise:
    """Both slopes φ'(a) can be read off the state φ(a) itself."""

    def linearise(weights: Weights, x: Tensor, h: Tensor, initial: Named) -> Steps:
        factor = slope(h).unsqueeze(2)
        return Steps(weight_hh=weights.weight_hh, gates={}, states={"h": h}, factor=factor)

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
