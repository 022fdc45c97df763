"""The remedies that help a vanishing or exploding layer most, tried before a report suggests them."""

from __future__ import annotations

import math
from dataclasses import replace

from gradflow.analysis import Analysis, LayerAnalysis, Prediction
from gradflow.analyzer.brief import Brief, brief_seconds
from gradflow.analyzer.evidence import number
from gradflow.analyzer.reading import readings
from gradflow.cells import CELLS, Keeper
from gradflow.hooks.rerun import WeightChange, rerun
from gradflow.limits import (
    FACTORS_ALIKE,
    PREDICTION_LEAST,
    PREDICTION_SECONDS,
    REPORT_SHARE,
    SHOWN_PREDICTIONS,
    STEEPEST,
)
from gradflow.prediction.outcome import helps, measured
from gradflow.recording import Recording, Track


def with_predictions(
    recording: Recording, analysis: Analysis, *, batch: str = "this batch", seed: int = 0
) -> Analysis:
    """The analysis with, for every vanishing or exploding layer, the remedies that help most.

    An LSTM or GRU that vanishes is tried with its forget (update) bias raised by 1 and by 2. Any
    other layer is tried with W_hh multiplied by a = e^(−p), p being the gain over the span per step,
    which would undo it in a linear layer, and by a e^(−p′), p′ being what the first try left. Layers
    are changed together. Nothing is tried where the loss reads the wrong steps, which no weight mends,
    where the weights that ran are no parameters of the module, nor where it would take more than a few
    seconds, and then the provenance says so.
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
        and _can_be_set(recording[layer.name], _first_trial(layer)[0])
    ]
    share = REPORT_SHARE * max(1, len(ill))
    seconds = 2 * sum(brief_seconds(recording[layer.name], layer.span, share) for layer in ill)
    if seconds > PREDICTION_SECONDS:
        note = (
            f"remedies were not tried on the batch: that would take about {seconds:.0f} s; "
            "gradflow.what_if(recording, forget_bias=1.0) does it"
        )
        known = list(analysis.provenance.get("notes", []))
        return replace(analysis, provenance={**analysis.provenance, "notes": [*known, note]})
    if len(ill) > 1:
        batch += f", {len(ill)} layers changed together"
    tried: dict[str, list[Prediction]] = {layer.name: [] for layer in ill}
    trials = {layer.name: _first_trial(layer) for layer in ill}
    for _ in range(SHOWN_PREDICTIONS):
        changes = {
            name: WeightChange(**{remedy: value}) for name, (remedy, value) in trials.items()
        }
        again = rerun(recording, changes)
        for name in again.recording.tracks:
            before, note = analysis.layers[name], again.notes[name]
            # the sequence that the present numbers are of, so that both reach equally far
            mapped = tuple(int(b) for b in before.data["sequence"].values)
            after = measured(again.recording, name, before.span, share, seed, mapped)
            if isinstance(after, Brief):
                on = f"{batch} ({note})" if note else batch
                tried[name].append(_predicted(before, after, *trials[name], on))
                trials[name] = _next_trial(*trials[name], after)
    layers = {layer.name: replace(layer, predictions=_best(tried[layer.name])) for layer in ill}
    return replace(analysis, layers={**analysis.layers, **layers})


def _can_be_set(track: Track, remedy: str) -> bool:
    """Whether the weight that a remedy changes is a parameter that the user could change."""
    weight = "bias_ih" if remedy == "forget_bias" and "bias_ih" in track.weights else "weight_hh"
    return weight not in track.foreign


def _best(tried: list[Prediction]) -> tuple[Prediction, ...]:
    """Those that help, the best first; one of two that cannot be told apart."""
    helping = sorted((p for p in tried if p.helps >= PREDICTION_LEAST), key=lambda p: -p.helps)
    if len(helping) > 1 and abs(helping[0].value / helping[1].value - 1) < FACTORS_ALIKE:
        return (helping[0],)
    return tuple(helping)


def _first_trial(layer: LayerAnalysis) -> tuple[str, float]:
    if layer.verdict == "vanishing" and _keeper(layer.cell) is not None:
        return "forget_bias", 1.0
    return "scale_hh", _rounded(math.exp(min(-layer.pace, STEEPEST)))


def _next_trial(remedy: str, value: float, after: Brief) -> tuple[str, float]:
    if remedy == "forget_bias":
        return remedy, value + 1
    left = after.gain.pace if math.isfinite(after.gain.pace) else 0.0
    return remedy, _rounded(value * math.exp(min(-left, STEEPEST)))


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
    return Prediction(
        remedy=remedy,
        value=value,
        words=words,
        verdict=after.verdict,
        rate=after.rate,
        gain=after.gain,
        half_life=after.half_life,
        horizon=after.horizon,
        searched=after.searched,
        channels=after.channels,
        helps=helps(before, after),
        batch=batch,
        message=f"{words}: {outcome}, {', '.join(parts)}",
    )


def _words(cell: str, remedy: str, value: float) -> str:
    if remedy == "forget_bias":
        keeper = _keeper(cell)
        assert keeper is not None
        return f"{keeper.name} bias + {value:g}"
    return f"W_hh × {value:g}"


def _keeper(cell: str) -> Keeper | None:
    return CELLS[cell].keeper if cell in CELLS else None


def _gone(found: Brief | LayerAnalysis) -> str:
    return f"> {found.searched}" if found.horizon is None else str(found.horizon)
