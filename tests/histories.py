"""Histories made up from formulas, so that what shows them can be tested without training a model.

A made-up training: the layer `rnn.l0` learns to reach further until two thirds of the way, then clipping
begins to act and it vanishes; `rnn.l1` explodes for a while in the middle and has a NaN there.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gradflow.history import History, LayerProbe, Note, Probe, Writer, lag_grid

CELLS = {"rnn.l0": "LSTM", "rnn.l1": "GRU"}
GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}


def layer(name: str, step: int, share: float, length: int, noise: float) -> LayerProbe:
    """One layer after a share of its training; its gradient fades exponentially."""
    rate = _rate(name, share) + 0.01 * noise
    lags = lag_grid(length)
    half = 0.01 + 0.02 * (1 - share)
    verdict = "inconclusive"
    gain, over, edge = rate * (length - 1), length - 1, math.log(10)
    low, high = gain - half * over, gain + half * over
    if high < -edge:
        verdict = "vanishing"
    elif low > edge:
        verdict = "exploding"
    elif -edge < low and high < edge:
        verdict = "stable"
    broken = name == "rnn.l1" and 0.48 < share < 0.5
    horizon = math.log(1e-3) / rate if rate < 0 else math.inf
    direct = np.where(lags == 0, 0.0, -np.inf)
    gates = {
        gate: {
            "gate_mean": 0.3 + 0.6 * share * (place == 1),
            "gate_low": 0.1,
            "gate_high": 0.95,
            "gate_closed": 0.2 * (1 - share),
            "gate_open": 0.1 + 0.5 * share * (place == 1),
        }
        for place, gate in enumerate(GATES[CELLS[name]])
    }
    return LayerProbe(
        values={
            "rate": rate,
            "rate_low": rate - half,
            "rate_high": rate + half,
            "rate_settled": 1.0,
            "gain": gain,
            "gain_low": low,
            "gain_high": high,
            "gain_steps": over,
            "span": length,
            "half_life": math.log(2) / -rate if rate < 0 else math.inf,
            "horizon": float(math.ceil(horizon)) if math.isfinite(horizon) else math.inf,
            "searched": over,
            "sequences_rated": 16,
            "sequences": 32,
            "steps": length,
            "level": -3.0 - share,
            "level_h": -3.2 - share,
            "state_norm": 0.4,
            "saturated": 0.05 * share,
            "cuts": 0.0,
            "nonfinite": float(broken),
            "nonfinite_at": 17.0 if broken else math.nan,
            "grad_norm": 1.0 + 4.0 * (share > 2 / 3),
            "grad_norm_clipped": 1.0,
        },
        verdict=verdict,
        gates=gates,
        lags=lags,
        profile=rate * lags / math.log(10),
        direct=direct,
    )


def _rate(name: str, share: float) -> float:
    if name == "rnn.l0":
        return -0.3 + 0.44 * share if share < 2 / 3 else -0.0067 - 0.6 * (share - 2 / 3)
    return 0.08 * math.exp(-(((share - 0.5) / 0.12) ** 2)) - 0.01


def probes(count: int = 60, *, length: int = 100, every: int = 100, seed: int = 0) -> list[Probe]:
    """A training of so many probes."""
    random = np.random.default_rng(seed)
    found, before = [], dict.fromkeys(CELLS, "")
    for number in range(count):
        share, step = number / max(1, count - 1), 1 + every * number
        layers = {n: layer(n, step, share, length, float(random.normal())) for n in CELLS}
        notes = []
        for name, one in layers.items():
            if one.verdict != before[name] and number:
                words = f"{name} is {one.verdict} since step {step}, it was {before[name]} before"
                notes.append(Note(step, "verdict", words, name))
            before[name] = one.verdict
            if one.values["nonfinite"]:
                where = f"{name}: the gradient is NaN at step 17, sequence 3, unit 5"
                notes.append(Note(step, "nonfinite", where, name))
        values = {
            "loss": 0.2 * math.exp(-3 * share) + 0.01 * float(random.normal()) + 0.1,
            "grad_norm_all": 2.0 + 6.0 * (share > 2 / 3),
            "grad_norm_all_clipped": 2.0,
            "clipped": float(share > 2 / 3),
            "scale": 1.0,
            "updated": 1.0,
            "forwards": 1.0,
            "probe_seconds": 0.02,
            "step_seconds": 0.005,
            "interval": float(every),
            "time": 1.7e9 + step * 0.005,
        }
        found.append(Probe(step, values, layers, (1e-3 * (1 - 0.9 * share),), tuple(notes)))
    return found


HEADER = {"preset": "rate", "every": 100, "budget": 0.02}


def history(count: int = 60, *, length: int = 100, seed: int = 0) -> History:
    """A made-up history, in no file."""
    return History.of("Net", probes(count, length=length, seed=seed), CELLS, **HEADER)


def write(folder: Path, count: int = 60, *, length: int = 100, seed: int = 0) -> Path:
    """A folder as `gradflow.watch` leaves it."""
    writer = Writer(folder, title="Net", **HEADER)
    for probe in probes(count, length=length, seed=seed):
        writer.probe(probe, CELLS)
    writer.close()
    return folder
