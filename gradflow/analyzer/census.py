"""How every unit sits: its gates, its time-scale, how often it is saturated or idle.

Letters: T timesteps, B sequences, H units, U units of the widest state. Padding is never counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.activity import CANDIDATES, sigmoid_and_other
from gradflow.limits import GATE_CLOSED, GATE_OPEN, SATURATED
from gradflow.recording import Track

KEEPERS = {"LSTM": "f", "GRU": "z"}  # the gate whose product over the steps is the memory


def gate_census(track: Track, units: int) -> dict[str, np.ndarray]:
    """gate_value (gate, unit, step), and gate_unit_closed and _open, each (gate, unit).

    gate_value is the mean over sequences; the shares are of all real steps and sequences, NaN for the
    tanh candidates, for which open and closed have no meaning.
    """
    gates = sigmoid_and_other(track)
    value = np.full((len(gates), units, track.steps), math.nan)
    closed, opened = (np.full((len(gates), units), math.nan) for _ in range(2))
    for place, (name, values) in enumerate(gates.items()):
        width = values.shape[-1]
        value[place, :width] = _mean_over_sequences(values, track.mask)
        if name not in CANDIDATES:
            closed[place, :width] = _mean_per_unit(values < GATE_CLOSED, track.mask)
            opened[place, :width] = _mean_per_unit(values > GATE_OPEN, track.mask)
    return {"gate_value": value, "gate_unit_closed": closed, "gate_unit_open": opened}


def time_scales(track: Track, units: int) -> np.ndarray:
    """τ = −1/mean ln f of every unit in steps (z for a GRU), (U,): e-folding of that gate alone.

    inf where the gate is always 1, 0 where it is ever exactly 0, NaN for other cells. What the paths
    through h add is not in it (Tallec & Ollivier 2018).

    >>> import torch, gradflow
    >>> lstm = torch.nn.LSTM(1, 1)
    >>> for weight in lstm.parameters():
    ...     _ = torch.nn.init.zeros_(weight)
    >>> with gradflow.record(lstm) as recording:
    ...     lstm(torch.zeros(4, 1, 1))[0].sum().backward()
    >>> round(float(time_scales(recording["l0"], 1)[0]), 4)  # −1/ln σ(0) = 1/ln 2
    1.4427
    """
    result = np.full(units, math.nan)
    if track.cell not in KEEPERS:
        return result
    gate = sigmoid_and_other(track)[KEEPERS[track.cell]]
    pace = -_mean_per_unit(gate.log(), track.mask)
    with np.errstate(divide="ignore"):
        result[: gate.shape[-1]] = np.where(pace == 0, math.inf, 1 / pace)
    return result


def saturation(track: Track, units: int) -> np.ndarray:
    """(state, U): share of real steps and sequences at which a unit's tanh is beyond ±0.95.

    The tanh is h itself for a tanh RNN, tanh c for an LSTM's c, the candidate n for a GRU. NaN for
    what has no limits, and for an LSTM's h, which is gated.
    """
    result = np.full((len(track.states), units), math.nan)
    for place, state in enumerate(track.states):
        read = _SQUASHED.get((track.cell, state))
        if read is not None:
            flat = read(track).detach().cpu().abs() > SATURATED
            result[place, : flat.shape[-1]] = _mean_per_unit(flat, track.mask)
    return result


_SQUASHED: dict[tuple[str, str], Callable[[Track], Tensor]] = {
    ("RNN_TANH", "h"): lambda track: track.states["h"],
    ("LSTM", "c"): lambda track: track.states["c"].tanh(),
    ("GRU", "h"): lambda track: track.gates["n"],
}


def idleness(track: Track, units: int) -> np.ndarray:
    """(U,): share of real steps and sequences at which a ReLU unit is exactly 0; NaN for others."""
    result = np.full(units, math.nan)
    if track.cell == "RNN_RELU":
        zero = track.states["h"].detach().cpu() == 0
        result[: zero.shape[-1]] = _mean_per_unit(zero, track.mask)
    return result


def _mean_per_unit(values: Tensor, mask: Tensor) -> np.ndarray:
    """Mean over real steps and sequences of (T, B, width), (width,)."""
    return values[mask.cpu()].double().mean(0).numpy()


def _mean_over_sequences(values: Tensor, mask: Tensor) -> np.ndarray:
    """Mean over real sequences of (T, B, width), (width, T); NaN where a step has none."""
    real = mask.cpu()
    total = torch.where(real[..., None], values, torch.zeros_like(values)).sum(1)
    count = real.sum(1)[:, None].double()
    return (total / torch.where(count > 0, count, math.nan)).T.numpy()
