"""Layers and mapped sequences made side by side by an executor: the same analysis, bit for bit."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from closed_loops import Decoder, TwoCells, made
from own_cells import HIDDEN, INPUTS, Peephole
from torch import Tensor, nn

import gradflow
from gradflow.analysis import Analysis
from gradflow.errors import InputError
from gradflow.recording import chosen


def recorded(model: nn.Module, x: Tensor) -> gradflow.Recording:
    """One step of a model."""
    with gradflow.record(model) as recording:
        model(x)[0].square().sum().backward()
    return recording


def assert_same(one: Analysis, other: Analysis) -> None:
    """Every array and every word."""
    assert list(one.layers) == list(other.layers)
    assert one.warnings == other.warnings and one.provenance == other.provenance
    for name, layer in one.layers.items():
        assert layer.data.identical(other[name].data), name
        assert (layer.sentence, layer.verdict) == (other[name].sentence, other[name].verdict)
        assert layer.findings == other[name].findings


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "threads": lambda: ThreadPoolExecutor(2),
    "processes": lambda: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")),
}


@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_it_is_the_serial_analysis_bit_for_bit(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(25, 5, 3, dtype=torch.float64)
    models = [nn.LSTM(3, 9, 3).double(), nn.GRU(3, 40, 2, bidirectional=True).double()]
    with EXECUTORS[kind]() as executor:
        for model in models:
            recording = recorded(model, x)
            serial = gradflow.analyze(recording, maps=2)
            assert_same(serial, gradflow.analyze(recording, maps=2, executor=executor))
    with pytest.raises(AssertionError):
        assert_same(serial, gradflow.analyze(recording, maps=1))


class Kind(nn.Module):
    """Layers of one kind; a call is one step of training."""

    def __init__(self, run: Callable[..., None], **parts: nn.Module) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleDict(parts).double()

    def forward(self) -> None:
        self.run(**self.parts)


def padded(lstm: nn.Module) -> None:
    lengths = torch.tensor([20, 7, 13, 20])
    x = torch.randn(20, 4, 3, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    lstm(packed)[1][0].square().sum().backward()


def pooled(gru: nn.Module) -> None:
    """One sequence at a time, of several lengths."""
    runs = [gru(torch.randn(n, 1, 3, dtype=torch.float64))[0][-1] for n in (20, 12, 17)]
    torch.cat(runs).square().sum().backward()


def cut(lstm: nn.Module) -> None:
    """Chunks whose state goes on detached."""
    state, loss = None, torch.zeros(())
    for _ in range(3):
        y, state = lstm(torch.randn(8, 3, 3, dtype=torch.float64), state)
        state, loss = (state[0].detach(), state[1].detach()), loss + y.square().sum()
    loss.backward()


def closed(**models: nn.Module) -> None:
    for model in models.values():
        torch.stack([sum(state.values()) for state in model()]).square().sum().backward()


def own(cell: nn.Module, weights: nn.Linear) -> None:
    """A cell of the user's own, and a loop by hand that marks its states."""
    h, c = torch.zeros(2, 4, HIDDEN).double()
    s = torch.zeros(4, 5).double()
    for x in torch.randn(18, 4, INPUTS).double():
        h, c = cell(x, h, c)
        s = gradflow.tap(h=torch.tanh(weights(torch.cat([x, s], 1))))
    (h.square().sum() + s.square().sum()).backward()


def linear(head: nn.Module) -> None:
    """A linear recurrence with a decay for each unit, and one with a matrix memory."""
    x = head(torch.randn(3, 24, 6).double())
    keys = nn.functional.normalize(torch.randn(3, 24, 1, 4).double(), dim=-1)
    decay, beta, states, memories = x.sigmoid(), torch.rand(3, 24, 1).double(), [], []
    h, M = torch.zeros(3, 6).double(), torch.zeros(3, 1, 4, 6).double()
    for t in range(24):
        h = decay[:, t] * h + x[:, t]
        k, b = keys[:, t, :, :, None], beta[:, t, :, None, None]
        M = 0.95 * (M - b * k @ (k.mT @ M)) + b * k @ x[:, t, None, None]
        states, memories = [*states, h], [*memories, M]
    kept = torch.full((3, 24, 1), 0.95).double()
    units = gradflow.scan(torch.stack(states, 1), decay=decay, name="units")
    memory = gradflow.scan(
        torch.stack(memories, 1), decay=kept, keys=keys, beta=beta, name="memory"
    )
    (units.square().sum() + memory.square().sum()).backward()


