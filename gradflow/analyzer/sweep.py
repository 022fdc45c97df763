"""What one sweep over the steps carries: the blocks of all starts, and where their gains go.

Letters: B sequences, n sources, T timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradflow.analyzer.blocks import Blocks
from gradflow.limits import LADDER, NORM_TOLERANCE, PRODUCT_FLOAT32, PRODUCT_FLOAT64, SKETCHED
from gradflow.recording import Operator

SPEED = {torch.float64: PRODUCT_FLOAT64, torch.float32: PRODUCT_FLOAT32}


@dataclass
class Sweep:
    """The sources of one sweep, their blocks by rank, and what was written so far."""

    operator: Operator
    sources: Tensor  # (n,) steps t, ascending
    sketch: bool
    generator: torch.Generator
    result: dict[str, Tensor]  # norm -> (B, n, T), "blocks" -> (k·k, B, n, T)
    widths: tuple[int, ...]  # of the states, none where blocks are not asked for
    levels: dict[int, Blocks] = field(default_factory=dict)
    dropped: Blocks | None = None  # random vectors through what a sketch dropped of each start
    spent: float = 0.0  # predicted seconds so far

    @property
    def ladder(self) -> list[int]:
        """The ranks that a block may have, largest first."""
        ranks = [self.operator.size]
        while self.sketch and ranks[-1] > 1:
            ranks.append(max(1, int(ranks[-1] * LADDER)))
        return ranks

    def level(self, rank: int, capacity: int) -> Blocks:
        """The blocks of that rank."""
        if rank not in self.levels:
            self.levels[rank] = self.blocks(rank, capacity)
        return self.levels[rank]

    def blocks(self, rank: int, capacity: int) -> Blocks:
        """No blocks yet."""
        batch, size = self.operator.batch, self.operator.size
        tolerance = SKETCHED if self.sketch else NORM_TOLERANCE
        if "spectral" not in self.result:
            tolerance = 0.0
        return Blocks(
            batch, rank, size, self.operator.dtype, capacity, self.widths, tolerance=tolerance
        )

    @property
    def live(self) -> list[Blocks]:
        """All that a step pushes."""
        every = [*self.levels.values(), *([] if self.dropped is None else [self.dropped])]
        return [level for level in every if level.count]
