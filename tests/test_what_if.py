"""Remedies tried on the recorded batch, held against models whose weights really were changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import loops
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from cases import Case, build, call, loss_of
from compare import assert_steps_close
from seam import WeightChange, rerun
from torch import Tensor, nn

import gradflow
from gradflow.analysis import LayerAnalysis, saved
from gradflow.errors import GradflowWarning, InputError
from gradflow.recording import Recording
from gradflow.workflow import FileRequest, analyze_file

pytestmark = pytest.mark.usefixtures("one_thread")

HALF_LIVES = {0.0: 1.0, 1.0: 2.2127, 2.0: 5.4609, 3.0: 14.266, 5.0: 103.22}  # σ(b)^k


def recorded(case: Case, change: Callable[[nn.Module], None] | None = None) -> Recording:
    """One training step of a case, of the module as it is or really changed."""
    setup = build(case)
    if change is not None:
        with torch.no_grad():
            change(setup.module)
    torch.manual_seed(5)
    with gradflow.record(setup.module) as recording:
        loss_of(setup, call(setup)[0]).backward()
    return recording


def more_bias(amount: float) -> Callable[[nn.Module], None]:
    """Raise the second gate's bias of every layer: f of an LSTM, z of a GRU."""

    def change(module: nn.Module) -> None:
        for name, weight in module.named_parameters():
            if name.startswith("bias_ih"):
                gates = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}[type(module)]
                hidden = len(weight) // gates
                weight[hidden : 2 * hidden] += amount

    return change


def scaled(factor: float) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for name, weight in module.named_parameters():
            if name.startswith("weight_hh"):
                weight *= factor

    return change


def assert_same(frame: pd.DataFrame, really: Recording) -> None:
    """The numbers after a remedy are those of the model that was really changed."""
    analysis = gradflow.analyze(really)
    assert list(frame["layer"]) == list(analysis.layers)
    for row, layer in zip(frame.itertuples(), analysis.values(), strict=True):
        assert row.note == "" or "as it was recorded" in row.note
        for mine, theirs in (
            (row.rate_after, layer.rate.value),
            (row.rate_low_after, layer.rate.low),
            (row.rate_high_after, layer.rate.high),
        ):
            assert mine == theirs or abs(mine - theirs) <= 1e-12 * abs(theirs)
        assert row.half_life_after == pytest.approx(layer.half_life, rel=1e-10)
        assert (row.verdict_after, row.channels_after) == (layer.verdict, layer.channels)
        assert (None if pd.isna(row.horizon_after) else row.horizon_after) == layer.horizon


