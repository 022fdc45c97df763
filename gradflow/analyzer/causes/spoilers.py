"""What spoils the numbers, and is reported whatever the verdict: NaN, one step, parity, cuts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradflow.analysis.results import Finding
from gradflow.analyzer.causes.remedies import CLIP_CODE
from gradflow.analyzer.evidence import Evidence, counted, module
from gradflow.analyzer.timeline import (
    Bad,
    arrives,
    bad_gradient,
    bad_input,
    bad_start,
    bad_state,
    bad_weight,
    cut_steps,
    cut_words,
    kinds_of_cuts,
    segment_lengths,
    typical_length,
    typical_segment,
)

LISTED = 6  # segments of one sequence that are named one by one


def not_finite(e: Evidence) -> Iterator[Finding]:
    """The first NaN or Inf: forward in the states, else backward in the gradients, else read."""
    bad, direction = bad_state(e.track), "forward"
    if bad is None:
        bad, direction = bad_gradient(e.track), "backward"
    if bad is None:
        yield from _read(e)
        return
    symbol = bad.name if direction == "forward" else f"∂L/∂{bad.name}"
    origin = bad_weight(e.track) or bad_input(e.track) or bad_start(e.track)
    if origin and direction == "forward":
        yield Finding(
            name="not-finite",
            layer=e.track.name,
            message=f"{origin.what}, and {symbol} is {bad.value} from step {bad.step + 1} on",
            where=bad.where,
            value=float(bad.step + 1),
            advice=origin.advice,
            code=origin.code,
        )
        return
    came, advice, code = _made_in(e, bad, direction)
    yield Finding(
        name="not-finite",
        layer=e.track.name,
        message=f"{symbol} is {bad.value} first at {bad.where}, in the {direction} pass{came}",
        where=bad.where,
        value=float(bad.step + 1),
        advice=advice,
        code=code,
    )


def _read(e: Evidence) -> Iterator[Finding]:
    """An infinite input that saturated gates have swallowed: the states do not show it."""
    origin = bad_input(e.track)
    if origin is None:
        return
    yield Finding(
        name="not-finite",
        layer=e.track.name,
        message=f"{origin.what}: its states stay finite, but the gradient of its input weights "
        "cannot be",
        advice=origin.advice,
        code=origin.code,
    )


def _made_in(e: Evidence, bad: Bad, direction: str) -> tuple[str, str, str]:
    """How it came about where weights and inputs are finite; advice, and a line of code."""
    if direction == "backward":
        outside = ", and comes from outside this layer: from the loss or a layer above"
        return (
            outside if arrives(e.track, bad) else "",
            "find the operation that makes it: an overflow, a division by zero, a logarithm or a "
            "square root of zero",
            "torch.autograd.set_detect_anomaly(True)",
        )
    if "inf" in bad.value and e.track.spec is not None:
        dtype = str(e.track.states[bad.name].dtype).removeprefix("torch.")
        return (
            f": the states outgrow {dtype}",
            "go back to the last weights that were finite, and clip the norm of the gradient from "
            "there",
            CLIP_CODE,
        )
    return "", "find the operation that makes it: an overflow, a division or logarithm by zero", ""


def no_recurrence(e: Evidence) -> Iterator[Finding]:
    """One step: no recurrence is exercised."""
    if "no recurrence" not in e.labels or e.track.afresh:  # what goes around is told as unseen
        return
    advice, code = _how_to_recur(e)
    yield Finding(
        name="no-recurrence",
        layer=e.track.name,
        message="every sequence has one step, so the recurrent weights carry no gradient",
        where=counted(e.track.batch, "sequence"),
        value=1.0,
        threshold=2.0,
        basis="a recurrence takes two steps",
        advice=advice,
        code=code,
    )


def _how_to_recur(e: Evidence) -> tuple[str, str]:
    """Advice and code for more than one step."""
    path = module(e.track.owner)
    if e.track.spec is None:
        return "mark the states inside the loop, once per step", "h, c = gradflow.tap(h=h, c=c)"
    if e.fused:
        return (
            "give longer sequences; perhaps the time and the batch axis are swapped",
            f"{path}.batch_first = {not e.track.batch_first}",
        )
    return (
        "give every call the state that the one before returned",
        f"state = None\nfor x_t in x: state = {path}(x_t, state)",
    )


def parity_failed(e: Evidence) -> Iterator[Finding]:
    """Gradients that contradict those of the recorded backward."""
    parity = e.track.parity
    if parity.status == "failed" and bad_gradient(e.track) is None:
        yield Finding(
            name="parity-failed",
            layer=e.track.name,
            message=f"parameter gradients rebuilt from the recorded ones are off: {parity.reason}",
            value=parity.error,
            advice="the results that rest on the loss are withheld; please report this with the "
            "model that shows it",
        )


def cut(e: Evidence) -> Iterator[Finding]:
    """Steps at which nothing of the previous state arrives, and the stretches they leave."""
    steps = cut_steps(e.track)
    if not steps:
        return
    shown = ", ".join(str(t + 1) for t in steps[:5]) + (", …" if len(steps) > 5 else "")
    noun = "step" if len(steps) == 1 else "steps"
    longest = int(e.data["segment_length"].max())
    whole = max(e.span, typical_length(e.track))
    # whether an episode ends there, by all that is known: then nothing is to be mended
    cuts = kinds_of_cuts(e.track)
    ends = [some or kind.startswith(("masked", "reset")) for kind, some in cuts]
    short = longest < whole and not all(ends)
    yield Finding(
        name="cut",
        layer=e.track.name,
        message=f"the state is cut off from its past at {noun} {shown}: no gradient crosses there; "
        f"{_segments(e)}, of sequences of {whole}; {cut_words(e.track)}",
        where=f"{noun} {shown}",
        value=float(longest),
        threshold=float(whole),
        basis="the longest stretch against span and sequence",
        severity=-math.inf if short else None,
        advice=_across(e, ends),
        source="Williams & Peng 1990",
        code=f"windows = x.split({whole}{', dim=1' if e.track.batch_first else ''})"
        "  # one backward per window"
        if short
        else "",
    )


def _across(e: Evidence, ends: list[bool]) -> str:
    """What to do about cuts, some of which may be the ends of episodes."""
    if all(ends):
        typical = counted(typical_segment(e.track) or 1, "step")
        return (
            "nothing where an episode ends there: what is learned reaches back to its start at most, "
            f"typically {typical}, however long the rollout"
        )
    return (
        "nothing where an episode or a document ends there; if the task reaches across"
        f"{' where the state is detached' if any(ends) else ''}, carry it without detach(), or use a "
        "longer window"
    )


def _segments(e: Evidence) -> str:
    """The distribution of segment lengths in words."""
    every = segment_lengths(e.track)
    if all(sequence == every[0] for sequence in every) and len(every[0]) <= LISTED:
        return f"segments of {', '.join(str(n) for n in every[0])} steps"
    lengths = e.data["segment_length"].values
    low, high = int(lengths.min()), int(lengths.max())
    if low == high:
        return f"{len(lengths)} segments of {counted(low, 'step')} each"
    return (
        f"{len(lengths)} segments of {low} to {high} steps, typically {typical_segment(e.track) or 1} "
        "(half of all steps lie in segments at least so long)"
    )
