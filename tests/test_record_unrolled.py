"""Loops by hand are tracks by themselves and equal what `tap` records; what is not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_loops import LOOPS, H
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning, RecordingError
from gradflow.recording import Recording, Track

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def recorded(model: nn.Module, *given: Any) -> tuple[Recording, list[Tensor]]:
    """The recording of one step, and the gradients of the parameters."""
    model.zero_grad()
    with gradflow.record(model) as recording:
        (model(*given) ** 2).sum().backward()
    return recording, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def by_hand(recording: Recording) -> Track:
    (track,) = [track for track in recording.values() if not track.name.startswith("enc")]
    return track


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_by_hand_is_what_tap_makes_of_it(kind: str) -> None:
    make, names = LOOPS[kind]
    torch.manual_seed(1)
    model, x = make().double(), torch.randn(9, 4, 3, dtype=F64)
    (model(x) ** 2).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    found, with_it = recorded(model, x)
    tapped, _ = recorded(model, x, gradflow.tap)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_it, strict=True))
    assert not found.unseen
    mine, theirs = by_hand(found), by_hand(tapped)
    assert mine.name == ("layer" if kind == "a layer that loops inside" else "loop")
    assert list(mine.states) == names
    for name in names:
        assert torch.equal(mine.states[name], theirs.states[name])
        assert torch.equal(mine.grads[name], theirs.grads[name])
    order = [list(theirs.states).index(name) for name in names]
    assert order == sorted(order)
    assert torch.equal(step_jacobians(mine), step_jacobians(theirs))


def test_the_product_of_its_steps_is_what_autograd_says_of_the_whole_loop() -> None:
    torch.manual_seed(2)
    model, x = LOOPS["leaky"][0]().double(), torch.randn(9, 1, 3, dtype=F64)
    track = by_hand(recorded(model, x)[0])

    def rest(v: Tensor) -> Tensor:
        for u in x[1:]:
            v = 0.8 * v + 0.2 * (model.h(torch.tanh(v)) + model.x(u))  # type: ignore[operator]
        return v

    whole = torch.autograd.functional.jacobian(rest, track.states["v"][0])[0, :, 0]
    product = torch.eye(H, dtype=F64)
    for matrix in step_jacobians(track)[1:, 0]:
        product = matrix @ product
    torch.testing.assert_close(product, whole, rtol=1e-12, atol=0)


class StackedByHand(nn.Module):
    """One layer of a stack whose layers loop by hand inside their own forward."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, H), nn.Linear(H, H)

    def forward(self, x: Tensor, tap: Any = None) -> Tensor:
        h, out = x.new_zeros(x.shape[1], H), []
        for u in self.w(x):
            h = torch.tanh(u + self.u(h))
            h = tap(h=h) if tap else h
            out.append(h)
        return torch.stack(out)


def test_every_layer_of_a_stack_by_hand_is_a_track() -> None:
    torch.manual_seed(3)
    model, x = (
        nn.Sequential(StackedByHand(3), StackedByHand(H), StackedByHand(H)).double(),
        torch.randn(9, 4, 3, dtype=F64),
    )
    recording, _ = recorded(model, x)
    assert sorted(track.name for track in recording.values()) == ["0", "1", "2"]
    assert not recording.unseen
    for number, (_, layer) in enumerate(model.named_children()):
        given = model[:number](x)
        with gradflow.record(layer) as tapped:
            (model[number + 1 :](layer(given, gradflow.tap)) ** 2).sum().backward()
        (track,) = [track for track in tapped.values() if track.name == "loop"]
        assert torch.equal(track.grads["h"], recording[str(number)].grads["h"])


def test_a_class_named_like_torchs_own_is_no_cell_of_torchs() -> None:
    torch.manual_seed(4)
    model = type("LSTM", (StackedByHand,), {})(3).double()
    recording, _ = recorded(model, torch.randn(9, 4, 3, dtype=F64))
    (track,) = recording.values()
    assert track.cell.endswith(".LSTM")
    assert gradflow.analyze(recording)[track.name].sentence


# ------------------------------------------------------------------- what is only a part of a step


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(H, H) / H**0.5)

    def forward(self, r: Tensor) -> Tensor:
        return r @ self.w.T


