"""What the decays of a linear recurrence show: entries that forget at once or never, bounds, erasure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradflow.analysis import Finding
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.analyzer.linear.facts import decay_facts
from gradflow.limits import (
    DECAY_FLOOR_SHARE,
    DECAY_SHARE,
    ERASED_SHARE,
    GATE_CLOSED,
    GONE_WORDS,
    NEVER_FORGETS,
)


def decays(e: Evidence) -> Iterator[Finding]:
    """Why a linear recurrence loses the gradient: only where it does."""
    if e.linear is None or not e.fades:
        return
    forget, _, floor, at_floor, moves = decay_facts(e.linear.decays)
    entries = counted(e.size, "entry").replace("entrys", "entries")
    if forget >= DECAY_SHARE:
        yield Finding(
            name="forgets-at-once",
            layer=e.track.name,
            message=f"{round(100 * forget)} % of the {entries} of the state forget within a step: "
            f"their decay is below {GONE_WORDS} on average",
            where=f"{round(forget * e.size)} of {entries}",
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
        where=f"{round(keep * e.size)} of {e.size} entries",
        value=keep,
        threshold=DECAY_SHARE,
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
        severity=e.severity,
        advice="that is what β = 1 does, a full overwrite; where it should not, start β lower",
        source="Yang et al. 2024",
    )
