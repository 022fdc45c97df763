"""Recording changes nothing: no bit of the training, nothing of the model, nothing of torch."""

# ruff: noqa: SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import torch_is_as_found
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A two-layer bidirectional LSTM with dropout, a GRU on top, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, dropout=0.4, bidirectional=True, batch_first=True)
        self.between = nn.Dropout(0.2)
        self.gru = nn.GRU(8, 4, 2, dropout=0.3, batch_first=True)
        self.rnn = nn.RNN(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.between(self.lstm(x)[0]))
        return self.head(self.rnn(y.transpose(0, 1))[0][-1])


def train(record_each: bool, record_all: bool, draw_one: bool = False) -> dict[str, Any]:
    """Five optimizer steps; everything that could differ, in full."""
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    seen: dict[str, Any] = {"outputs": [], "losses": [], "grads": [], "rng": []}
    with gradflow.record(model) if record_all else nullcontext():
        for step in range(5):
            x = torch.randn(4, 6, 3)
            with gradflow.record(model) if record_each else nullcontext() as recording:
                output = model(x)
                if draw_one:
                    torch.rand(1)
                loss = (output**2).sum() + output[:, 0].sum()
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                loss.backward()
                optimizer.step()
            if recording is not None and step == 2:
                _ = [
                    (t.grad_h, t.grad_h_last, t.h, t.parity) for t in recording.values()
                ]  # reading too
            seen["outputs"].append(output.detach().clone())
            seen["losses"].append(loss.detach().clone())
            seen["grads"] += [p.grad.clone() for p in model.parameters()]
            seen["rng"].append(torch.get_rng_state())
    seen["weights"] = [p.detach().clone() for p in model.parameters()]
    seen["requires_grad"] = [torch.tensor(output.requires_grad)]
    return seen


@pytest.mark.parametrize(
    ("record_each", "record_all"),
    [(True, False), (False, True), (True, True)],
    ids=["each", "all", "both"],
)
def test_five_training_steps_are_bit_identical(record_each: bool, record_all: bool) -> None:
    plain, recorded = train(False, False), train(record_each, record_all)
    assert plain.keys() == recorded.keys()
    for what, expected in plain.items():
        for number, (a, b) in enumerate(zip(expected, recorded[what], strict=True)):
            assert torch.equal(a, b), f"{what}[{number}] differs"


