"""How one layer went through a training, ready for pictures and sentences: arrays over its probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from gradflow.history import History
from gradflow.limits import GONE_DECADES

# fmt: off
OF_LAYER = ("rate", "rate_low", "rate_high", "rate_settling", "rate_settled", "half_life", "horizon",
            "searched", "span", "nonfinite", "nonfinite_at", "grad_norm", "grad_norm_clipped", "saturated",
            "cuts", "steps", "sequences", "batches")
OF_STEP = ("loss", "clipped", "grad_norm_all", "grad_norm_all_clipped", "updated", "probe_seconds",
           "step_seconds")
# fmt: on


@dataclass(frozen=True)
class Course:
    """One layer of a history. N probes, K lags, G gates; NaN where a number was not measured."""

    run: str  # the history's name where several are shown, else ""
    layer: str  # its name
    cell: str  # kind of cell
    step: np.ndarray  # (N,) training step of every probe, rising
    verdict: np.ndarray  # (N,) a word, "" without one
    numbers: dict[str, np.ndarray]  # name of `OF_LAYER` or `OF_STEP` -> (N,)
    lag: np.ndarray  # (K,) steps back from the loss
    profile: np.ndarray  # (N, K) log10 over that at the loss; -inf exact zero, NaN no such step
    direct: np.ndarray  # (N, K) the same of the direct part
    gates: tuple[str, ...]  # names
    of_gate: dict[str, np.ndarray]  # name of a number -> (N, G)
    learning_rate: np.ndarray  # (N,) the largest of any group
    counted_in: str  # what `step` counts: "update", "epoch", …
    noun: str  # what a probe is: "probe" of a training, "checkpoint" of a sweep

    @property
    def name(self) -> str:
        """The layer's name, with that of its run where there are several."""
        return " — ".join(part for part in (self.run, self.layer) if part)

    @property
    def bad(self) -> np.ndarray:
        """(N,) true where a state or a gradient was NaN or Inf."""
        return self.numbers["nonfinite"] == 1

    @property
    def reach(self) -> np.ndarray:
        """(N,) how many steps back the gain stays above 10⁻³, inf where it never falls below it.

        Where the horizon lies beyond what was searched, that is how many steps were; where no gain was
        measured, the same of the gradient of the last loss step.
        """
        horizon, searched = self.numbers["horizon"], self.numbers["searched"]
        known = np.where(np.isnan(horizon) & (searched > 0), searched, horizon)
        return np.where(np.isnan(known), self.gone, known)

    @property
    def gone(self) -> np.ndarray:
        """(N,) first lag at which the gradient of the last loss step is below 10⁻³; inf where none is."""
        below = self.profile < GONE_DECADES
        first = below.argmax(axis=1) if below.size else np.zeros(len(self.step), dtype=int)
        known = ~np.isnan(self.profile).all(axis=1)
        lag = self.lag[first] if len(self.lag) else np.zeros(len(self.step))
        return np.where(known, np.where(below.any(axis=1), lag, np.inf), np.nan)

    @property
    def has_gains(self) -> bool:
        """Whether gains were measured, not the gradient's profile alone."""
        return bool((~np.isnan(self.numbers["rate"])).any() or np.any(self.verdict != ""))


def course(history: History, layer: str, run: str = "", data: xr.Dataset | None = None) -> Course:
    """One layer of a history.

    Args:
        history: as `gradflow.load` reads it.
        layer: its name.
        run: what the history is called where several are shown.
        data: a part of its data; by default all of it.

    Returns:
        Its course, by rising training step; of probes of one step the last.
    """
    data = _ordered(history.data if data is None else data)
    one = data.sel(layer=layer)
    rates = data["learning_rate"].values
    known = ~np.isnan(one["gate_mean"].values).all(axis=0)
    return Course(
        run=run,
        layer=layer,
        cell=history.cells.get(layer, ""),
        step=data["step"].values,
        verdict=one["verdict"].values.astype(str),
        numbers={name: one[name].values for name in OF_LAYER}
        | {name: data[name].values for name in OF_STEP},
        lag=data["lag"].values,
        profile=one["profile"].values.astype(float),
        direct=one["direct"].values.astype(float),
        gates=tuple(str(gate) for gate in one["gate"].values[known]),
        of_gate={name: one[name].values[:, known].astype(float) for name in
                 ("gate_mean", "gate_low", "gate_high", "gate_closed", "gate_open")},
        learning_rate=_largest(rates),
        counted_in=history.counted_in,
        noun="checkpoint" if history.swept else "probe",
    )  # fmt: skip


def courses(
    histories: Sequence[History], layer: str | None = None, names: Sequence[str] | None = None
) -> list[Course]:
    """Every layer of every history and run of it, those of one run in the order in which they ran."""
    names = names or run_names([history.title for history in histories])
    found = []
    for history, name in zip(histories, names, strict=True):
        wanted = None if layer is None else _named(history, layer)
        for run, one in history.runs.items():
            words = "/".join(filter(None, [name, run]))
            found += [course(one, known, words) for known in one.layers if wanted in (None, known)]
    return found


def run_names(titles: Sequence[str]) -> list[str]:
    """What each of several runs is called; one alone needs no name.

    >>> run_names(["Net"]), run_names(["rnn", "lstm"]), run_names(["Net", "Net"])
    ([''], ['rnn', 'lstm'], ['Net (1)', 'Net (2)'])
    """
    if len(titles) == 1:
        return [""]
    return [
        title if titles.count(title) == 1 else f"{title} ({titles[: place + 1].count(title)})"
        for place, title in enumerate(titles)
    ]


def _named(history: History, layer: str) -> str:
    return str(history[layer]["layer"].item())


def _ordered(data: xr.Dataset) -> xr.Dataset:
    """By rising training step: a run that went on from an earlier checkpoint wrote some steps twice."""
    steps = data["step"].values
    last = {int(step): place for place, step in enumerate(steps)}
    places = [last[step] for step in sorted(last)]
    return data if places == list(range(len(steps))) else data.isel(step=places)


def _largest(rates: np.ndarray) -> np.ndarray:
    """The largest learning rate of any group, (N,)."""
    if not rates.size:
        return np.full(len(rates), np.nan)
    top = np.fmax.reduce(rates, axis=1)
    return np.asarray(top, dtype=float)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The lower running median over so many probes, fewer at the ends; always one of the values.

    >>> smooth(np.array([5.0, 5.0, 90.0, 5.0, 6.0]), 3).tolist()
    [5.0, 5.0, 5.0, 6.0, 5.0]
    """
    half = width // 2
    padded = np.pad(values.astype(float), half, constant_values=np.nan)
    rows = np.stack([padded[start : start + len(values)] for start in range(2 * half + 1)])
    ordered = np.sort(rows, axis=0)  # NaN go last
    middle = np.maximum((np.sum(~np.isnan(ordered), axis=0) - 1) // 2, 0)
    return np.asarray(np.take_along_axis(ordered, middle[None], axis=0)[0], dtype=float)
