"""The gradient of a layer's weights, taken apart by how far back from the loss step it was picked up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from gradflow.cells import Scan
from gradflow.hooks.loops.arrivals import Arrivals
from gradflow.hooks.loops.loop import Loop
from gradflow.hooks.loops.loss_steps import Sheet, by_lag, by_time, gathered, placed, sheets, taken
from gradflow.recording import Contributions, Outer, moved


class Lags:
    """One layer and direction of a loop, some of its sequences."""

    def __init__(
        self, loop: Loop, place: tuple[int, int], found: Arrivals, sequences: Tensor
    ) -> None:
        self.loop, self.place, self.found, self.sequences = loop, place, found, sequences

    @cached_property
    def stack(self) -> list[Sheet]:
        """The layers from the top of the stack down to this one, in float64."""
        with torch.no_grad():
            return placed(sheets(self.loop, self.place, self.found, torch.float64, self.sequences))

    @property
    def work(self) -> int:
        """Multiplications of one row at one lag: the way back here, then two outer products."""
        layer, direction = self.place
        replay = self.loop.groups[0].replay
        stack = [replay.weights(number, direction) for number in range(layer, replay.call.layers)]
        back = sum(w.weight_hh.numel() + w.weight_ih.numel() for w in stack)
        return back + stack[0].weight_hh.numel()

    def by_lag(self) -> Iterator[dict[str, Outer]]:
        """C_0, C_1, … until nothing is left."""
        passed = by_lag(self.stack, len(self.sequences))
        while True:
            with torch.no_grad():  # left before `yield`: the caller's code is not to run in it
                step = next(passed, None)
            if step is None:
                return
            places, scan = step
            lowest = self.stack[-1]
            yield _outer(scan, taken(lowest.before, places), taken(lowest.x, places))

    def total(self) -> dict[str, Outer]:
        """All lags together, by one scan in which every step takes up what arrives."""
        layer, direction = self.place
        with torch.no_grad():
            if len(self.loop.chain.calls) == 1:
                scans = self.loop.groups[0].scans
                scan = scans.of_sequences(self.sequences, torch.float64)[layer][direction][1]
            else:
                passed = by_time(self.stack, len(self.sequences))
                scan = gathered([each[-1] for _, each in passed])
        lowest = self.stack[-1]
        return _outer(moved(scan, lowest.x.device), lowest.before, lowest.x)

    def contributions(self) -> Contributions:
        """For a `Track`; nothing is computed before it is asked for."""
        return Contributions(self.work, self.total, self.by_lag)


def _outer(scan: Scan, before: Tensor, x: Tensor) -> dict[str, Outer]:
    """∂L/∂W of the rows of a scan (·, ·, G·H), from the h and the x that their steps started from."""
    return {
        "weight_hh": Outer(scan.delta_hh.flatten(0, 1), before),
        "weight_ih": Outer(scan.delta.flatten(0, 1), x),
    }
