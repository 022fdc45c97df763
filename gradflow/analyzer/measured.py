"""What was measured on one layer, before it is judged: what its arrays and findings are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradflow.analyzer.contributions import Contributed
from gradflow.analyzer.core import Core
from gradflow.analyzer.loss import Profile
from gradflow.analyzer.spectrum import Spectrum
from gradflow.analyzer.triangle import Triangle
from gradflow.recording import Track


@dataclass(frozen=True, kw_only=True)
class Measured(Core):
    """The numbers of the verdict, and everything else measured on one track."""

    track: Track
    factors: np.ndarray  # (B, 2) what weights and activations add to the rate of an RNN
    spectrum: Spectrum  # every exponent with its interval
    profile: Profile
    triangle: Triangle  # how each loss step is felt at each step
    contributed: Contributed  # the gradient of the weights by lag
    withheld: bool  # parity failed: what rests on the loss is not shown
    share: float  # of every time budget that this layer may use