class Behind(nn.Module):
    """A frozen transformer, which torch runs on a fast path of its own, and recurrences behind it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.front = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval()
        self.rnn = nn.LSTM(8, 6, 2, dropout=0.3, batch_first=True)
        self.cell = nn.GRUCell(6, 5)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for y in self.rnn(self.front(x))[0].unbind(1):
            h = self.drop(self.cell(y, h))
        return self.head(h)


def train_behind(recorded: bool) -> dict[str, Any]:
    """Twenty steps with a fused optimizer, a GradScaler and clipping."""
    torch.manual_seed(4)
    model = Behind()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    seen: dict[str, Any] = {"losses": [], "grads": [], "rng": []}
    for _ in range(20):
        x = torch.randn(3, 4, 8)
        block = gradflow.record(model, scaler=scaler) if recorded else nullcontext()
        with block as recording:
            loss = (model(x) ** 2).sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
        if recording is not None:
            assert [track.parity.status for track in recording.values()] == ["passed"] * 3
        seen["losses"].append(loss.detach().clone())
        seen["grads"] += [p.grad.clone() for p in trained]
        seen["rng"].append(torch.get_rng_state())
    seen["weights"] = [p.detach().clone() for p in trained]
    return seen


def test_twenty_steps_behind_a_frozen_transformer_are_bit_identical() -> None:
    plain, recorded = train_behind(False), train_behind(True)
    for what, expected in plain.items():
        for number, (a, b) in enumerate(zip(expected, recorded[what], strict=True)):
            assert torch.equal(a, b), f"{what}[{number}] differs"


def test_the_steps_would_differ_if_one_random_number_were_drawn() -> None:
    """Or the test above could not see a disturbed generator."""
    plain, drawn = train(False, False), train(False, False, draw_one=True)
    for what in ("outputs", "losses", "rng", "weights"):
        assert not torch.equal(plain[what][-1], drawn[what][-1])


def test_a_recording_is_exact_although_the_optimizer_stepped_inside() -> None:
    """With the weights of the forward pass, not those after optimizer.step()."""
    torch.manual_seed(1)
    model = nn.LSTM(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    reference = copy.deepcopy(model)
    with gradflow.record(reference) as expected:
        reference(x)[0][-1].sum().backward()
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert torch.equal(recording["l0"].grad_c, expected["l0"].grad_c)
    assert torch.equal(recording["l0"].weights["weight_hh"], reference.weight_hh_l0)
    assert recording["l0"].parity.status == "passed"


@pytest.mark.parametrize("how", ["data", "no_grad", "fused", "copy"])
def test_weights_changed_in_place_between_two_calls(how: str) -> None:
    """Version counters do not see `.data` and fused optimizers: values decide."""
    torch.manual_seed(1)
    model = nn.GRU(3, 4).double()
    before = copy.deepcopy(model)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with gradflow.record(model) as recording:
        model(x)[0].sum().backward()
        if how == "data":
            model.weight_hh_l0.data.mul_(2.0)
        elif how == "no_grad":
            with torch.no_grad():
                model.weight_hh_l0.mul_(2.0)
        elif how == "fused":
            torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()
        else:
            model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        after = copy.deepcopy(model)
        model(x)[0].sum().backward()
    for name, twin in (("l0", before), ("l0@2", after)):
        twin.zero_grad()
        with gradflow.record(twin) as expected:
            twin(x)[0].sum().backward()
        assert torch.equal(recording[name].weights["weight_hh"], twin.weight_hh_l0)
        assert torch.equal(recording[name].grad_h, expected["l0"].grad_h)


def test_tensors_changed_in_place_after_the_call() -> None:
    """Inputs, initial states and outputs the user overwrites do not change what was recorded."""
    torch.manual_seed(1)
    model = nn.LSTM(3, 4).double()
    x, h0 = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    c0 = torch.randn(1, 2, 4, dtype=torch.float64)
    with gradflow.record(model) as expected:
        out, _ = model(x, (h0, c0))
        (out.relu() ** 2).sum().backward()
    kept_x, kept_h0 = x.clone(), h0.clone()
    kept_out = out.detach().clone()
    with gradflow.record(model) as recording:
        out, _ = model(x, (h0, c0))
        out = out.relu_()  # an activation in place on what the module returned
        (out**2).sum().backward()
        for tensor in (x, h0, c0):
            tensor.zero_()
        out.detach().zero_()
    track = recording["l0"]
    assert torch.equal(track.inputs, kept_x)
    assert torch.equal(track.h0, kept_h0[0])
    assert torch.equal(track.h, kept_out)
    assert torch.equal(track.grad_h, expected["l0"].grad_h)
    assert torch.equal(track.grad_c, expected["l0"].grad_c)


# ------------------------------------------------------------------------------- left as found

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def fingerprint(model: nn.Module) -> list[tuple[str, object]]:
    """All that hooks and wrappers could leave behind on a model."""
    marks: list[tuple[str, object]] = []
    for path, module in model.named_modules():
        marks.append((f"{path}.__dict__", sorted(vars(module))))
        marks += [(f"{path}.{name}", dict(getattr(module, name))) for name in HOOK_DICTS]
        marks.append((f"{path}.class", type(module)))
        marks.append((f"{path}.training", module.training))
    for name, parameter in model.named_parameters():
        hooks = parameter._backward_hooks
        marks.append((f"{name} hooks", dict(hooks) if hooks else {}))
        after = parameter._post_accumulate_grad_hooks
        marks.append((f"{name} accumulate hooks", dict(after or {})))
        marks.append((f"{name} requires_grad", parameter.requires_grad))
        marks.append((f"{name} identity", id(parameter)))
    return marks


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    before = fingerprint(model)
    yield
    assert torch_is_as_found()
    assert fingerprint(model) == before


def explode_in_forward(model: Net, x: Tensor, error: BaseException) -> None:
    def hook(*_: object) -> None:
        raise error

    handle = model.rnn.register_forward_pre_hook(hook)  # two recurrent layers have run by then
    try:
        model(x)
    finally:
        handle.remove()


def explode_in_backward(model: Net, x: Tensor, error: BaseException) -> None:
    output = model.between(model.lstm(x)[0])

    def hook(_: Tensor) -> None:
        raise error

    output.register_hook(hook)
    model.gru(output)[0].sum().backward()


def explode_between(model: Net, x: Tensor, error: BaseException) -> None:
    loss = model(x).sum()
    if loss.requires_grad:
        raise error


@pytest.mark.parametrize(
    "explode", [explode_in_forward, explode_in_backward, explode_between], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_block_that_raises_leaves_everything_as_found(
    explode: Callable[[Net, Tensor, BaseException], None], kind: type[BaseException]
) -> None:
    model, x = Net(), torch.randn(4, 6, 3)
    error = kind("the user's own")
    with left_as_found(model):
        # the user's error, the very object, and no warning on top of it
        with pytest.raises(kind) as raised, gradflow.record(model):
            explode(model, x, error)
        assert raised.value is error
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    assert len(recording) == 7


def test_a_generator_that_is_closed_leaves_everything_as_found() -> None:
    model, x = Net(), torch.randn(4, 6, 3)

    def steps() -> Iterator[int]:
        with gradflow.record(model):
            for step in range(5):
                model(x).sum().backward()
                yield step

    with left_as_found(model):
        running = steps()
        assert next(running) == 0
        assert not torch_is_as_found()
        running.close()


def test_a_normal_exit_leaves_everything_as_found() -> None:
    model, x = Net(), torch.randn(4, 6, 3)
    with left_as_found(model), gradflow.record(model):
        model(x).sum().backward()


def test_the_users_own_hooks_and_patches_survive() -> None:
    model, x = Net(), torch.randn(4, 6, 3)
    calls: list[str] = []
    model.lstm.register_forward_hook(lambda *_: calls.append("hook"))
    original = model.gru.forward
    model.gru.forward = lambda *a, **k: (calls.append("forward"), original(*a, **k))[1]
    mine = model.gru.forward
    model.rnn.weight_hh_l0.register_hook(lambda g: calls.append("grad"))
    with left_as_found(model), gradflow.record(model) as recording:
        model(x).sum().backward()
    assert model.gru.forward is mine
    assert sorted(calls) == ["forward", "grad", "hook"]
    assert len(recording) == 7


def test_a_patch_made_before_the_recording_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tool's wrapper around torch._VF.lstm keeps being called, and is there afterwards."""
    calls: list[str] = []
    original = torch._VF.lstm

    def theirs(*args: Any) -> Any:
        calls.append("theirs")
        return original(*args)

    model = nn.LSTM(3, 4)
    monkeypatch.setitem(vars(torch._VF), "lstm", theirs)
    with gradflow.record(model) as recording:
        model(torch.randn(5, 2, 3))[0].sum().backward()
    assert torch._VF.lstm is theirs
    assert calls == ["theirs"]
    assert recording["l0"].backwards == 1


