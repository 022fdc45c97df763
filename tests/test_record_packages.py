"""Recurrent models from packages on the index, by other authors; each test runs where its package is.

    pip install ncps snntorch minGRU-pytorch pytorch-crf sb3-contrib xlstm

Totals are held against what autograd keeps on the tensors that the package's own cells return.
"""

# ruff: noqa: SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import compare
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.errors import GradflowWarning
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")


def package(name: str) -> Any:
    """The package, whose own warnings are not ours, or a skipped test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@contextmanager
def their_warnings() -> Iterator[None]:
    """Only gradflow's own warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", GradflowWarning)
        yield


def returned_by(cell: nn.Module, run: Callable[[], Tensor]) -> list[tuple[Tensor, ...]]:
    """What a cell returned at every step, with the gradients of the summed result kept."""
    kept: list[tuple[Tensor, ...]] = []
    plain = cell.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        tensors = result if isinstance(result, tuple) else (result,)
        for tensor in tensors:
            tensor.retain_grad()
        kept.append(tensors)
        return result

    cell.forward = forward  # some packages call it directly, past all hooks
    with their_warnings():
        run().sum().backward()
    del cell.forward
    return kept


def check_totals(track: Track, name: str, kept: list[tuple[Tensor, ...]], place: int) -> None:
    """The track's states and gradients against what autograd kept, to rounding in float64."""
    tensors = [row[place] for row in kept]
    total = torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in tensors])
    compare.assert_steps_close(track.states[name], torch.stack(tensors), track.mask, what=name)
    compare.assert_steps_close(track.grads[name], total, track.mask, what=f"grad_{name}")


def record(model: nn.Module, run: Callable[[], Tensor]) -> gradflow.Recording:
    with their_warnings():
        with gradflow.record(model) as recording:
            run().sum().backward()
    return recording


@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_liquid_networks_of_ncps(kind: str) -> None:
    """Hasani et al. 2021, 2022: continuous-time cells."""
    model = getattr(package("ncps.torch"), kind)(5, 8).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64)

    def run() -> Tensor:  # the package makes its own zeros, in float32
        return model(x, torch.zeros(2, 8, dtype=torch.float64))[0][:, -1]

    recording = record(model, run)
    (track,) = recording.values()
    assert (track.name, track.cell, track.steps) == ("rnn_cell", f"{kind}Cell", 9)
    kept = returned_by(model.rnn_cell, run)
    (state,) = track.states
    check_totals(track, state, kept, place=1)
    jacobians = gradflow.analyzer.step_jacobians(track)

    def step(h: Tensor) -> Tensor:
        return model.rnn_cell(x[:, 4], h, 1.0)[1].sum(0)

    dense = torch.autograd.functional.jacobian(step, track.states[state][3]).permute(1, 0, 2)
    one = torch.ones(1, 2, dtype=torch.bool)
    compare.assert_jacobians_close(jacobians[4:5], dense[None], one)
    assert gradflow.analyze(recording)["rnn_cell"].verdict in (
        "vanishing",
        "stable",
        "inconclusive",
    )


def test_a_spiking_lstm_of_snntorch() -> None:
    """Eshraghian et al. 2023: an nn.LSTMCell inside a neuron that emits spikes."""
    snn = package("snntorch")
    with their_warnings():
        model = snn.SLSTM(5, 5, reset_mechanism="subtract").double()
    x = torch.randn(9, 2, 5, dtype=torch.float64)

    def run() -> Tensor:
        syn = mem = torch.zeros(2, 5, dtype=torch.float64)
        for x_t in x:
            _, syn, mem = model(x_t, syn, mem)
        return mem

    recording = record(model, run)
    (track,) = recording.values()
    assert (track.cell, track.steps, track.parity.status) == ("LSTM", 9, "passed")
    assert not track.cuts.any()
    check_totals(track, "c", returned_by(model.lstm_cell, run), place=1)


def test_what_resets_its_state_by_mistake_is_said() -> None:
    """SLSTM compares its state's shape with its input's: of another width, it starts afresh each step."""
    snn = package("snntorch")
    with their_warnings():
        model = snn.SLSTM(5, 7)

    def run() -> Tensor:
        syn = mem = torch.zeros(2, 7)
        for x_t in torch.randn(4, 2, 5):
            _, syn, mem = model(x_t, syn, mem)
        return mem

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with gradflow.record(model) as recording:
            run().sum().backward()
    assert "was called once, so no state came back" in str(said[0].message)
    assert len(recording) == 4


