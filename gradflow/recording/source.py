"""Where a track's numbers come from, the parts in which they come, and the device they move to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from gradflow.limits import DEVICE_WIDEST


class Operator(Protocol):
    """The step Jacobians A_t of a batch of sequences, in processing order, as linear operators.

    Rows of a block are vectors, so pushing a block V of shape (B, m, S) gives V A_tᵀ.
    """

    @property
    def length(self) -> int: ...  # T
    @property
    def batch(self) -> int: ...  # B
    @property
    def size(self) -> int: ...  # S
    @property
    def dtype(self) -> torch.dtype: ...

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        ...

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        ...


@runtime_checkable
class ThinOperator(Protocol):
    """An `Operator` of a state so wide that few vectors at a time can be sent through it."""

    @property
    def seconds(self) -> float: ...  # predicted, of one vector of every sequence through one step


@dataclass(frozen=True)
class Forward:
    """What a replay of the forward pass yields; every array (T, B, ·), input-time order."""

    states: dict[str, Tensor]  # state name -> (T, B, P or H)
    initial: dict[str, Tensor]  # state name -> (B, P or H); empty where they were not seen
    gates: dict[str, Tensor]  # gate name -> (T, B, H)
    inputs: Tensor | None  # (T, B, I); None where they were not seen


@dataclass(frozen=True)
class Backward:
    """What a replay of the backward pass yields; every array (T, B, ·), input-time order."""

    grads: dict[str, Tensor]  # state name -> total gradient
    direct: Tensor | None  # (T, B, P): what reaches h_t not through this layer's own recurrence
    delta: Tensor | None  # (T, B, G*H): gradient at the input side of the pre-activations
    delta_hh: Tensor | None  # (T, B, G*H): the same at the recurrent side


@dataclass(frozen=True)
class Outer:
    """A sum of R outer products, Σ_r δ_r v_rᵀ: a gradient of a weight as what it is made from."""

    delta: Tensor  # (R, G*H)
    vectors: Tensor  # (R, P or I)

    def matrix(self) -> Tensor:
        """The sum itself, (G·H, P or I)."""
        return self.delta.T @ self.vectors


@dataclass(frozen=True)
class Contributions:
    """∂L/∂W_hh and ∂L/∂W_ih of a layer, taken apart by distance from the loss step; float64."""

    work: int  # multiplications that one loss step of one sequence takes at one lag
    total: Callable[[], dict[str, Outer]]  # weight name -> ∂L/∂W, all lags together
    by_lag: Callable[[], Iterator[dict[str, Outer]]]  # C_0, C_1, … until nothing is left


@dataclass(frozen=True)
class Parity:
    """Parameter gradients rebuilt from δ_t, held against those of this very backward."""

    status: str  # "passed", "failed" or "not applicable"
    error: float | None  # largest difference relative to the largest entry
    reason: str


class Source(Protocol):
    """Where a track's numbers come from; the hooks hand one over for each track."""

    def forward(self) -> Forward: ...
    def backward(self) -> Backward | None: ...
    def last(self) -> Backward | None: ...
    def reached(self) -> Tensor | None: ...
    def arriving(self) -> Tensor | None: ...
    def unread(self) -> bool: ...
    def trains_recurrence(self) -> bool | None: ...
    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None: ...
    def contributions(self, sequences: Tensor) -> Contributions | None: ...
    def partial(self) -> dict[str, Tensor] | None: ...
    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator: ...
    def changed(self, **changes: float) -> tuple[Source, dict[str, Tensor]]: ...
    def parity(self) -> Parity: ...
    def why_no_gradient(self) -> str: ...
    def alone(self) -> Source | None: ...
    @property
    def version(self) -> int: ...


@dataclass(frozen=True, eq=False)
class WrappedSource:
    """A source made from another one; what it does not give itself is as of that one."""

    inner: Any  # a `Source`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is being made asks before it has an inner one
            raise AttributeError(name)
        return getattr(self.inner, name)


@dataclass(frozen=True, eq=False)
class OfStates(WrappedSource):
    """One that makes other states of those of another source, and of their gradients the same."""

    def _of(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _made(self, found: Backward | None) -> Backward | None:
        if found is None:
            return None
        direct = None if found.direct is None else self._of({"h": found.direct}).get("h")
        return replace(found, grads=self._of(found.grads), direct=direct)

    def backward(self) -> Backward | None:
        """Total gradients."""
        return self._made(self.inner.backward())

    def last(self) -> Backward | None:
        """Those of the last loss step alone."""
        return self._made(self.inner.last())

    def partial(self) -> dict[str, Tensor] | None:
        """State-partial gradients."""
        found = self.inner.partial()
        return None if found is None else self._of(found)


CPU = torch.device("cpu")
Numbers = TypeVar("Numbers")


def moved(numbers: Numbers, device: torch.device) -> Numbers:
    """Every tensor of some dataclass, dict, list or tuple on a device; the same one where all are.

    >>> moved({"h": [torch.zeros(1)]}, CPU)
    {'h': [tensor([0.])]}
    """
    found: Numbers = _moved(numbers, device)
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        every = {name: _moved(one, device) for name, one in value.items()}
        return value if all(every[name] is value[name] for name in value) else every
    if type(value) in (list, tuple):
        if _alike(value):
            if value[0].device == device:
                return value
            return type(value)(torch.stack(list(value)).to(device).unbind())  # moved at once
        each = [_moved(one, device) for one in value]
        return value if all(map(operator.is_, each, value)) else type(value)(each)
    if is_dataclass(value) and not isinstance(value, type):
        known = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        new = {name: _moved(one, device) for name, one in known.items()}
        changed = {name: one for name, one in new.items() if one is not known[name]}
        return replace(value, **changed) if changed else value
    return value


def _alike(values: Sequence[Any]) -> bool:
    if not values or not all(isinstance(value, Tensor) for value in values):
        return False
    return len({(value.shape, value.dtype, value.device) for value in values}) == 1


def where_computed(size: int, device: torch.device) -> torch.device:
    """The device for many small steps of a state of this width: on an accelerator each is a call.

    >>> where_computed(64, torch.device("cuda"))
    device(type='cpu')
    """
    return CPU if size < DEVICE_WIDEST else device
