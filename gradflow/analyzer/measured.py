"""What was measured on one layer, before it is judged: what its arrays and findings are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradflow.analysis import Rate
from gradflow.analyzer.curve import LagCurve
from gradflow.analyzer.loss import Profile
from gradflow.analyzer.lyapunov import Growth
from gradflow.analyzer.plan import Maps
from gradflow.analyzer.ranks import Ranks
from gradflow.recording import Track


@dataclass(frozen=True)
class Measured:
    """Everything measured on one track."""

    track: Track
    span: int
    growth: Growth  # of every direction, step by step
    rate: Rate
    sequence_rates: np.ndarray  # (B,)
    mapped: tuple[int, ...]  # sequences that have maps
    maps: Maps
    curve: LagCurve
    ranks: Ranks
    singular: np.ndarray  # (sequence, S) ln of the singular values over `reach` steps
    reach: int  # steps over which the channels are counted
    profile: Profile
    withheld: bool  # parity failed: what rests on the loss is not shown
