"""A recurrence without a nonlinearity: one fixed matrix, step after step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gradflow.analysis import Finding
from gradflow.analyzer.constant import constant_step
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.analyzer.jacobians import operator_of
from gradflow.errors import RecordingError
from gradflow.limits import LINEAR_ROUNDING
from gradflow.recording import Track


def linear_recurrence(e: Evidence) -> Iterator[Finding]:
    """A cell of the user's own whose step Jacobian is the same at every step and sequence."""
    own = e.track.spec is not None or e.linear is not None
    if own or e.no_gains or e.verdict.name == "stable":
        return
    try:
        matrix = _matrix(e.track)
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
        severity=e.severity,
        advice="put a nonlinearity on the new state (h = torch.tanh(...)), so that its gain can depend on "
        "what it reads; or keep it linear and hold the eigenvalues of its matrix near 1: orthogonal or "
        "diagonal with moduli below 1",
        code="h = torch.tanh(h)  # the new state, before the cell returns it",
    )


def _matrix(track: Track) -> Tensor | None:
    """A transposed, (S, S), where A_t = A at every step from the second on that is no cut; else None."""
    operator = operator_of(track)
    if operator.thin or track.reverse:
        return None
    steps = (track.mask & ~track.cuts).cpu().numpy().copy()
    steps[0] = False  # of the state before the first step, perhaps nothing was seen
    coarsest = max(torch.finfo(state.dtype).eps for state in track.states.values())
    return constant_step(operator, steps, LINEAR_ROUNDING * coarsest)
