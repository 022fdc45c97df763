"""Several loops through one module of the user's own at the same time: which call goes on with which.

Oracles: retain_grad on the states of the user's own graph; dense Jacobians of one step by
torch.autograd.functional.jacobian. All in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from compare import assert_jacobians_close, assert_steps_close
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import RecordingError
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH, WIDTH = 6, 2, 4
Kept = dict[str, list[Tensor]]


class Gated(nn.Module):
    """A minimal gated unit whose input is as wide as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        f = self.f(torch.cat([x, h], -1)).sigmoid()
        return (1 - f) * h + f * self.g(torch.cat([x, f * h], -1)).tanh()


class StateFirst(Gated):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, h)


class OptionalState(Gated):
    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.zeros_like(x) if h is None else h)


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class SecondOrder(Gated):
    """h_t from h_{t−1} and h_{t−2}: no loop over layers, although both come back."""

    def forward(self, h: Tensor, older: Tensor) -> Tensor:
        return super().forward(older, h)


def data() -> Tensor:
    return torch.randn(STEPS, BATCH, WIDTH, dtype=torch.float64)


def zeros() -> Tensor:
    return torch.zeros(BATCH, WIDTH, dtype=torch.float64)


def keep(kept: Kept, name: str, state: Tensor) -> Tensor:
    state.retain_grad()
    kept.setdefault(name, []).append(state)
    return state


def recorded(module: nn.Module, run: Callable[[nn.Module, Kept], Tensor]) -> tuple[Recording, Kept]:
    kept: Kept = {}
    with gradflow.record(module.double()) as recording:
        run(module, kept).pow(2).sum().backward()
    return recording, kept


def assert_totals(recording: Recording, kept: Kept, tracks: dict[str, str]) -> None:
    """Track.state -> the name under which its states were kept."""
    assert set(recording.tracks) == {place.rpartition(".")[0] for place in tracks}
    for place, name in tracks.items():
        track, _, state = place.rpartition(".")
        found = recording[track]
        assert torch.equal(found.states[state], torch.stack([s.detach() for s in kept[name]]))
        grads = torch.stack([zeros() if s.grad is None else s.grad for s in kept[name]])
        assert_steps_close(found.grads[state], grads, found.mask, what=place)
        assert not found.cuts.any()


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("steps", [2, STEPS])
@pytest.mark.parametrize("kind", [Gated, OptionalState])
def test_one_module_as_every_layer_called_step_by_step(
    kind: type[nn.Module], layers: int, steps: int
) -> None:
    below = nn.Linear(WIDTH, WIDTH).double()
    inputs: list[list[Tensor]] = [[] for _ in range(layers)]

    def run(cell: nn.Module, kept: Kept) -> Tensor:
        states: list[Tensor | None] = [None if kind is OptionalState else zeros()] * layers
        for x_t in data()[:steps]:
            y = below(x_t)
            for number in range(layers):
                inputs[number].append(y.detach())
                y = states[number] = keep(kept, f"{number}", cell(y, states[number]))
        return y

    cell = kind()
    recording, kept = recorded(cell, run)
    names = ["cell" if n == 0 else f"cell@{n + 1}" for n in range(layers)]
    assert_totals(recording, kept, {f"{name}.h": f"{n}" for n, name in enumerate(names)})
    for n, name in enumerate(names):
        for t in range(1, steps):
            before, x = kept[f"{n}"][t - 1].detach(), inputs[n][t]

            def one(h: Tensor, b: int, x: Tensor = x) -> Tensor:
                return cell(x[b : b + 1], h[None])[0]

            want = [
                torch.autograd.functional.jacobian(functools.partial(one, b=b), before[b])
                for b in range(BATCH)
            ]
            found = step_jacobians(recording[name])[t : t + 1]
            assert_jacobians_close(found, torch.stack(want)[None], torch.ones(1, BATCH) > 0)


def test_so_with_a_pair_of_states() -> None:
    def run(cell: nn.Module, kept: Kept) -> Tensor:
        states = [(zeros(), zeros())] * 2
        for x_t in data():
            y = x_t
            for n in range(2):
                h, c = states[n] = cell(y, states[n])
                y, _ = keep(kept, f"h{n}", h), keep(kept, f"c{n}", c)
        return y

    tracks = {"cell.h": "h0", "cell.c": "c0", "cell@2.h": "h1", "cell@2.c": "c1"}
    assert_totals(*recorded(Paired(), run), tracks)


