"""A loop read as one sequence: totals, direct parts, step Jacobians.

Letters: n calls, T steps in all, B sequences, S the width of one layer's full state (h, c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from gradflow.cells import Scan, Steps
from gradflow.errors import RecordingError
from gradflow.hooks.heard_gradients import difference
from gradflow.hooks.loops.groups import Group
from gradflow.hooks.loops.layout import Layout
from gradflow.hooks.loops.linearised import linearised, timed
from gradflow.hooks.loops.linked import Linked, pulled
from gradflow.hooks.loops.links import Link
from gradflow.hooks.loops.stitch import Chain

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
    def layout(self) -> Layout:
        """Where the steps of the calls lie in the loop's time."""
        return self.chain.layout

    def per_call(self, arrays: list[Tensor]) -> list[Tensor]:
        """One array (·, b, ...) per call from one (·, K·b, ...) per group."""
        found: dict[int, Tensor] = {}
        for group, array in zip(self.groups, arrays, strict=True):
            found |= group.by_member(array)
        return [found[place] for place in range(len(found))]

    def in_time(self, arrays: list[Tensor]) -> Tensor:
        """(T, B, ...) from one (t, K·b, ...) per group."""
        if len(arrays) == 1 and self.layout.even:  # of a single group the members are in order
            calls = arrays[0].unflatten(1, (len(self.layout.extents), -1)).transpose(0, 1)
            return calls.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        return self.layout.placed(dict(enumerate(self.per_call(arrays))))

    def initial(self, arrays: list[Tensor]) -> Tensor:
        """(B, ·) of every sequence at its first call, from one (K·b, ·) per group."""
        each = [array[0] for array in self.per_call([array.unsqueeze(0) for array in arrays])]
        found = each[0].new_zeros(self.chain.batch, *each[0].shape[1:])
        for part, array in zip(self.layout.parts, each, strict=True):
            if bool(part.begins.any()):
                begins = part.begins.to(array.device)
                found[part.sequences.to(array.device)[begins]] = array[begins]
        return found

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
        """What every call hands to its own initial state, (b, S), and the size of its terms."""
        return self.once(("handed on", layer), lambda: self._handed_on(layer))

    def _handed_on(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        scans = self.scans(layer)
        assert scans is not None

        def flat(states: dict[str, Tensor]) -> Tensor:
            names = [name for name in self.chain.calls[0].initial if name in states]
            return torch.cat([states[name] for name in names], dim=-1)

        values, sizes = [], []
        for group, (_, scan) in zip(self.groups, scans, strict=True):
            steps = group.replay.steps(layer, 0)
            values.append(flat(steps.before(scan, 0)).unsqueeze(0))
            sizes.append(flat(steps.before(scan, 0, absolute=True)).unsqueeze(0))
        handed = [array[0] for array in self.per_call(values)]
        size = [array[0] for array in self.per_call(sizes)]
        for place in range(len(handed) - 1):
            link = self.chain.links[place + 1]
            if link is None or link.around is None:
                continue
            entering = self.chain.calls[place + 1].entering
            if entering:
                parts = {name: grad[layer] for name, grad in entering.items()}
                more = _through(link.around[layer], flat(parts).to(handed[place].dtype))
                if link.rows is not None:
                    more = torch.zeros_like(handed[place]).index_copy(
                        0, link.rows[link.rows >= 0], more[link.rows >= 0]
                    )
                handed[place] = handed[place] + more
                size[place] = size[place] + more.abs()
        return handed, size

    def from_next(self, layer: int) -> list[tuple[Tensor, Tensor, Tensor] | None]:
        """What every call's returned state gets from the next call, (b, S), and the size of it.

        With them (b,) which of its sequences go on; None where none does.
        """
        handed, size = self.handed_on(layer)
        if self._goes_on_as_it_is():
            every = torch.ones(len(handed[0]), dtype=torch.bool, device=handed[0].device)
            return [*((v, s, every) for v, s in zip(handed[1:], size[1:], strict=True)), None]
        parts, device = self.layout.parts, handed[0].device
        value = handed[0].new_zeros(self.chain.batch, handed[0].shape[1])
        bound, goes_on = torch.zeros_like(value), torch.zeros(len(value), dtype=torch.bool)
        found: list[tuple[Tensor, Tensor, Tensor] | None] = []
        for place in reversed(range(len(parts))):
            here = parts[place].sequences.to(device)
            later = goes_on[parts[place].sequences].to(device)
            found.append((value[here], bound[here], later) if bool(later.any()) else None)
            link = self.chain.links[place]
            if link is not None:
                value[here] = back(link, layer, handed[place])
                bound[here] = back(link, layer, size[place], absolute=True)
            goes_on[parts[place].sequences] = ~parts[place].begins
        return found[::-1]

    def _goes_on_as_it_is(self) -> bool:
        """Whether every state goes on from call to call unchanged, in every sequence."""
        return self.once("as it is", self._is_handed_on)

    def _is_handed_on(self) -> bool:
        links = [link for link in self.chain.links if link is not None]
        plain = self.layout.even and not any(
            link.unknown or link.into is not None or link.around is not None for link in links
        )
        return plain and not any_true([link.cut for link in links])

    def direct(self, layer: int) -> Tensor:
        """The part of ∂L/∂h_t that does not come through the layer's own recurrence, (T, B, P).

        Where a state goes on to a next call, it is the total less what the next call hands back.
        An entry at most 64 units of rounding of the largest term of its step and sequence counts as
        an exact 0: less than that the subtraction cannot tell.
        """
        scans = self.scans(layer)
        assert scans is not None
        direct = self.in_time([direct for direct, _ in scans]).clone()
        if self._goes_on_as_it_is() and len(self.layout.extents) > 1:
            value, bound = (
                torch.stack(each[1:])[..., : direct.shape[2]] for each in self.handed_on(layer)
            )
            ends = torch.tensor(self.layout.extents, device=direct.device).cumsum(0)[:-1] - 1
            known = direct[ends]
            direct[ends] = difference(known, value, known.abs() + bound)
            return direct
        for part, came in zip(self.layout.parts, self.from_next(layer), strict=True):
            if came is not None:
                value, bound = (each[:, : direct.shape[2]] for each in came[:2])
                at = part.ends.to(direct.device), part.sequences.to(direct.device)
                known = direct[at]
                left = difference(known, value, known.abs() + bound)
                direct[at] = torch.where(came[2].unsqueeze(1), left, known)
        return direct

    # -- step Jacobians ----------------------------------------------------------------------

    def why_no_operator(self) -> str:
        """Why the step Jacobians are not known, or nothing."""
        if self.chain.unread:
            return self.chain.unread
        for link, size in zip(self.chain.links[1:], self.chain.sizes[:-1], strict=True):
            assert link is not None
            if link.unknown:
                return link.unknown
            if link.around is not None and size > 1 and not self._holds(link):
                return "the state is mixed with that of several steps ago"
        return ""

    def _holds(self, link: Link) -> bool:
        """Whether every sequence either goes on from what the call before returned, or is held over it."""
        into, around = link.into, link.around
        if into is None or around is None or into.dim() + around.dim() > 6 or not self.layout.even:
            return False
        held = (around == 1).all(-1)
        return bool((held | (around == 0).all(-1)).all() and (into[held] == 0).all())

    def operator(self, layer: int, dtype: torch.dtype, sequences: Tensor) -> Linked:
        """Step Jacobians of the chosen sequences, with what happens between the calls.

        Where a state goes around a call (zoneout), the states that compose are those that enter the
        calls: step t then leads from the state that enters call t to the one that enters t + 1. Of a
        sequence that is held over a call of several steps, each of these is the identity.
        """
        if self.chain.unread:
            raise RecordingError(f"its step Jacobians are not known: {self.chain.unread}")
        reason = self.why_no_operator()
        if reason:
            raise RecordingError(
                f"step Jacobians must be of a state that is carried from call to call as it is, or "
                f"elementwise, got a loop in which {reason}; carry the state directly"
            )
        steps: list[Steps] = []
        if self.layout.even:
            places: dict[int, tuple[int, int]] = {}
            for number, group in enumerate(self.groups):
                steps.append(linearised(group, (layer, 0), dtype, sequences)[0])
                size = group.replay.mask.shape[0]
                for position, member in enumerate(group.members):
                    start = int(self.layout.parts[member].starts[0])
                    for step in range(size):
                        places[start + step] = (number, position * size + step)
            every = [[places[t]] for t in range(len(places))]
        else:
            steps = [
                part.steps for part in timed(self.groups, self.layout, (layer, 0), dtype, sequences)
            ]
            every = [
                [(number, t) for number in range(len(steps))] for t in range(self.layout.steps)
            ]
        linked = Linked(steps, every, {}, {}, {})
        self._fill_links(linked, layer, dtype, sequences)
        return linked

    def _fill_links(
        self, linked: Linked, layer: int, dtype: torch.dtype, sequences: Tensor
    ) -> None:
        carried = any(link is not None and link.around is not None for link in self.chain.links)
        for place, link in enumerate(self.chain.links):
            for first, chosen in self.started(place):
                assert link is not None
                self._fill_link(linked, (place, first), chosen, (layer, dtype, sequences), carried)
        lengths = self.chain.real
        if lengths is not None:
            chosen = lengths.to(sequences.device).index_select(0, sequences)
            for t in range(int(chosen.min()), linked.length):
                valid = (t < chosen).to(dtype).unsqueeze(1)
                factor = linked.before.get(t, valid.expand(-1, linked.size))
                linked.before[t] = factor * (valid if factor.dim() == 2 else valid.unsqueeze(2))

    def started(self, place: int) -> list[tuple[int, Tensor]]:
        """The steps at which sequences enter a call from an earlier one, and which (B,) they are."""
        part, found = self.layout.parts[place], []
        for first in part.starts[~part.begins].unique().tolist():
            chosen = torch.zeros(self.chain.batch, dtype=torch.bool)
            chosen[part.sequences[(part.starts == first) & ~part.begins]] = True
            found.append((first, chosen))
        return found

    def _fill_link(
        self,
        linked: Linked,
        at: tuple[int, int],
        chosen: Tensor,
        wanted: tuple[int, torch.dtype, Tensor],
        carried: bool,
    ) -> None:
        """Factors of one link, at the sequences that go through it at this step."""
        place, first = at
        layer, dtype, sequences = wanted
        link = self.chain.links[place]
        assert link is not None
        here = chosen.to(sequences.device).index_select(0, sequences)
        cut = self.layout.spread(place, link.cut).index_select(0, sequences) & here

        def picked(factor: Tensor | None) -> Tensor | None:
            if factor is None:
                return None
            every = self.layout.spread(place, factor[layer])
            return every.index_select(0, sequences).to(dtype)

        def put(factors: dict[int, Tensor], t: int, factor: Tensor, others: float) -> None:
            factor = _set_where(factor, ~here, others)
            factors[t] = factor if t not in factors else merged(factors[t], factor, here)

        keep = (~cut).to(dtype).unsqueeze(1).expand(-1, linked.size)
        into = picked(link.into)
        if carried:
            around = picked(link.around)
            if into is not None:
                put(linked.after, first - 1, _set_where(into, cut, 1.0), 1.0)
            if around is not None:
                around = _set_where(around, cut, 0.0)
                put(linked.around, first - 1, around, 0.0)
                for t in range(first - self.chain.sizes[place - 1], first - 1):
                    put(linked.after, t, 1.0 - around, 1.0)
                    put(linked.around, t, around, 0.0)
        elif into is not None:
            put(linked.before, first, _set_where(into, cut, 0.0), 1.0)
            return
        if bool(cut.any()):
            put(linked.before, first, keep, 1.0)


def _nothing(group: Group, layer: int) -> tuple[Tensor, Scan]:
    """The scan of a group that no backward reached."""
    replay = group.replay
    steps = replay.steps(layer, 0)
    direct = torch.zeros_like(steps.states["h"])
    with torch.no_grad():
        return direct, steps.scan(direct, {}, replay.kernel_lengths - 1)


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


def any_true(masks: list[Tensor]) -> bool:
    """Whether any entry of some masks is true, asked at once."""
    return bool(masks) and bool(torch.cat(masks).any())


def _set_where(factor: Tensor, cut: Tensor, value: float) -> Tensor:
    """The factor with `value` times the identity for the sequences that are cut."""
    other = torch.full_like(factor, value)
    if factor.dim() == 3:
        other = value * torch.eye(factor.shape[2], dtype=factor.dtype).expand_as(factor)
    return torch.where(cut.view(-1, *[1] * (factor.dim() - 1)), other, factor)


def merged(one: Tensor, other: Tensor, here: Tensor) -> Tensor:
    """Two factors as one: the other where `here` (B,) is true."""
    if one.dim() != other.dim():
        one, other = (f if f.dim() == 3 else torch.diag_embed(f) for f in (one, other))
    return torch.where(here.view(-1, *[1] * (one.dim() - 1)), other, one)
