"""`analyze` on recorded layers: facts with closed forms, every dataset, and honest edge cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from compare import assert_jacobians_close
from torch import Tensor, nn

import gradflow
from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.analyzer import analyze, core, log_gain_map, plan, step_jacobians
from gradflow.errors import GradflowWarning, InputError, RecordingError
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")
DIMS = {
    "log_gain": ("norm", "sequence", "source", "target"),
    "log_block_gain": ("block", "sequence", "source", "target"),
    "log_cell_path": ("sequence", "source", "target"),
    "log_singular": ("sequence", "index"),
    **{f"rank_{name}": ("rank_lag",) for name in ("stable", "effective", "surviving")},
    **{
        f"lag_{name}": ("lag",)
        for name in ("median", "low", "high", "count", "zero_share", "slope", "fit")
    },
    **dict.fromkeys(("sequence_gain", "sequence_steps", "sequence_rate"), ("batch",)),
    "rate_settling": (),
    "length": ("batch",),
    **{f"lyapunov{end}": ("index_k",) for end in ("", "_low", "_high", "_settling")},
    "lyapunov_trace": ("index_k", "step"),
    "sum_rule": ("side",),
    "log10_grad": ("state", "unit", "back"),
    "unit_order": ("state", "unit"),
    "grad_norm": ("kind", "state", "step"),
    "log10_triangle": ("state", "sequence", "loss_step", "step"),
    "lag_contribution": ("parameter", "lag"),
    "truncation_error": ("parameter", "lag"),
    "cancellation": ("parameter",),
    "gradient_depth": ("parameter",),
    "truncation_window": ("parameter", "tolerance"),
    **{f"gate_{name}": ("gate", "step") for name in ("mean", "closed", "open")},
    "state_norm": ("state", "step"),
    "loss_reach": (),
    "memory_steps": ("state", "unit"),
    "gate_value": ("gate", "unit", "step"),
    **{f"gate_unit_{name}": ("gate", "unit") for name in ("closed", "open")},
    **dict.fromkeys(("time_scale", "unit_idle"), ("unit",)),
    "unit_saturated": ("state", "unit"),
    "path_gain": ("path", "step"),
    **dict.fromkeys(("step_growth", "grad_input_norm"), ("step",)),
    "rate_factor": ("factor",),
    "segment_length": ("segment",),
    **dict.fromkeys(
        [f"head_{name}{end}" for name in ("gain", "rate") for end in ("", "_low", "_high")],
        ("head",),
    ),
    **dict.fromkeys(("head_verdict", "head_erased"), ("head",)),
    "head_log_gain": ("head", "head_lag"),
    "decay": ("decay_fact",),
}


def last_step(output: Tensor) -> Tensor:
    return output[-1].sum()


def record(
    module: nn.RNNBase,
    steps: int,
    batch: int = 3,
    *,
    loss: Callable[[Tensor], Tensor] | None = last_step,
    inputs: float = 1.0,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Recording:
    """One forward and backward pass, the inputs normal times a factor."""
    x = inputs * torch.randn(steps, batch, module.input_size, dtype=module.weight_hh_l0.dtype)
    with gradflow.record(module) as recording:
        output = module(x, hx)[0]
        if loss is not None:
            loss(output).backward()
    return recording


def scalar(weight: float, cell: type[nn.RNN] = nn.RNN, **options: object) -> nn.RNN:
    """A one-unit layer without biases; at zero input tanh is linear."""
    rnn = cell(1, 1, bias=False, dtype=torch.float64, **options)
    nn.init.constant_(rnn.weight_hh_l0, weight)
    return rnn


def forgetting(bias: float, hidden: int = 4) -> nn.LSTM:
    """All weights 0 but the forget bias: cells decay by f = σ(bias) per step."""
    lstm = nn.LSTM(2, hidden, dtype=torch.float64)
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.zero_()
        lstm.bias_ih_l0[hidden : 2 * hidden] = bias
    return lstm


def only(analysis: Analysis) -> LayerAnalysis:
    (layer,) = analysis.values()
    return layer


# --------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("case", cases.CASES[::3], ids=str)
def test_step_jacobians_equal_autograd(case: cases.Case) -> None:
    recording = cases.seen(case).recording
    for name, expected in cases.oracle_jacobians(case).items():
        actual = step_jacobians(recording[name])
        mask = torch.arange(len(actual))[:, None] < recording[name].lengths
        bound = 1e-12 if case.dtype == "float64" else 1e-5  # states were recorded in that dtype
        assert_jacobians_close(actual, expected, mask, what=name, bound=bound)
        assert actual[~mask].isnan().all()


def test_scalar_linear_layer() -> None:
    layer = only(analyze(record(scalar(0.9), 100, inputs=0.0)))
    assert layer.verdict == "vanishing"
    assert layer.rate.value == pytest.approx(-0.1053605, abs=1e-7)
    assert layer.half_life == pytest.approx(6.578813, abs=1e-6)
    assert layer.horizon == 66
    assert layer.channels == 0
    assert layer.sentence == (
        "l0 vanishes: the gradient is gone in every direction after 66 of your 100 steps; it halves "
        "every 6.58 steps"
    )
    assert layer.title == ("RNN: this loss's gradient is gone 66 steps before it")
    data = layer.data
    back = np.arange(100)
    assert data["log10_grad"].values[0, 0] == pytest.approx(back * math.log10(0.9), rel=1e-9)
    assert data["lag_fit"].values == pytest.approx(data["lag_median"].values, abs=1e-9)


@pytest.mark.parametrize(
    ("weight", "slope"), [(1.5, 0.3943130), (2.0, 0.1663721), (3.0, 0.0305128)]
)
def test_tanh_at_its_fixed_point(weight: float, slope: float) -> None:
    h = 1.0
    for _ in range(500):
        h = math.tanh(weight * h)
    fixed = torch.full((1, 2, 1), h, dtype=torch.float64)
    recording = record(scalar(weight), 40, 2, inputs=0.0, hx=fixed)
    assert step_jacobians(recording["l0"])[-1, 0, 0, 0].item() == pytest.approx(slope, abs=1e-6)
    assert only(analyze(recording)).rate.value == pytest.approx(math.log(slope), abs=1e-5)


def test_critical_tanh_is_not_exponential() -> None:
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    layer = only(analyze(record(scalar(1.0), 1001, 2, inputs=0.0, hx=ones)))
    assert "not exponential" in layer.labels
    gains = layer.data["log_gain"].sel(norm="spectral", sequence=layer.data["sequence"][0])
    assert float(gains.sel(source=0, target=100)) == pytest.approx(-5.5898493, abs=1e-6)
    assert float(gains.sel(source=0, target=1000)) == pytest.approx(-9.0038035, abs=1e-6)
    halved = int((layer.data["lag_median"].values <= -math.log(2)).argmax())
    assert halved - 1 <= layer.half_life <= halved  # of the curve, not ln 2 over a rate near 0


@pytest.mark.parametrize(
    ("bias", "half_life"), [(0, 1.0), (1, 2.2127), (2, 5.4609), (3, 14.266), (5, 103.22)]
)
def test_lstm_without_recurrence_decays_by_its_forget_gate(bias: float, half_life: float) -> None:
    layer = only(analyze(record(forgetting(bias), 60)))
    assert layer.half_life == pytest.approx(half_life, rel=1e-4)
    assert layer.rate.value == pytest.approx(-math.log(2) / half_life, rel=1e-4)


def test_open_forget_gates_are_memory_not_a_fault() -> None:
    layer = only(analyze(record(forgetting(100.0), 60)))
    assert layer.verdict == "stable"
    assert layer.rate.value == pytest.approx(0.0, abs=1e-12)
    assert layer.half_life == math.inf
    assert layer.horizon is None
    assert layer.channels == 4
    assert layer.findings == ()
    assert layer.sentence == "l0 is stable: 4 of 8 directions survive 59 steps"
    assert layer.title == "LSTM: all 4 cells carry the gradient all 60 steps"


def test_chrono_initialisation() -> None:
    units = 2000
    u = 1 + 98 * (torch.arange(units, dtype=torch.float64) + 0.5) / units
    f = u / (1 + u)
    expected = {1: 0.9600814, 10: 0.7325894, 50: 0.3302039, 100: 0.1496476}
    for lag, gain in expected.items():
        assert (f**lag).mean().item() == pytest.approx(gain, abs=1e-4)
    gains = log_gain_map(torch.diag(f[::40]).expand(30, 1, -1, -1))[0, 0]
    assert gains[-1].item() == pytest.approx(29 * f[::40].max().log().item(), rel=1e-9)


def test_gru_without_recurrence_decays_by_its_update_gate() -> None:
    gru = nn.GRU(2, 3, dtype=torch.float64)
    with torch.no_grad():
        for weight in gru.parameters():
            weight.zero_()
        gru.bias_ih_l0[3:6] = 1.0
    layer = only(analyze(record(gru, 50)))
    assert layer.rate.value == pytest.approx(math.log(0.7310586), rel=1e-6)
    assert "update-gates-overwrite" in [finding.name for finding in layer.findings]


@pytest.mark.parametrize(
    ("cell", "rate"), [(nn.RNN, math.log(1 / math.sqrt(3))), (nn.LSTM, -0.4395), (nn.GRU, -0.4395)]
)
def test_default_initialisation_at_zero_input(cell: type[nn.RNNBase], rate: float) -> None:
    layer = only(analyze(record(cell(1, 256), 60, 2, inputs=0.0), stride=60))
    assert layer.rate.value == pytest.approx(rate, abs=0.06)


def test_gains_equal_one_product_per_pair() -> None:
    recording = record(nn.LSTM(2, 3, dtype=torch.float64), 12, 4)
    layer = only(analyze(recording, maps=4))
    jacobians = step_jacobians(recording["l0"])
    for b in range(4):
        for norm in ("spectral", "rms"):
            expected = log_gain_map(jacobians[:, b : b + 1], norm)[0].numpy()
            actual = layer.data["log_gain"].sel(norm=norm, sequence=b).values
            assert actual == pytest.approx(expected, abs=1e-9, nan_ok=True)


# ----------------------------------------------------------------------------------- the dataset


def layers_of_every_kind() -> dict[str, Analysis]:
    bidirectional = nn.LSTM(2, 4, num_layers=2, bidirectional=True)
    silent = pytest.warns(GradflowWarning)
    with silent:
        without = record(nn.GRU(2, 4), 6, loss=None)
    with silent:
        single = record(nn.RNN(2, 4), 1)
    packed = nn.LSTM(2, 4, proj_size=3, bidirectional=True)
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(9, 3, 2), torch.tensor([9, 4, 1]))
    with gradflow.record(packed) as recording:
        packed(x)[0].data.sum().backward()
    return {
        "bidirectional": analyze(record(bidirectional, 12, loss=lambda o: o.pow(2).mean())),
        "no gradient": analyze(without),
        "one step": analyze(single),
        "packed": analyze(recording, maps=2),
        "rnn": analyze(record(nn.RNN(2, 4), 20)),
    }


@pytest.fixture(scope="module")
def analyses() -> dict[str, Analysis]:
    return layers_of_every_kind()


def test_every_dataset_has_every_variable_with_its_dims(analyses: dict[str, Analysis]) -> None:
    for analysis in analyses.values():
        for layer in analysis.values():
            assert {name: array.dims for name, array in layer.data.items()} == DIMS
            assert all(array.dtype == np.float64 for array in layer.data.values())
            assert layer.data["norm"].values.tolist() == ["spectral", "rms", "loss"]
            assert layer.data["kind"].values.tolist() == ["total", "direct", "last"]
            assert layer.data.sizes["target"] == layer.steps


def test_saving_and_loading_gives_the_same_back(
    analyses: dict[str, Analysis], tmp_path: Path
) -> None:
    for number, analysis in enumerate(analyses.values()):
        loaded = gradflow.load(analysis.save(tmp_path / f"{number}.nc"))
        assert loaded.provenance == analysis.provenance
        assert loaded.warnings == analysis.warnings
        for layer, same in zip(analysis.values(), loaded.values(), strict=True):
            assert layer.data.identical(same.data)
            for field in dataclasses.fields(layer):
                if field.name != "data":
                    assert repr(getattr(layer, field.name)) == repr(getattr(same, field.name))


def test_a_saved_map_is_packed(analyses: dict[str, Analysis], tmp_path: Path) -> None:
    layer = analyses["bidirectional"]["l0"]
    map_of_half = np.full((3, 1, 200, 200), np.nan)
    map_of_half[..., np.triu_indices(200)[0], np.triu_indices(200)[1]] = math.log(0.5)
    dims = ("norm", "sequence", "source", "target")
    data = layer.data.drop_dims(dims[2:]).assign(log_gain=(dims, map_of_half))
    analysis = dataclasses.replace(
        analyses["bidirectional"], layers={"l0": dataclasses.replace(layer, data=data)}
    )
    file = analysis.save(tmp_path / "run.nc")
    assert file.stat().st_size < map_of_half.nbytes / 2
    assert gradflow.load(file)["l0"].data.identical(data)


def test_frames_can_be_made_of_all(analyses: dict[str, Analysis]) -> None:
    for analysis in analyses.values():
        for kind in gradflow.analysis.FRAMES:
            analysis.frame(kind)
        assert repr(analysis)


def test_padding_is_never_counted(analyses: dict[str, Analysis]) -> None:
    layer = analyses["packed"]["l0"]
    assert layer.data["length"].values.tolist() == [9, 4, 1]
    assert layer.span == 4
    gains = layer.data["log_gain"].sel(norm="spectral")
    for sequence in layer.data["sequence"].values:
        length = int(layer.data["length"].values[sequence])
        assert gains.sel(sequence=sequence).values[:length, :length].size > 0
        assert np.isnan(gains.sel(sequence=sequence).values[:, length:]).all()
    assert np.isfinite(layer.data["state_norm"].values).all()
    assert np.isfinite(layer.data["gate_mean"].values).all()


def test_the_profile_of_a_reverse_layer_starts_at_its_last_processed_step() -> None:
    lstm = nn.LSTM(2, 4, bidirectional=True, dtype=torch.float64)
    recording = record(lstm, 15, loss=lambda output: output[3].sum())
    layer = analyze(recording)["l0_reverse"]
    last = recording["l0_reverse"].grad_h_last
    assert last is not None
    level = last[3].square().mean().sqrt()
    expected = (last[3:].square().mean(1).sqrt() / level).log10().T
    profile = layer.data["log10_grad"].sel(state="h").values
    assert profile[:, :12] == pytest.approx(expected.numpy(), abs=1e-9)
    assert np.isnan(profile[:, 12:]).all()


def test_units_are_ordered_by_memory() -> None:
    lstm = forgetting(0.0)
    with torch.no_grad():
        lstm.bias_ih_l0[4:8] = torch.tensor([0.0, 100.0, 2.0, 1.0])
    layer = only(analyze(record(lstm, 60)))
    assert layer.data["unit_order"].sel(state="c").values.tolist() == [1, 2, 3, 0]
    memory = layer.data["memory_steps"].sel(state="c").values
    assert memory[1] == math.inf
    assert memory[0] < memory[3] < memory[2] < 60
    assert layer.title == "LSTM: one cell of 4 carries the gradient all 60 steps"


def test_gradients_far_below_float32_are_no_zeros() -> None:
    recording = record(scalar(0.05).double(), 200, inputs=0.0)
    layer = only(analyze(recording))
    profile = layer.data["log10_grad"].values[0, 0]
    assert profile == pytest.approx(np.arange(200) * math.log10(0.05), rel=1e-9)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    recording = record(nn.LSTM(2, 5), 30)
    first, second = (analyze(recording).save(tmp_path / f"{i}.nc").read_bytes() for i in (1, 2))
    assert first == second


# ------------------------------------------------------------------------------ verdicts, edges


def test_exploding() -> None:
    rnn = nn.RNN(2, 16)
    nn.init.orthogonal_(rnn.weight_hh_l0, gain=3.0)
    layer = only(analyze(record(rnn, 80, 8, inputs=0.1)))
    assert layer.verdict == "exploding"
    assert "the gradient grows by" in layer.sentence  # chaos of 80 steps has no rate yet
    assert "not settled" in layer.labels
    assert layer.title.startswith("RNN: the gradient grows by ")
    (finding,) = [f for f in layer.findings if f.name == "exploding"]
    assert finding.low is not None
    assert finding.threshold is not None
    assert finding.low > finding.threshold
    assert "clip_grad_norm_" in finding.code


def test_dead_relu() -> None:
    rnn = nn.RNN(2, 6, nonlinearity="relu")
    with torch.no_grad():
        rnn.bias_hh_l0 -= 50
    layer = only(analyze(record(rnn, 20)))
    assert (layer.verdict, layer.rate.value, layer.channels) == ("dead", -math.inf, 0)
    assert layer.lyapunov is not None
    assert np.isneginf(layer.lyapunov).all()
    assert layer.findings[0].name == "dead"
    assert "6 of 6 ReLU units are 0 at every step" in layer.findings[0].message
    assert layer.title == "RNN: exact zeros cut every path within 1 step"
    silent = only(analyze(record(rnn, 20, loss=lambda output: output.square().sum())))
    assert silent.gradient_note == "the gradient that reached this layer is zero everywhere"


def test_one_step(analyses: dict[str, Analysis]) -> None:
    layer = only(analyses["one step"])
    assert (layer.verdict, layer.channels, layer.lyapunov) == ("inconclusive", None, None)
    assert "no recurrence" in layer.labels
    assert math.isnan(layer.rate.value)
    assert layer.sentence.startswith("l0 ran for one step only")
    assert [finding.name for finding in layer.findings] == ["no-recurrence"]


def test_no_backward(analyses: dict[str, Analysis]) -> None:
    layer = only(analyses["no gradient"])
    assert "no backward ran" in layer.gradient_note
    assert np.isnan(layer.data["log10_grad"].values).all()
    assert np.isfinite(layer.data["lag_median"].values).all()
    assert np.isfinite(layer.rate.value)
    assert layer.data["unit_order"].values.tolist() == [[0, 1, 2, 3]]


def test_nan_in_the_states_is_placed() -> None:
    rnn = nn.RNN(1, 3)
    x = torch.randn(12, 2, 1)
    x[6, 1] = torch.nan
    with pytest.warns(GradflowWarning), gradflow.record(rnn) as recording:
        rnn(x)[0].sum().backward()
    layer = only(analyze(recording))
    assert (layer.verdict, "not finite" in layer.labels) == ("inconclusive", True)
    assert math.isnan(layer.rate.value)
    assert layer.findings[0].where == "step 7, sequence 2, unit 1"
    assert layer.title == "RNN: NaN or Inf, so no rate can be given"
    assert layer.gradient_note == (
        "the states are NaN from step 7, sequence 2, unit 1 on, and so is the gradient"
    )
    assert np.isfinite(layer.data["sequence_rate"].values).tolist() == [True, False]


def test_one_sequence_says_what_would_decide() -> None:
    layer = only(analyze(record(nn.RNN(2, 8), 30, 1)))
    assert layer.verdict == "inconclusive"
    assert "one sequence" in layer.labels
    assert "a second sequence (better ten) would decide" in layer.sentence
    assert math.isfinite(layer.rate.value)


def test_identical_sequences_make_a_point() -> None:
    rnn = nn.RNN(2, 8, dtype=torch.float64)
    x = torch.randn(50, 1, 2, dtype=torch.float64).expand(-1, 4, -1)
    with gradflow.record(rnn) as recording:
        rnn(x)[0][-1].sum().backward()
    layer = only(analyze(recording))
    assert layer.gain.high - layer.gain.low < 1e-9
    assert layer.rate.low < layer.rate.value < layer.rate.high, "they are one sequence"
    assert layer.verdict == "vanishing"


def test_a_healthy_layer_has_no_findings() -> None:
    rnn = nn.RNN(2, 8)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    nn.init.zeros_(rnn.bias_ih_l0)
    nn.init.zeros_(rnn.bias_hh_l0)
    layer = only(analyze(record(rnn, 40, 8, inputs=1e-3)))
    assert layer.verdict == "stable"
    assert layer.findings == ()
    assert layer.sentence == (
        f"l0 is stable: a window of {layer.window} steps keeps ∂L/∂W_hh within 5 %, and all 8 directions "
        "survive 39 steps"
    )


def test_vanishing_lstm_names_its_forget_gates() -> None:
    recording = record(nn.LSTM(2, 8), 100, 8)
    layer = only(analyze(recording))
    names = [finding.name for finding in layer.findings]
    assert names == ["vanishing", "forget-gates-leak"]
    vanishing, forget = layer.findings
    assert vanishing.code == forget.code  # a bias raised by 1 was tried, and is not enough
    assert vanishing.severity == pytest.approx(layer.rate.value * 100 / math.log(10))
    assert forget.value == pytest.approx(-1 / recording["l0"].gates["f"].log().mean().item(), 1e-5)
    model = nn.LSTM(2, 8)
    for finding in layer.findings:
        exec(finding.code, {"model": model, "torch": torch})  # noqa: S102 — must run as printed
    assert model.bias_ih_l0.data[8:16].min() >= 0
    assert torch.equal(model.bias_ih_l0.data[:8], -model.bias_ih_l0.data[8:16])


def test_a_long_path_is_said_once_and_the_code_still_runs() -> None:
    model = nn.ModuleDict({"encoder_of_context": nn.ModuleDict({"backbone": nn.LSTM(2, 8)})})
    rnn = model["encoder_of_context"]["backbone"]
    with gradflow.record(model) as recording:
        rnn(torch.randn(100, 8, 2))[0][-1].sum().backward()
    code = only(analyze(recording)).findings[1].code
    assert code.startswith("layer = model.encoder_of_context.backbone\n")
    assert code.count("backbone") == 1
    exec(code, {"model": model, "torch": torch})  # noqa: S102 — must run as printed
    assert rnn.bias_ih_l0.data[8:16].min() >= 0 and bool((rnn.bias_hh_l0.data[:16] == 0).all())


@pytest.mark.parametrize(
    ("steps", "said"),
    [(400, "over 33 steps before it fades"), (30, "has not faded after the 29 steps measured")],
    ids=["comes down", "still up"],
)
def test_transient_growth_says_whether_it_fades(steps: int, said: str) -> None:
    rnn = nn.RNN(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():  # ‖W^k‖ is all but 5k · 0.97^(k−1), 62 at its highest, k = 33
        rnn.weight_hh_l0.copy_(torch.tensor([[0.97, 5.0], [0.0, 0.97]]))
    layer = only(analyze(record(rnn, steps, batch=1, inputs=0.0)))
    (finding,) = (f for f in layer.findings if f.name == "transient-growth")
    assert finding.message.startswith("the gain rises by 1.79 decades")
    assert said in finding.message


def test_gains_out_of_the_models_own_range_are_said() -> None:
    layer_range = analyze(record(nn.RNN(2, 8), 300, 3))
    assert "range-limited" in only(layer_range).labels
    assert any("leave the range of float32" in note for note in layer_range.warnings)


def test_short_and_every_step_losses_are_said() -> None:
    analysis = analyze(record(nn.RNN(2, 4), 6, loss=lambda o: o.sum()))
    assert "short" in only(analysis).labels
    assert any("without a burn-in" in note for note in analysis.warnings)
    assert any("from many steps at once" in note for note in analysis.warnings)
    quiet = analyze(record(nn.RNN(2, 4), 20))
    assert quiet.warnings == ()


class _Stacked(nn.Module):
    """A layer of its own on top of another."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.GRU(2, 4), nn.GRU(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upper(self.lower(x)[0])[0]


