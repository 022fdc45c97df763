"""Models on an accelerator: the numbers of the CPU, and how often the accelerator is asked.

The accelerator is a pretend one (`pretend_accelerator`), which no machine lacks: it refuses tensors
of two devices as a GPU does, and counts its kernels and how often the host waits for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pretend_accelerator
import pytest
import torch
from cases import CASES, Case, Setup, build, call, loss_of
from torch import Tensor, nn

import gradflow
from gradflow.recording import Recording

STEPS, BATCH, INPUTS, HIDDEN = 12, 3, 4, 5
DEVICE = pretend_accelerator.install()


class Loop(nn.Module):
    """A loop over a cell of torch's; every `cut` steps its state is detached."""

    def __init__(self, kind: str, cut: int = 0) -> None:
        super().__init__()
        self.cell, self.cut = getattr(nn, kind)(INPUTS, HIDDEN), cut

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        both = isinstance(self.cell, nn.LSTMCell)
        state, found = ((h, h) if both else h), []
        for t, x_t in enumerate(x):
            if self.cut and t and t % self.cut == 0:
                state = tuple(s.detach() for s in state) if both else state.detach()
            state = self.cell(x_t, state)
            found.append(state[0] if both else state)
        return torch.stack(found)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(INPUTS + HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.cat([x, h], 1)))


class OwnCell(nn.Module):
    """A loop over a cell of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Parts()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


class Tapped(OwnCell):
    """A loop that marks its states."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        for x_t in x:
            h = torch.tanh(self.cell.mix(torch.cat([x_t, h], 1)))
            h = gradflow.tap(h=h)
        return h


class Decoder(nn.Module):
    """A cell that reads its own output: a closed loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(INPUTS, HIDDEN), nn.Linear(HIDDEN, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        h, y = x.new_zeros(x.shape[1], HIDDEN), x[0]
        for _ in x:
            h = self.cell(y, h)
            y = self.out(h)
        return h


class Mixer(nn.Module):
    """A linear recurrence, named with one line."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.read = nn.Linear(INPUTS, HIDDEN), nn.Linear(INPUTS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        decay, write, h = self.gate(x).sigmoid(), self.read(x), None
        found = []
        for a, b in zip(decay, write, strict=True):
            h = (1 - a) * b if h is None else a * h + (1 - a) * b
            found.append(h)
        return gradflow.scan(torch.stack(found), decay=decay, name="mixer")


class Layers(nn.Module):
    """A fused stack."""

    def __init__(self, kind: str, **settings: bool | int) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(INPUTS, HIDDEN, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Layers("LSTM", bidirectional=True),
    "GRU": lambda: Layers("GRU", num_layers=2),
    "RNN": lambda: Layers("RNN"),
    "LSTMCell": lambda: Loop("LSTMCell"),
    "GRUCell, cut": lambda: Loop("GRUCell", cut=4),
    "own cell": OwnCell,
    "tap": Tapped,
    "closed loop": Decoder,
    "scan": Mixer,
}


def recorded(model: nn.Module, x: Tensor) -> Recording:
    with gradflow.record(model) as recording:
        model(x).square().sum().backward()
    return recording


def both(name: str, steps: int = STEPS) -> tuple[Recording, Recording]:
    """One step of a model on the CPU, and of its copy on the accelerator."""
    torch.manual_seed(3)
    model, x = MODELS[name]().double(), torch.randn(steps, BATCH, INPUTS).double()
    return recorded(model, x), recorded(copy.deepcopy(model).to(DEVICE), x.to(DEVICE))


def assert_close(here: Tensor, there: Tensor, eps: float = 1e-13) -> None:
    """Equal up to a few roundings of the largest entry, however small that is."""
    assert there.device.type == pretend_accelerator.NAME
    there = there.cpu()
    assert torch.equal(here.isnan(), there.isnan())
    size = here.nan_to_num(0.0).abs().max()
    assert ((here - there).nan_to_num(0.0).abs() <= eps * size).all()


def test_the_comparison_can_fail() -> None:
    one = torch.tensor([1e-200], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(one, (one * (1 + 1e-12)).to(DEVICE))


def test_two_devices_are_refused_as_a_gpu_does() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2).to(DEVICE).mul_(torch.ones(2))


def on_accelerator(setup: Setup) -> Setup:
    hx = setup.hx
    if hx is not None:
        hx = (hx[0].to(DEVICE), None if hx[1] is None else hx[1].to(DEVICE))
    return replace(setup, module=setup.module.to(DEVICE), x=setup.x.to(DEVICE), hx=hx)


def step_of(setup: Setup, exact: bool = True) -> Recording:
    torch.manual_seed(5)
    with gradflow.record(setup.module, exact=exact) as recording:
        loss_of(setup, call(setup)[0]).backward()
    return recording


# a pretend accelerator has no random numbers of its own
DRAWING_NONE = [case for case in CASES if not case.dropout]


@pytest.mark.parametrize("case", DRAWING_NONE, ids=str)
def test_fused_layers_have_the_numbers_of_the_cpu(case: Case) -> None:
    here, there = step_of(build(case)), step_of(on_accelerator(build(case)))
    eps = 1e-12 if case.dtype == "float64" else 2e-5
    assert list(here.keys()) == list(there.keys())
    for mine, theirs in zip(here.values(), there.values(), strict=True):
        for name, grad in mine.grads.items():
            assert_close(grad, theirs.grads[name], eps)
        assert_close(mine.grad_h_direct, theirs.grad_h_direct, eps)
        assert theirs.parity.status == "passed"


