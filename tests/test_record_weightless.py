"""Loops without a weight in them are taken up or named; what only looks like one is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, H = 12, 3, 5


class Model(nn.Module):
    """Two layers that see every step alone, layers of a stack, and code of a user's."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(H, H), nn.Linear(H, H)
        self.rnn, self.stack = nn.GRU(H, H), nn.ModuleList(nn.Linear(H, H) for _ in range(T))
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def recorded(code: Callable[[Any, Tensor], Tensor]) -> Recording:
    torch.manual_seed(0)
    model = Model(code).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradflowWarning)
        with gradflow.record(model) as recording:
            model(torch.randn(T, B, H, dtype=torch.float64)).pow(2).sum().backward()
    return recording


def decayed(f: Tensor, z: Tensor, order: range = range(T)) -> list[Tensor]:
    h, states = torch.zeros_like(z[0]), []
    for t in order:
        h = f[t] * h + (1 - f[t]) * z[t]
        states.append(h)
    return states


def beside_a_layer(m: Any, x: Tensor) -> Tensor:
    return torch.stack(decayed(torch.sigmoid(m.inner(x)), m.rnn(x)[0])).tanh()


def two_layers(m: Any, x: Tensor) -> Tensor:
    for gate in (m.inner, m.outer):
        x = torch.stack(decayed(torch.sigmoid(gate(x)), x + gate(x)))
    return x.tanh()


def from_the_last_step(m: Any, x: Tensor) -> Tensor:
    states = decayed(torch.sigmoid(m.inner(x)), m.outer(x), range(T)[::-1])
    return torch.stack(states).tanh()