@pytest.mark.parametrize("every", [False, True], ids=["last step", "every step"])
def test_a_lower_layer_gets_gradients_at_every_step_from_the_one_above(every: bool) -> None:
    """Which is not the loss, where that reads the last step only."""
    model = _Stacked()
    with gradflow.record(model) as recording:
        output = model(torch.randn(20, 3, 2))
        (output if every else output[-1]).sum().backward()
    said = [note for note in analyze(recording).warnings if "at once" in note]
    if every:
        assert len(said) == 1
        assert said[0].startswith("the loss reaches both layers from many steps at once")
    else:
        assert len(said) == 1
        assert said[0].startswith(
            "gradients come to lower.l0 at many steps at once, from the loss or"
        )


def test_what_holds_for_many_layers_is_said_once() -> None:
    model = nn.RNN(2, 4, num_layers=4)
    with gradflow.record(model) as recording:
        model(torch.randn(400, 3, 2))[0].sum().backward()
    said = analyze(recording).warnings
    assert sum("from many steps at once" in note for note in said) == 1
    assert any(note.startswith("the loss reaches all 4 layers from") for note in said)
    assert any(note.startswith("gains of all 4 layers leave the range") for note in said)


def test_a_report_without_a_backward_says_so() -> None:
    model = nn.LSTM(2, 4, num_layers=2)
    with pytest.warns(GradflowWarning), gradflow.record(model) as recording:
        model(torch.randn(20, 3, 2))
    (said,) = analyze(recording).warnings
    assert said.startswith(
        "no gradient of the loss at both layers: no backward ran inside the block"
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.LSTM(2, 4, num_layers=2, dropout=0.5), True),
        (nn.Sequential(nn.Dropout(0.1), nn.LSTM(2, 4)), True),
        (nn.ModuleDict({"rnn": nn.LSTM(2, 4), "norm": nn.PairwiseDistance(p=2.0)}), False),
        (nn.LSTM(2, 4), False),
    ],
    ids=["between layers", "module", "p that is no rate", "none"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_dropout_that_was_off_is_said(model: nn.Module, said: bool, training: bool) -> None:
    model.train(training)
    rnn = next(module for module in model.modules() if isinstance(module, nn.LSTM))
    with gradflow.record(model) as recording:
        rnn(torch.randn(20, 3, 2))[0][-1].sum().backward()
    notes = [note for note in analyze(recording).warnings if "evaluation mode" in note]
    assert bool(notes) == (said and not training)


def test_provenance_keeps_the_models_dtype() -> None:
    provenance = analyze(record(nn.RNN(2, 4), 20)).provenance
    assert provenance["dtype"] == ["float32"] and "float64" in provenance["computed_in"]


def test_several_layers_are_named_in_their_titles() -> None:
    analysis = analyze(record(nn.LSTM(2, 8, num_layers=2), 60))
    for name in ("l0", "l1"):
        assert analysis[name].title.startswith(f"{name} (LSTM): this loss's gradient is gone ")


# --------------------------------------------------------------------------------- the arguments


def test_rates_use_all_sequences_and_the_median_one_is_mapped_first() -> None:
    recording = record(nn.GRU(2, 5), 40, 7)
    layer = only(analyze(recording, maps=3))
    gains = layer.data["sequence_gain"].values
    assert gains[layer.data["sequence"].values[0]] == np.median(gains)
    assert layer.data.sizes["sequence"] == 3
    chosen = only(analyze(recording, sequences=[2], span=17))
    assert chosen.data["sequence"].values.tolist() == [2]
    assert chosen.rate.value == pytest.approx(layer.rate.value, rel=1e-12)
    assert chosen.span == 17


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_method_and_stride_are_kept_and_said(method: str) -> None:
    recording = record(nn.LSTM(2, 8), 30)
    layer = only(analyze(recording, method=method, stride=4))
    assert layer.method.startswith("exact, every 4th step a source")
    assert layer.data["source"].values.tolist() == list(range(0, 30, 4))
    exact = only(analyze(recording, method="exact"))
    assert exact.method == "exact, every step a source"
    expected = exact.data["log_gain"].values[:, :, ::4]
    assert layer.data["log_gain"].values == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_auto_takes_fewer_sources_and_says_what_all_would_have_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording = record(nn.RNN(1, 40), 60, 2)
    assert only(analyze(recording)).method == "exact, every step a source"
    monkeypatch.setattr(core, "MAP_SECONDS", 0.05)
    layer = only(analyze(recording))
    assert layer.method.startswith("exact, every 4th step a source")
    assert "the exact map of every step would take about 1 s" in layer.method
    assert layer.data["source"].values.tolist() == list(range(0, 60, 4))


def test_auto_takes_float32_for_wide_states_where_float64_is_too_dear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "ROUGH_WIDE", 60)
    recording = record(nn.LSTM(1, 34), 40, 2)
    exact = only(analyze(recording))
    assert "float32" not in exact.method
    monkeypatch.setattr(core, "MAP_SECONDS", 0.05)
    layer = only(analyze(recording))
    assert ", products in float32: the exact map of every step would take about" in layer.method
    assert "float32" not in only(analyze(recording, method="exact")).method
    stride = int(layer.data["source"][1])
    expected = exact.data["log_gain"].values[:, :, ::stride]
    assert layer.data["log_gain"].values == pytest.approx(expected, abs=2e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"span": 0}, "span must be a whole number of at least 1, got 0; leave it out"),
        ({"maps": 0}, "maps must be a whole number of at least 1, got 0"),
        ({"stride": 1.5}, "stride must be a whole number of at least 1, got 1.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"method": "fast"}, "method must be auto or exact, got 'fast'"),
        ({"sequences": []}, "sequences must be at least one index, got none"),
        ({"sequences": [9]}, "every index in sequences must be below 3, the number of sequences"),
        ({"sequences": ["a"]}, "every index in sequences must be a whole number"),
        ({"sequences": 2}, "sequences must be a list of indices, got 2"),
    ],
    ids=str,
)
def test_wrong_arguments_get_a_sentence(arguments: dict[str, object], message: str) -> None:
    recording = record(nn.RNN(2, 3), 5)
    with pytest.raises(InputError, match=message):
        analyze(recording, **arguments)