class Rates(nn.Module):
    """The recurrent weight is a module: what it returns is not the state."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.inp, self.rec, self.alpha = nn.Linear(3, H), Weight(), alpha
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        v = x.new_zeros(x.shape[1], H)
        for u in x:
            v = (1 - self.alpha) * v + self.alpha * (self.rec(torch.tanh(v)) + self.inp(u))
            v.retain_grad()
            self.kept.append(v)
        return v


class Flow(nn.Module):
    """f of z' = f(z), over which Euler's method loops."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(H, H)

    def forward(self, t: int, z: Tensor) -> Tensor:
        return torch.tanh(self.f(z))


class Euler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Flow()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        z = x[0].new_ones(x.shape[1], H)
        for t in range(len(x)):
            z = z + 0.1 * self.f(t, z)
            z.retain_grad()
            self.kept.append(z)
        return z


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: Rates(1.0), "v"), (lambda: Rates(0.2), "v"), (Euler, "z")],
    ids=["a weight", "a weight of a leaky state", "Euler"],
)
def test_the_state_is_what_crosses_after_what_is_added(make: Any, name: str) -> None:
    torch.manual_seed(3)
    model = make().double()
    recording, _ = recorded(model, torch.randn(12, 4, 3, dtype=F64))
    (track,) = recording.values()
    assert (track.name, list(track.states)) == ("loop", [name])
    assert torch.equal(track.states[name], torch.stack([v.detach() for v in model.kept]))
    true = torch.stack([v.grad for v in model.kept if v.grad is not None])
    assert torch.equal(track.grads[name], true)


# ------------------------------------------------------------------------------ what is named


class Memory(nn.Module):
    """Attention over all that came before: more and more goes from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.w = nn.Linear(3, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        h, memory = x.new_zeros(x.shape[1], H), []
        for u in x:
            h = torch.tanh(self.x(u) + self.w(h))
            memory.append(h)
            h = torch.stack(memory).mean(0)
        return h


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.by_hand = nn.LSTM(3, 3), Memory()

    def forward(self, x: Tensor) -> Tensor:
        return self.by_hand(self.rnn(x)[0])


def test_a_recurrence_beside_a_track_is_named_everywhere(tmp_path: Path) -> None:
    model = Beside()
    with pytest.warns(GradflowWarning, match="a recurrence of by_hand is in no track"):
        recording, _ = recorded(model, torch.randn(20, 4, 3))
    (unseen,) = recording.unseen
    assert (unseen.module, unseen.steps) == ("by_hand", 20)
    assert "by_hand.w.weight" in unseen.weights
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "memory = x.new_zeros" in text
    )
    assert unseen.line.endswith(f"test_record_unrolled.py:{line + 1}")
    assert unseen.insert == "h = gradflow.tap(h=h)"
    analysis = gradflow.analyze(recording)
    assert unseen.sentence in analysis.warnings
    assert unseen.sentence in str(analysis)
    gradflow.report(analysis, tmp_path / "run", formats=["json", "nc"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["unseen"][0]["steps"] == 20
    assert gradflow.load(tmp_path / "run").unseen == recording.unseen


def test_without_any_track_it_is_the_reason() -> None:
    with pytest.warns(GradflowWarning, match="used 6 times, each time on what came of the use"):
        recording, _ = recorded(Memory(), torch.randn(6, 2, 3))
    with pytest.raises(RecordingError, match=r"h = gradflow\.tap\(h=h\)"):
        gradflow.analyze(recording)


def test_a_growing_graph_with_a_backward_at_every_step_is_not_taken_up() -> None:
    model, x = nn.Linear(H, H), torch.randn(6, 2, H)

    def run() -> Recording:
        with gradflow.record(model) as recording:
            h = torch.zeros(2, H)
            for u in x:
                h = torch.tanh(u + model(h))
                h.sum().backward(retain_graph=True)
        return recording

    with pytest.warns(GradflowWarning, match="an earlier backward went through it"):
        assert len(run()) == 0


def test_a_gradient_penalty_is_no_recurrence() -> None:
    model = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, 1))
    x = torch.randn(2, H, requires_grad=True)

    def run() -> Recording:
        with gradflow.record(model) as recording:
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (slope**2).sum().backward()
        return recording

    with pytest.warns(GradflowWarning, match="no recurrent layer ran"):
        assert not run().unseen


class Kept(nn.Module):
    """Its state stays in an attribute, cut off from the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.h = nn.Linear(H, H), torch.zeros(2, H)

    def forward(self, x: Tensor) -> Tensor:
        self.h = torch.tanh(x + self.w(self.h.detach()))
        return self.h


