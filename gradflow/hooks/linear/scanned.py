"""A scan that was seen: what the hooks hand over of one call of a linear recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.cells.linear import LinearSteps


@dataclass(frozen=True, kw_only=True, eq=False)
class Scanned:
    """One call of a function that runs a linear recurrence over all of its steps.

    Whoever observes such a function makes one and hands it to ``observer.saw_scan(scanned)`` of every
    observer in ``patch.observers_here()``, by `guarded`. The tensors that are live are listened to and
    let go; `make` is asked when the track is read, perhaps never, and may close over copies or
    detached tensors only. What it makes must not depend on what the model does afterwards.
    """

    name: str  # of the track, the path of the module: "layers.0.mixer"
    cell: str  # what people call it: "Mamba", "gated delta rule"; "scan" where the user marks one
    steps: int  # T
    batch: int  # B
    shape: tuple[int, ...]  # of one state: (heads, d_k, d_v), (channels, N), (channels,)
    make: Callable[[], LinearSteps]  # A_t, B_t, C_t from copies of the arguments
    output: Tensor | None = None  # live: y as the function returned it; see LinearSteps.read
    final: Tensor | None = None  # live: the last state that the function returned
    # ∂L/∂final as (B, *shape), where its layout is another; None: a view of it is
    final_back: Callable[[Tensor], Tensor] | None = None
    initial: Tensor | None = None  # live: the first state that the function was given
    # why no gradient can come to the first state that was given, a cut; "" where one can
    cut: str = ""
    lengths: Tensor | None = None  # (B,) real steps, where a mask of the model's tells; None: all
    # (T, B) steps that begin anew, A_t = 0: a new document; no cut where a track begins
    cuts: Tensor | None = None
    states: Tensor | None = None  # live: all states (T, B, *shape) or what is a view of them
    # ∂L/∂states as (T, B, *shape), where its layout is another
    states_back: Callable[[Tensor], Tensor] | None = None
    weights: tuple[Tensor, ...] = ()  # parameters that tell loops of one name apart, if any
    reverse: bool = False  # true: the steps were processed from the last input step to the first
    # in which the function computes, where that is not what its output has: it is held against that
    precision: torch.dtype | None = None
    notes: tuple[str, ...] = ()  # what a reader should know about the track
