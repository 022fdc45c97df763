"""What reaches the states that a loop's calls returned from outside the loop, step by step.

Letters: T steps of all calls, B sequences, P the width of h, H of c, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.hooks.heard_gradients import difference
from gradflow.hooks.loops.groups import Group
from gradflow.hooks.loops.loop import Loop

Arrivals = list[dict[str, Tensor]]  # per layer: state name -> (T, B, width)


def arrivals(loop: Loop) -> Arrivals | None:
    """Gradients that arrive at every layer's states, processing order.

    None without a gradient, where the way back between two calls is not known, and where a gradient
    comes to steps of padding that the loop does not go on through.
    """
    layers = loop.chain.calls[0].layers
    links = loop.chain.links[1:]
    unknown = any(link is None or link.unknown or link.around is not None for link in links)
    if unknown or loop.chain.unread or read_beyond(loop):
        return None
    if any(loop.scans(layer) is None for layer in range(layers)):
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
        output, ends = group.scans.arrived()
        directions = 1 + call.bidirectional
        top = call.layers - 1
        last = replay.kernel_lengths - 1
        sequences = torch.arange(len(last), device=last.device)
        found: Arrivals = []
        for number in range(top if call.bidirectional else 0, call.layers):
            known, place = replay.layers[number][direction], number * directions + direction
            h = known.turned(output.chunk(directions, dim=2)[direction])
            h = h.clone() if number == top else torch.zeros_like(known.h, dtype=h.dtype)
            h[last, sequences] += ends["h"][place]
            here, scan = {"h": h}, total[number][direction][1]
            steps = replay.steps(number, direction)
            through = steps.through_h(scan.grads["h"]) if call.totals else {}
            for name, end in ends.items():
                if name == "h":
                    continue
                here[name] = torch.zeros_like(scan.grads[name])
                if name in through:  # T = 1: the total less what came through h
                    here[name] += scan.grads[name] - through[name]
                else:
                    here[name][last, sequences] = end[place]
            found.append(here)
        return found


def reached(found: Arrivals) -> Tensor:
    """(T, B) whether anything arrives."""
    some = [(part != 0).any(2) for layer in found for part in layer.values()]
    return torch.stack(some).any(0)


def read_beyond(loop: Loop) -> bool:
    """Whether a gradient comes to a call after the step at which one of its sequences ends there."""
    if loop.layout.even:
        return False
    for call, part in zip(loop.chain.calls, loop.layout.parts, strict=True):
        if call.batch_sizes is not None:
            continue
        short = part.lengths < part.extent
        for name, grad in call.grads.items():
            late = torch.arange(part.extent).unsqueeze(1) >= part.lengths
            late = late.T if call.batch_first else late
            late = late if name == "output" else short.expand(len(grad), -1)  # of the last states
            if bool((grad[late.to(grad.device)] != 0).any()):
                return True
    return False


def _of_loop(loop: Loop, layers: int) -> Arrivals:
    parts = [group.scans.arrived() for group in loop.groups]
    output = loop.in_time([output for output, _ in parts]).clone()
    ends = {name: loop.per_call([every[name] for _, every in parts]) for name in parts[0][1]}
    through = _through_h(loop) if loop.chain.calls[0].totals else {}
    columns = loop.chain.calls[0].columns()
    found: Arrivals = []
    for layer in range(layers):
        came = loop.from_next(layer)
        here = {"h": output if layer == layers - 1 else torch.zeros_like(output)}
        for place, part in enumerate(loop.layout.parts):
            at = part.ends.to(output.device), part.sequences.to(output.device)
            for name, each in ends.items():
                total = each[place][layer]
                if name not in here:
                    here[name] = total.new_zeros(*output.shape[:2], total.shape[1])
                total = total + here["h"][at] if name == "h" else total
                size = total.abs()
                if name in through:
                    more = through[name][place][layer]
                    total, size = total - more, size + more.abs()
                here[name][at] = _rest(total, size, came[place], columns[name])
        found.append(here)
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


def _through_h(loop: Loop) -> dict[str, list[Tensor]]:
    scans = loop.scans(0)
    assert scans is not None
    arrays = [
        group.replay.steps(0, 0).through_h(scan.grads["h"])
        for group, (_, scan) in zip(loop.groups, scans, strict=True)
    ]
    return {name: loop.per_call([array[name] for array in arrays]) for name in arrays[0]}
