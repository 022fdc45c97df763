"""A recording in company: other tools of torch, hooks and patches of the user's, threads, Ctrl-C."""

# ruff: noqa: SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import FOUND, torch_is_as_found
from hostile import Cell, Everything, same, step
from seam import stitch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.errors import RecordingError
from gradflow.hooks import patch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


def x() -> Tensor:
    return torch.linspace(-1, 1, 30).reshape(5, 2, 3)


class Loop(nn.Module):
    """A loop over a cell."""

    def __init__(self, cell: nn.Module, start: torch.dtype | None = None) -> None:
        super().__init__()
        self.cell, self.start = cell, start

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 4, dtype=self.start or x.dtype)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


# --------------------------------------------------------------------------------- other dtypes


class Joined(nn.Module):
    """A cell that joins input and state."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(7, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.f(torch.cat([x, h.to(x.dtype)], 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["double", "bfloat16"])
def test_a_first_state_of_another_dtype(dtype: torch.dtype) -> None:
    """float32 zeros into a cell of another dtype: all is read, the first step too."""
    model = Loop(Joined().to(dtype), torch.float32)
    reference = Loop(copy.deepcopy(model.cell), dtype)
    with gradflow.record(model) as recording:
        model(x().to(dtype)).sum().backward()
    with gradflow.record(reference) as expected:
        reference(x().to(dtype)).sum().backward()
    assert recording["cell"].notes == []
    assert torch.equal(recording["cell"].grad_h, expected["cell"].grad_h)
    mine = gradflow.analyzer.step_jacobians(recording["cell"])
    theirs = gradflow.analyzer.step_jacobians(expected["cell"])
    bound = 1e-6 if dtype is torch.float64 else 2e-2
    torch.testing.assert_close(mine, theirs, rtol=bound, atol=0)
    assert len(gradflow.analyze(recording).layers) == 1


# ------------------------------------------------------------------------- torch.jit, torch.export


def gated(z: Tensor, h: Tensor) -> Tensor:
    """A gate of torch.jit.script."""
    a, b = z.chunk(2, 1)
    return torch.sigmoid(a) * h + torch.tanh(b)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit.script is deprecated
    gated = torch.jit.script(gated)


class Scripted(nn.Module):
    """A cell whose gate is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(3, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return gated(self.x(x) + self.h(h), h)


@pytest.mark.parametrize("warm", [0, 3], ids=["cold", "warm"])
def test_a_scripted_function_in_a_cell_has_totals_and_no_jacobians(warm: int) -> None:
    model = Loop(Scripted())
    for _ in range(warm):
        model(x()).sum().backward()
    for _ in range(3):
        with gradflow.record(model) as recording:
            model(x()).sum().backward()
    for _ in range(3):  # the user's own graph is whole
        model(x()).sum().backward()
    assert recording["cell"].grad_h.shape == (5, 2, 4)
    with pytest.raises(RecordingError, match=r"a function of torch\.jit\.script") as raised:
        recording["cell"].operator().push(1, torch.zeros(2, 1, 4, dtype=torch.float64))
    assert len(str(raised.value)) <= 300


@pytest.mark.parametrize(
    "tool",
    [
        lambda model: torch.jit.trace(model, (x(),), check_trace=False),
        lambda model: torch.export.export(model, (x(),), strict=False),
        lambda model: torch.export.export(model, (x(),), strict=True),
    ],
    ids=["trace", "export", "export strict"],
)
def test_a_model_is_traced_and_exported_inside_a_block(tool: Callable[[nn.Module], Any]) -> None:
    model = Everything().eval()
    with gradflow.record(model) as recording:
        tool(model)
    torch._dynamo.reset()
    assert list(recording.tracks) == []
    assert torch_is_as_found()


def test_modules_are_scripted_inside_a_block() -> None:
    model = Loop(Cell())
    with gradflow.record(model) as recording:
        scripted = [torch.jit.script(m) for m in (Cell(), nn.LSTM(3, 4), nn.GRUCell(3, 4))]
        model(x()).sum().backward()
    assert all(isinstance(module, torch.jit.ScriptModule) for module in scripted)
    assert list(recording.tracks) == ["cell"]
    assert recording["cell"].steps == 5


def test_a_tap_breaks_no_graph_of_torch_compile() -> None:
    def tapped(x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 3)
        for x_t in x:
            h = gradflow.tap(h=torch.tanh(x_t + h))
        return h

    model, plain = nn.Linear(1, 1), tapped(x())
    with gradflow.record(model):
        assert torch.equal(torch.compile(tapped, backend="eager", fullgraph=True)(x()), plain)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------ torch.func


@pytest.mark.parametrize(
    "kind", [nn.GRUCell, nn.RNNCell, lambda *_: Cell()], ids=["gru", "rnn", "own"]
)
def test_calls_under_a_transform_are_left_out_and_those_beside_it_are_not(kind: Any) -> None:
    model = Loop(kind(3, 4))
    stacked, _ = stack_module_state([copy.deepcopy(model) for _ in range(3)])
    weights = dict(model.named_parameters())

    def transformed() -> Tensor:
        ensemble = vmap(lambda p: functional_call(model, p, (x(),)))(stacked)
        each = vmap(grad(lambda p, s: functional_call(model, p, (s[:, None],)).sum()), (None, 1))
        slope = jacrev(model)(x())
        return ensemble.sum() + slope.sum() + sum(g.sum() for g in each(weights, x()).values())

    plain = transformed()
    with gradflow.record(model) as alone:
        assert torch.equal(transformed(), plain)
    assert len(alone) == 0
    assert "transform of torch.func" in alone.empty_reason
    with gradflow.record(model) as recording:
        model(x()).sum().backward()
        transformed()
    assert list(recording.tracks) == ["cell"]
    assert any("left out: cell" in note for note in recording.notes)
    assert gradflow.analyze(recording)["cell"].verdict


def test_a_functional_call_without_a_transform_is_a_call_like_others() -> None:
    model = Loop(nn.GRUCell(3, 4))
    with gradflow.record(model) as recording:
        functional_call(model, dict(model.named_parameters()), (x(),)).sum().backward()
    assert list(recording.tracks) == ["cell"]
    assert recording["cell"].has_gradient


@pytest.mark.parametrize("kind", ["fused", "stock", "own"])
def test_tensors_that_compute_in_their_own_way_are_left_out(kind: str) -> None:
    cells = {"stock": lambda: nn.GRUCell(3, 4), "own": Cell}
    model = nn.LSTM(3, 4) if kind == "fused" else Loop(cells[kind]())
    with gradflow.record(model) as recording:
        result = model(TwoTensor(x(), x()))
        (result[0] if kind == "fused" else result).sum().backward()
    assert len(recording) == 0
    assert "tensors of a class that computes with them in its own way" in recording.empty_reason


# ------------------------------------------------------------------------------ batched gradients


@pytest.mark.parametrize("plain_too", [False, True], ids=["alone", "beside a plain one"])
@pytest.mark.parametrize("kind", ["fused", "stock", "own"])
def test_batched_gradients_are_not_counted(kind: str, plain_too: bool) -> None:
    cells = {"stock": lambda: nn.GRUCell(3, 4), "own": Cell}
    model = nn.LSTM(3, 4) if kind == "fused" else Loop(cells[kind]())

    def last(v: Tensor) -> Tensor:
        return model(v)[0][-1] if kind == "fused" else model(v)

    def go(recording: bool) -> tuple[list[Tensor], Any]:
        v = x().requires_grad_()
        with gradflow.record(model) if recording else nullcontext() as found:
            out = last(v)
            batched = torch.autograd.grad(
                out[0], v, torch.eye(4), is_grads_batched=True, retain_graph=plain_too
            )
            jacobian = torch.autograd.functional.jacobian(last, x(), vectorize=True)
            if plain_too:
                out.sum().backward()
        return [*batched, jacobian], found

    (expected, _), (seen, recording) = go(False), go(True)
    for a, b in zip(expected, seen, strict=True):
        assert torch.equal(a, b)
    track = next(iter(recording.values()))
    if plain_too:
        assert track.backwards == 1
        assert track.has_gradient
        assert any("several outputs at once" in note for note in track.notes)
    else:
        assert not track.has_gradient
        assert "several outputs at once" in track.why_no_gradient


# ---------------------------------------------------------------------- what the user would notice


class Shared(Cell):
    """A part that gives itself as its copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class Unwilling(Cell):
    """A part that cannot be copied, and says so in its own way."""

    class Refusal(Exception):
        """Of nobody's hierarchy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unwilling:
        raise self.Refusal("line one\nline two")


class Counted(Tensor):
    """A subclass that counts what is done with it."""

    count = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counted.count += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Counting(TorchDispatchMode):
    """A mode that counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def hooked(model: nn.Module, heard: list[str]) -> None:
    """Hooks of every kind on a model and its parts."""
    for module in model.modules():
        module.register_forward_hook(lambda *_: heard.append("forward"))
        module.register_forward_pre_hook(lambda *_: heard.append("pre"))
    for weight in model.parameters():
        weight.register_hook(lambda _: heard.append("grad"))
        weight.register_post_accumulate_grad_hook(lambda _: heard.append("accumulated"))


@contextmanager
def everywhere(heard: list[str]) -> Iterator[None]:
    handles = [
        nn.modules.module.register_module_forward_hook(lambda *_: heard.append("forward")),
        nn.modules.module.register_module_forward_pre_hook(lambda *_: heard.append("pre")),
    ]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def packed(heard: list[str]) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        heard.append("pack")
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        heard.append("unpack")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def run_counted(how: str, cell: type[nn.Module], recorded: bool) -> list[Any]:
    """What a user would count of one step, and its gradients."""
    torch.manual_seed(0)
    model, heard, given = Loop(cell()), list[str](), x()
    if how == "hooks":
        hooked(model, heard)
    if how == "subclass":
        given, Counted.count = x().as_subclass(Counted), 0
    if how == "packs in the cell":
        inner = model.cell.forward

        def forward(*args: Any) -> Tensor:
            with packed(heard):
                return inner(*args)

        model.cell.forward = forward  # type: ignore[method-assign]
    if how == "checkpointed step":
        step = model.cell

        def run(x_t: Tensor, h: Tensor) -> Tensor:
            heard.append("ran")
            return step(x_t, h)

        def whole(x: Tensor) -> Tensor:
            h = torch.zeros(2, 4)
            for x_t in x:
                h = gradflow.tap(h=checkpoint(run, x_t, h, use_reentrant=False))
            return h

        model.forward = whole  # type: ignore[method-assign]
    mode = Counting()
    around: Any = {"global hooks": everywhere(heard), "packs": packed(heard), "mode": mode}
    with gradflow.record(model) if recorded else nullcontext():
        with around.get(how, nullcontext()):
            model(given).sum().backward()
    grads = [p.grad for p in model.parameters()]
    return [
        heard,
        Counted.count if how == "subclass" else 0,
        mode.count,
        len(model.cell._forward_hooks),
        *grads,
    ]


@pytest.mark.parametrize("cell", [Cell, Shared, Unwilling, Joined])
@pytest.mark.parametrize(
    "how",
    [
        "hooks",
        "global hooks",
        "packs",
        "packs in the cell",
        "mode",
        "subclass",
        "checkpointed step",
    ],
)
def test_nothing_of_the_users_hears_of_a_recording(how: str, cell: type[nn.Module]) -> None:
    plain, seen = run_counted(how, cell, False), run_counted(how, cell, True)
    assert plain[:4] == seen[:4]
    for a, b in zip(plain[4:], seen[4:], strict=True):
        assert torch.equal(a, b)


def test_a_cell_that_cannot_be_copied_says_so_in_one_line() -> None:
    model = Loop(Unwilling())
    with gradflow.record(model) as recording:
        model(x()).sum().backward()
    (note,) = recording["cell"].notes
    assert "cannot be run on a copy" in note
    assert "line one" in note
    assert "line two" not in note


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_hook_of_the_users_that_raises_is_what_the_user_sees(where: str) -> None:
    model = Everything()

    def fails(*_: Any) -> None:
        raise LookupError("the user's own")

    if where == "forward":
        model.cell.register_forward_hook(fails)
    else:
        model.cell.h.weight.register_hook(fails)
    with pytest.raises(LookupError, match="the user's own"):
        step(model)
    assert torch_is_as_found()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "double backward"])
def test_anomaly_mode_and_a_double_backward(twice: bool) -> None:
    def run(recorded: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, given = Everything(), x().requires_grad_()
        block = gradflow.record(model) if recorded else nullcontext()
        with torch.autograd.detect_anomaly(), block:
            loss = model(given).pow(2).sum()
            if twice:
                (slope,) = torch.autograd.grad(loss, given, create_graph=True)
                loss = loss + slope.pow(2).sum()
            loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------- patches of other tools


def test_a_patch_made_inside_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    model = nn.LSTM(3, 4)
    with gradflow.record(model) as recording:
        inner = torch._VF.lstm
        torch._VF.lstm = theirs = lambda *args: (heard.append(1), inner(*args))[1]
        model(x())[0].sum().backward()
    assert torch._VF.lstm is theirs
    with gradflow.record(model) as again:  # our wrapper of then lies between theirs and torch's
        model(x())[0].sum().backward()
    assert torch._VF.lstm is theirs
    assert heard == [1, 1]
    assert list(recording.tracks) == list(again.tracks) == ["l0"]
    torch._VF.lstm = inner  # as they would: what they found
    model(x())
    with gradflow.record(model) as third:
        model(x())
    assert list(third.tracks) == ["l0"]
    assert torch_is_as_found()


def test_a_forward_patched_inside_is_not_undone() -> None:
    class Mine(Cell):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return super().forward(x, h)

    model, heard = Loop(Mine()), list[int]()
    original = Mine.forward
    with gradflow.record(model, jacobians=False):  # which run the first step again, on a copy
        inner = Mine.forward
        Mine.forward = theirs = lambda *a: (heard.append(1), inner(*a))[1]  # type: ignore[method-assign]
        model(x())
    assert Mine.forward is theirs
    with gradflow.record(model, jacobians=False) as recording:
        model(x()).sum().backward()
    assert recording["cell"].steps == 5
    assert Mine.forward is theirs
    assert len(heard) == 10
    Mine.forward = inner  # type: ignore[method-assign]
    with gradflow.record(model):
        model(x())
    assert Mine.forward is original


# ----------------------------------------------------------------------------- interrupts and forks


def test_ctrl_c_while_a_recording_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(scale: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(patch, "_watched_scale", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with gradflow.record(nn.LSTM(3, 4)):
            pass
    assert torch_is_as_found()
    assert not patch.is_observed()


def test_ctrl_c_inside_a_hook_is_what_the_user_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = stitch.Chain.add, list[int]()

    def interrupted(self: stitch.Chain, call: Any, link: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            self.calls.append(call)  # half done
            raise KeyboardInterrupt
        add(self, call, link)

    monkeypatch.setattr(stitch.Chain, "add", interrupted)
    model = Loop(nn.GRUCell(3, 4))
    with pytest.raises(KeyboardInterrupt):
        with gradflow.record(model) as recording:
            model(x())
    assert torch_is_as_found()
    assert list(recording.tracks) == []
    assert "KeyboardInterrupt" in recording.empty_reason


FORK = """
import os, signal, threading, torch, gradflow, warnings
warnings.simplefilter("ignore"); torch.set_num_threads(1)
stop, m, x = threading.Event(), torch.nn.LSTM(3, 4), torch.randn(5, 2, 3)
def spin():
    while not stop.is_set():
        with gradflow.record(m): pass
thread = threading.Thread(target=spin); thread.start(); hung = 0
for _ in range(6):
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        with gradflow.record(m) as r: m(x)[0].sum().backward()
        os._exit(len(r) != 1)
    hung += os.waitpid(child, 0)[1] != 0
stop.set(); thread.join(); print("hung", hung)
"""


def test_a_fork_while_another_thread_opens_recordings_does_not_hang() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "hung 0\n", done.stderr


def test_a_child_that_is_forked_inside_a_block_goes_on_alone() -> None:
    model, read, write = nn.LSTM(3, 4), *os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside other threads
        with gradflow.record(model) as recording:
            child = os.fork()
            model(x())
            if child == 0:
                signal.alarm(20)
                os.write(write, str(list(recording.tracks)).encode())
                os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"['l0']"
    assert list(recording.tracks) == ["l0"]


def test_other_threads_are_left_alone() -> None:
    """A block in one thread, plain steps in another: bit-identical, and nothing is mixed up."""
    models = [Everything() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    expected, _ = step(models[1], recorded=False)
    found: list[Any] = []
    with gradflow.record(models[0]):
        thread = threading.Thread(target=lambda: found.append(step(models[1], recorded=False)[0]))
        thread.start()
        thread.join()
    assert same(expected, found[0]) == []
    assert torch._VF.lstm is FOUND["lstm"]


@pytest.mark.parametrize(
    "layers", ["rnns.0.module.l0", "rnns.0.l0", "rnns.*.module.*", ["rnns.0.module"]]
)
def test_layers_are_picked_by_the_paths_of_modules_too(layers: Any) -> None:
    """`module` is dropped from the names of tracks, but stands in those of the modules."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnns, self.other = nn.ModuleList([Wrapper()]), nn.GRU(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.rnns[0](x))[0]

    model = Net()
    with gradflow.record(model, layers=layers) as recording:
        model(x()).sum().backward()
    assert list(recording.tracks) == ["rnns.0.l0"]
