"""An analysis agrees with itself: numbers with words, tables with arrays, saved with loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow import analysis as nouns
from gradflow.analysis import FRAMES, Analysis, LayerAnalysis
from gradflow.analysis.frames import OPTIONAL
from gradflow.analyzer import analyze
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def record(module: nn.Module, x: Tensor) -> Recording:
    with gradflow.record(module) as recording:
        seen = module(x)
        (seen[0] if isinstance(seen, tuple) else seen)[-1].sum().backward()
    return recording


def only(found: Analysis) -> LayerAnalysis:
    (layer,) = found.values()
    return layer


EYE = torch.eye(3, dtype=torch.float64)


class Loop(nn.Module):
    """A ReLU cell in a loop, its state reset by a mask; starts at 1."""

    def __init__(self, weight: list[list[float]], keep: Tensor | None = None) -> None:
        super().__init__()
        self.cell = nn.RNNCell(1, len(weight), nonlinearity="relu").double()
        for values in self.cell.parameters():
            nn.init.zeros_(values)
        self.cell.weight_hh.data = torch.tensor(weight, dtype=torch.float64)
        self.cell.weight_ih.data.fill_(1.0)
        self.keep = keep  # (T, B)

    def forward(self, x: Tensor) -> Tensor:
        h, seen = torch.ones(x.shape[1], self.cell.hidden_size, dtype=x.dtype), []
        for t, x_t in enumerate(x):
            h = h if self.keep is None else h * self.keep[t, :, None]
            h = self.cell(x_t, h)
            seen.append(h)
        return torch.stack(seen)


# -------------------------------------------------------------------------------- the whole of it


def listed_variables(docstring: str) -> set[str]:
    """Names in the first column: "lag_low, lag_high" is two, "gate_closed/_open" too."""
    first, names = docstring.split("=====\n", 2)[1].split("\n=====")[0], set()
    for cell in re.findall(r"^(\S.*?)(?:  |$)", first, re.MULTILINE):
        for name in cell.split(", "):
            stem, *tails = name.split("/")
            names |= {stem} | {stem.rsplit("_", 1)[0] + tail for tail in tails}
    return names


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_the_docstring_lists_every_variable_and_no_other(kind: type[nn.Module]) -> None:
    data = only(analyze(record(kind(2, 3), torch.randn(12, 2, 2)))).data
    others = {"log_rms_error", "file_gain", "file_rate"}  # of wide states, of several batches
    assert listed_variables(str(nouns.__doc__)) - others == set(data.data_vars)


def test_the_reading_of_the_table_can_fail() -> None:
    table = "x\n=====  =====\na, b   (lag)  words\n       more\nc_d/_e   words\n=====  =====\n"
    assert listed_variables(table) == {"a", "b", "c_d", "c_e"}


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.int64) if values.dtype.kind == "f" else values


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_a_saved_run_comes_back_to_the_bit_with_its_types(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    found = analyze(record(kind(2, 3), torch.randn(12, 2, 2)), maps=2)
    loaded = gradflow.load(found.save(tmp_path / "run.nc"))
    for old, new in zip(found.values(), loaded.values(), strict=True):
        assert list(old.data.variables) == list(new.data.variables)
        for name, values in old.data.variables.items():
            assert values.dtype == new.data[name].dtype, name
            np.testing.assert_array_equal(bits(values.values), bits(new.data[name].values), name)
        assert repr(old) == repr(new)


def test_no_array_holds_a_negative_zero() -> None:
    for module in (nn.LSTM(2, 3), nn.GRU(2, 3), nn.RNN(2, 3, nonlinearity="relu")):
        data = only(analyze(record(module, torch.randn(12, 3, 2)))).data
        signed = [n for n, v in data.items() if (np.signbit(v.values) & (v.values == 0)).any()]
        assert signed == []


def test_the_number_of_threads_changes_no_bit() -> None:
    recording = record(nn.LSTM(2, 5, 2), torch.randn(20, 3, 2))
    one = analyze(recording)
    torch.set_num_threads(2)
    two = analyze(recording)
    for first, second in zip(one.values(), two.values(), strict=True):
        assert first.data.identical(second.data)


def test_the_lags_frame_carries_the_contributions() -> None:
    found = analyze(record(nn.GRU(2, 3), torch.randn(12, 2, 2)))
    frame, data = found.frame("lags"), only(found).data
    for name in ("weight_hh", "weight_ih"):
        expected = data.sel(parameter=name)
        np.testing.assert_array_equal(frame[f"contribution_{name}"], expected.lag_contribution)
        np.testing.assert_array_equal(frame[f"truncation_error_{name}"], expected.truncation_error)
    older = Analysis("old", {"l0": only(found)}, (), {})
    object.__setattr__(only(older), "data", data.drop_dims("parameter"))
    assert all(len(older.frame(kind)) or kind in ("findings", *OPTIONAL) for kind in FRAMES)


# ---------------------------------------------------------------------------------------- numbers


def test_the_stable_rank_is_the_median_of_stable_ranks() -> None:
    """Also of an even number of pairs, where the median of logarithms is another number."""
    torch.manual_seed(0)
    recording = record(nn.GRU(2, 3).double(), normal(7, 2, 2))
    data = only(analyze(recording, maps=2)).data
    steps = gradflow.analyzer.step_jacobians(recording["l0"])  # (T, B, S, S)
    for place, lag in enumerate(data["rank_lag"].values):
        ranks = []
        for b in range(2):
            for t in range(7 - lag):
                product = torch.linalg.multi_dot([*steps[t + 1 : t + 1 + lag, b].flip(0), EYE])
                square = torch.linalg.svdvals(product).square()
                ranks.append(float(square.sum() / square[0]))
        assert data["rank_stable"].values[place] == pytest.approx(np.median(ranks), rel=1e-8)


def test_nothing_is_lost_by_a_truncation_that_leaves_out_no_lag() -> None:
    """Exactly: the sum over all lags differs from the gradient by rounding."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        recording = record(nn.GRU(2, 3).to(dtype), torch.randn(9, 4, 2, dtype=dtype))
        error = only(analyze(recording)).data["truncation_error"].values
        # the first step reads h_0 = 0, so the last lag brings nothing to W_hh
        assert (error[0, :7] > 0).all() and error[0, 7:].tolist() == [0.0, 0.0]
        assert (error[1, :8] > 0).all() and error[1, 8] == 0.0
        note = str(gradflow.what_if(recording, truncate=9)["note"][0])
        assert note == "∂L/∂W_hh is off by 0 % if nothing goes back 9 steps"


