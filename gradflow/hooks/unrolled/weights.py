"""Weights that are no trained parameters: frozen, plain tensors of modules, computed from parameters."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from gradflow.hooks.graph import saved_by
from gradflow.hooks.guard import has_no_numbers
from gradflow.hooks.unrolled.chains import (
    PRODUCTS,
    Uses,
    WeightChain,
    chains_of,
    is_tree,
    is_without_other_products,
    not_within,
)
from gradflow.hooks.unrolled.whole_graph import Unrolled
from gradflow.limits import LINK_NODES, RECURRENCE_USES

HANDED_ON = frozenset(("T", "Transpose", "Permute", "Expand", "View", "ReshapeAlias", "Unsqueeze"))


def in_attributes(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Tensors that modules hold in plain attributes, or in lists and dicts of them: id -> name."""
    return {
        id(tensor): f"{path}.{name}" if path else name
        for path, module in modules.items()
        for name, value in vars(module).items()
        if not name.startswith("_")
        for tensor in _tensors(value)
    }


def _tensors(value: object) -> Iterator[Tensor]:
    inside: Iterable[object] = ()
    if isinstance(value, list | tuple):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    for one in (value, *inside):
        if isinstance(one, Tensor):
            yield one


def frozen(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Matrices of a model that need no gradient, frozen or buffers: where they lie -> name."""
    found: dict[int, str] = {}
    for path, module in modules.items():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            plain = tensor.layout == torch.strided and not tensor.requires_grad
            if plain and tensor.dim() > 1 and not has_no_numbers(tensor):
                found[tensor.data_ptr()] = f"{path}.{name}" if path else name
    return found


def frozen_chains(
    graph: Unrolled, names: Mapping[int, str], states: Collection[int]
) -> list[tuple[str, WeightChain]]:
    """Chains of matrices that need no gradient; the graph holds no nodes of them, but their values."""
    uses: dict[int, Uses] = {}
    for place in range(len(graph) if names else 0):
        if graph.constants[place] and graph.kind(place) in PRODUCTS:
            for tensor in saved_by(graph.nodes[place]):
                if not tensor.requires_grad and tensor.data_ptr() in names:
                    one = uses.setdefault(tensor.data_ptr(), Uses(-1 - len(uses)))
                    one.nodes.append(place)
                    one.products += 1
    return [
        (names[key], replace(line, frozen=True))
        for key, one in uses.items()
        if one.products >= RECURRENCE_USES
        for line in not_within(graph, chains_of(graph, one, states))
        if line.length >= RECURRENCE_USES
    ]


def computed_chains(
    graph: Unrolled, known: list[WeightChain], weights: Collection[int], states: Collection[int]
) -> list[WeightChain]:
    """Chains of tensors that were computed from weights, by a hypernetwork for one.

    Only of those that enter matrix products, with no product between that does not repeat: what a
    stack of layers is given again and again (an adjacency, a memory) is no recurrence of the stack.
    """
    counts = Counter(chain.from_iterable(graph.inputs))
    used = {place for line in known for place in line.depth}
    few = [e for e, n in counts.items() if n >= RECURRENCE_USES and not graph.is_leaf(e[0])]
    few = [(p, output) for p, output in few if p not in states and p not in used]
    alias: dict[tuple[int, int], int] = {edge: n for n, edge in enumerate(few)}
    uses = [Uses(place) for place, _ in few]
    for place, inputs in enumerate(graph.inputs) if few else ():
        for edge in inputs:
            number = alias.get(edge)
            if number is None:
                continue
            kind = graph.kind(place)
            if kind in HANDED_ON and len(inputs) == 1:
                alias.setdefault((place, 0), number)
            elif kind in PRODUCTS:
                uses[number].nodes.append(place)
                uses[number].products += 1
    found: list[WeightChain] = []
    repeated = {place for line in known if line.uses.product for place in line.depth}
    for one in uses:
        if one.products < RECURRENCE_USES or one.weight in weights:
            continue
        lines = chains_of(graph, one, states)
        long = [line for line in lines if line.length >= RECURRENCE_USES]
        own = repeated.union(*(line.depth for line in long))
        for line in long:
            line.tree = is_tree(graph, lines)
            if is_without_other_products(graph, line, own):
                found.append(line)
    return found


def origin(graph: Unrolled, place: int, weights: Mapping[int, str]) -> list[str]:
    """The names of the parameters that a tensor was computed from, nearest first."""
    queue, seen, found = deque([place]), {place}, list[str]()
    while queue and len(seen) < LINK_NODES:
        one = queue.popleft()
        if one in weights:
            found.append(weights[one])
        new = [child for child, _ in graph.inputs[one] if child not in seen]
        seen.update(new)
        queue += new
    return list(dict.fromkeys(found))
