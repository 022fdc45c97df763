"""The LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000) as PyTorch computes it.

(i, f, g, o) = σ, σ, tanh, σ of W_ih x_t + b_ih + W_hh h_{t−1} + b_hh,
c_t = f ⊙ c_{t−1} + i ⊙ g,  m_t = o ⊙ tanh c_t,  h_t = m_t, or W_hr m_t with a projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradflow.cells.spec import (
    WEIGHTS,
    CellPaths,
    CellSpec,
    Keeper,
    Named,
    Scan,
    Steps,
    Weights,
    carried,
    carried_back,
    previous,
)
from gradflow.limits import CELL_ROUNDING


@dataclass(frozen=True, kw_only=True)
class LSTMSteps(Steps):
    """The joint Jacobian of (h, c); keep is the forget gate, the last factor moves m, the others c."""

    per_step: ClassVar[tuple[str, ...]] = ("factor", "keep", "through")
    others: ClassVar[tuple[str, ...]] = ("c",)

    keep: Tensor
    through: Tensor  # (T, B, H): ∂m_t/∂c_t = o (1 − tanh² c)
    weight_hr: Tensor | None  # (P, H)

    def push(self, t: int, block: Tensor) -> Tensor:
        batch, rows, _ = block.shape
        width = self.weight_hh.shape[1]
        gates = (block[..., :width] @ self.weight_hh.T).view(batch, rows, 4, -1)
        gates *= self.factor[t].unsqueeze(1)
        dc = torch.addcmul(gates[:, :, :3].sum(2), self.keep[t].unsqueeze(1), block[..., width:])
        dm = torch.addcmul(gates[:, :, 3], self.through[t].unsqueeze(1), dc)
        return torch.cat([dm if self.weight_hr is None else dm @ self.weight_hr.T, dc], dim=2)

    def pull(self, t: int, block: Tensor) -> Tensor:
        width = self.weight_hh.shape[1]
        dm = block[..., :width]
        if self.weight_hr is not None:
            dm = dm @ self.weight_hr
        dc = torch.addcmul(block[..., width:], self.through[t].unsqueeze(1), dm)
        delta = torch.stack([dc, dc, dc, dm], dim=2).mul_(self.factor[t].unsqueeze(1))
        return torch.cat([delta.flatten(2) @ self.weight_hh, dc * self.keep[t].unsqueeze(1)], dim=2)

    def log_volume(self) -> Tensor:
        """Σ ln f + ln |det(W_hr diag(tanh c_t ⊙ o (1 − o)) U_o)|, W_hr only with a projection.

        Of the joint state: det A = det(cc) det(hh − hc cc⁻¹ ch), and what is subtracted leaves of
        hh only the path through the output gate.
        """
        o, u_o = self.gates["o"], self.weight_hh.chunk(4)[3]
        reach = self.states["c"].tanh() * o * (1 - o)
        forgotten = self.gates["f"].log().sum(-1)
        if self.weight_hr is None:
            return forgotten + reach.abs().log().sum(-1) + torch.linalg.slogdet(u_o)[1]
        return forgotten + torch.linalg.slogdet((self.weight_hr * reach.unsqueeze(2)) @ u_o)[1]

    def partial(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        total, through = grads["c"], self.through_h(grads["h"])["c"]
        left = total - through
        terms = total.abs() + through.abs()
        if self.weight_hr is not None:  # the sum over h may have cancelled
            terms = total.abs() + self.through * (grads["h"].abs() @ self.weight_hr.abs())
        bound = CELL_ROUNDING * torch.finfo(total.dtype).eps * terms
        return grads | {"c": left.masked_fill(left.abs() <= bound, 0.0)}

    def made_of(self) -> dict[str, Tensor]:
        """c: h = o ⊙ tanh c."""
        return {"c": self.through}

    def at_m(self, grad_h: Tensor) -> Tensor:
        return grad_h if self.weight_hr is None else grad_h @ self.weight_hr.to(grad_h.dtype)

    def projected(self) -> Tensor:
        return self.gates["o"] * self.states["c"].tanh()

    def scan(
        self,
        direct: Tensor,
        final: Named,
        last: Tensor,
        *,
        totals: bool = False,
        phantom: Tensor | None = None,
    ) -> Scan:
        grad_h, grad_c = direct.clone(), torch.zeros_like(self.keep)
        if "c" in final:
            grad_c[last, torch.arange(self.batch, device=last.device)] = final["c"]
        if phantom is not None:
            grad_h[:-1] += phantom[1:]
            dm = self.at_m(grad_h)
            carried_back(grad_c.addcmul_(self.through, dm), self.keep)
            delta = self.factor * torch.stack([grad_c, grad_c, grad_c, dm], dim=2)
            return Scan({"h": grad_h, "c": grad_c}, delta.flatten(2), delta.flatten(2))
        delta = torch.empty_like(self.factor)
        flat = delta.flatten(2)
        # all steps are taken apart at once: one at a time that costs as much as the sums
        h, c, keep, through = map(torch.unbind, (grad_h, grad_c, self.keep, self.through))
        cells, to_cells = self.factor[:, :, :3].unbind(), delta[:, :, :3].unbind()
        outputs, to_outputs = self.factor[:, :, 3].unbind(), delta[:, :, 3].unbind()
        moved = flat.unbind()
        for t in reversed(range(self.length)):
            dm = h[t] if self.weight_hr is None else h[t] @ self.weight_hr
            dc = c[t] if totals else c[t].addcmul_(through[t], dm)
            torch.mul(cells[t], dc.unsqueeze(1), out=to_cells[t])
            torch.mul(outputs[t], dm, out=to_outputs[t])
            if t:
                h[t - 1].addmm_(moved[t], self.weight_hh)
                c[t - 1].addcmul_(dc, keep[t])
        return Scan({"h": grad_h, "c": grad_c}, flat, flat)


def linearise(weights: Weights, x: Tensor, h: Tensor, initial: Named) -> LSTMSteps:
    """All steps, with or without a projection (Sak et al. 2014)."""
    pre = weights.project_state(previous(h, initial["h"])).add_(weights.project_input(x))
    i, f, g, o = pre.chunk(4, dim=2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c, c0 = i * g, initial["c"]
    factor = pre.new_empty(*c.shape[:2], 4, c.shape[2])  # written in place: large arrays are dear
    torch.mul(c, 1 - i, out=factor[:, :, 0])
    if c0.dim() == c.dim():
        c.addcmul_(f, c0)
    else:
        c[0].addcmul_(f[0], c0)
        carried(c, f)
    before = previous(c, c0)
    squashed = c.tanh()
    torch.mul(before * f, 1 - f, out=factor[:, :, 1])
    torch.mul(i, 1 - g * g, out=factor[:, :, 2])
    torch.mul(squashed * o, 1 - o, out=factor[:, :, 3])
    return LSTMSteps(
        weight_hh=weights.weight_hh,
        gates={"i": i, "f": f, "g": g, "o": o},
        states={"h": h, "c": c},
        factor=factor,
        keep=f,
        through=o * (1 - squashed * squashed),
        weight_hr=weights.weight_hr,
    )


def paths(gates: Named, states: Named, initial: Named, weights: Named) -> CellPaths:
    """The four paths of the cell state, from arrays (T, M, H) in processing order and float64.

    Graph meaning with o_{t−1} held fixed: c_{t−1} moves h_{t−1} = W_hr (o_{t−1} ⊙ tanh c_{t−1}), and
    h_{t−1} moves the gates.
    """
    i, f, g, o = (gates[name] for name in "ifgo")
    c, before = states["c"], torch.cat([initial["c"][None], states["c"][:-1]])
    output = o * (1 - c.tanh().square())
    u_i, u_f, u_g, _ = weights["weight_hh"].chunk(4)
    recurrent, projection = torch.stack([u_f, u_i, u_g]), weights.get("weight_hr")
    return CellPaths(
        forget=f,
        factors=torch.stack([before * f * (1 - f), g * i * (1 - i), i * (1 - g.square())], dim=2),
        before=torch.cat([torch.full_like(output[:1], math.nan), output[:-1]]),
        recurrent=recurrent if projection is None else recurrent @ projection,
        projection=projection,
    )


LSTM = CellSpec(
    name="LSTM",
    kind="LSTM",
    linearise=linearise,
    step=torch._C._VariableFunctions.lstm_cell,
    whole=torch._C._VariableFunctions.lstm,
    layer=nn.LSTM,
    cell=nn.LSTMCell,
    states=("h", "c"),
    gates=("i", "f", "g", "o"),
    weights=(*WEIGHTS, "weight_hr"),
    keeper=Keeper(
        gate="f",
        name="forget",
        source="Jozefowicz et al. 2015",
        opposite="i",
        keeps="cells keep their memory",
        shut="closed, ",
        biases="; of the two bias vectors, which add up, set one to zero",
        keeps_what="the cell",
        otherwise="cuts both",
    ),
    tanh=("g",),
    limits={"c": lambda states, _: states["c"].tanh()},
    paths=paths,
)
