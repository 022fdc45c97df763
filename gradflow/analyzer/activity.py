"""How the gates, the states and every unit sit: means, shares closed and open, sizes, time-scales.

Letters: T timesteps, B sequences, H units, U units of the widest state. Input-time order; padding is
never counted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.loss import masked_median
from gradflow.cells import called
from gradflow.limits import GATE_CLOSED, GATE_OPEN, SATURATED
from gradflow.recording.track import Track


def gate_statistics(track: Track) -> dict[str, np.ndarray]:
    """gate_mean, gate_closed and gate_open, each (gate, step)."""
    gates = sigmoid_and_other(track)
    shape = (len(gates), track.steps)
    result = {f"gate_{what}": np.full(shape, np.nan) for what in ("mean", "closed", "open")}
    for place, (name, values) in enumerate(gates.items()):
        result["gate_mean"][place] = masked_mean(values, track.mask)
        if name in between(track):
            continue
        result["gate_closed"][place] = masked_mean((values < GATE_CLOSED).double(), track.mask)
        result["gate_open"][place] = masked_mean((values > GATE_OPEN).double(), track.mask)
    return result


def between(track: Track) -> tuple[str, ...]:
    """Gates that go from −1 to 1, for which open and closed have no meaning."""
    spec = called(track.cell)
    return () if spec is None else tuple(name for name in spec.gates if name in spec.tanh)


def sigmoid_and_other(track: Track) -> dict[str, Tensor]:
    """Gate name -> (T, B, H) float64 on the CPU."""
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
        if name not in between(track):
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
    if track.spec is None or track.spec.keeper is None:
        return result
    gate = sigmoid_and_other(track)[track.spec.keeper.gate]
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
    limits = {} if track.spec is None else track.spec.limits
    for place, state in enumerate(track.states):
        if state in limits:
            flat = limits[state](track.states, track.gates).detach().cpu().abs() > SATURATED
            result[place, : flat.shape[-1]] = _mean_per_unit(flat, track.mask)
    return result


def idleness(track: Track, units: int) -> np.ndarray:
    """(U,): share of real steps and sequences at which a ReLU unit is exactly 0; NaN for others."""
    result = np.full(units, math.nan)
    if track.spec is not None and track.spec.relu:
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
