"""Acceptance: facts of the theory of recurrent gradients, each with a value known beforehand.

Nothing here was read off gradflow: every expectation is a closed form, a finite difference of
PyTorch's own modules, or a few lines of plain linear algebra in this file. Gains are compared as
logarithms, gradients relatively; there is no absolute tolerance on anything that can vanish.

Letters: T steps, B sequences, H units, S state width, k lag, A_t a step's Jacobian. A tanh network
at state and input zero is exactly linear, A_t = W, which turns facts on maps into facts on modules.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import signal, stats
from seam import rate_of_one, rate_over_sequences
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.analysis import LayerAnalysis
from gradflow.analyzer import log_gain_map, lyapunov_spectrum, step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording, Track

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
LN2 = math.log(2)
DECADE = math.log(10)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------------------- helpers


def logs_close(actual: object, expected: object, bound: float = 1e-9) -> None:
    """|Δ ln| ≤ bound, a relative error of the gain; −inf and NaN in exactly the same places."""
    a, e = np.broadcast_arrays(np.asarray(actual, float), np.asarray(expected, float))
    np.testing.assert_array_equal(np.isnan(a), np.isnan(e), err_msg="NaN in other places")
    np.testing.assert_array_equal(np.isneginf(a), np.isneginf(e), err_msg="other exact zeros")
    finite = np.isfinite(e)
    assert np.isfinite(a[finite]).all()
    worst = np.abs(a[finite] - e[finite]).max(initial=0.0)
    assert worst <= bound, f"ln gains differ by up to {worst:.3g}, allowed {bound:.3g}"


def close(actual: object, expected: object, rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def near(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """|Δ| ≤ rtol · the largest entry of the expected matrix, for matrices with structural zeros."""
    scale = float(expected.abs().max())
    worst = float((actual - expected).abs().max()) / scale
    assert worst <= rtol, f"off by {worst:.3g} of the largest entry {scale:.3g}"


def constant(matrix: object, steps: int, batch: int = 1) -> Tensor:
    one = torch.as_tensor(matrix, dtype=F64)
    return one.expand(steps, batch, *one.shape)


def by_lag(gains: Tensor) -> np.ndarray:
    """ln gain of source 0 at lags 0 … T−1, after checking that the map depends on the lag only."""
    steps = gains.shape[-1]
    first = gains[0, 0].numpy()
    for source in range(1, steps):
        logs_close(gains[0, source, source:], first[: steps - source], 1e-10)
        assert gains[0, source, :source].isnan().all()
    return first


def plain_map(jacobians: Tensor, norm: str) -> np.ndarray:
    """The slow, obvious gain map: one product after the other, rescaled at every step."""
    steps, batch, size, _ = jacobians.shape
    found = np.full((batch, steps, steps), np.nan)
    for b, source in itertools.product(range(batch), range(steps)):
        product, scale = np.eye(size), 0.0
        found[b, source, source] = 0.0
        for target in range(source + 1, steps):
            product = jacobians[target, b].numpy() @ product
            peak = np.abs(product).max()
            if peak == 0:
                found[b, source, target:] = -np.inf
                break
            product, scale = product / peak, scale + math.log(peak)
            spectral = np.linalg.svd(product, compute_uv=False)[0]
            gain = spectral if norm == "spectral" else np.linalg.norm(product) / math.sqrt(size)
            found[b, source, target] = scale + math.log(gain)
    return found


def last(output: Tensor) -> Tensor:
    return output[-1].sum()


def observe(
    module: nn.RNNBase,
    x: Tensor | PackedSequence,
    hx: object = None,
    loss: Callable[..., Tensor] = last,
) -> Recording:
    with gradflow.record(module) as recording:
        output = module(x, hx)[0]
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output)[0]
        loss(output).backward()
    return recording


def linear_rnn(matrix: object, dtype: torch.dtype = F64) -> nn.RNN:
    """A tanh network whose steps are exactly h' = W h, as long as input and state are zero."""
    weight = torch.as_tensor(matrix, dtype=dtype)
    module = nn.RNN(1, len(weight), bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_hh_l0.copy_(weight)
    return module


def linear_layer(
    matrix: object, steps: int = 100, batch: int = 2, span: int | None = None, maps: int = 1
) -> LayerAnalysis:
    recording = observe(linear_rnn(matrix), torch.zeros(steps, batch, 1))
    return gradflow.analyze(recording, span=span, maps=maps)["l0"]


def prescribed_recording(logs: np.ndarray, lengths: list[int] | None = None) -> Recording:
    """A scalar tanh network driven so that ln A_t = logs[t, b]; −inf is a saturated step.

    A = w (1 − h²), so h_t = √(1 − A_t/w), and the input makes it so: x_t = artanh h_t − w h_{t−1}.
    """
    w = float(np.exp(logs[np.isfinite(logs)].max() + 0.2))
    h = np.sqrt(1 - np.exp(logs) / w)
    before = np.concatenate([np.zeros((1, logs.shape[1])), h[:-1]])
    drive = np.full_like(h, 1e3)
    drive[h < 1] = np.arctanh(h[h < 1])
    x: Tensor | PackedSequence = torch.as_tensor(drive - w * before)[..., None]
    module = linear_rnn([[w]])
    nn.init.ones_(module.weight_ih_l0)
    if lengths is not None:
        x = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    return observe(module, x)


def prescribed(
    logs: np.ndarray, lengths: list[int] | None = None, span: int | None = None, maps: int = 1
) -> LayerAnalysis:
    return gradflow.analyze(prescribed_recording(logs, lengths), span=span, maps=maps)["l0"]


def rows(rates: object, steps: int) -> np.ndarray:
    """(T, B) constant ln A_t, one rate per sequence."""
    return np.tile(np.asarray(rates, float), (steps, 1))


def gated_lstm(bias: dict[str, float], hidden: int = 1, inputs: int = 1) -> nn.LSTM:
    """All weights 0, gate pre-activations as given (those left out are 0)."""
    module = nn.LSTM(inputs, hidden)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for place, gate in enumerate("ifgo"):
            module.bias_ih_l0[place * hidden : (place + 1) * hidden] = bias.get(gate, 0.0)
    return module


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lag_curve_of(logs: np.ndarray) -> np.ndarray:
    """L(k) of scalar steps ln A_t, (T, B): median over sequences and sources from s_0 on."""
    steps = len(logs)
    curve = [0.0]
    for k in range(1, steps):
        sums = [logs[s + 1 : s + k + 1].sum(0) for s in range(steps - k)]
        curve.append(float(np.median(np.concatenate(sums))))
    return np.array(curve)


def random_orthogonal(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))[0]


def random_stack(steps: int, size: int, batch: int = 1, gain: float = 1.0) -> Tensor:
    return torch.randn(steps, batch, size, size, dtype=F64) * gain / math.sqrt(size)


def test_the_comparisons_can_fail() -> None:
    for wrong in ([0.1, -math.inf], [0.0, -700.0], [0.0, math.nan]):
        with pytest.raises(AssertionError):
            logs_close(wrong, [0.0, -math.inf])
    with pytest.raises(AssertionError):
        close([1e-200], [2e-200])
    with pytest.raises(AssertionError):
        near(torch.tensor([1e-200]), torch.tensor([1.1e-200]))


# ----------------------------------------------------------------- step Jacobians (section 1)

CELLS: dict[str, Callable[[], nn.RNNBase]] = {
    "rnn_tanh": lambda: nn.RNN(3, 4),
    "rnn_relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "rnn_no_bias": lambda: nn.RNN(3, 4, bias=False),
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm_no_bias": lambda: nn.LSTM(3, 4, bias=False),
    "lstm_proj": lambda: nn.LSTM(3, 5, proj_size=2),
    "gru": lambda: nn.GRU(3, 4),
    "gru_no_bias": lambda: nn.GRU(3, 4, bias=False),
}


def lively(make: Callable[[], nn.RNNBase]) -> nn.RNNBase:
    """Weights large enough that every term of the Jacobian matters."""
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def widths(module: nn.RNNBase) -> tuple[int, int]:
    """Entries of h and of c (0 without a c)."""
    h = module.proj_size or module.hidden_size
    return h, module.hidden_size if isinstance(module, nn.LSTM) else 0


