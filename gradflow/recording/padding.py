"""Padding: steps at the end of sequences that hold one and the same row, as a tensor shows them.

Letters: T timesteps, B sequences, I features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.limits import BLANKS, CHANCE, CHANCE_STEPS, INPUT_ROUNDING, PADDING_JUMP


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

    The row of the tails must be the same in all sequences, must hardly occur before them, must not
    come so often in a row by chance, and must begin at once: what another layer makes may come to rest
    on one row, each step nearer to it than the one before.

    >>> x = torch.randn(9, 3, 2)
    >>> x[4:, 0], x[6:, 1] = 0.0, 0.0
    >>> padding_of(x).lengths.tolist(), padding_of(torch.randn(9, 3, 2))
    ([4, 6, 9], None)
    """
    if len(rows) < 3 or not rows.numel():
        return None
    token = _token(rows, tokens)
    if token is None and not bool(_same(rows[-2], rows[-1]).any()):
        return None
    x = rows.detach().cpu()
    tails = _tails(_same(x, x[-1]))
    row = x[-1, int(tails.argmax())] if token is None else x.new_tensor([token])
    blank = _same(x, row)
    lengths = len(x) - _tails(blank)
    real = int(lengths.sum())
    before = int(blank.sum()) - (len(x) * x.shape[1] - real)
    if int(lengths.min()) < 1 or before > BLANKS * real:
        return None
    if token is None and (
        _by_chance(tails, blank, max(before, 1) / real) or _rests(x, row, lengths)
    ):
        return None
    return Padding(lengths, len(x), token is not None)


def _token(rows: Tensor, tokens: Collection[int]) -> int | None:
    """Which token that stands for padding ends some sequence, if any does."""
    if rows.is_floating_point() or rows.shape[2] != 1:
        return None
    return next((token for token in tokens if bool((rows[-1] == token).any())), None)


def _by_chance(tails: Tensor, blank: Tensor, share: float) -> bool:
    """Whether rows of which this share is alike may end so, or in several ways, or only one does."""
    likely = len(tails) * share ** int(tails.max())
    alone = len(tails) > 2 and int((_tails(blank) > 1).sum()) < 2
    return likely > CHANCE or alone or bool((tails[~blank[-1]] > CHANCE_STEPS).any())


def _rests(x: Tensor, row: Tensor, lengths: Tensor) -> bool:
    """Whether a sequence comes to rest on a row of numbers, and does not jump to it."""
    ends = (lengths < len(x)).nonzero().squeeze(1)
    last = x[lengths[ends] - 1, ends]
    if not x.is_floating_point():
        return False
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)  # float64 may hold float32
    near = PADDING_JUMP * INPUT_ROUNDING * eps * row.abs().max()
    return bool(((last - row).abs() <= near).all(-1).any())


def _tails(blank: Tensor) -> Tensor:
    """(B,): how many steps at the end are true."""
    return blank.flip(0).int().cumprod(0).sum(0)


def _same(x: Tensor, row: Tensor) -> Tensor:
    """(...): whether rows (..., I) are this one, up to rounding."""
    if not x.is_floating_point():
        return (x == row).all(-1)
    bound = INPUT_ROUNDING * torch.finfo(x.dtype).eps * row.abs().amax(-1, keepdim=True)
    return ((x - row).abs() <= bound).all(-1)
