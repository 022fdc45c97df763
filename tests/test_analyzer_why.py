"""Why a gradient fades: paths of the cell state, factors of the rate, the census of units, flow.

Oracles: closed forms, and autograd through one step with o_{t−1} held fixed.
"""

from __future__ import annotations

import math

import cases
import loops
import numpy as np
import pytest
import torch
from seam import PATHS, cell_paths, in_processing_order, path_gains
from torch import Tensor, nn

import gradflow
from gradflow.analysis import Finding, LayerAnalysis
from gradflow.analyzer import analyze, exponents
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording, Track

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMOID_2 = 0.8807970779778823


def record(module: nn.Module, x: Tensor, hx: object = None) -> Recording:
    with gradflow.record(module) as recording:
        module(x, hx)[0][-1].sum().backward()
    return recording


def layer_of(module: nn.Module, x: Tensor, **options: object) -> LayerAnalysis:
    (layer,) = analyze(record(module, x), **options).values()
    return layer


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def zeroed(module: nn.Module) -> nn.Module:
    for weight in module.parameters():
        nn.init.zeros_(weight)
    return module


def named(layer: LayerAnalysis, name: str) -> Finding:
    (finding,) = [finding for finding in layer.findings if finding.name == name]
    return finding


# --------------------------------------------------------------------------- the four paths of c


def terms_by_autograd(track: Track, b: int, t: int) -> dict[str, Tensor]:
    """The four terms of ∂c_t/∂c_{t−1} of processed step t: each gate alone sees the moving h."""
    gates = {name: in_processing_order(track, gate)[:, b] for name, gate in track.gates.items()}
    c = in_processing_order(track, track.states["c"])[:, b]
    x = in_processing_order(track, track.inputs)[t, b]
    weights, o = track.weights, gates["o"][t - 1]

    def next_c(moving: Tensor, seen_by: str) -> Tensor:
        fixed = c[t - 1]

        def h_of(value: Tensor) -> Tensor:
            h = o * value.tanh()
            return weights["weight_hr"] @ h if "weight_hr" in weights else h

        pre = {}
        for name, block in zip("ifgo", weights["weight_hh"].chunk(4), strict=True):
            place = "ifgo".index(name)
            h = h_of(moving if name in seen_by else fixed)
            a = weights["weight_ih"].chunk(4)[place] @ x + block @ h
            for bias in ("bias_ih", "bias_hh"):
                if bias in weights:
                    a = a + weights[bias].chunk(4)[place]
            pre[name] = a
        kept = moving if "c" in seen_by else fixed
        return pre["f"].sigmoid() * kept + pre["i"].sigmoid() * pre["g"].tanh()

    wanted = {"forget gate": "c", "through f": "f", "through i": "i", "through g": "g"}
    wanted["total"] = "cifg"
    return {
        path: torch.autograd.functional.jacobian(lambda v, s=seen: next_c(v, s), c[t - 1])
        for path, seen in wanted.items()
    }


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("LSTM"),
        cases.Case("LSTM", proj=3, initial=True, scale=2.0),
        cases.Case("LSTM", layers=2, bidirectional=True, packed="unsorted", bias=False),
    ],
    ids=str,
)
def test_paths_equal_autograd(case: cases.Case) -> None:
    recording = cases.seen(case).recording
    for track in recording.values():
        lengths = track.lengths.tolist()
        b = int(np.argmax(lengths))
        paths, gains = cell_paths(track, [b]), path_gains(track, [b])
        for t in range(1, lengths[b]):
            expected = terms_by_autograd(track, b, t)
            found = dict(zip(PATHS[1:4], paths.through(t)[0], strict=True))
            found |= {"forget gate": paths.forget[t, 0].diag(), "total": paths.total(t)[0]}
            step = lengths[b] - 1 - t if track.reverse else t
            for place, path in enumerate(PATHS):
                scale = expected[path].abs().max()
                assert (found[path] - expected[path]).abs().max() <= 1e-13 * scale, (path, t)
                norm = float(torch.linalg.matrix_norm(expected[path], 2))
                assert math.log(gains[place, step]) == pytest.approx(math.log(norm), abs=1e-10)
        assert np.isnan(gains[:, lengths[b] - 1 if track.reverse else 0]).all()  # there is no o_0