def split(module: nn.RNNBase, state: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """(n, S) → what the module takes as hx."""
    h, c = widths(module)
    if not c:
        return state[None]
    return state[None, :, :h].contiguous(), state[None, :, h:].contiguous()


def advance(module: nn.RNNBase, x: Tensor, state: Tensor) -> Tensor:
    """The joint state (n, S) after the steps x (T, n, I), by PyTorch's own kernel."""
    hx = module(x, split(module, state))[1]
    return torch.cat([hx[0][0], hx[1][0]], -1) if isinstance(hx, tuple) else hx[0]


def differences(module: nn.RNNBase, x: Tensor, start: Tensor, h: float = 1e-3) -> Tensor:
    """A_t of every step and sequence by five-point differences, (T, B, S, S)."""
    steps, batch, _ = x.shape
    size = start.shape[1]
    found = torch.empty(steps, batch, size, size)
    state = start
    with torch.no_grad():
        for t in range(steps):
            for b in range(batch):
                drive = x[t : t + 1, b : b + 1].expand(1, size, -1).contiguous()

                def moved(step: float, drive: Tensor = drive, s: Tensor = state[b]) -> Tensor:
                    return advance(module, drive, s + step * torch.eye(size))

                slope = 8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))
                found[t, b] = slope.T / (12 * h)
            state = advance(module, x[t : t + 1], state)
    return found


@pytest.mark.parametrize("name", CELLS)
def test_step_jacobians_are_finite_differences(name: str) -> None:
    module = lively(CELLS[name])
    x, start = torch.randn(6, 2, 3), 0.5 * torch.randn(2, sum(widths(module)))
    track = observe(module, x, split(module, start))["l0"]
    # ReLU is linear between its kinks: a smaller step only keeps away from them
    expected = differences(module, x, start, 1e-5 if name == "rnn_relu" else 1e-3)
    actual = step_jacobians(track)
    assert actual.dtype == F64 and not actual.requires_grad
    near(actual, expected, 1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_products_of_jacobians_are_autograds(name: str) -> None:
    module = lively(CELLS[name])
    x, start = torch.randn(7, 1, 3), 0.5 * torch.randn(1, sum(widths(module)))
    track = observe(module, x, split(module, start))["l0"]
    stack = step_jacobians(track)
    spectral, rms = log_gain_map(stack)[0], log_gain_map(stack, "rms")[0]
    state = start
    for t in range(6):
        state = advance(module, x[t : t + 1], state).detach()
        for target in range(t + 1, 7):
            later = x[t + 1 : target + 1]
            whole = torch.autograd.functional.jacobian(
                lambda s, later=later: advance(module, later, s), state
            )[0, :, 0]
            logs_close(spectral[t, target], torch.linalg.matrix_norm(whole, 2).log())
            size = math.sqrt(len(whole))
            logs_close(rms[t, target], (torch.linalg.matrix_norm(whole) / size).log())


def test_four_paths_of_the_cell_state() -> None:
    module = lively(CELLS["lstm"])
    x = torch.randn(6, 1, 3)
    track = observe(module, x)["l0"]
    stack, gates = step_jacobians(track)[:, 0], {k: v[:, 0] for k, v in track.gates.items()}
    assert track.c is not None
    c = track.c[:, 0]
    u_i, u_f, u_g, _ = module.weight_hh_l0.detach().chunk(4)
    for t in range(1, 6):
        i, f, g = (gates[name][t] for name in "ifg")
        reach = gates["o"][t - 1] * (1 - c[t - 1].tanh() ** 2)
        paths = [
            torch.diag(f),
            torch.diag(c[t - 1] * f * (1 - f)) @ u_f * reach,
            torch.diag(g * i * (1 - i)) @ u_i * reach,
            torch.diag(i * (1 - g**2)) @ u_g * reach,
        ]
        ch, cc = stack[t, 4:, :4], stack[t, 4:, 4:]
        near(cc, paths[0], 1e-13)
        near(cc + ch * reach, sum(paths[1:], paths[0]), 1e-12)


def test_the_product_of_the_hidden_block_alone_is_another_thing() -> None:
    module = gated_lstm({"f": 3.0, "i": 1.0, "g": 1.0, "o": 1.0}, hidden=3)
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.3 * torch.randn(12, 3))
    stack = step_jacobians(observe(module, torch.zeros(30, 1, 1))["l0"])
    whole = log_gain_map(stack, "rms")[0, 0, -1]
    alone = log_gain_map(stack[..., :3, :3].contiguous(), "rms")[0, 0, -1]
    assert whole - alone > 5 * DECADE


# -------------------------------------------------------------- maps and networks (section 6)


def test_scalar_decay() -> None:
    lags = np.arange(100)
    for norm in ("spectral", "rms"):
        logs_close(by_lag(log_gain_map(constant([[0.9]], 100), norm)), lags * math.log(0.9))
    layer = linear_layer([[0.9]])
    close(layer.rate.value, math.log(0.9), 1e-12)
    close(layer.rate.value, -0.1053605, 1e-6)
    close(layer.half_life, 6.578813, 1e-6)
    assert layer.horizon == 66
    assert layer.verdict == "vanishing" and layer.labels == ()
    logs_close(layer.data["lag_median"], lags * math.log(0.9))
    logs_close(layer.data["lag_slope"][1:], np.full(99, math.log(0.9)))


def test_three_rates_at_once() -> None:
    diagonal = np.array([0.5, 0.9, 0.99])
    lags = np.arange(60)
    stack = constant(np.diag(diagonal), 60)
    frobenius = 0.5 * np.log((diagonal[None] ** (2 * lags[:, None])).sum(1))
    logs_close(by_lag(log_gain_map(stack)), lags * math.log(0.99))
    logs_close(by_lag(log_gain_map(stack, "rms")), frobenius - 0.5 * math.log(3))
    exponents = lyapunov_spectrum(constant(np.diag(diagonal), 1000))
    close(exponents[0], np.log(diagonal[::-1]), 1e-6)
    close(exponents[0], [-0.0100503, -0.1053605, -0.6931472], 1e-5)


@pytest.mark.parametrize("angle", [0.1, math.pi / 3, 2.0])
def test_rotation_keeps_everything(angle: float) -> None:
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    layer = linear_layer(turn)
    logs_close(layer.data["lag_median"], np.zeros(100))
    logs_close(layer.data["log_singular"], np.zeros((1, 2)))
    assert layer.lyapunov is not None
    logs_close(layer.lyapunov, [0.0, 0.0], 1e-12)
    assert layer.verdict == "stable" and layer.channels == 2 and layer.findings == ()
    assert layer.horizon is None and math.isinf(layer.half_life)


def test_shrunk_orthogonal() -> None:
    layer = linear_layer(0.95 * random_orthogonal(8))
    assert layer.lyapunov is not None
    close(layer.lyapunov, np.full(8, math.log(0.95)), 1e-10)
    close(layer.rate.value, -0.0512933, 1e-6)
    close(layer.half_life, 13.5134, 1e-5)
    assert layer.horizon == 135 or (layer.horizon is None and layer.searched == 99)


def test_nilpotent_shift() -> None:
    shift = np.eye(8, k=1)
    lags = np.arange(30)
    with np.errstate(divide="ignore"):
        rms = 0.5 * np.log(np.maximum(8 - lags, 0) / 8)
    logs_close(by_lag(log_gain_map(constant(shift, 30))), np.where(lags < 8, 0.0, -np.inf))
    logs_close(by_lag(log_gain_map(constant(shift, 30), "rms")), rms)
    assert torch.isneginf(lyapunov_spectrum(constant(shift, 60))).all()
    layer = linear_layer(shift, 60)
    assert layer.verdict == "dead" and layer.rate.value == -math.inf
    assert layer.horizon == 8 and layer.channels == 0 and layer.half_life == 8.0
    np.testing.assert_array_equal(layer.data["lag_zero_share"], np.arange(60) >= 8)


def test_gaussian_powers_grow_though_the_rate_is_zero() -> None:
    weight = torch.randn(400, 400, dtype=F64) / 20
    gains = log_gain_map(constant(weight, 4))[0, 0, 1:].exp()
    k = np.arange(1, 4)
    close(gains, np.sqrt((k + 1.0) ** (k + 1) / k**k), 0.1)
    close(gains, [2, 2.598, 3.079], 0.1)
    radius = float(torch.linalg.eigvals(weight).abs().max().log())  # 0 as N → ∞
    rate = float(lyapunov_spectrum(constant(weight.float(), 600), k=1))
    assert abs(radius) < 0.1 and abs(rate - radius) < 0.01


