"""Dense step Jacobians A_t = ∂s_t/∂s_{t−1}, an operator over a stack of them, and one that never changes.

Letters: T timesteps, B sequences, S the width of the carried state, t a step in processing order.
Where A_t = A at every step, P over n steps is Aⁿ, and ln ‖Aⁿ‖/n → ln ρ(A): exponents by eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.errors import InputError, must_be
from gradflow.limits import (
    CONSTANT_ALIKE,
    CONSTANT_SEED,
    EIGEN_WIDEST,
    JACOBIAN_BYTES,
    JACOBIAN_CHUNK,
    VECTOR_SPEED,
)
from gradflow.process import without_modes
from gradflow.recording.source import Operator, ThinOperator, moved, where_computed
from gradflow.recording.track import Track


class DenseOperator:
    """Step Jacobians held as one stack: push is V A_tᵀ, pull is V A_t.

    Args:
        jacobians: (T, B, S, S), A_t of every sequence in processing order.

    Raises:
        InputError: the stack does not have that shape or is not floating point.

    >>> operator = DenseOperator(torch.full((3, 1, 1, 1), 0.5))
    >>> operator.push(0, torch.ones(1, 1, 1)).item()
    0.5
    """

    def __init__(self, jacobians: Tensor) -> None:
        self.jacobians = checked_stack(jacobians)
        self.length, self.batch, self.size = jacobians.shape[:3]
        self.dtype = jacobians.dtype

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        return block @ self.jacobians[t].mT

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        return block @ self.jacobians[t]


def checked_stack(jacobians: Tensor) -> Tensor:
    """Return the stack if it is a floating point (T, B, S, S) tensor, else raise the sentence."""
    advice = "stack A_t over steps first, then sequences"
    if not isinstance(jacobians, Tensor):
        kind = type(jacobians).__name__
        raise InputError(must_be("jacobians", "a torch tensor (T, B, S, S)", kind, advice))
    shape = tuple(jacobians.shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise InputError(must_be("jacobians", "of shape (T, B, S, S)", shape, advice))
    if not jacobians.is_floating_point():
        raise InputError(
            must_be("jacobians", "floating point", jacobians.dtype, "convert with .double()")
        )
    return jacobians.detach()


def transposed_step(operator: Operator, t: int) -> Tensor:
    """A_tᵀ of every sequence, (B, S, S): the rows into which A_t sends the unit vectors."""
    eye = torch.eye(operator.size, dtype=operator.dtype)
    return operator.push(t, eye.expand(operator.batch, -1, -1))


@dataclass(frozen=True)
class HostOperator:
    """A track's operator whose blocks come from and go to the CPU, up to `length` steps."""

    inner: Operator
    length: int
    device: torch.device

    @property
    def batch(self) -> int:
        """B."""
        return self.inner.batch

    @property
    def size(self) -> int:
        """S."""
        return self.inner.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its blocks."""
        return self.inner.dtype

    @property
    def thin(self) -> bool:
        """Whether only few vectors at a time can be sent through it."""
        return isinstance(self.inner, ThinOperator)

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        return self.inner.push(t, block.to(self.device)).cpu()

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        return self.inner.pull(t, block.to(self.device)).cpu()


def vector_seconds(operator: HostOperator) -> float:
    """Predicted seconds of one vector of every sequence through one step."""
    if isinstance(operator.inner, ThinOperator):
        return operator.inner.seconds
    return operator.batch * 2.0 * operator.size**2 / VECTOR_SPEED


def operator_of(
    track: Track, dtype: torch.dtype = torch.float64, sequences: Sequence[int] | None = None
) -> HostOperator:
    """The step Jacobians of some sequences, up to the last real step of the longest of them."""
    chosen = torch.arange(track.batch) if sequences is None else torch.as_tensor(sequences)
    length = int(track.lengths.cpu()[chosen].max())
    found, device = track.operator(dtype, chosen), track.mask.device
    if not isinstance(found, ThinOperator):
        device = where_computed(found.size, device)
        found = moved(found, device)
    return HostOperator(found, length, device)


def state_size(track: Track) -> int:
    """S, the width of the full carried state."""
    return sum(int(value.shape[-1]) for value in track.states.values())


@without_modes
def step_jacobians(track: Track) -> Tensor:
    """Dense step Jacobians of a track, A_t = ∂s_t/∂s_{t−1}, in processing order.

    The state is joint, (h, c) for an LSTM: the product of one block of A_t alone is not ∂h_t'/∂h_t.

    Args:
        track: one layer in one direction.

    Returns:
        (T, B, S, S) float64 on the CPU; A at index 0 is with respect to the initial state, steps
        past a sequence's length are NaN matrices.

    Raises:
        InputError: the stack would not fit 4 GiB.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(2, 1, 1))[0].sum().backward()
    >>> gradflow.analyzer.step_jacobians(recording["l0"]).flatten().tolist()
    [0.5, 0.5]
    """
    operator = operator_of(track)
    steps, batch, size = track.steps, track.batch, operator.size
    needed = steps * batch * size**2 * 8
    if needed > JACOBIAN_BYTES:
        raise InputError(
            must_be(
                "T·B·S² float64 numbers",
                f"at most {JACOBIAN_BYTES / 2**30:g} GiB",
                f"{needed / 2**30:.1f} GiB (T={steps}, B={batch}, S={size})",
                "record fewer sequences or shorter ones, or use gradflow.analyze, "
                "which never holds them all",
            )
        )
    stack = torch.full((steps, batch, size, size), torch.nan, dtype=torch.float64)
    rows = max(1, min(size, JACOBIAN_CHUNK // (8 * batch * size)))
    eye = torch.eye(size, dtype=torch.float64)
    lengths = track.lengths.cpu()
    for t in range(operator.length):
        real = lengths > t
        for start in range(0, size, rows):
            columns = operator.push(t, eye[start : start + rows].expand(batch, -1, -1)).mT
            stack[t, real, :, start : start + rows] = columns[real].to("cpu", torch.float64)
    return stack


def constant_exponents(operator: Operator, counted: np.ndarray) -> np.ndarray | None:
    """ln |eigenvalue| of A, largest first, (S,), if A_t = A at every counted step (T, B); else None.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> steps = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64).expand(4, 1, 2, 2)
    >>> found = constant_exponents(DenseOperator(steps), np.ones((4, 1), dtype=bool))
    >>> found.round(6).tolist()                                                   # ln 0.5, twice
    [-0.693147, -0.693147]
    >>> steps = steps * torch.tensor([1.0, 1.0, 2.0, 1.0])[:, None, None, None]
    >>> constant_exponents(DenseOperator(steps), np.ones((4, 1), dtype=bool)) is None
    True
    """
    if operator.dtype != torch.float64:
        return None
    matrix = constant_step(operator, counted, CONSTANT_ALIKE)
    if matrix is None:
        return None
    with np.errstate(divide="ignore"):
        return np.log(np.sort(torch.linalg.eigvals(matrix).abs().numpy())[::-1])


def constant_step(operator: Operator, counted: np.ndarray, alike: float) -> Tensor | None:
    """A transposed, (S, S), if A_t = A at every counted step (T, B); else None.

    Compared is what every step makes of one random vector; alike is by how much, relative to it, that
    may differ.
    """
    if operator.size > EIGEN_WIDEST or counted.sum() < 2:
        return None
    generator = torch.Generator().manual_seed(CONSTANT_SEED)
    probe = torch.randn(1, 1, operator.size, generator=generator, dtype=operator.dtype)
    probe = probe.expand(operator.batch, -1, -1)
    first: Tensor | None = None
    for t in np.flatnonzero(counted.any(1)):
        images = operator.push(int(t), probe)[torch.from_numpy(counted[t]), 0]
        first = images[0] if first is None else first
        room = alike * torch.linalg.vector_norm(first)
        if not bool((torch.linalg.vector_norm(images - first, dim=1) <= room).all()):
            return None
    start, sequence = (int(place) for place in np.argwhere(counted)[0])
    return transposed_step(operator, start)[sequence].double()
