"""Which of the tensors that a module returned may be states, and how they lie as (B, width)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradflow.hooks.axes import Axis, as_rows
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import edge_of
from gradflow.hooks.own.comeback import Output
from gradflow.hooks.own.nested import Path
from gradflow.limits import STATE_ENTRIES


def possible_states(
    returned: dict[Path, Tensor], given: Iterable[Tensor], unchanged: set[int], *, open_end: bool
) -> dict[Path, Tensor]:
    """What may be a state: each tensor once, arguments that were returned as they are left out.

    given are the arguments, unchanged the ids of those that the call did not change; with open_end an
    argument was left out, and a state may have any shape.
    """
    arguments = list(given)
    edges = {edge for tensor in arguments if (edge := edge_of(tensor)) is not None}
    shapes = [tensor.shape for tensor in arguments]
    found: dict[Path, Tensor] = {}
    known: set[object] = set()
    for path, tensor in returned.items():
        edge = edge_of(tensor)
        handed_through = edge in edges if edge is not None else id(tensor) in unchanged
        key = edge if edge is not None else id(tensor)
        flat = tensor.dim() <= 2 or (tensor.dim() == 3 and tensor.shape[0] == 1)
        fits = flat or tensor.shape in shapes or open_end
        if fits and not handed_through and key not in known and _can_be_marked(tensor):
            known.add(key)
            found[path] = tensor
    return found


def _can_be_marked(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout == torch.strided
        and 0 < tensor.numel() <= STATE_ENTRIES
        and tensor.dim() > 0
    )


def likely_states(outputs: dict[Path, Output], given: Iterable[Tensor]) -> Place:
    """The place of the outputs that have the shape of some argument, by their paths as text."""
    shapes = [tensor.shape for tensor in given]
    found = {path: out for path, out in outputs.items() if out.shape in shapes} or outputs
    batch = len(next(iter(found.values())).row)
    likely = {key_of(path): out for path, out in found.items() if len(out.row) == batch}
    return Place.at(
        {key: out.edge for key, out in likely.items() if out.edge is not None},
        {key: out.shape for key, out in likely.items()},
        {key: out.row for key, out in likely.items()},
        {key: out.axis for key, out in likely.items()},
    )


def row_of(tensor: Tensor, axis: Axis) -> Tensor:
    """A copy (B, width) of a state whose batch is that axis."""
    return as_rows(tensor.detach(), axis).clone(memory_format=torch.contiguous_format)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, where torch tells."""
    return None if tensor.is_inference() else tensor._version


def key_of(path: Path) -> str:
    """A path as text."""
    return repr(path)