# ------------------------------------------------------------------------------ nesting, threads


def test_nested_recordings_see_the_same_and_restore_together() -> None:
    model, x = Net(), torch.randn(4, 6, 3)
    with left_as_found(model):
        with gradflow.record(model) as outer:
            with gradflow.record(model, layers="gru*") as inner:
                model(x).sum().backward()
            assert not torch_is_as_found()
            model(x).sum().backward()
    assert set(inner.tracks) == {"gru.l0", "gru.l1"}
    assert {"gru.l0", "gru.l1", "gru.l0@2", "gru.l1@2"} <= set(outer.tracks)
    assert torch.equal(inner["gru.l0"].grad_h, outer["gru.l0"].grad_h)
    assert inner["gru.l0"].backwards == outer["gru.l0"].backwards == 1


def test_recordings_closed_in_the_wrong_order() -> None:
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    first, second = gradflow.record(model), gradflow.record(model)
    with left_as_found(model):
        a, b = first.__enter__(), second.__enter__()
        model(x)[0].sum().backward()
        first.__exit__(None, None, None)
        model(x)[0].sum().backward()
        second.__exit__(None, None, None)
    assert set(a.tracks) == {"l0"}
    assert set(b.tracks) == {"l0", "l0@2"}


def test_two_models_are_not_mixed_up() -> None:
    mine, other, x = nn.LSTM(3, 4), nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with gradflow.record(mine) as recording:
        other(x)[0].sum().backward()
        mine(x)[0].sum().backward()
    assert set(recording.tracks) == {"l0"}
    assert torch.equal(recording["l0"].weights["weight_hh"], mine.weight_hh_l0)


def test_a_call_in_another_thread_is_not_recorded() -> None:
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    other = threading.Thread(target=lambda: model(x)[0].sum().backward())
    with gradflow.record(model) as recording:
        model(x)[0].sum().backward()
        other.start()
        other.join()
    assert set(recording.tracks) == {"l0"}
    assert recording["l0"].backwards == 1


def test_recordings_in_two_threads_at_once() -> None:
    models = [nn.LSTM(3, 4), nn.GRU(3, 4)]
    recordings: dict[int, gradflow.Recording] = {}
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        with gradflow.record(models[number]) as recording:
            barrier.wait()
            for _ in range(3):
                models[number](torch.randn(5, 2, 3))[0].sum().backward()
            barrier.wait()
        recordings[number] = recording

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [track.cell for track in recordings[0].values()] == ["LSTM"] * 3
    assert [track.cell for track in recordings[1].values()] == ["GRU"] * 3
    assert torch_is_as_found()


def test_a_penalty_on_gradients_stays_bit_identical_and_is_withheld() -> None:
    """create_graph=True: what reaches the layer then is not a total."""

    def step(model: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 30).reshape(5, 2, 3).requires_grad_()
        loss = model(x)[0].sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + (slope**2).sum()).backward()
        return [p.grad for p in model.parameters()]

    plain = nn.LSTM(3, 4)
    model = copy.deepcopy(plain)
    with pytest.warns(gradflow.GradflowWarning, match=r"create_graph"):
        with gradflow.record(model) as recording:
            grads = step(model)
    for a, b in zip(step(plain), grads, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(gradflow.errors.RecordingError, match=r"create_graph"):
        _ = recording["l0"].grad_h
    assert recording["l0"].h.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_checkpoint_is_recorded_once(reentrant: bool) -> None:
    model = nn.LSTM(3, 4, 2).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with gradflow.record(model) as expected:
        model(x)[0][-1].sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with gradflow.record(model) as recording:
        out = checkpoint(lambda v: model(v)[0], x, use_reentrant=reentrant)
        out[-1].sum().backward()
    assert set(recording.tracks) == {"l0", "l1"}
    for a, p in zip(grads, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)
    for name in ("l0", "l1"):
        assert torch.equal(recording[name].grad_h, expected[name].grad_h)
        assert torch.equal(recording[name].grad_c, expected[name].grad_c)
        assert recording[name].backwards == 1