LONG = {"steps": 30, "batch": 4, "loss": "last"}
FUSED = [
    Case("LSTM", **LONG),
    Case("LSTM", layers=2, dropout=0.4, **LONG),
    Case("LSTM", layers=2, bidirectional=True, initial=True, layout="batch_first", **LONG),
    Case("LSTM", layers=2, bidirectional=True, packed="unsorted", dropout=0.3, **LONG),
    Case("LSTM", layers=2, proj=2, **LONG),
    Case("GRU", layers=2, dropout=0.4, **LONG),
    Case("GRU", bidirectional=True, packed="sorted", **LONG),
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_forget_bias_is_that_of_a_model_whose_bias_was_raised(case: Case) -> None:
    frame = gradflow.what_if(recorded(case), forget_bias=1.3)
    assert_same(frame, recorded(case, more_bias(1.3)))


def spread_biases(longest: int) -> Callable[[nn.RNNBase], None]:
    """Chrono initialisation with evenly spread time scales, written down a second time."""

    def change(module: nn.RNNBase) -> None:
        hidden = module.hidden_size
        steps = [1 + k * (longest - 2) / (hidden - 1) for k in range(hidden)]
        drawn = torch.tensor(steps, dtype=torch.float64)
        for name, bias in module.named_parameters():
            if name.startswith("bias_hh"):
                bias[: 2 * hidden] = 0.0
            elif name.startswith("bias_ih"):
                bias[hidden : 2 * hidden] = drawn.log()
                if isinstance(module, nn.LSTM):
                    bias[:hidden] = -drawn.log()

    return change


@pytest.mark.parametrize("case", [FUSED[1], FUSED[5]], ids=str)
def test_chrono_is_that_of_a_model_whose_biases_were_set(case: Case) -> None:
    assert_same(gradflow.what_if(recorded(case), chrono=9), recorded(case, spread_biases(9)))


@pytest.mark.parametrize("cell", ["RNN_TANH", "RNN_RELU", "LSTM", "GRU"])
def test_scale_hh_is_that_of_a_model_whose_weights_were_scaled(cell: str) -> None:
    case = Case(cell, layers=2, bidirectional=True, dropout=0.2, **LONG)
    assert_same(gradflow.what_if(recorded(case), scale_hh=1.4), recorded(case, scaled(1.4)))


def orthogonal(gain: float) -> Callable[[nn.RNNBase], None]:
    """The same start, written down a second time."""

    def change(module: nn.RNNBase) -> None:
        for name, weight in module.named_parameters():
            if name.startswith("weight_hh"):
                generator = torch.Generator().manual_seed(0)
                for block in weight.split(module.hidden_size):
                    start = torch.empty(block.shape, dtype=torch.float64)
                    block.copy_(nn.init.orthogonal_(start, gain, generator))
                    near = block.T @ block - gain**2 * torch.eye(block.shape[1], dtype=block.dtype)
                    assert near.abs().max() < 1e-12

    return change


@pytest.mark.parametrize("cell", ["RNN_TANH", "LSTM", "GRU"])
def test_orthogonal_is_that_of_a_model_that_starts_so(cell: str) -> None:
    case = Case(cell, layers=2, bidirectional=True, dropout=0.2, **LONG)
    frame = gradflow.what_if(recorded(case), orthogonal=1.1)
    assert_same(frame, recorded(case, orthogonal(1.1)))


@pytest.mark.parametrize("case", FUSED[:3], ids=str)
def test_every_state_and_gate_is_that_of_the_changed_model(case: Case) -> None:
    recording = recorded(case)
    again = rerun(recording, {name: WeightChange(forget_bias=-0.7) for name in recording.tracks})
    really = recorded(case, more_bias(-0.7))
    for track in again.recording.values():
        other = really[track.name]
        for name, state in other.states.items():
            assert_steps_close(track.states[name], state, track.mask, what=name, bound=1e-13)
        for name, gate in other.gates.items():
            assert_steps_close(track.gates[name], gate, track.mask, what=name, bound=1e-13)
        assert all(torch.equal(track.weights[n], other.weights[n]) for n in other.weights)
        assert not track.has_gradient
        assert "the loss was not run again" in track.why_no_gradient
        assert track.parity.status == "not applicable"


def test_the_comparison_can_fail() -> None:
    case = FUSED[0]
    frame = gradflow.what_if(recorded(case), forget_bias=1.3)
    with pytest.raises(AssertionError):
        assert_same(frame, recorded(case, more_bias(1.3 + 1e-6)))


def test_a_layer_without_biases_gets_one() -> None:
    case = Case("LSTM", bias=False, layers=2, proj=2, **LONG)
    setup = build(case)
    with_bias = replace(setup, module=build(replace(case, bias=True)).module)
    with torch.no_grad():
        for name, weight in with_bias.module.named_parameters():
            if name.startswith("bias"):
                weight.zero_()
            else:
                weight.copy_(getattr(setup.module, name))
        more_bias(2.0)(with_bias.module)
    with gradflow.record(with_bias.module) as really:
        loss_of(with_bias, call(with_bias)[0]).backward()
    assert_same(gradflow.what_if(recorded(case), forget_bias=2.0), really)


# --------------------------------------------------------------------------------------- loops


def masked(t: int, state: loops.State, before: loops.State) -> loops.State:
    mask = torch.tensor([[1.0], [1.0], [float(t != 9)], [0.5]], dtype=torch.float64)
    return tuple(part * mask for part in state)


def detached(t: int, state: loops.State, before: loops.State) -> loops.State:
    return tuple(part.detach() for part in state) if t % 12 == 0 else state


def reset(t: int, state: loops.State, before: loops.State) -> loops.State:
    fresh = torch.tensor([[t % 10 == 0], [False], [t == 13], [False]])
    return tuple(torch.where(fresh, torch.full_like(part, 0.3), part) for part in state)


def zoneout(t: int, state: loops.State, before: loops.State) -> loops.State:
    generator = torch.Generator().manual_seed(t)
    keep = torch.rand(state[0].shape, generator=generator) < 0.3
    return tuple(torch.where(keep, old, new) for new, old in zip(state, before, strict=True))


def mixed(t: int, state: loops.State, before: loops.State) -> loops.State:
    turn = torch.linalg.qr(torch.arange(16.0, dtype=torch.float64).view(4, 4).sin() + torch.eye(4))
    return tuple(part @ turn.Q for part in state)


def looped(
    kind: str, between: loops.Between | None, change: Callable[[nn.Module], None] | None = None
) -> Recording:
    torch.manual_seed(3)
    cell, x = loops.cell_of(kind), torch.randn(30, 4, loops.INPUTS, dtype=torch.float64)
    if change is not None:
        with torch.no_grad():
            change(cell)
    with gradflow.record(cell) as recording:
        loops.loss_of(loops.run(cell, x, between)).backward()
    return recording


BETWEEN = [None, masked, detached, reset, zoneout, mixed]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda b: getattr(b, "__name__", "nothing"))
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_loop_over_a_cell_goes_on_through_its_links(
    kind: str, between: loops.Between | None
) -> None:
    frame = gradflow.what_if(looped(kind, between), forget_bias=1.0)
    assert frame["note"].item() == "every call of the loop reads its input as it was recorded"
    assert_same(frame, looped(kind, between, more_bias(1.0)))


