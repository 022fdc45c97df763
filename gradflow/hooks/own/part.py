"""Whether what a module returns is the state of a loop, or only a part of what makes it.

A recurrent weight, or the right-hand side f of z + dt f(z), returns r_n, and other terms are added
before it comes back as e_{n+1}: the input's share, what the state keeps. Then the state is the sum, not
r_n. A mask or zoneout that chooses between r_n and e_n, entry by entry, keeps r_n a state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gradflow.hooks.graph import Between, Edge, NotReadable, kind_of
from gradflow.hooks.unrolled.chains import PRODUCTS
from gradflow.limits import SHARES_ALIKE, TERM_OPERATIONS

SUMS = frozenset(("Add", "Sub", "Rsub", "Addcmul", "Lerp", "Where"))


def is_part(entering: Iterable[Edge], ends: set[Any], entered: Iterable[Edge]) -> bool:
    """Whether other terms are added to what was returned before it enters the next call.

    Those that enter sit at `entering`, those that entered the call before at `entered`; it returned `ends`.
    """
    roots, known = list(entering), set(entered)
    between = Between(roots, ends)
    if not between.reached:
        return False
    around = {node for node, _ in known} - ends
    mixed = False
    for node in between.order:
        if node in ends or kind_of(node) not in SUMS:
            continue
        for child, _ in node.next_functions:
            if child is None or child in between.on_path:
                continue
            if around and Between([(child, 0)], around).reached:
                mixed = True
            elif not _is_constant(child):
                return True
    return mixed and not _is_mixture(roots, ends | around)


def _is_constant(node: Any) -> bool:
    """Whether a term is made from weights alone, without a product with anything."""
    stack, seen = [node], 0
    while stack:
        node = stack.pop()
        seen += 1
        if kind_of(node) in PRODUCTS or seen > TERM_OPERATIONS:
            return False
        stack += [child for child, _ in node.next_functions if child is not None]
    return True


def _is_mixture(roots: list[Edge], ends: set[Any]) -> bool:
    """Whether the shares of what was returned and of what went around it add up to one."""
    seeds = []
    for node, output in roots:
        known = node._input_metadata[output]
        one = torch.ones(tuple(known.shape), dtype=known.dtype, device=known.device)
        seeds.append(((node, output), one))
    try:
        found = Between(roots, ends).pull(seeds)
    except NotReadable:
        return True
    grads = [grad.detach() for grad in found.values()]
    if len({grad.shape for grad in grads}) != 1:
        return True
    # of several states of one shape each adds up to one, so all of them to their number
    whole = torch.stack(grads).sum(0)
    return bool(((whole - len(roots)).abs() <= SHARES_ALIKE * len(roots)).all())