def test_a_wrong_path_would_be_seen() -> None:
    (track,) = cases.seen(cases.Case("LSTM")).recording.values()
    wrong = terms_by_autograd(track, 0, 3)["total"]
    paths = cell_paths(track, [0])
    swapped = paths.recurrent[[1, 0, 2]]  # f's block where i's belongs
    shifted = (paths.factors[3, 0].unsqueeze(-1) * swapped * paths.before[3, 0]).sum(0)
    error = (shifted + paths.forget[3, 0].diag() - wrong).abs().max() / wrong.abs().max()
    assert error > 1e-3


def test_paths_of_a_loop_over_a_cell() -> None:
    cell = loops.cell_of("LSTM")
    with gradflow.record(cell) as recording:
        loops.loss_of(loops.run(cell, normal(7, 2, 3))).backward()
    (track,) = recording.values()
    gains = path_gains(track, [0, 1])
    norms = [
        torch.linalg.matrix_norm(terms_by_autograd(track, b, 4)["total"], 2).item() for b in (0, 1)
    ]
    assert gains[4, 4] == pytest.approx(np.median(norms), rel=1e-10)


def test_what_a_loop_does_between_two_steps_is_no_path_of_the_cell() -> None:
    cell = loops.cell_of("LSTM")

    def halved(t: int, state: loops.State, began: loops.State) -> loops.State:
        return tuple(0.5 * s for s in state) if t == 3 else state

    with gradflow.record(cell) as recording:
        loops.loss_of(loops.run(cell, normal(6, 2, 3), halved)).backward()
    gains = path_gains(recording["cell"], [0, 1])[4]
    assert np.isnan(gains).tolist() == [True, False, False, True, False, False]


def test_without_recurrent_weights_the_forget_path_is_all() -> None:
    lstm = zeroed(nn.LSTM(1, 3, dtype=torch.float64))
    with torch.no_grad():
        for bias in (lstm.bias_ih_l0, lstm.bias_hh_l0):  # two biases of 1 add up: σ(2), not σ(1)
            bias[3:6] = 1.0
    gains = layer_of(lstm, normal(8, 2, 1)).data["path_gain"]
    assert gains.dims == ("path", "step")
    for path, value in {"forget gate": SIGMOID_2, "total": SIGMOID_2, "through g": 0.0}.items():
        assert gains.sel(path=path).values[1:] == pytest.approx(value, rel=1e-12)


def test_the_sum_of_the_paths_may_exceed_one() -> None:
    """At c = h = 0 every gate is ½ and the sum is f + i U_g o = ½ + U_g/4: 2.5 for U_g = 8."""
    lstm = zeroed(nn.LSTM(1, 1, dtype=torch.float64))
    with torch.no_grad():
        lstm.weight_hh_l0[2] = 8.0
    gains = layer_of(lstm, torch.zeros(6, 2, 1, dtype=torch.float64)).data["path_gain"].values
    assert pytest.approx(np.tile([0.5, 0, 0, 2.0, 2.5], (5, 1)), rel=1e-12) == gains[:, 1:].T


