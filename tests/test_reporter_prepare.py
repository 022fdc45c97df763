"""What is handed to the pictures: numbers, words and colours, not pixels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic
import xarray as xr
from seam import (
    BAD,
    COLOURS,
    UNDEFINED,
    ZERO,
    _nearest,
    gain_map,
    paint,
    palette,
    rate_words,
    total_vs_direct,
)
from seam import charts_lag_curve as lag_curve

from gradflow.analysis import Rate
from gradflow.reporter import KINDS, overview, prepare


def hexes(rgb: np.ndarray) -> list[str]:
    return ["#" + bytes(pixel).hex() for pixel in rgb.reshape(-1, 3)]


def test_colours_are_fixed_and_say_what_is_special() -> None:
    values = np.array([[-np.inf, np.nan, 0.0, -9.0, 9.0, 0.0]])
    bad = np.array([[False, False, False, False, False, True]])
    zero, undefined, middle, low, high, wrong = hexes(paint(values, bad))
    assert (zero, undefined, wrong) == (ZERO, UNDEFINED, BAD)
    assert (middle, low, high) == ("#fdf3b8", "#0b2858", "#560012")
    assert np.ptp(values[np.isfinite(values)]) > 12 and COLOURS.N == 121


def test_the_stored_palette_keeps_every_colour_of_the_scale() -> None:
    every = paint(np.linspace(-6, 6, 121)[None], np.zeros((1, 121), bool))
    special = paint(np.array([[-np.inf, np.nan, 0.0]]), np.array([[False, False, True]]))
    pixels = np.concatenate([every, special], axis=1)
    known = np.array(palette(), dtype=np.uint8).reshape(256, 3)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(known[_nearest(opaque)], pixels)


def test_heat_puts_the_longest_memory_on_top_and_the_loss_on_the_right() -> None:
    layer = synthetic.carrying()["lstm.l0"]
    heat = prepare.heat(layer)
    order = layer.data["unit_order"].sel(state="c").values
    raw = layer.data["log10_grad"].sel(state="c").values
    assert heat.state == "c"
    np.testing.assert_array_equal(heat.values[0], raw[order[0]][::-1])
    np.testing.assert_array_equal(heat.values[-1], raw[order[-1]][::-1])
    assert heat.values[0, 0] > heat.values[1, 0] + 3  # one cell carries


def test_steps_that_no_row_has_take_a_third_of_the_picture() -> None:
    layer = synthetic.layer(steps=100)
    data = layer.data.copy(deep=True)
    data["log10_grad"].values[..., 30:] = np.nan
    whole, short = prepare.heat(layer), prepare.heat(replace(layer, data=data))
    (alone,) = prepare.cropped([short])
    assert (alone.steps, alone.beyond, alone.values.shape[1]) == (45, 15, 45)
    assert np.array_equal(alone.values[:, 15:], short.values[:, 70:])
    both = prepare.cropped([whole, short])
    assert both[0] is whole and both[1] is short  # one scale for all rows


def test_heat_pools_by_the_largest_so_that_no_survivor_is_lost() -> None:
    layer = synthetic.layer(steps=1000, hidden=300)
    data = layer.data.copy(deep=True)
    unit = int(data["unit_order"].sel(state="h").values[7])
    data["log10_grad"][0, unit, 901] = 2.5
    heat = prepare.heat(replace(layer, data=data))
    assert heat.values.shape == (100, 334) and (heat.unit_pool, heat.step_pool) == (3, 3)
    column = heat.values.shape[1] - 1 - 901 // 3
    assert heat.values[7 // 3, column] == 2.5
    assert overview.describe(overview.Entry("", layer), heat).endswith(
        "each the largest of 3 steps × 3 units"
    )


def test_pooling_never_hides_nan_or_inf() -> None:
    layer = synthetic.layer(steps=1000)
    data = layer.data.copy(deep=True)
    data["log10_grad"][0, 3, 500] = np.inf
    heat = prepare.heat(replace(layer, data=data))
    assert heat.bad.sum() == 1
    assert heat.broken == "NaN or Inf at step 500, 500 steps back from the loss"


@pytest.mark.parametrize(
    ("reverse", "words"),
    [
        (False, "NaN or Inf at step 73, 27 steps back"),
        (True, "NaN or Inf at step 28, 27 steps back"),
    ],
)
def test_nan_names_its_step_in_either_direction(reverse: bool, words: str) -> None:
    layer = replace(synthetic.broken(synthetic.layer()), reverse=reverse)
    assert prepare.heat(layer).broken.startswith(words)


def test_nan_names_no_step_where_sequences_end_at_different_ones() -> None:
    layer = synthetic.broken(synthetic.layer())
    data = layer.data.copy(deep=True)
    data["length"][0] = 50
    assert (
        prepare.heat(replace(layer, data=data)).broken == "NaN or Inf 27 steps back from the loss"
    )


def test_without_a_gradient_the_row_says_why() -> None:
    layer = synthetic.without_gradient(synthetic.layer("frozen.l0"))
    assert "the backward did not reach this layer" in prepare.heat(layer).note
    assert "the backward did not reach this layer" in total_vs_direct.prepare(layer).note
    unsaid = replace(layer, gradient_note="")
    assert "record a backward" in prepare.heat(unsaid).note


def test_gone_after_and_its_dot_lie_on_the_line() -> None:
    line = prepare.lag_line(synthetic.vanishing()["rnn.l0"])
    assert line.words == "no direction left after 8 steps"
    assert line.dot == pytest.approx((math.log(1e3) / 0.98, -3.0), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "words"),
    [("carrying", "never below 10⁻³"), ("exploding", "1000 × after 24 steps"), ("single_step", "")],
)
def test_words_of_the_lag_curve(name: str, words: str) -> None:
    (layer,) = synthetic.CASES[name]().values()
    assert prepare.lag_line(layer).words == words


def test_exact_zeros_are_said_and_never_drawn_as_a_floor() -> None:
    layer = synthetic.zero(synthetic.layer("relu.l0", "RNN_RELU", -0.3))
    line = prepare.lag_line(layer)
    assert line.words == "exactly 0 after 8 steps" and line.zero_from == 8
    assert np.isnan(line.median[8:]).all() and np.isfinite(line.median[:8]).all()
    assert np.isneginf(prepare.heat(layer).values[:, :-8]).all()


def test_the_lag_axis_is_shared_and_reaches_past_where_the_gradient_is_gone() -> None:
    short, long = synthetic.layer(steps=1000), synthetic.layer("lstm.l0", "LSTM", -0.1, carrying=1)
    lines = [prepare.lag_line(short), prepare.lag_line(long)]
    assert overview.curve_reach(lines[:1], [short]) == 32
    assert overview.curve_reach(lines, [short, long]) == 99


@pytest.mark.parametrize("steps", [2, 10, 100, 128, 129, 1000])
def test_gain_map_has_at_most_128_cells_and_its_undefined_half(steps: int) -> None:
    gain = gain_map.prepare(synthetic.layer(steps=steps))
    rows, columns = gain.values.shape
    assert rows == columns <= 128
    assert np.isnan(gain.values[np.triu_indices(rows, 1)]).all()
    assert np.isfinite(gain.values[np.tril_indices(rows)]).all()
    assert gain.columns == gain.rows and gain.columns[0] == 0.5
    assert gain.columns[1] > steps - 4 and gain.last == steps + 0.5


@pytest.mark.parametrize("every", [8, 16, 500])
def test_a_map_of_some_sources_keeps_their_places(every: int) -> None:
    layer = synthetic.layer(steps=1000)
    step = np.arange(1000)
    lag = np.where(step[None, :] >= step[:, None], step[None, :] - step[:, None], np.nan)
    gain = xr.DataArray(
        np.broadcast_to(-0.01 * lag[::every], (3, 1, len(step[::every]), 1000)),
        dims=("norm", "sequence", "source", "target"),
        coords={"norm": ["spectral", "rms", "loss"], "sequence": [3], "source": step[::every],
                "target": step},
    )  # fmt: skip
    data = layer.data.drop_dims(["source", "target"]).assign(log_gain=gain)
    made = gain_map.prepare(replace(layer, data=data))
    reached = every * len(step[::every]) + 0.5
    assert made.rows == (0.5, 1000.5) and made.columns == (0.5, reached)
    assert f"One step in {every} was followed as a source." in made.reading
    high, wide = 8, every
    for column in range(made.values.shape[1]):
        source = round(column * wide)
        row = int((source + 400) // high)
        if row < made.values.shape[0]:
            lags = row * high - source
            assert made.values[row, column] == pytest.approx(-0.01 * lags / math.log(10))
    share = float(np.mean(lag[::every][lag[::every] > 0] <= math.log(1e3) / 0.01))
    assert made.message.startswith(f"{100 * share:.0f} % of the pairs")
    assert not made.unknown


def test_a_map_of_one_source_is_a_sentence() -> None:
    layer = synthetic.layer(steps=1000)
    made = gain_map.prepare(replace(layer, data=layer.data.isel(source=[0])))
    assert made.note.startswith("Only step 1 was followed") and "stride=8" in made.note


def test_a_map_ends_where_its_sequence_ends() -> None:
    layer = synthetic.layer(steps=100)
    data = layer.data.copy(deep=True)
    data["length"][3] = 30
    made = gain_map.prepare(replace(layer, data=data))
    assert made.last == 30.5 and made.values.shape == (30, 30)
    assert "Sequence 4 of 8." in made.reading


def test_a_map_with_a_cut_counts_measured_pairs() -> None:
    layer = synthetic.layer(steps=20)
    data = layer.data.copy(deep=True)
    across = (data["source"] < 8) & (data["target"] >= 8)
    data["log_gain"] = data["log_gain"].where(~across)
    made = gain_map.prepare(replace(layer, data=data))
    assert made.unknown and "measured pair" in made.message
    assert "measured" not in gain_map.prepare(layer).message


def test_gain_map_rows_are_targets() -> None:
    layer = synthetic.layer(steps=20)
    gain = gain_map.prepare(layer)
    want = layer.data["log_gain"].sel(norm="spectral").isel(sequence=0).sel(source=3, target=11)
    assert gain.values[11, 3] == pytest.approx(float(want) / math.log(10), rel=1e-12)
    assert gain.sequence == 3 and gain.contour


def test_slopes_are_taken_over_whole_strides_and_a_first_jump_does_not_squash_them() -> None:
    layer = synthetic.layer(steps=1000, rate=-0.003, horizon=None)
    data = layer.data.copy(deep=True)
    comb = np.where(np.arange(1000) % 4 == 3, -0.012, 0.0)  # one source in four leaves, then none
    comb[1] = 2.0
    data["lag_slope"] = ("lag", comb)
    made = lag_curve.prepare(replace(layer, data=data))
    assert made.window == 12 and "to 12 steps more" in made.reading
    np.testing.assert_allclose(made.slope[20:980], -0.003, atol=1e-12)
    assert made.limits[0] < -0.003 and 0 < made.limits[1] < 0.01


def test_without_a_slope_there_is_no_panel_for_it() -> None:
    layer = synthetic.layer(steps=20)
    data = layer.data.copy(deep=True)
    data["lag_slope"] *= np.nan
    made = lag_curve.prepare(replace(layer, data=data))
    kind = KINDS["lag-curve"]
    assert kind is not None and kind.heights(made) == (2.4,) and "Below" not in made.reading


def test_one_loss_step_needs_no_line_of_its_own() -> None:
    layer = synthetic.layer(steps=20)
    once = total_vs_direct.prepare(layer)
    assert np.isnan(once.last).all() and "dotted" not in once.reading
    data = layer.data.copy(deep=True)
    data["grad_norm"].loc[{"kind": "total"}] *= 1.0001  # the last digits of another sum
    assert np.isnan(total_vs_direct.prepare(replace(layer, data=data)).last).all()
    data["grad_norm"].loc[{"kind": "total"}] = 1.0
    every = total_vs_direct.prepare(replace(layer, data=data))
    assert np.isfinite(every.last).all() and "need not fade" in every.reading


def test_a_hook_on_the_output_shows_zero_at_all_but_the_last_step() -> None:
    made = total_vs_direct.prepare(synthetic.vanishing()["rnn.l0"])
    assert made.message == (
        "a hook on the output shows exactly 0 at 99 of 100 steps; the total is not 0 there"
    )
    assert np.isneginf(made.direct[:-1]).all() and made.direct[-1] == 0


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (Rate(-0.98, -1.01, -0.95), "−0.98 ± 0.03"),
        (Rate(-0.0025, -0.0029, -0.0021), "−0.0025 ± 0.0004"),
        (Rate(0.5, 0.1, 0.6), "+0.5 [+0.1, +0.6]"),
        (Rate(-math.inf, -math.inf, -math.inf), "−∞"),
        (Rate(math.nan, math.nan, math.nan), "none"),
        (Rate(-0.1053605, -0.1053605, -0.1053605), "−0.105"),
        (Rate(0.0, 0.0, 0.0), "0.0"),
    ],
)
def test_rates_in_words(rate: Rate, words: str) -> None:
    assert rate_words(rate) == words


def test_a_hook_that_shows_everything_is_not_blamed() -> None:
    layer = synthetic.layer()
    data = layer.data.copy(deep=True)
    data["grad_norm"].loc[{"kind": "direct", "state": "h"}] = 2.0
    data["grad_norm"].loc[{"kind": "total", "state": "h"}] = 2.0
    words = total_vs_direct.prepare(replace(layer, data=data)).message
    assert words == ("a hook on the output shows the whole gradient: none comes through recurrence")
    data["grad_norm"].loc[{"kind": "total", "state": "h"}] = 20.0
    assert (
        "off by up to a factor of 10" in total_vs_direct.prepare(replace(layer, data=data)).message
    )


def test_bar_of_span_against_horizon() -> None:
    assert prepare.span_share(synthetic.layer()) == 0.08
    assert prepare.span_share(synthetic.layer(carrying=1)) == 1.0
    assert prepare.span_share(synthetic.broken(synthetic.layer())) == 0.0


def test_a_map_that_keeps_nothing_says_so_and_exact_zeros_have_no_half_life() -> None:
    layer = synthetic.layer(steps=20)
    gain = layer.data["log_gain"]
    layer.data["log_gain"] = gain.where(gain["source"] >= gain["target"], -np.inf)
    assert gain_map.prepare(layer).message == "no pair of different steps keeps a gain of 10⁻³"
    nothing = replace(layer, rate=Rate(-math.inf, -math.inf, -math.inf), half_life=1.0)
    assert "halves" not in lag_curve.prepare(nothing).message
