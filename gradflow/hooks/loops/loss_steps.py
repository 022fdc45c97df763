"""Gradients of single loss steps, pulled back through the layers of a loop, many at once.

A row is one loss step of one sequence on its way back. It stands at a place, one step of one
sequence, and has a gradient there in every layer; all rows take one step back together. Rows that
started at different loss steps but stand equally far from them are one lag.

Letters: T steps, B sequences, N = T·B places, R rows, P the width of h, S of (h, c), G·H of δ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradflow.cells import Scan, Steps
from gradflow.hooks.loops.arrivals import Arrivals
from gradflow.hooks.loops.groups import Group
from gradflow.hooks.loops.linearised import linearised, timed
from gradflow.hooks.loops.linked import pulled
from gradflow.hooks.loops.loop import Loop, merged
from gradflow.recording import moved, where_computed


@dataclass(frozen=True)
class Sheet:
    """One layer, all steps of all sequences side by side as places; place = step · B + sequence."""

    parts: list[Steps]  # of every group of calls, (1, its places, ·)
    part: Tensor  # (N,) the group a place is in
    index: Tensor  # (N,) and where it is there
    x: Tensor  # (N, I)
    before: Tensor  # (N, P) the h that the step started from
    arrived: Tensor  # (N, S) from outside the loop
    weight_ih: list[Tensor]  # of every group
    factor: Tensor | None  # (N, I) the dropout that x came through
    cut: Tensor | None  # (N,) where nothing goes on to the step before
    into: Tensor | None  # (N, S) or (N, S, S) what the state was multiplied by on its way here

    def back(self, places: Tensor, state: Tensor) -> tuple[Scan, Tensor]:
        """Gradients and δ of the rows (1, R, ·), and what they hand to the state before, (R, S)."""
        if len(self.parts) == 1:
            scan, handed = _through(self.parts[0], self.index[places], state)
        else:
            scan, handed = self._in_parts(places, state)
        if self.into is not None:
            handed = pulled(self.into[places], handed.unsqueeze(1)).squeeze(1)
        if self.cut is not None:
            handed = handed.masked_fill(self.cut[places].unsqueeze(1), 0.0)
        return scan, handed

    def _in_parts(self, places: Tensor, state: Tensor) -> tuple[Scan, Tensor]:
        found, rows = [], []
        for number, steps in enumerate(self.parts):
            mine = (self.part[places] == number).nonzero().squeeze(1)
            rows.append(mine)
            found.append(_through(steps, self.index[places[mine]], state[mine]))
        order = torch.cat(rows).argsort()

        def joined(arrays: list[Tensor]) -> Tensor:
            return torch.cat(arrays, dim=-2).index_select(-2, order)

        scans = [scan for scan, _ in found]
        scan = Scan(
            {n: joined([scan.grads[n] for scan in scans]) for n in scans[0].grads},
            joined([scan.delta for scan in scans]),
            joined([scan.delta_hh for scan in scans]),
        )
        return scan, joined([handed for _, handed in found])

    def below(self, places: Tensor, scan: Scan) -> Tensor:
        """What the rows pass to h of the layer below at the same step, (R, P)."""
        delta = scan.delta[0]
        if len(self.parts) == 1:
            flow = delta @ self.weight_ih[0]
        else:
            flow = delta.new_empty(len(delta), self.x.shape[1])
            for number, weight in enumerate(self.weight_ih):
                mine = self.part[places] == number
                flow[mine] = delta[mine] @ weight
        return flow if self.factor is None else flow * taken(self.factor, places)


def sheets(
    loop: Loop, place: tuple[int, int], found: Arrivals, dtype: torch.dtype, sequences: Tensor
) -> list[Sheet]:
    """The layers from the top of the stack down to a place (layer, direction)."""
    wanted, direction = place
    count = loop.chain.calls[0].layers
    return [
        _sheet(loop, (layer, direction), found[layer - count], dtype, sequences)
        for layer in reversed(range(wanted, count))
    ]


def _sheet(
    loop: Loop,
    place: tuple[int, int],
    arrived: dict[str, Tensor],
    dtype: torch.dtype,
    sequences: Tensor,
) -> Sheet:
    layer, direction = place
    sources = _of_groups if loop.layout.even else _of_times
    parts, groups, part, index, x, before = sources(loop, place, dtype, sequences)
    factor = None
    if layer and any(known.call.rng is not None for known in loop.groups):
        drawn = [_dropout(group, layer, dtype) for group in loop.groups]
        factor = loop.in_time(drawn).index_select(1, sequences).flatten(0, 1)
    cut, into = _links(loop, layer, dtype, sequences) if len(loop.chain.calls) > 1 else (None, None)
    return Sheet(
        parts=parts,
        part=part.flatten(),
        index=index.flatten(),
        x=x,
        before=before,
        arrived=torch.cat([a[:, sequences] for a in arrived.values()], dim=2)
        .to(dtype)
        .flatten(0, 1),
        weight_ih=[g.replay.weights(layer, direction).weight_ih.to(dtype) for g in groups],
        factor=factor,
        cut=cut,
        into=into,
    )


Sources = tuple[list[Steps], list[Group], Tensor, Tensor, Tensor, Tensor]


def _of_groups(
    loop: Loop, place: tuple[int, int], dtype: torch.dtype, sequences: Tensor
) -> Sources:
    """The steps of every group, one group of each, where a place (T, B) is in them, its x and h."""
    batch, device = len(sequences), sequences.device
    each = torch.arange(batch, device=device)
    part = torch.zeros(loop.layout.steps, batch, dtype=torch.long, device=device)
    index, x, before, parts = torch.zeros_like(part), [], [], []
    for number, group in enumerate(loop.groups):
        made, made_x, made_before = linearised(group, place, dtype, sequences)
        size = group.replay.mask.shape[0]
        for position, member in enumerate(group.members):
            start = int(loop.layout.parts[member].starts[0])
            at = slice(start, start + size)
            clock = position * size + torch.arange(size, device=device)
            part[at], index[at] = number, clock.unsqueeze(1) * batch + each
        parts.append(_flat(made))
        x.append(list(made_x.split(size)))
        before.append(list(made_before.split(size)))
    return parts, loop.groups, part, index, _ordered(loop, x), _ordered(loop, before)


def _of_times(loop: Loop, place: tuple[int, int], dtype: torch.dtype, sequences: Tensor) -> Sources:
    """The same of a loop whose calls hold other sequences, or are packed."""
    found = timed(loop.groups, loop.layout, place, dtype, sequences)
    shape = found[0].mine.shape
    part = torch.zeros(shape, dtype=torch.long, device=sequences.device)
    x, before = torch.zeros_like(found[0].x), torch.zeros_like(found[0].before)
    for number, known in enumerate(found):
        part[known.mine] = number
        x, before = x + known.x, before + known.before
    index = torch.arange(part.numel(), device=part.device).view(shape)
    parts, groups = [_flat(known.steps) for known in found], [known.group for known in found]
    return parts, groups, part, index, x.flatten(0, 1), before.flatten(0, 1)


def _dropout(group: Group, layer: int, dtype: torch.dtype) -> Tensor:
    """What x of a layer above the lowest was multiplied by, (T, B, I)."""
    drawn, x = group.replay.dropout_factor(layer - 1).to(dtype), group.replay.layers[layer][0].x
    return drawn if drawn.dim() else drawn.expand_as(x)


def _flat(steps: Steps) -> Steps:
    """(T, B, ·) as (1, T·B, ·), without what a scan does not need."""
    bare = replace(steps, gates={}, states={"h": steps.states["h"]})
    return bare.each_step(lambda array: array.flatten(0, 1).unsqueeze(0))


def _ordered(loop: Loop, arrays: list[list[Tensor]]) -> Tensor:
    """(N, ·) in time from (t, B, ·) per group and member."""
    found: dict[int, Tensor] = {}
    for group, each in zip(loop.groups, arrays, strict=True):
        found |= zip(group.members, each, strict=True)
    return torch.cat([found[member] for member in range(len(found))]).flatten(0, 1)


def _links(
    loop: Loop, layer: int, dtype: torch.dtype, sequences: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Where nothing goes back from the first step of a call to the one before, and factors there."""
    batch, steps = len(sequences), loop.layout.steps
    cut = torch.zeros(steps, batch, dtype=torch.bool, device=sequences.device)
    factors: dict[int, Tensor] = {}
    for place, link in enumerate(loop.chain.links):
        for first, chosen in loop.started(place):
            assert link is not None
            here = chosen.to(sequences.device)[sequences]
            cut[first] |= loop.layout.spread(place, link.cut)[sequences] & here
            if link.into is not None:
                every = loop.layout.spread(place, link.into[layer])
                factor = every.index_select(0, sequences).to(dtype)
                one = (
                    torch.ones_like(factor[:, 0]) if factor.dim() == 3 else torch.ones_like(factor)
                )
                factors[first] = merged(factors.get(first, one), factor, here)
    if not factors:
        return cut.flatten(), None
    size = next(iter(factors.values())).shape[1]
    if any(factor.dim() == 3 for factor in factors.values()):
        factors = {t: f if f.dim() == 3 else torch.diag_embed(f) for t, f in factors.items()}
        into = torch.eye(size, dtype=dtype, device=cut.device).repeat(steps, batch, 1, 1)
    else:
        into = torch.ones(steps, batch, size, dtype=dtype, device=cut.device)
    for first, factor in factors.items():
        into[first] = factor
    return cut.flatten(), into.flatten(0, 1)


