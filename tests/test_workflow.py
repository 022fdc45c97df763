"""The joints between the stages: diagnose, plot, analyze of recordings with something missing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.errors import GradflowWarning, InputError, RecordingError

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A recurrent layer with a normalisation that keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.rnn = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.rnn(x)[0][:, -1])


def test_diagnose_leaves_the_model_as_found() -> None:
    model, x, y = Net(), torch.randn(4, 12, 3), torch.randn(4, 2)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [parameter.grad for parameter in model.parameters()]
    values = [grad.clone() for grad in grads]
    run = gradflow.diagnose(model, x, target=y, loss=nn.MSELoss())
    assert list(run.layers) == ["rnn.l0"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)


def test_provenance_names_the_loss() -> None:
    x, y = torch.randn(4, 12, 3), torch.randn(4, 2)
    for loss, name in (
        (nn.functional.mse_loss, "mse_loss"),
        (nn.MSELoss(), "MSELoss"),
        (lambda output, target: (output - target).square().sum(), "a lambda of the caller's"),
    ):
        assert gradflow.diagnose(Net(), x, target=y, loss=loss).provenance["loss"] == name


def test_diagnose_leaves_the_random_state_and_the_input_as_found() -> None:
    x = torch.randn(12, 4, 3, requires_grad=True)
    before = torch.get_rng_state()
    gradflow.diagnose(nn.LSTM(3, 4, 2, dropout=0.5), x)
    assert torch.equal(torch.get_rng_state(), before) is False  # building the model drew numbers
    model, before = nn.LSTM(3, 4, 2, dropout=0.5), torch.get_rng_state()
    gradflow.diagnose(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None


def test_a_loss_that_cannot_read_a_tuple_says_what_to_write() -> None:
    x, y = torch.randn(12, 4, 3), torch.randn(12, 4, 4)
    with pytest.raises(
        InputError, match=r"a tuple.*loss=lambda output, target: criterion\(output\[0\]"
    ):
        gradflow.diagnose(nn.LSTM(3, 4), x, target=y, loss=nn.MSELoss())


@pytest.mark.parametrize("thing", [None, 3, "run"])
def test_report_takes_an_analysis_only(thing: object, tmp_path: object) -> None:
    with pytest.raises(InputError, match="the analysis must be an Analysis, got"):
        gradflow.report(thing, f"{tmp_path}/report")  # type: ignore[arg-type]


def test_load_and_record_refuse_what_they_cannot_use() -> None:
    with pytest.raises(InputError, match="path must be a path, got NoneType"):
        gradflow.load(None)  # type: ignore[arg-type]
    with (
        pytest.raises(InputError, match="scaler must be a GradScaler, got int"),
        gradflow.record(nn.LSTM(3, 4), scaler=3),
    ):
        pass


def test_diagnose_takes_a_loss_of_the_output_alone() -> None:
    run = gradflow.diagnose(nn.LSTM(3, 4), torch.randn(12, 4, 3), loss=lambda out: out[0].sum())
    assert run["l0"].parity.status == "passed"


class ByHand(nn.Module):
    """A loop whose axes nothing tells before its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, found = torch.zeros(x.shape[1], 3), []
        for u in x:
            h = torch.tanh(self.w(h) + u)
            found.append(h)
        return torch.stack(found)


def test_the_output_of_a_loop_by_hand_is_read_along_its_time() -> None:
    model, x = ByHand(), torch.randn(12, 4, 3)
    run = gradflow.diagnose(model, x)
    with gradflow.record(model) as recording:
        (model(x)[-1].square().sum() / 2).backward()
    last = gradflow.analyze(recording)
    norms = [one["loop"].data["grad_norm"] for one in (run, last)]
    assert norms[0].equals(norms[1])
    assert not any("read" in finding.name for finding in run.findings)


