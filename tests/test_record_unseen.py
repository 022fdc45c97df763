"""What runs but cannot be read is said in words, and the user's code runs on as without a recording."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from compare import assert_steps_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning, RecordingError
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 + 4, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.9 * h + self.mix(torch.cat([x, h], -1)).tanh()


class Loop(nn.Module):
    def __init__(self, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.cell = Cell() if cell is None else cell

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 4)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


class Stock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def data(batch: int = 2) -> Tensor:
    return torch.randn(5, batch, 3)


def on_meta(make: Callable[[], nn.Module]) -> None:
    model = make().to("meta")
    with gradflow.record(model):
        model(data().to("meta")).sum().backward()


def on_fake_tensors(make: Callable[[], nn.Module]) -> None:
    with FakeTensorMode():
        model = make()
        with gradflow.record(model):
            model(data())


def without_sequences(make: Callable[[], nn.Module]) -> None:
    model = make()
    with gradflow.record(model):
        model(data(0)).sum().backward()


def under_vmap(make: Callable[[], nn.Module]) -> None:
    model = make()
    with gradflow.record(model):
        torch.vmap(lambda x: model(x.unsqueeze(1)), in_dims=1)(data()).sum().backward()


def under_grad(make: Callable[[], nn.Module]) -> None:
    model = make()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (data(),)).sum()

    with gradflow.record(model):
        torch.func.grad(loss)(dict(model.named_parameters()))


def scripted(make: Callable[[], nn.Module]) -> None:
    model = make()
    x, h = data()[0], torch.zeros(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        if isinstance(model, Loop):
            model.cell = torch.jit.trace(model.cell, (x, h))
        else:
            model.rnn = torch.jit.trace(model.rnn, (data(),))
    with gradflow.record(model):
        model(data()).sum().backward()


def complex_states(make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = make().to(torch.complex64)
    with gradflow.record(model):
        model(data().to(torch.complex64)).abs().sum().backward()


@pytest.mark.parametrize(
    ("run", "make", "words"),
    [
        (on_meta, Loop, r"cell \(Cell\) ran on the meta device"),
        (on_meta, Stock, "rnn ran on the meta device"),
        (on_fake_tensors, Loop, r"cell \(Cell\) ran on .* fake tensors"),
        (on_fake_tensors, Stock, "rnn ran on .* fake tensors"),
        (without_sequences, Loop, r"cell \(Cell\) was given an empty batch"),
        (without_sequences, Stock, "rnn was given an empty batch"),
        (without_sequences, lambda: Loop(nn.GRUCell(3, 4)), "cell was given an empty batch"),
        (under_vmap, Loop, r"^cell \(Cell\) ran inside a transform of torch.func"),
        (under_grad, Loop, r"^cell \(Cell\) ran inside a transform of torch.func"),
        (scripted, Loop, "before torch.jit.script or torch.jit.trace"),
        (scripted, Stock, "before torch.jit.script or torch.jit.trace"),
        (complex_states, Loop, r"cell \(Cell\) returns complex tensors"),
    ],
)
def test_a_sentence_and_no_disturbance(
    run: Callable[[Callable[[], nn.Module]], None], make: Callable[[], nn.Module], words: str
) -> None:
    with pytest.warns(GradflowWarning, match=words):
        run(make)


def test_quantized_layers() -> None:
    class LSTM(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    LSTM.__module__ = "torch.ao.nn.quantized.dynamic.modules.rnn"
    model = nn.Sequential(LSTM())
    with (
        pytest.warns(GradflowWarning, match="record the model as it was before quantization"),
        gradflow.record(model),
    ):
        model(data())


def test_a_model_with_readable_calls_too_says_nothing_of_an_empty_batch() -> None:
    model = Stock()
    with gradflow.record(model) as recording:
        model(data(0)).sum().backward()
        model(data()).sum().backward()
    assert list(recording.tracks) == ["rnn.l0"]


def test_a_hook_on_the_backward_of_a_cell_leaves_its_jacobians_readable() -> None:
    x, cell = data().double(), Cell().double()
    runs = []
    for hooked in (False, True):
        if hooked:
            cell.register_full_backward_hook(lambda module, ours, above: (None, 2 * ours[1]))
        h, kept = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True), []
        with gradflow.record(cell) as recording:
            for x_t in x:
                h = cell(x_t, h)
                kept.append(h)
            h.sum().backward()
        runs.append(recording["cell"])
    plain, changed = runs
    assert torch.equal(step_jacobians(plain), step_jacobians(changed))
    # what the hook makes of the gradient is what is reported: twice as much at every step back
    double = 2.0 ** torch.arange(4, -1, -1, dtype=torch.float64).view(-1, 1, 1)
    assert_steps_close(changed.grad_h, plain.grad_h * double, plain.mask)


def test_a_reentrant_checkpoint_is_named() -> None:
    cell, h = Cell(), torch.zeros(2, 4, requires_grad=True)

    def run() -> Recording:
        state = h
        with gradflow.record(cell) as recording:
            for x_t in data():
                state = checkpoint(cell, x_t, state, use_reentrant=True)
            state.sum().backward()
        return recording

    with pytest.warns(GradflowWarning, match="use_reentrant=False"):
        recording = run()
    assert any("what a checkpoint recomputes" in note for note in recording["cell"].notes)
    with pytest.raises(RecordingError, match="use_reentrant=False"):
        _ = recording["cell"].grad_h


class Rounds(nn.Module):
    """A layer that is called without a state, on what came of its last outputs."""

    def __init__(self, layer: nn.Module, mark: Callable[[Tensor], Tensor], apart: bool) -> None:
        super().__init__()
        self.layer, self.out, self.mark, self.apart = layer, nn.Linear(4, 3), mark, apart

    def forward(self, x: Tensor) -> Tensor:
        y, total = x, x.new_zeros(())
        for _ in range(6):
            made = self.layer(x if self.apart else y)
            y = self.mark(self.out(made if isinstance(made, Tensor) else made[0]))
            total = y.sum() + (total if self.apart else 0)
        return total


def flat(y: Tensor) -> Tensor:
    rows: Tensor = gradflow.tap(y=y.flatten(1))
    return rows.view_as(y)


def flat_in_time(y: Tensor) -> Tensor:
    rows: Tensor = gradflow.tap(y=y.transpose(0, 1).flatten(1))
    return rows.unflatten(1, (len(y), -1)).transpose(0, 1)


def plain(y: Tensor) -> Tensor:
    marked: Tensor = gradflow.tap(y=y)
    return marked


AFRESH = {
    "a cell": (lambda: nn.GRUCell(3, 4), plain, "tap(y=y)"),
    "batch first": (lambda: nn.GRU(3, 4, batch_first=True), flat, "y.flatten(1)).view_as(y)"),
    "time first": (lambda: nn.LSTM(3, 4), flat_in_time, "unflatten(1, (len(y), -1))"),
}


@pytest.mark.parametrize("kind", AFRESH)
def test_calls_that_start_afresh_on_what_came_of_the_call_before_are_named(kind: str) -> None:
    """And with the line that is shown they are a track; calls on data of their own are not named."""
    make, mark, line = AFRESH[kind]
    x = torch.randn(2, 3) if kind == "a cell" else torch.randn(2, 5, 3)
    model = Rounds(make(), lambda y: y, False)
    said = pytest.warns(GradflowWarning, match="a recurrence of layer is in no track")
    with said as caught, gradflow.record(model) as recording:
        model(x).backward()
    (found,) = recording.unseen
    assert (found.module, found.steps) == ("layer", 6) and line in found.insert
    assert not any("no recurrence is exercised" in str(one.message) for one in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradflowWarning)  # a cell that is called once, for one
        for marked, apart in ((mark, False), (lambda y: y, True)):
            with gradflow.record(model := Rounds(make(), marked, apart)) as recording:
                model(x).backward()
            assert not recording.unseen
            assert apart or recording["loop"].steps == 6


class SeveralLoops(nn.Module):
    """One weight in three loops of this file; forward leads to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def warm_up(self, rounds: list[Tensor]) -> None:
        for other in rounds:
            other = self.shared(other)

    def forward(self, x: Tensor) -> Tensor:
        return _over_memory(self, x)


