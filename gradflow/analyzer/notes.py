"""What shapes or limits the numbers of an analysis: warnings in words, and provenance."""

from __future__ import annotations

import numpy as np
import torch

from gradflow._version import __version__
from gradflow.analysis import LayerAnalysis
from gradflow.analyzer.certificates import broken
from gradflow.analyzer.evidence import number
from gradflow.analyzer.lyapunov import SHORT, burn_in
from gradflow.analyzer.settings import Settings
from gradflow.recording import Recording


def warnings_of(recording: Recording, layers: dict[str, LayerAnalysis]) -> tuple[str, ...]:
    notes = list(recording.notes)
    known = [track for track in recording if track.name in layers]
    for track in known:
        layer = layers[track.name]
        notes += track.notes
        notes += [str(v.attrs["note"]) for v in layer.data.values() if "note" in v.attrs]
        longest = int(track.lengths.max())
        if 1 < longest < SHORT:
            notes.append(
                f"{track.name} ran for {longest} steps only: rates are taken without a burn-in and "
                "include the transient"
            )
        if "range-limited" in layer.labels:
            name = str(track.states[track.main_state].dtype).removeprefix("torch.")
            notes.append(
                f"gains of {track.name} leave the range of {name}: the model's own gradient "
                "over- or underflows there"
            )
        sides = layer.data["sum_rule"].values
        if broken(sides):
            notes.append(
                f"the Lyapunov exponents of {track.name} add up to {number(sides[0])} per step, its "
                f"determinants to {number(sides[1])}: the smallest exponents lie below rounding"
            )
    every = [track.name for track in known if _loss_at_every_step(layers[track.name])]
    if every:
        notes.append(
            f"the loss reaches {', '.join(every)} from many steps at once: the total gradient need "
            "not fade even where nothing flows; read the profile of the last loss step alone"
        )
    return tuple(dict.fromkeys(notes))


def _loss_at_every_step(layer: LayerAnalysis) -> bool:
    """Whether the last loss step alone falls short of the total at most steps."""
    states = list(layer.data["state"].values)
    norms = layer.data["grad_norm"].sel(state="h" if "h" in states else layer.main_state)
    total, last = norms.sel(kind="total").values, norms.sel(kind="last").values
    known = np.isfinite(total) & np.isfinite(last) & (total > 0)
    more = np.abs(total[known] - last[known]) > 0.01 * total[known]
    return int(known.sum()) > 2 and float(more.mean()) > 0.5


def provenance_of(layers: dict[str, LayerAnalysis], settings: Settings) -> dict[str, object]:
    longest = max(layer.steps for layer in layers.values())
    return {
        "gradflow": __version__,
        "torch": torch.__version__,
        "method": "; ".join(dict.fromkeys(layer.method for layer in layers.values())),
        "burn_in": f"{burn_in(longest)} of {longest} steps",
        "seed": settings.seed,
        "dtype": "float64, but where the method says otherwise",
        "start": "seeded random basis, the same for every sequence",
    }
