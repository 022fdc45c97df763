"""Recurrences without a nonlinearity: one fixed matrix, or decays that forget at once, never, or erase."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis.results import Finding
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.analyzer.jacobians import constant_step, operator_of
from gradflow.analyzer.linear_units import decay_facts
from gradflow.errors import RecordingError
from gradflow.limits import (
    DECAY_FLOOR_SHARE,
    DECAY_SHARE,
    ERASED_SHARE,
    GATE_CLOSED,
    GONE_WORDS,
    LINEAR_ROUNDING,
    NEVER_FORGETS,
)
from gradflow.recording.track import Track


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
    """A transposed, (S, S), where A_t = A at every step from the second on that is no cut; else None.

    None also in half precision: its rounding hides whether they are the same.
    """
    operator = operator_of(track)
    coarsest = max(torch.finfo(state.dtype).eps for state in track.states.values())
    if operator.thin or track.reverse or coarsest > torch.finfo(torch.float32).eps:
        return None
    steps = (track.mask & ~track.cuts).cpu().numpy().copy()
    steps[0] = False  # of the state before the first step, perhaps nothing was seen
    return constant_step(operator, steps, LINEAR_ROUNDING * coarsest)


def decays(e: Evidence) -> Iterator[Finding]:
    """Why a linear recurrence loses the gradient: only where it does."""
    if e.linear is None or not e.fades:
        return
    forget, _, floor, at_floor, moves = decay_facts(e.linear.decays)
    size = math.prod(e.linear.shape)
    entries = counted(size, "entry").replace("entrys", "entries")
    if forget >= DECAY_SHARE:
        yield Finding(
            name="forgets-at-once",
            layer=e.track.name,
            message=f"{round(100 * forget)} % of the {entries} of the state forget within a step: "
            f"their decay is below {GONE_WORDS} on average",
            where=f"{round(forget * size)} of {entries}",
            value=forget,
            threshold=DECAY_SHARE,
            basis=f"below {GONE_WORDS} a step nothing is left, as for the horizon",
            severity=e.severity,
            advice="start with decays nearer to 1: a smaller step Δ, or a bias that opens the gate that "
            "keeps, drawn so that time scales are spread over the distances of the task",
            source="Gu & Dao 2023; Orvieto et al. 2023",
        )
    if moves and at_floor >= DECAY_FLOOR_SHARE and floor > GATE_CLOSED:
        yield Finding(
            name="decay-at-bound",
            layer=e.track.name,
            message=f"{round(100 * at_floor)} % of all decays lie at the smallest that was seen, "
            f"{number(floor)} a step, as at a bound: what has to forget faster cannot, and what is at "
            "the bound hardly learns",
            where=f"{round(100 * at_floor)} % of decays",
            value=at_floor,
            threshold=DECAY_FLOOR_SHARE,
            basis="as many values at exactly the smallest are a bound, not chance",
            severity=e.severity,
            advice="look at what makes the decay: its inputs saturate; scale them down, or start its bias "
            "where the decay is nearer to 1",
            source="Peng et al. 2025",
        )


def kept_for_good(e: Evidence) -> Iterator[Finding]:
    """Entries that never forget, in a layer that does not lose the gradient by its verdict alone."""
    if e.linear is None or e.verdict.name not in ("exploding", "inconclusive"):
        return
    _, keep, *_ = decay_facts(e.linear.decays)
    if not keep >= DECAY_SHARE:  # NaN where no step counts
        return
    yield Finding(
        name="never-forgets",
        layer=e.track.name,
        message=f"{round(100 * keep)} % of the entries of the state never forget: their decay stays "
        f"above {NEVER_FORGETS:g} at every step of the batch",
        where=f"{round(keep * math.prod(e.linear.shape))} of {math.prod(e.linear.shape)} entries",
        value=keep,
        threshold=DECAY_SHARE,
        basis=f"above {NEVER_FORGETS:g} a step half of a state is left after thousands of steps",
        severity=e.severity,
        advice="if they are meant to forget, look at what makes the decay: it is saturated at 1, where "
        "it hardly learns",
        source="Orvieto et al. 2023",
    )


def erasing_heads(e: Evidence) -> Iterator[Finding]:
    """Heads whose rank-one part wipes a direction at most steps, where the gradient is lost."""
    if e.linear is None or e.linear.heads is None or not e.fades:
        return
    erased = e.linear.heads.erased
    heads = np.flatnonzero(np.nan_to_num(erased) >= ERASED_SHARE)
    if not len(heads):
        return
    named = ", ".join(str(head + 1) for head in heads[:5]) + (", …" if len(heads) > 5 else "")
    yield Finding(
        name="erasing-heads",
        layer=e.track.name,
        message=f"{'head' if len(heads) == 1 else 'heads'} {named} of {len(erased)} erase a direction "
        f"at {round(100 * float(erased[heads].min()))} % of the steps or more: along the key that is "
        f"written less than {GATE_CLOSED:g} of the state, and of the gradient, is left (1 − β‖k‖² near 0)",
        where=f"{len(heads)} of {len(erased)} heads",
        value=float(erased[heads].max()),
        threshold=ERASED_SHARE,
        basis=f"a direction of which less than {GATE_CLOSED:g} is left counts as erased, as a closed gate",
        severity=e.severity,
        advice="that is what β = 1 does, a full overwrite; where it should not, start β lower",
        source="Yang et al. 2024",
    )