@pytest.mark.parametrize("case", DRAWING_NONE[::4], ids=str)
def test_so_have_phantom_inputs(case: Case) -> None:
    here, there = step_of(build(case)), step_of(on_accelerator(build(case)), exact=False)
    eps = 1e-12 if case.dtype == "float64" else 2e-5
    for mine, theirs in zip(here.values(), there.values(), strict=True):
        for name, grad in mine.grads.items():
            assert_close(grad, theirs.grads[name], eps)
        assert theirs.source.loop.groups[0].call.inner_known or mine.steps == 1  # type: ignore[attr-defined]
        assert theirs.parity.status == "passed"


@pytest.mark.parametrize(("cell", "rounds"), [("LSTM", 8), ("GRU", 4), ("RNN", 0)])
def test_calls_for_totals_through_phantom_inputs_do_not_grow_with_the_steps(
    cell: str, rounds: int
) -> None:
    """But for rounds of doubled strides: four calls each, with one scan of states and one back."""
    calls = []
    for steps in (20, 40, 80):
        model = getattr(nn, cell)(INPUTS, HIDDEN).to(DEVICE)
        with gradflow.record(model, exact=False) as recording:
            model(torch.randn(steps, BATCH, INPUTS).to(DEVICE))[0].square().sum().backward()
        with pretend_accelerator.counted() as counts:
            recording["l0"].grads  # noqa: B018
        calls.append(counts.calls)
    assert [calls[1] - calls[0], calls[2] - calls[1]] == [rounds, rounds]


def assert_alike(mine: np.ndarray, theirs: np.ndarray, name: str) -> None:
    if mine.dtype.kind != "f":
        assert np.array_equal(mine, theirs), name
        return
    if name in ("log_singular", "rank_effective"):  # of the tiniest the logarithm is rounding
        mine, theirs = np.exp(mine), np.exp(theirs)
    assert np.array_equal(np.isnan(mine), np.isnan(theirs)), name
    with np.errstate(invalid="ignore"):
        close = np.isclose(mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert close.all(), name


@pytest.mark.parametrize("name", MODELS)
def test_analyses_are_those_of_the_cpu(name: str) -> None:
    here, there = (gradflow.analyze(recording) for recording in both(name))
    assert list(here.keys()) == list(there.keys())
    for mine, theirs in zip(here.values(), there.values(), strict=True):
        assert mine.sentence == theirs.sentence
        assert [f.name for f in mine.findings] == [f.name for f in theirs.findings]
        for variable in mine.data.data_vars:
            assert_alike(mine.data[variable].values, theirs.data[variable].values, str(variable))


@pytest.fixture
def as_default() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", ["GRU", "own cell", "tap", "scan"])
def test_the_default_device_may_be_an_accelerator(name: str, as_default: None) -> None:
    """After torch.set_default_device("cuda") models and batches are made there."""
    model, x = MODELS[name]().double(), torch.randn(STEPS, BATCH, INPUTS).double()
    recording = recorded(model, x)
    torch.set_default_device(None)
    expected = gradflow.analyze(recorded(model.cpu(), x.cpu()))
    torch.set_default_device(DEVICE)
    found = gradflow.analyze(recording)
    assert [layer.sentence for layer in found.values()] == [
        layer.sentence for layer in expected.values()
    ]
    assert len(gradflow.what_if(recording, clip=1.0)) == len(found)


def test_what_if_and_saving(tmp_path: Path) -> None:
    here, there = both("GRU")
    tried = [gradflow.what_if(recording, scale_hh=1.5) for recording in (here, there)]
    assert tried[0].rate_after.values == pytest.approx(tried[1].rate_after.values, rel=1e-9)
    gradflow.analyze(there).save(tmp_path / "run.nc")
    assert "rnn.l1" in gradflow.load(tmp_path / "run.nc")


@pytest.mark.parametrize("name", MODELS)
def test_the_host_does_not_wait_at_every_step(name: str) -> None:
    """An analysis waits for the accelerator about equally often, however long the sequences are.

    A few more times where distances of 1, 2, 4, … steps are one more.
    """
    waits = []
    for steps in (10, 20):
        _, recording = both(name, steps)
        with pretend_accelerator.counted() as counts:
            gradflow.analyze(recording)
        waits.append(counts.synchronisations)
    per_step = (waits[1] - waits[0]) / 10
    assert per_step <= AT_EVERY_STEP.get(name, 1.0), waits


# cells of torch's are called step by step: what lies between two calls is looked at call by call
# (a third of LSTMCell's are of the chrono initialisation, which is tried as a remedy)
AT_EVERY_STEP = {"LSTMCell": 24, "GRUCell, cut": 16, "closed loop": 40}


def test_kernel_calls_of_a_step() -> None:
    """What recording, reading totals and analysis ask of the accelerator, for each step."""
    found = []
    for steps in (20, 40):
        torch.manual_seed(3)
        model = Layers("LSTM").to(DEVICE)
        x = torch.randn(steps, BATCH, INPUTS).to(DEVICE)
        with pretend_accelerator.counted() as plain:
            model(x).square().sum().backward()
        with pretend_accelerator.counted() as record:
            recording = recorded(model, x)
        with pretend_accelerator.counted() as totals:
            recording["rnn.l0"].grads  # noqa: B018
        with pretend_accelerator.counted() as analysis:
            gradflow.analyze(recording)
        found.append((record.calls - plain.calls, totals.calls, analysis.calls))
    added, read, analyzed = [(later - one) / 20 for one, later in zip(*found, strict=True)]
    assert (added, read, analyzed) == (0, 5.2, 23.6)  # with two remedies of each layer tried
