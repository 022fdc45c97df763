"""Padding: steps at the end of sequences that hold one and the same row, as a tensor shows them.

Letters: T timesteps, B sequences, I features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

BLANKS = 0.05  # share of the steps before a padded tail that may hold the padding's row
CHANCE = 2  # steps in a row at the end that may be equal by chance
ROUNDING = 32  # units of rounding within which two rows are one: a layer made both of one row


@dataclass(frozen=True)
class Padding:
    """How many steps of every sequence come before its tail of equal rows."""

    lengths: Tensor  # (B,), on the CPU
    steps: int  # T
    sure: bool = False  # the model says so: a padding_idx, lengths or a mask that it was given

    @property
    def alike(self) -> bool:
        """Whether all tails are equally long: data may end so as well, with an impulse or a delay."""
        return bool((self.lengths == self.lengths[0]).all())

    @property
    def told(self) -> bool:
        """Whether these tails are taken for padding."""
        return self.sure or not self.alike

    def fits(self, mask: Tensor) -> bool:
        """Whether it is of a batch of this shape, (T, B)."""
        return mask.shape == (self.steps, len(self.lengths))


def padding_of(rows: Tensor, tokens: Collection[int] = ()) -> Padding | None:
    """The tails of rows (T, B, I), or of token ids (T, B, 1), some of which stand for padding.

    The row of the tails must be the same in all sequences, and must hardly occur before them.

    >>> x = torch.randn(9, 3, 2)
    >>> x[4:, 0], x[6:, 1] = 0.0, 0.0
    >>> padding_of(x).lengths.tolist(), padding_of(torch.randn(9, 3, 2))
    ([4, 6, 9], None)
    """
    steps = len(rows)
    if steps < 3 or not rows.numel():
        return None
    if not bool(_same(rows[-2], rows[-1]).any()):
        return None
    x = rows.detach().cpu()
    tails = _tails(_same(x, x[-1]))
    longest = int(tails.argmax())
    blank = _same(x, x[-1, longest])
    lengths = steps - _tails(blank)
    before = blank & (torch.arange(steps)[:, None] < lengths)
    others = tails[~blank[-1]]  # token ids may well be the same twice
    if bool((others > CHANCE).any()) or int(lengths.min()) < 1:
        return None
    if float(before.sum()) > BLANKS * float(lengths.sum()):
        return None
    is_token = not x.is_floating_point() and x.shape[2] == 1
    return Padding(lengths, steps, is_token and int(x[-1, longest]) in tokens)


def _tails(blank: Tensor) -> Tensor:
    """(B,): how many steps at the end are true."""
    return blank.flip(0).int().cumprod(0).sum(0)


def _same(x: Tensor, row: Tensor) -> Tensor:
    """(...): whether rows (..., I) are this one, up to rounding."""
    if not x.is_floating_point():
        return (x == row).all(-1)
    bound = ROUNDING * torch.finfo(x.dtype).eps * row.abs().amax(-1, keepdim=True)
    return ((x - row).abs() <= bound).all(-1)
