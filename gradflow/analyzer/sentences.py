"""The words of an analysis: a sentence and a title for each layer, warnings, provenance.

Text counts steps from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from gradflow._version import __version__
from gradflow.analysis.results import LayerAnalysis, loss_reach_of, window_of
from gradflow.analyzer.causes.read_by_loss import headline, opening
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.analyzer.exponents import burn_in
from gradflow.analyzer.loss import carriers, rms_over_units
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.spectrum import broken
from gradflow.analyzer.timeline import cut_steps, cut_words, typical_segment
from gradflow.limits import BAND_WORDS, GONE_WORDS, SHORT, TOLERANCE_WORDS, VERDICTS
from gradflow.recording.track import Track, unnumbered
from gradflow.recording.tracks import Recording


def warnings_of(recording: Recording, layers: dict[str, LayerAnalysis]) -> tuple[str, ...]:
    """What was noted of the recording and its layers, each sentence once."""
    notes = list(recording.notes)
    known = [track for track in recording.values() if track.name in layers]
    names = [track.name for track in known]
    lost: dict[str, list[str]] = {}
    for track in known:
        if not track.has_gradient:
            lost.setdefault(track.why_no_gradient, []).append(track.name)
    for why, some in lost.items():
        at = _listed(some, names)
        notes.append(f"no gradient of the loss at {at}: {why}; gains and rates do not need it")
    limited: dict[str, list[str]] = {}
    for track in known:
        layer = layers[track.name]
        notes += [note for note in track.notes if not _is_said(note, layer)]
        notes += [str(v.attrs["note"]) for v in layer.data.values() if "note" in v.attrs]
        longest = int(track.lengths.max())
        if 1 < longest < SHORT:
            most = "at most " if int(track.lengths.min()) < longest else ""
            notes.append(
                f"{track.name} ran for {most}{longest} steps only: rates are taken without a burn-in and "
                "include the transient"
            )
        if "range-limited" in layer.labels:
            name = str(track.states[track.main_state].dtype).removeprefix("torch.")
            limited.setdefault(name, []).append(track.name)
        sides = layer.data["sum_rule"].values
        if broken(sides):
            notes.append(
                f"the Lyapunov exponents of {track.name} add up to {number(sides[0])} per step, its "
                f"determinants to {number(sides[1])}: the smallest exponents lie below rounding"
            )
    for name, some in limited.items():
        notes.append(
            f"gains of {_listed(some, names)} leave the range of {name}: there the model's own "
            "gradient is 0 or infinite"
        )
    return tuple(dict.fromkeys([*notes, *_from_many_steps(known, layers)]))


def _from_many_steps(known: list[Track], layers: dict[str, LayerAnalysis]) -> list[str]:
    """Where gradients arrive at most steps, which hides what the recurrence brings.

    It is the loss that does so only if no layer that ran later may have passed it down: one that the
    loss reaches at few steps.
    """
    names = [track.name for track in known]
    every = [track for track in known if _loss_at_every_step(layers[track.name])]
    few = [track for track in known if track.has_gradient and track not in every]
    loss: list[str] = []
    perhaps: list[str] = []
    for track in every:
        later = known[known.index(track) + 1 :]
        passed = any(other in few and _place(other) != _place(track) for other in later)
        (perhaps if passed else loss).append(track.name)
    notes = []
    if loss:
        notes.append(
            f"the loss reaches {_listed(loss, names)} from many steps at once: the total gradient "
            "need not fade even where nothing flows; read the overview, of the last loss step alone"
        )
    if perhaps:
        notes.append(
            f"gradients come to {_listed(perhaps, names)} at many steps at once, from the loss or from "
            "layers above: the total gradient need not fade even where nothing flows; read the gains"
        )
    return notes


def _place(track: Track) -> tuple[str, int]:
    """Tracks of one place are layers of one stack, or runs of them side by side."""
    return track.owner, track.depth


def _is_said(note: str, layer: LayerAnalysis) -> bool:
    """Whether the sentence gives this already: a reason without gains, the loop that it is a part of."""
    if note.startswith(f"{layer.name} is a part of "):
        return bool(layer.part_of)
    reason = note.partition(": ")[2].removesuffix("; totals are exact all the same")
    return "no gains" in layer.labels and bool(reason) and reason in layer.sentence


def _listed(names: list[str], every: list[str]) -> str:
    """Layers by name, as long as that is short; several runs of a layer are not several layers.

    >>> _listed(["a", "b"], ["a", "b", "c"]), _listed(["a", "b"], ["a", "b"]), _listed(["a"], ["a"])
    ('a, b', 'both layers', 'a')
    >>> _listed(["a", "a@2", "a@3"], ["a", "a@2", "a@3"])
    'a in each of its runs'
    """
    layers = list(dict.fromkeys(unnumbered(name) for name in names))
    if len(layers) < len(names) == len(every):
        return f"{_listed(layers, layers)} in each of {'its' if len(layers) == 1 else 'their'} runs"
    if 1 < len(names) == len(every):
        return "both layers" if len(names) == 2 else f"all {len(names)} layers"
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _loss_at_every_step(layer: LayerAnalysis) -> bool:
    """Whether the last loss step alone falls short of the total at most steps."""
    states = list(layer.data["state"].values)
    norms = layer.data["grad_norm"].sel(state="h" if "h" in states else layer.main_state)
    total, last = norms.sel(kind="total").values, norms.sel(kind="last").values
    known = np.isfinite(total) & np.isfinite(last) & (total > 0)
    more = np.abs(total[known] - last[known]) > 0.01 * total[known]
    return int(known.sum()) > 2 and float(more.mean()) > 0.5


def provenance_of(layers: dict[str, LayerAnalysis], settings: Settings) -> dict[str, object]:
    """With what, and how, the numbers were made."""
    longest = max(layer.steps for layer in layers.values())
    return {
        "gradflow": __version__,
        "torch": torch.__version__,
        "method": "; ".join(dict.fromkeys(layer.method for layer in layers.values())),
        "burn_in": f"{burn_in(longest)} of {longest} steps",
        "seed": settings.seed,
        "computed_in": "float64, but where the method says otherwise",
        "start": "the direction that keeps most; for further exponents a seeded random basis",
    }


# ------------------------------------------------------------------------------------- sentence


def sentence(evidence: Evidence) -> str:
    """The verdict on a layer in words with its numbers."""
    said = _SENTENCES[evidence.verdict.name](evidence)
    said += _chaos(evidence) + _in_the_long_run(evidence, said)
    said += _cut(evidence) + _too_short(evidence) + _heads(evidence)
    first = opening(evidence)
    if first and evidence.labels[:1] != ("no recurrence",):
        return f"{evidence.track.name} {first}; the layer itself {said}"
    return f"{evidence.track.name} {said}"


def _first(e: Evidence, then: str) -> str:
    """The steps back that training needs come first, if what the loss reads is in order."""
    window = window_of(e.data)
    if window is None or e.reading.amiss or math.isnan(e.gain.value):
        return then
    need = f"a window of {counted(window, 'step')} keeps"
    if window >= int(e.track.lengths.max()):
        need = "only the whole sequence keeps"
    whose = " (for the probe's loss, not yours)" if e.probed else ""
    return f"{need} ∂L/∂W_hh within {TOLERANCE_WORDS}{whose}, and {then}"


def _chaos(e: Evidence) -> str:
    """What a positive exponent means for learning, where the states stay bounded."""
    if "chaotic" not in e.labels:
        return ""
    return (
        "; it is chaotic: states that differ by little grow apart e-fold every "
        f"{number(1 / e.rate.value)} steps, and so does the gradient from farther back, clipped or not"
    )


def _heads(e: Evidence) -> str:
    """How the heads of a linear recurrence are told apart, where they are not all as the layer."""
    if e.linear is None or e.linear.heads is None:
        return ""
    names = [verdict.name for verdict in e.linear.heads.verdict]
    counts = {name: names.count(name) for name in VERDICTS if name in names}
    if list(counts) == [e.verdict.name]:
        return f"; each of its {len(names)} heads {_ARE[e.verdict.name][0]}"
    are = _ARE
    if e.channels == e.size:  # what vanishes is not gone
        are = _ARE | {
            "vanishing": (f"loses more than {BAND_WORDS}", f"lose more than {BAND_WORDS}")
        }
    told = ", ".join(f"{count} {are[name][count != 1]}" for name, count in counts.items())
    return f"; of its {len(names)} heads {told}"


_ARE = {  # one of them, several
    "vanishing": ("vanishes", "vanish"),
    "exploding": ("explodes", "explode"),
    "stable": ("is stable", "are stable"),
    "dead": ("is dead", "are dead"),
    "inconclusive": ("is inconclusive", "are inconclusive"),
}


def _in_the_long_run(e: Evidence, said: str) -> str:
    """The rate beside the gain, where the one is not what the other makes one think."""
    if math.isnan(e.gain.low) or not math.isfinite(e.rate.value) or not e.gain.steps:
        return ""
    if not e.settled:
        said = "; a rate per step has not settled in so few steps"
        bounded = e.linear is None and not (e.spec is not None and e.spec.relu)
        if not (e.rate.value > 0 and bounded) or e.verdict.name == "stable":
            return said
        if e.rate.low > 0:  # it may be a long transient
            said += (
                f", though it is above 0 in these, {number(e.rate.low)} to {number(e.rate.high)}"
            )
        return f"{said}: whether it is chaotic is open, and more steps would tell"
    if not e.apart:
        return ""
    long = e.rate.value * e.gain.steps / math.log(10)
    beside = f", where the gain makes {number(e.decades)}"
    if f"{number(abs(e.decades))} decades" in said:
        beside = ""
    return (
        f"; its rate in the long run, {number(e.rate.value)} per step, would make {number(long)} "
        f"decades of {e.over}{beside}"
    )


def _cut(e: Evidence) -> str:
    """Where the state is cut off from its past, and how long the stretches between are."""
    steps = cut_steps(e.track)
    if not steps or not e.gain.steps:
        return ""
    longest = int(e.data["segment_length"].max())
    where = f"at step {steps[0] + 1}" if len(steps) == 1 else f"at {len(steps)} steps"
    typical = typical_segment(e.track)
    lengths = f"{counted(typical, 'step')} as a rule, at most" if 0 < typical < longest else "up to"
    return (
        f"; it is cut off from its past {where} ({cut_words(e.track)}), which no gradient crosses, in "
        f"stretches of {lengths} {counted(longest, 'step')}"
    )


def _too_short(e: Evidence) -> str:
    """How many sequences are shorter than what the gain is measured over."""
    without = int((~e.sequence_gains.voting).sum())
    if e.batches or not without or math.isnan(e.gain.value) or e.no_gains:
        return ""
    verb = "is" if without == 1 else "are"
    return (
        f"; {without} of {counted(e.track.batch, 'sequence')} {verb} too short for the gain over "
        f"{e.over} and {'has' if without == 1 else 'have'} no say in it"
    )


def _vanishing(e: Evidence) -> str:
    gone = e.curve.horizon
    if gone is None:
        measured = counted(e.curve.searched, "step")
        far = f"its best direction is still above {GONE_WORDS} after the {measured} measured"
    else:
        of = f"{gone} of {e.span_words}" if gone < e.span else counted(gone, "step")
        far = f"the gradient is gone in every direction after {of}"
    return f"vanishes: {_first(e, far)}; it {_halving(e)}"


def _halving(e: Evidence) -> str:
    if not math.isfinite(e.half_life) or not (e.told and e.curve.falls_with(e.rate.value)):
        return f"loses {number(-e.decades)} decades over {e.over}"
    if "not exponential" in e.labels:
        return f"has halved after {number(e.half_life)} steps, slowing down since"
    if e.half_life < 0.95:
        return f"shrinks {number(math.exp(-e.rate.value))}-fold at every step"
    return (
        f"halves every {'step' if number(e.half_life) == '1' else f'{number(e.half_life)} steps'}"
    )


def _exploding(e: Evidence) -> str:
    grows = f"the gradient grows by {number(e.decades)} decades over {e.over}"
    if e.told and e.rate.value > 0:
        tenfold = number(math.log(10) / e.rate.value)
        every = "step" if tenfold == "1" else f"{tenfold} steps"
        grows = f"the gradient grows tenfold every {every}, by {number(e.decades)} decades over {e.over}"
    return f"explodes: {_first(e, grows)}"


def _stable(e: Evidence) -> str:
    changes = f"{number(e.decades)} decades over {e.over}"
    if e.channels is None:
        return f"is stable: {_first(e, f'the largest gain changes by {changes}')}"
    if e.channels == 0:
        none = f"no direction of {e.size} survives {counted(e.ranks.reach, 'step')} of the sequence mapped"
        return f"is stable by its largest gain ({changes}): {_first(e, none)}"
    return f"is stable: {_first(e, _surviving(e))}"


def _surviving(e: Evidence) -> str:
    verb = "survives" if e.channels == 1 else "survive"
    every = "the only direction" if e.size == 1 else f"{e.channels} of {e.size} directions"
    if e.channels == e.size and e.size > 1:
        every = f"all {e.size} directions"
    return f"{every} {verb} {counted(e.ranks.reach, 'step')}"


def _dead(e: Evidence) -> str:
    if e.cut_throughout:
        return (
            "is dead: the state is cut off from its past at every step, so nothing earlier can be "
            "learned"
        )
    return f"is dead: exact zeros cut every path{_within(e)}, so nothing earlier can be learned"


def _within(e: Evidence) -> str:
    zero = next((k for k, share in enumerate(e.curve.zero_share) if k and share == 1), None)
    return "" if zero is None else f" within {counted(zero, 'step')}"


def _inconclusive(e: Evidence) -> str:
    if "no recurrence" in e.labels and e.track.afresh:
        return (
            f"is one of {e.track.afresh} calls that start afresh, each on what came of the call before: "
            "what goes around is in no track, and within one step there is nothing to measure"
        )
    if "no recurrence" in e.labels:
        return "ran for one step only: no recurrence is exercised, so there is nothing to measure"
    if "not finite" in e.labels:
        return "holds NaN or Inf: no rate can be given until its values are finite"
    if e.no_gains:
        return f"gets no verdict, since its gains are not known: {e.no_gains}"
    if math.isnan(e.gain.value):
        return "has no step without a cut to measure: no gain can be given"
    low, high = (number(end / math.log(10)) for end in (e.gain.low, e.gain.high))
    why = (
        f"the largest gain over {e.over}, {number(e.decades)} decades [{low}, {high}], straddles the "
        f"edge of {BAND_WORDS}"
    )
    if math.isnan(e.gain.low):
        one = "one batch" if e.batches else "one sequence"
        why = f"{one} gives a gain of {number(e.decades)} decades over {e.over} but no interval"
    return f"is inconclusive: {_first(e, why)}; {e.verdict.needed} would decide"


_SENTENCES: dict[str, Callable[[Evidence], str]] = {
    "vanishing": _vanishing,
    "exploding": _exploding,
    "stable": _stable,
    "dead": _dead,
    "inconclusive": _inconclusive,
}

# ---------------------------------------------------------------------------------------- title


def title(evidence: Evidence) -> str:
    """The headline of a layer in the overview: what became of the loss's gradient, else the gain."""
    subject = evidence.kind if evidence.alone else f"{evidence.track.name} ({evidence.kind})"
    if evidence.kind in ("tap", evidence.track.name):  # "loop (loop)" would say nothing more
        subject = evidence.track.name
    return f"{subject}: {_headline(evidence)}"


