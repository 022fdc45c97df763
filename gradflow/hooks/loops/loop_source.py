"""One layer and direction of a loop of calls: what a `Track` reads its numbers from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradflow.cells import Scan
from gradflow.hooks.call import SECOND_ORDER, Call
from gradflow.hooks.heard_gradients import LoopGradients
from gradflow.hooks.layersource import LayerSource, alone, by_loss_step
from gradflow.hooks.loops.arrivals import Arrivals, arrivals, arrivals_at_top, reached
from gradflow.hooks.loops.loop import Loop
from gradflow.hooks.loops.loss_steps import Sheet, by_lag, by_time, gathered, placed, sheets, taken
from gradflow.recording import (
    Backward,
    Contributions,
    Forward,
    Operator,
    Outer,
    Parity,
    Source,
    moved,
)

if TYPE_CHECKING:
    from gradflow.hooks.parity import WeightUses

SEVERITY = ("not applicable", "passed", "failed")


@dataclass(eq=False)
class LoopSource(LoopGradients):
    """One layer and direction of a loop of calls; most loops are of a single call."""

    loop: Loop
    layer: int
    direction: int
    uses: WeightUses | None  # None in the copy that they hold, which would else refer back to them
    ran_backward: bool = False  # some backward ran in the block, perhaps not through here

    @property
    def calls(self) -> list[Call]:
        """The calls it is made of, in time order."""
        return self.loop.chain.calls

    def kept(self) -> list[Call]:
        return self.calls

    def _said(self) -> tuple[str, str, str]:
        return (
            "it ran inside torch.no_grad() or torch.inference_mode(); run it with gradients enabled",
            "its weights are frozen and its input needs no gradient; "
            "call requires_grad_() on the weights or on the input",
            "a backward ran but did not reach this layer: its output is detached, or the loss "
            "ignores it; make the loss depend on it",
        )

    @property
    def lost(self) -> str:  # type: ignore[override]
        """Why what the backwards brought is no total."""
        return self.loop.chain.lost

    @property
    def batched(self) -> bool:  # type: ignore[override]
        """Whether a backward of several outputs at once reached it, which is not counted."""
        return self.loop.chain.batched

    @property
    def version(self) -> int:
        """How many backwards reached the calls."""
        return self.loop.chain.version

    @property
    def real(self) -> Tensor | None:
        """(B,) the real steps of every sequence; None where all are T."""
        return self.loop.chain.real

    @property
    def closed(self) -> Any:
        """The `ClosedLoop` that the calls are a part of, if any."""
        return self.loop.chain.closed

    def alone(self) -> LoopSource | None:
        """The same layer with its inputs held fixed, if it is part of a closed loop."""
        if self.closed is None:
            return None
        return AloneSource(self.loop, self.layer, self.direction, self.uses, self.ran_backward)

    def parts(self) -> list[LayerSource]:
        """The layer in each group of calls that are replayed at once."""
        return [
            LayerSource(group.replay, group.scans, self.layer, self.direction)
            for group in self.loop.groups
        ]

    def _single(self) -> LayerSource | None:
        plain = len(self.calls) == 1 and self.loop.chain.lengths is None  # also where it is packed
        return self.parts()[0] if plain else None

    def _in_time(self, arrays: list[Tensor]) -> Tensor:
        return self._trimmed(self.loop.in_time(arrays))

    @property
    def _dtype(self) -> torch.dtype:
        return self.calls[0].returned["output"].dtype

    def _trimmed(self, array: Tensor, sequences: Tensor | None = None) -> Tensor:
        """In the dtype of the track, whatever it was computed in."""
        return super()._trimmed(array.to(self._dtype), sequences)

    def forward(self) -> Forward:
        """States, gates and inputs."""
        parts = [part.forward() for part in self.parts()]
        if self._single() is not None:
            return parts[0]
        return Forward(
            states={n: self._in_time([p.states[n] for p in parts]) for n in parts[0].states},
            initial={n: self.loop.initial([p.initial[n] for p in parts]) for n in parts[0].initial},
            gates={n: self._in_time([p.gates[n] for p in parts]) for n in parts[0].gates},
            inputs=self._in_time([p.inputs for p in parts if p.inputs is not None]),
        )

    def backward(self) -> Backward | None:
        """Total gradients; None without a backward."""
        single = self._single()
        if single is not None:
            return single.backward()
        with torch.no_grad():
            scans = self.loop.scans(self.layer)
            if scans is None:
                return None
            closed = self.closed
            return self._gathered(
                self.loop.direct(self.layer) if closed is None else closed.direct(self),
                lambda part: self.loop.in_time([part(scan) for _, scan in scans]),
            )

    def last(self) -> Backward | None:
        """Total gradients of the last loss step alone; last in processing order."""
        single = self._single()
        if single is not None:
            return single.last()
        return super().last() if self.closed is None else self.closed.last(self)

    def reached(self) -> Tensor | None:
        """Where the loss reaches what was returned, input time."""
        single = self._single()
        if single is not None:
            return single.reached()
        if self.closed is not None:
            return self.closed.reached(self)
        found = self._arrivals()
        return None if found is None else reached(found)

    def arriving(self) -> Tensor | None:
        """Where a gradient comes to this layer from outside it, padding included."""
        single = self._single()
        if single is not None:
            return single.arriving()
        if self.closed is not None:
            return self.closed.reached(self)
        found = self._arrivals()
        if found is None:
            return None
        with torch.no_grad():
            direct = self.loop.direct(self.layer)
        past = self._trimmed(torch.zeros_like(direct)).isnan()
        if bool((direct.isnan() & ~past).any()):  # what lies between two calls is not known
            return None
        arrives = (direct.nan_to_num() != 0).any(2)
        for name, part in found[self.layer].items():
            arrives = arrives if name == "h" else arrives | (part.nan_to_num() != 0).any(2)
        return arrives

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps, (n, T, m, ·)."""
        single = self._single()
        if single is not None:
            return single.loss_steps(sequences, loss_steps, dtype)
        if self.closed is not None:
            return self.closed.loss_steps(self, sequences, loss_steps, dtype)
        return super().loss_steps(sequences, loss_steps, dtype)

    def contributions(self, sequences: Tensor) -> Contributions | None:
        """∂L/∂W_hh and ∂L/∂W_ih of some sequences by lag; None where there is no lag."""
        if self.closed is not None:
            return None  # what a lag brings comes through other parts of the loop as well
        found = self._arrivals()
        if found is None or not self._has_lags():
            return None
        place = self.layer, self.direction
        return Lags(self.loop, place, found, sequences.to(self.calls[0].h0.device)).contributions()

    def _has_lags(self) -> bool:
        found = self._arrivals()
        return found is not None and len(found) >= self.calls[0].layers - self.layer

    def _arrivals(self) -> Arrivals | None:
        if self._single() is not None:
            known = self.loop.groups[0]
            return self.loop.once(
                ("arrivals", self.direction), lambda: arrivals_at_top(known, self.direction)
            )
        return self.loop.once("arrivals", lambda: arrivals(self.loop))

    def _sheets(self, dtype: torch.dtype, sequences: Tensor) -> list[Sheet] | None:
        found = self._arrivals()
        if found is None or not self._has_lags():
            return None
        return sheets(self.loop, (self.layer, self.direction), found, dtype, sequences)

    def _alone(
        self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None
    ) -> Backward | None:
        here = self.calls[0].h0.device
        sequences = sequences.to(here)
        stack = self._sheets(dtype or self.loop.groups[0].replay.work_dtype, sequences)
        if stack is None:
            return None
        stack = placed(stack)
        chosen = chosen.to(stack[0].arrived.device)
        passed = [scans[-1] for _, scans in by_time(stack, len(sequences), chosen)]
        trim = self._trimmed if dtype is None else super()._trimmed
        return alone(
            moved(gathered(passed), here),
            lambda array: trim(by_loss_step(array, len(chosen)), sequences),
        )

    def partial(self) -> dict[str, Tensor] | None:
        """State-partial gradients; None without a backward.

        None also where a state goes around a call: the states that compose are then not those that
        the calls return.
        """
        single = self._single()
        if single is not None:
            return single.partial()
        with torch.no_grad():
            scans = self.loop.scans(self.layer)
            around = any(
                link is not None and link.around is not None for link in self.loop.chain.links
            )
            if scans is None or around:
                return None
            parts = [
                group.replay.steps(self.layer, 0).partial(scan.grads)
                for group, (_, scan) in zip(self.loop.groups, scans, strict=True)
            ]
            return {name: self._in_time([part[name] for part in parts]) for name in parts[0]}

    def _gathered(
        self, direct: Tensor | None, gather: Callable[[Callable[[Scan], Tensor]], Tensor]
    ) -> Backward:
        grads = {n: gather(lambda scan, n=n: scan.grads[n]) for n in self.calls[0].initial}  # type: ignore[misc]
        return Backward(
            grads={name: self._trimmed(grad) for name, grad in grads.items()},
            direct=None if direct is None else self._trimmed(direct),
            delta=self._trimmed(gather(lambda scan: scan.delta)),
            delta_hh=self._trimmed(gather(lambda scan: scan.delta_hh)),
        )

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Step Jacobians in processing order, starting at each sequence's first real step."""
        single = self._single()
        if single is not None:
            return single.operator(dtype, sequences)
        if self.closed is not None:
            return self.closed.operator(self, dtype, sequences)
        with torch.no_grad():
            sequences = sequences.to(self.calls[0].h0.device)
            return self.loop.operator(self.layer, dtype, sequences)

    def changed(self, **changes: float) -> tuple[Source, dict[str, Tensor]]:
        """The layer run again with changed weights, and these."""
        from gradflow.hooks.rerun import WeightChange, changed  # which is made of these sources

        return changed(self, WeightChange(**changes))

    def parity(self) -> Parity:
        """See `WeightUses.check`; the worst of all groups of calls."""
        if self.lost:
            create_graph = "a backward with create_graph=True came through the layer"
            reason = create_graph if self.lost == SECOND_ORDER else self.lost
            return Parity("not applicable", None, reason)
        checked, found = [], []
        for part in self.parts():
            keys = part.weight_keys()
            if keys not in checked:
                checked.append(keys)
                assert self.uses is not None
                found.append(self.uses.check(part))
        return max(found, key=lambda parity: (SEVERITY.index(parity.status), parity.error or 0.0))

    def trains_recurrence(self) -> bool | None:
        """Whether ∂L/∂W_hh has an entry that is not exactly 0; None without a gradient."""
        with torch.no_grad():
            found = [part.rebuilt() for part in self.parts()]
        known = [part["weight_hh"] for part in found if part is not None and len(part["weight_hh"])]
        return any(bool((grad != 0).any()) for grad in known) if known else None


class AloneSource(LoopSource):
    """A layer of a closed loop, its inputs held fixed."""

    @property
    def closed(self) -> Any:
        """Nothing: the loop is left open."""
        return None


class Lags:
    """∂L/∂W of one layer and direction by how far back from the loss step it was picked up."""

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