KINDS: dict[str, tuple[Callable[[], Kind], int]] = {  # and how many layers it has
    "padded": (lambda: Kind(padded, lstm=nn.LSTM(3, 6, 2, proj_size=4)), 2),
    "pooled": (lambda: Kind(pooled, gru=nn.GRU(3, 5)), 1),
    "cut": (lambda: Kind(cut, lstm=nn.LSTM(3, 5)), 1),
    "closed": (lambda: Kind(closed, one=made(Decoder, nn.LSTMCell), two=made(TwoCells)), 4),
    "own": (lambda: Kind(own, cell=Peephole(), weights=nn.Linear(INPUTS + 5, 5)), 2),
    "linear": (lambda: Kind(linear, head=nn.Linear(6, 6)), 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_all_kinds_of_layers_are_as_one_after_the_other(kind: str, way: str) -> None:
    torch.manual_seed(0)
    make, layers = KINDS[kind]
    model = make()
    with gradflow.record(model) as recording:
        model()
    with EXECUTORS[way]() as executor:
        for maps in (1, 2):
            serial = gradflow.analyze(recording, maps=maps)
            assert len(serial) == layers
            assert_same(serial, gradflow.analyze(recording, maps=maps, executor=executor))


class Counting(ThreadPoolExecutor):
    """Notes what it was given to do."""

    def __init__(self) -> None:
        super().__init__(2)
        self.made: list[str] = []

    def submit(self, function, /, *arguments, **names):  # type: ignore[no-untyped-def]
        self.made.append(f"{arguments[1].__module__}.{arguments[1].__name__}")
        return super().submit(function, *arguments, **names)


@pytest.mark.parametrize("options", [{"method": "exact"}, {"stride": 3}], ids=str)
def test_the_mapped_sequences_of_one_layer_are_spread(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([30, 21, 30, 9, 30, 30])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    model = nn.GRU(3, 40).double()
    with gradflow.record(model) as recording:
        model(packed)[1].square().sum().backward()
    serial = gradflow.analyze(recording, maps=4, **options)
    with Counting() as executor:
        assert_same(serial, gradflow.analyze(recording, maps=4, executor=executor, **options))
    assert executor.made.count("gradflow.analyzer.plan._of_sequence") == 4
    assert executor.made.count("gradflow.analyzer.ranks._of_sequence") == 4


def test_what_is_no_executor_or_cannot_be_sent_is_said() -> None:
    recording = recorded(nn.LSTM(3, 4), torch.randn(9, 2, 3))
    with pytest.raises(
        InputError, match=r"executor must be a concurrent\.futures\.Executor, got int"
    ):
        gradflow.analyze(recording, executor=3)  # type: ignore[arg-type]
    (track,) = recording.values()
    track.__dict__["own"] = lambda: None  # what pickle cannot take

    class Pickling(Executor):
        def submit(self, function, /, *arguments, **names):  # type: ignore[no-untyped-def]
            future: Future[object] = Future()
            with pytest.raises(AttributeError) as caught:
                pickle.dumps(arguments)
            future.set_exception(caught.value)
            return future

    with pytest.raises(InputError, match=r"l0 cannot be sent there .*give a ThreadPoolExecutor"):
        gradflow.analyze(recording, executor=Pickling())


def test_some_sequences_of_a_track_can_be_sent() -> None:
    """A source made from another one has none while it is unpacked, and must not look for it."""
    (track,) = recorded(nn.LSTM(3, 4), torch.randn(9, 3, 3)).values()
    some = chosen(track, [2, 0])
    again = pickle.loads(pickle.dumps(some))  # noqa: S301
    assert torch.equal(again.h, track.h[:, [2, 0]]) and again.parity == track.parity
