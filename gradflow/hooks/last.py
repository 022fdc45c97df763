"""The gradient of a loop's last loss step alone, pulled back through all calls and their layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.cells import Scan
from gradflow.hooks.loop import Loop, back, difference
from gradflow.hooks.steps import Group

Result = list[list[tuple[Tensor, Scan]]]  # [call][layer]: direct gradient, scan


@dataclass
class _Arrivals:
    """What reaches one call's returned states from outside the loop."""

    output: Tensor  # (T, B, P) of the top layer, 0 at the last step
    h: list[Tensor]  # per layer (B, P), at the last step
    c: list[Tensor]  # per layer (B, H), or empty

    def steps(self) -> Tensor:
        """(T, B) whether anything arrives."""
        arrives = (self.output != 0).any(2)
        for part in self.h + self.c:
            arrives[-1] |= (part != 0).any(1)
        return arrives

    def keep(self, chosen: Tensor) -> None:
        """Keep only what arrives where chosen (T, B) is true."""
        self.output = self.output * chosen.unsqueeze(2)
        last = chosen[-1].unsqueeze(1)
        self.h = [torch.where(last, part, 0.0) for part in self.h]
        self.c = [torch.where(last, part, 0.0) for part in self.c]


def last_step(loop: Loop) -> Result | None:
    """Every sequence's last step at which a gradient arrives from outside the loop, alone.

    None without a gradient, and where the way back between two calls is not known.
    """
    layers = loop.chain.calls[0].layers
    links = loop.chain.links[1:]
    reason = any(link is None or link.unknown or link.around is not None for link in links)
    if reason or any(loop.scans(layer) is None for layer in range(layers)):
        return None
    with torch.no_grad():
        arrivals = _arrivals(loop, layers)
        arrives = torch.cat([arrival.steps() for arrival in arrivals])
        if loop.chain.lengths is not None:
            time = torch.arange(len(arrives), device=arrives.device).unsqueeze(1)
            arrives &= time < loop.chain.lengths.to(arrives.device)
        time = torch.arange(len(arrives), device=arrives.device).unsqueeze(1)
        chosen = time == torch.where(arrives, time, -1).max(0).values
        for arrival, start, size in zip(arrivals, loop.starts, loop.chain.sizes, strict=True):
            arrival.keep(chosen[start : start + size])
        return _pull_back(loop, arrivals, layers)


def _arrivals(loop: Loop, layers: int) -> list[_Arrivals]:
    parts = [group.scans.arrived() for group in loop.groups]
    outputs = loop.per_call([output for output, _, _ in parts])
    states_h = loop.per_call([h_n for _, h_n, _ in parts])
    arrived_c = [c_n for _, _, c_n in parts if c_n is not None]
    states_c = loop.per_call(arrived_c) if arrived_c else []
    through = _through_h(loop) if loop.chain.calls[0].c_is_total else None
    came = [loop.from_next(layer) for layer in range(layers)]
    found = []
    for place, (output, h_n) in enumerate(zip(outputs, states_h, strict=True)):
        h, output = h_n.clone(), output.clone()
        h[-1] += output[-1]
        output[-1] = 0.0
        sizes_h = h.abs()
        c, sizes_c = None, None
        if states_c:
            c, sizes_c = states_c[place].clone(), states_c[place].abs()
            if through is not None:  # the total less what came through h = o ⊙ tanh c
                c -= through[place]
                sizes_c = sizes_c + through[place].abs()
        found.append(_Arrivals(output, [], []))
        for layer in range(layers):
            value, bound = came[layer][place] or (None, None)
            width = h.shape[2]
            found[-1].h.append(_rest(h[layer], sizes_h[layer], value, bound, slice(0, width)))
            if c is not None and sizes_c is not None:
                rest = _rest(c[layer], sizes_c[layer], value, bound, slice(width, None))
                found[-1].c.append(rest)
    return found


def _rest(
    total: Tensor, size: Tensor, value: Tensor | None, bound: Tensor | None, block: slice
) -> Tensor:
    if value is None or bound is None:
        return difference(total, torch.zeros_like(total), size)
    return difference(total, value[:, block], size + bound[:, block])


def _through_h(loop: Loop) -> list[Tensor]:
    scans = loop.scans(0)
    assert scans is not None
    arrays = []
    for group, (_, scan) in zip(loop.groups, scans, strict=True):
        steps = group.replay.steps(0, 0)
        arrays.append(steps.through_h(scan.grads["h"]))  # type: ignore[attr-defined]
    return loop.per_call(arrays)


def _pull_back(loop: Loop, arrivals: list[_Arrivals], layers: int) -> Result:
    where = {
        member: (group, position)
        for group in loop.groups
        for position, member in enumerate(group.members)
    }
    carried: list[Tensor | None] = [None] * layers
    results: Result = []
    for place in reversed(range(len(arrivals))):
        group, position = where[place]
        row, handed = _through_call(group, position, arrivals[place], carried)
        results.append(row)
        link = loop.chain.links[place]
        if link is not None:
            carried = [back(link, layer, value) for layer, value in enumerate(handed)]
    return results[::-1]


def _through_call(
    group: Group, position: int, arrival: _Arrivals, carried: list[Tensor | None]
) -> tuple[list[tuple[Tensor, Scan]], list[Tensor]]:
    """Scan one call's stack from its top down; also give what each layer hands to its start."""
    columns, replay = group.columns(position), group.replay
    flow, row, handed = arrival.output, [], []
    for layer in reversed(range(len(arrival.h))):
        known = replay.steps(layer, 0)
        steps = known.each_step(lambda array: array[:, columns])
        direct = flow.clone()
        direct[-1] += arrival.h[layer]
        seeded, final_c = direct.clone(), arrival.c[layer] if arrival.c else None
        extra = carried[layer]
        if extra is not None:
            width = direct.shape[2]
            seeded[-1] += extra[:, :width]
            final_c = None if final_c is None else final_c + extra[:, width:]
        last = replay.kernel_lengths[columns] - 1
        scan = steps.scan(seeded, final_c, last)
        row.append((direct, scan))
        states = steps.before(scan, 0)
        handed.append(torch.cat([states[name] for name in ("h", "c") if name in states], dim=1))
        if layer:
            weight_ih = replay.weights(layer, 0).weight_ih.to(direct.dtype)
            factor = replay.dropout_factor(layer - 1).to(direct.dtype)
            flow = scan.delta @ weight_ih * (factor[:, columns] if factor.dim() else factor)
    return row[::-1], handed[::-1]
