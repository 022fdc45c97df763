"""A recurrence without a nonlinearity: one fixed matrix, step after step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis import Finding
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.analyzer.jacobians import HostOperator, operator_of, transposed_step
from gradflow.errors import RecordingError
from gradflow.recording import GATES, Track

WIDEST = 512  # eigenvalues of wider matrices cost more than they are worth
ALIKE = 256  # units of rounding within which what two steps make of a vector is the same
SEED = 1


def linear_recurrence(e: Evidence) -> Iterator[Finding]:
    """A cell of the user's own whose step Jacobian is the same at every step and sequence."""
    if e.track.cell in GATES or e.no_gains or e.verdict.name == "stable":
        return
    try:
        matrix = constant_step(e.track)
    except RecordingError:
        return
    if matrix is None:
        return
    radius = float(torch.linalg.eigvals(matrix).abs().max())
    rate = math.log(radius) if radius > 0 else -math.inf
    yield Finding(
        name="linear-recurrence",
        layer=e.track.name,
        message="the step Jacobian is the same at every step of every sequence: the recurrence is linear "
        "in its state, so saturation plays no part; its gain is that of one fixed matrix, whose largest "
        f"eigenvalue has the modulus {number(radius)}",
        where=f"{counted(int(e.track.mask.sum()), 'step')} of {counted(e.track.batch, 'sequence')}",
        value=rate,
        source="Arjovsky et al. 2016; Orvieto et al. 2023",
        severity=abs(e.decades) if math.isfinite(e.decades) else math.inf,
        advice="put a nonlinearity on the new state (h = torch.tanh(...)), so that its gain can depend on "
        "what it reads; or keep it linear and hold the eigenvalues of its matrix near 1: orthogonal or "
        "diagonal with moduli below 1",
        code="h = torch.tanh(h)  # the new state, before the cell returns it",
    )


def constant_step(track: Track) -> Tensor | None:
    """A, (S, S), where A_t = A at every step from the second on that is no cut; else None."""
    operator = operator_of(track)
    if operator.thin or operator.size > WIDEST or track.reverse:
        return None
    counted_steps = (track.mask & ~track.cuts).cpu().numpy().copy()
    counted_steps[0] = False  # of the state before the first step, perhaps nothing was seen
    if counted_steps.sum() < 2:
        return None
    if not _makes_the_same(operator, counted_steps, track):
        return None
    start, sequence = (int(place) for place in np.argwhere(counted_steps)[0])
    return transposed_step(operator, start)[sequence].double()


def _makes_the_same(operator: HostOperator, steps: np.ndarray, track: Track) -> bool:
    """Whether every one of these steps (T, B) makes the same of one random vector."""
    generator = torch.Generator().manual_seed(SEED)
    probe = torch.randn(1, 1, operator.size, generator=generator, dtype=operator.dtype)
    probe = probe.expand(operator.batch, -1, -1)
    dtypes = [state.dtype for state in track.states.values()]
    room = ALIKE * max(torch.finfo(dtype).eps for dtype in dtypes)
    first: Tensor | None = None
    for t in np.flatnonzero(steps.any(1)):
        made = operator.push(int(t), probe)[torch.from_numpy(steps[t]), 0]
        first = made[0] if first is None else first
        apart = torch.linalg.vector_norm(made - first, dim=1)
        if not bool((apart <= room * torch.linalg.vector_norm(first)).all()):
            return False
    return True
