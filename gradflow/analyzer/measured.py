"""What was measured on one layer, before it is judged: what its arrays and findings are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradflow.analysis import Rate
from gradflow.analyzer.contributions import Contributed
from gradflow.analyzer.curve import LagCurve
from gradflow.analyzer.loss import Profile
from gradflow.analyzer.lyapunov import Growth
from gradflow.analyzer.plan import Maps
from gradflow.analyzer.ranks import Ranks
from gradflow.analyzer.spectrum import Spectrum
from gradflow.analyzer.triangle import Triangle
from gradflow.recording import Track


@dataclass(frozen=True)
class Measured:
    """Everything measured on one track."""

    track: Track
    span: int
    growth: Growth  # of every direction, step by step
    factors: np.ndarray  # (B, 2) what weights and activations add to the rate of an RNN
    rate: Rate
    sequence_rates: np.ndarray  # (B,)
    spectrum: Spectrum  # every exponent with its interval
    mapped: tuple[int, ...]  # sequences that have maps
    maps: Maps
    curve: LagCurve
    ranks: Ranks
    singular: np.ndarray  # (sequence, S) ln of the singular values over `reach` steps
    reach: int  # steps over which the channels are counted
    profile: Profile
    triangle: Triangle  # how each loss step is felt at each step
    contributed: Contributed  # the gradient of the weights by lag
    withheld: bool  # parity failed: what rests on the loss is not shown
    share: float  # of every time budget that this layer may use
