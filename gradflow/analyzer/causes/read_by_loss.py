"""Findings on what the loss reads of a layer: ahead of all others, since no remedy helps before these.

What is read is told in `gradflow.analyzer.read_steps`; here it is put into words, with the line of code
that mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gradflow.analysis.results import Finding
from gradflow.analyzer import read_steps
from gradflow.analyzer.evidence import Evidence, counted, module
from gradflow.recording.track import Track


def read_by_loss(e: Evidence) -> Iterator[Finding]:
    """What is amiss with the steps and sequences that the loss reads, if anything is."""
    if e.reading.kind == read_steps.UNREAD and (e.reading.under[0] or e.track.above):
        return  # said of the layer above, or told by what is lost between the two
    if e.reading.kind:
        yield _MAKERS[e.reading.kind](e)


def mend_first(e: Evidence) -> str:
    """The advice in place of a remedy, where none can help before the loss reads other steps."""
    where = f" of {e.reading.under[0]}" if e.reading.under[0] and not e.reading.kind else ""
    return f"first mend what the loss reads{where}: before that no change of this layer helps"


def perhaps_padding(track: Track, read: read_steps.Reading) -> str:
    """What to know where all sequences end with one row, which may be padding and may be data."""
    if not read.perhaps:
        return ""
    every = "every sequence" if track.batch > 1 else "its one sequence"
    return (
        f"from step {read.perhaps + 1} on, what {track.name} reads repeats one row in {every}, and the "
        f"loss reads only what comes after: if these steps are padding, read step {read.perhaps} "
        "instead; lengths= in record() tells which steps are real"
    )


# ----------------------------------------------------------------------------- sentence and title


def opening(e: Evidence) -> str:
    """What a sentence on the layer says first, "" where nothing is amiss."""
    made = _OPENINGS.get(e.reading.kind)
    return "" if made is None else made(e)


def headline(e: Evidence) -> str:
    """What the title of the layer says, "" where nothing is amiss."""
    made = _HEADLINES.get(e.reading.kind)
    return "" if made is None else made(e)


_OPENINGS: dict[str, Callable[[Evidence], str]] = {
    read_steps.UNREAD: lambda e: "gets no gradient at all from this loss",
    read_steps.ONE_SEQUENCE: lambda e: (
        f"gets a gradient from one of its {e.track.batch} sequences only, the {_which(e)}"
    ),
    read_steps.PACKED_ROWS: lambda e: f"gets a gradient from {_share(e)} only, the longest",
    read_steps.FIRST_STEP: lambda e: (
        "is read at its first step only, so "
        + ("its recurrence is not trained" if e.reading.still else "next to no time is crossed")
    ),
    read_steps.AFTER_END: lambda e: (
        f"is read behind the end of {_share(e)}: the median has "
        f"{counted(e.reading.padding, 'step')} of padding before the loss"
    ),
}

_HEADLINES: dict[str, Callable[[Evidence], str]] = {
    read_steps.UNREAD: lambda e: "no gradient of the loss comes here",
    read_steps.ONE_SEQUENCE: lambda e: (
        f"the loss reads one sequence of {e.track.batch} only, the {_which(e)}"
    ),
    read_steps.PACKED_ROWS: lambda e: f"the loss reads the longest {_share(e)} only",
    read_steps.FIRST_STEP: lambda e: (
        "the loss reads its first step only"
        + (", so its recurrence is not trained" if e.reading.still else "")
    ),
    read_steps.AFTER_END: lambda e: f"the loss reads padding in {_share(e)}",
}


def _share(e: Evidence) -> str:
    return f"{len(e.reading.sequences)} of {counted(e.track.batch, 'sequence')}"


def _which(e: Evidence) -> str:
    return "first" if e.reading.sequences == (0,) else "last"


# --------------------------------------------------------------------------------------- findings


def _unread(e: Evidence) -> Finding:
    path = module(e.track.owner)
    zero = e.track.has_gradient
    return Finding(
        name="unread",
        layer=e.track.name,
        message="every gradient that comes to this layer is exactly 0: nothing of it is trained"
        if zero
        else "a backward ran, but no gradient came to this layer: nothing reads it, or what it "
        "returned is detached",
        where=counted(e.track.batch, "sequence"),
        value=0.0,
        threshold=0.0,
        basis="an exact zero",
        advice="look for what multiplies by zero or switches off between this layer and the loss: a "
        "mask, a weight of 0 in a sum of losses, ReLU units that are off"
        if zero
        else "make the loss depend on what the layer returns, or leave the layer out",
        code=f"print([p.grad for p in {path}.parameters()])"
        if zero or e.track.spec is None
        else f"output = {path}(x)[0]  # and let the loss read it, not output.detach()"
        if e.fused
        else f"h = {path}(x_t, h)  # and let the loss read it, not h.detach()",
    )


def _one_sequence(e: Evidence) -> Finding:
    track, which = e.track, _which(e)
    batch, steps = track.batch, int(track.lengths[e.reading.sequences[0]])
    taken = f"T = {track.steps}, B = {batch}"
    swap = "(time, batch, features)" if track.batch_first else "(batch, time, features)"
    change, code = _swapped(e, swap, "-1" if which == "last" else "0")
    return Finding(
        name="reads-one-sequence",
        layer=track.name,
        message=f"only the {which} of {batch} sequences gets a gradient, and that at each of its "
        f"{counted(steps, 'step')}: batch and time have changed places, it seems, either in the input (the "
        f"layer takes {taken}) or where its output is indexed",
        where=f"sequence {track.batch if which == 'last' else 1}",
        value=1.0,
        threshold=float(batch),
        basis="every sequence of the batch",
        advice=f"if x is {swap}, {change}; if T and B are right, index the step, not the sequence",
        code=code,
    )


def _swapped(e: Evidence, swap: str, at: str) -> tuple[str, str]:
    """What to do if x is laid out as `swap` says, and code for that and for an index of the wrong axis."""
    if _uneven(e):
        pack = "give pack_padded_sequence and pad_packed_sequence the batch_first that fits"
        return pack if e.fused else "loop over the time axis", _last_step(e, "lengths - 1")
    if not e.fused:
        return "loop over the time axis", (
            "for x_t in x.unbind(1):  # if x is (batch, time, features)\n"
            "last = outputs[-1]  # else: of the step, not of the sequence"
        )
    first = e.track.batch_first
    wrong, right, then = f"output[{at}]", "output[:, -1]", "output[-1]"
    if not first:
        wrong, right, then = f"output[:, {at}]", then, right
    also = "" if at == "-1" else f", and read {then}"  # the first step would train no recurrence
    return f"build the layer with batch_first={not first}", (
        f"{module(e.track.owner)}.batch_first = {not first}  # if x is {swap}{also}\n"
        f"last = {right}  # else, in place of {wrong}"
    )


def _packed_rows(e: Evidence) -> Finding:
    rows = "the loss reads rows past their end, which are zeros that no sequence has made"
    return Finding(
        name="reads-past-packed",
        layer=e.track.name,
        message=f"only {_share(e)} get a gradient, the longest: of the others "
        + (rows if e.fused else "the loss reads no state"),
        where=_share(e),
        value=float(len(e.reading.sequences)),
        threshold=float(e.track.batch),
        basis="every sequence of the batch",
        advice="take the final states, which are those of each sequence's own last step",
        code=_final_states(e, "packed")
        if e.fused
        else "ended = []  # and in the loop, before the batch shrinks to b: ended.append(h[b:])",
    )


def _first_step(e: Evidence) -> Finding:
    track = e.track
    even = not bool((track.lengths.cpu() < track.steps).any())
    steps = (
        f"step {track.steps} of {track.steps}"
        if track.reverse and even
        else "each sequence's last step"
        if track.reverse
        else f"step 1 of {'' if even else 'up to '}{track.steps}"
    )
    what = "∂L/∂W_hh is exactly 0, so its recurrence is not trained"
    if track.spec is None:
        what = "nothing crosses from one step to another, so its recurrence is not trained"
    if not e.reading.still:
        what = "its recurrent weights see this one step alone"
    advice, code = _read_further(e)
    return Finding(
        name="reads-first-step",
        layer=track.name,
        message=f"the loss reads only the first step that this "
        f"{'direction' if track.reverse or e.reading.bidirectional else 'layer'} takes ({steps}): {what}",
        where=steps,
        value=1.0,
        threshold=float(track.steps),
        basis="a recurrence takes two steps",
        advice=advice,
        code=code,
    )


def _read_further(e: Evidence) -> tuple[str, str]:
    if e.track.reverse or e.reading.bidirectional:
        return (
            "take the final states h_n in place of output[:, -1]: only there have both directions "
            "read the whole sequence",
            _final_states(e, "x"),
        )
    if _uneven(e):
        return "read each sequence's own last step, not the first", _last_step(e, "lengths - 1")
    return "read the last step that it takes, not the first", _last_step(e, "-1")


def _uneven(e: Evidence) -> bool:
    """Whether sequences of one batch end at steps of their own: packed, told, or dropped on the way."""
    return not e.track.runs and bool((e.track.lengths < e.track.steps).any())


def _final_states(e: Evidence, given: str) -> str:
    """Code: h_n of the top layer, of both directions where there are two."""
    path = module(e.track.owner)
    inner = "[0]" if e.spec is not None and len(e.spec.states) > 1 else ""
    top = "torch.cat([h_n[-2], h_n[-1]], -1)" if e.reading.bidirectional else "h_n[-1]"
    return f"h_n = {path}({given})[1]{inner}\nlast = {top}"


def _last_step(e: Evidence, index: str) -> str:
    """Code: one step of each sequence of what the layer, or the loop, returns."""
    if not e.fused:
        return (
            f"last = outputs[{index}]  # outputs: the states of all steps, torch.stack-ed"
            if index == "-1"
            else f"last = torch.stack(outputs)[{index}, torch.arange(len(lengths))]"
        )
    if index == "-1":
        return "last = output[:, -1]" if e.track.batch_first else "last = output[-1]"
    every = "torch.arange(len(lengths))"
    return f"last = output[{f'{every}, {index}' if e.track.batch_first else f'{index}, {every}'}]"


def _after_end(e: Evidence) -> Finding:
    seen = e.reading
    behind = (
        f"at the median {counted(seen.padding, 'step')} of padding between the last real one and it"
    )
    seems = f" ({seen.shown})" if seen.shown else ""
    code = _last_step(e, "lengths - 1")
    if e.fused and seen.bidirectional:
        first = ", batch_first=True" if e.track.batch_first else ""
        code = (
            "packed = torch.nn.utils.rnn.pack_padded_sequence("
            f"x, lengths{first}, enforce_sorted=False)\n{_final_states(e, 'packed')}"
        )
    return Finding(
        name="reads-after-end",
        layer=e.track.name,
        message=f"in {_share(e)} the loss reads only steps after the end{seems}, {behind}",
        where=_share(e),
        value=float(seen.padding),
        threshold=0.0,
        basis="the last real step",
        advice="read every sequence at its own last step, lengths - 1, or pack the batch "
        "(pack_padded_sequence) and take h_n; then record with lengths= to judge real steps only",
        code=code,
    )


def _listed(places: Sequence[int]) -> str:
    """Counted from 1, the first few."""
    return ", ".join(str(b + 1) for b in places[:5]) + (", …" if len(places) > 5 else "")


def _few_of_runs(e: Evidence) -> Finding:
    track, runs = e.track, read_steps.read_runs(e.track, e.reading.sequences)
    every = len(runs) == len(track.runs)
    share = (
        f"{_share(e)} of its {len(runs)} runs"
        if every
        else f"{len(runs)} of its {len(track.runs)} runs"
    )
    return Finding(
        name="reads-few-sequences",
        layer=track.name,
        message=f"only {share} {'gets' if len(runs) == 1 else 'get'} a gradient",
        where=_share(e)
        if every
        else f"{'run' if len(runs) == 1 else 'runs'} {_listed(runs)} of {len(track.runs)}",
        value=float(len(e.reading.sequences)),
        threshold=track.batch / 2,
        basis="half of all sequences",
        advice="nothing where the loss leaves the others out on purpose (a mask, a target network, a "
        "warm-up); else let the loss read what every run returned",
        code="" if every else "loss = sum(losses)  # of all runs; then one loss.backward()",
    )


def _few_sequences(e: Evidence) -> Finding:
    track = e.track
    if track.runs:
        return _few_of_runs(e)
    listed = _listed(e.reading.sequences)
    return Finding(
        name="reads-few-sequences",
        layer=track.name,
        message=f"only {_share(e)} get a gradient; to the layer T = {track.steps} and B = {track.batch}",
        where=f"sequence {listed}" if len(e.reading.sequences) == 1 else f"sequences {listed}",
        value=float(len(e.reading.sequences)),
        threshold=track.batch / 2,
        basis="half of the batch",
        advice="nothing where the loss leaves the others out on purpose (a mask, a margin, a clipped "
        "term); else see whether batch and time have changed places",
        code=""
        if _uneven(e)
        else f"{module(track.owner)}.batch_first = {not track.batch_first}  # if they have"
        if e.fused
        else "x = x.transpose(0, 1)  # if they have",
    )


_MAKERS: dict[str, Callable[[Evidence], Finding]] = {
    read_steps.UNREAD: _unread,
    read_steps.ONE_SEQUENCE: _one_sequence,
    read_steps.PACKED_ROWS: _packed_rows,
    read_steps.FIRST_STEP: _first_step,
    read_steps.AFTER_END: _after_end,
    read_steps.FEW_SEQUENCES: _few_sequences,
}
