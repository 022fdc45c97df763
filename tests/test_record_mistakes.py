"""First mistakes get a sentence: as a warning when the block ends, and as the error on asking."""

# ruff: noqa: PT031, SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.errors import GradflowWarning, InputError, RecordingError

pytestmark = pytest.mark.usefixtures("one_thread")


class Tagger(nn.Module):
    """A recurrent layer that runs, one that does not, and a head that needs neither."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4)
        self.spare = nn.GRU(3, 4)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor, path: str = "encoder") -> Tensor:
        if path == "head":
            return self.head(x)
        return getattr(self, path)(x)[0]


def x(steps: int = 5) -> Tensor:
    return torch.randn(steps, 2, 3)


def test_a_correct_recording_says_nothing() -> None:
    """Warnings are errors here, so this fails if one is said."""
    model = nn.LSTM(3, 4)
    with gradflow.record(model):
        model(x())[0].sum().backward()


# ------------------------------------------------------------------------ no recurrent layer ran


def test_a_model_without_recurrent_layers_names_what_it_is_made_of() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.warns(GradflowWarning, match=r"(?i)no recurrent layer ran.*Linear"):
        with gradflow.record(model) as recording:
            model(x()).sum().backward()
    with pytest.raises(RecordingError, match=r"(?i)no recurrent layer ran.*Linear"):
        _ = recording["l0"]
    assert len(recording) == 0
    assert "no recurrent layer ran" in repr(recording)


def test_a_recurrent_layer_that_was_not_called_is_named() -> None:
    model = Tagger()
    text = r"(?i)no recurrent layer ran.*(encoder|spare).*(encoder|spare)"
    with pytest.warns(GradflowWarning, match=text):
        with gradflow.record(model) as recording:
            model(x(), "head").sum().backward()
    with pytest.raises(RecordingError, match=text):
        _ = recording["encoder.l0"]


def test_the_modules_that_did_run_are_named() -> None:
    """A model that took another path: which modules ran says so at once."""
    model = Tagger()
    torch.optim.Adam(model.parameters())  # loads torch._dynamo, yet compiles nothing
    torch._dynamo.reset()  # of what other tests compiled
    with pytest.warns(GradflowWarning, match=r"(?i)head"):
        with gradflow.record(model):
            model(x(), "head").sum().backward()


def test_nothing_ran_at_all() -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning, match=r"(?i)no recurrent layer ran.*LSTM"):
        with gradflow.record(model):
            pass


def test_layers_that_fit_nothing_are_named() -> None:
    model = Tagger()
    with pytest.warns(GradflowWarning, match=r"decoder"):
        with gradflow.record(model, layers="decoder*") as recording:
            model(x()).sum().backward()
    with pytest.raises(RecordingError, match=r"decoder"):
        _ = recording["decoder.l0"]


# -------------------------------------------------------------------------------- no gradient


def test_no_backward_in_the_block() -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning, match=r"(?i)l0.*no backward.*block"):
        with gradflow.record(model) as recording:
            loss = model(x())[0].sum()
    loss.backward()  # after the block: too late
    track = recording["l0"]
    assert track.backwards == 0
    assert not track.has_gradient
    for name in ("grad_h", "grad_c", "grads", "grad_h_direct", "delta", "delta_hh"):
        with pytest.raises(RecordingError, match=r"(?i)l0.*no backward.*backward\(\)"):
            getattr(track, name)
    assert track.grad_h_last is None
    assert track.parity.status == "not applicable"
    assert track.h.isfinite().all()
    assert track.c.shape == (5, 2, 4)
    assert set(track.gates) == set("ifgo")
    assert track.operator().push(0, torch.randn(2, 1, 8, dtype=torch.float64)).shape == (2, 1, 8)


def test_the_output_was_detached() -> None:
    model = Tagger()
    with pytest.warns(GradflowWarning, match=r"(?i)encoder\.l0.*not reach.*detach"):
        with gradflow.record(model) as recording:
            states = model(x()).detach()
            model.head(states[..., :3]).sum().backward()
    with pytest.raises(RecordingError, match=r"(?i)not reach.*detach"):
        _ = recording["encoder.l0"].grad_h


def test_the_loss_ignores_the_layer() -> None:
    model = Tagger()
    with pytest.warns(GradflowWarning, match=r"(?i)encoder\.l0.*not reach.*loss.*ignores"):
        with gradflow.record(model) as recording:
            model(x())
            model(x(), "spare").sum().backward()
    assert recording["spare.l0"].backwards == 1
    with pytest.raises(RecordingError, match=r"(?i)not reach"):
        _ = recording["encoder.l0"].grad_h


def test_a_backward_is_noticed_without_parameters_that_keep_a_gradient() -> None:
    """torch.autograd.grad leaves no .grad behind; the sentence must still not say "no backward"."""
    model = Tagger()
    with pytest.warns(GradflowWarning, match=r"(?i)encoder\.l0.*not reach"):
        with gradflow.record(model):
            model(x())
            loss = model(x(), "spare").sum()
            torch.autograd.grad(loss, list(model.spare.parameters()))


def test_the_layer_is_frozen() -> None:
    model = Tagger()
    model.encoder.requires_grad_(False)
    with pytest.warns(GradflowWarning, match=r"(?i)encoder\.l0.*frozen"):
        with gradflow.record(model) as recording:
            model.head(model(x())[..., :3]).sum().backward()
    with pytest.raises(RecordingError, match=r"(?i)frozen.*requires_grad"):
        _ = recording["encoder.l0"].grad_h
    assert recording["encoder.l0"].h.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_the_block_ran_without_gradient(mode: type) -> None:
    model = nn.LSTM(3, 4, 2)
    with pytest.warns(GradflowWarning, match=r"(?i)(no_grad|inference_mode)"):
        with gradflow.record(model) as recording, mode():
            model(x())
    with pytest.raises(RecordingError, match=r"(?i)(no_grad|inference_mode)"):
        _ = recording["l1"].grad_h
    assert recording["l0"].h.isfinite().all()
    assert recording["l0"].c.shape == (5, 2, 4)


def test_one_step_is_no_recurrence() -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning, match=r"(?i)l0.*T = 1.*recurrence"):
        with gradflow.record(model) as recording:
            model(x(1))[0].sum().backward()
    assert recording["l0"].grad_h.shape == (1, 2, 4)  # the numbers are still there


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_the_loss_was_not_finite(how: str) -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning, match=r"(?i)l0.*loss was NaN"):
        with gradflow.record(model) as recording:
            (model(x())[0].sum() * float(how)).backward()
    assert recording["l0"].parity.status == "not applicable"


def test_states_that_are_not_finite_do_not_crash() -> None:
    model = nn.LSTM(3, 4, 2)
    data = x()
    data[2, 0, 0] = float("nan")
    with pytest.warns(GradflowWarning, match=r"(?i)(nan|not finite)"):
        with gradflow.record(model) as recording:
            model(data)[0].sum().backward()
    assert recording["l0"].h[:2].isfinite().all()
    assert recording["l0"].h[2:, 0].isnan().all()
    assert recording["l0"].grad_h[:, 1].isfinite().all()


def test_several_mistakes_in_one_block_are_each_said() -> None:
    model = Tagger()
    with pytest.warns(GradflowWarning) as said:
        with gradflow.record(model):
            model(x(1))
            model(x(), "spare").sum()
    text = "\n".join(str(warning.message) for warning in said)
    assert "encoder.l0" in text
    assert "spare.l0" in text
    assert "T = 1" in text
    assert "no backward" in text.lower()


def test_a_warning_points_at_the_users_line() -> None:
    model = nn.LSTM(3, 4)
    with pytest.warns(GradflowWarning) as said:
        with gradflow.record(model):
            model(x())
    assert said[0].filename == __file__


# ------------------------------------------------------------------------------- bad arguments


def test_a_wrong_name_lists_the_right_ones() -> None:
    model = Tagger()
    with gradflow.record(model) as recording:
        (model(x()).sum() + model(x(), "spare").sum()).backward()
    with pytest.raises(RecordingError, match=r"'decoder'.*encoder\.l0, spare\.l0"):
        _ = recording["decoder"]


def test_an_ambiguous_prefix_lists_what_it_fits() -> None:
    model = nn.LSTM(3, 4, 2)
    with gradflow.record(model) as recording:
        model(x())[0].sum().backward()
    with pytest.raises(RecordingError, match=r"'l'.*l0, l1"):
        _ = recording["l"]


@pytest.mark.parametrize("model", [3, None, "model.pt", nn.LSTM])
def test_something_that_is_no_model(model: object) -> None:
    with pytest.raises(InputError, match=r"model must be .*Module, got"):
        with gradflow.record(model):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("lengths", [[5], [5, 6], [0, 5], [5.5, 2.0], "55", [[5, 2]]])
def test_lengths_that_do_not_fit(lengths: object) -> None:
    model = nn.LSTM(3, 4)
    with pytest.raises(InputError, match=r"lengths must be .*got"):
        with gradflow.record(model, lengths=lengths):  # type: ignore[arg-type]
            model(x())[0].sum().backward()


@pytest.mark.parametrize("layers", [3, [3], b"l0"])
def test_layers_that_are_no_names(layers: object) -> None:
    with pytest.raises(InputError, match=r"layers must be .*got"):
        with gradflow.record(nn.LSTM(3, 4), layers=layers):  # type: ignore[arg-type]
            pass


class Queue(nn.Module):
    """A memory as long as a chunk, first in, first out: of the old one nothing is kept."""

    def forward(self, memory: Tensor, new: Tensor) -> Tensor:
        return torch.cat([memory[:, new.shape[1] :], new], dim=1)


def test_a_memory_that_keeps_nothing_was_not_tapped() -> None:
    model, memory, total = nn.ModuleList([nn.Linear(3, 3), Queue()]), torch.zeros(2, 4, 3), 0.0
    with pytest.warns(GradflowWarning, match="took nothing of its earlier state") as said:
        with gradflow.record(model):
            for new in torch.randn(5, 2, 4, 3):
                memory = model[1](memory, model[0](new))
                total = total + memory.sum()
            total.backward()
    assert not any("tapped" in str(one.message) for one in said)


class OfTokens(nn.Module):
    """As many memory slots as sequences, and nothing that is differentiable comes in at first."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.embed = nn.Parameter(torch.randn(2, 4)), nn.Embedding(5, 4)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is None:
            memory = self.start.expand(len(tokens), -1, -1)
        return torch.tanh(memory + self.embed(tokens).mean(1, keepdim=True))


def test_a_first_call_without_differentiable_inputs_is_followed() -> None:
    model, memory = OfTokens(), None
    with gradflow.record(model) as recording:
        for tokens in torch.randint(0, 5, (4, 2, 3)):
            memory = model(tokens, memory)
        memory.sum().backward()
    (track,) = recording.values()
    assert (track.steps, track.batch) == (4, 2)


class Families(nn.Module):
    """Like rockpool's modules: its own meaning of parameters() and modules()."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]

    def parameters(self, family: str = "") -> dict[str, object]:  # type: ignore[override]
        return {name: weight for name, weight in self._parameters.items() if family in name}

    def modules(self) -> dict[str, object]:  # type: ignore[override]
        return dict(self._modules)


def test_a_model_with_parameters_of_its_own_meaning_is_recorded() -> None:
    model = Families()
    with gradflow.record(model) as recording:
        model(x()).sum().backward()
    assert recording["rnn.l0"].parity.status == "passed"