@pytest.mark.parametrize("with_o", [False, True])
def test_one_steps_factor_multiplied_up_drops_the_path_through_o(with_o: bool) -> None:
    """∏ ∂c/∂c is the gradient of c only where the output gate does not listen to h."""
    lstm = nn.LSTM(1, 2, dtype=torch.float64)
    nn.init.normal_(lstm.weight_hh_l0, std=2.0)
    if not with_o:
        with torch.no_grad():
            lstm.weight_hh_l0[6:] = 0.0
    x, c0 = normal(6, 1, 1), normal(1, 1, 2)
    c0.requires_grad_()
    recording = record(lstm, x, (torch.zeros_like(c0), c0))
    paths = cell_paths(recording["l0"], [0])
    product = paths.forget[0, 0].diag()  # the first step has no h that moves with c
    for t in range(1, 6):
        product = paths.total(t)[0] @ product
    c_n = lstm(x, (torch.zeros_like(c0), c0))[1][1]
    true = torch.stack([torch.autograd.grad(c, c0, retain_graph=True)[0][0, 0] for c in c_n[0, 0]])
    error = float((product - true).norm() / true.norm())
    assert error > 0.1 if with_o else error < 1e-12


def test_paths_of_wide_cells_are_iterated_at_strided_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(nn.LSTM(2, 70), torch.randn(40, 2, 2))
    monkeypatch.setattr("gradflow.analyzer.paths.PATH_SECONDS", 0.02)
    gains = path_gains(recording["l0"], [1])
    known = np.flatnonzero(~np.isnan(gains[4]))
    assert 1 < len(known) < 39
    assert len(set(np.diff(known))) == 1
    total = cell_paths(recording["l0"], [1]).total(int(known[-1]))[0]
    assert gains[4, known[-1]] == pytest.approx(float(torch.linalg.matrix_norm(total, 2)), rel=2e-4)


def test_other_cells_have_no_paths() -> None:
    data = layer_of(nn.GRU(1, 3), torch.randn(5, 2, 1)).data
    assert data["path_gain"].shape == (0, 5)


# ------------------------------------------------------------------------- factors, step growth


@pytest.mark.parametrize("weight", [1.5, 2.0, 3.0])
def test_factors_of_a_scalar_rnn_at_its_fixed_point(weight: float) -> None:
    rnn = nn.RNN(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(rnn.weight_hh_l0, weight)
    h = 1.0
    for _ in range(500):
        h = math.tanh(weight * h)
    fixed = torch.full((1, 2, 1), h, dtype=torch.float64)
    (layer,) = analyze(record(rnn, torch.zeros(30, 2, 1, dtype=torch.float64), fixed)).values()
    expected = [math.log(weight), math.log(1 - h * h)]
    assert layer.data["rate_factor"].values == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_factors_add_up_to_the_rate(nonlinearity: str) -> None:
    rnn = nn.RNN(
        2, 7, nonlinearity=nonlinearity, num_layers=2, bidirectional=True, dtype=torch.float64
    )
    lengths = torch.tensor([40, 23, 31])
    x = nn.utils.rnn.pack_padded_sequence(normal(40, 3, 2), lengths, enforce_sorted=False)
    with gradflow.record(rnn) as recording:
        rnn(x)[0].data.sum().backward()
    for layer in analyze(recording).values():
        assert float(layer.data["rate_factor"].sum()) == pytest.approx(layer.rate.value, rel=1e-12)
        assert (layer.data["rate_factor"].sel(factor="activation") <= 0).all()


def test_orthogonal_weights_have_no_factor() -> None:
    rnn = nn.RNN(2, 6, dtype=torch.float64)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    factors = layer_of(rnn, normal(60, 4, 2)).data["rate_factor"]
    assert float(factors.sel(factor="weight")) == pytest.approx(0.0, abs=1e-12)


def test_exact_zeros_are_the_activations() -> None:
    rnn = nn.RNN(2, 6, nonlinearity="relu")
    with torch.no_grad():
        rnn.bias_hh_l0 -= 50
    data = layer_of(rnn, torch.randn(20, 3, 2)).data
    assert data["rate_factor"].sel(factor="activation") == -math.inf
    assert data["step_growth"].values[0] == -math.inf
    assert np.isnan(data["step_growth"].values[1:]).all()


def test_factors_of_other_cells_are_undefined() -> None:
    assert np.isnan(layer_of(nn.LSTM(1, 3), torch.randn(12, 2, 1)).data["rate_factor"]).all()


def test_step_growth_is_the_rate_on_average() -> None:
    layer = layer_of(nn.GRU(2, 5, dtype=torch.float64), normal(50, 1, 2))
    growth = layer.data["step_growth"].values
    assert np.isnan(growth[:10]).all()  # the burn-in
    assert growth[10:].mean() == pytest.approx(layer.rate.value, rel=1e-12)


@pytest.mark.parametrize("name", ["l0", "l0_reverse"])
def test_step_growth_is_in_input_time(name: str) -> None:
    rnn = nn.RNN(1, 4, bidirectional=True, dtype=torch.float64)
    x = normal(40, 3, 1, scale=0.01)
    x[22] = 30.0
    growth = analyze(record(rnn, x))[name].data["step_growth"].values
    assert int(np.nanargmin(growth)) == 22


def test_growth_can_be_watched() -> None:
    seen: list[Tensor] = []
    stack = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64).expand(6, 1, -1, -1)
    operator = exponents.DenseOperator(stack)
    growth = exponents.log_growth(operator, torch.tensor([6]), 2, watch=lambda t, q: seen.append(q))
    pushed = [(stack[0, 0] @ q[0]).norm().log().item() for q in seen]
    assert growth.log_growth[:, 0, 0].tolist() == pytest.approx(pushed, rel=1e-12)