def test_a_carried_stack_goes_on_from_call_to_call() -> None:
    def run(change: Callable[[nn.Module], None] | None = None) -> Recording:
        torch.manual_seed(1)
        model, x = nn.LSTM(3, 4, 2, dropout=0.3).double(), torch.randn(40, 3, 3).double()
        if change is not None:
            with torch.no_grad():
                change(model)
        state = None
        with gradflow.record(model) as recording:
            for number, part in enumerate(x.split(10)):
                if number == 2:
                    state = tuple(s.detach() for s in state)
                out, state = model(part, state)
            out.sum().backward()
        return recording

    assert_same(gradflow.what_if(run(), forget_bias=0.5), run(more_bias(0.5)))


def test_a_state_that_goes_through_a_curve_cannot_be_foretold() -> None:
    def curved(t: int, state: loops.State, before: loops.State) -> loops.State:
        return tuple(part.tanh() for part in state)

    row = gradflow.what_if(looped("LSTM", curved), forget_bias=1.0).iloc[0]
    assert row.note.startswith("not tried: between two of its calls the state is not only")
    assert math.isnan(row.rate_after) and not math.isnan(row.rate_before)


# ------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("bias", [1.0, 2.0, 3.0, 5.0])
def test_a_leaky_integrator_halves_as_its_forget_gate_says(bias: float) -> None:
    lstm = nn.LSTM(2, 3).double()
    for weight in lstm.parameters():
        nn.init.zeros_(weight)
    with gradflow.record(lstm) as recording:
        lstm(torch.randn(60, 2, 2).double())[0][-1].sum().backward()
    row = gradflow.what_if(recording, forget_bias=bias).iloc[0]
    f = 1 / (1 + math.exp(-bias))
    assert row.half_life_before == pytest.approx(HALF_LIVES[0.0], rel=1e-12)
    assert row.half_life_after == pytest.approx(HALF_LIVES[bias], rel=1e-4)
    assert row.rate_after == pytest.approx(math.log(f), rel=1e-12)
    # 60 states have 59 steps between them; h adds what its own output gate leaks
    assert row.helps == pytest.approx((math.log(2) + math.log(f)) * 59 / math.log(10), rel=1e-2)
    assert row.helps == pytest.approx(
        (abs(row.gain_before) - abs(row.gain_after)) / math.log(10), rel=1e-12
    )


