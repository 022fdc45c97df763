"""How a state of any shape lies as (B, width): which of its axes is the batch.

It is the axis that the input shares: (layers, B, H) beside an input (B, I) has B sequences of width
layers·H, (B, heads, d) and (B, C, H, W) have theirs in front, (H,) beside (I,) has one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Axis = int | None  # None: no batch


def usual_axis(shape: torch.Size) -> Axis:
    """The batch axis where no input tells: the first, of (1, B, width) the second."""
    if len(shape) <= 1:
        return None
    return 1 if len(shape) == 3 and shape[0] == 1 else 0


def batch_axes(shape: torch.Size, inputs: Iterable[torch.Size]) -> list[Axis]:
    """The axes of a state that may be the batch, the likeliest first; inputs: shapes of other arguments.

    >>> size = torch.Size
    >>> batch_axes(size([2, 5, 6]), [size([5, 3])]), batch_axes(size([5, 2, 6]), [size([5, 3])])
    ([1], [0])
    >>> batch_axes(size([2, 2, 6]), [size([2, 3])]), batch_axes(size([2, 6]), [size([3])])
    ([0, 1], [None])
    >>> batch_axes(size([2, 5, 6]), [size([2, 5, 3]), size([5, 4])])  # nodes, which have embeddings
    [1, 0]
    """
    known = [given for given in inputs if len(given)]
    known = [given for given in known if given.numel() > 1 or len(given) > 1] or known
    if len(shape) <= 1 or not known:
        return [usual_axis(shape)]
    if len(shape) == 2:
        alone = all(len(given) == 1 for given in known) and shape[0] not in {g[0] for g in known}
        return [None] if alone and shape[0] > 1 else [0]
    usual = usual_axis(shape)
    found: dict[Axis, None] = {}
    for given in sorted(known, key=lambda given: len(given) >= len(shape)):
        if len(given) >= 3 and given[0] == 1 and given[1] == shape[1] > 1:
            return [*(found or [1])]  # one step, time first
        shared: list[Axis] = [axis for axis in range(len(shape) - 1) if shape[axis] == given[0]]
        if not found and usual in shared and shape[0] == 1:
            return [usual]
        found.update(dict.fromkeys(shared))
    return [*(found or [usual])]


def is_stretched(one: torch.Size, shape: torch.Size) -> bool:
    """Whether a tensor of one shape stands for a whole one: empty, or broadcast to it.

    >>> size = torch.Size
    >>> is_stretched(size([1]), size([5, 3])), is_stretched(size([5, 2]), size([5, 3]))
    (True, False)
    """
    fits = all(size in (1, other) for size, other in zip(one[::-1], shape[::-1], strict=False))
    return not one.numel() or (len(one) <= len(shape) and fits)


def as_rows(tensor: Tensor, axis: Axis) -> Tensor:
    """(B, width) of a state whose batch is that axis."""
    if axis is None:
        return tensor.reshape(1, -1)
    if axis:
        tensor = tensor.movedim(axis, 0)
    return tensor.reshape(tensor.shape[0], -1)


def from_rows(rows: Tensor, shape: torch.Size, axis: Axis) -> Tensor:
    """Back from (B, width) to the state's own shape."""
    if not axis:
        return rows.reshape(shape)
    rest = [size for place, size in enumerate(shape) if place != axis]
    return rows.reshape(shape[axis], *rest).movedim(0, axis)


def alike(one: torch.Size, other: torch.Size, axis: Axis) -> bool:
    """Whether two shapes are the same but for the number of sequences."""
    return len(one) == len(other) and all(
        mine == theirs
        for place, (mine, theirs) in enumerate(zip(one, other, strict=True))
        if place != axis
    )