# ------------------------------------------------------------------------------ census of units


def test_time_scales_are_those_of_the_forget_gate() -> None:
    lstm = zeroed(nn.LSTM(1, 3, dtype=torch.float64))
    with torch.no_grad():
        lstm.bias_ih_l0[3:6] = torch.tensor([0.0, 2.0, 100.0])
    data = layer_of(lstm, normal(6, 2, 1)).data
    expected = [1 / math.log(2), -1 / math.log(SIGMOID_2), math.inf]
    assert data["time_scale"].values == pytest.approx(expected, rel=1e-12)
    assert data["gate_unit_open"].sel(gate="f").values.tolist() == [0, 0, 1]
    assert data["gate_unit_closed"].sel(gate="f").values.tolist() == [0, 0, 0]
    assert np.isnan(data["gate_unit_open"].sel(gate="g")).all()
    assert data["gate_value"].sel(gate="f", step=4).values == pytest.approx(
        [0.5, SIGMOID_2, 1.0], rel=1e-12
    )


def test_time_scales_of_a_gru_are_those_of_its_update_gate() -> None:
    gru = zeroed(nn.GRU(1, 2, dtype=torch.float64))
    with torch.no_grad():
        gru.bias_hh_l0[2:4] = torch.tensor([2.0, -1000.0])
    scales = layer_of(gru, normal(6, 2, 1)).data["time_scale"].values
    assert scales == pytest.approx([-1 / math.log(SIGMOID_2), 0.0], rel=1e-12)


def test_gates_per_unit_leave_padding_out() -> None:
    case = cases.Case("GRU", packed="unsorted", proj=0)
    recording = cases.seen(case).recording
    for track, layer in zip(recording.values(), analyze(recording).values(), strict=True):
        for gate, values in track.gates.items():
            for t in range(track.steps):
                expected = values[t][track.mask[t]].mean(0)
                found = layer.data["gate_value"].sel(gate=gate, step=t).values
                assert found == pytest.approx(expected.numpy(), rel=1e-12)


def test_saturation_counts_both_ends_of_every_unit() -> None:
    rnn = zeroed(nn.RNN(1, 4, dtype=torch.float64))
    with torch.no_grad():
        rnn.bias_ih_l0[:] = torch.tensor([9.0, -9.0, 0.0, 1.0])
    layer = layer_of(rnn, normal(8, 2, 1))
    assert layer.data["unit_saturated"].values.tolist() == [[1, 1, 0, 0]]
    lstm = zeroed(nn.LSTM(1, 2, dtype=torch.float64))
    with torch.no_grad():
        lstm.bias_ih_l0[:] = torch.tensor([9.0, 9, 9, 9, 9, 0, 9, 9])  # one cell counts up
    saturated = layer_of(lstm, normal(10, 2, 1)).data["unit_saturated"]
    assert saturated.sel(state="c").values == pytest.approx([0.9, 0.0])  # tanh 1 is not, tanh 2 is
    assert np.isnan(saturated.sel(state="h")).all()


