"""What is special about one kind of cell, its weights of a layer and direction, and its linearised steps.

Everything is in processing order: index 0 is the step the kernel runs first. A block of vectors has
shape (B, m, S), its rows are the vectors. Letters as everywhere: T timesteps, B sequences, H hidden
units, P the width of h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weights:
    """Weights of one layer and direction, by PyTorch's own names."""

    weight_ih: Tensor  # (G*H, I)
    weight_hh: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (G*H, P), or no rows
    bias_ih: Tensor | None = None  # (G*H,)
    bias_hh: Tensor | None = None  # (G*H,)
    weight_hr: Tensor | None = None  # (P, H), with a projection

    def to(self, dtype: torch.dtype) -> Weights:
        """The same weights in another dtype."""
        return Weights(**{name: weight.to(dtype) for name, weight in self.named().items()})

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor, only those this layer has."""
        return {n: weight for n, weight in vars(self).items() if weight is not None and len(weight)}

    def project_input(self, x: Tensor) -> Tensor:
        """W_ih x_t + b_ih of all steps at once, (T, B, G*H)."""
        return torch.nn.functional.linear(x, self.weight_ih, self.bias_ih)

    def project_state(self, h: Tensor) -> Tensor:
        """W_hh h_{t−1} + b_hh of all steps at once, (T, B, G*H)."""
        return torch.nn.functional.linear(h, self.weight_hh, self.bias_hh)


@dataclass(frozen=True)
class Scan:
    """What one backward scan over time yields, processing order."""

    grads: dict[str, Tensor]  # state name -> total gradient (T, B, width)
    delta: Tensor  # (T, B, G*H)
    delta_hh: Tensor  # (T, B, G*H)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A layer's steps, linearised at the states it really visited: an `Operator`, and a scan.

    Of a cell with one state, A_t = diag(keep) + Σ over gates of diag(factor ⊙ reset) U. Subclasses have
    other equations; what is named in ``per_step`` has (T, B) first.
    """

    per_step: ClassVar[tuple[str, ...]] = ("factor", "keep", "reset")
    others: ClassVar[tuple[str, ...]] = ()  # states beside h, of one width

    weight_hh: Tensor  # (G'*H, P), G' < G where not every gate reads the state
    gates: dict[str, Tensor]  # gate name -> (T, B, H)
    states: dict[str, Tensor]  # state name -> (T, B, width), as recomputed
    factor: Tensor  # (T, B, G, H): ∂h/∂a of every gate's pre-activation a
    keep: Tensor | None = None  # (T, B, H): the share of a state that a step keeps as it is
    reset: Tensor | None = None  # (T, B, G, H): what the recurrent side of a is multiplied by

    @property
    def length(self) -> int:
        """T."""
        return int(self.states["h"].shape[0])

    @property
    def batch(self) -> int:
        """B."""
        return int(self.states["h"].shape[1])

    @property
    def size(self) -> int:
        """S, the width of the full carried state."""
        return sum(int(state.shape[2]) for state in self.states.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that products are computed in."""
        return self.weight_hh.dtype

    def each_step(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply one change to every tensor that has (T, B) in front: a gather, a mask."""
        arrays = {name: getattr(self, name) for name in self.per_step}
        changed = {name: change(array) for name, array in arrays.items() if array is not None}
        gates = {name: change(gate) for name, gate in self.gates.items()}
        states = {name: change(state) for name, state in self.states.items()}
        return replace(self, gates=gates, states=states, **changed)

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        recurrent = self._recurrent(t).unsqueeze(1)
        gates = (block @ self.weight_hh.T).view(*block.shape[:2], *recurrent.shape[2:])
        gates *= recurrent
        through = gates[:, :, 0] if gates.shape[2] == 1 else gates.sum(2)
        if self.keep is None:
            return through
        return torch.addcmul(through, self.keep[t].unsqueeze(1), block)

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        delta = block.unsqueeze(2) * self._recurrent(t).unsqueeze(1)
        through = delta.flatten(2) @ self.weight_hh
        if self.keep is None:
            return through
        return torch.addcmul(through, self.keep[t].unsqueeze(1), block)

    def _recurrent(self, t: int) -> Tensor:
        """(B, G', H): how a gate's recurrent side moves h."""
        factor = self.factor[t] if self.reset is None else self.factor[t] * self.reset[t]
        return factor[:, : len(self.weight_hh) // factor.shape[2]]

    def log_volume(self) -> Tensor | None:
        """ln |det A_t| of every step in closed form, (T, B); None where there is none.

        Σ ln φ'(a_t) + ln |det W_hh| of diag(φ') W_hh; Σ ln k where nothing but diag(k) is left.
        """
        if self.keep is None and self.factor.shape[2] == 1:
            volume = self.factor[:, :, 0].abs().log().sum(-1)
            return volume + torch.linalg.slogdet(self.weight_hh)[1]
        return (
            self.keep.log().sum(-1) if self.keep is not None and not len(self.weight_hh) else None
        )

    def scan(
        self,
        direct: Tensor,
        final: Mapping[str, Tensor],
        last: Tensor,
        *,
        totals: bool = False,
        phantom: Tensor | None = None,
    ) -> Scan:
        """Total gradients of all steps from the direct ones, backward in time.

        direct (T, B, P) is the gradient that reaches h_t from outside this layer's recurrence, final
        the gradients (B, width) at the other states of each sequence's last step, whose index is
        last (B,). With totals, for T = 1, these hold what comes through h already. phantom (T, B, ·), where
        it is known, holds Cᵀ δ_t, see `CellSpec`; of a cell with a reset, whose C is [U of the gates
        without one, the identity of the other], also what is still to be reset.
        """
        if phantom is not None:
            return self._scan_phantom(direct, phantom)
        grad_h, delta = direct.clone(), torch.empty_like(self.factor)
        delta_hh = delta if self.reset is None else torch.empty_like(delta)
        read = delta_hh[:, :, : len(self.weight_hh) // delta.shape[3]]
        # all steps are taken apart at once: one at a time that costs as much as the sums
        h, factor, moved, onward = map(torch.unbind, (grad_h, self.factor, delta, read))
        for t in reversed(range(self.length)):
            torch.mul(factor[t], h[t].unsqueeze(1), out=moved[t])
            if self.reset is not None:
                torch.mul(moved[t], self.reset[t], out=delta_hh[t])
            if t:
                h[t - 1].addmm_(onward[t].flatten(1), self.weight_hh)
                if self.keep is not None:
                    h[t - 1].addcmul_(h[t], self.keep[t])
        return Scan({"h": grad_h}, delta.flatten(2), read.flatten(2))

    def _scan_phantom(self, direct: Tensor, phantom: Tensor) -> Scan:
        if self.reset is not None:
            width = direct.shape[2]
            to_reset = phantom[..., width:] * self.reset[:, :, -1]
            phantom = phantom[..., :width] + to_reset @ self.weight_hh[-width:]
        grad_h = direct.clone()
        grad_h[:-1] += phantom[1:]
        if self.keep is not None:
            carried_back(grad_h, self.keep)
        delta = self.factor * grad_h.unsqueeze(2)
        delta_hh = delta if self.reset is None else delta * self.reset
        return Scan({"h": grad_h}, delta.flatten(2), delta_hh.flatten(2))

    def made_of(self) -> dict[str, Tensor]:
        """State name -> ∂m_t/∂state_t, (T, B, H): other states that h_t = W_hr m_t is made of."""
        return {}

    def at_m(self, grad_h: Tensor) -> Tensor:
        """What gradients at h (..., P) are at m, (..., H): the same without a projection W_hr."""
        return grad_h

    def through_h(self, grad_h: Tensor) -> dict[str, Tensor]:
        """What gradients at h (T, B, P) bring to the states that it is made of."""
        return {name: slope * self.at_m(grad_h) for name, slope in self.made_of().items()}

    def projected(self) -> Tensor:
        """m_t, which a projection reads, (T, B, H)."""
        raise NotImplementedError

    def partial(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """State-partial gradients from the totals of all steps, (T, B, width).

        The total gradient of a state holds what goes through the other states of the same step; the
        state-partial one holds them fixed, and is what Aᵀ acts on.
        """
        return grads

    def before(self, scan: Scan, t: int, *, absolute: bool = False) -> dict[str, Tensor]:
        """What step t hands to the state before it: state name -> (B, width).

        A_tᵀ applied to the gradient at step t, from a scan's totals and δ; or the same of every term's
        absolute value, which is what rounding errors are measured by.
        """

        def sized(array: Tensor) -> Tensor:
            return array.abs() if absolute else array

        found = {"h": sized(scan.delta_hh[t]) @ sized(self.weight_hh)}
        if self.keep is not None:
            name = (self.others or ("h",))[0]  # the state that is kept
            grad, keep = sized(scan.grads[name][t]), self.keep[t]
            found[name] = torch.addcmul(found["h"], grad, keep) if name == "h" else grad * keep
        return found


def carried(values: Tensor, keep: Tensor) -> None:
    """v_t += k_t ⊙ v_{t−1} from the first step on, in place; both (T, B, H).

    On an accelerator a call takes as long for one step as for all, so strides are doubled: log₂ T rounds.
    """
    if values.device.type == "cpu":
        v, k = values.unbind(), keep.unbind()
        for t in range(1, len(v)):
            v[t].addcmul_(k[t], v[t - 1])
        return
    over, stride = keep[1:], 1  # from each step to the one a stride on
    while stride < len(values):
        values[stride:] += over * values[:-stride]
        over = over[stride:] * over[:-stride]
        stride *= 2


def carried_back(grads: Tensor, keep: Tensor) -> None:
    """g_{t−1} += k_t ⊙ g_t from the last step on, in place; see `carried`."""
    if grads.device.type == "cpu":
        g, k = grads.unbind(), keep.unbind()
        for t in reversed(range(1, len(g))):
            g[t - 1].addcmul_(g[t], k[t])
        return
    turned = grads.flip(0)
    carried(turned, torch.cat([keep[:1], keep[1:].flip(0)]))
    grads.copy_(turned.flip(0))


def previous(h: Tensor, h0: Tensor) -> Tensor:
    """h_{t−1} for every t, (T, B, P): as given, or the initial state, then all states but the last."""
    if h0.dim() == h.dim():
        return h0
    return torch.cat([h0.unsqueeze(0), h[:-1]])


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
    # W_hh -> C (G*H, ·) such that Cᵀ δ_t is what step t hands back to h_{t−1}: see `Steps.scan`
    phantom: Callable[[Tensor], Tensor] = lambda weight_hh: weight_hh
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


CELLS: dict[str, CellSpec] = {}  # by name; `gradflow.cells` enters them
