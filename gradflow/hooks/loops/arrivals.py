"""What reaches the states that a loop's calls returned from outside the loop, step by step.

Letters: T steps of all calls, B sequences, P the width of h, H of c, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.hooks.loops.loop import Loop, difference
from gradflow.hooks.loops.steps import Group

Arrivals = list[tuple[Tensor, Tensor | None]]  # per layer: at h (T, B, P), at c (T, B, H) if any


def arrivals(loop: Loop) -> Arrivals | None:
    """Gradients that arrive at every layer's states, processing order.

    None without a gradient, and where the way back between two calls is not known.
    """
    layers = loop.chain.calls[0].layers
    links = loop.chain.links[1:]
    unknown = any(link is None or link.unknown or link.around is not None for link in links)
    if unknown or any(loop.scans(layer) is None for layer in range(layers)):
        return None
    with torch.no_grad():
        return _of_loop(loop, layers)


def arrivals_at_top(group: Group, direction: int) -> Arrivals | None:
    """The same for one call and one direction; of a bidirectional stack the top layer alone.

    The layers below it get from both directions what the top one passes down, so nothing of theirs
    arrives in their own processing order.
    """
    call, replay = group.call, group.replay
    total = group.scans.scanned("total")
    if total is None:
        return None
    with torch.no_grad():
        output, h_n, c_n = group.scans.arrived()
        directions = 1 + call.bidirectional
        top = call.layers - 1
        last = replay.kernel_lengths - 1
        sequences = torch.arange(len(last), device=last.device)
        found: Arrivals = []
        for number in range(top if call.bidirectional else 0, call.layers):
            known, place = replay.layers[number][direction], number * directions + direction
            h = known.turned(output.chunk(directions, dim=2)[direction])
            h = h.clone() if number == top else torch.zeros_like(known.h, dtype=h.dtype)
            h[last, sequences] += h_n[place]
            c = None
            if c_n is not None:
                scan, steps = total[number][direction][1], replay.steps(number, direction)
                c = torch.zeros_like(scan.grads["c"])
                if call.c_is_total:  # T = 1: the total less what came through h
                    c += scan.grads["c"] - steps.through_h(scan.grads["h"])["c"]
                else:
                    c[last, sequences] = c_n[place]
            found.append((h, c))
        return found


def reached(found: Arrivals) -> Tensor:
    """(T, B) whether anything arrives."""
    arrives = torch.zeros(found[0][0].shape[:2], dtype=torch.bool, device=found[0][0].device)
    for part in (part for pair in found for part in pair if part is not None):
        arrives |= (part != 0).any(2)
    return arrives


def _of_loop(loop: Loop, layers: int) -> Arrivals:
    parts = [group.scans.arrived() for group in loop.groups]
    output = loop.in_time([output for output, _, _ in parts]).clone()
    states_h = loop.per_call([h_n for _, h_n, _ in parts])
    arrived_c = [c_n for _, _, c_n in parts if c_n is not None]
    states_c = loop.per_call(arrived_c) if arrived_c else []
    through = _through_h(loop) if loop.chain.calls[0].c_is_total else None
    found: Arrivals = []
    for layer in range(layers):
        came = loop.from_next(layer)
        at_h = output if layer == layers - 1 else torch.zeros_like(output)
        at_c = None
        for place, part in enumerate(loop.layout.parts):
            end = part.ends.to(output.device), part.sequences.to(output.device)
            width = at_h.shape[2]
            h = states_h[place][layer] + at_h[end]
            at_h[end] = _rest(h, h.abs(), came[place], slice(0, width))
            if not states_c:
                continue
            c, size = states_c[place][layer], states_c[place][layer].abs()
            if at_c is None:
                at_c = c.new_zeros(*output.shape[:2], c.shape[1])
            if through is not None:
                c, size = c - through[place][layer], size + through[place][layer].abs()
            at_c[end] = _rest(c, size, came[place], slice(width, None))
        found.append((at_h, at_c))
    return found


def _rest(
    total: Tensor, size: Tensor, came: tuple[Tensor, Tensor, Tensor] | None, block: slice
) -> Tensor:
    """What did not come from a next call; see `Loop.from_next`."""
    nothing = torch.zeros_like(total)
    if came is None:
        return difference(total, nothing, size)
    value, bound, _ = came
    return difference(total, value[:, block], size + bound[:, block])


def _through_h(loop: Loop) -> list[Tensor]:
    scans = loop.scans(0)
    assert scans is not None
    arrays = []
    for group, (_, scan) in zip(loop.groups, scans, strict=True):
        steps = group.replay.steps(0, 0)
        arrays.append(steps.through_h(scan.grads["h"])["c"])
    return loop.per_call(arrays)