def test_a_leaky_neuron_of_snntorch() -> None:
    snn = package("snntorch")
    with their_warnings():
        neuron = snn.Leaky(0.9, learn_beta=True).double()
    model, x = (
        nn.ModuleList([nn.Linear(5, 6).double(), neuron]),
        torch.randn(9, 2, 5, dtype=torch.float64),
    )

    def run() -> Tensor:
        mem = torch.zeros(2, 6, dtype=torch.float64)
        for x_t in x:
            _, mem = neuron(model[0](x_t), mem)
        return mem

    (track,) = record(model, run).values()
    assert (track.name, track.cell, track.steps) == ("1", "Leaky", 9)
    (state,) = track.states
    check_totals(track, state, returned_by(neuron, run), place=1)


def test_a_minimal_gru_read_step_by_step() -> None:
    """Feng et al. 2024. Read whole it is a scan without steps, and that is said."""
    model = package("minGRU_pytorch").minGRU(6).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)

    def run() -> Tensor:
        h = None
        for t in range(9):
            _, h = model(x[:, t : t + 1], h, return_next_prev_hidden=True)
        return h

    (track,) = record(model, run).values()
    assert (track.cell, track.steps) == ("minGRU", 9)
    (state,) = track.states
    kept = [(h.grad.flatten(1), h.flatten(1)) for _, h in returned_by(model, run)]
    total, values = (torch.stack([row[place] for row in kept]) for place in (0, 1))
    compare.assert_steps_close(track.states[state], values.detach(), track.mask, what=state)
    compare.assert_steps_close(track.grads[state], total, track.mask, what=f"grad_{state}")
    with pytest.warns(GradflowWarning, match="no recurrent layer ran: minGRU consists of"):
        with gradflow.record(model):
            model(x).sum().backward()


def test_a_tagger_with_a_conditional_random_field() -> None:
    """pytorch-crf on a packed bidirectional LSTM."""
    crf = package("torchcrf").CRF

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 6)
            self.lstm = nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True, dropout=0.2)
            self.head = nn.Linear(10, 4)
            self.crf = crf(4, batch_first=True)

        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            lengths = mask.sum(1)
            packed = pack_padded_sequence(self.embedding(x), lengths, True, enforce_sorted=False)
            output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
            return -self.crf(self.head(output), y, mask=mask)

    model = Tagger().double()
    x, y = torch.randint(0, 20, (3, 9)), torch.randint(0, 4, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    recording = record(model, lambda: model(x, y, mask))
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")
    assert list(recording.tracks) == [f"lstm.{end}" for end in ends]
    for track in recording.values():
        assert track.lengths.tolist() == [9, 4, 6]
        assert track.parity.status == "passed"


def test_a_recurrent_policy_learns_the_same_under_a_recording() -> None:
    """sb3-contrib's RecurrentPPO: rollouts step by step without gradient, then padded batches."""
    gym, contrib = package("gymnasium"), package("sb3_contrib")
    numpy = package("numpy")

    class Game(gym.Env):  # type: ignore[misc]
        observation_space = gym.spaces.Box(-1, 1, (3,), numpy.float32)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: object = None, options: object = None) -> Any:
            self.steps, self.numbers = 0, numpy.random.default_rng(0)
            return self.numbers.random(3, dtype=numpy.float32), {}

        def step(self, action: Any) -> Any:
            self.steps += 1
            seen = self.numbers.random(3, dtype=numpy.float32)
            return seen, float(action), self.steps % 7 == 0, False, {}

    def learn(recorded: bool) -> tuple[gradflow.Recording | None, list[Tensor]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "seed": 0}
            sizes = {"lstm_hidden_size": 8}
            model = contrib.RecurrentPPO("MlpLstmPolicy", Game(), policy_kwargs=sizes, **options)
            recording = None
            if recorded:
                with gradflow.record(model.policy) as recording:
                    model.learn(32)
            else:
                model.learn(32)
        return recording, [p.detach().clone() for p in model.policy.parameters()]

    (_, plain), (recording, trained) = learn(False), learn(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True))
    assert recording is not None
    assert {name.partition("@")[0] for name in recording.tracks} == {
        "lstm_actor.l0",
        "lstm_critic.l0",
    }
    reached = [track for track in recording.values() if track.backwards]
    assert len(reached) >= 4
    assert all(track.parity.status == "passed" for track in reached)


def test_a_scan_without_steps_is_refused_in_words() -> None:
    """xLSTM's sLSTM goes over time inside one function (Beck et al. 2024)."""
    xlstm = package("xlstm")
    with their_warnings():
        settings = {"embedding_dim": 8, "num_heads": 2, "conv1d_kernel_size": 0}
        config = xlstm.sLSTMLayerConfig(backend="vanilla", **settings)
        model = xlstm.sLSTMLayer(config)
        model.reset_parameters()
    with pytest.warns(GradflowWarning, match=r"no recurrent layer ran: .*gradflow\.tap"):
        with gradflow.record(model):
            model(torch.randn(2, 9, 8)).sum().backward()
