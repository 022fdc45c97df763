"""The GRU (Cho et al. 2014) as PyTorch computes it: it resets after the matrix product.

(r, z) = σ of W_ih x_t + b_ih + W_hh h_{t−1} + b_hh,
n = tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t−1} + b_hn)),  h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.cells.spec import CellSpec, Keeper, Named, Steps, Weights, previous
from gradflow.limits import OVERWRITTEN


def linearise(weights: Weights, x: Tensor, h: Tensor, initial: Named) -> Steps:
    """All steps; PyTorch's z multiplies h_{t−1}, some papers put it on the other side."""
    before = previous(h, initial["h"])
    in_r, in_z, in_n = weights.project_input(x).chunk(3, dim=2)
    rec_r, rec_z, rec_n = weights.project_state(before).chunk(3, dim=2)
    r, z = (in_r + rec_r).sigmoid(), (in_z + rec_z).sigmoid()
    n = (in_n + r * rec_n).tanh()
    candidate = (1 - z) * (1 - n * n)
    factor = torch.stack(
        [candidate * rec_n * r * (1 - r), (before - n) * z * (1 - z), candidate], dim=2
    )
    return Steps(
        weight_hh=weights.weight_hh,
        gates={"r": r, "z": z, "n": n},
        states={"h": h},
        factor=factor,
        keep=z,
        reset=torch.stack([torch.ones_like(r), torch.ones_like(r), r], dim=2),
    )


def phantom(weight_hh: Tensor) -> Tensor:
    """[U_r; U_z; 0] beside [0; 0; 1]: what r and z hand back, and what n does before it is reset."""
    hidden = weight_hh.shape[1]
    columns = torch.zeros(3 * hidden, 2 * hidden, dtype=weight_hh.dtype, device=weight_hh.device)
    columns[: 2 * hidden, :hidden] = weight_hh[: 2 * hidden]
    columns[2 * hidden :, hidden:].fill_diagonal_(1)
    return columns


GRU = CellSpec(
    name="GRU",
    kind="GRU",
    linearise=linearise,
    step=torch._C._VariableFunctions.gru_cell,
    whole=torch._C._VariableFunctions.gru,
    layer=nn.GRU,
    cell=nn.GRUCell,
    gates=("r", "z", "n"),
    keeper=Keeper(
        gate="z",
        name="update",
        source="Tallec & Ollivier 2018",
        note=", and PyTorch's z is the share of the old state that is kept",
        overwritten=OVERWRITTEN,
        fault="overwrite",
        so_that=", so that units keep their state,",
        biases="; of the two bias vectors set one to zero",
    ),
    tanh=("n",),
    phantom=phantom,
    limits={"h": lambda _, gates: gates["n"]},
)
