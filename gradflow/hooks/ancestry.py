"""Ancestry: whose a weight is, and which of a model's parameters it was computed from.

Weight dropout, a norm and a hypernetwork hand plain tensors to the recurrent functions of torch.
Where no module makes the call, only the graph of such a tensor says whose it is.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import takewhile

from torch import Tensor, nn

from gradflow.limits import LINK_NODES


def holder_of(weights: Iterable[Tensor], holders: Mapping[int, str]) -> str | None:
    """The path of the module that holds what the weights were computed from, or None.

    holders gives the path of the module that holds a parameter, by the parameter's id. Of several
    modules it is the innermost that they are all part of.
    """
    paths = {holders[id(p)] for p in parameters_of(weights) if id(p) in holders}
    if not paths:
        return None
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def clean(name: str) -> str:
    """A module path without what DataParallel and torch.compile put in front of it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def fsdp_class() -> type | None:
    """The class of modules that `fully_shard` of FSDP2 shards, where it is loaded."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def class_of(module: nn.Module) -> type:
    """A module's class; where `fully_shard` gave it another one, the one that was written.

    >>> class_of(nn.Tanh()).__name__
    'Tanh'
    """
    kind = type(module)
    return kind.__bases__[-1] if fsdp_class() in kind.__bases__ else kind


def title_of(model: nn.Module) -> str:
    """The name of a model's class; of the model inside where a wrapper of torch's is around it.

    >>> title_of(nn.DataParallel(nn.Tanh()))
    'Tanh'
    """
    while type(model).__module__.startswith("torch.") and [*map(clean, model._modules)] == [""]:
        (model,) = (one for one in model._modules.values() if one is not None)
    return class_of(model).__name__


def parameters_of(weights: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of the weights' graphs, nearest first; at most `NODES` nodes are looked at.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> parameters_of([torch.nn.functional.dropout(w, 0.5)])[0] is w
    True
    """
    queue = deque(weight.grad_fn for weight in weights if weight.grad_fn is not None)
    seen, found = set(queue), []
    while queue and len(seen) < LINK_NODES:
        node = queue.popleft()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)
    return found
