"""One verdict from several probes of the same weights, by votes: it stands only if all of them agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradflow.analysis.results import Finding, LayerAnalysis, Rate
from gradflow.analysis.run import Analysis
from gradflow.analyzer.closed_loops import judged
from gradflow.analyzer.core import Voted, voted
from gradflow.analyzer.measuring import measure
from gradflow.analyzer.rates import Vote
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.settings import checked
from gradflow.errors import RecordingError
from gradflow.process import fitting_threads
from gradflow.recording.pooled import pooled
from gradflow.recording.tracks import Recording

DEPENDS = "depends on the input"


def batches_words(count: int) -> str:
    """What is said of numbers that several batches pool."""
    return (
        f"gain, rate and verdict are means over {count} batches with 95 % intervals over batches: a batch is "
        "the unit, and its sequences are not counted as independent of each other"
    )


def agreed(runs: Sequence[Analysis], probes: Sequence[str], command: str = "") -> Analysis:
    """Merge the analyses of one module under several probes, given with their names.

    ``command`` is what to type for a verdict on one's own data.

    The last probe is the one shown. Where all verdicts agree, the intervals of gain and rate are
    widened to hold those of all probes; where they do not, the verdict is ``inconclusive`` with the
    label "depends on the input", and the sentence gives gain and rate under every probe.
    """
    shown = runs[-1]
    layers = {
        name: _agreed_layer([run.layers[name] for run in runs], probes, command)
        for name in shown.layers
    }
    return replace(shown, layers=layers)


def agreed_by_votes(
    shown: Analysis, cast: Sequence[Mapping[str, Vote]], probes: Sequence[str]
) -> Analysis | None:
    """The same where all verdicts agree, from the votes of the probes that are not shown.

    None where they do not: then the whole analyses of all probes have something to say.
    """
    layers = {}
    for name, layer in shown.layers.items():
        others = [votes[name] for votes in cast if name in votes]
        if len(others) < len(cast) or any(vote.verdict != layer.verdict for vote in others):
            return None
        layers[name] = _widened(layer, [*others, layer], probes[-1]) if others else layer
    return replace(shown, layers=layers)


def _widened(
    shown: LayerAnalysis, votes: Sequence[Vote | LayerAnalysis], probe: str
) -> LayerAnalysis:
    """The layer with intervals that hold those of all probes."""
    rate = Rate(
        shown.rate.value,
        min(vote.rate.low for vote in votes),
        max(vote.rate.high for vote in votes),
    )
    low, high = min(vote.gain.low for vote in votes), max(vote.gain.high for vote in votes)
    findings = tuple(_under(finding, probe) for finding in shown.findings)
    gain = replace(shown.gain, low=low, high=high)
    return replace(shown, rate=rate, gain=gain, findings=findings)


def _agreed_layer(
    layers: Sequence[LayerAnalysis], probes: Sequence[str], command: str
) -> LayerAnalysis:
    shown = layers[-1]
    if len(layers) == 1:
        return shown
    wide = _widened(shown, layers, probes[-1])
    if len({layer.verdict for layer in layers}) == 1:
        return wide
    rates = ", ".join(
        f"{layer.verdict} ({layer.decades:.1f} decades over the span, {layer.rate.value:.3f} per "
        f"step) under {probe}".replace("(-", "(−").replace(" -", " −")
        for layer, probe in zip(layers, probes, strict=True)
    )
    sentence = f"{shown.name} depends on the input: {rates}; give --input for a verdict"
    finding = Finding(
        name="depends-on-input",
        layer=shown.name,
        message="verdicts differ from probe to probe, so none is given; numbers and pictures are "
        f"those under {probes[-1]}",
        advice="give a batch of your own data; the input decides how far the gradient flows",
        code=command,
    )
    kept = [f for f in shown.findings if all(f.name in _names(layer) for layer in layers)]
    return replace(
        shown,
        verdict="inconclusive",
        labels=(DEPENDS, *shown.labels),
        rate=wide.rate,
        gain=wide.gain,
        findings=(finding, *kept),
        sentence=sentence,
        title=f"{shown.name} ({shown.cell.split('_')[0]}): depends on the input, here {probes[-1]}",
    )


def _under(finding: Finding, probe: str) -> Finding:
    """The finding with the probe that its numbers belong to; the layer's interval spans them all."""
    return replace(
        finding, where=", ".join(part for part in (finding.where, f"under {probe}") if part)
    )


def _names(layer: LayerAnalysis) -> set[str]:
    return {finding.name for finding in layer.findings}


def votes(recording: Recording, *, span: int | None, seed: int) -> dict[str, Vote]:
    """The votes that `analyze` would give, by layer, mostly at a fraction of its cost.

    A layer whose step Jacobians are not known has none.
    """
    recording, _ = pooled(recording)
    settings = checked(recording, span, seed=seed)
    found: dict[str, Vote] = {}
    for track in recording.values():
        try:
            with fitting_threads(sum(state.shape[-1] for state in track.states.values())):
                part = read_part(judged(recording, track)[1]).judged
                if part.state_shape:  # of a linear recurrence
                    known: Voted = measure(part, settings, withheld=True)
                else:
                    known = voted(part, settings)
        except RecordingError:
            continue
        found[track.name] = Vote(known.verdict.name, known.gain, known.rate, known.settling)
    return found