@pytest.mark.parametrize(("w", "rate"), [(2.0, -LN2), (4.0, 0.0), (8.0, LN2)])
def test_sigmoid_scalar(w: float, rate: float) -> None:
    h, steps = 0.5, []
    for _ in range(50):
        h = sigmoid(w * h - w / 2)
        steps.append(w * h * (1 - h))
    logs_close(lyapunov_spectrum(torch.tensor(steps).reshape(50, 1, 1, 1)), [[rate]], 1e-12)
    # σ(z) = (1 + tanh(z/2))/2: the same network in u = 2h − 1 is tanh(w u/4)
    layer = linear_layer([[w / 4]], 120)
    logs_close(layer.rate.value, rate, 1e-12)
    assert layer.verdict == {-LN2: "vanishing", 0.0: "stable", LN2: "exploding"}[rate]


@pytest.mark.parametrize("w", [3.9, -3.9])
def test_hochreiters_bound(w: float) -> None:
    module = linear_rnn([[w / 4]])
    stack = step_jacobians(observe(module, 3 * torch.randn(80, 4, 1))["l0"])
    gains = log_gain_map(stack)
    lag = torch.arange(80)[None, :] - torch.arange(80)[:, None]
    inside = lag >= 0
    assert (gains[:, inside] <= lag[inside] * math.log(0.975) + 1e-12).all()


@pytest.mark.parametrize(("w", "slope"), [(1.5, 0.3943130), (2.0, 0.1663721), (3.0, 0.0305128)])
def test_tanh_at_its_fixed_point(w: float, slope: float) -> None:
    h = 1.0
    for _ in range(500):
        h = math.tanh(w * h)
    start = torch.full((1, 2, 1), h, dtype=F64)
    recording = observe(linear_rnn([[w]]), torch.zeros(50, 2, 1), start)
    close(step_jacobians(recording["l0"]), slope, 2e-6)
    close(gradflow.analyze(recording)["l0"].rate.value, math.log(slope), 1e-6)


def test_critical_tanh_is_a_power_law() -> None:
    module = linear_rnn([[1.0]])
    recording = observe(module, torch.zeros(1001, 2, 1), torch.ones(1, 2, 1))
    stack = step_jacobians(recording["l0"])
    logs = stack[:, 0, 0, 0].log().numpy()
    close([logs[:100].sum(), logs[:1000].sum()], [-6.4427616, -9.8698693], 1e-7)
    gains = log_gain_map(stack[:, :1])[0, 0]
    close(gains[[100, 1000]], [-5.5898493, -9.0038035], 1e-7)
    assert -1.5 - 0.02 < float(gains[1000] - gains[500]) / LN2 < -1.5 + 0.02


def test_power_law_is_labelled_and_has_an_interpolated_half_life() -> None:
    logs = np.tile(-1.5 * np.diff(np.log(2 + np.arange(201.0)))[:, None], (1, 3))
    layer = prescribed(logs)
    assert "not exponential" in layer.labels
    curve = lag_curve_of(logs[:, :1])
    logs_close(layer.data["lag_median"], curve, 1e-8)
    k = int(np.flatnonzero(curve <= -LN2)[0])
    share = (curve[k - 1] + LN2) / (curve[k - 1] - curve[k])
    close(layer.half_life, k - 1 + share, 1e-6)


@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
def test_norm_bound_of_tanh_networks(gain: float) -> None:
    weight = gain * torch.randn(6, 6, dtype=F64) / math.sqrt(6)
    recording = observe(linear_rnn(weight), torch.randn(40, 3, 1))
    gains = log_gain_map(step_jacobians(recording["l0"]))
    lag = torch.arange(40)[None, :] - torch.arange(40)[:, None]
    inside = lag >= 0
    bound = lag * torch.linalg.matrix_norm(weight, 2).log()
    assert (gains[:, inside] <= bound[inside] + 1e-10).all()


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda: nn.RNN(1, 512), -0.549),
        (lambda: nn.LSTM(1, 256), -0.4395),
        (lambda: nn.GRU(1, 256), -0.4395),
    ],
    ids=["RNN", "LSTM", "GRU"],
)
def test_default_initialisation_at_zero_input(make: Callable[[], nn.RNNBase], rate: float) -> None:
    stack = step_jacobians(observe(make(), torch.zeros(50, 1, 1))["l0"])
    assert abs(float(lyapunov_spectrum(stack, k=1)) - rate) < 0.06
    if rate == -0.549:  # one step's norm is no test
        assert abs(float(log_gain_map(stack[:2])[0, 0, 1].exp()) - 1.155) < 0.06


@pytest.mark.parametrize(
    ("bias", "half_life"), [(0, 1.0), (1, 2.2127), (2, 5.4609), (3, 14.266), (5, 103.22)]
)
def test_lstm_without_recurrent_weights(bias: float, half_life: float) -> None:
    module = gated_lstm({"f": bias, "i": 0.3, "g": 0.7, "o": -0.2})
    recording = observe(module, torch.zeros(60, 2, 1))
    layer, track = gradflow.analyze(recording)["l0"], recording["l0"]
    f = sigmoid(bias)
    stack = step_jacobians(track)
    close(stack[:, 0, 1, 1], f, 1e-14)
    assert not stack[:, :, :, 0].any(), "with W_hh = 0 nothing depends on h"
    # P = [[0, o (1 − tanh² c) f^k], [0, f^k]]
    assert track.c is not None
    leak = (track.gates["o"] * (1 - track.c.tanh() ** 2))[:, 0, 0].numpy()
    shape = 0.5 * np.log1p(leak**2)
    gains = log_gain_map(stack[:, :1])[0, 0].numpy()
    logs_close(gains[1:], np.arange(1, 60) * math.log(f) + shape[1:], 1e-12)
    # the rate sees the cell settle, by (shape at the end − shape after the burn-in)/counted steps
    close(layer.rate.value, math.log(f) + (shape[59] - shape[11]) / 48, 1e-10)
    close(layer.half_life, half_life, 1e-4)


def test_an_open_forget_gate_is_no_fault() -> None:
    recording = observe(gated_lstm({"f": 100.0}), torch.zeros(60, 2, 1))
    layer = gradflow.analyze(recording)["l0"]
    logs_close(layer.rate.value, 0.0, 1e-15)
    assert layer.verdict == "stable" and math.isinf(layer.half_life) and layer.horizon is None
    assert layer.findings == ()


def test_state_partial_and_graph_gradient_of_the_cell() -> None:
    bias, steps = 1.0, 12
    module = gated_lstm({"f": bias, "i": 1.0, "g": 1.0, "o": 0.5})
    track = observe(module, torch.zeros(steps, 1, 1))["l0"]
    assert track.c is not None and track.grad_c is not None
    f, o = sigmoid(bias), sigmoid(0.5)
    top = o * (1 - float(track.c[-1].tanh()) ** 2)
    back = np.arange(steps - 1, -1, -1)
    close(track.grad_c[:, 0, 0], top * f**back, 1e-12)
    # the state's own partial: start from (∂L/∂h, ∂L/∂c) = (1, 0) and pull
    block, operator = torch.tensor([[[1.0, 0.0]]]), track.operator()
    for t in range(steps - 1, 0, -1):
        block = operator.pull(t, block)
        close(block[0, 0, 1], track.grad_c[t - 1, 0, 0], 1e-12)
        assert block[0, 0, 0] == 0


def test_chrono_initialisation() -> None:
    count, reach = 2000, 100
    u = 1 + (reach - 2) * (torch.arange(count) + 0.5) / count
    module = gated_lstm({})
    with torch.no_grad():  # every sequence is one unit: its input is its forget bias
        module.weight_ih_l0[1] = 1.0
    x = u.log()[None, :, None].expand(102, -1, -1)
    grads = observe(module, x)["l0"].grad_c
    assert grads is not None
    mean = (grads / grads[-1]).mean(1)[:, 0]
    lags = torch.tensor([1, 10, 50, 100])
    close(mean[-1 - lags], [0.9600814, 0.7325894, 0.3302039, 0.1496476], 1e-4)