def placed(stack: list[Sheet]) -> list[Sheet]:
    """The layers where their single steps are computed: narrow ones on the CPU."""
    return moved(stack, where_computed(stack[0].arrived.shape[1], stack[0].arrived.device))


def taken(array: Tensor, places: Tensor) -> Tensor:
    """Rows of an array at ascending places, without a copy where they are consecutive."""
    if len(places) and int(places[-1] - places[0]) + 1 == len(places):
        return array[int(places[0]) : int(places[-1]) + 1]
    return array.index_select(0, places)


def _through(steps: Steps, index: Tensor, state: Tensor) -> tuple[Scan, Tensor]:
    rows = steps.each_step(lambda array: taken(array[0], index).unsqueeze(0))
    width = rows.states["h"].shape[2]
    final = dict(
        zip(rows.others, state[:, width:].chunk(max(1, len(rows.others)), 1), strict=False)
    )
    zero = torch.zeros(len(state), dtype=torch.long, device=state.device)
    scan = rows.scan(state[:, :width].unsqueeze(0), final, zero)
    before = rows.before(scan, 0)
    return scan, torch.cat([before[name] for name in ("h", *rows.others)], dim=1)


def _back(
    stack: list[Sheet], places: Tensor, states: list[Tensor]
) -> tuple[list[Scan], list[Tensor]]:
    """One step back of all rows in all layers, from the top down."""
    scans: list[Scan] = []
    handed = []
    for number, (sheet, state) in enumerate(zip(stack, states, strict=True)):
        if number:
            flow = stack[number - 1].below(places, scans[-1])
            width = flow.shape[1]
            state = torch.cat([state[:, :width] + flow, state[:, width:]], dim=1)
        scan, before = sheet.back(places, state)
        scans.append(scan)
        handed.append(before)
    return scans, handed


