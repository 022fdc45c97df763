"""Weights that are no trained parameters: frozen, plain tensors of modules, computed from parameters.

And those that stand in for them: while a forward of FSDP2 runs, whole weights in place of the parts.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.distributed import is_shared_out
from gradflow.hooks.ancestry import fsdp_class
from gradflow.hooks.graph import saved_by
from gradflow.hooks.guard import Hook, Point, has_no_numbers
from gradflow.hooks.unrolled.chains import (
    PRODUCTS,
    SAME,
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


def when_whole(
    modules: Mapping[str, nn.Module],
    failed: Callable[[str], object],
    note: Callable[[str, nn.Parameter], object],
) -> list[RemovableHandle]:
    """Tell of the whole weights that FSDP2 uses instead of a module's parameters, at each forward.

    modules are by path; failed is told why, where they cannot be looked at; note of each, with the name of
    the parameter that it stands in for.
    """

    def put_together(path: str, module: nn.Module, args: object) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not is_shared_out(parameter):
                note(f"{path}.{name}" if path else name, parameter)

    kind = fsdp_class() or ()
    return [
        module.register_forward_pre_hook(
            Hook(Point.ENTERED, failed, functools.partial(put_together, path))
        )
        for path, module in modules.items()
        if isinstance(module, kind)
    ]


def given_back(graph: Unrolled, first: int, last: int) -> bool:
    """Whether weights without any memory are used by a node of these numbers: FSDP2 took it back."""
    empty = {
        place
        for place, node in enumerate(graph.nodes)
        if graph.is_leaf(place) and _has_no_memory(getattr(node, "variable", None))
    }
    for place, inputs in enumerate(graph.inputs if empty else ()):
        if any(child in empty for child, _ in inputs):
            if first <= graph.numbers[place] <= last:
                return True
            if graph.kind(place) in SAME:
                empty.add(place)
    return False


def _has_no_memory(tensor: Tensor | None) -> bool:
    if tensor is None or not tensor.numel() or has_no_numbers(tensor):
        return False
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() == 0


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
