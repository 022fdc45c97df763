"""The systems of the five lecture notes that gradflow was asked to explain, a test for each of them.

Every row has its tests and its place in a notebook, `PLACES`; numbers are pinned, the notes' slips too.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from seam import AddingModel, adding_batch
from torch import Tensor, nn

import gradflow
import notebooks
from gradflow.errors import GradflowWarning

F64 = torch.float64


def scalar_map(step: Callable[[Tensor], Tensor], start: float, steps: int) -> gradflow.Recording:
    """A tapped loop of one unit."""
    with gradflow.record(nn.Identity()) as recording:
        h = torch.full((1, 1), start, dtype=F64, requires_grad=True)
        for _ in range(steps):
            h = gradflow.tap(h=step(h))
        h.sum().backward()
    return recording


def rate(step: Callable[[Tensor], Tensor], start: float = 0.5, steps: int = 400) -> float:
    """Growth of ln gain per step."""
    layer = gradflow.analyze(scalar_map(step, start, steps), stride=steps)["loop"]
    return float(layer.data["sequence_rate"][0])


def spectral(layer: gradflow.LayerAnalysis) -> np.ndarray:
    """ln gain of the first mapped sequence, (source, target)."""
    return layer.data["log_gain"].sel(norm="spectral")[0].values


# ------------------------------------------------------------------------- 1: one unit, no input


@pytest.mark.parametrize(("w", "expected"), [(4, -2.575), (8, -5.919), (-8, -0.427)])
def test_row_1_no_weight_makes_a_sigmoid_explode(w: float, expected: float) -> None:
    assert rate(lambda h: torch.sigmoid(w * h)) == pytest.approx(expected, abs=1e-3)


def test_row_1_every_weight_from_minus_20_to_20_vanishes_or_stays() -> None:
    w = torch.linspace(-20, 20, 81, dtype=F64).unsqueeze(1)
    with gradflow.record(nn.Identity()) as recording:
        h = torch.full_like(w, 0.5, requires_grad=True)
        for _ in range(300):
            h = gradflow.tap(h=torch.sigmoid(w * h))
        h.sum().backward()
    rates = gradflow.analyze(recording, stride=300)["loop"].data["sequence_rate"].values
    assert (rates[w[:, 0].numpy() != 0] < 1e-3).all()


def test_row_1_the_two_parts_multiply_to_the_gain() -> None:
    w, steps = 2.0, 12
    recording = scalar_map(lambda h: torch.sigmoid(w * h), 0.5, steps)
    h = recording["loop"].h[:, 0, 0]
    slopes = (h * (1 - h)).log()  # ln σ'(w h_{t−1}), read at h_t
    parts = (steps - 1) * math.log(w) + float(slopes[1:].sum())
    assert spectral(gradflow.analyze(recording)["loop"])[0, -1] == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize(("w", "expected"), [(2, -math.log(2)), (4, 0.0), (8, math.log(2))])
def test_row_1_four_is_the_border_of_the_centred_map_at_one_half(w: float, expected: float) -> None:
    assert rate(lambda h: torch.sigmoid(w * h - w / 2)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("w", [0.5, 0.9, 1.0, 1.1])
def test_row_1_one_is_the_border_of_a_linear_map(w: float) -> None:
    assert rate(lambda h: w * h, 1.0) == pytest.approx(math.log(w), abs=1e-12)


@pytest.mark.parametrize("w", [0.3, 0.9])
def test_row_1_tanh_below_one(w: float) -> None:
    assert rate(lambda h: torch.tanh(w * h), 1.0) == pytest.approx(math.log(w), abs=1e-3)


@pytest.mark.parametrize(("w", "slope"), [(1.5, 0.3943130), (2.0, 0.1663721), (3.0, 0.0305128)])
def test_row_1_tanh_beyond_one_vanishes_again(w: float, slope: float) -> None:
    assert math.exp(rate(lambda h: torch.tanh(w * h), 1.0)) == pytest.approx(slope, rel=1e-5)


def test_row_1_tanh_at_one_is_a_power_law() -> None:
    layer = gradflow.analyze(scalar_map(torch.tanh, 1.0, 1001), stride=1001)["loop"]
    gain = spectral(layer)[0]
    assert gain[100] == pytest.approx(-5.5898493, abs=1e-6)
    assert gain[1000] == pytest.approx(-9.0038035, abs=1e-6)


def test_row_1_a_chaotic_network_explodes() -> None:
    torch.manual_seed(1)
    network = nn.RNN(1, 120, bias=False).double()
    with torch.no_grad():
        network.weight_hh_l0.normal_(0, 3 / math.sqrt(120))
    silence, start = torch.zeros(120, 4, 1, dtype=F64), torch.randn(1, 4, 120, dtype=F64)
    with gradflow.record(network) as recording:
        network(silence, start)[0][-1].sum().backward()
    layer = gradflow.analyze(recording, stride=60)["l0"]
    assert layer.verdict == "exploding"
    assert 0.15 < layer.rate.value < 0.45


# -------------------------------------------------------- 2: the gradient of a weight, pair by pair


def contributions(
    f: Callable[[float], float],
    slope: Callable[[float], float],
    *,
    recurrent: float | None = None,
    last: Callable[[list[float], list[float], int], float] | None = None,
) -> np.ndarray:
    """∂L/∂w_h of L = Σ ½ y_t² as a table over (t', t), by the formula; the arguments are the slips."""
    wi, wh, wo = 0.7, 1.3, 0.9
    h, a = [0.4], []
    for x in (1.0, -0.5, 0.8):
        a.append(wi * x + wh * h[-1])
        h.append(f(a[-1]))
    table = np.zeros((3, 3))
    for target in range(3):
        y = f(wo * h[target + 1])
        carried = y * slope(wo * h[target + 1]) * wo
        for t in range(target, -1, -1):
            direct = slope(a[t]) * h[t] if last is None else last(a, h, t)
            table[target, t] = carried * direct
            carried *= slope(a[t]) * (wh if recurrent is None else recurrent)
    return table


def logistic(v: float) -> float:
    return 1 / (1 + math.exp(-v))


FUNCTIONS = {
    "sigmoid": (logistic, lambda v: logistic(v) * (1 - logistic(v)), torch.sigmoid),
    "tanh": (math.tanh, lambda v: 1 - math.tanh(v) ** 2, torch.tanh),
}


INPUTS, WEIGHTS = (1.0, -0.5, 0.8), (0.7, 1.3, 0.9)  # w_i, w_h, w_o


def three_steps(name: str, losses: Sequence[int] = (0, 1, 2)) -> tuple[gradflow.Track, Tensor]:
    """The same in torch, its state tapped: the track with these steps' losses, and autograd's ∂L/∂w."""
    f = FUNCTIONS[name][2]
    w = torch.tensor(WEIGHTS, dtype=F64, requires_grad=True)
    with gradflow.record(nn.Identity()) as recording:
        h, loss = torch.full((1, 1), 0.4, dtype=F64), torch.zeros(())
        for t, x in enumerate(INPUTS):
            h = gradflow.tap(h=f(w[0] * x + w[1] * h))
            if t in losses:
                loss = loss + (f(w[2] * h) ** 2 / 2).sum()
        loss.backward()
    assert w.grad is not None
    return recording["loop"], w.grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_row_2_every_pair_is_recorded_and_they_sum_to_autograd(name: str) -> None:
    f, slope, _ = FUNCTIONS[name]
    tracks = [three_steps(name, [t])[0] for t in range(3)]
    _, exact = three_steps(name)
    h = [0.4, *tracks[0].h[:, 0, 0].tolist()]
    a = [WEIGHTS[0] * x + WEIGHTS[1] * h[t] for t, x in enumerate(INPUTS)]
    table = contributions(f, slope)
    for target, track in enumerate(tracks):
        for t in range(target + 1):
            pair = float(track.grad_h[t]) * slope(a[t]) * h[t]
            assert pair == pytest.approx(table[target, t], rel=1e-12)
    assert table.sum() == pytest.approx(float(exact[1]), rel=1e-12)
    whole, _ = three_steps(name)
    into = [float(whole.grad_h[t]) * slope(a[t]) * x for t, x in enumerate(INPUTS)]
    assert sum(into) == pytest.approx(float(exact[0]), rel=1e-12)
    out = sum(f(0.9 * v) * slope(0.9 * v) * v for v in h[1:])  # w_o needs no product
    assert out == pytest.approx(float(exact[2]), rel=1e-12)


# right, with f'·w_i for ∂h_k/∂h_{k−1}, with h_t for ∂⁺h_t/∂w_h
SLIPS = {
    "sigmoid": (0.054295934553, 0.050449096915, 0.351691583570),
    "tanh": (0.349808163457, 0.306020558145, 1.145338046998),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_row_2_the_slips_and_their_size(name: str) -> None:
    f, slope, _ = FUNCTIONS[name]
    right, recurrent, last = SLIPS[name]
    assert contributions(f, slope).sum() == pytest.approx(right, rel=1e-9)
    assert contributions(f, slope, recurrent=0.7).sum() == pytest.approx(recurrent, rel=1e-9)
    wrong = contributions(f, slope, last=lambda a, h, t: h[t + 1])
    assert wrong.sum() == pytest.approx(last, rel=1e-9)


# --------------------------------------------------------------------- 3: an RNN language model


def language_model() -> tuple[nn.RNN, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    rnn, head = nn.RNN(7, 6).double(), nn.Linear(6, 7).double()
    tokens = torch.randint(7, (5, 1))
    return rnn, head, nn.functional.one_hot(tokens, 7).to(F64), torch.randint(7, (5, 1))


def test_row_3_delta_and_the_gradient_of_v() -> None:
    rnn, head, x, target = language_model()
    with gradflow.record(rnn) as recording:
        output, _ = rnn(x)
        losses = nn.functional.cross_entropy(head(output)[:, 0], target[:, 0], reduction="none")
        losses[2].backward()  # E_3 alone
    track = recording["l0"]
    probabilities = head(output)[2, 0].softmax(0).detach()
    wanted = torch.outer(probabilities - nn.functional.one_hot(target[2, 0], 7), output[2, 0])
    torch.testing.assert_close(head.weight.grad, wanted.detach(), rtol=1e-12, atol=0)
    # δ_2^(3) = ∂E_3/∂z_2 = (Wᵀ δ_3) ⊙ (1 − s_2²)
    step = (rnn.weight_hh_l0.T @ track.delta[2, 0]) * (1 - track.h[1, 0] ** 2)
    torch.testing.assert_close(track.delta[1, 0], step.detach(), rtol=1e-12, atol=0)


def test_row_3_the_norm_of_one_step_is_not_at_most_one() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(4, 256)
    with gradflow.record(rnn) as recording:
        rnn(torch.zeros(50, 2, 4))[0][-1].sum().backward()
    layer = gradflow.analyze(recording, stride=25)["l0"]
    jacobian = gradflow.analyzer.step_jacobians(recording["l0"])[-1, 0]
    norm = float(torch.linalg.matrix_norm(jacobian, 2))
    bound = float(torch.linalg.matrix_norm(rnn.weight_hh_l0.detach().double(), 2))
    assert 1 < norm <= bound, "max φ' is 1"
    assert norm == pytest.approx(1.155, abs=0.06)
    assert layer.verdict == "vanishing"


# ------------------------------------------------------------- 5, 6: truncation, norm clipping


def test_row_5_where_it_is_cut_and_what_the_cut_costs() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(2, 4).double()
    x = torch.randn(12, 3, 2, dtype=F64)

    def gradient(chunk: int) -> tuple[Tensor, gradflow.Recording]:
        rnn.zero_grad()
        with gradflow.record(rnn) as recording:
            state = torch.zeros(1, 3, 4, dtype=F64)
            for part in x.split(chunk):
                output, state = rnn(part, state.detach())
            output[-1].square().sum().backward()
        assert rnn.weight_hh_l0.grad is not None
        return rnn.weight_hh_l0.grad.clone(), recording

    whole, _ = gradient(12)
    cut, recording = gradient(4)
    assert recording["l0"].steps == 12, "three chunks are one track"
    assert recording["l0"].cuts.all(1).nonzero()[:, 0].tolist() == [4, 8]
    assert not bool(recording["l0"].grad_h[:8].any()), "nothing crosses a cut"
    # the cost, by hand: only the last chunk's steps count
    h = torch.cat([torch.zeros(1, 3, 4, dtype=F64), recording["l0"].h])
    by_hand = sum(recording["l0"].delta_hh[t].T @ h[t] for t in range(8, 12))
    torch.testing.assert_close(cut, by_hand, rtol=1e-10, atol=0)
    assert 0.001 < float((cut - whole).norm() / whole.norm()) < 1


def test_row_6_the_norm_before_and_after_clipping() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(2, 4)
    with gradflow.record(rnn) as recording:
        rnn(torch.randn(9, 3, 2))[0].square().sum().backward()
        before = nn.utils.clip_grad_norm_(rnn.parameters(), 0.1)
    after = torch.cat([p.grad.flatten() for p in rnn.parameters() if p.grad is not None]).norm()
    assert float(before) > 0.1 and float(after) == pytest.approx(0.1, rel=1e-5)
    # what was recorded is the gradient itself, before anybody clipped it
    assert recording["l0"].parity.status == "passed"


# --------------------------------------------------------------------------- 7: the LSTM equations


def test_row_7_the_backward_equations_of_the_lstm() -> None:
    torch.manual_seed(0)
    lstm, head = nn.LSTM(3, 4).double(), nn.Linear(4, 2).double()
    with gradflow.record(lstm) as recording:
        output, _ = lstm(torch.randn(6, 2, 3, dtype=F64))
        scores = head(output)
        scores.retain_grad()
        scores.square().sum().backward()
    track = recording["l0"]
    c, o = track.c, track.gates["o"]
    assert c is not None and track.grad_c is not None and scores.grad is not None
    # ∂L/∂H_t = ∂L_t/∂Z_t W_yᵀ + carried
    direct = scores.grad @ head.weight.detach()
    torch.testing.assert_close(track.grad_h_direct, direct, rtol=1e-12, atol=0)
    carried = track.delta_hh[1:] @ lstm.weight_hh_l0.detach()
    torch.testing.assert_close(track.grad_h[:-1], direct[:-1] + carried, rtol=1e-9, atol=0)
    # ∂L/∂c_t = O_t ⊙ tanh'(c_t) ⊙ ∂L/∂H_t + carried, with the total ∂L/∂H_t
    through_h = o * (1 - c.tanh() ** 2) * track.grad_h
    kept = track.gates["f"][1:] * track.grad_c[1:]
    torch.testing.assert_close(track.grad_c[:-1], through_h[:-1] + kept, rtol=1e-9, atol=0)
    # the notes' slip, the direct part alone, is far off
    slip = (o * (1 - c.tanh() ** 2) * track.grad_h_direct)[:-1] + kept
    assert float((slip - track.grad_c[:-1]).norm() / track.grad_c[:-1].norm()) > 0.02
    # ∂L/∂O_t = ∂L/∂H_t ⊙ tanh c_t, seen in δ of the output gate
    delta_o = track.grad_h * c.tanh() * o * (1 - o)
    torch.testing.assert_close(track.delta[..., 12:], delta_o, rtol=1e-9, atol=0)
    # ∂L/∂W_y = Σ H_tᵀ ∂L_t/∂Z_t, ∂L/∂b_y its sum
    wanted = torch.einsum("tbz,tbh->zh", scores.grad, track.h)
    torch.testing.assert_close(head.weight.grad, wanted, rtol=1e-12, atol=0)


# --------------------------------------------------------- 9: a program that trains one step a time


class SimpleLSTM(nn.Module):
    """The notes' model as printed."""

    def __init__(self, input_size: int = 1, hidden_size: int = 100, output_size: int = 1) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(input_size, hidden_size)
        self.linear = nn.Linear(hidden_size, output_size)
        self.hidden_cell = (torch.zeros(1, 1, hidden_size), torch.zeros(1, 1, hidden_size))

    def forward(self, seq: Tensor) -> Tensor:
        out, self.hidden_cell = self.lstm(seq.view(len(seq), 1, 1), self.hidden_cell)
        return self.linear(out.view(len(seq), -1))[-1]


def trained_point_by_point(model: SimpleLSTM, series: Tensor) -> gradflow.Recording:
    """Three updates on one point each, the target equal to the input, recorded together."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradflow.record(model) as recording:
        for value in series[:3]:
            optimizer.zero_grad()
            zero = torch.zeros(1, 1, 100)
            model.hidden_cell = (zero, zero)
            nn.functional.mse_loss(model(value.view(1)), value.view(1)).backward()
            optimizer.step()
    return recording


def evaluated(model: SimpleLSTM, series: Tensor) -> gradflow.Recording:
    """The notes' evaluation: it resets an attribute that nobody reads."""
    with gradflow.record(model) as recording, torch.no_grad():
        for value in series:
            model.hidden = (torch.zeros(1, 1, 100), torch.zeros(1, 1, 100))
            model(value.view(1))
    return recording


def test_row_9_training_point_by_point_exercises_no_recurrence() -> None:
    torch.manual_seed(0)
    model, series = SimpleLSTM(), torch.sin(0.2 * torch.arange(100.0)) + 0.5 * torch.rand(100)
    with pytest.warns(GradflowWarning, match="no recurrence is exercised"):
        recording = trained_point_by_point(model, series)
    layer = gradflow.analyze(recording)["lstm.l0"]
    assert layer.verdict == "inconclusive" and "no recurrence" in layer.labels
    assert [finding.name for finding in layer.findings] == ["no-recurrence"]
    assert not bool(model.lstm.weight_hh_l0.grad.any()), "the recurrence is never trained"


def test_row_9_the_evaluation_carries_its_state_on() -> None:
    series = torch.sin(0.2 * torch.arange(100.0))
    with pytest.warns(GradflowWarning, match="no_grad"):
        recording = evaluated(SimpleLSTM(), series)
    assert list(recording.tracks) == ["lstm.l0"]
    assert recording["lstm.l0"].steps == 100 and not recording["lstm.l0"].has_gradient


# ------------------------------------------------------------------- 10, 11, 12: the LSTM by hand

WORKED = [
    (1, 0, 0, 1),
    (3, 1, 0, 1),
    (2, 0, 0, 1),
    (4, 1, 0, 1),
    (2, 0, 0, 1),
    (1, 0, 1, 1),
    (3, -1, 0, 1),
    (6, 1, 0, 1),
    (1, 0, 1, 1),
]
CANDIDATE, INPUT, FORGET, OUTPUT = (
    (1, 0, 0, 0),
    (0, 100, 0, -10),
    (0, 100, 0, 10),
    (0, 0, 100, -10),
)


def test_row_10_by_hand() -> None:
    x = np.array(WORKED)
    memory, before, outputs = 0, [], []
    for step in x:
        before.append(memory)
        memory = (step @ FORGET > 0) * memory + (step @ INPUT > 0) * (step @ CANDIDATE)
        outputs.append((step @ OUTPUT > 0) * memory)
    assert before == [0, 0, 3, 3, 7, 7, 7, 0, 6]
    assert outputs == [0, 0, 0, 0, 0, 7, 0, 0, 6]


def test_row_10_the_gradient_of_the_memory_has_one_wall() -> None:
    x = torch.tensor(WORKED, dtype=F64)
    rows = {name: torch.tensor(row, dtype=F64) for name, row in (("f", FORGET), ("i", INPUT))}
    with gradflow.record(nn.Identity()) as recording:
        c = torch.zeros(1, 1, dtype=F64, requires_grad=True)
        for step in x:
            forget, write = ((step @ rows[name] > 0).to(F64) for name in "fi")
            c = gradflow.tap("memory", c=c * forget + write * step[0])
        c.sum().backward()
    assert recording["memory"].states["c"].flatten().tolist() == [0, 3, 3, 7, 7, 7, 0, 6, 6]
    gain = spectral(gradflow.analyze(recording)["memory"])
    for source in range(9):
        for target in range(source, 9):
            walled = source < 6 <= target  # the forget gate of the seventh step is shut
            assert gain[source, target] == (-math.inf if walled else 0.0)


def by_rows(module: nn.Module, rows: list[tuple[int, ...]]) -> nn.Module:
    suffix = "_l0" if isinstance(module, nn.LSTM) else ""
    with torch.no_grad():
        getattr(module, f"weight_ih{suffix}").copy_(torch.tensor(rows))
        getattr(module, f"weight_hh{suffix}").zero_()
    return module


AS_WRITTEN = [FORGET, INPUT, CANDIDATE, OUTPUT]
IN_ORDER = [INPUT, FORGET, CANDIDATE, OUTPUT]


def cell_outputs(rows: list[tuple[int, ...]]) -> tuple[Tensor, gradflow.Recording]:
    cell = by_rows(nn.LSTMCell(4, 1, bias=False).double(), rows)
    with gradflow.record(cell) as recording:
        state, outputs = None, []
        for step in torch.tensor(WORKED, dtype=F64):
            state = cell(step.unsqueeze(0), state)
            outputs.append(state[0])
        torch.cat(outputs).sum().backward()
    return torch.cat(outputs).detach().flatten(), recording


def test_row_11_the_slip_in_the_order_of_the_gates() -> None:
    outputs, recording = cell_outputs(AS_WRITTEN)
    assert outputs.round().tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert outputs[[5, 8]].tolist() == pytest.approx([0.6420, 0.6420], abs=5e-5)
    right, _ = cell_outputs(IN_ORDER)
    assert right[[5, 8]].tolist() == pytest.approx([0.9636, 0.7616], abs=5e-5)
    gates = recording["cell"].gates
    # the row meant to forget is the input gate: open at every step but the seventh
    assert (gates["i"].flatten() > 0.5).tolist() == [True] * 6 + [False] + [True] * 2
    assert (gates["f"].flatten() > 0.5).tolist() == [t in (1, 3, 7) for t in range(9)]


def test_row_12_the_fused_layer_is_the_same() -> None:
    outputs, by_cell = cell_outputs(AS_WRITTEN)
    fused = by_rows(nn.LSTM(4, 1, bias=False).double(), AS_WRITTEN)
    with gradflow.record(fused) as recording:
        output, _ = fused(torch.tensor(WORKED, dtype=F64).unsqueeze(1))
        output.sum().backward()
    torch.testing.assert_close(output.detach().flatten(), outputs, rtol=1e-14, atol=0)
    inside, cell = recording["l0"], by_cell["cell"]
    torch.testing.assert_close(inside.grad_c, cell.grad_c, rtol=1e-12, atol=0)
    torch.testing.assert_close(inside.grad_h, cell.grad_h, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------- 14: a stacked classifier


class Classifier(nn.Module):
    """Two layers from zero states, and a head on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 20, 2, batch_first=True)
        self.fc = nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.zeros(2, len(x), 20)
        out, _ = self.lstm(x, (zero, zero))
        return self.fc(out[:, -1, :])


def test_row_14_both_layers_of_the_classifier() -> None:
    torch.manual_seed(0)
    run = gradflow.diagnose(Classifier(), torch.randn(5, 7, 10))
    assert list(run.layers) == ["lstm.l0", "lstm.l1"]
    assert all((layer.steps, layer.sequences, layer.hidden) == (7, 5, 20) for layer in run.values())


def test_row_14_both_layers_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Classifier().state_dict(), tmp_path / "model.pt")
    command = [sys.executable, "-m", "gradflow", "inspect", "model.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "lstm  LSTM(10 → 20, 2 layers)" in done.stdout


# ------------------------------------------------------- 17, 18, 20: GRU, ReLU, covering and adding


def test_row_17_a_gru_fused_and_as_a_cell() -> None:
    torch.manual_seed(0)
    fused, x = nn.GRU(3, 5).double(), torch.randn(6, 2, 3, dtype=F64)
    cell = nn.GRUCell(3, 5).double()
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in fused.state_dict().items()})
    with gradflow.record(fused) as one:
        fused(x)[0][-1].square().sum().backward()
    with gradflow.record(cell) as other:
        h = torch.zeros(2, 5, dtype=F64)
        for step in x:
            h = cell(step, h)
        h.square().sum().backward()
    assert one["l0"].grad_c is None
    torch.testing.assert_close(one["l0"].grad_h, other["cell"].grad_h, rtol=1e-10, atol=0)


def test_row_17_a_stacked_gru() -> None:
    torch.manual_seed(0)
    run = gradflow.diagnose(nn.GRU(8, 32, 2), torch.randn(60, 16, 8))
    assert [(layer.cell, layer.verdict) for layer in run.values()] == [("GRU", "vanishing")] * 2
    assert all(layer.horizon is not None and 15 <= layer.horizon <= 21 for layer in run.values())


def rates_of(make: Callable[[], nn.RNNBase], scale: float) -> list[float]:
    """The rate of three draws of a layer, their recurrent weights times a scale."""
    found = []
    for seed in (5, 6, 7):
        torch.manual_seed(seed)
        layer = make()
        with torch.no_grad():
            layer.weight_hh_l0.mul_(scale)
        with gradflow.record(layer) as recording:
            layer(noise(100))[0][-1].sum().backward()
        jacobians = gradflow.analyzer.step_jacobians(recording["l0"])
        found.append(float(gradflow.analyzer.lyapunov_spectrum(jacobians, k=1).mean()))
    return found


def test_row_18_relu_moves_the_border_and_does_not_widen_it() -> None:
    def relu() -> nn.RNN:
        return nn.RNN(4, 64, nonlinearity="relu")

    assert rates_of(relu, 1) == pytest.approx([-0.94, -0.86, -0.88], abs=0.02)
    assert rates_of(lambda: nn.RNN(4, 64), 1) == pytest.approx([-0.52, -0.43, -0.57], abs=0.02)
    # the scale that is right on average: one vanishes, one explodes, one is between
    assert rates_of(relu, math.sqrt(6)) == pytest.approx([-0.08, 0.32, 0.01], abs=0.02)
    assert max(map(abs, rates_of(lambda: nn.RNN(4, 64), math.sqrt(6)))) < 0.06
    assert max(rates_of(lambda: nn.LSTM(4, 64), math.sqrt(6))) < -0.15


def test_row_18_relu_does_not_cure_it() -> None:
    torch.manual_seed(5)
    verdicts = {}
    for scale in (1.0, 3.0):
        relu = nn.RNN(4, 64, nonlinearity="relu")
        with torch.no_grad():
            relu.weight_hh_l0.mul_(scale)
        with gradflow.record(relu) as recording:
            relu(torch.randn(100, 4, 4))[0][-1].sum().backward()
        verdicts[scale] = gradflow.analyze(recording, stride=50)["l0"].verdict
    assert verdicts == {1.0: "vanishing", 3.0: "exploding"}


def noise(steps: int) -> Tensor:
    return torch.randn(steps, 4, 4, generator=torch.Generator().manual_seed(4))


def of_sixteen(
    module: type[nn.RNNBase], bias: float | None = None, chrono: int | None = None
) -> nn.RNNBase:
    """Sixteen units as in notebook 6; the forget bias a number, or drawn for a range of steps."""
    torch.manual_seed(3)
    layer = module(4, 16)
    with torch.no_grad():
        if bias is not None or chrono is not None:
            layer.bias_hh_l0[16:32] = 0
            layer.bias_ih_l0[16:32] = bias or 0
        if chrono is not None:
            layer.bias_ih_l0[16:32] = torch.empty(16).uniform_(1, chrono - 1).log()
            layer.bias_ih_l0[:16] = -layer.bias_ih_l0[16:32]
            layer.bias_hh_l0[:16] = 0
    return layer


def reach(layer: nn.Module, inputs: Tensor) -> tuple[int | None, int | None]:
    """Horizon and channels; gains need no loss."""
    with gradflow.record(layer) as recording:
        layer(inputs)
    found = gradflow.analyze(recording, stride=len(inputs) // 20, method="exact")["l0"]
    return found.horizon, found.channels


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
@pytest.mark.parametrize("module", [nn.RNN, nn.GRU, nn.LSTM])
def test_row_19_an_untrained_horizon_does_not_depend_on_the_length(
    module: type[nn.RNNBase],
) -> None:
    horizons = [reach(of_sixteen(module), noise(steps))[0] for steps in (100, 300)]
    assert all(horizon is not None and 14 <= horizon <= 21 for horizon in horizons)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
@pytest.mark.parametrize("module", [nn.RNN, nn.GRU, nn.LSTM])
def test_row_19_nor_at_a_thousand_steps(module: type[nn.RNNBase]) -> None:
    horizon, channels = reach(of_sixteen(module), noise(1000))
    assert horizon is not None and 14 <= horizon <= 21 and channels == 0


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
@pytest.mark.parametrize(
    ("bias", "horizon", "channels"), [(1.0, (45, 55), (0, 0)), (5.0, None, (14, 16))]
)
def test_row_19_forget_biases_at_three_hundred_steps(
    bias: float, horizon: tuple[int, int] | None, channels: tuple[int, int]
) -> None:
    measured, kept = reach(of_sixteen(nn.LSTM, bias), noise(300))
    assert kept is not None and channels[0] <= kept <= channels[1]
    if horizon is None:
        assert measured is None
    else:
        assert measured is not None and horizon[0] <= measured <= horizon[1]


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_row_19_the_smallest_bias_that_spans_three_hundred() -> None:
    f = 10 ** (-3 / 300)
    assert math.log(f / (1 - f)) == pytest.approx(3.76, abs=0.005), "without recurrent weights"
    below, above = (reach(of_sixteen(nn.LSTM, bias), noise(400))[0] for bias in (2.8, 2.9))
    assert below is not None and below <= 300
    assert above is None or above > 300


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_row_19_a_thousand_steps() -> None:
    horizon, _ = reach(of_sixteen(nn.LSTM, 3.0), noise(1000))
    assert horizon is not None and 300 < horizon < 450
    for layer, least in ((of_sixteen(nn.LSTM, 5.0), 6), (of_sixteen(nn.LSTM, chrono=1000), 13)):
        horizon, channels = reach(layer, noise(1000))
        assert horizon is None and channels is not None and channels >= least


def trained(cell: Literal["RNN", "LSTM"], updates: int) -> tuple[AddingModel, float]:
    """A model trained on the adding task as in notebook 6, and its mean error at the end."""
    torch.manual_seed(0)
    model, generator = AddingModel(cell), torch.Generator().manual_seed(0)
    optimizer, errors = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(updates):
        x, y = adding_batch(64, 100, generator=generator)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        errors.append(loss.item())
    return model, sum(errors[-50:]) / 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_rows_19_and_20_the_adding_task() -> None:
    rnn, guessing = trained("RNN", 200)
    lstm, solved = trained("LSTM", 600)
    assert solved < 0.02 < 0.15 < guessing, "always answering 1 has an error of 1/6"
    x, _ = adding_batch(4, 300, generator=torch.Generator().manual_seed(9))
    found = {}
    for name, model in (("RNN", rnn), ("LSTM", lstm)):
        alone = type(model.rnn)(2, 32)
        alone.load_state_dict(model.rnn.state_dict())
        found[name] = reach(alone, x.transpose(0, 1))
    assert found["RNN"][0] is not None and found["RNN"][0] < 30
    assert found["LSTM"][0] is None, "trained on 100 steps, it spans 300"


def test_row_20_adding_keeps_the_gradient_and_covering_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4, 3, dtype=F64)
    weights, recurrent = torch.randn(3, 3, dtype=F64), 0.3 * torch.randn(3, 3, dtype=F64)

    def run(step: Callable[[Tensor, Tensor], Tensor]) -> gradflow.LayerAnalysis:
        with gradflow.record(nn.Identity()) as recording:
            s = torch.zeros(4, 3, dtype=F64, requires_grad=True)
            for value in x:
                s = gradflow.tap(s=step(s, value))
            s.sum().backward()
        return gradflow.analyze(recording)["loop"]

    adding = run(lambda s, value: s + torch.tanh(value @ weights))
    gains = spectral(adding)
    assert (gains[~np.isnan(gains)] == 0.0).all(), "exactly 1 at every lag"
    covering = run(lambda s, value: torch.tanh(value @ weights + s @ recurrent))
    between = run(lambda s, value: s + 0.1 * torch.tanh(value @ weights - s))
    assert covering.rate.value < between.rate.value < adding.rate.value
    assert adding.rate.value == pytest.approx(0, abs=1e-14)
    assert covering.verdict == "vanishing" and adding.verdict == "stable"


# -------------------------------------------------------------------- 22, 23: saturation, explosion


def test_row_22_saturated_units_pass_nothing_on() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(8, 32)
    with torch.no_grad():
        rnn.weight_ih_l0.mul_(30)
    layer = gradflow.diagnose(rnn, torch.randn(60, 16, 8))["l0"]
    names = [finding.name for finding in layer.findings]
    assert "vanishing" in names and "saturated-activations" in names
    assert layer.horizon is not None and layer.horizon < 10


def diverging(clip: float | None) -> tuple[int, gradflow.Recording]:
    """Train a ReLU RNN until its loss is not finite; the updates done, and the last recording."""
    torch.manual_seed(0)
    rnn, head = nn.RNN(2, 24, nonlinearity="relu"), nn.Linear(24, 1)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(1.03 * torch.eye(24))
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    done = 0
    for update in range(1, 9):
        x = torch.rand(40, 16, 2)
        optimizer.zero_grad()
        with gradflow.record(rnn) as recording:
            loss = nn.functional.mse_loss(head(rnn(x)[0][-1])[:, 0], x[:, :, 0].sum(0))
            loss.backward()
        if not math.isfinite(loss.item()):
            break
        nn.utils.clip_grad_norm_(parameters, clip or math.inf)
        optimizer.step()
        done = update
    return done, recording


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_row_23_the_first_value_that_is_not_finite() -> None:
    update, recording = diverging(clip=None)
    assert update == 1, "the second one's loss is not finite"
    finding = gradflow.analyze(recording).findings[0]
    assert finding.name == "not-finite"
    h = recording["l0"].h
    first = (~torch.isfinite(h)).any(2).any(1).nonzero()[0, 0]
    sequence, unit = (~torch.isfinite(h[first])).nonzero()[0].tolist()
    assert finding.where == f"step {first + 1}, sequence {sequence + 1}, unit {unit + 1}"
    assert "forward" in finding.message


def test_row_23_norm_clipping_cures_the_crash() -> None:
    update, recording = diverging(clip=1.0)
    assert update == 8
    assert "not finite" not in gradflow.analyze(recording)["l0"].labels


# ------------------------------------------- 4, 8, 13, 15, 16, 21, 24: depth, paths, cells, words


def test_row_4_every_layer_and_the_flow_between_them() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(3, 8, 3).double()
    with gradflow.record(rnn) as recording:
        rnn(torch.randn(12, 4, 3, dtype=F64))[0][-1].square().sum().backward()
    assert list(recording.tracks) == ["l0", "l1", "l2"]
    run = gradflow.analyze(recording)
    # what a layer passes down is what arrives from outside at the layer below
    for lower, upper in (("l0", "l1"), ("l1", "l2")):
        passed = run[upper].data["grad_input_norm"].values
        arrives = run[lower].data["grad_norm"].sel(kind="direct", state="h").values
        np.testing.assert_allclose(passed, arrives, rtol=1e-10)


def test_row_8_the_four_paths_and_a_factor_above_one() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 16).double()
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(4)
        lstm.bias_ih_l0[16:32] = 2
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(20, 1, 8, dtype=F64))[0][-1].sum().backward()
    track, layer = recording["l0"], gradflow.analyze(recording)["l0"]
    paths = layer.data["path_gain"]
    assert float(paths.sel(path="total").max()) > 1
    gates = {name: gate[:, 0] for name, gate in track.gates.items()}
    c = torch.cat([torch.zeros(1, 16, dtype=F64), track.c[:, 0]])
    u = dict(zip("ifgo", lstm.weight_hh_l0.detach().chunk(4), strict=True))
    for t in (1, 7, 19):
        i, f, g = (gates[name][t] for name in "ifg")
        back = torch.diag(gates["o"][t - 1] * (1 - c[t].tanh() ** 2))
        terms = {
            "forget gate": torch.diag(f),
            "through f": torch.diag(c[t] * f * (1 - f)) @ u["f"] @ back,
            "through i": torch.diag(g * i * (1 - i)) @ u["i"] @ back,
            "through g": torch.diag(i * (1 - g**2)) @ u["g"] @ back,
        }
        terms["total"] = sum(terms.values(), torch.zeros(16, 16, dtype=F64))
        for path, term in terms.items():
            wanted = float(torch.linalg.matrix_norm(term, 2))
            assert float(paths.sel(path=path, step=t)) == pytest.approx(wanted, rel=1e-9)


def test_row_8_multiplying_the_factor_drops_the_path_through_h() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 16).double()
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(4)
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(20, 1, 8, dtype=F64))[0][-1].sum().backward()
    track = recording["l0"]
    jacobians = gradflow.analyzer.step_jacobians(track)[:, 0]
    o, c = track.gates["o"][:, 0], track.c[:, 0]
    slope = o * (1 - c.tanh() ** 2)  # how h follows c while the output gate is held
    whole, factor = torch.eye(32, dtype=F64), torch.eye(16, dtype=F64)
    for t in range(1, 20):
        whole = jacobians[t] @ whole
        factor = (jacobians[t][16:, 16:] + jacobians[t][16:, :16] * slope[t - 1]) @ factor
        # what the factor stands for: ∂c_t/∂c_0 where h_0 moves with c_0
        right = whole[16:, 16:] + whole[16:, :16] * slope[0]
        if t == 1:
            torch.testing.assert_close(factor, right, rtol=1e-12, atol=0)
    off = float((factor - right).norm() / right.norm())
    assert off == pytest.approx(0.588, abs=0.01), "only the joint state composes"
    block = gradflow.analyze(recording)["l0"].data["log_block_gain"].sel(block="cc")[0]
    rms = float(torch.linalg.matrix_norm(whole[16:, 16:])) / 4
    assert float(block[0, 19]) == pytest.approx(math.log(rms), rel=1e-9)


class FromScratch(nn.Module):
    """The notes' cell: gates in the order f, i, candidate, o."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.W_x = nn.Linear(inputs, 4 * hidden)
        self.W_h = nn.Linear(hidden, 4 * hidden)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        f, i, candidate, o = (self.W_x(x) + self.W_h(h)).chunk(4, dim=-1)
        c_t = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        h_t = torch.sigmoid(o) * torch.tanh(c_t)
        return h_t, (h_t, c_t)


def called_once(cell: nn.Module) -> gradflow.Recording:
    with gradflow.record(cell) as recording:
        cell(torch.randn(2, 3), (torch.zeros(2, 5), torch.zeros(2, 5)))[0].sum().backward()
    return recording


def test_row_13_called_once() -> None:
    with pytest.warns(GradflowWarning, match="called once, so no state came back"):
        called_once(FromScratch(3, 5))


def test_row_13_in_a_loop_of_seven() -> None:
    torch.manual_seed(0)
    cell, x, kept = FromScratch(3, 5).double(), torch.randn(7, 2, 3, dtype=F64), []
    with gradflow.record(cell) as recording:
        state = (torch.zeros(2, 5, dtype=F64), torch.zeros(2, 5, dtype=F64))
        for step in x:
            output, state = cell(step, state)
            for tensor in state:
                tensor.retain_grad()
            kept.append(state)
        output.square().sum().backward()
    track = recording["cell"]
    assert (track.cell, track.steps, list(track.states)) == ("FromScratch", 7, ["h", "c"])
    for t, (h, c) in enumerate(kept):
        torch.testing.assert_close(track.grad_h[t], h.grad, rtol=1e-12, atol=0)
        torch.testing.assert_close(track.grad_c[t], c.grad, rtol=1e-12, atol=0)

    def joint(state: Tensor, x: Tensor) -> Tensor:
        _, (h, c) = cell(x[None], (state[None, :5], state[None, 5:]))
        return torch.cat([h, c], 1)[0]

    jacobians = gradflow.analyzer.step_jacobians(track)
    before = torch.zeros(2, 10, dtype=F64)
    for t in range(7):
        for b in range(2):
            wanted = torch.func.jacrev(joint)(before[b], x[t, b]).detach()
            torch.testing.assert_close(jacobians[t, b], wanted, rtol=1e-10, atol=1e-15)
        before = torch.cat([part.detach() for part in kept[t]], 1)


class Peephole(nn.Module):
    """Row 15: the forget gate, or all gates, see the cell state."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.x, self.h = nn.Linear(3, 16), nn.Linear(4, 16)
        self.p = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        f, i, g, o = (self.x(x) + self.h(h)).chunk(4, -1)
        f = torch.sigmoid(f + self.p[0] * c)
        i = torch.sigmoid(i + (self.p[1] * c if self.everywhere else 0))
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + (self.p[2] * c if self.everywhere else 0))
        return o * torch.tanh(c), c


class Coupled(nn.Module):
    """Row 16: i = 1 − f."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(3, 12), nn.Linear(4, 12)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        f, g, o = (self.x(x) + self.h(h)).chunk(3, -1)
        f = torch.sigmoid(f)
        c = f * c + (1 - f) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


@pytest.mark.parametrize(
    "make", [lambda: Peephole(False), lambda: Peephole(True), Coupled], ids=["f", "all", "coupled"]
)
def test_rows_15_and_16_are_cells_like_any_other(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    cell, x, kept = make().double(), torch.randn(6, 2, 3, dtype=F64), []
    with gradflow.record(cell) as recording:
        h = c = torch.zeros(2, 4, dtype=F64)
        for step in x:
            h, c = cell(step, h, c)
            h.retain_grad()
            c.retain_grad()
            kept.append((h, c))
        h.square().sum().backward()
    track = recording["cell"]
    for t, (h, c) in enumerate(kept):
        torch.testing.assert_close(track.grad_h[t], h.grad, rtol=1e-12, atol=0)
        torch.testing.assert_close(track.grad_c[t], c.grad, rtol=1e-12, atol=0)
    assert gradflow.analyze(recording)["cell"].verdict in ("vanishing", "inconclusive", "stable")


def test_row_21_the_cell_state_reaches_further_than_h_alone() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 16)
    with torch.no_grad():
        lstm.bias_ih_l0[16:32] = 3
    layer = gradflow.diagnose(lstm, torch.randn(60, 8, 8))["l0"]
    blocks = layer.data["log_block_gain"][:, 0, 0, 59]
    gain = {str(name): float(blocks.sel(block=name)) for name in layer.data["block"].values}
    assert gain["cc"] > max(gain["hh"], gain["hc"], gain["ch"])
    assert gain["cc"] - gain["hh"] > math.log(10), "what starts in c outlives what starts in h"


@pytest.mark.parametrize(("bias", "felt"), [(0, (15, 11)), (1, (41, 28))])
def test_row_21_the_horizons_of_c_and_h_differ_by_the_first_step(
    bias: float, felt: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 32)
    with torch.no_grad():
        lstm.bias_ih_l0[32:64] += bias
    x = torch.randn(60, 16, 8, generator=torch.Generator().manual_seed(0))
    with gradflow.record(lstm) as recording:
        lstm(x)[0][-1].square().sum().backward()
    pace = {}
    for state, expected in zip("ch", felt, strict=True):
        size = recording["l0"].grads[state].norm(dim=-1).median(1).values.numpy()[::-1]
        assert np.flatnonzero(size < 1e-3 * size[0])[0] == pytest.approx(expected, abs=2)
        pace[state] = math.log(size[40] / size[20]) / 20
    assert pace["h"] == pytest.approx(pace["c"], abs=0.02), "from then on both fade alike"


SENTENCES = [
    "the clouds are in the sky",
    "I grew up in France so I speak fluent French",
    "the man who wore a wig went inside",
]


def test_row_24_the_sentences_word_by_word() -> None:
    words = sorted({word for text in SENTENCES for word in text.split()})
    torch.manual_seed(0)
    embed, lstm, head = nn.Embedding(len(words), 8), nn.LSTM(8, 16), nn.Linear(16, len(words))
    model = nn.ModuleList([embed, lstm, head])
    for text in SENTENCES:
        tokens = torch.tensor([words.index(word) for word in text.split()]).unsqueeze(1)
        with gradflow.record(model) as recording:
            scores = head(lstm(embed(tokens[:-1]))[0])
            nn.functional.cross_entropy(scores[-1], tokens[-1]).backward()
        layer = gradflow.analyze(recording)["1.l0"]
        assert layer.data.sizes["target"] == len(tokens) - 1, "a row and a column for every word"
        assert np.isfinite(layer.data["grad_norm"].sel(kind="total", state="c")).all()


# ------------------------------------------------------------- where a reader of the notes finds them

PLACES = {  # row -> notebook and heading
    1: ("01", "One unit, no input"),
    2: ("01", "The gradient of a weight is a sum over pairs"),
    3: ("02", "A loss at every step"),
    4: ("03", "The picture first: a stacked classifier"),
    5: ("03", "Truncation, and what it costs"),
    6: ("03", "Explosion, NaN, and clipping"),
    7: ("04", "The backward equations"),
    8: ("02", "The four paths of the cell state"),
    9: ("03", "A program that never trains its recurrence"),
    10: ("04", "One wall"),
    11: ("04", "The same weights in `nn.LSTMCell`"),
    12: ("04", "And in `nn.LSTM`"),
    13: ("05", "Exact, not approximate"),
    14: ("03", "The picture first: a stacked classifier"),
    15: ("05", "Peepholes, and coupled gates"),
    16: ("05", "Peepholes, and coupled gates"),
    17: ("02", "The picture first"),
    18: ("06", "ReLU does not cure it"),
    19: ("06", "How far does it reach?"),
    20: ("02", "Covering and adding"),
    21: ("02", '"C is the long-term memory, h the short-term one"'),
    22: ("01", "Saturated neurons"),
    23: ("03", "Explosion, NaN, and clipping"),
    24: ("02", "A small language model"),
}


@pytest.mark.parametrize("row", range(1, 25))
def test_every_row_has_a_place_in_a_notebook_and_a_test(row: int) -> None:
    start, heading = PLACES[row]
    (file,) = notebooks.FOLDER.glob(f"{start}_*.py")
    assert re.search(rf"^# #+ {re.escape(heading)}$", file.read_text(), re.MULTILINE), file.name
    named = [re.match(r"test_rows?_(\d+)(?:_and_(\d+))?_", name) for name in globals()]
    assert str(row) in {number for match in named if match for number in match.groups()}