def test_a_state_kept_in_an_attribute_is_told_of() -> None:
    model = Kept()

    def run() -> None:
        with gradflow.record(model):
            torch.stack([model(u) for u in torch.randn(5, 2, H)]).sum().backward()

    with pytest.warns(GradflowWarning, match=r"keeps self\.h .*self\.h = gradflow\.tap\(h=self\.h"):
        run()


class Given(nn.Module):
    """A cell without weights of its own."""

    def forward(self, x: Tensor, h: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x + (w @ h.unsqueeze(2)).squeeze(2))


class Hyper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.cell = nn.Linear(H, H * H), Given()

    def forward(self, x: Tensor, tap: Any = None) -> Tensor:
        w, h = self.make(x[0]).view(-1, H, H), torch.zeros(x.shape[1], H, dtype=x.dtype)
        for u in x:
            h = self.cell(u, h, w)
            if tap:
                h = tap(h=h)
        return h


def test_a_cell_whose_weights_come_from_elsewhere_is_a_cell() -> None:
    torch.manual_seed(4)
    model, x = Hyper().double(), torch.randn(6, 3, H, dtype=F64)
    mine = recorded(model, x)[0]["cell"]
    theirs = recorded(model, x, gradflow.tap)[0]["loop"]
    assert (mine.cell, list(mine.states)) == ("Given", ["h"])
    assert torch.equal(mine.grad_h, theirs.grad_h)
    assert torch.equal(step_jacobians(mine)[1:], step_jacobians(theirs)[1:])


class Layer(nn.Module):
    """(x, h0) → (y, h_n), as torch's own layers; the loop is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(3, H), nn.Linear(H, H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for u in x:
            h = torch.tanh(self.x(u) + self.h(h))
            ys.append(h)
        return torch.stack(ys), h


def test_a_layer_that_loops_inside_is_told_so_without_a_backward() -> None:
    model = Layer()

    def run() -> None:
        with gradflow.record(model):
            model(torch.randn(9, 2, 3), torch.zeros(2, H))

    with pytest.warns(GradflowWarning, match=r"cell \(Layer\) loops inside its own forward"):
        run()


def test_a_fused_function_out_of_reach_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = nn.LSTM(3, 4), torch._VF.lstm

    def run() -> None:
        with gradflow.record(model):
            monkeypatch.setattr(torch._VF, "lstm", taken)
            model(torch.randn(5, 2, 3))[0].sum().backward()
            monkeypatch.undo()

    with pytest.warns(GradflowWarning, match=r"LSTM \(LSTM\) ran, but its call was not seen"):
        run()


class Solver(nn.Module):
    """Every step begins with a trial of f that only chooses the step size, as adaptive solvers do."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.cell = Flow(), nn.GRUCell(3, H)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], H)
        for u in x:
            trial = self.f(0, h + 0.1 * self.f(0, h))
            dt = 0.1 / (1 + float(trial.detach().norm()))
            for t in range(3):
                h = h + dt * self.f(t, h)
            h = self.cell(u, h)
        return h


def test_of_a_right_hand_side_no_stray_call_is_left_as_a_track() -> None:
    recording, _ = recorded(Solver(), torch.randn(8, 2, 3))
    assert list(recording.tracks) == ["cell"] and not recording.unseen


def test_states_with_their_batch_in_the_middle_have_that_batch() -> None:
    """The analysis of a loop over (2, B, H) has B sequences."""
    w, x = nn.Linear(H, H), torch.randn(8, 3, H)
    with gradflow.record(w) as recording:
        s = torch.ones(2, 3, H, requires_grad=True) * 0.5
        for u in x:
            h, m = s.unbind(0)
            s = torch.stack([torch.tanh(w(m) + u), 0.5 * (h + m)])
        s.sum().backward()
    (track,) = recording.values()
    assert (track.batch, gradflow.analyze(recording)[track.name].verdict != "") == (3, True)


class Private(nn.Module):
    """A state that a cell keeps to itself, and a sum of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(H, H), torch.zeros(2, H, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.tanh(self.w(self.v) + x)
        return self.v


class SummedUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neuron, self.head = Private(), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(())
        for u in x:
            out = out + self.head(self.neuron(u))
        return out


def test_a_sum_of_outputs_gives_no_state_its_name() -> None:
    recording, _ = recorded(SummedUp().double(), torch.randn(6, 2, H, dtype=F64))
    (track,) = recording.values()
    assert list(track.states) == ["h"]
