"""A loop read as one sequence: totals, direct parts, step Jacobians.

Letters: n calls, T steps in all, B sequences, S the width of one layer's full state (h, c).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from gradflow.cells import CELLS, Scan, Steps
from gradflow.errors import RecordingError
from gradflow.hooks.loops.linked import Linked, pulled
from gradflow.hooks.loops.links import Link
from gradflow.hooks.loops.steps import Group
from gradflow.hooks.loops.stitch import Chain
from gradflow.hooks.replay import masked

ROUNDING = 64  # units of rounding, of what was subtracted, below which a difference counts as 0
Known = TypeVar("Known")


class Loop:
    """The calls of a chain as one sequence; shared by the tracks of its layers."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._known: dict[object, tuple[tuple[int, int], object]] = {}

    def once(self, what: object, make: Callable[[], Known]) -> Known:
        """Make something unless it is known and no call and no backward has come since."""
        stamp = (self.chain.changes, self.chain.version)
        known = self._known.get(what)
        if known is None or known[0] != stamp:
            known = (stamp, make())
            self._known[what] = known
        return known[1]  # type: ignore[return-value]

    @property
    def groups(self) -> list[Group]:
        """See `Chain.groups`."""
        return self.once("groups", self.chain.groups)

    @property
    def starts(self) -> list[int]:
        """The first step of every call."""
        return list(accumulate(self.chain.sizes, initial=0))[:-1]

    def per_call(self, arrays: list[Tensor]) -> list[Tensor]:
        """One array per call from one (·, K·B, ...) per group."""
        found: dict[int, Tensor] = {}
        for group, array in zip(self.groups, arrays, strict=True):
            found |= zip(group.members, group.each(array), strict=True)
        return [found[place] for place in range(len(found))]

    def in_time(self, arrays: list[Tensor]) -> Tensor:
        """(T, B, ...) from one (t, K·B, ...) per group."""
        return torch.cat(self.per_call(arrays))

    # -- totals ------------------------------------------------------------------------------

    def scans(self, layer: int) -> list[tuple[Tensor, Scan]] | None:
        """(direct gradient, scan) of every group; None where no call has a gradient."""
        return self.once(("scans", layer), lambda: self._scans(layer))

    def _scans(self, layer: int) -> list[tuple[Tensor, Scan]] | None:
        found, some = [], False
        for group in self.groups:
            if group.call.lost:
                return None
            scanned = group.scans.scanned("total")
            some |= scanned is not None
            found.append(_nothing(group, layer) if scanned is None else scanned[layer][0])
        return found if some else None

    def handed_on(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """What every call hands to its own initial state, (B, S), and the size of its terms."""
        return self.once(("handed on", layer), lambda: self._handed_on(layer))

    def _handed_on(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        scans = self.scans(layer)
        assert scans is not None
        values, sizes = [], []
        for group, (_, scan) in zip(self.groups, scans, strict=True):
            steps = group.replay.steps(layer, 0)
            values.append(_flat(steps.before(scan, 0)).unsqueeze(0))
            sizes.append(_flat(steps.before_size(scan, 0)).unsqueeze(0))
        handed = [array[0] for array in self.per_call(values)]
        size = [array[0] for array in self.per_call(sizes)]
        for place in range(len(handed) - 1):
            link = self.chain.links[place + 1]
            if link is None or link.around is None:
                continue
            entering = self.chain.calls[place + 1].entering
            if entering:
                parts = {name: grad[layer] for name, grad in entering.items()}
                more = _through(link.around[layer], _flat(parts).to(handed[place].dtype))
                handed[place] = handed[place] + more
                size[place] = size[place] + more.abs()
        return handed, size

    def from_next(self, layer: int) -> list[tuple[Tensor, Tensor] | None]:
        """What every call's returned state gets from the next call, (B, S), and the size of it."""
        handed, size = self.handed_on(layer)
        found: list[tuple[Tensor, Tensor] | None] = []
        for link, value, bound in zip(self.chain.links[1:], handed[1:], size[1:], strict=True):
            assert link is not None
            found.append((back(link, layer, value), back(link, layer, bound, absolute=True)))
        return [*found, None]

    def direct(self, layer: int) -> Tensor:
        """The part of ∂L/∂h_t that does not come through the layer's own recurrence, (T, B, P).

        Where a state goes on to a next call, it is the total less what the next call hands back.
        An entry at most 64 units of rounding of the largest term of its step and sequence counts as
        an exact 0: less than that the subtraction cannot tell.
        """
        scans = self.scans(layer)
        assert scans is not None
        direct = self.in_time([direct for direct, _ in scans]).clone()
        for start, size, came in zip(
            self.starts, self.chain.sizes, self.from_next(layer), strict=True
        ):
            if came is not None:
                value, bound = (part[:, : direct.shape[2]] for part in came)
                end = start + size - 1
                direct[end] = difference(direct[end], value, direct[end].abs() + bound)
        return direct

    # -- step Jacobians ----------------------------------------------------------------------

    def why_no_operator(self) -> str:
        """Why the step Jacobians are not known, or nothing."""
        for link, size in zip(self.chain.links[1:], self.chain.sizes[:-1], strict=True):
            assert link is not None
            if link.unknown:
                return link.unknown
            if link.around is not None and size > 1:
                return "the state is mixed with that of several steps ago"
        return ""

    def operator(self, layer: int, dtype: torch.dtype, sequences: Tensor) -> Linked:
        """Step Jacobians of the chosen sequences, with what happens between the calls.

        Where a state goes around a call (zoneout), the states that compose are those that enter the
        calls: step t then leads from the state that enters call t to the one that enters t + 1.
        """
        reason = self.why_no_operator()
        if reason:
            raise RecordingError(
                f"step Jacobians must be of a state that is carried from call to call as it is, or "
                f"elementwise, got a loop in which {reason}; carry the state directly"
            )
        steps, places, starts = [], {}, self.starts
        for number, group in enumerate(self.groups):
            steps.append(self._linearised(group, layer, dtype, sequences))
            size = group.replay.mask.shape[0]
            for position, member in enumerate(group.members):
                for step in range(size):
                    places[starts[member] + step] = (number, position * size + step)
        linked = Linked(steps, [places[t] for t in range(len(places))], {}, {}, {})
        self._fill_links(linked, layer, dtype, sequences)
        return linked

    def _linearised(self, group: Group, layer: int, dtype: torch.dtype, sequences: Tensor) -> Steps:
        return linearised(group, (layer, 0), dtype, sequences)[0]

    def _fill_links(
        self, linked: Linked, layer: int, dtype: torch.dtype, sequences: Tensor
    ) -> None:
        carried = any(link is not None and link.around is not None for link in self.chain.links)
        for first, link in zip(self.starts[1:], self.chain.links[1:], strict=True):
            assert link is not None
            cut = link.cut.index_select(0, sequences)
            keep = (~cut).to(dtype).unsqueeze(1).expand(-1, linked.size)
            into = _picked(link.into, layer, dtype, sequences)
            if carried:
                around = _picked(link.around, layer, dtype, sequences)
                if into is not None:
                    linked.after[first - 1] = _set_where(into, cut, 1.0)
                if around is not None:
                    linked.around[first - 1] = _set_where(around, cut, 0.0)
            elif into is not None:
                linked.before[first] = _set_where(into, cut, 0.0)
                continue
            if bool(cut.any()):
                linked.before[first] = keep
        lengths = self.chain.lengths
        if lengths is not None:
            chosen = lengths.to(sequences.device).index_select(0, sequences)
            for t in range(int(chosen.min()), linked.length):
                valid = (t < chosen).to(dtype).unsqueeze(1)
                factor = linked.before.get(t, valid.expand(-1, linked.size))
                linked.before[t] = factor * (valid if factor.dim() == 2 else valid.unsqueeze(2))


def linearised(
    group: Group, place: tuple[int, int], dtype: torch.dtype, sequences: Tensor
) -> tuple[Steps, Tensor, Tensor]:
    """The steps of a group's calls one after the other, the x they read, the h they started from.

    place is a layer and a direction; arrays are (K·t, B, ·) in processing order.
    """
    layer, direction = place
    known, steps = group.replay.layers[layer][direction], group.replay.steps(layer, direction)

    def flat(array: Tensor) -> Tensor:
        return torch.cat(group.each(array)).index_select(1, sequences).to(dtype)

    def before(state: Tensor, initial: Tensor) -> Tensor:
        return flat(torch.cat([initial.unsqueeze(0).to(state.dtype), state[:-1]]))

    x, h0 = flat(known.x), before(known.h, known.h0)
    c0 = None if known.c0 is None else before(steps.states["c"], known.c0)
    weights = known.weights.to(dtype)
    return CELLS[group.call.cell].linearise(weights, x, flat(known.h), h0, c0), x, h0


def _nothing(group: Group, layer: int) -> tuple[Tensor, Scan]:
    """The scan of a group that no backward reached."""
    replay = group.replay
    steps = replay.steps(layer, 0)
    direct = torch.zeros_like(steps.states["h"])
    with torch.no_grad():
        return direct, steps.scan(direct, None, replay.kernel_lengths - 1)


def _flat(states: dict[str, Tensor]) -> Tensor:
    """h, then c, in one (..., S)."""
    return torch.cat([states[name] for name in ("h", "c") if name in states], dim=-1)


def _through(factor: Tensor, value: Tensor, *, absolute: bool = False) -> Tensor:
    factor = factor.to(value.dtype)
    return pulled(factor.abs() if absolute else factor, value.unsqueeze(1)).squeeze(1)


def back(link: Link, layer: int, value: Tensor, *, absolute: bool = False) -> Tensor:
    """A gradient (B, S) at a call's initial state, brought to the state that was returned before."""
    if link.unknown and not bool(link.cut.all()):
        return torch.full_like(value, float("nan"))
    if link.into is not None:
        value = _through(link.into[layer], value, absolute=absolute)
    return value.masked_fill(link.cut.unsqueeze(1), 0.0)


def difference(total: Tensor, part: Tensor, size: Tensor) -> Tensor:
    """total − part, (B, ·), exactly 0 where that is no more than rounding; see `Loop.direct`."""
    left = total - part
    bound = ROUNDING * torch.finfo(total.dtype).eps * size.amax(dim=-1, keepdim=True)
    return left.masked_fill(left.abs() <= bound, 0.0)


def _picked(
    factor: Tensor | None, layer: int, dtype: torch.dtype, sequences: Tensor
) -> Tensor | None:
    return None if factor is None else factor[layer].index_select(0, sequences).to(dtype)


def _set_where(factor: Tensor, cut: Tensor, value: float) -> Tensor:
    """The factor with `value` times the identity for the sequences that are cut."""
    other = torch.full_like(factor, value)
    if factor.dim() == 3:
        other = value * torch.eye(factor.shape[2], dtype=factor.dtype).expand_as(factor)
    return torch.where(cut.view(-1, *[1] * (factor.dim() - 1)), other, factor)


def trimmed(array: Tensor, lengths: Tensor | None) -> Tensor:
    """NaN past the user's own lengths, (T, B, ·)."""
    if lengths is None:
        return array
    time = torch.arange(array.shape[0], device=array.device).unsqueeze(1)
    return masked(array, time < lengths.to(array.device), float("nan"))
