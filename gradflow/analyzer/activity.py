"""How the gates and the states sit over time: means, shares closed and open, sizes.

Letters: T timesteps, B sequences, H units. Input-time order; padding is never counted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.loss import masked_median
from gradflow.limits import GATE_CLOSED, GATE_OPEN
from gradflow.recording import Track

CANDIDATES = ("g", "n")  # tanh, from −1 to 1: open and closed have no meaning


def gate_statistics(track: Track) -> dict[str, np.ndarray]:
    """gate_mean, gate_closed and gate_open, each (gate, step)."""
    gates = sigmoid_and_other(track)
    shape = (len(gates), track.steps)
    result = {f"gate_{what}": np.full(shape, np.nan) for what in ("mean", "closed", "open")}
    for place, (name, values) in enumerate(gates.items()):
        result["gate_mean"][place] = masked_mean(values, track.mask)
        if name in CANDIDATES:
            continue
        result["gate_closed"][place] = masked_mean((values < GATE_CLOSED).double(), track.mask)
        result["gate_open"][place] = masked_mean((values > GATE_OPEN).double(), track.mask)
    return result


def sigmoid_and_other(track: Track) -> dict[str, Tensor]:
    """Gate name -> (T, B, H) float64 on the CPU; none for a cell whose only gate is its state."""
    if track.cell in ("RNN_TANH", "RNN_RELU"):
        return {}
    return {name: gate.detach().cpu().double() for name, gate in track.gates.items()}


def masked_mean(values: Tensor, mask: Tensor) -> np.ndarray:
    """Mean over units and real sequences of every step, (T,); NaN where a step has none."""
    real = mask.cpu()[..., None]
    total = torch.where(real, values, torch.zeros_like(values)).sum((1, 2))
    count = real.sum((1, 2)) * values.shape[-1]
    return (total / torch.where(count > 0, count, math.nan)).numpy()


def over_all(values: Tensor, mask: Tensor) -> float:
    """Mean over all real entries of (T, B, width); NaN if there are none."""
    real = values[mask.cpu()]
    return float(real.double().mean()) if real.numel() else math.nan


def state_norms(track: Track) -> np.ndarray:
    """(state, step): median over sequences of ‖s_t‖₂/√width."""
    mask = track.mask.cpu().numpy()
    rows = []
    for values in track.states.values():
        norms = torch.linalg.vector_norm(values.detach().cpu().double(), dim=-1)
        rows.append(masked_median(norms.numpy() / math.sqrt(values.shape[-1]), mask))
    return np.array(rows)
