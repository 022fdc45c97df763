"""Cells as users write them, with one step as a pure function of independent states.

Every entry of `CELLS` gives a module, how it is called, and its initial state: what gradflow must
find by itself.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INPUTS, HIDDEN, STEPS, BATCH = 3, 5, 7, 2
States = dict[str, Tensor]


class FromScratch(nn.Module):
    """The LSTM cell of the lecture notes: gates in the order f, i, candidate, o."""

    def __init__(self) -> None:
        super().__init__()
        self.W_x = nn.Linear(INPUTS, 4 * HIDDEN)
        self.W_h = nn.Linear(HIDDEN, 4 * HIDDEN)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        h, c = state
        f, i, g, o = (self.W_x(x) + self.W_h(h)).chunk(4, dim=-1)
        c_t = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_t = o.sigmoid() * c_t.tanh()
        return h_t, (h_t, c_t)


class Peephole(nn.Module):
    """Gates see the cell state as well; `which` names those that do."""

    def __init__(self, which: str = "ifo") -> None:
        super().__init__()
        self.which = which
        self.gates = nn.Linear(INPUTS + HIDDEN, 4 * HIDDEN)
        self.peep = nn.Parameter(torch.randn(3, HIDDEN))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.gates(torch.cat([x, h], dim=-1)).chunk(4, dim=-1)
        i = i + self.peep[0] * c if "i" in self.which else i
        f = f + self.peep[1] * c if "f" in self.which else f
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        o = o + self.peep[2] * c if "o" in self.which else o
        return o.sigmoid() * c.tanh(), c


class Coupled(nn.Module):
    """i = 1 − f; the states are keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUTS + HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor, *, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        f, g, o = self.gates(torch.cat([x, h], dim=-1)).chunk(3, dim=-1)
        f = f.sigmoid()
        c = f * c + (1 - f) * g.tanh()
        return o.sigmoid() * c.tanh(), c


class LayerNormLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUTS + HIDDEN, 4 * HIDDEN)
        self.norm, self.norm_c = nn.LayerNorm(4 * HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = state
        gates = self.norm(self.gates(torch.cat([x, h], dim=-1)))
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c).tanh(), c


class MinimalGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(INPUTS + HIDDEN, HIDDEN)
        self.candidate = nn.Linear(INPUTS + HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f = self.forget(torch.cat([x, h], dim=-1)).sigmoid()
        new = self.candidate(torch.cat([x, f * h], dim=-1)).tanh()
        return (1 - f) * h + f * new


class DiagonalLinear(nn.Module):
    """h' = a ⊙ h + B x; it returns an output beside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(HIDDEN))
        self.into, self.out = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, INPUTS)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a * h + self.into(x)
        return self.out(h), h


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        hidden = x.new_zeros(len(x), HIDDEN) if hidden is None else hidden
        return 0.8 * hidden + 0.2 * torch.tanh(self.w(x) + self.u(hidden))


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUTS + HIDDEN, 2 * HIDDEN)

    def forward(self, x: Tensor, memory: dict[str, Tensor]) -> dict[str, Any]:
        f, g = self.gates(torch.cat([x, memory["fast"]], dim=-1)).chunk(2, dim=-1)
        c = f.sigmoid() * memory["slow"] + g.tanh()
        h = c.tanh()
        return {"y": h.sum(-1), "memory": {"slow": c, "fast": h}}


@dataclass
class Memory:
    h: Tensor
    c: Tensor


class Dataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUTS + HIDDEN, 2 * HIDDEN)

    def forward(self, x: Tensor, memory: Memory) -> Memory:
        f, g = self.gates(torch.cat([x, memory.h], dim=-1)).chunk(2, dim=-1)
        c = f.sigmoid() * memory.c + g.tanh()
        return Memory(h=c.tanh(), c=c)


Pair = namedtuple("Pair", ["u", "v"])


class NamedTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(INPUTS + 2 * HIDDEN, 2 * HIDDEN)

    def forward(self, x: Tensor, pair: Pair) -> Pair:
        u, v = self.w(torch.cat([x, *pair], dim=-1)).tanh().chunk(2, dim=-1)
        return Pair(u, v + pair.v)


class ThreeStates(nn.Module):
    """Three states of different widths, each made from another one of the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.v = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        h, c, m = states
        m = 0.9 * m + torch.tanh(self.v(h))
        c = c * torch.sigmoid(m @ self.v.weight) + self.w(x)
        h = torch.tanh(self.u(c) + h)
        return h, [h, c, m]


class Layers(nn.Module):
    """A state with a leading axis for the layer, (1, B, H), as torch's own layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(self.w(x) + self.u(h[0]))
        return new, new.unsqueeze(0)


@dataclass(frozen=True)
class Case:
    """A cell, how to call it on named states, and how to take the named states from the result."""

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, States], Any]
    take: Callable[[Any], States]
    names: tuple[str, ...] = ("h", "c")
    widths: tuple[int, ...] = (HIDDEN, HIDDEN)
    shape: tuple[int, ...] = (BATCH,)

    def initial(self, batch: int = BATCH) -> States:
        leading = (1, batch) if len(self.shape) == 2 else (batch,)
        return {
            name: torch.zeros(*leading, width, dtype=torch.float64)
            for name, width in zip(self.names, self.widths, strict=True)
        }


def _pair(result: Any) -> States:
    return {"h": result[0], "c": result[1]}


def positional(make: Callable[[], nn.Module]) -> Case:
    return Case(make, lambda m, x, s: m(x, s["h"], s["c"]), _pair)


def one(make: Callable[[], nn.Module], name: str, take: Callable[[Any], Tensor]) -> Case:
    return Case(make, lambda m, x, s: m(x, s[name]), lambda r: {name: take(r)}, (name,), (HIDDEN,))


CELLS = {
    "from scratch": Case(
        FromScratch, lambda m, x, s: m(x, (s["h"], s["c"])), lambda r: _pair(r[1])
    ),
    "peephole": positional(Peephole),
    "peephole on some gates": positional(lambda: Peephole("f")),
    "coupled, keywords": Case(Coupled, lambda m, x, s: m(x, h=s["h"], c=s["c"]), _pair),
    "layer norm": Case(LayerNormLSTM, lambda m, x, s: m(x, (s["h"], s["c"])), _pair),
    "minimal gated": one(MinimalGated, "h", lambda r: r),
    "diagonal linear": one(DiagonalLinear, "h", lambda r: r[1]),
    "leaky": one(Leaky, "hidden", lambda r: r),
    "dict": Case(
        Dicts, lambda m, x, s: m(x, dict(s)), lambda r: dict(r["memory"]), ("fast", "slow")
    ),
    "dataclass": Case(Dataclasses, lambda m, x, s: m(x, Memory(**s)), lambda r: dict(vars(r))),
    "named tuple": Case(
        NamedTuples, lambda m, x, s: m(x, Pair(**s)), lambda r: r._asdict(), ("u", "v")
    ),
    "three states": Case(
        ThreeStates,
        lambda m, x, s: m(x, list(s.values())),
        lambda r: dict(zip(("s0", "s1", "s2"), r[1], strict=True)),
        ("s0", "s1", "s2"),
        (HIDDEN, HIDDEN, 2),
    ),
    "leading axis": Case(
        Layers,
        lambda m, x, s: m(x, s["h"]),
        lambda r: {"h": r[1]},
        ("h",),
        (HIDDEN,),
        (1, BATCH),
    ),
}