def test_idle_units_are_exact_zeros() -> None:
    rnn = zeroed(nn.RNN(1, 3, nonlinearity="relu", dtype=torch.float64))
    with torch.no_grad():
        rnn.weight_ih_l0[:, 0] = torch.tensor([1.0, -1.0, 0.0])
        rnn.bias_ih_l0[2] = 1.0
    x = torch.tensor([1.0, -1, 1, 1], dtype=torch.float64).view(4, 1, 1).expand(-1, 2, -1)
    data = layer_of(rnn, x).data
    assert data["unit_idle"].values == pytest.approx([0.25, 0.75, 0.0])
    assert np.isnan(data["unit_saturated"]).all()


# -------------------------------------------------------------------------- cuts, flow, first bad


def test_segments_between_cuts() -> None:
    cell = nn.LSTMCell(1, 3)
    state, total = (torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(())
    with gradflow.record(cell) as recording:
        for t in range(100):
            if t in (35, 70):
                state = tuple(s.detach() for s in state)
            state = cell(torch.randn(2, 1), state)
            total = total + state[0].sum()
        total.backward()
    (layer,) = analyze(recording).values()
    assert layer.data["segment_length"].values.tolist() == [35, 35, 30] * 2
    finding = named(layer, "cut")
    assert finding.message == (
        "the state is cut off from its past at steps 36, 71: no gradient crosses there; segments of "
        "35, 35, 30 steps, of sequences of 100; detached in all sequences at once"
    )
    assert (finding.value, finding.threshold, finding.severity) == (35.0, 100.0, -math.inf)
    assert finding.advice.startswith(
        "nothing where an episode or a document ends there; if the task"
    )


def rollout(module: nn.Module, steps: int, *, window: int) -> gradflow.Recording:
    """Four environments whose episodes end at steps of their own; detached every `window` steps."""
    ends = torch.rand(steps, 4, generator=torch.Generator().manual_seed(1)) < 0.08
    with gradflow.record(module) as recording:
        h, total = torch.zeros(4, 8), torch.zeros(())
        for t in range(steps):
            h = module(torch.randn(4, 3), h.detach() if t and t % window == 0 else h)
            total, h = total + h.square().sum(), h * ~ends[t].unsqueeze(1)
        total.backward()
    return recording


def test_done_masks_are_told_from_truncation() -> None:
    (layer,) = analyze(rollout(nn.GRUCell(3, 8), 128, window=1000)).values()
    finding = named(layer, "cut")
    assert "masked with zeros in some sequences at a time, as done masks do" in finding.message
    assert "detached" not in finding.message and finding.code == "" and finding.severity is None
    assert f"typically {layer.span} steps, however long the rollout" in finding.advice
    assert "(masked with zeros in some sequences at a time, as done masks do)" in layer.sentence
    leak = named(layer, "update-gates-overwrite")
    assert f", of the {layer.span} steps of a typical stretch" in leak.message
    assert f"uniform_(1, {layer.span - 1})" in leak.code  # in units of segments
    (layer,) = analyze(rollout(nn.GRUCell(3, 8), 128, window=16)).values()
    finding = named(layer, "cut")
    assert "detached in all sequences at once; masked with zeros in some" in finding.message
    assert "if the task reaches across where the state is detached" in finding.advice


def test_what_is_passed_down_is_the_gradient_of_the_input() -> None:
    x = normal(9, 3, 2)
    for module in (nn.LSTM(2, 4), nn.GRU(2, 4), nn.RNN(2, 4)):
        layer_input = x.clone().requires_grad_()
        layer = layer_of(module.double(), layer_input)
        expected = layer_input.grad.norm(dim=-1).median(1).values
        assert layer.data["grad_input_norm"].values == pytest.approx(expected.numpy(), rel=1e-9)


def test_a_stack_that_loses_the_gradient_between_layers() -> None:
    lstm = nn.LSTM(2, 4, num_layers=2, bidirectional=True)
    recording = record(lstm, torch.randn(12, 2, 2))
    assert recording["l0"].above == ("l1", "l1_reverse")
    assert recording["l1"].above == ()
    assert not any(f.name == "lost-between-layers" for f in analyze(recording).findings)
    with torch.no_grad():
        lstm.weight_ih_l1 *= 1e-5
        lstm.weight_ih_l1_reverse *= 1e-5
    analysis = analyze(record(lstm, torch.randn(12, 2, 2)))
    for name in ("l0", "l0_reverse"):
        finding = named(analysis[name], "lost-between-layers")
        assert 0 < finding.value < 1e-4
        assert finding.severity == pytest.approx(math.log10(finding.value))
        assert finding.message.startswith(
            "l1 and l1_reverse have a gradient, but what comes down to l0"
        )
    assert not any(f.name == "lost-between-layers" for f in analysis["l1"].findings)


def test_a_dead_layer_passes_nothing_down() -> None:
    rnn = nn.RNN(2, 4, num_layers=2, nonlinearity="relu")
    with torch.no_grad():
        rnn.bias_hh_l1 -= 50
    finding = named(analyze(record(rnn, torch.randn(12, 2, 2)))["l0"], "lost-between-layers")
    assert finding.message == "l1 has a gradient, but nothing of it comes down to l0"
    assert finding.severity == -math.inf


def test_the_earliest_bad_state_is_named_whichever_it_is() -> None:
    lstm = zeroed(nn.LSTM(1, 2))
    with torch.no_grad():
        lstm.weight_ih_l0[2:4] = -1000.0  # the forget gate shuts where the input is 1
    x = torch.zeros(6, 1, 1)
    x[4] = 1.0  # ∞ · 0 there: h and c are NaN from step 5 on, but c is ∞ from step 1 on
    start = torch.zeros(1, 1, 2), torch.full((1, 1, 2), math.inf)
    with pytest.warns(GradflowWarning), gradflow.record(lstm) as recording:
        lstm(x, start)[0].sum().backward()
    finding = named(analyze(recording)["l0"], "not-finite")
    assert finding.message == (
        "the initial state c is inf in sequence 1, unit 1, and c is inf from step 1 on"
    )


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_a_bad_gradient_from_outside_says_so() -> None:
    rnn = nn.RNN(1, 3, num_layers=2)
    nn.init.zeros_(rnn.weight_ih_l1)
    for name in ("bias_ih_l1", "bias_hh_l1", "weight_hh_l1"):
        nn.init.zeros_(getattr(rnn, name))
    with gradflow.record(rnn) as recording:
        output = rnn(torch.randn(8, 2, 1))[0]
        (output[5].square().sum().sqrt() + output.sum()).backward()  # 0/0 at step 6
    finding = named(analyze(recording)["l1"], "not-finite")
    assert finding.where == "step 6, sequence 1, unit 1"
    assert finding.message == (
        "∂L/∂h is NaN first at step 6, sequence 1, unit 1, in the backward pass, and comes from "
        "outside this layer: from the loss or a layer above"
    )


# --------------------------------------------------------------------- the notes' own statements


def test_c_is_the_long_term_and_h_the_short_term_memory() -> None:
    """Forget bias 3 and no recurrent weights: ∂L/∂c halves every 14 steps, ∂L/∂h ends at once."""
    lstm = zeroed(nn.LSTM(1, 3, dtype=torch.float64))
    with torch.no_grad():
        lstm.bias_ih_l0[3:6] = 3.0
    nn.init.normal_(lstm.weight_ih_l0)
    memory = layer_of(lstm, normal(160, 2, 1)).data["memory_steps"]
    assert memory.sel(state="h").values.tolist() == [1, 1, 1]
    assert (memory.sel(state="c") > 50).all()


def trained(clip: float | None, steps: int = 5) -> list[Recording]:
    """A ReLU RNN at a learning rate far too large, recorded at every step until its loss is bad."""
    torch.manual_seed(3)
    rnn = nn.RNN(2, 8, nonlinearity="relu")
    nn.init.eye_(rnn.weight_hh_l0)
    x, y = torch.rand(60, 4, 2), torch.full((4, 8), 1000.0)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.01)
    recordings = []
    for _ in range(steps):
        optimizer.zero_grad()
        with gradflow.record(rnn) as recording:
            loss = (rnn(x)[0][-1] - y).square().mean()
            loss.backward()
        recordings.append(recording)
        if not bool(torch.isfinite(loss)):
            break
        if clip is not None:
            nn.utils.clip_grad_norm_(rnn.parameters(), clip)
        optimizer.step()
    return recordings


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_a_diverging_rnn_is_located_then_cured_by_clipping() -> None:
    wild, clipped = trained(None), trained(0.1)
    assert (len(wild), len(clipped)) == (2, 5)
    finding = named(analyze(wild[-1])["l0"], "not-finite")
    assert finding.message.startswith("h is inf first at step ")
    assert finding.message.endswith(", in the forward pass: the states outgrow float32")
    assert "clip_grad_norm_" in finding.code
    assert not any(f.name == "not-finite" for f in analyze(clipped[-1])["l0"].findings)