def test_gru_without_recurrent_weights() -> None:
    module = nn.GRU(1, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[3:6] = 1.0
        module.bias_ih_l0[6:] = 0.8
    recording = observe(module, torch.randn(40, 2, 1))
    near(step_jacobians(recording["l0"]), constant(0.7310586 * np.eye(3), 40, 2), 1e-7)
    gains = by_lag(log_gain_map(step_jacobians(recording["l0"])[:, :1]))
    logs_close(gains, np.arange(40) * math.log(sigmoid(1.0)), 1e-12)


def test_coupled_gates() -> None:
    module = gated_lstm({"f": 0.7, "i": -0.7, "g": 1.0})
    with torch.no_grad():
        module.weight_ih_l0[0], module.weight_ih_l0[1] = -1.0, 1.0
    track = observe(module, torch.randn(30, 1, 1))["l0"]
    f = track.gates["f"]
    close(track.gates["i"], 1 - f, 1e-12)
    cell_path = step_jacobians(track)[:, :, 1:, 1:].contiguous()
    logs_close(log_gain_map(cell_path)[0, 0], (f[:, 0, 0].log().cumsum(0) - f[0, 0, 0].log()))


def test_cross_block_of_two_linear_layers() -> None:
    a, b = 0.9, 0.7
    k = np.arange(20)
    cross = a * (a**k - b**k) / (a - b)
    close(cross[7], 1.7817417, 1e-7)
    # as one joint state
    joint = constant([[a, 0.0], [a, b]], 20)
    expected = 0.5 * np.log((a ** (2 * k) + b ** (2 * k) + cross**2) / 2)
    logs_close(by_lag(log_gain_map(joint, "rms")), expected, 1e-12)
    # and as a stack: the total at the lower state counts the path through the upper layer
    module = nn.RNN(1, 1, num_layers=2, bias=False)
    with torch.no_grad():
        module.weight_hh_l0.fill_(a)
        module.weight_hh_l1.fill_(b)
        module.weight_ih_l1.fill_(1.0)
    recording = observe(module, torch.zeros(20, 1, 1))
    back = k[::-1]
    close(recording["l1"].grad_h[:, 0, 0], b**back, 1e-12)
    close(recording["l0"].grad_h[:, 0, 0], (a ** (back + 1) - b ** (back + 1)) / (a - b), 1e-12)
    # what comes from above alone
    close(recording["l0"].grad_h_direct[:, 0, 0], b**back, 1e-12)


def orbit(step: Callable[[np.ndarray], np.ndarray], x: np.ndarray, steps: int) -> np.ndarray:
    found = np.empty((steps, *x.shape))
    for t in range(steps):
        found[t] = x
        x = step(x)
    return found


@pytest.mark.parametrize(("r", "expected", "bound"), [(4.0, LN2, 2e-3), (3.2, -0.9162907, 1e-6)])
def test_logistic_map(r: float, expected: float, bound: float) -> None:
    start = np.linspace(0.11, 0.87, 24)
    for _ in range(2):  # let the cycle of r = 3.2 settle
        start = orbit(lambda x: r * x * (1 - x), start, 500)[-1]
    visited = orbit(lambda x: r * x * (1 - x), start, 1250)
    slopes = torch.as_tensor(r * (1 - 2 * visited))[..., None, None]
    assert abs(float(lyapunov_spectrum(slopes).mean()) - expected) <= bound


def test_cat_map_and_tent_map() -> None:
    exponents = lyapunov_spectrum(constant([[2.0, 1.0], [1.0, 1.0]], 200))
    logs_close(exponents, [[0.9624237, -0.9624237]], 1e-7)
    logs_close(exponents, [[2 * math.log((1 + 5**0.5) / 2), -2 * math.log((1 + 5**0.5) / 2)]])
    signs = torch.where(torch.rand(200) < 0.5, 1.9, -1.9).to(F64)
    logs_close(lyapunov_spectrum(signs.reshape(-1, 1, 1, 1)), [[math.log(1.9)]], 1e-12)


@pytest.mark.parametrize(("gain", "rate"), [(1.5, 0.065), (2.0, 0.155), (3.0, 0.310)])
def test_random_tanh_networks_are_chaotic(gain: float, rate: float) -> None:
    module = linear_rnn(gain * torch.randn(400, 400, dtype=F64) / 20)
    with torch.no_grad():
        h = module(torch.zeros(200, 1, 1), torch.randn(1, 1, 400))[1]
    track = observe(module, torch.zeros(250, 1, 1), h)["l0"]
    found = float(lyapunov_spectrum(step_jacobians(track), k=1))
    assert abs(found - rate) <= 0.03


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
def test_triangle_of_per_step_losses(name: str) -> None:
    module, x = lively(CELLS[name]), torch.randn(6, 2, 3)

    def seen(steps: range) -> Track:
        return observe(module, x, loss=lambda y: sum((y[t] ** 2).sum() for t in steps))["l0"]

    whole, parts = seen(range(6)), [seen(range(t, t + 1)) for t in range(6)]
    for state, total in whole.grads.items():
        for later, part in enumerate(parts):
            assert not part.grads[state][later + 1 :].any(), "a loss reaches only its own past"
        near(sum((part.grads[state] for part in parts), torch.zeros(())), total, 1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_weight_gradient_is_rebuilt_from_delta(name: str) -> None:
    module = lively(CELLS[name]).float()
    x = torch.randn(9, 3, 3, dtype=torch.float32)
    recording = observe(module, x, loss=lambda y: (y**2).sum())
    track = recording["l0"]
    before = torch.cat([track.h0[None], track.h[:-1]])
    rebuilt = torch.einsum("tbg,tbh->gh", track.delta_hh, before)
    assert module.weight_hh_l0.grad is not None and module.weight_ih_l0.grad is not None
    near(rebuilt, module.weight_hh_l0.grad, 1e-5)
    near(torch.einsum("tbg,tbi->gi", track.delta, x), module.weight_ih_l0.grad, 1e-5)
    assert track.parity.status == "passed"
    if name.startswith("gru"):
        reset = torch.cat([torch.ones(9, 3, 8), track.gates["r"]], -1)
        near(track.delta_hh, track.delta * reset, 1e-6)
    else:
        near(track.delta_hh, track.delta, 1e-6)


def test_total_gradient_where_a_hook_shows_zero() -> None:
    track = observe(linear_rnn([[0.9]]), torch.zeros(100, 1, 1))["l0"]
    close(track.grad_h[:, 0, 0], 0.9 ** np.arange(99, -1, -1), 1e-12)
    assert not track.grad_h_direct[:-1].any() and float(track.grad_h_direct[-1]) == 1.0


# ------------------------------------------------------- aggregation and lag curve (section 3)


def test_logarithms_are_averaged_not_gains() -> None:
    random = np.random.default_rng(3)
    logs = random.normal(-0.05, 0.5, (125, 400))
    rates = lyapunov_spectrum(torch.as_tensor(np.exp(logs))[..., None, None])[:, 0].numpy()
    rate = rate_over_sequences(rates)
    assert abs(rate.value + 0.05) < 0.01, "arithmetic means would say +0.075, rms +0.20"
    assert rate.low < -0.05 < rate.high


def test_rate_is_the_mean_over_sequences_past_the_burn_in() -> None:
    logs = np.random.default_rng(0).normal(-0.1, 0.3, (41, 5))
    layer = prescribed(logs)
    rates = logs[9:].mean(0)  # ⌈41/5⌉ = 9
    close(layer.data["sequence_rate"], rates, 1e-9)
    half = stats.t.ppf(0.975, 4) * rates.std(ddof=1) / math.sqrt(5)
    settling = float(layer.data["rate_settling"])  # chance moves the mean step a little
    assert settling < 0.1 * half
    half = math.hypot(half, settling)
    close(
        [layer.rate.value, layer.rate.low, layer.rate.high],
        [rates.mean(), rates.mean() - half, rates.mean() + half],
        1e-9,
    )
    assert layer.lyapunov is not None and layer.lyapunov[0] == layer.rate.value


@pytest.mark.parametrize(("steps", "burned"), [(9, 0), (10, 2), (11, 3), (50, 10)])
def test_burn_in(steps: int, burned: int) -> None:
    logs = np.random.default_rng(1).normal(-0.1, 0.3, (steps, 2))
    recording = prescribed_recording(logs)
    analysis = gradflow.analyze(recording, seed=5)
    close(analysis["l0"].data["sequence_rate"], logs[burned:].mean(0), 1e-9)
    close(
        lyapunov_spectrum(torch.as_tensor(np.exp(logs))[..., None, None])[:, 0],
        logs[burned:].mean(0),
        1e-9,
    )
    assert ("short" in analysis["l0"].labels) == (steps < 10)
    assert ("transient" in " ".join(analysis.warnings)) == (steps < 10)
    assert analysis.provenance["seed"] == 5 and str(burned) in str(analysis.provenance["burn_in"])


def test_lag_curve_is_the_median_over_sequences_and_sources() -> None:
    logs = np.random.default_rng(2).normal(-0.1, 0.5, (30, 4))
    layer = prescribed(logs, maps=4)
    curve = lag_curve_of(logs)
    logs_close(layer.data["lag_median"], curve, 1e-8)
    np.testing.assert_array_equal(layer.data["lag_count"], 4 * (30 - np.arange(30)))
    below = np.flatnonzero(curve[1:] < math.log(1e-3))
    assert layer.horizon == (int(below[0]) + 1 if len(below) else None)


def test_lag_curve_counts_exact_zeros() -> None:
    logs = np.random.default_rng(2).normal(-0.05, 0.2, (24, 3))
    logs[10, :] = -np.inf
    layer = prescribed(logs, maps=3)
    logs_close(layer.data["lag_median"], lag_curve_of(logs), 1e-8)
    k = np.arange(24)
    crossing = [sum(s < 10 <= s + lag for s in range(24 - lag)) / (24 - lag) for lag in k]
    close(layer.data["lag_zero_share"], crossing, 1e-12)
    assert layer.verdict == "dead"


def test_a_wall_in_the_middle_is_not_smeared() -> None:
    stack = random_stack(20, 3, gain=0.8)
    stack[11] = 0
    for norm in ("spectral", "rms"):
        gains = log_gain_map(stack, norm)[0]
        for source, target in itertools.product(range(20), repeat=2):
            wall = source < 11 <= target
            assert bool(torch.isneginf(gains[source, target])) == wall
            assert bool(torch.isnan(gains[source, target])) == (target < source)
        logs_close(gains, plain_map(stack, norm)[0])


@pytest.mark.parametrize("size", [64, 72])
def test_walls_and_dead_directions_of_wide_states(size: int) -> None:
    stack = random_stack(7, size, gain=0.8)
    stack[4] = 0
    gains = log_gain_map(stack)[0]
    assert torch.isneginf(gains[:4, 4:]).all() and gains[4:, 4:].isfinite().sum() == 6
    shift = constant(np.eye(size, k=size // 3), 6)  # gone after three steps
    expected = np.where(np.arange(6) * (size // 3) < size, 0.0, -np.inf)
    logs_close(by_lag(log_gain_map(shift)), expected, 1e-4 if size > 64 else 1e-9)


def test_median_length_is_the_span_and_padding_is_no_data() -> None:
    lengths = [12, 30, 20]
    logs = np.random.default_rng(4).normal(-0.1, 0.3, (30, 3))
    layer = prescribed(logs, lengths, maps=3)
    assert layer.span == 20
    rates = [logs[math.ceil(n / 5) : n, b].mean() for b, n in enumerate(lengths)]
    close(layer.data["sequence_rate"], rates, 1e-9)
    expected = [sum(max(0, n - k) for n in lengths) for k in range(30)]
    np.testing.assert_array_equal(layer.data["lag_count"], expected)


def test_a_sequence_of_one_step_has_no_rate_in_a_batch_either() -> None:
    logs = np.random.default_rng(0).normal(-0.2, 0.1, (30, 4))
    layer = prescribed(logs, [30, 20, 1, 25])
    known = layer.data["sequence_rate"].values[[0, 1, 3]]
    assert math.isnan(layer.data["sequence_rate"][2])
    close(layer.rate.value, known.mean(), 1e-12)


def test_statistics_never_cross_a_cut() -> None:
    module = linear_rnn([[0.9]])
    with gradflow.record(module) as recording:
        x = torch.zeros(10, 2, 1)
        _, h = module(x)
        module(x, h.detach())[0][-1].sum().backward()
    layer = gradflow.analyze(recording)["l0"]
    track = recording["l0"]
    assert track.steps == 20 and track.cuts.nonzero()[:, 0].tolist() == [10, 10]
    k = np.arange(20)
    np.testing.assert_array_equal(layer.data["lag_count"], np.maximum(0, 2 * (10 - k)))
    logs_close(layer.data["lag_median"][:10], k[:10] * math.log(0.9))
    close(layer.rate.value, math.log(0.9), 1e-12)
    assert layer.searched == 9


@pytest.mark.parametrize(("span", "channels"), [(1, 4), (6, 4), (7, 3), (65, 3), (66, 2), (90, 2)])
def test_channels(span: int, channels: int) -> None:
    # 0.34⁶ = 1.5e-3, 0.34⁷ = 5e-4; 0.9⁶⁵ = 1.06e-3, 0.9⁶⁶ = 9.6e-4; ±1 for ever
    turn = random_orthogonal(4)
    weight = turn @ torch.diag(torch.tensor([1.0, -1.0, 0.9, 0.34])) @ turn.T
    layer = linear_layer(weight, span=span)
    assert layer.channels == channels
    expected = span * np.log([1.0, 1.0, 0.9, 0.34])
    found = layer.data["log_singular"][0].values
    # entries far below the block's norm may have been truncated
    kept = expected > math.log(1e-4)
    logs_close(found[kept], expected[kept], 1e-8)


# ------------------------------------------------------------------------ verdicts (section 3)

SPREAD = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])

VERDICTS = {
    "vanishing": (-0.10 + 0.01 * SPREAD, 100, "vanishing"),
    "exploding": (0.10 + 0.01 * SPREAD, 100, "exploding"),
    "stable": (0.002 * SPREAD, 100, "stable"),
    "stable_negative": (-0.01 + 0.002 * SPREAD, 100, "stable"),
    "on_the_lower_edge": (-0.023 + 0.01 * SPREAD, 100, "inconclusive"),
    "on_the_upper_edge": (0.023 + 0.01 * SPREAD, 100, "inconclusive"),
    "wide": (0.08 * SPREAD, 100, "inconclusive"),
    "short_span": (-0.10 + 0.01 * SPREAD, 10, "stable"),
    "long_span": (-0.01 + 0.001 * SPREAD, 300, "vanishing"),
    "point_inside": (np.full(3, math.log(0.98)), 100, "stable"),
    "point_below": (np.full(3, math.log(0.97)), 100, "vanishing"),
    "point_above": (np.full(3, 0.024), 100, "exploding"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    rates, span, expected = VERDICTS[name]
    layer = prescribed(rows(rates, span + 1), span=span)
    count = len(rates)
    half = stats.t.ppf(0.975, count - 1) * np.std(rates, ddof=1) / math.sqrt(count)
    np.testing.assert_allclose(
        [layer.rate.value, layer.rate.low, layer.rate.high],
        np.mean(rates) + half * np.array([0, -1, 1]),
        rtol=0,
        atol=1e-9,
    )
    gain = layer.gain
    assert gain.steps == span
    np.testing.assert_allclose(
        [gain.value, gain.low, gain.high],
        span * (np.mean(rates) + half * np.array([0, -1, 1])),
        rtol=0,
        atol=1e-7,
    )
    rule = [
        ("vanishing", gain.high < -DECADE),
        ("exploding", gain.low > DECADE),
        ("stable", gain.low > -DECADE and gain.high < DECADE),
        ("inconclusive", True),
    ]
    assert layer.verdict == expected == next(name for name, holds in rule if holds)
    if expected == "inconclusive":
        assert any(char.isdigit() for char in layer.sentence), "how many sequences would decide"
        assert "sequences" in layer.sentence
    if expected == "stable":
        assert layer.findings == ()


def test_the_number_of_sequences_said_would_decide() -> None:
    rates = -0.02 + 0.01 * SPREAD
    layer = prescribed(rows(rates, 101), span=100)
    assert layer.verdict == "inconclusive"
    said = re.search(r"(\d+) sequences", layer.sentence)
    assert said is not None
    room, spread = DECADE / 100 - 0.02, np.std(rates, ddof=1)
    enough = [n for n in range(2, 500) if stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) < room]
    assert enough[0] <= int(said[1]) <= 1.2 * enough[0]


@pytest.mark.parametrize("sequences", [1, 4])
def test_exponential_random_walks_are_seldom_called_power_laws(sequences: int) -> None:
    logs = walks(30, sequences, 60, 0.0)
    called = ["not exponential" in prescribed(one.T).labels for one in logs]
    assert np.mean(called) <= 0.1


def test_half_life_of_an_exponential() -> None:
    layer = prescribed(rows(-0.05 + 0.004 * SPREAD, 60))
    close(layer.half_life, LN2 / 0.05, 1e-8)
    assert "not exponential" not in layer.labels
    growing = prescribed(rows(0.05 + 0.004 * SPREAD, 60))
    assert math.isinf(growing.half_life) and growing.horizon is None and growing.searched == 59


def test_severity_in_decades() -> None:
    recording = prescribed_recording(rows(-0.4383 + 0.001 * SPREAD, 60))
    analysis = gradflow.analyze(recording, span=200)
    close(analysis.frame()["decades_over_span"], -0.4383 * 200 / DECADE, 1e-8)
    found = [f.severity for f in analysis["l0"].findings if f.name == "vanishing"]
    close(found, [-38.07], 1e-3)


def chain(diagonal: float, above: float, size: int) -> np.ndarray:
    return diagonal * np.eye(size) + above * np.eye(size, k=1)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (chain(0.9, 1.0, 6), True),
        (chain(0.9, 0.2, 2), False),
        (chain(0.5, 100.0, 2), False),  # one large first step is no transient growth
        (chain(0.9, 5.0, 2), False),
        (chain(0.97, 5.0, 2), True),
        ([[0.9]], False),
    ],
    ids=["long_chain", "weak", "first_step", "fourfold", "twelvefold", "scalar"],
)
def test_transient_growth(matrix: object, expected: bool) -> None:
    layer = linear_layer(matrix)
    powers = [np.linalg.matrix_power(np.asarray(matrix), k) for k in range(100)]
    curve = np.log([np.linalg.norm(power, 2) for power in powers])
    logs_close(layer.data["lag_median"], curve, 1e-9)
    assert (curve[1:].max() - max(0.0, curve[1]) > DECADE) == expected
    assert ("transient growth" in layer.labels) == expected


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_one_step_has_no_recurrence(kind: str) -> None:
    with pytest.warns(GradflowWarning, match="no recurrence"):
        recording = observe(getattr(nn, kind)(2, 3), torch.randn(1, 4, 2))
    layer = gradflow.analyze(recording)["l0"]
    assert math.isnan(layer.rate.value) and layer.verdict == "inconclusive"
    assert "no recurrence" in layer.labels and layer.horizon is None
    gains = log_gain_map(step_jacobians(recording["l0"]))
    assert gains.shape == (4, 1, 1) and not gains.any()


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_nan_in_the_states(kind: str) -> None:
    x = torch.randn(20, 3, 2)
    x[7, 1] = math.nan
    with pytest.warns(GradflowWarning, match="not finite"):
        recording = observe(getattr(nn, kind)(2, 3), x)
    layer = gradflow.analyze(recording)["l0"]
    assert math.isnan(layer.rate.value) and layer.verdict == "inconclusive"
    assert "not finite" in layer.labels


def test_range_limited() -> None:
    for value, verdict in ((0.5, "vanishing"), (2.0, "exploding")):
        x = torch.zeros(400, 2, 1, dtype=torch.float32)
        layer = gradflow.analyze(observe(linear_rnn([[value]], torch.float32), x))["l0"]
        assert "range-limited" in layer.labels and layer.verdict == verdict
        close(layer.rate.value, math.log(value), 1e-12)
        logs_close(layer.data["lag_median"], np.arange(400) * math.log(value))
    assert "range-limited" not in linear_layer([[0.5]], 400).labels, "float64 holds 2^−400"


def test_identical_sequences_are_a_point() -> None:
    random = np.random.default_rng(0)
    logs = np.tile(random.normal(-0.2, 0.4, (50, 1)), (1, 4))
    layer = prescribed(logs)
    # what they keep is a fact; how fast others fade is not known from one sequence four times over
    assert layer.gain.low == layer.gain.value == layer.gain.high
    close(layer.gain.value, logs[1:, 0].sum(), 1e-9)
    assert layer.rate.low < -0.2 < layer.rate.high
    assert layer.verdict == "vanishing"


def test_one_sequence() -> None:
    random = np.random.default_rng(0)
    long = prescribed(random.normal(-0.2, 0.2, (1000, 1)))
    assert long.verdict == "vanishing" and "one sequence" in long.labels
    half = 1.96 * 0.2 / math.sqrt(800)
    assert half / 2 < (long.rate.high - long.rate.low) / 2 < 2 * half
    few = prescribed(random.normal(-0.2, 0.2, (40, 1)))
    assert few.verdict == "inconclusive" and math.isfinite(few.rate.value)
    slow = signal.lfilter([1], [1, -0.98], random.normal(0, 0.02, 1000))[:, None]
    assert prescribed(slow - 0.2).verdict == "inconclusive", "fewer than 60 correlation times"
    still = linear_layer([[0.9]], batch=1)
    assert still.verdict == "vanishing" and still.rate.low == still.rate.high


def dead_relu() -> nn.RNNBase:
    module = nn.RNN(1, 3, nonlinearity="relu")
    nn.init.constant_(module.bias_ih_l0, -5.0)
    return module


DEAD: dict[str, Callable[[], nn.RNNBase]] = {
    "relu": dead_relu,
    "forget_gate_zero": lambda: gated_lstm({"f": -1000.0, "g": 1.0}, hidden=2),
    "zero_matrix": lambda: linear_rnn(np.zeros((3, 3))),
}


@pytest.mark.parametrize("name", DEAD)
def test_dead(name: str) -> None:
    layer = gradflow.analyze(observe(DEAD[name](), torch.zeros(30, 3, 1)))["l0"]
    assert layer.verdict == "dead" and layer.rate.value == -math.inf
    assert layer.horizon == 1 and layer.channels == 0
    np.testing.assert_array_equal(layer.data["lag_zero_share"][1:], 1.0)
    assert np.isneginf(layer.data["lag_median"].values[1:]).all()


def test_one_dead_sequence_does_not_cut_every_path() -> None:
    logs = rows([-0.2, -0.21, -0.22, -0.2], 30)
    logs[12, 1] = -np.inf
    layer = prescribed(logs, span=100)
    assert layer.verdict == "vanishing"
    assert np.isneginf(layer.data["sequence_rate"].values).tolist() == [False, True, False, False]


def test_gates_count_as_closed_and_as_open_separately() -> None:
    recording = observe(gated_lstm({"f": -5.0, "o": 5.0}, hidden=4), torch.zeros(12, 2, 1))
    data = gradflow.analyze(recording)["l0"].data
    for gate, closed, opened in (("f", 1, 0), ("o", 0, 1), ("i", 0, 0)):
        assert (data["gate_closed"].sel(gate=gate) == closed).all()
        assert (data["gate_open"].sel(gate=gate) == opened).all()
    close(data["gate_mean"].sel(gate="f"), sigmoid(-5.0), 1e-12)


def walks(repeats: int, sequences: int, steps: int, rho: float, seed: int = 0) -> np.ndarray:
    """Stationary AR(1) increments with mean −0.05, (repeats, sequences, steps)."""
    noise = np.random.default_rng(seed).normal(size=(repeats, sequences, steps + 100))
    return -0.05 + 0.3 * signal.lfilter([1], [1, -rho], noise)[..., 100:]


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("sequences", [2, 3, 10])
def test_coverage_of_the_interval_over_sequences(rho: float, sequences: int) -> None:
    rates = [rate_over_sequences(r) for r in walks(3000, sequences, 60, rho).mean(2)]
    covered = np.mean([rate.low <= -0.05 <= rate.high for rate in rates])
    assert 0.92 <= covered <= 0.97


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_coverage_from_the_jacobians_on(rho: float) -> None:
    logs = walks(1500, 6, 50, rho, seed=1)
    stack = torch.as_tensor(np.exp(logs.reshape(-1, 50).T))[..., None, None]
    rates = lyapunov_spectrum(stack)[:, 0].numpy().reshape(1500, 6)
    close(rates, logs[..., 10:].mean(2), 1e-6)
    found = [rate_over_sequences(r) for r in rates]
    assert 0.92 <= np.mean([rate.low <= -0.05 <= rate.high for rate in found]) <= 0.97


def test_coverage_of_one_long_sequence() -> None:
    found = [rate_of_one(w) for w in walks(1000, 1, 900, 0.5)[:, 0]]
    known = [rate for rate in found if not math.isnan(rate.low)]
    assert len(known) > 900
    assert 0.90 <= np.mean([rate.low <= -0.05 <= rate.high for rate in known]) <= 0.97


# ---------------------------------------------------------------------- sum rules (section 4)


def counted(values: Tensor) -> Tensor:
    """Mean over the steps that count, by the burn-in of ⌈T/5⌉."""
    return values[math.ceil(len(values) / 5) :].mean(0)


@pytest.mark.parametrize("projection", [0, 3])
def test_sum_rule_of_the_lstm(projection: int) -> None:
    module = lively(lambda: nn.LSTM(3, 5, proj_size=projection))
    recording = observe(module, torch.randn(60, 3, 3))
    track = recording["l0"]
    assert track.c is not None
    f, o = track.gates["f"], track.gates["o"]
    reach = track.c.tanh() * o * (1 - o)
    u_o = module.weight_hh_l0.detach()[15:]
    if projection:
        core = torch.einsum("ph,tbh,hq->tbpq", module.weight_hr_l0.detach(), reach, u_o)
        last_terms = torch.linalg.slogdet(core)[1]
    else:
        last_terms = reach.abs().log().sum(-1) + torch.linalg.slogdet(u_o)[1]
    expected = f.log().sum(-1) + last_terms
    stack = step_jacobians(track)
    logs_close(torch.linalg.slogdet(stack)[1], expected, 1e-9)
    logs_close(lyapunov_spectrum(stack).sum(1), counted(expected), 1e-9)
    spectrum = gradflow.analyze(recording)["l0"].lyapunov
    assert spectrum is not None and len(spectrum) == 5 + (projection or 5)
    logs_close(spectrum.sum(), counted(expected).mean(), 1e-9)
    assert (np.diff(spectrum[1:]) < 1e-2).all(), "largest first"


def test_sum_rule_of_the_vanilla_rnn() -> None:
    module = lively(lambda: nn.RNN(3, 6))
    recording = observe(module, torch.randn(80, 2, 3))
    slopes = (1 - recording["l0"].h ** 2).log().sum(-1)
    volume = torch.linalg.slogdet(module.weight_hh_l0.detach())[1]
    expected = volume + counted(slopes)
    logs_close(lyapunov_spectrum(step_jacobians(recording["l0"])).sum(1), expected, 1e-9)
    spectrum = gradflow.analyze(recording)["l0"].lyapunov
    assert spectrum is not None
    logs_close(spectrum.sum(), expected.mean(), 1e-9)


def test_sum_rule_of_the_gru() -> None:
    module = lively(CELLS["gru"])
    x = torch.randn(30, 2, 3)
    expected = torch.linalg.slogdet(differences(module, x, torch.zeros(2, 4)))[1]
    found = lyapunov_spectrum(step_jacobians(observe(module, x)["l0"])).sum(1)
    logs_close(found, counted(expected), 1e-8)


def test_small_exponents_are_no_exact_zeros() -> None:
    stack = constant(np.diag([1.0, 1e-20]), 100)
    logs_close(lyapunov_spectrum(stack), [[0.0, math.log(1e-20)]], 1e-6)


@pytest.mark.parametrize("when", [slice(None), slice(50, 51)], ids=["always", "once"])
def test_a_dead_unit_leaves_one_exponent_of_minus_infinity(when: slice) -> None:
    for _ in range(5):
        stack = (torch.randn(4, 4) / 2).repeat(100, 1, 1, 1)
        stack[when, :, 2] = 0  # φ' of unit 2 is 0, so is the determinant
        exponents = lyapunov_spectrum(stack)[0]
        assert torch.isneginf(exponents).tolist() == [False, False, False, True]


# -------------------------------------------------------------------------- traps (section 5)


def test_padding_is_not_vanishing() -> None:
    lengths = [40, 15, 22]
    module = nn.LSTM(2, 3)
    x = torch.randn(40, 3, 2)

    def at_the_end(output: Tensor) -> Tensor:
        return sum(output[n - 1, b].sum() for b, n in enumerate(lengths))

    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    with gradflow.record(module, lengths=torch.tensor(lengths)) as told:
        at_the_end(module(x)[0]).backward()
    for recording in (observe(module, packed, loss=at_the_end), told):
        track, layer = recording["l0"], gradflow.analyze(recording)["l0"]
        assert track.lengths.tolist() == lengths
        for b, n in enumerate(lengths):
            alone = observe(module, x[:n, b : b + 1])
            assert track.grad_h[n:, b].isnan().all() and track.h[n:, b].isnan().all()
            near(track.grad_h[:n, b], alone["l0"].grad_h[:, 0], 1e-10)
            alone_rate = gradflow.analyze(alone)["l0"].rate.value
            close(layer.data["sequence_rate"][b], alone_rate, 1e-10)
        shared = layer.data["grad_norm"].sel(kind="total", state="h")
        close(shared[30:], track.grad_h[30:, 0].norm(dim=-1), 1e-10)
        gains = log_gain_map(step_jacobians(track))
        assert gains[1, :, 15:].isnan().all() and gains[1, 0, :15].isfinite().all()


def test_mean_reduction_scales_levels_not_slopes() -> None:
    module, x = nn.GRU(2, 4), torch.randn(25, 6, 2)
    total = observe(module, x, loss=lambda y: (y**2).sum())
    mean = observe(module, x, loss=lambda y: (y**2).sum() / (25 * 6))
    close(total["l0"].grad_h, 150 * mean["l0"].grad_h, 1e-9)
    first, second = gradflow.analyze(total)["l0"], gradflow.analyze(mean)["l0"]
    assert first.rate == second.rate and first.verdict == second.verdict
    for name in ("log10_grad", "lag_median"):
        logs_close(first.data[name], second.data[name])


def test_per_step_losses_hide_what_the_last_one_shows() -> None:
    recording = observe(linear_rnn([[0.5]]), torch.zeros(60, 2, 1), loss=lambda y: y.sum())
    track = recording["l0"]
    back = np.arange(59, -1, -1)
    close(track.grad_h[:, 0, 0], 2 - 0.5**back, 1e-12)
    assert track.grad_h_last is not None
    close(track.grad_h_last[:, 0, 0], 0.5**back, 1e-12)
    layer = gradflow.analyze(recording)["l0"]
    assert layer.verdict == "vanishing"
    decades = layer.data["log10_grad"].sel(state="h")[0].values * DECADE
    logs_close(decades, -LN2 * np.arange(60))


def test_dropout_masks_are_those_of_the_forward_pass() -> None:
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(8, 2, 3)
    outputs: list[Tensor] = []

    def loss(output: Tensor) -> Tensor:
        outputs.append(output.detach().clone())
        return output[-1].sum()

    recording = observe(module, x, loss=loss)
    lower, upper = recording["l0"], recording["l1"]
    np.testing.assert_array_equal(upper.h, outputs[0])
    mask = upper.inputs / lower.h
    kept = mask.round()
    close(mask, kept, 1e-12)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    alone = nn.LSTM(4, 4)
    alone.load_state_dict(
        {k.replace("l1", "l0"): v for k, v in module.state_dict().items() if k.endswith("l1")}
    )
    near(step_jacobians(upper), differences(alone, upper.inputs, torch.zeros(2, 8)), 1e-10)
    from_above = upper.delta @ module.weight_ih_l1.detach() * kept
    near(lower.grad_h_direct, from_above, 1e-12)
    assert lower.parity.status == upper.parity.status == "passed"


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_reverse_direction_has_its_past_at_larger_t(kind: str) -> None:
    module = getattr(nn, kind)(2, 3, bidirectional=True)
    x = torch.randn(12, 2, 2)
    recording = observe(module, x, loss=lambda y: y[0].sum())
    mirror = getattr(nn, kind)(2, 3)
    mirror.load_state_dict(
        {
            k.removesuffix("_reverse"): v
            for k, v in module.state_dict().items()
            if k.endswith("_reverse")
        }
    )
    other = observe(mirror, x.flip(0))
    track, plain = recording["l0_reverse"], other["l0"]
    assert track.reverse and not plain.reverse
    near(track.h.flip(0), plain.h, 1e-12)
    near(track.grad_h.flip(0), plain.grad_h, 1e-10)
    assert track.grad_h[-1].any(), "the first processed step is the last in time"
    near(step_jacobians(track), step_jacobians(plain), 1e-12)
    gains = gradflow.analyze(recording)["l0_reverse"].data["log_gain"]
    logs_close(gains, gradflow.analyze(other)["l0"].data["log_gain"])
    assert not recording["l0"].grad_h[1:].any()


def test_two_biases_add_up() -> None:
    module = gated_lstm({})
    with torch.no_grad():
        for bias in (module.bias_ih_l0, module.bias_hh_l0):
            bias[1] = 1.0
    recording = observe(module, torch.zeros(30, 2, 1))
    close(recording["l0"].gates["f"], sigmoid(2.0), 1e-12)
    close(recording["l0"].gates["f"], 0.881, 1e-3)
    close(gradflow.analyze(recording)["l0"].half_life, 5.4609, 1e-4)


def test_clipping_comes_after() -> None:
    module, x = nn.GRU(2, 4), torch.randn(15, 3, 2)
    plain = observe(module, x)["l0"].grad_h
    module.zero_grad()
    with gradflow.record(module) as recording:
        module(x)[0][-1].sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1e-6)
    near(recording["l0"].grad_h, plain, 1e-12)
    assert recording["l0"].parity.status == "passed"


def test_amp_scale_is_divided_out() -> None:
    module, x = nn.GRU(2, 4), torch.randn(15, 3, 2)
    plain = observe(module, x)["l0"].grad_h
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled(output: Tensor) -> Tensor:
        return scaler.scale(last(output))

    with gradflow.record(module, scaler=scaler) as told:
        scaled(module(x)[0]).backward()
    near(told["l0"].grad_h, plain, 1e-12)


def test_the_spectral_radius_is_no_test() -> None:
    # ρ(W) = 1.5, yet saturation makes it vanish; ρ(W) = 0, yet a driven pair of steps explodes
    module = linear_rnn([[1.5]])
    nn.init.ones_(module.weight_ih_l0)
    layer = gradflow.analyze(observe(module, torch.full((60, 2, 1), 2.0)))["l0"]
    assert layer.verdict == "vanishing"
    weight = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    aim = torch.tensor([[40.0, 0.0], [0.0, 40.0]]).repeat(30, 1)  # pre-activations: one unit at 1
    before = torch.cat([torch.zeros(1, 2), aim.tanh()[:-1]])
    module = nn.RNN(2, 2, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(2))
        module.weight_hh_l0.copy_(weight)
    layer = gradflow.analyze(observe(module, (aim - before @ weight.T)[:, None].repeat(1, 2, 1)))
    assert float(torch.linalg.eigvals(weight).abs().max()) < 1e-6
    assert layer["l0"].verdict == "exploding"
    close(layer["l0"].rate.value, LN2, 1e-9)


def test_initial_states_count() -> None:
    module = linear_rnn([[1.0]])
    h0 = torch.full((1, 1, 1), 1.0, dtype=F64)
    stack = step_jacobians(observe(module, torch.zeros(4, 1, 1), h0)["l0"])
    h, expected = 1.0, []
    for _ in range(4):
        h = math.tanh(h)
        expected.append(1 - h * h)
    close(stack[:, 0, 0, 0], expected, 1e-12)


# ---------------------------------------------------------------- numbers and invariances


@pytest.mark.parametrize("gain", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_maps_against_plain_products(size: int, gain: float) -> None:
    stack = random_stack(40, size, batch=2, gain=gain)
    for norm in ("spectral", "rms"):
        logs_close(log_gain_map(stack, norm), plain_map(stack, norm), 1e-9)


@pytest.mark.parametrize(("size", "bound"), [(63, 1e-9), (64, 1e-9), (65, 1e-4), (96, 1e-4)])
def test_accuracy_of_spectral_norms_by_size(size: int, bound: float) -> None:
    stack = random_stack(8, size, gain=0.9)
    logs_close(log_gain_map(stack), plain_map(stack, "spectral"), bound)
    logs_close(log_gain_map(stack, "rms"), plain_map(stack, "rms"), 1e-9)


@pytest.mark.parametrize("size", [70, 128])
def test_large_spectral_norms_with_close_singular_values(size: int) -> None:
    turns = [random_orthogonal(size, seed) for seed in range(6)]
    steps = torch.stack([turn * torch.linspace(0.9, 0.9001, size) for turn in turns])[:, None]
    logs_close(log_gain_map(steps), plain_map(steps, "spectral"), 1e-4)


def test_large_spectral_norms_of_one_direction_that_is_hard_to_find() -> None:
    # each step is diagonal, its largest entry where the steps before had their smallest
    size, steps = 80, 8
    diagonals = np.ones((steps, size))
    for t in range(1, steps):
        diagonals[t, : t * 10] = 0.5
        diagonals[t, t] = 1.3 ** (t + 1)
    stack = torch.as_tensor(np.stack([np.diag(d) for d in diagonals]))[:, None]
    logs_close(log_gain_map(stack), plain_map(stack, "spectral"), 1e-4)


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_five_thousand_steps_in_float32(value: float) -> None:
    stack = torch.full((5000, 1, 1, 1), value, dtype=torch.float32)
    logs_close(lyapunov_spectrum(stack), [[math.log(value)]], 1e-9)
    if value == 2.0:
        gains = log_gain_map(stack[:1500], "rms")  # 2^1499 is beyond float64, too
        logs_close(gains[0, 0], np.arange(1500) * LN2, 1e-6)
        logs_close(gains[0, :, -1], np.arange(1499, -1, -1) * LN2, 1e-6)


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_long_products_of_matrices_in_float32(value: float) -> None:
    stack = (value * random_orthogonal(4)).float().expand(600, 1, 4, 4)
    for norm in ("spectral", "rms"):
        found = log_gain_map(stack, norm)
        assert found.dtype == F64
        logs_close(found[0, 0], np.arange(600) * math.log(value), 1e-3)


def test_rms_is_exact_at_any_length() -> None:
    a, b, k = 0.9, 0.7, np.arange(1200)
    ratio = (b / a) ** k
    cross = a * (1 - ratio) / (a - b)  # the blocks of P_k, divided by a^k
    expected = k * math.log(a) + 0.5 * np.log((1 + ratio**2 + cross**2) / 2)
    gains = log_gain_map(constant([[a, 0.0], [a, b]], 1200), "rms")[0]
    logs_close(gains[0], expected, 1e-9)
    logs_close(gains[700, 700:], expected[:500], 1e-9)


def test_subnormal_steps_are_not_flushed() -> None:
    tiny = torch.full((20, 1, 1, 1), 1e-40, dtype=torch.float32)
    exact = float(tiny[0, 0, 0, 0].double().log())
    logs_close(log_gain_map(tiny)[0, 0], exact * np.arange(20), 1e-4)


def test_change_of_basis_leaves_gains_alone() -> None:
    stack, turn = random_stack(15, 6), random_orthogonal(6)
    turned = turn @ stack @ turn.T
    for norm in ("spectral", "rms"):
        logs_close(log_gain_map(turned, norm), log_gain_map(stack, norm), 1e-11)
    long = random_stack(200, 4)
    turn = random_orthogonal(4)
    first, second = lyapunov_spectrum(long), lyapunov_spectrum(turn @ long @ turn.T)
    logs_close(first, second, 0.02)


@pytest.mark.parametrize("a", [0.3, 0.9, 1.7])
def test_scaling_a_linear_network_shifts_the_rate(a: float) -> None:
    weight = torch.randn(5, 5, dtype=F64) / math.sqrt(5)
    plain, scaled = linear_layer(weight, 60), linear_layer(a * weight, 60)
    logs_close(scaled.rate.value - plain.rate.value, math.log(a), 1e-10)
    shift = np.arange(60) * math.log(a)
    logs_close(scaled.data["lag_median"], plain.data["lag_median"].values + shift, 1e-9)


@pytest.mark.parametrize("name", CELLS)
def test_push_and_pull_are_adjoint(name: str) -> None:
    track = observe(lively(CELLS[name]), torch.randn(10, 2, 3))["l0"]
    operator, stack = track.operator(), step_jacobians(track)
    size = operator.size
    v, u = torch.randn(2, 3, size), torch.randn(2, 3, size)
    pushed, pulled = v, u
    for t in range(3, 10):
        expected = pushed @ stack[t].mT
        pushed = operator.push(t, pushed)
        near(pushed, expected, 1e-12)
    for t in range(9, 2, -1):
        expected = pulled @ stack[t]
        pulled = operator.pull(t, pulled)
        near(pulled, expected, 1e-12)
    inner, outer = (u * pushed).sum(-1), (pulled * v).sum(-1)
    scale = u.norm(dim=-1) * pushed.norm(dim=-1)
    assert ((inner - outer).abs() <= 1e-12 * scale).all()


def test_padded_stacks() -> None:
    stack = random_stack(30, 3, batch=2)
    whole = lyapunov_spectrum(stack[:18, 1:])
    stack[18:, 1] = math.nan
    for norm in ("spectral", "rms"):
        gains = log_gain_map(stack, norm)
        assert gains[1, :, 18:].isnan().all()
        logs_close(gains[1, :18, :18], plain_map(stack[:18, 1:], norm)[0])
        logs_close(gains[0], plain_map(stack[:, :1], norm)[0])
    logs_close(lyapunov_spectrum(stack)[1:], whole, 1e-12)


def test_one_step_map() -> None:
    gains = log_gain_map(random_stack(1, 3, batch=2))
    assert gains.shape == (2, 1, 1) and not gains.any()