def test_a_window_as_long_as_the_sequences_changes_nothing() -> None:
    torch.manual_seed(0)
    module = nn.GRU(2, 3).double()
    module.bias_hh_l0.data[3:6] = 5.0
    row = gradflow.what_if(record(module, normal(12, 3, 2)), truncate=12).iloc[0]
    assert row["channels_before"] == row["channels_after"] == 3
    assert pd.isna(row["horizon_after"])
    assert row["half_life_before"] == row["half_life_after"]


def test_a_short_mapped_sequence_does_not_shorten_the_count_of_channels() -> None:
    """It says nothing about a span that it does not reach."""
    torch.manual_seed(0)
    module, lengths = nn.GRU(2, 3).double(), torch.tensor([12, 3, 11])
    with gradflow.record(module) as recording:
        packed = pack_padded_sequence(normal(12, 3, 2), lengths, enforce_sorted=False)
        pad_packed_sequence(module(packed)[0])[0].sum().backward()
    layer = only(analyze(recording, maps=3, span=8))
    assert layer.data["rank_lag"].values.tolist() == [1, 2, 4, 8]
    short = layer.data["sequence"].values.tolist().index(1)
    known = np.isfinite(layer.data["log_singular"].values)
    assert known.all(1).tolist() == [place != short for place in range(3)]
    steps = gradflow.analyzer.step_jacobians(recording["l0"])
    for place, b in enumerate(layer.data["sequence"].values):
        if b != 1:
            product = torch.linalg.multi_dot([*steps[1:9, b].flip(0), EYE])
            np.testing.assert_allclose(
                layer.data["log_singular"].values[place],
                torch.linalg.svdvals(product).log(),
                rtol=1e-7,
            )


