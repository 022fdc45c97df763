"""A recurrence whose step Jacobian never changes: its exponents are known from its eigenvalues.

Letters: T steps, B sequences, S the state's width. P over n steps is Aⁿ, and ln ‖Aⁿ‖/n → ln ρ(A).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.jacobians import transposed_step
from gradflow.limits import CONSTANT_ALIKE, CONSTANT_SEED, EIGEN_WIDEST
from gradflow.recording import Operator


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
