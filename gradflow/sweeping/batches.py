"""From several batches, or several probes, to one row: the numbers of one layer put together.

Batches are the outer unit of every interval, see `gradflow.analyzer.rates.over_batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from gradflow.analysis import Gain, Rate
from gradflow.analyzer.agreement import DEPENDS, batches_words
from gradflow.analyzer.rates import Vote, over_batches
from gradflow.history import LayerProbe


def pooled_batches(
    batches: Sequence[Mapping[str, LayerProbe]],
) -> tuple[dict[str, LayerProbe], list[str]]:
    """Every layer over all batches, and what is to be said of that.

    Args:
        batches: layer name -> its numbers, of each batch.

    Returns:
        Layer name -> its numbers over all of them; sentences.

    >>> gains = [LayerProbe({"gain": gain, "rate": gain / 9}) for gain in (-4.0, -5.0, -6.0)]
    >>> layers, said = pooled_batches([{"l0": one} for one in gains])
    >>> layers["l0"].verdict, [round(layers["l0"].values[end], 2) for end in ("gain_low", "gain_high")]
    ('vanishing', [-7.48, -2.52])
    """
    names = dict.fromkeys(name for one in batches for name in one)
    found = {name: _pooled([one[name] for one in batches if name in one]) for name in names}
    if len(batches) < 2:
        return found, []
    return found, [batches_words(len(batches))]


def _pooled(parts: Sequence[LayerProbe]) -> LayerProbe:
    if len(parts) == 1:
        return replace(parts[0], values=parts[0].values | {"batches": 1.0})
    names = dict.fromkeys(name for one in parts for name in one.values)
    each = {name: np.array([one.values.get(name, math.nan) for one in parts]) for name in names}
    values = {name: _one(name, some) for name, some in each.items()}
    verdict = ""
    if "gain" in each:
        found = over_batches([_vote(one) for one in parts], _whole(values, "span"))
        verdict = found.verdict.name
        for name, one in (("gain", found.gain), ("rate", found.rate)):
            values |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        values |= {"rate_settling": found.settling, "rate_settled": float(found.settled)}
    gates = {
        gate: {name: float(np.mean([one.gates[gate][name] for one in parts if gate in one.gates]))
               for name in numbers}
        for gate, numbers in parts[0].gates.items()
    }  # fmt: skip
    lags = max((one.lags for one in parts), key=len)
    return LayerProbe(
        values=values | {"batches": float(len(parts))},
        verdict=verdict,
        gates=gates,
        lags=lags,
        profile=_rms([_at(one.lags, one.profile, lags) for one in parts]),
        direct=_rms([_at(one.lags, one.direct, lags) for one in parts]),
    )


def _vote(one: LayerProbe) -> Vote:
    """What a batch brings to the verdict of all."""
    gain, rate, settling = (
        one.values.get(name, math.nan) for name in ("gain", "rate", "rate_settling")
    )
    steps = _whole(one.values, "gain_steps")
    return Vote(
        one.verdict, Gain(gain, math.nan, math.nan, steps), Rate(rate, math.nan, math.nan), settling
    )


def _whole(values: Mapping[str, float], name: str) -> int:
    """A number of steps; 1 where it is not known."""
    return int(np.nan_to_num(values.get(name, 1.0), nan=1.0))


def _middle(known: np.ndarray) -> float:
    """The lower median of numbers in order."""
    return float(known[(len(known) - 1) // 2])


def _one(name: str, values: np.ndarray) -> float:
    """One number of all batches."""
    if name == "horizon":  # NaN lies beyond what was searched, inf beyond everything
        beyond = np.finfo(float).max
        middle = _middle(np.sort(np.where(np.isnan(values), beyond, values)))
        return math.nan if middle == beyond else middle
    known, way = np.sort(values[~np.isnan(values)]), POOLED.get(name, np.mean)
    if not len(known) or (way is _middle and len(known) < len(values)):
        return math.nan
    return float(way(known))


def _at(lags: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values at the lags that are wanted; NaN where there is none."""
    found = np.full(len(wanted), np.nan)
    there = np.isin(wanted, lags)
    found[there] = values[np.searchsorted(lags, wanted[there])]
    return found


def _rms(decades: Sequence[np.ndarray]) -> np.ndarray:
    """log10 of the root mean square over batches of numbers given as log10; NaN where no batch has one."""
    rows = np.stack(decades)
    known = ~np.isnan(rows)
    peak = np.where(known, rows, -np.inf).max(axis=0)
    scale = np.where(np.isfinite(peak), peak, 0.0)
    squares = np.where(known, 10.0 ** (2 * np.minimum(rows - scale, 0.0)), 0.0).sum(axis=0)
    count = known.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = scale + np.log10(squares / count) / 2
    return np.where(count == 0, np.nan, np.where(np.isposinf(peak), np.inf, mean))


# how a number of all batches is made of those that are known; of those not named it is the mean
POOLED: dict[str, Callable[[np.ndarray], float]] = {
    **dict.fromkeys(("steps", "nonfinite"), np.max),
    **dict.fromkeys(("sequences", "sequences_rated", "cuts"), np.sum),
    **dict.fromkeys(("searched", "nonfinite_at", "channels", "gain_steps"), np.min),
    **dict.fromkeys(("half_life", "span"), _middle),  # infinite ones among them
    **dict.fromkeys(("level", "level_h"), lambda known: _rms(list(known[:, None]))[0]),
}


def agreed(
    probes: Sequence[Mapping[str, LayerProbe]], names: Sequence[str]
) -> tuple[dict[str, LayerProbe], list[str]]:
    """Every layer under the last of several probes, with a verdict where all agree.

    Intervals of gain and rate hold those of all probes, as in `gradflow.analyzer.agreement`.

    Args:
        probes: layer name -> its numbers, of each probe.
        names: of the probes, in words.

    Returns:
        Layer name -> its numbers; sentences.
    """
    found, said = {}, []
    for name, shown in probes[-1].items():
        every = [one[name] for one in probes if name in one]
        values = dict(shown.values)
        for end, least in (("low", min), ("high", max)):
            for what in ("gain", "rate"):
                ends = [one.values.get(f"{what}_{end}", math.nan) for one in every]
                if f"{what}_{end}" in values:
                    values[f"{what}_{end}"] = (
                        math.nan if any(map(math.isnan, ends)) else least(ends)
                    )
        verdicts = [one.verdict for one in every]
        same = len(set(verdicts)) == 1
        if not same:
            under = ", ".join(f"{verdict} under {probe}"
                              for verdict, probe in zip(verdicts, names, strict=False))  # fmt: skip
            said.append(f"{name} {DEPENDS}: {under}; give --input for a verdict")
        verdict = shown.verdict if same else "inconclusive"
        found[name] = replace(shown, values=values, verdict=verdict)
    return found, said
