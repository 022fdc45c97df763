"""Which sequence of an earlier call each sequence of a later one goes on with.

A batch may shrink, grow or be reordered between two calls: h[:n], h[kept], index_select by length.
Letters: B sequences of the earlier call, b of the later one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradflow.limits import ROW_ROUNDING

MIXED = "sequences or layers are mixed between two of its calls"


def bits(count: int, device: torch.device) -> list[Tensor]:
    """(b,) bool each: the binary digits of 0 … b − 1."""
    numbers = torch.arange(count, device=device)
    return [(numbers >> k) % 2 == 1 for k in range(max(count - 1, 0).bit_length())]


def origins(pull: Callable[[Tensor], Tensor], count: int, device: torch.device) -> Tensor | None:
    """(b,) the row of the earlier call that each row came from, −1 where nothing comes.

    Every row of the earlier call is pulled to from all rows of the later one, then from those whose
    number has a certain binary digit: it must get the same, or nothing.
    None where a row came from several, or several from one.

    pull gives what seeds in the chosen rows (b,) bring to the earlier call, (B, ·); count is b.
    """
    whole = pull(torch.ones(count, dtype=torch.bool, device=device)).flatten(1)
    bound = ROW_ROUNDING * torch.finfo(whole.dtype).eps * whole.abs().amax(dim=1)
    reached = (whole != 0).any(1)
    number = torch.zeros(len(whole), dtype=torch.long, device=device)
    for place, chosen in enumerate(bits(count, device)):
        part = pull(chosen).flatten(1)
        same = (part - whole).abs().amax(dim=1) <= bound
        nothing = part.abs().amax(dim=1) <= bound
        if bool((reached & ~same & ~nothing).any()):
            return None
        number += same.long() << place
    if bool(reached.any()) and int(number[reached].max()) >= count:
        return None
    if len(number[reached].unique()) < int(reached.sum()):
        return None
    rows = torch.full((count,), -1, dtype=torch.long, device=device)
    rows[number[reached]] = reached.nonzero().squeeze(1)
    return rows


def completed(rows: Tensor, opened: Tensor | None) -> Tensor:
    """Give rows that nothing came to the rows that they were multiplied by zero of: they are cut.

    The others are −1 still, sequences that are new: nothing of them was in the earlier call. Both are as
    `origins` tells them, opened with masks and gates left out, None where that is not known.
    """
    if opened is None:
        return rows
    free = ~torch.isin(opened, rows[rows >= 0])
    return torch.where((rows < 0) & free, opened, rows)


def found(pull: Callable[..., Tensor], count: int, device: torch.device) -> Tensor | None:
    """`origins`, and those of rows that were cut; pull takes `opened`, see `Between.pull`."""
    rows = origins(pull, count, device)
    return None if rows is None else with_cut(rows, pull)


def with_cut(rows: Tensor, pull: Callable[..., Tensor]) -> Tensor:
    """Rows of which −1 stands where nothing arrives: for those that were masked the row they were of."""
    nothing = rows < 0
    if not bool(nothing.any()):
        return rows
    opened = origins(lambda chosen: pull(chosen & nothing, opened=True), len(rows), rows.device)
    return completed(rows, opened)


def picked(array: Tensor, rows: Tensor | None, dim: int) -> Tensor:
    """The rows of an array of the earlier call as the later one has them, zero where there is none."""
    if rows is None:
        return array
    shape = [1] * array.dim()
    shape[dim] = len(rows)
    taken = array.index_select(dim, rows.clamp(min=0))
    return taken.masked_fill((rows < 0).view(shape), 0)
