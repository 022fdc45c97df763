"""Where the first NaN or Inf sits: forward in the states, backward in the gradients.

Letters: T timesteps, B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.analyzer.order import in_processing_order
from gradflow.recording import Track


@dataclass(frozen=True)
class Bad:
    """One entry that is not finite; indices from 0, the step in input time."""

    name: str  # of the state
    step: int
    sequence: int
    unit: int
    value: str  # "NaN", "inf", "-inf"

    @property
    def where(self) -> str:
        """Its place in words, counted from 1."""
        return f"step {self.step + 1}, sequence {self.sequence + 1}, unit {self.unit + 1}"


def first_not_finite(
    track: Track, tensors: Mapping[str, Tensor], *, backward: bool = False
) -> Bad | None:
    """The first entry on a real step that is NaN or Inf; backward, the one processed last.

    At the same step the tensor named first wins.
    """
    real = torch.arange(track.steps)[:, None] < track.lengths.cpu()
    first: tuple[int, str, int, int] | None = None
    for name, values in tensors.items():
        bad = in_processing_order(track, ~torch.isfinite(values)) & real[..., None]
        hits = bad.nonzero()
        if len(hits) == 0:
            continue
        place = int(hits[:, 0].max() if backward else hits[:, 0].min())
        if first is None or (place > first[0] if backward else place < first[0]):
            sequence, unit = (int(n) for n in hits[hits[:, 0] == place][0, 1:])
            first = (place, name, sequence, unit)
    if first is None:
        return None
    place, name, sequence, unit = first
    step = int(track.lengths[sequence]) - 1 - place if track.reverse else place
    value = f"{float(tensors[name][step, sequence, unit]):g}".replace("nan", "NaN")
    return Bad(name, step, sequence, unit, value)


@dataclass(frozen=True)
class Origin:
    """Where what is not finite came in from."""

    what: str
    advice: str
    code: str


def bad_weight(track: Track) -> Origin | None:
    """The first weight that holds NaN or Inf."""
    for name, weight in track.weights.items():
        places = (~torch.isfinite(weight)).nonzero()
        if len(places):
            value = f"{float(weight[tuple(places[0])]):g}".replace("nan", "NaN")
            # as Python finds it: people paste this behind the weight's name
            spot = ", ".join(str(int(n)) for n in places[0])
            count = "one entry" if len(places) == 1 else f"{len(places)} entries"
            return Origin(
                f"{name} holds {count} that {'is' if len(places) == 1 else 'are'} not finite "
                f"({name}[{spot}] is {value})",
                "the weights themselves are broken: go back to an earlier checkpoint, and clip the "
                "gradient or lower the learning rate from there",
                "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)",
            )
    return None


def bad_input(track: Track) -> Origin | None:
    """The first NaN or Inf in what the layer read, where that was seen."""
    if not track.has_inputs:
        return None
    bad = first_not_finite(track, {"the input": track.inputs})
    if bad is None:
        return None
    return Origin(
        f"the layer's input is {bad.value} at step {bad.step + 1} of sequence {bad.sequence + 1}, "
        f"feature {bad.unit + 1}",
        "clean the data, or find the layer before this one that makes it",
        "print((~torch.isfinite(x)).nonzero())  # every place where x is not finite",
    )


def bad_start(track: Track) -> Origin | None:
    """The first NaN or Inf in the initial state."""
    for name, values in track.initial.items():
        places = (~torch.isfinite(values)).nonzero()
        if len(places):
            sequence, unit = (int(n) for n in places[0])
            value = f"{float(values[sequence, unit]):g}".replace("nan", "NaN")
            return Origin(
                f"the initial state {name} is {value} in sequence {sequence + 1}, unit {unit + 1}",
                "find what made the state that is handed over: the end of the batch before this one?",
                "",
            )
    return None


def bad_state(track: Track) -> Bad | None:
    """The first NaN or Inf of the forward pass, None without one; c, which makes h, before h."""
    main = {track.main_state: track.states[track.main_state]}
    return first_not_finite(track, main | track.seen_states)


def bad_gradient(track: Track) -> Bad | None:
    """The first NaN or Inf of the backward pass, None without one."""
    return first_not_finite(track, track.grads, backward=True) if track.has_gradient else None


def arrives(track: Track, bad: Bad) -> bool:
    """Whether a bad gradient is already in what reaches h from outside this layer's recurrence."""
    if not track.has_direct:
        return False
    return not bool(torch.isfinite(track.grad_h_direct[bad.step, bad.sequence]).all())
