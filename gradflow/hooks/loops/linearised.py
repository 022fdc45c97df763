"""The linearised steps of a loop's calls: group by group, or all in the loop's own time.

Letters: K calls of a group, t steps each, T steps and B sequences of the loop, P the width of h.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.cells import CELLS, Steps
from gradflow.hooks.loops.groups import Group
from gradflow.hooks.loops.layout import Layout
from gradflow.hooks.replay import masked


@dataclass(frozen=True)
class Timed:
    """All steps of the calls that share their weights, in the loop's time; zero at other steps."""

    steps: Steps  # (T, B, ·)
    mine: Tensor  # (T, B) true at the steps of these calls
    x: Tensor  # (T, B, I)
    before: Tensor  # (T, B, P) the h that each step started from
    group: Group  # one of those that are in it


def linearised(
    group: Group, place: tuple[int, int], dtype: torch.dtype, sequences: Tensor
) -> tuple[Steps, Tensor, Tensor]:
    """The steps of a group's calls one after the other, the x they read, the h they started from.

    place is a layer and a direction; arrays are (K·t, B, ·) in processing order.
    """

    def flat(array: Tensor) -> Tensor:
        return torch.cat(group.each(array)).index_select(1, sequences).to(dtype)

    known = group.replay.layers[place[0]][place[1]]
    x, weights = flat(known.x), known.weights.to(dtype)
    before = {name: flat(_before(group, place, name)) for name in known.initial}
    steps = CELLS[group.call.cell].linearise(weights, x, flat(known.h), before)
    return steps, x, before["h"]


def timed(
    groups: list[Group],
    layout: Layout,
    place: tuple[int, int],
    dtype: torch.dtype,
    sequences: Tensor,
) -> list[Timed]:
    """The same of a loop whose calls hold other sequences, or are packed, in its own time."""
    alike: dict[tuple[int, ...], list[Group]] = {}
    for group in groups:
        alike.setdefault(tuple(map(id, group.call.weights)), []).append(group)
    return [_timed(those, layout, place, dtype, sequences) for those in alike.values()]


def _timed(
    groups: list[Group],
    layout: Layout,
    place: tuple[int, int],
    dtype: torch.dtype,
    sequences: Tensor,
) -> Timed:
    layer, direction = place

    def placed(array_of: Callable[[Group], Tensor]) -> Tensor:
        arrays: dict[int, Tensor] = {}
        for group in groups:
            arrays |= group.by_member(array_of(group))
        return layout.placed(arrays).index_select(1, sequences).to(dtype)

    members = [member for group in groups for member in group.members]
    mine = layout.mask(members).to(sequences.device).index_select(1, sequences)
    known = groups[0].replay.layers[layer][direction]
    x = placed(lambda group: group.replay.layers[layer][direction].x)
    h = placed(lambda group: group.replay.layers[layer][direction].h)
    before = {
        name: placed(functools.partial(_before, place=place, state=name)) for name in known.initial
    }
    steps = CELLS[groups[0].call.cell].linearise(known.weights.to(dtype), x, h, before)
    steps = steps.each_step(lambda array: masked(array, mine, 0.0))
    return Timed(steps, mine, x, before["h"], groups[0])


def _before(group: Group, place: tuple[int, int], state: str) -> Tensor:
    """What every step started from, (t, K·b, ·)."""
    known = group.replay.layers[place[0]][place[1]]
    values = known.h if state == "h" else group.replay.steps(*place).states[state]
    return torch.cat([known.initial[state].unsqueeze(0).to(values.dtype), values[:-1]])
