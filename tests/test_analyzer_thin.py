"""Gains of wide states by products with few directions.

Oracle: the products of the dense step Jacobians of the very same loop, and closed forms. All in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from seam import step_jacobians
from torch import Tensor, nn
from torch.autograd import functional
from wide_cells import WIDE, Convolutional, convolved

import gradflow
from gradflow.analysis import LayerAnalysis
from gradflow.analyzer import thin
from gradflow.hooks import wide
from gradflow.recording import Recording, Track

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 14


@pytest.fixture
def _thin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "WIDE_WRITING", -1.0)


def measured(track: Track, span: int | None = None) -> LayerAnalysis:
    recording = Recording("model")
    recording.add(track)
    (layer,) = gradflow.analyze(recording, span=span).values()
    return layer


def exact(track: Track) -> Callable[[int, int, int], Tensor]:
    """P(t' ← t) of a sequence, from dense step Jacobians."""
    jacobians = step_jacobians(track)

    def product(b: int, source: int, target: int) -> Tensor:
        found = torch.eye(jacobians.shape[2], dtype=torch.float64)
        for t in range(source + 1, target + 1):
            found = jacobians[t, b] @ found
        return found

    return product


@pytest.mark.parametrize("make", WIDE, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("_thin")
def test_gains_are_those_of_the_dense_products(make: Callable[..., Track]) -> None:
    layer, known = measured(make(None, STEPS)), exact(make(True, STEPS))
    assert "by products with few directions" in layer.method
    gains, error = layer.data["log_gain"], layer.data["log_rms_error"]
    pairs = np.argwhere(np.isfinite(error.isel(sequence=0).values))
    assert {t - s for s, t in pairs} >= {1, 2, 4, 8, STEPS - 1}
    b = int(gains["sequence"][0])
    for source, target in pairs:
        product = known(b, source, target)
        pair = {"sequence": 0, "source": source, "target": target}
        spectral = float(gains.sel(norm="spectral").isel(pair))
        rms = float(gains.sel(norm="rms").isel(pair))
        largest = torch.linalg.matrix_norm(product, 2).log().item()
        typical = (torch.linalg.matrix_norm(product).log() - math.log(len(product)) / 2).item()
        assert -0.01 <= spectral - largest <= 1e-9
        assert abs(rms - typical) <= 4 * float(error.isel(pair)) + 1e-9


@pytest.mark.parametrize("make", WIDE, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("_thin")
def test_what_rests_on_the_loss_is_exact(make: Callable[..., Track]) -> None:
    layer, track = measured(make(None, STEPS)), make(True, STEPS)
    theirs = measured(track)
    assert "by products" not in theirs.method
    mine, other = (
        one.data["log_gain"].sel(norm="loss").isel(sequence=0) for one in (layer, theirs)
    )
    assert int(mine["sequence"]) == int(other["sequence"])
    assert np.isfinite(other.values).sum() >= STEPS
    np.testing.assert_allclose(mine.values, other.values, atol=1e-10)
    for name in ("log10_grad", "grad_norm"):
        np.testing.assert_allclose(layer.data[name], theirs.data[name], rtol=1e-9, atol=1e-9)
    assert layer.verdict == theirs.verdict


@pytest.mark.usefixtures("_thin")
def test_the_horizon_is_known_to_the_step_though_few_distances_are_measured() -> None:
    scale, size = 0.55, 70
    turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].requires_grad_()
    with gradflow.record(nn.Module()) as recording:
        h = torch.randn(2, size, dtype=torch.float64)
        for _ in range(30):
            h = gradflow.tap(h=scale * h @ turn.T)
        h.sum().backward()
    layer = measured(recording["loop"])
    assert layer.horizon == math.floor(math.log(1e-3) / math.log(scale)) + 1
    assert layer.half_life == pytest.approx(math.log(0.5) / math.log(scale), rel=1e-6)
    lags = np.flatnonzero(layer.data["lag_count"].values)
    median = layer.data["lag_median"].values[lags]
    np.testing.assert_allclose(median, lags * math.log(scale), atol=1e-9)


def test_a_cell_of_moderate_width_is_written_out_after_all() -> None:
    torch.manual_seed(0)
    turn = torch.randn(128, 128) / 128**0.5
    weight = turn.clone().requires_grad_()
    with gradflow.record(nn.Module()) as recording:
        h = torch.randn(1, 128)
        for _ in range(12):
            h = gradflow.tap(h=h @ weight.T)
        h.sum().backward()
    layer = measured(recording["loop"])
    assert layer.method.startswith("exact") and layer.channels is not None
    spectral = layer.data["log_gain"].sel(norm="spectral").isel(sequence=0)
    for k in (1, 4, 11):
        largest = torch.linalg.matrix_norm(torch.linalg.matrix_power(turn.double(), k), 2).log()
        assert float(spectral.isel(source=0, target=k)) == pytest.approx(largest.item(), abs=1e-3)


def test_a_layer_too_dear_to_be_measured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "WIDE_WRITING", -1.0)
    monkeypatch.setattr(thin, "THIN_SECONDS", -1.0)
    monkeypatch.setattr("gradflow.analyzer.core.MAP_SECONDS", -1.0)
    layer = measured(convolved(None))
    assert "gains between steps not measured" in layer.method
    assert "record fewer sequences" in layer.method
    assert layer.horizon is None


def test_the_convlstm_of_a_small_real_size() -> None:
    """8 channels of 16 × 16: the largest gain over 9 steps by power iteration on jvp and vjp."""
    torch.manual_seed(0)
    cell = Convolutional(8)
    x = torch.rand(2, 10, 1, 16, 16)
    with gradflow.record(cell) as recording:
        state = (torch.zeros(2, 8, 16, 16),) * 2
        for t in range(10):
            state = cell(x[:, t], state)
        state[0].pow(2).mean().backward()
    layer = gradflow.analyze(recording)["cell"]
    b = int(layer.data["sequence"][0])
    states = [(torch.zeros(1, 8, 16, 16),) * 2]
    with torch.no_grad():
        for t in range(10):
            states.append(cell(x[b : b + 1, t], states[-1]))
    v, size = tuple(torch.randn(2, 1, 8, 16, 16)), torch.tensor(0.0)
    for _ in range(12):
        for t in range(1, 10):
            v = functional.jvp(lambda *s, t=t: cell(x[b : b + 1, t], s), states[t], v)[1]
        for t in range(9, 0, -1):
            v = functional.vjp(lambda *s, t=t: cell(x[b : b + 1, t], s), states[t], v)[1]
        size = torch.stack([part.square().sum() for part in v]).sum().sqrt()
        v = tuple(part / size for part in v)
    gain = layer.data["log_gain"].sel(norm="spectral").isel(sequence=0, source=0, target=9)
    assert float(gain) == pytest.approx(size.log().item() / 2, abs=0.02)
    assert layer.verdict == "vanishing"
    assert np.isfinite(layer.data["log10_grad"].values).any()


@pytest.mark.usefixtures("_thin")
def test_a_counter_beside_a_wide_state_has_no_vote() -> None:
    torch.manual_seed(1)
    weight = (torch.randn(70, 70, dtype=torch.float64) / 12).requires_grad_()
    with gradflow.record(nn.Module()) as recording:
        h, n = torch.randn(2, 70, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        for _ in range(9):
            h, n = gradflow.tap(h=torch.tanh(h @ weight.T), n=2 * n + h[:, :1])
        h.pow(2).sum().backward()
    layer = measured(recording["loop"])
    assert "by products with few directions" in layer.method
    spectral = layer.data["log_gain"].sel(norm="spectral").isel(sequence=0, source=0, target=8)
    jacobians = step_jacobians(recording["loop"])[1:, int(layer.data["sequence"][0]), :70, :70]
    product = torch.linalg.multi_dot(list(jacobians.flip(0)))
    assert float(spectral) == pytest.approx(
        torch.linalg.matrix_norm(product, 2).log().item(), abs=0.01
    )
