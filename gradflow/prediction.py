"""What a remedy would do: tried on the recorded batch, without training.

Joins the recording (run again with changed weights) and the analyzer (measured again). `what_if` tries
every remedy that is asked for, on its own, before and after; a report suggests those that help a
vanishing or exploding layer most. Remedies that need training are suggested by the findings, never
predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from gradflow.analysis.results import Gain, LayerAnalysis, Prediction, Rate
from gradflow.analysis.run import Analysis
from gradflow.analyzer import analyze
from gradflow.analyzer.causes.remedies import remedy
from gradflow.analyzer.evidence import number
from gradflow.analyzer.measuring import Brief, brief, brief_seconds
from gradflow.analyzer.read_steps import readings
from gradflow.cells import CELLS
from gradflow.cells.spec import Keeper
from gradflow.errors import InputError, RecordingError, must_be
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.rerun import WeightChange, rerun
from gradflow.limits import (
    FACTORS_ALIKE,
    PREDICTION_LEAST,
    PREDICTION_SECONDS,
    QUICK,
    REPORT_SHARE,
    SHOWN_PREDICTIONS,
    STEEPEST,
)
from gradflow.recording.track import Track, unnumbered
from gradflow.recording.tracks import Recording


def measured(recording: Recording, name: str, **asked: Any) -> Brief | str:
    """The numbers of a layer, as `brief` is asked for them, or why there are none."""
    try:
        return brief(recording[name], **asked)
    except RecordingError as error:
        return str(error)


def helps(before: Brief | LayerAnalysis, after: Brief) -> float:
    """Powers of ten over the span by which the gain comes nearer to 1."""
    was, now = abs(before.gain.decades), abs(after.gain.decades)
    return 0.0 if was == now else was - now


def with_predictions(
    recording: Recording, analysis: Analysis, *, batch: str = "this batch", seed: int = 0
) -> Analysis:
    """The analysis with, for every vanishing or exploding layer, the remedies that help most.

    An LSTM or GRU that vanishes is tried with its forget (update) bias raised by 1 and by 2, and with
    biases for all distances of the span (chrono initialisation). Any other layer is tried with W_hh
    multiplied by a = e^(−p), p being the gain over the span per step, which would undo it in a linear
    layer, and by a e^(−p′), p′ being what the first try left; a vanilla RNN that vanishes also with an
    orthogonal W_hh. What makes a layer stable comes first, and then what helps most; the finding
    advises the first. Layers are changed together. Nothing is tried where the loss reads the wrong
    steps, which no weight mends, where the weights that ran are no parameters of the module, nor where
    it would take more than a few seconds, and then the provenance says so.
    """
    read = readings(recording)
    ill = [
        layer
        for layer in analysis.values()
        if layer.verdict in ("vanishing", "exploding")
        and layer.name in recording.tracks
        and not layer.part_of  # of a closed loop: alone it is not what ran
        and recording[layer.name].batch == layer.sequences  # not several runs pooled
        and not read[layer.name].amiss
        and _can_be_set(recording[layer.name], layer)
    ]
    share = REPORT_SHARE * max(1, len(ill))
    each = sum(brief_seconds(recording[layer.name], layer.span, share) for layer in ill)
    seconds = SHOWN_PREDICTIONS * each
    if seconds > PREDICTION_SECONDS:
        name, value = _next(ill[0], []) or ("forget_bias", 1.0)
        note = (
            f"remedies were not tried on the batch: that would take about {seconds:.0f} s; "
            f"gradflow.what_if(recording, {name}={value:g}) does it"
        )
        known = list(analysis.provenance.get("notes", []))
        return replace(analysis, provenance={**analysis.provenance, "notes": [*known, note]})
    if (count := len({unnumbered(layer.name) for layer in ill})) > 1:
        batch += f", {count} layers changed together"
    tried: dict[str, list[Prediction]] = {layer.name: [] for layer in ill}
    for _ in range(SHOWN_PREDICTIONS):
        trials = {layer.name: trial for layer in ill if (trial := _next(layer, tried[layer.name]))}
        changes = {
            name: WeightChange(**{remedy: value}) for name, (remedy, value) in trials.items()
        }
        again = rerun(recording, changes)
        for name in again.recording.tracks:
            before, note = analysis.layers[name], again.notes[name]
            # the sequence that the present numbers are of, so that both reach equally far
            mapped = tuple(int(b) for b in before.data["sequence"].values)
            asked = {"span": before.span, "share": share, "seed": seed, "sequences": mapped}
            after = measured(again.recording, name, **asked)
            if isinstance(after, Brief):
                on = f"{batch} ({note})" if note else batch
                tried[name].append(_predicted(before, after, *trials[name], on))
    layers = {
        layer.name: _advised(layer, recording[layer.name], _best(tried[layer.name], tried.values()))
        for layer in ill
    }
    return replace(analysis, layers={**analysis.layers, **layers})


def _can_be_set(track: Track, layer: LayerAnalysis) -> bool:
    """Whether the weight that its remedies change is a parameter that the user could change."""
    remedy, _ = _next(layer, []) or ("", 0.0)
    weight = "bias_ih" if remedy == "forget_bias" and "bias_ih" in track.weights else "weight_hh"
    return weight in track.weights and weight not in track.foreign


def _best(tried: list[Prediction], every: Iterable[list[Prediction]]) -> tuple[Prediction, ...]:
    """Those that help, in one order for all layers, which are changed together.

    What leaves the fewest of them unstable comes first, a start before a factor, then what helps most.
    """

    def order(place: int) -> tuple[int, bool, float]:
        one = tried[place]
        same = [of[place] for of in every if len(of) > place and of[place].remedy == one.remedy]
        unstable = sum(p.verdict != "stable" for p in same)
        return unstable, one.remedy == "scale_hh" and not unstable, -sum(p.helps for p in same)

    found: list[Prediction] = []
    for one in (tried[place] for place in sorted(range(len(tried)), key=order)):
        same = [other for other in found if other.remedy == one.remedy]  # and not to be told apart
        alike = any(abs(other.value / one.value - 1) < FACTORS_ALIKE for other in same)
        if one.helps >= PREDICTION_LEAST and not alike:
            found.append(one)
    return tuple(found)


def _advised(
    layer: LayerAnalysis, track: Track, predictions: tuple[Prediction, ...]
) -> LayerAnalysis:
    """The layer with its predictions; its finding advises the first that is enough, or sets a bias.

    So does the finding on the gate whose bias it is.
    """
    layer = replace(layer, predictions=predictions)
    codes, keeper = {one.code for one in layer.findings}, _keeper(layer.cell)
    ill = ("vanishing", f"{keeper.name}-gates-{keeper.fault}") if keeper else ("vanishing",)
    made = [(one, remedy(track, one.remedy, one.value)) for one in predictions]
    led = [pair for pair in made if keeper or pair[0].verdict == "stable" or pair[1][2] in codes]
    if layer.verdict != "vanishing" or not led:
        return layer
    first, (advice, source, code) = led[0]
    still = "" if first.verdict != layer.verdict else "still "
    decades = f"{number(layer.decades)} → {number(first.gain.decades)} decades over the span"
    advice += f"; tried on {first.batch}: {still}{first.verdict}, {decades}"
    findings = tuple(
        replace(one, advice=advice, source=source, code=code) if one.name in ill else one
        for one in layer.findings
    )
    return replace(layer, findings=findings)


def _next(layer: LayerAnalysis, tried: list[Prediction]) -> tuple[str, float] | None:
    """The remedy that is tried next, or none where all are."""
    if layer.verdict == "vanishing" and _keeper(layer.cell) is not None:
        every = [("forget_bias", 1.0), ("forget_bias", 2.0), ("chrono", max(3.0, layer.span))]
        return every[len(tried)] if len(tried) < len(every) else None
    if not tried:
        return "scale_hh", _rounded(math.exp(min(-layer.pace, STEEPEST)))
    if len(tried) == 1:
        left = tried[0].gain.pace if math.isfinite(tried[0].gain.pace) else 0.0
        return "scale_hh", _rounded(tried[0].value * math.exp(min(-left, STEEPEST)))
    vanilla = layer.cell in CELLS and CELLS[layer.cell].vanilla
    if layer.verdict == "vanishing" and vanilla and len(tried) == 2:
        return "orthogonal", 1.0
    return None


def _rounded(value: float) -> float:
    """Three digits, as one would type them."""
    return float(f"{value:.3g}")


def _predicted(
    before: LayerAnalysis, after: Brief, remedy: str, value: float, batch: str
) -> Prediction:
    outcome = after.verdict if after.verdict != before.verdict else f"still {after.verdict}"
    parts = [f"{number(before.decades)} → {number(after.gain.decades)} decades over the span"]
    if before.horizon != after.horizon:
        parts.append(f"gone in every direction after {_gone(before)} → {_gone(after)} steps")
    if before.channels != after.channels and after.channels is not None:
        parts.append(f"{before.channels} → {after.channels} of {before.size} channels")
    words = _words(before.cell, remedy, value)
    numbers: dict[str, Any] = {name: one for name, one in vars(after).items() if name != "span"}
    return Prediction(
        remedy=remedy,
        value=value,
        words=words,
        helps=helps(before, after),
        batch=batch,
        message=f"{words}: {outcome}, {', '.join(parts)}",
        **numbers,
    )


def _words(cell: str, remedy: str, value: float) -> str:
    if remedy == "forget_bias":
        keeper = _keeper(cell)
        assert keeper is not None
        return f"{keeper.name} bias + {value:g}"
    if remedy == "chrono":
        return f"chrono biases for {value:g} steps"
    if remedy == "orthogonal":
        return "W_hh orthogonal"
    return f"W_hh × {value:g}"


def _keeper(cell: str) -> Keeper | None:
    return CELLS[cell].keeper if cell in CELLS else None


def _gone(found: Brief | LayerAnalysis) -> str:
    return f"> {found.searched}" if found.horizon is None else str(found.horizon)


COMPARED = ("gain", "rate", "rate_low", "rate_high", "half_life", "horizon", "channels", "verdict")
TRIAL_COLUMNS = [
    "layer",
    "remedy",
    "value",
    *(f"{name}_{when}" for name in COMPARED for when in ("before", "after")),
    "helps",
    "truncation_error",
    "norm_before",
    "norm_after",
    "note",
]
WHOLE_NUMBERS = [
    f"{name}_{when}" for name in ("horizon", "channels") for when in ("before", "after")
]


class Trials(pd.DataFrame):
    """What `what_if` gives; a notebook shows of it what is compared first."""

    def _repr_html_(self) -> str:
        whole = pd.DataFrame(self)
        ends = [f"{name}_{when}" for name in ("verdict", "horizon") for when in ("before", "after")]
        return whole.filter(["layer", "remedy", "value", *ends, "helps", "note"]).to_html(
            index=False
        )


def what_if(
    recording: Recording,
    *,
    forget_bias: float | None = None,
    scale_hh: float | None = None,
    truncate: int | None = None,
    clip: float | None = None,
    chrono: int | None = None,
    orthogonal: float | None = None,
) -> pd.DataFrame:
    """Try remedies on the recorded batch, each on its own, and hold the numbers before and after.

    ``forget_bias``, ``chrono``, ``orthogonal`` and ``scale_hh`` run the recorded calls again with
    changed weights and take rate, half-life, horizon, channels and verdict from the new states and step
    Jacobians, as `analyze` does. The model's head and its loss are not run again and nothing is
    trained: the result is a prediction for the present weights and this batch. A stack of layers runs
    again as a whole, all its layers changed alike; what other modules feed it, and every step's input
    in a loop over a cell, is taken as it was recorded.

    Args:
        recording: what ``gradflow.record`` saw; it stays as it is.
        forget_bias: δ, added to the pre-activation of the forget gate of every LSTM, f = σ(a_f + δ)
            (Jozefowicz et al. 2015), and of the update gate z of every GRU: PyTorch's z is the
            share of the old state that is kept, so δ > 0 keeps more of it.
        scale_hh: what every recurrent weight matrix W_hh is multiplied by (Pascanu et al. 2013).
        truncate: K, how many steps each loss step's gradient may cover: gains at lags of K and more
            are lost, so gain and verdict afterwards are those over K − 1 steps. The rate is not
            changed. Truncation in chunks (a detach every K steps) keeps at most as much.
        clip: θ, the norm to which the gradient of all recorded recurrent layers' weights together is
            shortened if it is longer, g ← g · min(1, θ/‖g‖₂) (Pascanu et al. 2013). Weights of other
            modules are not seen; in training their gradients count too. Clipping shortens a step
            and changes no rate: it does not cure chaos (Mikhaeil et al. 2022).
        chrono: T_max, the longest distance that matters in the task: the biases of the forget gates
            (of a GRU's update gates z) become ln u, u spread evenly over 1 … T_max − 1, those of an
            LSTM's input gates −ln u (chrono initialisation, Tallec & Ollivier 2018, who draw u).
        orthogonal: a gain, 1.0 mostly: every W_hh is replaced by a random orthogonal matrix times it,
            gate by gate, as a start would be (Arjovsky et al. 2016).

    Returns:
        A tidy frame, one row per layer and remedy. Columns: ``layer``, ``remedy``, ``value``; then
        ``gain`` (the largest over the span, nats), ``rate`` (nats per step), ``rate_low`` and
        ``rate_high`` (95 %), ``half_life`` (steps),
        ``horizon`` (steps; missing if not reached), ``channels`` and ``verdict``, each with
        ``_before`` and ``_after``; ``helps``, the powers of ten over the span by which the gain comes
        nearer to 1, (|gain_before| − |gain_after|)/ln 10, negative if it moves away;
        ``truncation_error``, ‖truncated − full‖/‖full‖ of ∂L/∂W_hh; ``norm_before`` and
        ``norm_after`` of the clipped gradient; ``note``, in words, also why a remedy could not be
        tried. NaN or missing where there is no number.

    Raises:
        InputError: no remedy, or a value out of its range.
        RecordingError: nothing was recorded.

    An LSTM without recurrent weights is a leaky integrator, its gain at lag k is f^k with
    f = σ(b): half-life 1 at b = 0, 2.2127 at b = 1.

    >>> import torch, gradflow
    >>> lstm = torch.nn.LSTM(2, 3)
    >>> for weight in lstm.parameters():
    ...     _ = torch.nn.init.zeros_(weight)
    >>> with gradflow.record(lstm) as recording:
    ...     lstm(torch.ones(60, 2, 2))[0][-1].sum().backward()
    >>> row = gradflow.what_if(recording, forget_bias=1.0).iloc[0]
    >>> print(f"{row.half_life_before:.4f} {row.half_life_after:.4f}")
    1.0000 2.2127
    """
    if not isinstance(recording, Recording):
        kind, advice = type(recording).__name__, "give what `with gradflow.record(...)` yields"
        raise InputError(must_be("recording", "a Recording", kind, advice))
    asked = _asked(forget_bias=forget_bias, scale_hh=scale_hh, truncate=truncate, clip=clip,
                   chrono=chrono, orthogonal=orthogonal)  # fmt: skip
    recording.require_tracks()
    share = QUICK * len(recording)
    before = {t.name: measured(recording, t.name, share=share) for t in recording.values()}
    trials = {"truncate": _truncate, "clip": _clip}
    tried = {name: trials.get(name, partial(_changed_weights, name)) for name in asked}
    rows = [row for name, value in asked.items() for row in tried[name](recording, before, value)]
    found = pd.DataFrame(rows, columns=TRIAL_COLUMNS)
    return Trials(found.astype(dict.fromkeys(WHOLE_NUMBERS, "Int64")))


# ---------------------------------------------------------------------------------- the remedies


Before = Mapping[str, "Brief | str"]  # track name -> its numbers, or why there are none
Row = dict[str, Any]


_ABOVE = {  # remedy -> what its value is above, whole where that is a count; advice
    "forget_bias": (-math.inf, "1.0 is the usual start; a negative one forgets faster"),
    "scale_hh": (0.0, "a factor below 1 damps, above 1 strengthens the recurrence"),
    "truncate": (0, "it counts the steps that are kept"),
    "clip": (0.0, "it is the largest norm that is left as it is"),
    "chrono": (2, "it is the longest distance of the task"),
    "orthogonal": (0.0, "1.0 keeps every length"),
}


def _asked(**given: object) -> dict[str, float]:
    """Remedy -> value, of those that were asked for, checked."""
    found = {name: _checked(name, value) for name, value in given.items() if value is not None}
    if not found:
        names, advice = ", ".join(_ABOVE), "write gradflow.what_if(recording, forget_bias=1.0)"
        raise InputError(must_be("what_if", f"given at least one of {names}", "none", advice))
    return found


def _checked(name: str, value: Any) -> float:
    above, advice = _ABOVE[name]
    whole = isinstance(above, int)
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    fine = isinstance(value, kinds) and not isinstance(value, bool)
    if fine and math.isfinite(value) and value > above:
        return int(value) if whole else float(value)
    expected = "a finite number above 0" if above == 0 else "a finite number"
    expected = f"a whole number of at least {above + 1}" if whole else expected
    raise InputError(must_be(name, expected, repr(value), advice))


def _changed_weights(
    remedy: str, recording: Recording, before: Before, value: float
) -> Iterator[Row]:
    """Rows of a remedy that changes weights: all layers at once, each measured again."""
    again = rerun(recording, {name: WeightChange(**{remedy: value}) for name in before})
    for name, known in before.items():
        row = _row(name, remedy, value, known)
        if isinstance(known, str):
            yield row
        elif name in again.refused:
            yield row | {"note": f"not tried: {again.refused[name]}"}
        else:
            after = measured(again.recording, name, span=known.span, share=QUICK * len(before))
            yield row | {"note": again.notes[name]} | _after(known, after)


def _truncate(recording: Recording, before: Before, value: float) -> Iterator[Row]:
    """Rows of a shorter window: nothing is run again, gains at lags of K and more are lost."""
    keep = int(value)
    layers = analyze(recording, pool=False).layers
    for name, known in before.items():
        row = _row(name, "truncate", keep, known)
        if isinstance(known, str):
            yield row
            continue
        error, said = _truncation_error(layers[name], keep)
        if math.isnan(error):
            note = "how far that takes ∂L/∂W_hh off is not known"
            if recording[name].trains_recurrence is False:
                note = "∂L/∂W_hh is exactly 0: there is nothing to truncate"
            if not recording[name].has_gradient:
                note += ": there is no gradient to truncate"
        else:
            note = f"∂L/∂W_hh is off by {number(100 * error)} % if nothing goes back {keep} steps"
            note += f" ({said})" if said else ""
        reaches = known.horizon is None or known.horizon > keep
        after = replace(
            known,
            half_life=min(known.half_life, float(keep)),
            horizon=keep if reaches else known.horizon,
            channels=0 if known.channels is not None and known.span >= keep else known.channels,
        )
        if keep > known.searched:  # no gain lies that far back
            after = known
        elif keep <= known.gain.steps:
            after = _within(recording, name, after, keep - 1, QUICK * len(before))
        growing = max(0.0, known.gain.pace) if known.gain.steps else 0.0
        cut = growing * max(0, known.gain.steps - keep) / math.log(10)
        yield (row | _after(known, after) | {"helps": cut, "truncation_error": error, "note": note})


def _within(recording: Recording, name: str, after: Brief, steps: int, share: int) -> Brief:
    """The numbers with gain and verdict over so many steps: beyond them nothing is left."""
    if not steps:
        nothing = Gain(-math.inf, -math.inf, -math.inf, 1)
        return replace(after, gain=nothing, verdict="dead")
    kept = measured(recording, name, span=steps, share=share)
    return after if isinstance(kept, str) else replace(after, gain=kept.gain, verdict=kept.verdict)


def _truncation_error(layer: LayerAnalysis, keep: int) -> tuple[float, str]:
    """‖truncated − full‖/‖full‖ of ∂L/∂W_hh where lags 0 … K − 1 are kept, and what it rests on.

    NaN where it is not known.
    """
    if "truncation_error" not in layer.data:
        return math.nan, ""
    errors = layer.data["truncation_error"]
    if "weight_hh" not in errors["parameter"].values:
        return math.nan, ""
    values = errors.sel(parameter="weight_hh").values
    return float(values[min(keep, len(values)) - 1]), str(errors.attrs.get("note", ""))


def _weight_norms(recording: Recording) -> tuple[float, dict[str, float]]:
    """Euclidean norms of ∂L/∂(weights and biases): of all recorded layers' together, and by track name.

    Each weight counts once, NaN without any. Weights of a head or an embedding are not seen, so the
    norm over all parameters of the model is at least the first.
    """
    squares: dict[int, float] = {}
    own = {}
    for track in recording.values():
        source = track.source
        if not isinstance(source, LoopSource) or source.uses is None:
            continue
        caught = source.uses.caught(source.parts())
        mine = {key: float(grad.double().square().sum()) for key, grad in caught.items()}
        squares |= mine
        if mine:
            own[track.name] = math.sqrt(sum(mine.values()))
    return math.sqrt(sum(squares.values())) if squares else math.nan, own


def _clip(recording: Recording, before: Before, value: float) -> Iterator[Row]:
    """Rows of norm clipping: the gradient becomes shorter, the network stays what it is."""
    total, own = _weight_norms(recording)
    for name, known in before.items():
        row = _row(name, "clip", value, known)
        if isinstance(known, str):
            yield row
            continue
        yield (
            row
            | _after(known, known)
            | {
                "norm_before": total,
                "norm_after": min(total, value),
                "note": _clip_note(total, own.get(name), value),
            }
        )


def _clip_note(total: float, own: float | None, limit: float) -> str:
    if own is None:
        return "no gradient of its weights was seen, so there is none to clip"
    if not math.isfinite(total):
        return (
            "the gradient of the recorded recurrent weights is not finite: clipping cannot mend it"
        )
    share = f"{number(total)} over the recorded recurrent weights ({number(own)} of this layer)"
    if total > limit:
        said = f"hit: the norm {share} is multiplied by at most {number(limit / total)}"
    else:
        said = f"not hit by these weights alone: their norm is {share}"
    return f"{said}; clipping changes no rate and does not cure chaos (Mikhaeil et al. 2022)"


# --------------------------------------------------------------------------------------- the rows


def _row(name: str, remedy: str, value: float, before: Brief | str) -> Row:
    """A row without an outcome yet."""
    empty = dict.fromkeys(TRIAL_COLUMNS, math.nan) | dict.fromkeys(WHOLE_NUMBERS)
    empty |= {"verdict_before": "", "verdict_after": ""}
    row = empty | {"layer": name, "remedy": remedy, "value": value, "note": ""}
    if isinstance(before, str):
        return row | {"note": f"not measured: {before}"}
    return row | {f"{name}_before": value for name, value in _numbers(before).items()}


def _after(before: Brief, after: Brief | str) -> Row:
    if isinstance(after, str):
        return {"note": f"not measured: {after}"}
    found = {f"{name}_after": value for name, value in _numbers(after).items()}
    found["helps"] = helps(before, after)
    if math.isnan(after.gain.value) and not math.isnan(before.gain.value):
        found["note"] = "with this change its states are no longer finite"
    return found


def _numbers(found: Brief) -> dict[str, Any]:
    values = asdict(found)
    rate: Rate = found.rate
    values |= {
        "gain": found.gain.value,
        "rate": rate.value,
        "rate_low": rate.low,
        "rate_high": rate.high,
    }
    return {name: values[name] for name in COMPARED}