def test_nothing_recorded_and_no_recording() -> None:
    with pytest.raises(RecordingError, match="nothing ran"):
        analyze(Recording("Net"))
    with pytest.raises(InputError, match="recording must be a Recording, got RNN; give what"):
        analyze(nn.RNN(2, 3))


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    analyze(record(nn.RNN(2, 3), 12), progress=lambda phase, share: told.append((phase, share)))
    assert told[-1] == ("l0", 1.0)
    assert all(0 <= share <= 1 for _, share in told)


# --------------------------------------------------------------------------------- cuts and words


def cut_at(recording: Recording, step: int) -> Recording:
    """The same recording, its only track cut off from its past at one input step."""
    (track,) = recording.values()
    cuts = track.cuts.clone()
    cuts[step] = True
    recording.add(dataclasses.replace(track, cuts=cuts))
    return recording


@pytest.mark.parametrize("name", ["l0", "l0_reverse"])
def test_nothing_crosses_a_cut(name: str) -> None:
    module = nn.GRU(2, 4, bidirectional=name.endswith("reverse"))
    recording = record(module, 30, loss=lambda output: output.square().sum())
    track = recording[name]
    recording._tracks = {name: track}
    whole = only(analyze(recording))
    step = 19 if track.reverse else 10  # processed eleventh, either way
    layer = only(analyze(cut_at(recording, step)))
    gains = layer.data["log_gain"].values
    assert np.isnan(gains[:, :, :10, 10:]).all()
    assert np.isfinite(gains[:, :, :10, :10][..., np.triu(np.ones((10, 10), bool))]).all()
    assert layer.searched == 19
    assert layer.rate.value == pytest.approx(whole.rate.value, abs=0.1)
    profile = layer.data["log10_grad"].values[0]
    assert np.isfinite(profile[:, :20]).all()
    assert np.isnan(profile[:, 20:]).all()
    (finding,) = [finding for finding in layer.findings if finding.name == "cut"]
    assert finding.where == f"step {step + 1}"