def test_diagnose_refuses_a_loss_that_is_no_number() -> None:
    with pytest.raises(InputError, match=r"the loss must be one number.*got shape \(12, 4, 4\)"):
        gradflow.diagnose(nn.LSTM(3, 4), torch.randn(12, 4, 3), loss=lambda out: out[0])


def test_errors_of_the_users_own_code_pass_through() -> None:
    with pytest.raises(RuntimeError, match=r"input\.size"):
        gradflow.diagnose(nn.LSTM(3, 4), torch.randn(12, 4, 5))


def test_lengths_shorten_what_counts() -> None:
    lengths = [12, 5, 3, 9]
    run = gradflow.diagnose(nn.LSTM(3, 4), torch.randn(12, 4, 3), lengths=lengths)
    assert run["l0"].data["length"].values.tolist() == lengths
    assert run["l0"].span == 7  # the median


def test_analyze_without_a_backward_says_so_and_still_measures() -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning, match="no backward"), gradflow.record(model) as recording:
        model(torch.randn(30, 4, 3))
    layer = gradflow.analyze(recording)["l0"]
    assert layer.verdict == "vanishing"
    assert "no backward ran" in layer.gradient_note
    assert layer.data["log10_grad"].isnull().all()
    gradflow.plot(recording)


def test_analyze_of_nothing_names_the_reason() -> None:
    model = nn.Linear(3, 4)
    with pytest.warns(GradflowWarning), gradflow.record(model) as recording:
        model(torch.randn(3, 3))
    with pytest.raises(RecordingError, match="no recurrent layer ran"):
        gradflow.analyze(recording)


def test_a_layer_whose_jacobians_are_unknown_is_there_without_gains_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.GRU(3, 4))
    both = nn.ModuleList([model, nn.GRU(3, 4)])
    x = torch.randn(20, 4, 3)
    with gradflow.record(both) as recording:
        (model(x)[0].sum() + both[1](x)[0].sum()).backward()

    def unknown(*_: object) -> None:
        raise RecordingError("0.0.l0: what happens between two calls is not known")

    monkeypatch.setattr(recording["0.0.l0"].source, "operator", unknown)
    run = gradflow.analyze(recording)
    assert list(run.layers) == ["0.0.l0", "1.l0"]
    assert run["0.0.l0"].sentence == (
        "0.0.l0 gets no verdict, since its gains are not known: what happens between two calls is "
        "not known"
    )
    assert run["1.l0"].labels == gradflow.analyze(recording)["1.l0"].labels
    assert "no gains" not in run["1.l0"].labels


def test_a_layer_whose_states_cannot_be_read_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = nn.ModuleList([nn.GRU(3, 4), nn.GRU(3, 4)])
    x = torch.randn(20, 4, 3)

    def unknown() -> None:
        raise RecordingError("0.l0: its dropout cannot be drawn again")

    def recorded(*lost: str) -> gradflow.Recording:
        with gradflow.record(both) as recording:
            (both[0](x)[0].sum() + both[1](x)[0].sum()).backward()
        for name in lost:
            monkeypatch.setattr(recording[name].source, "forward", unknown)
            recording[name].read_anew()
        return recording

    run = gradflow.analyze(recorded("0.l0"))
    assert list(run.layers) == ["1.l0"]
    assert run.warnings[0] == "0.l0 is not in this report: its dropout cannot be drawn again"
    with pytest.raises(RecordingError, match="drawn again"):
        gradflow.analyze(recorded("0.l0", "1.l0"))


def test_a_run_is_read_back_exactly(tmp_path: object) -> None:
    run = gradflow.diagnose(nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(15, 3, 3))
    again = gradflow.load(run.save(f"{tmp_path}/run.nc"))
    assert list(again.layers) == list(run.layers)
    for layer, read in zip(run.values(), again.values(), strict=True):
        assert read.data.identical(layer.data)
        assert repr(read.rate) == repr(layer.rate)
        assert (read.findings, read.sentence, read.labels) == (
            layer.findings,
            layer.sentence,
            layer.labels,
        )
    assert repr(again) == repr(run)