def test_states_given_first_and_layer_after_layer() -> None:
    def run(cell: nn.Module, kept: Kept) -> Tensor:
        inputs = list(data())
        for layer in range(2):
            h, outputs = zeros(), []
            for x_t in inputs:
                h = keep(kept, f"{layer}", cell(h, x_t))
                outputs.append(h)
            inputs = outputs
        return h

    assert_totals(*recorded(StateFirst(), run), {"cell.h": "0", "cell@2.h": "1"})


def test_two_states_of_one_loop_at_different_ages() -> None:
    def run(cell: nn.Module, kept: Kept) -> Tensor:
        h, older = zeros(), zeros()
        for _ in range(STEPS):
            h, older = keep(kept, "h", cell(h, older)), h
        return h

    torch.manual_seed(1)
    cell = SecondOrder().double()
    recording, kept = recorded(cell, run)
    joint = recording["loop"]
    recording.drop(joint)
    assert_totals(recording, kept, {"cell.h": "h"})
    assert "more of its past" in recording["cell"].notes[0]
    assert list(joint.states) == ["h", "carried"]
    h, steps = recording["cell"].h, step_jacobians(joint)
    before, older = (h[t, :1].clone().requires_grad_() for t in (STEPS - 2, STEPS - 3))
    made = cell(before, older)[0]
    rows = [torch.autograd.grad(unit, (before, older), retain_graph=True) for unit in made]
    expected = torch.stack([torch.cat([part[0] for part in row]) for row in rows])
    width = h.shape[2]
    assert torch.allclose(steps[-1, 0, :width], expected, rtol=1e-12, atol=0)
    # the state before last goes on as it is, but for the last step, after which nobody reads it
    assert torch.equal(steps[-2, 0, width:, :width], torch.eye(width, dtype=torch.float64))
    assert not steps[-2, 0, width:, width:].any()


@pytest.mark.parametrize("streams", [7, 40])
@pytest.mark.parametrize("graph", [True, False])
def test_streams_side_by_side(streams: int, graph: bool) -> None:
    if not graph:
        streams = min(streams, 12)

    def run(cell: nn.Module, kept: Kept) -> Tensor:
        states = [torch.randn_like(zeros()) for _ in range(streams)]
        for x_t in data()[:3]:
            for n, h in enumerate(states):
                states[n] = cell(x_t * (n + 1), h)
                kept.setdefault(f"{n}", []).append(states[n])
                if graph:
                    states[n].retain_grad()
        return torch.stack(states)

    if graph:
        recording, kept = recorded(Gated(), run)
        names = ["cell" if n == 0 else f"cell@{n + 1}" for n in range(streams)]
        assert_totals(recording, kept, {f"{name}.h": f"{n}" for n, name in enumerate(names)})
        return
    kept = {}
    with (
        pytest.warns(gradflow.errors.GradflowWarning, match="no_grad"),
        gradflow.record(cell := Gated().double()) as recording,
        torch.no_grad(),
    ):
        run(cell, kept)
    for n in range(streams):
        name = "cell" if n == 0 else f"cell@{n + 1}"
        assert torch.equal(recording[name].h, torch.stack(kept[f"{n}"]))


class Attending(nn.Module):
    """It is given all that it returned before, in a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        seen = torch.stack(past, 1)
        weights = (seen * h.unsqueeze(1)).sum(-1).softmax(1)
        context = (weights.unsqueeze(-1) * seen).sum(1)
        new = torch.tanh(self.mix(torch.cat([x, h, context], -1)))
        return new, [*past, new]


def test_a_growing_list_of_the_past_is_one_loop_whose_jacobians_are_refused() -> None:
    def run(cell: nn.Module, kept: Kept) -> Tensor:
        h, past = zeros(), [zeros()]
        for x_t in data():
            h, past = cell(x_t, h, past)
            keep(kept, "h", h)
        return h

    recording, kept = recorded(Attending(), run)
    assert_totals(recording, kept, {"cell.h": "h"})
    assert "attention over all earlier steps, a memory that grows" in recording["cell"].notes[0]
    with pytest.raises(RecordingError, match="more goes around it than its states"):
        recording["cell"].operator()


def test_ends_that_nothing_goes_on_with_are_let_go() -> None:
    model = nn.Sequential(Gated(), nn.Identity()).double()
    with gradflow.record(model) as recording:
        for _ in range(12):  # sequences of one training loop
            h = zeros()
            for x_t in data():
                h = model[0](x_t, h)
            h.sum().backward()
    assert len(recording.tracks) == 12
    assert all(track.steps == STEPS and track.backwards == 1 for track in recording.values())
