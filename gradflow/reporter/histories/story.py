"""What happened to a layer during a training, in one sentence: what was reached, when, and when lost.

Every number in it is one of a probe, or of a saved checkpoint, and every update is the one at which it was
seen: what happened between two of them is not known. That one thing came after another tells no
causes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from gradflow.limits import CLIPPING_NEAR, LASTING, LEARNED, LOST
from gradflow.reporter.histories.course import Course, smooth
from gradflow.reporter.numbers import count_words

TOLD = 4  # stretches that a sentence tells one by one


@dataclass(frozen=True)
class VerdictRun:
    """Probes in a row that have one verdict."""

    verdict: str  # the verdict, "" without one
    start: int  # place of the first probe
    stop: int  # place behind the last


def stretches(verdicts: np.ndarray, lasting: int = LASTING) -> list[VerdictRun]:
    """The verdicts in a row; a change that lasts fewer than so many probes is none.

    >>> words = np.array(["stable"] * 4 + ["vanishing"] + ["stable"] * 3)
    >>> [(one.verdict, one.start, one.stop) for one in stretches(words)]
    [('stable', 0, 8)]
    """
    runs: list[VerdictRun] = []
    for place, verdict in enumerate(verdicts.tolist()):
        if runs and runs[-1].verdict == verdict:
            runs[-1] = VerdictRun(verdict, runs[-1].start, place + 1)
        else:
            runs.append(VerdictRun(verdict, place, place + 1))
    if len(verdicts) < 2 * lasting:
        return runs
    kept: list[VerdictRun] = []
    for run in runs:
        lasts = run.stop - run.start >= lasting
        if kept and (not lasts or kept[-1].verdict == run.verdict):
            kept[-1] = VerdictRun(kept[-1].verdict, kept[-1].start, run.stop)
        elif lasts or not kept:
            kept.append(run)
    first = kept[0]
    if len(kept) > 1 and first.stop - first.start < lasting:  # one that did not last, at the start
        kept[:2] = [VerdictRun(kept[1].verdict, 0, kept[1].stop)]
    return kept


def updates(step: float) -> str:
    """A training step as people write it.

    >>> updates(7900)
    '7,900'
    """
    return f"{int(step):,}"


def sentence(course: Course) -> str:
    """What happened to a layer, with its name; what a page and a terminal say of it."""
    said = _joined([_reached(course), _judged(course), _broken(course)], course)
    return f"{course.name}{':' if said.startswith('the ') else ''} {said}."


def title(course: Course) -> str:
    """The same without the name, and shorter: the best that was reached, and how it ended."""
    return _joined([_reached(course, short=True), _judged(course, short=True)], course)


def _joined(parts: list[str], course: Course) -> str:
    probes = count_words(len(course.step), course.noun)
    return "; ".join(part for part in parts if part) or f"was not measured in {probes}"


# ------------------------------------------------------------------------------- how far it reached


@dataclass(frozen=True)
class Reach:
    """How far a layer reached over a training, in steps back."""

    first: int  # place of the first probe that knows it
    best: int  # place of the probe by which most of what was won was won; `first` where nothing was
    last: int  # place of the last probe that knows it
    learned: bool  # whether it rose much from first to best
    lost: bool  # whether it fell much from there to last
    steps: np.ndarray  # (N,) smoothed over a few probes; never below 10⁻³: all there is to reach


def reach(course: Course) -> Reach | None:
    """How the reach went, by its running median over a few probes; None where it is not known."""
    whole = course.reach
    known = np.flatnonzero(~np.isnan(whole))
    if not len(known):
        return None
    steps = np.minimum(whole, farthest(course))
    steps = steps if len(known) < 2 * LASTING else smooth(steps, LASTING)
    first, last = int(known[0]), int(known[-1])
    low, high = steps[first], np.nanmax(steps)
    learned = bool(high >= LEARNED * low and high - low >= 2)
    won = np.flatnonzero(steps >= low + 0.9 * (high - low))
    best = int(won[0]) if learned else first
    lost = _fell(float(steps[last]), float(high))
    return Reach(first, best, last, learned, lost, steps)


def farthest(course: Course) -> np.ndarray:
    """(N,) as many steps as there are to reach at each probe."""
    known = ~np.isnan(course.profile)
    lags = np.where(known, course.lag[None, :], 0)
    farthest = lags.max(axis=1) if lags.size else np.zeros(len(course.step))
    return np.fmax(np.fmax(course.numbers["searched"], course.numbers["span"] - 1), farthest)


def _reached(course: Course, *, short: bool = False) -> str:
    way = reach(course)
    if way is None:
        return ""
    places = (way.first, way.best if way.learned else int(np.nanargmax(way.steps)), way.last)
    far = [far_words(course, place, way.steps[place]) for place in places]
    first, end = _when(course, way.first), _when(course, way.last)
    if way.learned:
        said = f"learned to reach {far[1]} by {course.counted_in} {_at(course, way.best)}"
        if way.lost:
            said += f"{',' if short else ' and reached'} {far[2]} {end}"
    elif way.lost:
        said = f"reached {far[1]} at best, {far[2]} {end}"
    elif way.first == way.last:
        said = f"reached {far[0]}{f' {first}' if len(course.step) > 1 else ''}"
    elif far[0] == far[2]:
        said = f"reached {far[0]} {first} and {end}"
    else:
        said = f"reached {far[0]} {first}, {far[2]} {end}"
    start = way.best if way.learned else way.first
    low = start + int(np.nanargmin(way.steps[start : way.last + 1]))
    if _fell(way.steps[low], min(way.steps[start], way.steps[way.last])):
        said += f", only {far_words(course, low, way.steps[low])} {_when(course, low)}"
    return said if course.has_gains else f"the gradient of the last loss step {said}"


def _when(course: Course, place: int) -> str:
    words = {0: "at first", len(course.step) - 1: "at the end"}
    return words.get(place, f"at {course.counted_in} {_at(course, place)}")


def _fell(steps: float, before: float) -> bool:
    return bool(steps <= LOST * before and before - steps >= 2)


def far_words(course: Course, place: int, steps: float) -> str:
    """So many steps of what there is to reach at one probe, in words."""
    everything = farthest(course)[place]
    if steps >= everything > 0:
        return f"all {count_words(int(everything), 'step')}"
    beyond = math.isnan(course.numbers["horizon"][place]) and course.has_gains
    return ("at least " if beyond else "") + count_words(int(steps), "step")


# ------------------------------------------------------------------------------------- its verdicts


def _judged(course: Course, *, short: bool = False) -> str:
    """Its verdicts one after the other; what was inconclusive between two others is left out."""
    runs = _measured(course)
    told = [run for place, run in enumerate(runs) if not _between(runs, place)]
    if not told:
        return ""
    last = told[-1]
    if len(told) == 1:
        words = Counter(_known(course, last).tolist())
        word, count = words.most_common(1)[0]
        if count == words.total():
            return f"{word} throughout"
        if 2 * count < words.total():
            return f"changing: {_each(course, words)}"
        return f"{word} at {count} of {words.total()} {course.noun}s{_but_now(course, word)}"
    word = _word(course, last)
    again = "again " if word in [run.verdict for run in told[:-2]] else ""
    now = _but_now(course, last.verdict)
    since = (
        f"since {course.counted_in} {_at(course, last.start)}{_but_for(course, last, bool(now))}"
    )
    end = f"{word} {again}{since}{_after_clipping(course, last)}{now}"
    if short:
        return end
    if len(told) > TOLD:
        return f"{len(told) - 1} changes of its verdict, {end}"
    return ", ".join([*(_while(course, run, run is told[0]) for run in told[:-1]), end])


def _measured(course: Course) -> list[VerdictRun]:
    """The stretches of the probes that gave a verdict."""
    known = np.flatnonzero(course.verdict != "")
    return [
        VerdictRun(run.verdict, int(known[run.start]), int(known[run.stop - 1]) + 1)
        for run in stretches(course.verdict[known])
    ]


def _known(course: Course, run: VerdictRun) -> np.ndarray:
    here = course.verdict[run.start : run.stop]
    return here[here != ""]


def _word(course: Course, run: VerdictRun) -> str:
    """The verdict of a stretch; where more than half of its probes had others, none of them is."""
    return run.verdict if (_known(course, run) == run.verdict).mean() >= 0.5 else "changing"


def _each(course: Course, words: Counter[str]) -> str:
    """How many probes had which verdict."""
    said = ", ".join(f"{word} at {count}" for word, count in words.most_common())
    return f"{said} of {count_words(words.total(), course.noun)}"


def _while(course: Course, run: VerdictRun, first: bool) -> str:
    """From where to where a verdict held; probes at its ends that had another one are none of it."""
    places = np.flatnonzero(course.verdict[run.start : run.stop] == run.verdict) + run.start
    run = VerdictRun(run.verdict, int(places[0]), int(places[-1]) + 1)
    start, last = _at(course, run.start), _at(course, run.stop - 1)
    word = f"{course.counted_in} " if first else ""
    where = f"from {word}{start} to {last}" if start != last else f"at {word}{start}"
    if not (course.verdict[: run.start] != "").any():
        where = f"up to {course.counted_in} {last}"
    return f"{_word(course, run)} {where}{_but_for(course, run)}"


def _but_for(course: Course, run: VerdictRun, told_apart: int = 0) -> str:
    """How many probes of a stretch had another verdict, each too few to count as a change."""
    known = _known(course, run)
    if _word(course, run) != run.verdict:
        return f" ({_each(course, Counter(known.tolist()))})"
    others = int((known != run.verdict).sum()) - told_apart
    return f" (but for {others} of {len(known)} {course.noun}s)" if others > 0 else ""


def _but_now(course: Course, verdict: str) -> str:
    """The verdict of the last probe, where it is another one that has not lasted yet."""
    known = course.verdict[course.verdict != ""]
    return f", {known[-1]} at the last {course.noun}" if known[-1] != verdict else ""


def _between(runs: list[VerdictRun], place: int) -> bool:
    """Whether a stretch is an inconclusive one on the way from one verdict to another."""
    return (
        runs[place].verdict == "inconclusive"
        and 0 < place < len(runs) - 1
        and runs[place - 1].verdict != runs[place + 1].verdict
    )


def _at(course: Course, place: int) -> str:
    return updates(course.step[place])


def clipping_began(course: Course) -> np.ndarray:
    """Places of the probes from which on clipping acted on every one of the next few, not before."""
    acts = np.asarray(course.numbers["clipped"] == 1)
    if len(acts) < LASTING:
        return np.zeros(0, dtype=int)
    rows = [acts[k : len(acts) - LASTING + 1 + k] for k in range(LASTING)]
    steady: np.ndarray = np.logical_and.reduce(rows)
    return np.flatnonzero(steady[1:] & ~acts[:-LASTING]) + 1


def _after_clipping(course: Course, run: VerdictRun) -> str:
    """How long after clipping began to act the layer began to vanish, where that is near."""
    began = clipping_began(course)
    began = began[(began <= run.start) & (began >= run.start - CLIPPING_NEAR)]
    if run.verdict not in ("vanishing", "dead") or not len(began):
        return ""
    start = int(began[-1])
    if not np.all(course.numbers["clipped"][start : run.start + 1] == 1):
        return ""
    apart = int(course.step[run.start] - course.step[start])
    when = f"{count_words(apart, 'update')} after" if apart else "as"
    return f", {when} clipping began to act at every probe"


def _broken(course: Course) -> str:
    """Where NaN or Inf came first."""
    places = np.flatnonzero(course.bad)
    if not len(places):
        return ""
    at = course.numbers["nonfinite_at"][places[0]]
    where = "" if math.isnan(at) else f", time step {at:.0f}"
    more = f", at {count_words(len(places), course.noun)}" if len(places) > 1 else ""
    return (
        f"NaN or Inf first seen at {course.counted_in} {_at(course, int(places[0]))}{where}{more}"
    )