def test_a_gru_keeps_more_with_a_larger_update_bias() -> None:
    gru = nn.GRU(2, 3).double()
    for weight in gru.parameters():
        nn.init.zeros_(weight)
    with gradflow.record(gru) as recording:
        gru(torch.randn(40, 2, 2).double())[0][-1].sum().backward()
    row = gradflow.what_if(recording, forget_bias=1.0).iloc[0]
    assert row.rate_after == pytest.approx(math.log(0.7310585786300049), rel=1e-12)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.5, "vanishing"), (10 / 9, "stable"), (2, "exploding")]
)
def test_a_linear_recurrence_is_scaled_by_the_factor(factor: float, verdict: str) -> None:
    rnn = nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
    nn.init.constant_(rnn.weight_hh_l0, 0.9)
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    with gradflow.record(rnn) as recording:
        rnn(torch.rand(100, 2, 1).double())[0][-1].sum().backward()
    row = gradflow.what_if(recording, scale_hh=factor).iloc[0]
    assert row.rate_before == pytest.approx(math.log(0.9), rel=1e-12)
    assert row.rate_after == pytest.approx(math.log(0.9 * factor), rel=1e-12, abs=1e-15)
    assert row.verdict_after == verdict


# ------------------------------------------------------------------ truncation and clipping


def test_truncation_keeps_what_is_nearer_than_the_window() -> None:
    recording = recorded(Case("RNN_TANH", scale=0.9, **LONG))
    horizon = int(gradflow.analyze(recording)["l0"].horizon)
    short = gradflow.what_if(recording, truncate=2).iloc[0]
    assert (short.horizon_before, short.horizon_after) == (horizon, 2)
    assert short.rate_after == short.rate_before
    assert (short.channels_after, short.helps) == (0, 0.0)
    assert short.half_life_after == min(short.half_life_before, 2.0)
    long = gradflow.what_if(recording, truncate=horizon + 1).iloc[0]
    assert long.horizon_after == horizon


def test_truncation_cuts_off_growth() -> None:
    rnn = nn.RNN(1, 1, nonlinearity="relu")
    for weight in rnn.parameters():
        nn.init.constant_(weight, 1.5)
    with gradflow.record(rnn) as recording:
        rnn(torch.ones(30, 2, 1))[0][-1].sum().backward()
    row = gradflow.what_if(recording, truncate=5).iloc[0]
    assert (row.verdict_before, row.verdict_after) == ("exploding", "stable")
    assert row.gain_after == pytest.approx(math.log(1.5) * 4)  # all that the window lets through
    with gradflow.record(rnn) as really:
        state = None
        for x in torch.ones(30, 2, 1).split(5):
            output, state = rnn(x, None if state is None else state.detach())
        output[-1].sum().backward()
    (layer,) = gradflow.analyze(really).values()
    assert (layer.verdict, layer.gain.value) == (row.verdict_after, pytest.approx(row.gain_after))
    one = gradflow.what_if(recording, truncate=1).iloc[0]
    assert (one.verdict_after, one.gain_after) == ("dead", -math.inf)
    assert row.helps == pytest.approx(math.log10(1.5) * 24)  # of 29 steps, 5 are kept
    assert (row.horizon_after, row.half_life_after) == (5, 5.0)