# ------------------------------------------------------------------------------------- findings


def test_a_gate_that_shuts_once_is_one_wall() -> None:
    """The notes' LSTM by hand: f = 1 but at step 7 of 9, where the memory is wiped."""
    forget = [1.0] * 9
    forget[6] = 0.0

    class Worked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            c = torch.zeros(x.shape[1], 1)
            for f, x_t in zip(forget, x, strict=True):
                c = gradflow.tap(c=f * c + self.scale * x_t)
            return c

    model = Worked()
    with gradflow.record(model) as recording:
        model(torch.rand(9, 3, 1)).sum().backward()
    (layer,) = analyze(recording).values()
    assert layer.verdict == "dead"
    expected = [0.0] * 6 + [-math.inf] + [math.nan] * 2
    assert layer.data["step_growth"].values[1:] == pytest.approx(expected[1:], nan_ok=True)
    wall = named(layer, "walls")
    assert (wall.where, wall.severity) == ("step 7", -math.inf)
    assert wall.message.endswith("accounts for 100% of what is lost: an exact zero")


def test_gates_that_a_few_steps_shut_are_walls_not_a_short_memory() -> None:
    lstm = zeroed(nn.LSTM(1, 4, dtype=torch.float64))
    with torch.no_grad():
        lstm.bias_ih_l0[4:8] = 9.0
        lstm.weight_ih_l0[4:8] = -19.0  # at x = 1 the gate is σ(−10)
    x = torch.zeros(40, 3, 1, dtype=torch.float64)
    x[[14, 30]] = 1.0
    layer = layer_of(lstm, x)
    assert {"walls", "forget-gates-leak"} & {f.name for f in layer.findings} == {"walls"}
    wall = named(layer, "walls")
    lost = -2 * math.log(1 / (1 + math.exp(10)))
    assert wall.where == "steps 15, 31"
    assert wall.severity == pytest.approx(-lost / math.log(10), rel=1e-9)
    assert wall.code == "print(x[[14, 30]])  # what is read there"