def _not_called(model: SeveralLoops, rounds: list[Tensor]) -> None:
    for another in rounds:
        another = model.shared(another)


def _over_memory(model: SeveralLoops, x: Tensor) -> Tensor:
    state, memory = torch.zeros_like(x[0]), []
    for x_t in x:
        memory.append(state)
        state = torch.tanh(model.shared(torch.stack(memory).mean(0)) + x_t)
    return state


def test_the_loop_is_the_one_that_forward_leads_to() -> None:
    """It was the first of the file that used an attribute of that name."""
    model = SeveralLoops()
    with warnings.catch_warnings(), gradflow.record(model) as recording:
        warnings.simplefilter("ignore", GradflowWarning)
        model(torch.randn(6, 2, 4)).sum().backward()
    (found,) = recording.unseen
    assert "other" not in found.insert
    assert found.line.endswith(f":{_over_memory.__code__.co_firstlineno + 2}")


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kind", [nn.GRUCell, Cell])
def test_a_hook_that_scales_gradients_is_said_to_be_in_totals_and_not_in_gains(
    kind: type[nn.Module], hooked: bool
) -> None:
    """As MuZero's: half of every gradient at every step. It was in none of the words."""
    torch.manual_seed(0)
    cell = (Cell() if kind is Cell else kind(3, 4)).double()
    h = torch.zeros(2, 4).double()
    with gradflow.record(cell) as recording:
        for _ in range(5):
            h = cell(torch.randn(2, 3).double(), h)
            if hooked:
                h.register_hook(lambda grad: grad / 2)
        h.square().sum().backward()
    (track,) = recording
    assert any("a hook of yours lies on its states" in note for note in track.notes) == hooked
    incoming = 2 * h.detach()
    torch.testing.assert_close(track.grad_h[-1], incoming / (1 + hooked), rtol=1e-12, atol=0)