def test_the_error_of_truncation_is_that_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded(Case("GRU", **LONG))
    errors = np.linspace(0.9, 0.0, 30)
    measure = gradflow.analyze

    def with_errors(*arguments: object, **settings: object) -> gradflow.Analysis:
        run = measure(*arguments, **settings)  # type: ignore[arg-type]
        names = ["weight_hh", "weight_ih"]
        known = xr.DataArray(
            np.stack([errors, errors * 0]), dims=("parameter", "lag"), coords={"parameter": names}
        )
        layers = {
            n: replace(a, data=a.data.assign(truncation_error=known)) for n, a in run.layers.items()
        }
        return replace(run, layers=layers)

    monkeypatch.setattr("gradflow.prediction.analyze", with_errors)
    row = gradflow.what_if(recording, truncate=4).iloc[0]
    assert row.truncation_error == errors[3]  # lags 0 … 3 are kept
    assert row.note == "∂L/∂W_hh is off by 80.7 % if nothing goes back 4 steps"
    assert gradflow.what_if(recording, truncate=99).iloc[0].truncation_error == 0.0


@pytest.mark.parametrize("keep", [1, 4, 11, 20])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_the_error_of_truncation_is_that_of_a_detached_past(
    kind: type[nn.RNNBase], keep: int
) -> None:
    torch.manual_seed(0)
    model, x = kind(3, 4).double(), torch.randn(20, 3, 3).double()
    with gradflow.record(model) as recording:
        model(x)[0][-1].pow(2).sum().backward()
    full = model.weight_hh_l0.grad.clone()
    model.zero_grad()
    state = None
    if keep < 20:
        with torch.no_grad():
            state = model(x[:-keep])[1]
    model(x[-keep:], state)[0][-1].pow(2).sum().backward()
    error = float((model.weight_hh_l0.grad - full).norm() / full.norm())
    row = gradflow.what_if(recording, truncate=keep).iloc[0]
    assert row.truncation_error == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_clipping_shortens_the_norm_that_torch_measures() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4, 2), nn.GRU(4, 4), nn.Linear(4, 1)])
    x = torch.randn(20, 3, 3)
    with gradflow.record(model) as recording:
        first = model[0](x)[0]
        second = (
            model[1](first)[0] + model[1](first.flip(0))[0]
        )  # used twice: its weights count once
        (model[2](second[-1]).sum() * 50).backward()
    weights = [*model[0].parameters(), *model[1].parameters()]
    norm = float(torch.nn.utils.get_total_norm([weight.grad for weight in weights]))
    frame = gradflow.what_if(recording, clip=norm / 2)
    assert list(frame["layer"]) == ["0.l0", "0.l1", "1.l0", "1.l0@2"]
    assert frame["norm_before"].to_numpy() == pytest.approx([norm] * 4, rel=1e-6)
    assert frame["norm_after"].to_numpy() == pytest.approx([norm / 2] * 4, rel=1e-12)
    assert (frame["rate_after"] == frame["rate_before"]).all() and (frame["helps"] == 0).all()
    assert frame["note"].str.startswith("hit: the norm").all()
    assert (
        frame["note"].str.contains("does not cure chaos (Mikhaeil et al. 2022)", regex=False).all()
    )
    free = gradflow.what_if(recording, clip=norm * 2)
    assert free["norm_after"].to_numpy() == pytest.approx([norm] * 4, rel=1e-6)
    assert free["note"].str.startswith("not hit by these weights alone").all()


def test_without_a_backward_there_is_nothing_to_clip() -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning, match="no backward"), gradflow.record(model) as recording:
        model(torch.randn(20, 3, 3))
    frame = gradflow.what_if(recording, clip=1.0, truncate=3, forget_bias=1.0)
    assert list(frame["remedy"]) == ["forget_bias", "truncate", "clip"]
    assert "no gradient to truncate" in frame["note"][1]
    assert "no gradient of its weights was seen" in frame["note"][2]
    assert math.isnan(frame["norm_before"][2]) and not math.isnan(frame["rate_after"][0])


# --------------------------------------------------------------------------- refusals, errors