def _headline(e: Evidence) -> str:
    if "no recurrence" in e.labels:
        return "one step only, so no recurrence to measure"
    if "not finite" in e.labels:
        return "NaN or Inf, so no rate can be given"
    read = headline(e)
    if read:
        return read
    if e.no_gains:
        return "no verdict, its gains are not known"
    if e.cut_throughout:
        return "cut off from its past at every step"
    if e.verdict.name == "dead":
        return f"exact zeros cut every path{_within(e)}"
    profile = e.main_profile
    if e.gradient_note or e.profile.whole or not np.isfinite(profile).any():
        return _by_gain(e)
    if np.isnan(profile[:, 1:]).all():
        return _by_gain(e)  # the loss reads the first step alone, or a cut lies right before it
    if np.isposinf(profile).any():
        back = int(np.flatnonzero(np.isposinf(profile).any(0))[0])
        return f"the gradient is infinite {counted(back, 'step')} before the loss"
    return _by_loss(e, profile)


def _by_loss(e: Evidence, profile: np.ndarray) -> str:
    unit = "cell" if e.main_state == "c" else "unit"
    gone = loss_reach_of(e.data)
    if math.isfinite(gone):
        where = f"this loss's gradient is gone {counted(int(gone), 'step')} before it"
        if e.verdict.name == "stable":  # not for want of the layer
            return f"{where}, though the layer could carry it"
        if e.curve.horizon is None:
            return f"{where}, though the layer's best direction outlives the {e.curve.searched} measured"
        if gone >= e.curve.horizon:
            return where
        return f"{where}, though the layer's best direction lasts {e.curve.horizon}"
    level = rms_over_units(profile)
    known = np.flatnonzero(~np.isnan(level))
    back = int(known[-1])
    if e.verdict.name == "exploding" or level[back] > 3:
        return _grown(float(level[back]), back)
    if e.verdict.name == "vanishing" and level[back] > 0:
        return _by_gain(e)  # the layer above passes gradient down at steps far from the loss, too
    if e.verdict.name == "vanishing":
        return _faded(-float(level[back]), back)
    carrying, units = carriers(profile)
    return _carried(carrying, units, unit, len(known))


