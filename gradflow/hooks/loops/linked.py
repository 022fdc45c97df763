"""The step Jacobians of a loop: those of its calls, and what happens between two calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.cells import Steps


@dataclass(frozen=True)
class Linked:
    """An `Operator`: step t is (after_t A_t + around_t) before_t.

    A factor is (B, S) elementwise or (B, S, S) dense, and may be absent: before and after are then
    the identity, around is nothing. Where sequences of one step are in several of the steps, each of
    these is zero at the sequences of the others.
    """

    steps: list[Steps]
    places: list[list[tuple[int, int]]]  # of step t: which of the steps, and the index there
    before: dict[int, Tensor]
    after: dict[int, Tensor]
    around: dict[int, Tensor]

    @property
    def length(self) -> int:
        """T."""
        return len(self.places)

    @property
    def batch(self) -> int:
        """B."""
        return self.steps[0].batch

    @property
    def size(self) -> int:
        """S."""
        return self.steps[0].size

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return self.steps[0].dtype

    def log_volume(self) -> Tensor | None:
        """ln |det A_t| of every step in closed form, (T, B); None where a cell has none.

        Also where a state goes around a call: the determinant of a sum is no product.
        """
        volumes = [steps.log_volume() for steps in self.steps]
        known = [volume for volume in volumes if volume is not None]
        several = any(len(places) > 1 for places in self.places)
        if self.around or several or len(known) < len(volumes):
            return None
        every = torch.stack([known[part][index] for ((part, index),) in self.places])
        for factors in (self.before, self.after):
            for t, factor in factors.items():
                every[t] += _log_volume(factor)
        return every

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to what step t makes of it."""
        block = pushed(self.before.get(t), block)
        (part, index), *others = self.places[t]
        result = self.steps[part].push(index, block)
        for part, index in others:
            result = result + self.steps[part].push(index, block)
        result = pushed(self.after.get(t), result)
        return result + pushed(self.around[t], block) if t in self.around else result

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to what the transpose of step t makes of it."""
        block_after = pulled(self.after.get(t), block)
        (part, index), *others = self.places[t]
        result = self.steps[part].pull(index, block_after)
        for part, index in others:
            result = result + self.steps[part].pull(index, block_after)
        if t in self.around:
            result = result + pulled(self.around[t], block)
        return pulled(self.before.get(t), result)


def _log_volume(factor: Tensor) -> Tensor:
    """ln |det| of a factor, (B,)."""
    if factor.dim() == 2:
        return factor.abs().log().sum(-1)
    return torch.linalg.slogdet(factor)[1]


def pushed(factor: Tensor | None, block: Tensor) -> Tensor:
    """Rows of a block (B, m, S) through a factor."""
    if factor is None:
        return block
    return block * factor.unsqueeze(1) if factor.dim() == 2 else block @ factor.transpose(1, 2)


def pulled(factor: Tensor | None, block: Tensor) -> Tensor:
    """Rows of a block (B, m, S) through a factor's transpose."""
    if factor is None:
        return block
    return block * factor.unsqueeze(1) if factor.dim() == 2 else block @ factor
