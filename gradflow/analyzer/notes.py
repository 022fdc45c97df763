"""What shapes or limits the numbers of an analysis: warnings in words, and provenance."""

from __future__ import annotations

import numpy as np
import torch

from gradflow._version import __version__
from gradflow.analysis import LayerAnalysis
from gradflow.analyzer.certificates import broken
from gradflow.analyzer.evidence import number
from gradflow.analyzer.lyapunov import burn_in
from gradflow.analyzer.settings import Settings
from gradflow.limits import SHORT
from gradflow.recording import Recording, Track


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
    """Layers by name, as long as that is short.

    >>> _listed(["a", "b"], ["a", "b", "c"]), _listed(["a", "b"], ["a", "b"]), _listed(["a"], ["a"])
    ('a, b', 'both layers', 'a')
    """
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