def _faded(decades: float, back: int) -> str:
    if decades < 1:
        return f"the gradient falls to {number(10**-decades)} of its level over {counted(back, 'step')}"
    return f"the gradient fades by {number(decades)} decades over {counted(back, 'step')}"


def _grown(decades: float, back: int) -> str:
    over = f"over the {counted(back, 'step')} before the loss"
    if back == 1:
        over = "over the last step before the loss"
    if decades < 1:
        return f"the gradient comes to {number(10**decades)} times its level {over}"
    return f"the gradient grows by {number(decades)} decades {over}"


def _carried(carrying: int, units: int, unit: str, steps: int) -> str:
    way = f"all {counted(steps, 'step')}"
    if carrying == 0:
        return f"this loss's gradient reaches back {way}, though no single {unit} carries it throughout"
    if carrying == units:
        every = f"its only {unit} carries" if units == 1 else f"all {units} {unit}s carry"
        return f"{every} the gradient {way}"
    if carrying == 1:
        return f"one {unit} of {units} carries the gradient {way}"
    return f"{carrying} {unit}s of {units} carry the gradient {way}"


def _by_gain(e: Evidence) -> str:
    if e.verdict.name == "exploding":
        return f"a direction grows by {number(e.decades)} decades over {e.over}"
    if e.curve.horizon is not None:
        return f"no direction survives {counted(e.curve.horizon, 'step')}"
    if e.verdict.name == "vanishing":
        return f"every direction loses {number(-e.decades)} decades or more over {e.over}"
    if e.channels:
        return _surviving(e)
    return f"the gain stays above {GONE_WORDS} for {counted(e.curve.searched, 'step')}"
