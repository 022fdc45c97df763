"""What the rest of gradflow asks of one kind of cell: everything that is special about it.

Letters as everywhere: T timesteps, B sequences, H hidden units, P the width of h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradflow.cells.base import Steps, Weights

Named = Mapping[str, Tensor]
TORCH: tuple[Any, ...] = (torch._VF, torch)  # who holds torch's recurrent functions by name
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Linearise(Protocol):
    """Linearise all steps at the known states: x (T, B, I), h (T, B, P), initial (B, ·) by name.

    The initial states may also be (T, B, ·): then they are what each step really started from, which
    in a user's loop need not be what the step before returned.
    """

    def __call__(self, weights: Weights, x: Tensor, h: Tensor, initial: Named) -> Steps: ...


@dataclass(frozen=True)
class Keeper:
    """The gate that multiplies what is kept, whose product over the steps is the memory."""

    gate: str
    name: str  # "forget": what people call the gate
    source: str  # who raised its bias
    note: str = ""  # what to know of its mean
    opposite: str = ""  # the gate whose bias is drawn opposite
    overwritten: float | None = None  # its mean below which a state is mostly new after two steps
    # words of the finding on a layer whose gates alone shorten the memory, and of their picture
    fault: str = "leak"
    keeps: str = "units keep their state"
    shut: str = ""
    so_that: str = ""
    biases: str = ""
    keeps_what: str = "the state"
    otherwise: str = "replaces it"

    @property
    def chrono(self) -> str:
        """Advice: biases drawn from the range of distances."""
        drawn = f"draw the {self.name} biases from the range of distances in the task"
        return f"{drawn} (chrono initialisation){self.so_that} and train again{self.biases}"

    @property
    def reading(self) -> str:
        """How to read its picture."""
        kept = f"An open {self.name} gate {self.gate} keeps {self.keeps_what} and its gradient"
        return f"{kept}, a closed one {self.otherwise}."


@dataclass(frozen=True)
class CellPaths:
    """∂c_t/∂c_{t−1} = diag(f) + Σ over f, i, g of diag(factor) U_• W_hr diag(before)."""

    forget: Tensor  # (T, M, H): f_t
    factors: Tensor  # (T, M, 3, H): ∂c_t/∂a_f, ∂c_t/∂a_i, ∂c_t/∂a_g
    before: Tensor  # (T, M, H): o_{t−1} (1 − tanh² c_{t−1}); NaN at the first step
    recurrent: Tensor  # (3, H, H): U_f W_hr, U_i W_hr, U_g W_hr
    projection: Tensor | None  # (P, H): W_hr

    def through(self, t: int) -> Tensor:
        """The paths through f, i and g of step t, (M, 3, H, H)."""
        left = self.factors[t].unsqueeze(-1) * self.recurrent
        return left * self.before[t][:, None, None, :]

    def total(self, t: int) -> Tensor:
        """Their sum with the forget path, (M, H, H)."""
        return self.through(t).sum(1) + torch.diag_embed(self.forget[t])


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """One kind of recurrent cell."""

    name: str  # as a track has it
    kind: str  # what people call it, whatever its options
    linearise: Linearise
    step: Callable[..., Any]  # the function of one step, and who holds it under its name
    whole: Callable[..., Any] | None = None  # the function of all steps and layers
    holders: tuple[Any, ...] = TORCH
    layer: type[nn.RNNBase] | None = None  # torch's modules
    cell: type[nn.RNNCellBase] | None = None
    options: Mapping[str, str] = field(default_factory=dict)  # arguments that make them this cell
    shown: str = ""  # its kind where the options must be told
    states: tuple[str, ...] = ("h",)
    gates: tuple[str, ...] = ()  # in the order of their blocks in the weights
    weights: tuple[str, ...] = WEIGHTS  # in the order of the functions' arguments
    keeper: Keeper | None = None
    tanh: tuple[str, ...] = ()  # gates and states between −1 and 1, which are neither shut nor open
    # state -> the tanh that limits it, of the states and the gates
    limits: Mapping[str, Callable[[Named, Named], Tensor]] = field(default_factory=dict)
    paths: Callable[[Named, Named, Named, Named], CellPaths] | None = None  # see `CellPaths`
    vanilla: bool = False  # A_t = diag(slope) W_hh
    relu: bool = False  # units that are exactly 0 pass nothing on

    @property
    def blocks(self) -> int:
        """How many times H rows the weights have."""
        return len(self.gates) or 1

    def block(self, gate: str, hidden: int) -> slice:
        """The rows of a gate in the weights."""
        place = self.gates.index(gate)
        return slice(place * hidden, (place + 1) * hidden)

    def has_biases(self, count: int) -> bool:
        """Whether there are biases among so many first weights."""
        return any(name.startswith("bias") for name in self.weights[:count])

    def weight_names(self, count: int, *, has_biases: bool) -> list[str]:
        """The names of so many weights of one layer and direction."""
        return [n for n in self.weights if has_biases or not n.startswith("bias")][:count]
