"""The GRU (Cho et al. 2014) as PyTorch computes it: it resets after the matrix product.

(r, z) = σ of W_ih x_t + b_ih + W_hh h_{t−1} + b_hh,
n = tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t−1} + b_hn)),  h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradflow.cells.base import Scan, Steps, Weights, previous
from gradflow.cells.spec import CellSpec, Keeper, Named
from gradflow.limits import OVERWRITTEN


@dataclass(frozen=True)
class GRUSteps(Steps):
    """A_t = diag(z) + Σ over gates of diag(factor) U, the candidate's block behind the reset gate."""

    per_step: ClassVar[tuple[str, ...]] = ("factor", "keep", "reset")

    factor: Tensor  # (T, B, 3, H): ∂h/∂a_r, ∂h/∂a_z, ∂h/∂a_n
    keep: Tensor  # (T, B, H): z
    reset: Tensor  # (T, B, H): r, what ∂a_n is multiplied by on the recurrent side

    def push(self, t: int, block: Tensor) -> Tensor:
        batch, rows, _ = block.shape
        gates = (block @ self.weight_hh.T).view(batch, rows, 3, -1)
        gates *= self._recurrent(t).unsqueeze(1)
        return torch.addcmul(gates.sum(2), self.keep[t].unsqueeze(1), block)

    def pull(self, t: int, block: Tensor) -> Tensor:
        delta = block.unsqueeze(2) * self._recurrent(t).unsqueeze(1)
        return torch.addcmul(delta.flatten(2) @ self.weight_hh, self.keep[t].unsqueeze(1), block)

    def _recurrent(self, t: int) -> Tensor:
        factor = self.factor[t]
        return torch.cat([factor[:, :2], (factor[:, 2] * self.reset[t]).unsqueeze(1)], dim=1)

    def kept(self) -> dict[str, Tensor]:
        return {"h": self.keep}

    def scan(self, direct: Tensor, final: Named, last: Tensor, *, totals: bool = False) -> Scan:
        grad_h = direct.clone()
        delta = torch.empty_like(self.factor)
        delta_hh = torch.empty_like(self.factor)
        for t in reversed(range(self.length)):
            torch.mul(self.factor[t], grad_h[t].unsqueeze(1), out=delta[t])
            delta_hh[t] = delta[t]
            delta_hh[t, :, 2].mul_(self.reset[t])
            if t:
                grad_h[t - 1].addmm_(delta_hh[t].flatten(1), self.weight_hh)
                grad_h[t - 1].addcmul_(grad_h[t], self.keep[t])
        return Scan({"h": grad_h}, delta.flatten(2), delta_hh.flatten(2))


def linearise(weights: Weights, x: Tensor, h: Tensor, initial: Named) -> GRUSteps:
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
    return GRUSteps(weights.weight_hh, {"r": r, "z": z, "n": n}, {"h": h}, factor, z, r)


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
    limits={"h": lambda _, gates: gates["n"]},
)