def test_a_gate_shut_by_its_biases_is_told_from_one_shut_by_what_it_reads() -> None:
    codes = {}
    for shut in ("bias", "input"):
        lstm = nn.LSTM(1, 6, dtype=torch.float64)
        with torch.no_grad():
            if shut == "bias":
                lstm.bias_ih_l0[:6] = -9.0
            else:
                lstm.weight_ih_l0[:6] = -9.0
        codes[shut] = named(layer_of(lstm, 1 + normal(30, 4, 1).abs()), "saturated-gates").code
    assert codes["bias"].splitlines()[0] == "model.bias_ih_l0.data[0:6] = 0.0"
    assert codes["input"].startswith(
        "model.weight_ih_l0.data *= 0.1"
    )  # half of it still shuts them


class Reader(nn.Module):
    """Reads tokens, which have no mean to take away."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(5, 4), nn.RNN(4, 6)

    def forward(self, tokens: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.rnn(20 * self.embedding(tokens), hx)


def test_the_remedy_for_saturation_asks_no_mean_of_tokens() -> None:
    layer = layer_of(Reader().double(), torch.randint(0, 5, (30, 4)))
    code = named(layer, "saturated-activations").code
    assert code == "model.rnn.weight_ih_l0.data *= 0.5  # as if it read half of its input"


def test_the_factor_that_fades_is_the_one_to_change() -> None:
    weights, activations = nn.RNN(1, 8, dtype=torch.float64), nn.RNN(1, 8, dtype=torch.float64)
    nn.init.orthogonal_(weights.weight_hh_l0, gain=0.6)
    nn.init.orthogonal_(activations.weight_hh_l0)
    shrunk = layer_of(weights, normal(40, 4, 1, scale=0.01))
    assert named(shrunk, "weights-contract").value == pytest.approx(math.log(0.6), rel=1e-9)
    lost = f"so it shrinks by {-shrunk.rate.value:.3g} nats per step"  # the two factors together
    assert lost in named(shrunk, "weights-contract").message
    assert "orthogonal_" in named(shrunk, "vanishing").code
    flat = layer_of(activations, normal(40, 4, 1, scale=30.0))
    assert named(flat, "activations-contract").value == pytest.approx(flat.rate.value, rel=1e-9)
    assert "orthogonal_" not in named(flat, "vanishing").code


def test_idle_units_are_named() -> None:
    rnn = nn.RNN(1, 8, nonlinearity="relu")
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(0.6 * torch.eye(8))
        rnn.bias_ih_l0[:] = torch.tensor([5.0] + [-50.0] * 7)
    finding = named(layer_of(rnn, torch.randn(30, 3, 1)), "idle-units")
    assert finding.message == "7 of 8 ReLU units are 0 at every step: no gradient passes them"
    assert finding.where == "units 2, 3, 4, 5, 6, …"


def test_paths_through_h_are_blamed_only_where_they_exceed_the_cells_own() -> None:
    lstm = zeroed(nn.LSTM(1, 4, dtype=torch.float64))
    with torch.no_grad():
        for unit in range(4):
            lstm.weight_hh_l0[8 + unit, unit] = 8.0  # ½ + U_g/4, the forget path being ½
    layer = layer_of(lstm, torch.zeros(30, 3, 1, dtype=torch.float64))
    finding = named(layer, "hidden-paths-drown-cell")
    assert finding.value == pytest.approx((2.5 - 0.5) / 0.5, rel=1e-9)
    assert "has norm 2.5, of which the forget gates give 0.5" in finding.message
    assert finding.where == "100% of the steps"


class ByHand(nn.Module):
    """h' = tanh(W h + U x), or without the tanh."""

    def __init__(self, *, bent: bool) -> None:
        super().__init__()
        self.inner, self.bent = nn.Linear(8, 5), bent

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(3, 5)
        for x_t in x:
            h = self.inner(torch.cat([x_t, h], 1))
            h = torch.tanh(h) if self.bent else h
        return h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bent", [True, False])
def test_half_precision_is_no_reason_to_call_a_loop_linear(bent: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    model, x = ByHand(bent=bent).to(dtype), torch.randn(12, 3, 3).to(dtype)
    with gradflow.record(model) as recording:
        model(x).float().pow(2).mean().backward()
    (layer,) = analyze(recording).values()
    found = "linear-recurrence" in {finding.name for finding in layer.findings}
    assert found == (not bent and dtype in (torch.float32, torch.float64))