def test_a_direction_lost_before_a_cut_is_not_missed_behind_it() -> None:
    """One unit is off until the reset at step 4, within the burn-in; then λ = 0.9 and 0.5 rule."""
    keep = torch.ones(40, 2, dtype=torch.float64)
    keep[4] = 0.0
    x = torch.ones(40, 2, 1, dtype=torch.float64)
    x[:3] = -9.0  # all units off: an exact zero
    layer = only(analyze(record(Loop([[0.9, 0.0], [0.0, 0.5]], keep), x)))
    assert layer.verdict == "vanishing"
    np.testing.assert_allclose(layer.lyapunov, [math.log(0.9), math.log(0.5)], rtol=1e-3)
    exact = math.log(0.45)
    np.testing.assert_allclose(layer.data["sum_rule"].values, [exact, exact], rtol=1e-9)


def test_a_direction_lost_in_the_burn_in_is_lost_on_both_sides_of_the_sum_rule() -> None:
    x = torch.ones(40, 2, 1, dtype=torch.float64)
    loop = Loop([[0.9, 0.0], [0.0, 0.5]])
    loop.cell.weight_ih.data[0] = 0.0  # the input moves the second unit alone
    x[2] = -9.0
    found = analyze(record(loop, x))
    layer = only(found)
    assert layer.rate.value == pytest.approx(math.log(0.9), rel=1e-6)
    assert layer.data["sum_rule"].values.tolist() == [-math.inf, -math.inf]
    assert not any("below rounding" in warning for warning in found.warnings)


# ------------------------------------------------------------------------------------------ words


def test_a_dead_layer_is_cut_where_no_pair_is_left() -> None:
    """Half of the pairs are cut earlier than the last: that is not every path."""
    torch.manual_seed(0)
    x = torch.ones(40, 1, 1, dtype=torch.float64)
    x[[5, 6, 7, 8, 9, 20, 21, 22, 23, 24, 30, 31, 32, 33, 34, 35, 36]] = -9.0
    layer = only(analyze(record(Loop([[0.5]]), x)))
    share = layer.data["lag_zero_share"].values
    full = int(np.flatnonzero(share == 1)[0])
    half = int(np.flatnonzero(share >= 0.5)[0])
    assert layer.verdict == "dead" and half < full
    assert f"within {full} steps" in layer.sentence and f"within {full} steps" in layer.title


def test_no_title_speaks_of_a_negative_number_of_decades() -> None:
    """Below a bidirectional layer the gradient may come in far from the loss step, and grow."""
    torch.manual_seed(3)  # the rate of l0_reverse is below 0, its profile grows by 1.25 decades
    found = analyze(record(nn.GRU(2, 3, 2, bidirectional=True), torch.randn(6, 2, 2)))
    assert (
        found["l0_reverse"].title == "l0_reverse (GRU): all 3 units carry the gradient all 6 steps"
    )
    assert not any("−" in layer.title for layer in found.values())


def test_an_infinite_input_that_gates_swallow_is_found() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 2)
    x[4, 1, 0] = math.inf
    module = nn.LSTM(2, 3)
    layer = only(analyze(record(module, x)))
    assert module.weight_ih_l0.grad is not None and module.weight_ih_l0.grad.isnan().any()
    assert math.isfinite(layer.rate.value)
    (finding,) = [finding for finding in layer.findings if finding.name == "not-finite"]
    assert "input is inf at step 5 of sequence 2, feature 1: its states stay" in finding.message


@pytest.mark.parametrize("where", ["tap", "cell"])
def test_nan_in_a_loop_whose_inputs_were_not_seen_is_named(where: str) -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.rate * h + x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Decay()

        def forward(self, x: Tensor) -> Tensor:
            h, seen = torch.zeros_like(x[0]), []
            for x_t in x:
                by_hand = where == "tap"
                h = gradflow.tap(h=self.cell.rate * h + x_t) if by_hand else self.cell(x_t, h)
                seen.append(h)
            return torch.stack(seen)

    x = torch.randn(8, 2, 3)
    x[3, 1, 2] = math.nan
    with pytest.warns(GradflowWarning, match="its states are not finite"):
        recording = record(Net(), x)
    layer = only(analyze(recording))
    assert "not finite" in layer.labels
    (finding,) = [finding for finding in layer.findings if finding.name == "not-finite"]
    assert "is NaN first at step 4, sequence 2, unit 3" in finding.message
