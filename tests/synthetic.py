"""Analyses made up from formulas, so that the reporter can be tested without running a model.

Every layer's gain is exp(rate · lag) times noise, its gradient the same with a spread over units.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from gradflow.analysis import Analysis, Finding, LayerAnalysis, Prediction, Rate
from gradflow.recording import Parity

GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}
BAND = math.log(10)


def dataset(
    cell: str, rate: float, steps: int, hidden: int, *, seed: int = 0, carrying: int = 0
) -> xr.Dataset:
    """The arrays of one layer; ``carrying`` units keep their gradient whatever the rate."""
    random = np.random.default_rng(seed)
    states = ["h", "c"] if cell == "LSTM" else ["h"]
    gates = list(GATES.get(cell, ()))
    sequences, stride = 8, max(1, steps // 250)
    lag = np.arange(steps)
    walk = np.cumsum(random.normal(0, 0.05, (sequences, steps)), axis=1)
    curve = (0 if carrying else rate) * lag
    back = np.arange(steps)
    decades = np.empty((len(states), hidden, steps))
    for index in range(len(states)):
        spread = np.sort(random.normal(0, 0.35, hidden))[::-1, None]
        unit_rate = np.full((hidden, 1), rate)
        unit_rate[:carrying] = 0.0
        noise = random.normal(0, 0.25, (hidden, steps))
        decades[index] = spread + unit_rate * back / math.log(10) + noise
    shuffle = random.permutation(hidden)
    decades[:, shuffle] = decades.copy()
    order = np.stack([np.argsort(-decades[i].mean(axis=1)) for i in range(len(states))])
    points = np.arange(0, steps, stride)
    gap = points[None, :] - points[:, None]  # [source, target]
    gain = np.where(gap >= 0, np.interp(np.maximum(gap, 0), lag, curve), np.nan)
    gain = gain + np.where(gap > 0, 0.15 * np.sin(points / 7.0)[None, :], 0.0)
    blocks = ["hh", "hc", "ch", "cc"] if cell == "LSTM" else []
    reach = max(1, steps - 1)
    rank_lag = np.array([1 << n for n in range(reach.bit_length()) if 1 << n < reach] + [reach])
    norms = np.exp(np.clip(curve[::-1], -700, 700))
    direct = np.zeros(steps)
    direct[-1] = 1.0
    grad_norm = np.full((3, len(states), steps), np.nan)
    grad_norm[0], grad_norm[1, 0], grad_norm[2] = norms, direct, norms
    made = xr.Dataset(
        {
            "log_gain": (
                ("norm", "sequence", "source", "target"),
                np.stack([gain, gain - 0.5 * np.log(2), gain - 1.0])[:, None],
            ),
            "log_block_gain": (
                ("block", "sequence", "source", "target"),
                np.stack([gain - 0.3 * place for place in range(len(blocks))] or [gain])[:, None][
                    : len(blocks)
                ],
            ),
            "log_cell_path": (
                ("sequence", "source", "target"),
                (gain - 1.5 if blocks else gain * np.nan)[None],
            ),
            "rank_stable": (("rank_lag",), 1 + (hidden / 4 - 1) / rank_lag),
            "rank_effective": (("rank_lag",), 1 + (hidden / 2 - 1) / rank_lag),
            "rank_surviving": (("rank_lag",), np.floor(hidden * np.exp(-rank_lag / 20))),
            "log_singular": (("sequence", "index"), np.sort(-random.random((1, 4)))[:, ::-1]),
            "lag_median": (("lag",), curve),
            "lag_low": (("lag",), curve + np.quantile(walk, 0.1, axis=0)),
            "lag_high": (("lag",), curve + np.quantile(walk, 0.9, axis=0)),
            "lag_count": (("lag",), steps - lag),
            "lag_zero_share": (("lag",), np.zeros(steps)),
            "lag_slope": (("lag",), np.concatenate([[np.nan], np.diff(curve)])),
            "lag_fit": (("lag",), (0 if carrying else rate) * lag),
            "sequence_rate": (("batch",), np.full(sequences, rate)),
            "length": (("batch",), np.full(sequences, steps)),
            "log10_grad": (("state", "unit", "back"), decades),
            "unit_order": (("state", "unit"), order),
            "grad_norm": (("kind", "state", "step"), grad_norm),
            "gate_mean": (("gate", "step"), np.full((len(gates), steps), 0.5)),
            "gate_closed": (("gate", "step"), np.full((len(gates), steps), 0.1)),
            "gate_open": (("gate", "step"), np.full((len(gates), steps), 0.05)),
            "state_norm": (("state", "step"), np.full((len(states), steps), 0.4)),
            "memory_steps": (("state", "unit"), np.full((len(states), hidden), 7.0)),
        },
        coords={
            "norm": ["spectral", "rms", "loss"],
            "block": np.array(blocks, dtype="<U8"),
            "rank_lag": rank_lag,
            "sequence": [3],
            "source": points,
            "target": points,
            "lag": lag,
            "back": back,
            "step": np.arange(steps),
            "state": states,
            "unit": np.arange(hidden),
            "kind": ["total", "direct", "last"],
            "gate": np.array(gates, dtype="<U8"),
        },
    )
    return made.assign(
        **_where_the_loss_acts(made, 0 if carrying else rate),
        **_why(made, cell, 0 if carrying else rate, random),
    )


def _where_the_loss_acts(data: xr.Dataset, rate: float) -> dict[str, Any]:
    """A loss at every step, each pulled back at the layer's rate; the parts of ∂L/∂W by lag."""
    steps, states = data.sizes["step"], data.sizes["state"]
    every = np.arange(0, steps, max(1, steps // 250))
    back = every[:, None] - np.arange(steps)[None, :]  # [loss step, step]
    triangle = np.where(back >= 0, rate * back / math.log(10) - 0.3, np.nan)
    parts = np.exp(np.clip(rate * np.arange(steps), -600, 600)) * np.array([[1.0], [0.4]])
    missing = 1 - np.cumsum(parts, axis=1) / parts.sum(axis=1, keepdims=True)
    missing = np.maximum(missing, 0)
    within = [[np.argmax(row <= bound) + 1.0 for bound in (0.01, 0.05, 0.1)] for row in missing]
    names = ["weight_hh", "weight_ih"]
    depth = (parts * np.arange(steps)).sum(axis=1) / parts.sum(axis=1)
    coords = {"parameter": names}
    return {
        "log10_triangle": xr.DataArray(
            np.broadcast_to(triangle, (states, 1, *triangle.shape)).copy(),
            {"loss_step": every},
            ("state", "sequence", "loss_step", "step"),
        ),
        "lag_contribution": xr.DataArray(parts, coords, ("parameter", "lag")),
        "truncation_error": xr.DataArray(missing, coords, ("parameter", "lag")),
        "cancellation": xr.DataArray([0.8, 0.95], coords, ("parameter",)),
        "gradient_depth": xr.DataArray(depth, coords, ("parameter",)),
        "truncation_window": xr.DataArray(
            within, coords | {"tolerance": [0.01, 0.05, 0.1]}, ("parameter", "tolerance")
        ),
    }


def _why(data: xr.Dataset, cell: str, rate: float, random: np.random.Generator) -> dict[str, Any]:
    """Ranks, exponents, gates by unit, paths and blocks, as the cell has them."""
    steps, hidden, gates = data.sizes["step"], data.sizes["unit"], list(data["gate"].values)
    lstm, size = cell == "LSTM", hidden * data.sizes["state"]
    lags = sorted({2**n for n in range(12) if 2**n < steps} | {max(1, steps - 1)})
    share = np.exp(np.clip(rate, -2, 0) * np.array(lags) / 4)
    gain = data["log_gain"].sel(norm="rms", drop=True)
    blocks = ["hh", "hc", "ch", "cc"] if lstm else []
    shift = np.array([-2.0, -1.2, -0.6, 0.0])[: len(blocks)]
    block = gain.values[None] + shift[:, None, None, None]
    names = ["forget gate", "through f", "through i", "through g", "total"] if lstm else []
    wave = 0.1 * np.sin(np.arange(steps) / 5)
    levels = np.array([0.8, 0.05, 0.1, 0.2, 0.9])[: len(names), None]
    unit = np.linspace(0.02, 0.99, hidden)[None, :, None]
    value = np.clip(unit + wave[None, None], 0, 1) * np.ones((len(gates), 1, 1))
    exponents = rate - 0.1 * np.arange(min(size, 16))
    trace = exponents[:8, None] + 0.3 / (1 + np.arange(steps))[None]
    trace = np.pad(trace, ((0, max(0, len(exponents) - 8)), (0, 0)), constant_values=np.nan)
    scale = np.exp(random.normal(1.5, 1.0, hidden)) if gates else np.full(hidden, np.nan)
    saturated = np.linspace(0, 0.6, hidden) * np.ones((data.sizes["state"], 1))
    if cell == "RNN_RELU":
        saturated = saturated * np.nan
    idle = np.linspace(0, 1, hidden) * (1.0 if cell == "RNN_RELU" else np.nan)
    lag_dims = {"rank_lag": lags}
    rows = {"gate": data["gate"].values}
    return {
        "rank_stable": xr.DataArray(1 + (size / 4) * share, lag_dims, ("rank_lag",)),
        "rank_effective": xr.DataArray(1 + (size - 1) * share, lag_dims, ("rank_lag",)),
        "rank_surviving": xr.DataArray(np.round(size * share**4), lag_dims, ("rank_lag",)),
        "log_block_gain": xr.DataArray(
            block, {"block": np.array(blocks, dtype="<U8")}, ("block", *gain.dims)
        ),
        "log_cell_path": (gain - 0.2) * (1.0 if lstm else np.nan),
        "path_gain": xr.DataArray(
            levels * np.exp(wave), {"path": np.array(names, dtype="<U16")}, ("path", "step")
        ),
        "gate_value": xr.DataArray(value, rows, ("gate", "unit", "step")),
        "gate_unit_closed": xr.DataArray((value < 0.05).mean(axis=2), rows, ("gate", "unit")),
        "gate_unit_open": xr.DataArray((value > 0.95).mean(axis=2), rows, ("gate", "unit")),
        "time_scale": xr.DataArray(scale, dims=("unit",)),
        "unit_saturated": xr.DataArray(saturated, dims=("state", "unit")),
        "unit_idle": xr.DataArray(idle, dims=("unit",)),
        "grad_input_norm": 0.3 * data["grad_norm"].sel(kind="total", state="h", drop=True),
        "lyapunov": xr.DataArray(exponents, dims=("index_k",)),
        "lyapunov_low": xr.DataArray(exponents - 0.03, dims=("index_k",)),
        "lyapunov_high": xr.DataArray(exponents + 0.03, dims=("index_k",)),
        "lyapunov_trace": xr.DataArray(trace, dims=("index_k", "step")),
        "sum_rule": xr.DataArray(
            [exponents.sum(), exponents.sum() + 1e-3], {"side": ["measured", "exact"]}, ("side",)
        ),
    }


NEW = (
    "log10_triangle", "lag_contribution", "truncation_error", "cancellation", "gradient_depth",
    "truncation_window", "rank_stable", "rank_effective", "rank_surviving", "log_block_gain",
    "log_cell_path", "path_gain", "gate_value", "gate_unit_closed", "gate_unit_open", "time_scale",
    "unit_saturated", "unit_idle", "grad_input_norm", "lyapunov", "lyapunov_low", "lyapunov_high",
    "lyapunov_trace", "sum_rule",
)  # fmt: skip


def older(one: LayerAnalysis) -> LayerAnalysis:
    """The same layer, saved before these variables were measured."""
    return replace(one, data=one.data.drop_vars(NEW))


def finding(layer: str, name: str = "vanishing", **changes: Any) -> Finding:
    """A finding with every field filled."""
    made = Finding(
        name=name,
        layer=layer,
        message="the gradient loses 38.3 decades over 90 steps: rate −0.980 [−1.010, −0.950] per "
        "step, below −0.0256",
        where="8 sequences",
        value=-0.98,
        low=-1.01,
        high=-0.95,
        threshold=-0.0256,
        source="Jozefowicz et al. 2015; Tallec & Ollivier 2018",
        severity=-38.3,
        advice="raise the forget gate's bias by 1 (its mean is 0.50), or use chrono initialisation "
        "from the range of the task",
        code="model.rnn.bias_ih_l0.data[32:64] += 1.0  # the forget gate's block",
    )
    return replace(made, **changes)


def prediction(amount: int = 1, **changes: Any) -> Prediction:
    """What a larger forget bias would make of a layer."""
    words = f"forget bias + {amount}"
    made = Prediction(
        remedy="forget_bias",
        value=float(amount),
        words=words,
        verdict="vanishing",
        rate=Rate(-0.31 / amount, -0.33 / amount, -0.29 / amount),
        half_life=2.24 * amount,
        horizon=22 * amount,
        searched=99,
        channels=3,
        helps=29.1 * amount,
        batch="this batch",
        message=f"{words}: still vanishing, rate −0.98 → −{0.31 / amount:.3g} per step, gone in every "
        f"direction after 8 → {22 * amount} steps, 0 → 3 of 32 channels",
    )
    return replace(made, **changes)


def layer(
    name: str = "rnn.l0",
    cell: str = "RNN_TANH",
    rate: float = -0.98,
    steps: int = 100,
    hidden: int = 32,
    **changes: Any,
) -> LayerAnalysis:
    """One layer whose verdict follows from its rate; ``changes`` replace any field."""
    carrying = changes.pop("carrying", 0)
    data = dataset(cell, rate, steps, hidden, seed=len(name), carrying=carrying)
    shown = 0.0 if carrying else rate
    band = BAND / steps
    verdict = "stable" if abs(shown) < band else "vanishing" if shown < 0 else "exploding"
    horizon = next((k for k in range(1, steps) if shown * k < math.log(1e-3)), None)
    kind = cell.split("_")[0]
    if carrying:
        title = f"{kind}: one cell of {hidden} carries the gradient all {steps} steps"
    elif horizon is None:
        title = f"{kind}: the gradient reaches back all {steps} steps"
    else:
        title = f"{kind}: this loss's gradient is gone {horizon} steps before it"
    made = LayerAnalysis(
        name=name,
        cell=cell,
        reverse=name.endswith("_reverse"),
        hidden=hidden,
        size=2 * hidden if cell == "LSTM" else hidden,
        steps=steps,
        sequences=8,
        span=steps,
        verdict=verdict,
        labels=(),
        rate=Rate(shown, shown - 0.003, shown + 0.003),
        half_life=math.log(2) / -shown if shown < 0 else math.inf,
        horizon=horizon,
        searched=steps - 1,
        channels=carrying or (0 if verdict == "vanishing" else hidden),
        lyapunov=np.array([shown, shown - 0.1]),
        findings=() if verdict == "stable" else (finding(name),),
        parity=Parity("passed", 3e-7, "weight_hh rebuilt from δ_t equals the recorded gradient"),
        sentence=f"{name} ({kind}, {hidden} units): {title.split(': ')[1]}, "
        f"{verdict} at {shown:+.3f} nats per step.",
        title=title,
        gradient_note="",
        method="exact",
        data=data,
    )
    return replace(made, **changes)


def analysis(*layers: LayerAnalysis, **changes: Any) -> Analysis:
    """An analysis of these layers."""
    made = Analysis(
        title="Net",
        layers={one.name: one for one in layers},
        warnings=(),
        provenance={"gradflow": "0.1", "torch": "2.13.0", "method": "exact", "seed": 0},
    )
    return replace(made, **changes)


def vanishing(steps: int = 100) -> Analysis:
    """A plain RNN at rate −0.98."""
    return analysis(layer(steps=steps), title="RNN net")


def carrying() -> Analysis:
    """A trained LSTM in which one cell keeps the gradient."""
    return analysis(layer("lstm.l0", "LSTM", -0.14, carrying=1), title="LSTM net")


def exploding() -> Analysis:
    """A GRU whose gain grows by a factor of 1.35 per step."""
    return analysis(layer("gru.l0", "GRU", 0.3, hidden=16), title="GRU net")


def zero(one: LayerAnalysis) -> LayerAnalysis:
    """The same layer, cut by exact zeros from eight steps on."""
    data = one.data.copy(deep=True)
    data["log10_grad"] = data["log10_grad"].where(data["back"] < 8, -np.inf)
    for name in ("lag_median", "lag_low", "lag_high"):
        data[name] = data[name].where(data["lag"] < 8, -np.inf)
    data["lag_zero_share"] = (data["lag"] >= 8).astype(float)
    gap = data["target"] - data["source"]
    data["log_gain"] = data["log_gain"].where(gap < 8, -np.inf)
    data["log_gain"] = data["log_gain"].where(gap >= 0)
    nothing = Rate(-math.inf, -math.inf, -math.inf)
    title = f"{one.cell.split('_')[0]}: exact zeros cut every path 8 steps before the loss"
    return replace(
        one, data=data, verdict="dead", rate=nothing, horizon=8, half_life=1.0, channels=0,
        title=title, sentence=f"{one.name}: exact zeros cut every path after 8 steps.",
    )  # fmt: skip


def broken(one: LayerAnalysis) -> LayerAnalysis:
    """The same layer, whose gradient is infinite from 27 steps back."""
    data = one.data.copy(deep=True)
    data["log10_grad"] = data["log10_grad"].where(data["back"] < 27, np.inf)
    nothing = Rate(math.nan, math.nan, math.nan)
    return replace(
        one, data=data, verdict="inconclusive", labels=("not finite",), rate=nothing,
        half_life=math.inf, horizon=None, channels=None, lyapunov=None,
        title="RNN: NaN or Inf from step 73 backwards",
        sentence=f"{one.name}: NaN or Inf from step 73 backwards.",
    )  # fmt: skip


def without_gradient(one: LayerAnalysis) -> LayerAnalysis:
    """The same layer, which no backward reached."""
    data = one.data.copy(deep=True)
    data["log10_grad"] = data["log10_grad"] * np.nan
    data["grad_norm"] = data["grad_norm"] * np.nan
    for name in ("log10_triangle", "lag_contribution", "truncation_error", "truncation_window",
                 "cancellation", "gradient_depth", "grad_input_norm"):  # fmt: skip
        data[name] = data[name] * np.nan
    note = (
        f"{one.name} has no gradient: the backward did not reach this layer; "
        "its output is not used by the loss, or it was detached"
    )
    return replace(one, data=data, gradient_note=note)


def single_step() -> Analysis:
    """T = 1: no recurrence is exercised."""
    nothing = Rate(math.nan, math.nan, math.nan)
    one = layer(steps=1)
    one = replace(
        one, verdict="inconclusive", labels=("no recurrence", "short"), rate=nothing, channels=None,
        half_life=math.inf, horizon=None, lyapunov=None, findings=(),
        title="RNN: one step only, so no recurrence to measure",
        sentence="rnn.l0: with T = 1 no recurrence is exercised.",
    )  # fmt: skip
    return analysis(one)


def bidirectional() -> Analysis:
    """Two layers, two directions."""
    names = ["l0", "l0_reverse", "l1", "l1_reverse"]
    return analysis(*(layer(f"rnn.{name}", "GRU", -0.09) for name in names), title="BiGRU")


def twelve() -> Analysis:
    """Twelve layers, from vanishing to exploding."""
    rates = np.linspace(-0.9, 0.25, 12)
    many = [layer(f"stack.l{i}", "LSTM", float(rate)) for i, rate in enumerate(rates)]
    return analysis(*many, title="Deep stack")


def predicted() -> Analysis:
    """Three layers with remedies that were tried on all of them together."""
    batch = "this batch, 3 layers changed together"
    tried = (prediction(2, batch=batch), prediction(1, batch=batch))
    many = [layer(f"rnn.l{i}", "LSTM", predictions=tried) for i in range(3)]
    return analysis(*many, title="Tried")


def crowded() -> Analysis:
    """Three layers with long names, two warnings, three findings and what was tried: much to say."""
    batch = "this batch, 3 layers changed together (what other modules feed it is taken as it was "
    batch += "recorded)"
    tried = (prediction(2, batch=batch), prediction(1, batch=batch))
    owner = "encoder.temporal_backbone.context_recurrent_layer_number_"
    many = []
    for number in ("one", "two", "three"):
        path, name = f"model.{owner}{number}", f"{owner}{number}.l0"
        chrono = finding(
            name,
            "forget-gates-leak",
            message="forget gates average 0.05: cells keep their memory for 0.326 steps, of your 100",
            where="gate f, 61% of its values closed, below 0.05",
            code=f"{path}.bias_hh_l0.data[:64] = 0.0\n{path}.bias_ih_l0.data[32:64].uniform_(1, 99)"
            f".log_()\n{path}.bias_ih_l0.data[:32] = -{path}.bias_ih_l0.data[32:64]",
        )
        many.append(
            layer(
                name, "LSTM", predictions=tried, findings=(finding(name), chrono),
                labels=("range-limited",),
                sentence=f"{name} vanishes: the gradient shrinks 2.66-fold at every step and is gone "
                "in every direction after 8 of your 100 steps",
                title=f"{name} (LSTM): this loss's gradient is gone 8 steps before it",
            )
        )  # fmt: skip
    return analysis(
        *many,
        title="Crowded",
        warnings=(
            "gains of all 3 layers leave the range of float32: there the model's own gradient is 0 or "
            "infinite",
            "the loss reaches all 3 layers from many steps at once: the total gradient need not fade "
            "even where nothing flows; read the profile of the last loss step alone",
        ),
    )


def everything() -> Analysis:
    """One analysis with a layer of every kind."""
    return analysis(
        layer(),
        layer("lstm.l0", "LSTM", -0.14, carrying=1),
        zero(layer("relu.l0", "RNN_RELU", -0.3)),
        broken(layer("bad.l0")),
        without_gradient(layer("frozen.l0", "GRU", -0.05)),
        title="Everything",
        warnings=(
            "Gradients are perhaps still scaled: a GradScaler was seen.",
            "the loss reads rnn.l0 at nearly every step: its total gradient need not fade even "
            "where nothing flows; read the profile of the last loss step alone",
        ),
    )


CASES = {
    "vanishing": vanishing,
    "carrying": carrying,
    "exploding": exploding,
    "single_step": single_step,
    "bidirectional": bidirectional,
    "twelve": twelve,
    "predicted": predicted,
    "crowded": crowded,
    "everything": everything,
    "long": lambda: vanishing(steps=1000),
    "short": lambda: vanishing(steps=10),
}