def test_one_direction_survives() -> None:
    lstm = forgetting(-3.0)
    with torch.no_grad():
        lstm.bias_ih_l0[4] = 100.0
    layer = only(analyze(record(lstm, 60)))
    assert layer.sentence == "l0 is stable: 1 of 8 directions survives 59 steps"


def test_an_inconclusive_rate_says_what_would_decide() -> None:
    rnn = nn.RNN(2, 16)
    nn.init.orthogonal_(rnn.weight_hh_l0, gain=1.7)  # at the edge of chaos sequences differ
    recording = record(rnn, 40, 3, inputs=0.1)
    found = (only(analyze(recording, span=span)) for span in range(6, 40))
    layer = next(layer for layer in found if layer.verdict == "inconclusive")
    assert f"the largest gain over {layer.span} steps" in layer.sentence
    assert "], straddles the edge of one decade; about " in layer.sentence
    assert "would decide" in layer.sentence


def test_a_chaotic_network_is_called_so_and_growth_alone_is_not() -> None:
    torch.manual_seed(1)
    chaotic = nn.RNN(1, 64)
    with torch.no_grad():  # Sompolinsky, Crisanti & Sommers 1988: above a gain of 1
        chaotic.weight_hh_l0.normal_(0, 3 / 64**0.5)
    layer = only(analyze(record(chaotic, 300, 4, inputs=0.01)))
    assert layer.verdict == "exploding" and "chaotic" in layer.labels
    assert f"grow apart e-fold every {1 / layer.rate.value:.3g} steps" in layer.sentence
    linear = nn.RNN(1, 64, nonlinearity="relu")
    with torch.no_grad():
        for weight in linear.parameters():
            weight.fill_(0.02)
    layer = only(analyze(record(linear, 300, 4)))
    assert layer.verdict == "exploding" and "chaotic" not in layer.labels
    assert "chaotic" not in layer.sentence


def test_a_transient_is_not_called_chaotic_but_open() -> None:
    """Of 100 steps the rate seems above 0 beyond doubt; over 4,000 it is −0.0005: a cycle is found late."""
    torch.manual_seed(0)
    rnn = nn.RNN(2, 32, bias=False).double()
    nn.init.normal_(rnn.weight_hh_l0, std=1.6 / 32**0.5)
    torch.manual_seed(1000)
    with gradflow.record(rnn) as recording:
        rnn(0.1 * torch.randn(100, 6, 2).double())[0][-1].sum().backward()
    layer = only(analyze(recording, stride=100))
    assert layer.verdict == "exploding" and layer.rate.low > 0
    assert "not settled" in layer.labels and "chaotic" not in layer.labels
    assert "though it is above 0 in these" in layer.sentence
    assert layer.sentence.endswith("whether it is chaotic is open, and more steps would tell")


def test_without_a_gradient_the_title_is_about_the_gain(analyses: dict[str, Analysis]) -> None:
    title = only(analyses["no gradient"]).title
    assert title.startswith("GRU: ")
    assert "loss" not in title
