"""Where the loss acts: the triangle of loss steps and the weights' gradient by lag, as measured.

That single loss steps and lags are right is shown against autograd in test_record_loss_steps.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from cases import GRU, LSTM, TANH, Case
from seam import Contributed, affordable, contributions
from seam import triangle_triangle as triangle
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import assemble
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
PLENTY = 1e9  # seconds


def constant(weight: float, steps: int, *, every: bool = False, level: float = 1e-6) -> Track:
    """A scalar layer that is linear at these small values and whose state never changes."""
    rnn = nn.RNN(1, 1, bias=False, dtype=F64)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(weight)
        rnn.weight_ih_l0.fill_(1.0)
    x, h0 = (torch.full(shape, level, dtype=F64) for shape in ((steps, 1, 1), (1, 1, 1)))
    with gradflow.record(rnn) as recording:
        out, _ = rnn(x * (1 - weight), h0)
        (out if every else out[-1]).sum().backward()
    return recording["l0"]


def measured(track: Track) -> Contributed:
    return contributions(track, [0], False, PLENTY)


# ------------------------------------------------------------------------------------- triangle


@pytest.mark.parametrize(
    "case",
    [
        Case(LSTM, layers=2, loss="both", initial=True),
        Case(GRU, packed="unsorted"),
        Case(GRU, bidirectional=True, packed="unsorted"),
        Case(LSTM, bidirectional=True, layers=2, packed="unsorted", loss="both"),
    ],
    ids=str,
)
def test_the_triangle_holds_the_norms_of_single_loss_steps(case: Case) -> None:
    mapped = [2, 0]
    for track in cases.seen(case).recording.values():
        single = track.loss_steps(range(case.steps), mapped)
        assert single is not None
        found = triangle(track, mapped, False, PLENTY)
        assert found.loss_steps.tolist() == list(range(case.steps))
        below = case.bidirectional and track.name.startswith("l0") and case.layers == 2
        for state, name in enumerate(track.states):
            for place, b in enumerate(mapped):
                for target in range(case.steps):
                    for t in range(case.steps):
                        ahead = t < target if track.reverse else t > target
                        out = max(t, target) >= int(track.lengths[b]) or (ahead and not below)
                        norm = float(single.grads[name][target, t, place].norm())
                        got = found.log10_norm[state, place, target, t]
                        if out:
                            assert math.isnan(got)
                        else:
                            want = math.log10(norm) if norm else -math.inf
                            assert got == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_a_row_is_the_true_decay_where_the_total_does_not_fade() -> None:
    track = constant(0.1, 12, every=True)
    rows = triangle(track, [0], False, PLENTY).log10_norm[0, 0]
    back = np.arange(12)[:, None] - np.arange(12)
    np.testing.assert_allclose(rows[back >= 0], -back[back >= 0], atol=1e-9)
    assert np.isnan(rows[back < 0]).all()
    assert float(track.grad_h[0].log10()) == pytest.approx(0.0458, abs=1e-4)


def test_nothing_underflows_before_the_gradient_itself_does() -> None:
    rows = triangle(constant(1e-3, 110), [0], False, PLENTY).log10_norm[0, 0]
    np.testing.assert_allclose(rows[-1, 10:], 3.0 * np.arange(-99, 1), atol=1e-9)
    assert (rows[-1, :1] == -math.inf).all()
    nothing_arrives = rows[:-1][np.tril(np.ones((109, 110))) > 0]
    assert (nothing_arrives == -math.inf).all()


def test_long_sequences_have_the_loss_steps_at_which_something_arrives() -> None:
    assert triangle(constant(0.9, 300), [0], False, PLENTY).loss_steps.tolist() == [299]
    every = constant(0.9, 300, every=True)
    whole = triangle(every, [0], False, PLENTY)
    assert whole.loss_steps.tolist() == list(range(1, 300, 2))
    assert np.isfinite(whole.log10_norm[0, 0, 3, :8]).all()
    assert np.isnan(whole.log10_norm[0, 0, 3, 8:]).all()
    few = triangle(every, [0], False, 1e-3).loss_steps
    assert few[-1] == 299
    assert 1 <= len(few) < 100
    assert len(set(np.diff(few).tolist())) <= 1


def test_beyond_a_cut_nothing_is_reached() -> None:
    cell, h, loss = nn.GRUCell(2, 3), torch.zeros(2, 3), torch.zeros(())
    with gradflow.record(cell) as recording:
        for t in range(6):
            h = cell(torch.ones(2, 2), h.detach() if t == 4 else h)
            loss = loss + h.sum()
        loss.backward()
    rows = triangle(recording["cell"], [0], False, PLENTY).log10_norm[0, 0]
    assert np.isnan(rows[4:, :4]).all()
    assert np.isfinite(rows[5, 4:]).all()
    assert np.isfinite(rows[3, :4]).all()


# ----------------------------------------------------------------------------------------- lags


@pytest.mark.parametrize("steps", [20, 100])
def test_the_window_of_a_scalar_linear_layer(steps: int) -> None:
    """C_k = λ^k h: the error of K steps is (λ^K − λ^T) / (1 − λ^T)."""
    found, lags = measured(constant(0.9, steps)), np.arange(steps)
    np.testing.assert_allclose(found.norm[0], 1e-6 * 0.9**lags, rtol=1e-9)
    kept = (0.9 ** (lags + 1) - 0.9**steps) / (1 - 0.9**steps)
    np.testing.assert_allclose(found.error[0], kept, rtol=1e-8, atol=1e-14)
    for place, tolerance in enumerate((0.01, 0.05, 0.1)):
        assert found.window[0, place] == np.flatnonzero(kept <= tolerance)[0] + 1
    if steps == 100:
        assert found.window[0].tolist() == [44.0, 29.0, 22.0]
    weights = 0.9**lags
    assert found.depth[0] == pytest.approx((lags * weights).sum() / weights.sum(), rel=1e-9)
    assert found.cancellation[0] == pytest.approx(1.0, rel=1e-12)
    assert (found.note, found.sequences) == ("", (0,))


def test_lags_that_cancel() -> None:
    """C_k = (−0.9)^k h."""
    found = measured(constant(-0.9, 50))
    want = ((1 - (-0.9) ** 50) / 1.9) / ((1 - 0.9**50) / 0.1)
    assert found.cancellation[0] == pytest.approx(want, rel=1e-9)
    assert found.window[0, 0] > 40  # every lag is needed, though the gradient is small


def test_a_window_is_one_from_which_on_the_error_stays_small() -> None:
    error = np.array([[0.02, 0.5, 0.04, 0.0], [0.0, 0.0, 0.0, 0.0], [0.2, math.nan, 0.0, 0.0]])
    found = Contributed(("a", "b", "c"), error, error, error[:, 0])
    assert found.window[0].tolist() == [4.0, 3.0, 3.0]
    assert found.window[1].tolist() == [1.0, 1.0, 1.0]
    assert np.isnan(found.window[2]).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(LSTM, layers=2, loss="both", packed="unsorted"),
        Case(GRU, loss="last", batch=1),
        Case(TANH, layers=2, bidirectional=True),
    ],
    ids=str,
)
def test_norms_and_errors_are_those_of_the_matrices(case: Case) -> None:
    for track in cases.seen(case).recording.values():
        found, exact = measured(track), track.contributions()
        assert found.parameters == ("weight_hh", "weight_ih")
        if exact is None:
            assert track.name.startswith("l0")
            assert case.bidirectional
            assert np.isnan(found.norm).all()
            assert np.isnan(found.window).all()
            continue
        for place, name in enumerate(found.parameters):
            full = exact.total()[name].matrix()
            sums = torch.zeros_like(full)
            for lag, part in enumerate(exact.by_lag()):
                sums += part[name].matrix()
                norm, left = float(part[name].matrix().norm()), float((full - sums).norm())
                assert found.norm[place, lag] == pytest.approx(norm, rel=1e-12)
                want = left / float(full.norm())
                assert found.error[place, lag] == pytest.approx(want, rel=1e-9, abs=1e-14)
            assert found.error[place, -1] < 1e-14
            assert found.total[place] == pytest.approx(float(full.norm()), rel=1e-12)


def test_few_rows_are_measured_without_the_matrix() -> None:
    """‖δ vᵀ‖ by QR where the weight is large, the same number to rounding."""
    lstm = nn.LSTM(40, 40, dtype=F64)
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(12, 2, 40, dtype=F64))[0][-1].pow(2).sum().backward()
    exact = recording["l0"].contributions()
    assert exact is not None
    found = measured(recording["l0"])
    norms = [float(part["weight_hh"].matrix().norm()) for part in exact.by_lag()]
    np.testing.assert_allclose(found.norm[0], norms, rtol=1e-12)


def test_nothing_to_take_apart() -> None:
    """A dead layer has no gradient to compare with; failed parity withholds everything."""
    track = constant(0.9, 5)
    for found in (contributions(track, [0], True, PLENTY), measured(dead())):
        assert np.isnan(found.error).all()
        assert np.isnan(found.window).all()
        assert np.isnan(found.cancellation).all()
    assert np.isnan(triangle(track, [0], True, PLENTY).log10_norm).all()
    assert (measured(dead()).norm == 0).all()


@pytest.mark.parametrize("width", [1, 40])
def test_a_diverging_layer_is_not_finite_where_it_is_not(width: int) -> None:
    rnn = nn.RNN(width, width, nonlinearity="relu", bias=False)
    nn.init.constant_(rnn.weight_hh_l0, 50.0)
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    finite = pytest.warns(UserWarning, match="not finite")
    with finite, gradflow.record(rnn) as recording:
        rnn(torch.ones(60, 1, width))[0][-1].pow(2).sum().backward()
    found = measured(recording["l0"])
    assert not np.isfinite(found.total).any()
    assert np.isnan(found.window).all()
    assert not np.isfinite(triangle(recording["l0"], [0], False, PLENTY).log10_norm).all()


def dead() -> Track:
    rnn = nn.RNN(2, 3, nonlinearity="relu", dtype=F64)
    nn.init.constant_(rnn.bias_ih_l0, -100.0)
    with gradflow.record(rnn) as recording:
        rnn(torch.ones(5, 2, 2, dtype=F64))[0].sum().backward()
    return recording["l0"]


# --------------------------------------------------------------------------------------- budget


def every_step(batch: int = 4) -> Track:
    lstm = nn.LSTM(3, 8, dtype=F64)
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(30, batch, 3, dtype=F64))[0].pow(2).sum().backward()
    return recording["l0"]


def least(track: Track, sequences: int) -> Contributed:
    """What the smallest budget in steps of 0.1 ms gives that pays for so many whole sequences."""
    assert track.reached is not None
    for count in range(1000):
        chosen, lags, _ = affordable(track, track.reached, [2], count * 1e-4)
        if len(chosen) == sequences and lags == track.steps:
            return contributions(track, [2], False, count * 1e-4)
    raise AssertionError("no budget pays for them")


def test_too_dear_for_all_sequences() -> None:
    track = every_step()
    found = least(track, 2)
    assert found.sequences == (0, 2)  # the mapped one, then the first
    assert "was measured on 2 of 4 sequences: all of it would take about" in found.note
    exact = track.contributions([0, 2])
    assert exact is not None
    norms = [float(part["weight_hh"].matrix().norm()) for part in exact.by_lag()]
    np.testing.assert_allclose(found.norm[0], norms, rtol=1e-12)


def test_too_dear_for_one_sequence() -> None:
    track = every_step()
    found, whole = contributions(track, [2], False, 8e-3), least(track, 1)
    known = int((~np.isnan(found.norm[0])).sum())
    assert 0 < known < 30
    assert f"1 of 4 sequences and the first {known} of 30 lags" in found.note
    np.testing.assert_array_equal(found.error[:, :known], whole.error[:, :known])
    for unknown in (found.norm[:, known:], found.cancellation, found.depth, found.window):
        assert np.isnan(unknown).all()
    assert np.isnan(contributions(track, [2], False, 0.0).norm).all()


def test_a_part_is_said_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lstm = nn.LSTM(2, 3)
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(20, 3, 2))[0].sum().backward()
    assert not any("picked up" in warning for warning in gradflow.analyze(recording).warnings)
    monkeypatch.setattr(assemble, "LAG_SECONDS", 0.0)
    analysis = gradflow.analyze(recording)
    assert any("1 of 3 sequences and the first 0 of 20 lags" in w for w in analysis.warnings)
    loaded = gradflow.load(analysis.save(tmp_path / "run.nc"))
    assert "picked up" in loaded["l0"].data["lag_contribution"].attrs["note"]


# -------------------------------------------------------------------------------- in an analysis


def test_a_marked_loop_has_a_triangle_and_no_weights() -> None:
    u, h = torch.full((2, 2), 0.3, dtype=F64, requires_grad=True), torch.zeros(3, 2, dtype=F64)
    with gradflow.record(nn.Module()) as recording:
        loss = torch.zeros((), dtype=F64)
        for _ in range(5):
            h = gradflow.tap(h=torch.tanh(h @ u + 1.0))
            loss = loss + h.sum()
        loss.backward()
    data = gradflow.analyze(recording)["loop"].data
    assert data["log10_triangle"].shape == (1, 1, 5, 5)
    assert np.isfinite(data["log10_triangle"].values[0, 0][np.tril_indices(5)]).all()
    assert data.sizes["parameter"] == 0
    assert data["truncation_window"].shape == (0, 3)


def test_without_a_backward_all_is_undefined() -> None:
    gru = nn.GRU(2, 3)
    with pytest.warns(UserWarning, match="no backward"), gradflow.record(gru) as recording:
        gru(torch.ones(12, 2, 2))
    data = gradflow.analyze(recording)["l0"].data
    assert data["log10_triangle"].dims == ("state", "sequence", "loss_step", "step")
    for name in ("log10_triangle", "lag_contribution", "truncation_window", "cancellation"):
        assert np.isnan(data[name].values).all()


def test_the_same_numbers_in_an_analysis(tmp_path: Path) -> None:
    def loss(output: Tensor) -> Tensor:
        return output.pow(2).sum()

    lstm = nn.LSTM(2, 4, 2, dtype=F64)
    with gradflow.record(lstm) as recording:
        loss(lstm(torch.randn(10, 3, 2, dtype=F64))[0]).backward()
    analysis = gradflow.analyze(recording)
    for layer in gradflow.load(analysis.save(tmp_path / "run.nc")).values():
        found = measured(recording[layer.name])
        data = layer.data
        assert data["tolerance"].values.tolist() == [0.01, 0.05, 0.1]
        assert data["parameter"].values.tolist() == ["weight_hh", "weight_ih"]
        np.testing.assert_allclose(data["lag_contribution"].values, found.norm, rtol=1e-12)
        np.testing.assert_array_equal(data["truncation_window"].values, found.window)
        np.testing.assert_allclose(data["cancellation"].values, found.cancellation, rtol=1e-12)
        np.testing.assert_allclose(data["gradient_depth"].values, found.depth, rtol=1e-12)
        first = data["lag_contribution"].sel(parameter="weight_hh").values
        assert first[0] > 0
