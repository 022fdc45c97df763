"""The tables hold enough to draw the pictures by hand: numbers from them against those that were drawn.

What runs over steps, distances or units is in `run.frame(kind)`, which is what the CSVs hold; what has two
axes of its own is in ``run[name].data``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from seam import paint, paint_gates
from torch import nn

import gradflow
from gradflow.analysis import Analysis
from gradflow.reporter import KINDS

LN10 = math.log(10)
NAME = "rnn.l0"
Drawn = list[np.ndarray]


@pytest.fixture(scope="module")
def run() -> Analysis:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 12, 2), "head": nn.Linear(12, 1)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = model["rnn"], model["head"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]

    x, y = torch.randn(40, 4, 3), torch.randn(40, 4, 1)
    return gradflow.diagnose(Net(), x, target=y, loss=nn.MSELoss())


def table(run: Analysis, kind: str, layer: str = NAME) -> pd.DataFrame:
    frame = run.frame(kind)
    return frame[frame["layer"] == layer]


def log10(values: object) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log10(np.asarray(values, dtype=float))


# ---- pictures: units or steps against steps


def heat(run: Analysis, state: str) -> np.ndarray:
    data = run[NAME].data.sel(state=state)
    ranks = table(run, "units").query("state == @state").sort_values("memory_rank")
    return np.asarray(data["log10_grad"].values[ranks["unit"] - 1, ::-1])


def gain_map(run: Analysis) -> np.ndarray:
    gains = run[NAME].data["log_gain"].sel(norm="spectral").isel(sequence=0)
    return np.asarray(gains.transpose("target", "source").values / LN10)


def triangle(run: Analysis) -> np.ndarray:
    rows = run[NAME].data["log10_triangle"].sel(state="c").isel(sequence=0)
    values = rows.transpose("loss_step", "step").values
    return np.asarray(values - np.diag(values)[:, None])


def layers(run: Analysis, column: str) -> np.ndarray:
    rows = {name: log10(table(run, "steps", name)["grad_h_total"]) for name in list(run)[::-1]}
    shown = {name: log10(table(run, "steps", name)[column]) for name in rows}
    return np.stack(list(shown.values())) - next(iter(rows.values())).max()


def gate(run: Analysis, name: str) -> np.ndarray:
    ranks = table(run, "units").query("state == 'c'").sort_values("memory_rank")
    values = run[NAME].data["gate_value"].sel(gate=name).transpose("unit", "step").values
    return np.asarray((values + 1) / 2 if name == "g" else values)[ranks["unit"] - 1]


IMAGES: dict[str, Callable[[Analysis], Drawn]] = {
    "overview": lambda run: [paint(heat(run, "c"))],
    "gain-map": lambda run: [paint(gain_map(run))],
    "triangle": lambda run: [paint(triangle(run))],
    "states": lambda run: [paint(heat(run, "h")), paint(heat(run, "c"))],
    "layers": lambda run: [
        paint(layers(run, column)) for column in ("grad_h_total", "grad_input_norm")
    ],
    "saturation": lambda run: [paint_gates(gate(run, name)) for name in "ifgo"],
}


# ---- lines


def shares(run: Analysis) -> Drawn:
    lags = table(run, "lags")
    each = [lags[f"contribution_{name}"] for name in ("weight_hh", "weight_ih")]
    return [log10(one / one.sum()) for one in each]


def block(run: Analysis, code: str) -> np.ndarray:
    gains = run[NAME].data["log_block_gain"].sel(block=code)
    pairs = gains.to_series().dropna().reset_index(name="gain")
    by_lag = pairs.groupby(pairs["target"] - pairs["source"])["gain"].median()
    return by_lag.to_numpy() / LN10


LINES: dict[str, Callable[[Analysis], Drawn]] = {
    "total-vs-direct": lambda run: [
        log10(table(run, "steps")[f"grad_h_{kind}"]) for kind in ("total", "last", "direct")
    ],
    "lag-curve": lambda run: [table(run, "lags")["median"].to_numpy() / LN10],
    "lag-gradient": shares,
    "rank": lambda run: [log10(run[NAME].data["rank_surviving"])],
    "lyapunov": lambda run: [run[NAME].data["lyapunov"].values],
    "paths": lambda run: [log10(run[NAME].data["path_gain"].isel(path=0))],
    "blocks": lambda run: [block(run, str(code)) for code in run[NAME].data["block"].values],
    "gates": lambda run: [table(run, "steps")[f"gate_{name}_mean"].to_numpy() for name in "ifgo"],
}


def test_every_picture_is_drawn_by_hand() -> None:
    by_bars, of_linear_layers = {"time-scales"}, {"heads"}  # below
    assert {*IMAGES, *LINES} | by_bars | of_linear_layers == set(KINDS)


def axes_of(run: Analysis, kind: str) -> list[Axes]:
    return gradflow.plot(run, kind, layer=None if kind == "layers" else NAME).axes


@pytest.mark.parametrize("kind", IMAGES)
def test_a_picture_has_the_colours_of_the_table(run: Analysis, kind: str) -> None:
    wanted = IMAGES[kind](run)
    images = [np.asarray(image.get_array()) for ax in axes_of(run, kind) for image in ax.images]
    for one in wanted:
        assert any(one.shape == image.shape and (one == image).all() for image in images)
        wrong = one[::-1]  # the comparison can fail
        assert not any(wrong.shape == image.shape and (wrong == image).all() for image in images)


@pytest.mark.parametrize("kind", LINES)
def test_a_line_has_the_numbers_of_the_table(run: Analysis, kind: str) -> None:
    drawn = [np.asarray(line.get_ydata(), float) for ax in axes_of(run, kind) for line in ax.lines]
    for wanted in LINES[kind](run):
        shown = np.where(np.isfinite(wanted), wanted, np.nan)
        assert any(same(shown, line) for line in drawn), kind
        assert not any(same(shown + 0.01, line) for line in drawn)


def same(wanted: np.ndarray, line: np.ndarray) -> bool:
    """Whether a line is the beginning of what a table holds; what is gone may be left out."""
    if len(line) < 5:
        return False
    known = np.flatnonzero(~np.isnan(wanted[: len(line)]))
    return len(known) > 4 and np.allclose(wanted[known], line[known], rtol=1e-9, atol=0)


def test_bars_count_the_units_of_the_table(run: Analysis) -> None:
    scales = table(run, "units").query("state == 'c'")["time_scale"]
    bars = [bar for bar in axes_of(run, "time-scales")[0].patches if bar.get_height()]
    places = [(bar.get_x(), bar.get_x() + bar.get_width() / 0.92) for bar in bars]
    counts = [((log10(scales) >= low) & (log10(scales) < high)).sum() for low, high in places]
    assert counts == [bar.get_height() for bar in bars] and sum(counts) == 12


def test_heads_have_the_colours_of_the_table() -> None:
    torch.manual_seed(0)
    keys = nn.functional.normalize(torch.randn(1, 20, 3, 4), dim=-1)
    decay, beta = torch.tensor([0.6, 0.9, 0.99]).expand(1, 20, 3), torch.full((1, 20, 3), 0.3)
    write = nn.Parameter(torch.randn(1, 20, 3, 4, 2))
    state, states = torch.zeros(1, 3, 4, 2), []
    for t in range(20):
        key, state = keys[:, t, :, :, None], decay[:, t, :, None, None] * state
        state = state - 0.3 * key * (key * state).sum(2, keepdim=True) + write[:, t]
        states.append(state)
    model = nn.ParameterList([write])
    with gradflow.record(model) as recording:
        h = gradflow.scan(
            torch.stack(states, 1),
            decay=decay[..., None, None],
            keys=keys,
            beta=beta,
            time=1,
            name="delta",
        )
        h[:, -1].square().sum().backward()
    run = gradflow.analyze(recording)
    heads, gains = run.frame("heads"), run.frame("head_lags")
    lags = np.sort(gains["lag"].unique())
    by_head = gains.pivot(index="head", columns="lag", values="median")
    ranks = heads.sort_values("gain", ascending=False)["head"]
    columns = np.geomspace(lags[0], lags[-1] + 1e-9, 240)
    nearest = np.searchsorted(np.sqrt(lags[:-1] * lags[1:]), columns)
    wanted = paint(by_head.loc[ranks].to_numpy()[:, nearest] / LN10)
    (image,) = gradflow.plot(run, "heads").axes[0].images
    assert (np.asarray(image.get_array()) == wanted).all()
    assert not (np.asarray(image.get_array()) == wanted[::-1]).all()
