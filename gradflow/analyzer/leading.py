"""What happens to the leading direction step by step: its growth, and the two factors of an RNN's.

Letters: T timesteps, B sequences, q the leading direction of the QR iteration, W = W_hh,
D_t = diag(φ'(a_t)), so that an RNN's A_t = D_t W. Processing order unless it says input time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.loss import masked_median
from gradflow.analyzer.lyapunov import Growth
from gradflow.analyzer.order import input_time
from gradflow.recording import Track

FACTORS = ("weight", "activation")


class WeightGrowth:
    """Notes ln ‖W q_{t−1}‖ while the QR iteration goes over the steps of a vanilla RNN."""

    def __init__(self, track: Track) -> None:
        self.weight = track.weights["weight_hh"].detach().cpu().double()
        shape = (track.steps, track.batch)
        self.logs = torch.full(shape, torch.nan, dtype=torch.float64)  # NaN where q is gone

    def __call__(self, t: int, leading: Tensor) -> None:
        """Take the leading direction (B, S) that step t is about to push."""
        logs = torch.linalg.vector_norm(leading.double() @ self.weight.T, dim=-1).log()
        gone = (leading == 0).all(-1)
        self.logs[t] = torch.where(gone, torch.full_like(logs, math.nan), logs)


def watcher(track: Track) -> WeightGrowth | None:
    """A `WeightGrowth` for a vanilla RNN, None for any other cell."""
    vanilla = track.spec is not None and track.spec.vanilla
    return WeightGrowth(track) if vanilla else None


def rate_factors(growth: Growth, weight: WeightGrowth | None) -> np.ndarray:
    """The two summands of the leading direction's growth, (B, 2) nats per step, as in `FACTORS`.

    ‖D W q‖ = ‖W q‖ · ‖D W q‖/‖W q‖, so mean ln ‖A_t q_{t−1}‖ is mean ln ‖W q_{t−1}‖ and mean
    ln (‖D_t W q_{t−1}‖/‖W q_{t−1}‖) over the counted steps: what the weights do and what the
    activations do to the leading direction. ‖W‖₂ and max φ' only bound the two (Pascanu et al. 2013).
    NaN for other cells; a sequence that an exact zero cuts off has −inf in the factor that cut it.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(50, 2, 1))[0][-1].sum().backward()
    >>> data = gradflow.analyze(recording)["l0"].data
    >>> [round(value, 4) for value in data["rate_factor"].values.tolist()]  # ln 0.9, ln φ'(0)
    [-0.1054, 0.0]
    """
    rates = growth.exponents[:, 0].numpy()
    result = np.full((len(rates), len(FACTORS)), math.nan)
    if weight is None:
        return result
    logs = weight.logs[: len(growth.counted)]
    used = growth.counted & ~logs.isnan()
    total = torch.where(used, logs, torch.zeros_like(logs)).sum(0)
    result[:, 0] = (total / used.sum(0)).numpy()
    both = np.isneginf(result[:, 0])  # W itself sends the direction to zero
    with np.errstate(invalid="ignore"):
        result[:, 1] = np.where(
            both, math.nan, np.where(np.isneginf(rates), -math.inf, rates - result[:, 0])
        )
    return result


def step_growth(track: Track, growth: Growth) -> np.ndarray:
    """Median over sequences of the leading direction's ln growth at every step, (T,) input time.

    Only steps that count towards the rate (no burn-in, no cut, no padding), and the step at which an
    exact zero ends a sequence, −inf, wherever it lies; nothing is left to measure after it. With one
    sequence and no exact zero the mean over steps is the rate.
    """
    return masked_median(*_by_input_time(track, growth))


def _by_input_time(track: Track, growth: Growth) -> tuple[np.ndarray, np.ndarray]:
    """Growth (T, B), and which entries of it are shown."""
    leading = growth.log_growth[..., 0]
    zero = torch.isneginf(leading)
    earlier = zero.int().cumsum(0) - zero.int()  # exact zeros before this step
    shown = (growth.counted | zero) & (earlier == 0) & ~leading.isnan()
    values = torch.full((track.steps, track.batch), math.nan, dtype=torch.float64)
    mask = torch.zeros(track.steps, track.batch, dtype=torch.bool)
    index = input_time(track)[: len(leading)]
    columns = torch.arange(track.batch).expand_as(index)
    values[index, columns] = leading
    mask[index, columns] = shown
    return values.numpy(), mask.numpy()
