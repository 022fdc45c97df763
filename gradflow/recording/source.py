"""Where a track's numbers come from, and the parts in which they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


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
    def changed(
        self, *, forget_bias: float, scale_hh: float, scale_ih: float
    ) -> tuple[Source, dict[str, Tensor]]: ...
    def parity(self) -> Parity: ...
    def why_no_gradient(self) -> str: ...
    def alone(self) -> Source | None: ...
    @property
    def version(self) -> int: ...
