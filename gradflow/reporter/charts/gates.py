"""How the gates stand over the steps, on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.cells import Keeper, called
from gradflow.reporter.charts.chart import (
    DASHED,
    DOTTED,
    Chart,
    key,
    label_steps,
    measured,
    own_cell,
)
from gradflow.reporter.numbers import number_words, percent_words
from gradflow.reporter.readout import Curves, tell
from gradflow.reporter.scale import SERIES

DASHES = ("-", DASHED, DOTTED, (0, (4, 1.5, 1, 1.5)))


@dataclass(frozen=True, kw_only=True)
class Gates(Chart):
    """Averages over units and sequences."""

    names: tuple[str, ...]
    step: np.ndarray  # (T,) counted from 1
    mean: np.ndarray  # (G, T)
    closed: np.ndarray  # (G, T) share of units and sequences below 0.05
    open: np.ndarray  # (G, T) share above 0.95


def prepare(layer: LayerAnalysis) -> Gates:
    """Mean activation and the shares closed and open of every gate, input-time order."""
    names = tuple(str(gate) for gate in layer.data["gate"].values)
    mean, closed, opened = (
        layer.data[f"gate_{what}"].transpose("gate", "step").values
        for what in ("mean", "closed", "open")
    )
    # a share of gates that are NaN is no share
    closed, opened = (np.where(np.isnan(mean), np.nan, share) for share in (closed, opened))
    spec = called(layer.cell)
    keeper = None if spec is None else spec.keeper
    note = "" if names else f"{layer.cell} has no gates."
    if own_cell(layer):
        note = "The gates of a cell of your own are not known, if it has any."
    if names and measured(layer, "gate_mean") is None:
        note = "No gate was measured at any step."
    return Gates(
        message="" if note else _message(keeper, names, mean, closed, opened),
        reading="Averages over units and sequences, at every step."
        + ("" if keeper is None or not names else f" {keeper.reading}"),
        note=note,
        names=names,
        step=np.arange(1, layer.data.sizes["step"] + 1),
        mean=mean,
        closed=closed,
        open=opened,
        labels=layer.step_labels,
    )


def _message(
    keeper: Keeper | None,
    names: Sequence[str],
    mean: np.ndarray,
    closed: np.ndarray,
    opened: np.ndarray,
) -> str:
    """How the gate that keeps the state stands, else the first."""
    place = 0 if keeper is None else names.index(keeper.gate)
    kind = f"gate {names[place]}" if keeper is None else f"{keeper.name} gate"
    shares = [np.nanmean(row[place]) if not np.isnan(row[place]).all() else np.nan
              for row in (mean, closed, opened)]  # fmt: skip
    said = f"the {kind} is {number_words(float(shares[0]))} on average"
    if np.isnan(shares[1:]).any():
        return said
    return f"{said}: closed {percent_words(shares[1])} of the time, open {percent_words(shares[2])}"


def draw(axes: Sequence[Axes], gates: Gates) -> None:
    """Mean, share closed and share open of every gate over the steps."""
    rows = (("mean", gates.mean), ("closed", gates.closed), ("open", gates.open))
    for number, (ax, (name, values)) in enumerate(zip(axes, rows, strict=False)):
        for place, (gate, line) in enumerate(zip(gates.names, values, strict=True)):
            lone = "." if (~np.isnan(line)).sum() < 3 else None
            ax.plot(gates.step, line, lw=1.4, label=gate, color=SERIES[place % len(SERIES)],
                    ls=DASHES[place % len(DASHES)], marker=lone)  # fmt: skip
        tell(ax, Curves(gates.step, list(zip(gates.names, values, strict=True)), log10=False))
        ax.set_ylabel(name, labelpad=2)
        ax.set_xlim(0.5, len(gates.step) + 0.5)
        ax.set_ylim(min(0.0, float(np.nanmin([0, *values.ravel()]))) - 0.03, 1.03)
        label_steps(ax.xaxis, gates.labels, gates.step[: len(gates.labels)], 6)
        ax.tick_params(labelbottom=number == len(axes) - 1)
    axes[-1].set_xlabel("step", labelpad=2)
    key(axes[0], len(gates.names))