def batch_first(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    f, z, h, states = torch.sigmoid(m.inner(x)), m.outer(x), torch.zeros(B, H).to(x), []
    for t in range(T):
        h = f[:, t] * h + z[:, t, :]
        states.append(h)
    return torch.stack(states, 1).tanh()


def unbound(m: Any, x: Tensor) -> Tensor:
    h, states = torch.zeros(B, H).to(x), []
    for f, z in zip(torch.sigmoid(m.inner(x)).unbind(), m.outer(x).unbind(), strict=True):
        h = torch.lerp(h, z, f)
        states.append(h)
    return torch.stack(states).tanh()


@pytest.mark.parametrize(
    ("code", "count", "steps"),
    [
        (beside_a_layer, 2, T),
        (two_layers, 2, T),
        (from_the_last_step, 1, T),
        (batch_first, 1, T),
        (unbound, 1, T - 1),  # nothing keeps the values of the last state
    ],
)
def test_it_is_a_track_of_its_steps(code: Callable[..., Tensor], count: int, steps: int) -> None:
    recording = recorded(code)
    assert len(recording) == count and not recording.unseen
    for track in recording.values():
        assert track.steps == steps
        assert (steps == T) != any("its last step is not shown" in note for note in track.notes)


def test_its_gradients_are_those_of_the_states() -> None:
    kept: list[Tensor] = []

    def code(m: Any, x: Tensor) -> Tensor:
        kept.extend(decayed(torch.sigmoid(m.inner(x)), m.outer(x)))
        for state in kept:
            state.retain_grad()
        return torch.stack(kept).tanh()

    (track,) = recorded(code).values()
    for t, state in enumerate(kept):
        assert torch.equal(track.h[t], state.detach())
        torch.testing.assert_close(track.grad_h[t], state.grad, rtol=1e-14, atol=0)


def test_one_whose_values_nothing_keeps_is_named_beside_a_track() -> None:
    """A spiking layer without weights: it decays, and is reset where it spikes."""

    def code(m: Any, x: Tensor) -> Tensor:
        v, spikes = torch.zeros(B, H).to(x), []
        for u in m.rnn(x)[0]:
            v = 0.9 * v + u
            spikes.append(torch.sigmoid(4 * (v - 1)))
            v = v - spikes[-1]
        return torch.stack(spikes)

    recording = recorded(code)
    assert list(recording.tracks) == ["rnn.l0"]
    (unseen,) = recording.unseen
    assert "in no track" in unseen.sentence and "gradflow.tap(" in unseen.sentence


def sum_of_losses(m: Any, x: Tensor) -> Tensor:
    loss = torch.zeros(()).to(x)
    for u in m.inner(x):
        loss = loss + u.log_softmax(-1)[:, 0].mean()
    return loss


def discounted_losses(m: Any, x: Tensor) -> Tensor:
    loss = torch.zeros(()).to(x)
    for u in m.inner(x):
        loss = 0.9 * loss + u.square().mean()
    return loss


def mean_of_steps(m: Any, x: Tensor) -> Tensor:
    pooled = torch.zeros(B, H).to(x)
    for u in m.inner(x):
        pooled = pooled + u
    return pooled / T


def embeddings_of_layers(m: Any, x: Tensor) -> Tensor:
    given, h = m.inner(x), x.mean(0)
    for part, layer in zip(given, m.stack, strict=True):
        h = h + torch.tanh(layer(h)) * part
    return h


def scales(m: Any, x: Tensor) -> Tensor:
    parts = m.inner(x).unbind()
    h = parts[0]
    for part, layer in zip(parts[1:], m.stack, strict=False):
        h = torch.relu(layer(h)) + part
    return h


def list_that_grows(m: Any, x: Tensor) -> Tensor:
    parts = m.inner(x)
    found = parts[:1]
    for t in range(1, T):
        found = torch.cat([found, parts[t : t + 1]])
    return found.tanh()


def differences(m: Any, x: Tensor) -> Tensor:
    parts = m.inner(x)
    return torch.stack([parts[t] * parts[t - 1] for t in range(1, T)])


def largest_so_far(m: Any, x: Tensor) -> Tensor:
    h = m.inner(x[0])
    for x_t in x[1:]:
        h = torch.maximum(h, m.inner(x_t))
    return h


def largest_output(m: Any, x: Tensor) -> Tensor:
    parts = m.inner(x)
    h = parts[0]
    for t in range(1, T):
        h = torch.where(parts[t] > h, parts[t], h)
    return h


def stick_that_is_broken(m: Any, x: Tensor) -> Tensor:
    rest, found = torch.ones(B, H).to(x), []
    for x_t in x:
        share = torch.sigmoid(m.inner(x_t))
        found.append(rest * share)
        rest = rest * (1 - share)
    return torch.stack(found)


@pytest.mark.parametrize(
    "code",
    [
        largest_so_far,
        largest_output,
        stick_that_is_broken,
        sum_of_losses,
        discounted_losses,
        mean_of_steps,
        embeddings_of_layers,
        scales,
        list_that_grows,
        differences,
    ],
)
def test_what_is_none_is_not_named(code: Callable[..., Tensor]) -> None:
    recording = recorded(code)
    assert not recording.unseen and not len(recording)


def experts(m: Any, x: Tensor) -> Tensor:
    """A mixture: what every expert makes of its part is put into one tensor."""
    flat = x.reshape(-1, H)
    gates = m.inner(flat).softmax(-1)
    mixed = torch.zeros_like(flat)
    for number, layer in enumerate(m.stack):
        rows = torch.arange(number, len(flat), T)
        mixed = mixed.index_add(0, rows, layer(flat[rows]) * gates[rows, number % H, None])
    return mixed


def test_a_mixture_of_experts_is_none() -> None:
    recording = recorded(experts)
    assert not recording.unseen and not len(recording)


class Spiking(nn.Module):
    """v' = 0.9 v + x, kept in an attribute; what it fires is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.v = x + (0.0 if self.v is None else 0.9 * self.v)
        return torch.sigmoid(4 * (self.v - 1))


class Marked(Spiking):
    """The same with the line that was advised."""

    def forward(self, x: Tensor) -> Tensor:
        fired = super().forward(x)
        self.v = gradflow.tap(v=self.v)
        return fired


class TwoSpiking(nn.Module):
    """Two layers of such neurons, each with its weights before it."""

    def __init__(self, kind: type[Spiking]) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(H, H), nn.Linear(H, H)])
        self.layers = nn.ModuleList([kind(), kind()])
        self.seen: list[list[Tensor]] = [[], []]

    def forward(self, x: Tensor) -> Tensor:
        rate = torch.zeros(()).to(x)
        for given in x:
            for number, (inner, layer) in enumerate(zip(self.maps, self.layers, strict=True)):
                given = layer(inner(given))
                self.seen[number].append(layer.v)
            rate = rate + given.square().mean()
        return rate


def fired(kind: type[Spiking]) -> tuple[TwoSpiking, gradflow.Recording]:
    torch.manual_seed(0)
    model = TwoSpiking(kind).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradflowWarning)
        with gradflow.record(model) as recording:
            loss = model(2 * torch.randn(T, B, H).double())
            for state in model.seen[0] + model.seen[1]:
                state.retain_grad()
            loss.backward(retain_graph=True)
    return model, recording


def test_a_state_kept_in_an_attribute_is_named_with_the_line_that_marks_it() -> None:
    """It was `h = gradflow.tap(h=h)` in the loop of the model, where there is no h."""
    _, recording = fired(Spiking)
    (unseen,) = recording.unseen
    assert unseen.insert == "self.v = gradflow.tap(v=self.v)"
    file, line = unseen.line.split(":")
    assert "def forward" in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert file.endswith("test_record_weightless.py")
    assert (
        f"where it is set, {unseen.line}" in unseen.sentence
    )  # it was "the end of the loop's body"


class Statistics(nn.Module):
    """Running sums of x xᵀ and of y x with trained decays, kept in attributes (Deshpande, Sarawagi 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.5, 0.9, 2))
        self.square, self.product = torch.zeros(B, 2, H, H), torch.zeros(B, 2, H)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        outer = (x[:, :, None] * x[:, None])[:, None]
        self.square = self.decay[None, :, None, None] * self.square + outer
        self.product = self.decay[None, :, None] * self.product + (x * y)[:, None]
        fitted = torch.linalg.solve(self.square + torch.eye(H), self.product)
        return (fitted * x[:, None]).sum(-1)