def by_lag(stack: list[Sheet], batch: int) -> Iterator[tuple[Tensor, Scan]]:
    """Every loss step of every sequence, one step further back at a time.

    Yields the places of the rows at lag 0, 1, 2, … and their gradients in the lowest of the layers,
    until nothing is left.
    """
    arrives = torch.stack([(sheet.arrived != 0).any(1) for sheet in stack]).any(0)
    places = arrives.nonzero().squeeze(1)
    states = [sheet.arrived[places] for sheet in stack]
    while len(places):
        scans, states = _back(stack, places, states)
        yield places, scans[-1]
        places = places - batch
        alive = torch.stack([(state != 0).any(1) for state in states]).any(0) & (places >= 0)
        places, states = places[alive], [state[alive] for state in states]


def by_time(
    stack: list[Sheet], batch: int, loss_steps: Tensor | None = None
) -> Iterator[tuple[Tensor, list[Scan]]]:
    """All sequences from the last step to the first, places and gradients (1, R, ·) in every layer.

    A row starts at its own loss step, those of one sequence are in the column of loss_steps (n, B)
    and R = n · B; without them R = B and a row takes up all that arrives.
    """
    rows = batch if loss_steps is None else loss_steps.numel()
    sequences = torch.arange(rows, device=stack[0].part.device) % batch
    states = [sheet.arrived.new_zeros(rows, sheet.arrived.shape[1]) for sheet in stack]
    for t in reversed(range(len(stack[0].part) // batch)):
        places = t * batch + sequences
        for number, sheet in enumerate(stack):
            arrived = sheet.arrived[places]
            if loss_steps is not None:
                elsewhere = (loss_steps.flatten() != t).unsqueeze(1)
                arrived = arrived.masked_fill(elsewhere, 0.0)
            states[number] = states[number] + arrived
        scans, states = _back(stack, places, states)
        yield places, scans


def gathered(passed: list[Scan]) -> Scan:
    """One scan (T, R, ·) from those of single steps, given from the last to the first."""
    in_order = passed[::-1]
    return Scan(
        {name: torch.cat([scan.grads[name] for scan in in_order]) for name in in_order[0].grads},
        torch.cat([scan.delta for scan in in_order]),
        torch.cat([scan.delta_hh for scan in in_order]),
    )
