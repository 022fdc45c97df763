"""What a layer passes down to the layer below it, and where a stack loses the gradient on the way.

Letters: T timesteps, B sequences, I input features, δ_t the gradient at the pre-activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from gradflow.analysis.results import Finding, LayerAnalysis
from gradflow.analyzer.evidence import number
from gradflow.analyzer.loss import median_norm
from gradflow.errors import RecordingError
from gradflow.limits import GONE, GONE_WORDS
from gradflow.recording.track import Track
from gradflow.recording.tracks import Recording


def input_gradient_norms(track: Track, withheld: bool) -> np.ndarray:
    """Median over sequences of ‖∂L/∂x_t‖₂ = ‖W_ihᵀ δ_t‖₂, what this layer alone passes down, (T,).

    Input time; NaN without a backward and for a loop that marks its states, whose inputs are not
    seen. In a bidirectional stack a layer below receives the sum of two of them.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> for weight in rnn.parameters():
    ...     _ = torch.nn.init.constant_(weight, 0.5)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(3, 1, 1))[0][-1].sum().backward()
    >>> input_gradient_norms(recording["l0"], withheld=False).tolist()  # 0.5 · 0.5^(T−t)
    [0.125, 0.25, 0.5]
    """
    nothing = np.full(track.steps, math.nan)
    if withheld or not track.has_gradient or "weight_ih" not in track.weights:
        return nothing
    try:
        delta = track.delta
    except RecordingError:  # a cell whose equations are not known
        return nothing
    return median_norm(delta @ track.weights["weight_ih"].to(delta.dtype), track.mask)


def with_flow(
    recording: Recording, layers: Mapping[str, LayerAnalysis]
) -> dict[str, LayerAnalysis]:
    """The same layers, with a finding on each that hardly anything of the gradient above reaches.

    Held against each other are the gradient at the states of the layers that read this one, and
    what of it arrives at this layer's output, as root sums of squares over the steps.
    """
    found = {name: _lost_above(recording[name], layers) for name in layers}
    if not any(found.values()):
        found = {name: _lost_in_depth(recording, name, layers) for name in layers}
    return {
        name: layer if found[name] is None else _with(layer, found[name])
        for name, layer in layers.items()
    }


def _with(layer: LayerAnalysis, finding: Finding | None) -> LayerAnalysis:
    return layer if finding is None else replace(layer, findings=(*layer.findings, finding))


def _lost_above(track: Track, layers: Mapping[str, LayerAnalysis]) -> Finding | None:
    above = [layers[name] for name in track.above if name in layers]
    if not above or len(above) < len(track.above):
        return None
    arrives = _size(layers[track.name], "direct")
    sent = math.hypot(*(_size(layer, "total") for layer in above))
    if not sent > 0 or not math.isfinite(sent) or not arrives < GONE * sent:
        return None
    share = arrives / sent
    decades = math.log10(share) if share else -math.inf
    names = " and ".join(layer.name for layer in above)
    left = f"what comes down to {track.name} is smaller by {number(-decades)} decades"
    if not share:
        left = f"nothing of it comes down to {track.name}"
    return Finding(
        name="lost-between-layers",
        layer=track.name,
        message=f"{names} {'has' if len(above) == 1 else 'have'} a gradient, but {left}",
        where=f"between {names} and {track.name}",
        value=share,
        threshold=GONE,
        basis=f"gone below {GONE_WORDS}, as for the horizon",
        severity=decades,
        advice="look at the layer above: gates or activations at their flat ends, or tiny input "
        "weights, stop the gradient there; add a residual connection around it, "
        "and train again (not tried here)",
        source="He et al. 2016",
        code=_residual(),
    )


def _lost_in_depth(
    recording: Recording, name: str, layers: Mapping[str, LayerAnalysis]
) -> Finding | None:
    """What is left at the lowest layer of a stack where no single step down loses that much."""
    if any(name in track.above for track in recording.values()):
        return None  # not the lowest
    way: list[tuple[str, ...]] = []
    above = recording[name].above
    while above:
        if not all(one in layers for one in above):
            return None
        way.append(above)
        above = recording[above[0]].above
    if len(way) < 2:
        return None
    arrives = _size(layers[name], "direct")
    sent = math.hypot(*(_size(layers[one], "total") for one in way[-1]))
    if not sent > 0 or not math.isfinite(sent) or not 0 < arrives < GONE * sent:
        return None
    share, top = arrives / sent, " and ".join(way[-1])
    decades = math.log10(share)
    return Finding(
        name="lost-in-depth",
        layer=name,
        message=f"on the way from {top} down to {name} the gradient loses {number(-decades)} decades, "
        f"{number(-decades / len(way))} at each of {len(way)} layers",
        where=f"between {top} and {name}",
        value=share,
        threshold=GONE,
        basis=f"gone below {GONE_WORDS}, as for the horizon",
        severity=decades,
        advice="one remedy for the whole stack: a residual connection around every layer, or fewer layers, "
        "and train again (not tried here)",
        source="He et al. 2016",
        code=_residual(),
    )


def _residual() -> str:
    """Code for what a fused stack has no place for."""
    return (
        "for layer in layers:  # built of one layer each, num_layers=1, input as wide as output\n"
        "    x = x + layer(x)[0]"
    )


def _size(layer: LayerAnalysis, kind: str) -> float:
    """Root sum of squares over steps and states of the median norms; NaN if nothing is known."""
    norms = layer.data["grad_norm"].sel(kind=kind).values
    known = norms[~np.isnan(norms)]
    return float(torch.as_tensor(known).norm()) if known.size else math.nan