class Adaptive(nn.Module):
    """A module that keeps its states, called in a loop that has no name for them."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.out, self.embed = Statistics(), nn.Linear(2, 1), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for x_t in x:
            found.append(self.out(self.unit(self.embed(x_t), x_t[:, :1])))
        return torch.stack(found).square().mean()


def test_of_several_states_in_attributes_the_one_that_was_not_told_is_named() -> None:
    torch.manual_seed(0)
    model = Adaptive()
    with warnings.catch_warnings(), gradflow.record(model) as recording:
        warnings.simplefilter("ignore", GradflowWarning)
        model(torch.randn(T, B, H)).backward()
    said = [one.insert for one in recording.unseen]
    flat = "self.product = gradflow.tap(product=self.product.flatten(1)).view_as(self.product)"
    assert flat in said and not any("h=h" in line for line in said)


def test_the_advised_line_in_a_class_of_two_layers_gives_one_track_for_each() -> None:
    """They shared one name, so each mark began a loop of one step."""
    model, recording = fired(Marked)
    assert [track.steps for track in recording.values()] == [T, T]
    for track, states in zip(recording.values(), model.seen, strict=True):
        totals = torch.stack([state.grad for state in states])
        torch.testing.assert_close(track.grads["v"], totals, rtol=1e-12, atol=0)
        found = step_jacobians(track)
        torch.testing.assert_close(found[1:], 0.9 * torch.eye(H).double().expand_as(found[1:]))