def test_what_cannot_be_tried_is_said() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.weight = nn.RNN(3, 4), nn.Parameter(torch.randn(4, 4) / 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(3, 4, requires_grad=True)
            for x_t in self.rnn(x)[0]:
                h = gradflow.tap("mine", h=torch.tanh(x_t + h @ self.weight))
            return h

    model = Both()
    with gradflow.record(model) as recording:
        model(torch.randn(15, 3, 3)).sum().backward()
    notes = dict(
        zip(*gradflow.what_if(recording, forget_bias=1.0)[["layer", "note"]].T.values, strict=True)
    )
    assert notes["rnn.l0"] == "not tried: a vanilla RNN has no gate that keeps its state"
    assert notes["mine"] == "not tried: its steps are the user's own code, which is not run again"
    frame = gradflow.what_if(recording, scale_hh=2.0).set_index("layer")
    assert math.isnan(frame.loc["mine", "rate_after"])
    assert frame.loc["rnn.l0", "note"] == "what other modules feed it is taken as it was recorded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "what_if must be given at least one of forget_bias, scale_hh, truncate, clip, chrono, "
            "orthogonal, got none",
        ),
        ({"forget_bias": math.nan}, "forget_bias must be a finite number, got nan"),
        ({"forget_bias": "1"}, "forget_bias must be a finite number, got '1'"),
        ({"forget_bias": True}, "forget_bias must be a finite number, got True"),
        ({"scale_hh": 0}, "scale_hh must be a finite number above 0, got 0"),
        ({"scale_hh": -1.5}, "scale_hh must be a finite number above 0, got -1.5"),
        ({"scale_hh": math.inf}, "scale_hh must be a finite number above 0, got inf"),
        ({"truncate": 0}, "truncate must be a whole number of at least 1, got 0"),
        ({"truncate": 2.5}, r"truncate must be a whole number of at least 1, got 2\.5"),
        ({"orthogonal": 0}, "orthogonal must be a finite number above 0, got 0"),
        ({"chrono": 2}, "chrono must be a whole number of at least 3, got 2"),
        ({"clip": 0.0}, r"clip must be a finite number above 0, got 0\.0"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gradflow.what_if(recorded(Case("GRU")), **arguments)  # type: ignore[arg-type]


def test_a_notebook_shows_what_is_compared() -> None:
    found = gradflow.what_if(recorded(FUSED[0]), forget_bias=1.0, orthogonal=1.0)
    html = found._repr_html_()
    assert "verdict_before" in html and "orthogonal" in html and "rate_low_before" not in html
    assert "rate_low_before" in found and type(found[["layer"]]) is pd.DataFrame


def test_what_if_takes_a_recording_only() -> None:
    with pytest.raises(InputError, match="recording must be a Recording, got Linear"):
        gradflow.what_if(nn.Linear(1, 1), clip=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", FUSED[1:2], ids=str)
def test_the_recording_stays_as_it_is(case: Case) -> None:
    recording = recorded(case)

    def everything() -> list[Tensor]:
        found = []
        for track in recording.values():
            for part in (track.states, track.gates, track.grads, track.weights):
                found += [value.clone() for value in part.values()]
            found += [track.cuts.clone(), track.mask.clone(), track.delta.clone()]
        return found

    before, rng = everything(), torch.get_rng_state()
    words = (repr(recording), list(recording.notes), dict(recording.provenance))
    gradflow.what_if(recording, forget_bias=3.0, scale_hh=0.1, truncate=2, clip=0.1)
    for track in recording.values():
        track.read_anew()
    assert all(
        torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
        for one, two in zip(before, everything(), strict=True)
    )
    assert torch.equal(rng, torch.get_rng_state())
    assert words == (repr(recording), recording.notes, recording.provenance)
    assert recording["l0"].parity.status == "passed"


def test_a_change_that_leaves_the_range_of_numbers_is_said() -> None:
    rnn = nn.RNN(2, 4, nonlinearity="relu")
    nn.init.constant_(rnn.weight_hh_l0, 0.2)
    with gradflow.record(rnn) as recording:
        rnn(torch.ones(60, 2, 2))[0].sum().backward()
    row = gradflow.what_if(recording, scale_hh=1e6).iloc[0]
    assert row.note == "with this change its states are no longer finite"
    assert math.isnan(row.rate_after) and math.isnan(row.helps)


# ------------------------------------------------------------------ predictions of a report


def diagnosed(model: nn.Module, steps: int = 40) -> gradflow.Analysis:
    torch.manual_seed(2)
    return gradflow.diagnose(model, torch.randn(steps, 6, 3))


def test_a_vanishing_lstm_is_told_what_a_larger_forget_bias_would_do() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 6)
    layer = diagnosed(model)["l0"]
    assert [(p.remedy, p.value) for p in layer.predictions] == [
        ("chrono", 40.0),
        ("forget_bias", 2.0),
        ("forget_bias", 1.0),
    ]
    torch.manual_seed(2)
    with gradflow.record(model) as recording:
        model(torch.randn(40, 6, 3))[0][-1].sum().backward()
    row = gradflow.what_if(recording, forget_bias=2.0).iloc[0]
    best = layer.predictions[1]
    assert best.rate.value == row.rate_after
    assert (best.half_life, best.verdict) == (row.half_life_after, row.verdict_after)
    assert best.helps == pytest.approx(row.helps)
    assert best.message.startswith("forget bias + 2: ")
    assert (
        f"−{abs(layer.decades):.3g} → " in best.message and "decades over the span" in best.message
    )


@pytest.mark.parametrize("make", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_first_advice_is_the_remedy_that_helped_most(make: type[nn.RNNBase]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        layer = diagnosed(make(3, 6))["l0"]
        assert layer.verdict == "vanishing"
        (finding,) = (one for one in layer.findings if one.name == "vanishing")
        stable = [one.verdict == "stable" for one in layer.predictions]
        assert stable == sorted(stable, reverse=True)
        first = layer.predictions[0]
        assert not any(p.helps > first.helps for p in layer.predictions[1:]) or stable[0]
        if first.verdict == "stable" or make is not nn.RNN:
            still = "" if stable[0] else "still "
            assert f"tried on this batch: {still}{first.verdict}, " in finding.advice
            named = {"chrono": "uniform_(1, 39)", "forget_bias": f"+= {first.value:.1f}"}
            named |= {"orthogonal": "orthogonal_(", "scale_hh": f"*= {first.value:g}"}
            assert named[first.remedy] in finding.code


def test_an_exploding_rnn_is_told_which_factor_would_hold_it() -> None:
    torch.manual_seed(0)
    model = nn.RNN(3, 8, nonlinearity="relu").double()
    for weight in model.parameters():
        nn.init.uniform_(weight, 0.1, 0.3)  # all units stay on: linear
    layer = gradflow.diagnose(model, torch.rand(40, 6, 3).double())["l0"]
    assert layer.verdict == "exploding"
    (only,) = layer.predictions  # the second factor is the first
    assert (only.remedy, only.verdict) == ("scale_hh", "stable")
    assert only.value == pytest.approx(math.exp(-layer.rate.value), rel=5e-3)
    assert only.message.startswith(f"W_hh × {only.value:g}: stable, {layer.decades:.3g} → ")


def test_a_prediction_is_of_the_sequence_that_the_present_numbers_are_of() -> None:
    """With padding, another one may be too short for anything to be compared."""
    torch.manual_seed(0)
    model, lengths = nn.LSTM(3, 8), [16, 18, 20, 22, 40, 19, 17, 30]
    run = gradflow.diagnose(model, torch.randn(40, 8, 3), lengths=lengths, span=30)["l0"]
    assert run.predictions
    assert {one.searched for one in run.predictions} == {run.searched}


def test_layers_that_need_it_are_changed_together_and_the_others_are_left() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 6, 2)
    with torch.no_grad():
        model.weight_hh_l1.zero_()
        model.bias_ih_l1[6:12] = 12.0  # the upper layer remembers for ever
    run = diagnosed(model)
    assert [layer.verdict for layer in run.values()] == ["vanishing", "stable"]
    assert run["l0"].predictions and not run["l1"].predictions
    assert run["l0"].predictions[0].batch == "this batch"


def test_a_prediction_for_a_loop_says_what_it_takes_as_recorded() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(6, 4)
            for t in range(20):
                h = self.cell(x[t], h)
            return h

    layer = gradflow.diagnose(Decoder(), torch.randn(20, 6, 4))["cell"]
    note = "every call of the loop reads its input as it was recorded"
    assert layer.predictions[0].batch == f"this batch ({note})"


def test_a_closed_loop_is_not_run_again_with_its_old_inputs() -> None:
    cell = nn.GRUCell(4, 4)
    with gradflow.record(cell) as recording:
        h = torch.randn(6, 4)
        for _ in range(20):
            h = cell(h, h)
        h.sum().backward()
    row = gradflow.what_if(recording, forget_bias=1.0).iloc[0]
    assert "closed loop" in row.note and math.isnan(row.rate_after)


def test_parts_of_a_closed_loop_that_vanish_are_given_no_prediction() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.LSTMCell(2, 6), nn.GRUCell(6, 2)

        def forward(self, y: Tensor) -> Tensor:
            h, c, g = torch.zeros(4, 6), torch.zeros(4, 6), y
            for _ in range(40):
                h, c = self.one(g, (h, c))
                g = self.two(h, g)
            return g

    run = gradflow.diagnose(Decoder(), torch.randn(4, 2))
    parts = [layer for layer in run.values() if layer.part_of]
    assert len(parts) == 2 and {layer.verdict for layer in parts} == {"vanishing"}
    assert not any(layer.predictions for layer in parts)


def test_one_remedy_leads_for_all_layers_that_are_changed_together() -> None:
    """Of the lower layer alone, a bias raised by 2 is nearer to 1; it leaves the upper one vanishing."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 6, 2)
    with torch.no_grad():
        model.bias_ih_l0[6:12] += 0.8
    run = gradflow.diagnose(model, torch.randn(60, 4, 3))
    helped = {one.remedy: one.helps for one in run["l0"].predictions if one.value != 1}
    assert helped["forget_bias"] > helped["chrono"] > 5
    for layer in run.values():
        assert layer.predictions[0].remedy == "chrono"
        assert {one.source for one in layer.findings} == {"Tallec & Ollivier 2018"}
        assert len({one.code for one in layer.findings}) == 1


def test_a_stable_model_gets_none() -> None:
    model = nn.RNN(3, 6).double()
    nn.init.orthogonal_(model.weight_hh_l0)
    with torch.no_grad():
        for weight in (model.weight_ih_l0, model.bias_ih_l0, model.bias_hh_l0):
            weight.mul_(1e-4)
    run = gradflow.diagnose(model, torch.randn(40, 6, 3).double())
    assert run["l0"].verdict == "stable"
    assert run["l0"].predictions == ()


def test_what_would_take_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradflow.prediction.PREDICTION_SECONDS", 0.0)
    run = diagnosed(nn.LSTM(3, 6))
    assert run["l0"].predictions == ()
    (note,) = run.provenance["notes"]
    assert note.startswith("remedies were not tried on the batch: that would take about ")


def test_predictions_are_read_back_and_old_runs_load_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = diagnosed(nn.LSTM(3, 6, 2))
    again = gradflow.load(run.save(f"{tmp_path}/run.nc"))
    assert again["l0"].predictions == run["l0"].predictions != ()
    header = saved._layer_header

    def old(layer: LayerAnalysis) -> dict[str, object]:
        return {name: value for name, value in header(layer).items() if name != "predictions"}

    monkeypatch.setattr(saved, "_layer_header", old)
    assert gradflow.load(run.save(f"{tmp_path}/old.nc"))["l0"].predictions == ()


def test_weights_alone_are_told_under_which_probe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(nn.LSTM(3, 6, 2).state_dict(), tmp_path / "model.pt")
    run = analyze_file(FileRequest(tmp_path / "model.pt", seq_len=40, batch=4))
    for layer in run.values():
        assert layer.verdict == "vanishing"
        first = layer.predictions[0]
        assert first.batch == "inputs N(0, 1), 2 layers changed together"
