"""Whether a tensor is a state that is known, where no path of the graph tells: by storage, by its values.

A state that was detached, copied, carried without gradient, put in another order or beside an input is
found here. Letters: B sequences of the earlier states, b of the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def storage(tensor: Tensor) -> int | None:
    """Where its numbers lie; None where they lie in no storage of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None


def share_storage(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are views of the same numbers."""
    if other is None or one.device != other.device or not one.numel():
        return False
    return storage(one) is not None and storage(one) == storage(other)


def is_among(
    tensors: Iterable[Tensor], states: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> bool:
    """Whether one of the tensors is one of the states, whose values (B, width) are in rows."""
    return any(
        (share_storage(tensor, state) and tensor.numel() == state.numel())
        or holds(tensor, rows[name])
        for tensor in tensors
        for name, state in states.items()
    )


def compared(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) each, of rows (B, ·): which are as they were, and which are all zero."""
    return (new == old).all(1), (new == 0).all(1)


def moved_rows(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
    """The origin (b,) of each row (b, ·) among the old ones (B, ·), −1 a new one, and which were made zero.

    None where a row is neither zero nor equal to one that is left, and where all are zero.
    """
    found = equal_rows(new, old)
    if found is None or bool(found[1].all()):
        return None
    rows = _between_neighbours(found[0], len(old))
    return rows, found[1] & (rows >= 0)


_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.tanh, torch.sigmoid, torch.relu)


def holds(found: Tensor, row: Tensor) -> bool:
    """Whether a tensor is a state (B, width), perhaps masked, an activation of it, or it beside others."""
    if found.layout != torch.strided or found.device != row.device or not bool(row.any()):
        return False
    if found.numel() == row.numel():
        same = found.detach().reshape(row.shape).to(row.dtype)
        equal = same == row
        if bool((equal | (same == 0)).all()) and bool((equal & (row != 0)).any()):
            return True
        return any(torch.equal(same, shown(row)) for shown in _ACTIVATIONS)
    width = row.shape[1]
    if found.dim() != 2 or len(found) != len(row) or found.shape[1] < width:
        return False
    starts = found.detach().unfold(1, width, 1)  # (B, places, width)
    return bool((starts == row.unsqueeze(1)).all(2).all(0).any())


def equal_rows(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
    """By values (b, ·) and (B, ·): the origin of every row, and which rows (b,) are all zero.

    Returns None where a row is neither zero nor equal to one that is left.
    """
    if _is_none_of(new, old):
        return None
    zero = (new == 0).all(1)
    places: dict[bytes, list[int]] = {}
    for row, value in enumerate(_as_bytes(old)):
        places.setdefault(value, []).append(row)
    found = []
    for value, is_zero in zip(_as_bytes(new), zero.tolist(), strict=True):
        left = [] if is_zero else places.get(value, [])
        if not left and not is_zero:
            return None
        found.append(-1 if is_zero else left.pop(0))
    return torch.tensor(found, dtype=torch.long, device=new.device), zero


def _between_neighbours(rows: Tensor, batch: int) -> Tensor:
    """Give rows of which only zeros are known the rows left between their neighbours'.

    Only where there are as many as are missing, at the end only if no row has moved; the others are
    −1 still, sequences that are new.
    """
    if not bool((rows < 0).any()) or bool((rows < 0).all()):
        return rows
    found = rows.tolist()
    count, start = len(found), 0
    free = set(range(batch)) - set(found)
    while start < count:
        if found[start] >= 0:
            start += 1
            continue
        end = start
        while end < count and rows[end] < 0:
            end += 1
        low = int(rows[start - 1]) if start else -1
        high = int(rows[end]) if end < count else min(batch, end)
        if high - low - 1 == end - start and all(row in free for row in range(low + 1, high)):
            found[start:end] = range(low + 1, high)
        start = end
    return torch.tensor(found, dtype=torch.long, device=rows.device)


def _is_none_of(new: Tensor, old: Tensor) -> bool:
    """Whether the first entry of some row is not 0 and that of no row of the others: seen at a glance."""
    if not (new.shape[1] and old.shape[1]):
        return False
    known = set(old[:, 0].tolist())
    return any(value and value == value and value not in known for value in new[:, 0].tolist())


def _as_bytes(rows: Tensor) -> list[bytes]:
    held = rows.detach().cpu().clone(memory_format=torch.contiguous_format)
    return [row.view(torch.uint8).numpy().tobytes() for row in held]
