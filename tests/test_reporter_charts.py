"""The newer charts: what is handed to them, what they say, and that they draw whatever comes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic
from matplotlib.figure import Figure
from seam import (
    Line,
    Picture,
    blocks,
    draw_log_lines,
    gain_map,
    gates,
    lag_gradient,
    layers,
    lyapunov,
    paths,
    rank,
    saturation,
    states,
    time_scales,
)
from seam import charts_lag_curve as lag_curve
from seam import charts_triangle as triangle
from test_reporter_figures import overlapping

from gradflow.analysis import LayerAnalysis, Rate
from gradflow.reporter import KINDS, plot

NEW = (
    "triangle",
    "lag-gradient",
    "lyapunov",
    "paths",
    "saturation",
    "time-scales",
    "rank",
    "blocks",
)


def lstm(**changes: object) -> LayerAnalysis:
    return synthetic.layer("lstm.l0", "LSTM", -0.14, **changes)  # type: ignore[arg-type]


def test_a_row_of_the_triangle_is_divided_by_its_own_loss_step() -> None:
    made = triangle.prepare(lstm())
    rate = -0.14 / math.log(10)
    np.testing.assert_allclose(np.diag(made.values), 0, atol=1e-12)
    assert made.values[70, 50] == pytest.approx(20 * rate, rel=1e-12)
    assert np.isnan(made.values[np.triu_indices(100, 1)]).all()
    assert made.message == (
        "one loss step's gradient is gone 50 steps before it (median of 51 loss steps of one sequence)"
    )
    assert made.reach[80] == 50 and math.isinf(made.reach[10]) and made.contour


def test_the_triangle_of_a_reverse_layer_reads_to_the_right() -> None:
    layer = synthetic.layer("rnn.l0_reverse", rate=-0.98, steps=20)
    data = layer.data.copy(deep=True)
    ahead = np.arange(20)[None, :] - np.arange(20)[:, None]
    data["log10_triangle"][0, 0] = np.where(ahead >= 0, -0.5 * ahead, np.nan)
    made = triangle.prepare(replace(layer, data=data))
    assert made.reach[0] == 7 and "rightwards" in made.reading


def test_one_loss_step_is_no_triangle() -> None:
    layer = synthetic.layer()
    data = layer.data.copy(deep=True)
    data["log10_triangle"][:, :, :-1] = -np.inf
    made = triangle.prepare(replace(layer, data=data))
    assert "no more than one step of this sequence (step 100)" in made.note


@pytest.mark.parametrize("steps", [10, 300, 1000])
def test_the_triangle_has_at_most_128_cells(steps: int) -> None:
    made = triangle.prepare(lstm(steps=steps))
    assert max(made.values.shape) <= 128
    assert made.columns[1] >= steps + 0.5 and made.rows[1] >= steps - 4


def test_shares_of_the_parameter_gradient_and_the_window() -> None:
    made = lag_gradient.prepare(synthetic.layer())
    assert made.parameters == ("W_hh", "W_ih")
    assert (10**made.share).sum(axis=1) == pytest.approx([1, 1])
    assert made.windows == (4.0,) and made.reach == 10
    assert made.message == (
        "half of ∂L/∂W_hh comes from the loss step itself; a window of 4 steps keeps ∂L/∂W_hh within 5 %"
    )
    assert "0.6 steps back" in made.reading and "cancel to 80 %" in made.reading


def test_the_error_of_five_percent_is_on_the_axis_whatever_the_errors_are() -> None:
    layer = synthetic.layer(steps=10)
    data = layer.data.copy(deep=True)
    data["truncation_error"][:] = 0.5
    below = plot(synthetic.analysis(replace(layer, data=data)), "lag-gradient").axes[1]
    low, high = below.get_ylim()
    assert low < math.log10(0.05) < math.log10(0.5) < high


def test_why_there_is_no_spectrum_by_lag_is_said() -> None:
    layer = synthetic.layer()
    data = layer.data.assign(lag_contribution=layer.data["lag_contribution"] * np.nan)
    made = lag_gradient.prepare(replace(layer, data=data))
    assert "below a bidirectional layer a loss step acts at every step" in made.note


def test_a_gradient_of_nothing_has_no_spectrum() -> None:
    layer = synthetic.layer()
    data = layer.data.copy(deep=True)
    data["lag_contribution"] *= 0.0
    assert lag_gradient.prepare(replace(layer, data=data)).note == (
        "The parameter gradient is exactly 0."
    )


def test_exponents_with_intervals_and_the_sum_rule() -> None:
    made = lyapunov.prepare(lstm())
    assert made.mean[:2] == pytest.approx([-0.14, -0.24])
    np.testing.assert_allclose(made.high - made.low, 0.06)
    assert made.trace.shape == (8, 100)
    assert made.message == (
        "the largest exponent is −0.140 ± 0.003 per step: every direction fades in the long run"
    )
    assert "All exponents add up to −14; ln|det| says −14." in made.reading


def test_no_interval_is_explained_where_none_is_drawn() -> None:
    several = lstm()
    nothing = {name: several.data[name] * np.nan for name in ("lyapunov_low", "lyapunov_high")}
    one = replace(several, data=several.data.assign(nothing), rate=Rate(-0.14, math.nan, math.nan))
    for chart in (lyapunov, lag_curve):
        assert "interval" in chart.prepare(several).reading
        assert "interval" not in chart.prepare(one).reading
    assert "dotted" in lag_curve.prepare(one).reading
    none = replace(one, rate=Rate(math.nan, math.nan, math.nan))
    assert "dotted" not in lag_curve.prepare(none).reading


def test_the_largest_path_is_named() -> None:
    made = paths.prepare(lstm())
    assert made.message.startswith("the forget gate is the largest at 100 of 100 steps, gain 0.8")
    assert made.gain[0, 0] == pytest.approx(math.log10(0.8))
    assert "the four paths are those of an LSTM" in paths.prepare(synthetic.layer()).note


def test_gates_lie_between_shut_and_open_and_stuck_units_are_counted() -> None:
    layer = lstm()
    data = layer.data.copy(deep=True)
    data["gate_unit_closed"].loc[{"gate": "f"}] = np.where(np.arange(32) < 3, 0.97, 0.1)
    made = saturation.prepare(replace(layer, data=data))
    assert [gate.name for gate in made.gates] == ["i", "f", "g", "o"]
    order = data["unit_order"].sel(state="c").values
    np.testing.assert_allclose(made.gates[1].values, data["gate_value"].sel(gate="f")[order])
    candidate = data["gate_value"].sel(gate="g").values[order]
    np.testing.assert_allclose(made.gates[2].values, (candidate + 1) / 2)
    assert made.message == "3 of 32 units have gate f closed more than 90 % of the time"


def test_cells_without_gates_show_the_units_at_their_limits() -> None:
    made = saturation.prepare(synthetic.layer())
    assert made.gates == () and [name for name, _ in made.limits] == ["h beyond ± 0.95"]
    relu = saturation.prepare(synthetic.layer("r", "RNN_RELU", -0.3))
    assert relu.message == "4 of 32 units are exactly 0 more than 90 % of the time"


def test_units_whose_cell_is_at_its_limit_are_said_in_words() -> None:
    layer = lstm()
    data = layer.data.copy(deep=True)
    data["unit_saturated"].loc[{"state": "c"}] = np.where(np.arange(32) < 2, 0.97, 0.1)
    made = saturation.prepare(replace(layer, data=data))
    assert made.message == "2 of 32 units have tanh c beyond ± 0.95 more than 90 % of the time"


def test_the_units_of_the_states_are_counted_as_in_the_headline() -> None:
    layer = synthetic.layer(rate=0.0, steps=30)
    data = layer.data.copy(deep=True)
    data["log10_grad"][0] = np.where(np.arange(32)[:, None] < 5, -0.9, -1.2)
    data["log10_grad"][0, 0, 12] = -2.0  # it comes back, so it does not carry
    made = states.prepare(replace(layer, data=data))
    assert made.message == (
        "32 of 32 units have 10⁻³ of the loss's gradient left 29 steps back; 4 keep a tenth all the way"
    )
    data["log10_grad"][0] = -4.0
    made = states.prepare(replace(layer, data=data))
    assert made.message == "0 of 32 units have 10⁻³ of the loss's gradient left 29 steps back"
    data["log10_grad"][..., 1:] = np.nan
    made = states.prepare(replace(layer, data=data))
    assert made.message == (
        "the loss reads a step at which the layer starts, or starts anew: there is none before it"
    )


def test_one_of_many_is_said_in_the_singular() -> None:
    layer = lstm()
    data = layer.data.copy(deep=True)
    data["log10_grad"][1] = np.where(np.arange(32)[:, None] == 3, 0.0, -4.0)
    data["time_scale"][:] = np.where(np.arange(32) == 3, 500.0, 2.0)
    data["gate_unit_open"].loc[{"gate": "f"}] = np.where(np.arange(32) == 3, 1.0, 0.1)
    data["lyapunov"][:] = np.where(np.arange(data.sizes["index_k"]) == 0, 0.0, -1.0)
    one = replace(layer, data=data, verdict="stable")
    assert states.prepare(one).message.startswith("1 of 32 cells has 10⁻³")
    assert states.prepare(one).message.endswith("1 keeps a tenth all the way")
    assert "1 of 32 units remembers as long" in time_scales.prepare(one).message
    assert saturation.prepare(one).message.startswith("1 of 32 units has gate f open")
    assert "keeps a tenth or more" in lyapunov.prepare(one).message


@pytest.mark.parametrize("kind", ["gates", "saturation", "time-scales", "lag-gradient"])
def test_nothing_is_claimed_of_the_inside_of_a_cell_of_ones_own(kind: str) -> None:
    layer = synthetic.layer("cell", "MyCell", steps=10)
    names = ("time_scale", "unit_saturated", "unit_idle", "lag_contribution")
    data = layer.data.assign({name: layer.data[name] * np.nan for name in names})
    drawn = KINDS[kind]
    assert drawn is not None
    note = drawn.prepare(replace(layer, data=data)).note
    assert "cell of your own" in note or "LSTM, GRU and RNN layers only" in note
    assert "MyCell has no" not in note


def test_what_is_not_finite_is_neither_drawn_nor_said() -> None:
    layer = lstm(steps=10)
    data = layer.data.copy(deep=True)
    data["gate_mean"] = data["gate_mean"].where(data["step"] == 0)
    same = data["source"] == data["target"]
    data["log_gain"], data["log_block_gain"] = (
        data[name].where(same) for name in ("log_gain", "log_block_gain")
    )
    made = replace(layer, data=data)
    assert np.isnan(gates.prepare(made).closed[:, 1:]).all()
    assert blocks.prepare(made).note == "No product over one step or more is finite."
    assert gain_map.prepare(made).note == "No gain from one step to another is finite."


def test_what_explodes_is_said_to_have_grown_and_to_come_from_far() -> None:
    layer = synthetic.layer(rate=0.3, steps=60)
    data = layer.data.copy(deep=True)
    data["log10_grad"][0] = 0.13 * data["back"].values
    data["lag_contribution"][:] = np.exp(0.3 * data["lag"].values)
    made = replace(layer, data=data)
    assert states.prepare(made).message == (
        "32 of 32 units have 1000 times the loss's gradient or more 59 steps back"
    )
    assert lag_gradient.prepare(made).message.startswith(
        "half of ∂L/∂W_hh comes from 57 or more steps back"
    )


def test_paths_end_where_the_measured_sequences_end() -> None:
    layer = lstm(steps=50)
    data = layer.data.copy(deep=True)
    data["path_gain"] = data["path_gain"].where(data["step"] < 20)
    made = paths.prepare(replace(layer, data=data))
    assert made.last == 20
    figure = plot(synthetic.analysis(replace(layer, data=data)), "paths")
    assert figure.axes[0].get_xlim() == (0.5, 20.5)


def test_every_unit_is_in_the_census() -> None:
    layer = lstm()
    data = layer.data.copy(deep=True)
    data["time_scale"][:4] = [np.inf, 100.0, 250.0, np.nan]
    made = time_scales.prepare(replace(layer, data=data))
    assert made.units.sum() + made.never == 31 and made.never == 1
    assert "Green" in made.reading and "Green" not in time_scales.prepare(lstm()).reading
    place = np.searchsorted(made.edges, math.log10(250.0), side="right") - 1
    assert made.units[place] >= 1 and made.span == 2.0
    assert made.message.endswith("3 of 31 units remember as long as the span of 100")


def test_ranks_against_lag() -> None:
    made = rank.prepare(lstm())
    assert made.lag.tolist() == [1, 2, 4, 8, 16, 32, 64, 99] and made.values.shape == (3, 8)
    assert made.message == (
        "0 of 64 directions survive 99 steps; the effective rank falls from 62 to 3"
    )


def test_a_rank_that_does_not_change_stays() -> None:
    layer = synthetic.layer(hidden=1, steps=10)
    data = layer.data.copy(deep=True)
    data["rank_effective"][:] = 1.0
    assert "the effective rank stays at 1" in rank.prepare(replace(layer, data=data)).message


def test_blocks_by_lag_are_medians_over_sources() -> None:
    layer = lstm(steps=300)  # every source, not every step, was mapped
    made = blocks.prepare(layer)
    gain = layer.data["log_block_gain"].sel(block="cc").isel(sequence=0)
    diagonal = np.diagonal(gain.values, 7)
    assert made.names == ("h → h", "c → h", "h → c", "c → c")
    assert made.gain[3, 7] == pytest.approx(np.median(diagonal) / math.log(10))
    np.testing.assert_allclose(made.cell_path, math.exp(-0.2))
    assert "one state only" in blocks.prepare(synthetic.layer()).note


def test_the_words_on_blocks_are_for_a_distance_at_which_all_are_known() -> None:
    layer = lstm(steps=40)
    data = layer.data.copy(deep=True)
    data["log_block_gain"].loc[{"block": "hh"}] = (
        data["log_block_gain"].sel(block="hh").where(data["target"] - data["source"] < 30)
    )
    made = blocks.prepare(replace(layer, data=data))
    assert made.lag[-1] == 39 and made.message.startswith("after 29 steps c → c keeps")
    assert "none" not in made.message


@pytest.mark.parametrize("inches", [0.8, 1.5, 2.1])
def test_no_tick_meets_the_zero_below_it(inches: float) -> None:
    for low in np.linspace(-9.0, -0.3, 24):
        figure = Picture(4, inches + 1)
        ax = figure.inches(0.8, 0.5, 3, inches)
        values = np.concatenate([[-np.inf], np.linspace(low, 0, 30)])
        draw_log_lines(ax, np.arange(31), [Line(values, "x", "black")])
        assert overlapping(figure) == []


def test_layers_lie_side_by_side_the_top_one_first() -> None:
    made = layers.prepare(list(synthetic.twelve().values()))
    assert made.names[0] == "stack.l11" and made.names[-1] == "stack.l0"
    assert np.nanmax(made.at_state[0]) == 0 and made.at_state.shape == (12, 100)
    np.testing.assert_allclose(made.passed - made.at_state, math.log10(0.3))
    assert "the gradient at stack.l0 is" in made.message and "of that at stack.l11" in made.message
    assert "one recurrent layer" in layers.prepare([synthetic.layer()]).note


@pytest.mark.parametrize("kind", NEW)
def test_an_older_run_gets_a_sentence(kind: str) -> None:
    drawn = KINDS[kind]
    assert drawn is not None
    older = synthetic.older(lstm(lyapunov=None))
    assert "analyze the model again" in drawn.prepare(older).note
    plot(synthetic.analysis(older), kind)


def changed(layer: LayerAnalysis, value: float) -> LayerAnalysis:
    data = layer.data.copy(deep=True)
    for name in synthetic.NEW:
        data[name] = data[name] * 0.0 + value
    return replace(layer, data=data, lyapunov=None)


EDGES = {
    "one step": lambda: lstm(steps=1),
    "two steps": lambda: lstm(steps=2),
    "two steps of a GRU": lambda: synthetic.layer("g", "GRU", 0.3, steps=2, hidden=1),
    "all NaN": lambda: changed(lstm(steps=10), math.nan),
    "all zero": lambda: changed(lstm(steps=10), 0.0),
    "exactly zero everywhere": lambda: changed(lstm(steps=10), -math.inf),
    "infinite": lambda: changed(lstm(steps=10), math.inf),
    "no gradient": lambda: synthetic.without_gradient(lstm(steps=10)),
    "a name": lambda: synthetic.layer("</script><b>x $x$", "LSTM", -0.3, steps=10),
}


@pytest.mark.parametrize("edge", EDGES)
def test_whatever_comes_is_drawn_without_a_warning(edge: str) -> None:
    made = synthetic.analysis(EDGES[edge]())
    for kind in (*NEW, "layers"):
        plot(made, kind)
        plot(made, kind, ax=Figure().add_subplot())
