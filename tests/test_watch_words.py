"""A word at the right moment, numbers where people look, and refusals that let the training go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seam import Schedule, read_rules
from torch import Tensor, nn

import gradflow
from gradflow.errors import InputError
from gradflow.history import writer as writers
from gradflow.watching import Event

pytestmark = pytest.mark.usefixtures("one_thread")


class Rnn(nn.Module):
    """A linear recurrence h_t = w h_{t−1} + x_t of two units: its gain over k steps is w^k."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 2, nonlinearity="relu", bias=False)
        self.set(weight)
        nn.init.ones_(self.rnn.weight_ih_l0)

    def set(self, weight: float) -> None:
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(weight * torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][-1]


def trained(
    folder: Path, weights: list[float], each: Callable[[int], None] | None = None, **asked: Any
) -> gradflow.Watch:
    """A training whose recurrent weight is set by hand at each of its steps, all of which are probed."""
    net = Rnn()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    watch = gradflow.watch(net, folder, **({"every": 1, "budget": None} | asked))
    for number, weight in enumerate(weights):
        net.set(weight)
        x = torch.ones(30, 3, 1) if weight == weight else torch.full((30, 3, 1), torch.nan)
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if each is not None:
            each(number)
    watch.close()
    return watch


def test_a_change_of_verdict_that_lasts_three_probes_is_warned_of_once(tmp_path: Path) -> None:
    words = (
        r"step 6: rnn.l0 vanishes: its gain falls by 8.73 decades over 29 steps and is gone in every "
        r"direction after 10 steps; it was stable before"
    )
    with pytest.warns(gradflow.GradflowWarning, match=words) as caught:
        watch = trained(
            tmp_path, [1.0, 1.0, 0.5, 0.5 + 0.5, 0.5, 0.5, 0.5, 0.5][:2] + [1.0] + [0.5] * 5
        )
    assert len(caught) == 1 and caught[0].filename == __file__  # the line that trains
    notes = watch.history.notes
    assert [(note.step, note.about, note.layer) for note in notes] == [(6, "verdict", "rnn.l0")]


def test_a_change_of_one_probe_is_not_warned_of(tmp_path: Path) -> None:
    watch = trained(tmp_path, [1.0, 0.5, 0.5, 1.0, 1.0])
    assert [note for note in watch.history.notes if note.about == "verdict"] == []
    assert watch.history["rnn.l0"]["verdict"].values.tolist() == [
        "stable", "vanishing", "vanishing", "stable", "stable",
    ]  # fmt: skip


def test_rules_are_told_once_when_they_begin_and_once_when_they_end(tmp_path: Path) -> None:
    events: list[Event] = []
    weights = [1.0, 0.5, 0.5, 1.0, float("nan")]
    watch = trained(tmp_path, weights, on=["vanishing,horizon<20,nan", events.append])
    told = [(one.rule, one.step, one.holds) for one in events if one.step < 5]
    assert told == [
        ("vanishing", 2, True),
        ("horizon<20", 2, True),
        ("vanishing", 4, False),
        ("horizon<20", 4, False),
    ]
    assert events[0].sentence.startswith(
        "rnn.l0 vanishes: its gain falls by 8.73 decades over 29 steps"
    )
    assert ("nan", 5, True) in [(one.rule, one.step, one.holds) for one in events]
    assert watch.history["rnn.l0"]["nonfinite_at"].values[-1] == 1
    assert {note.about for note in watch.history.notes} >= {"alert", "nonfinite"}


def test_rules_without_a_callable_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(gradflow.GradflowWarning, match=r"step 2: .*\(horizon<20, it is 10\)"):
        trained(tmp_path, [1.0, 0.5], on="horizon<20")


def test_the_first_nan_is_warned_of_with_its_place(tmp_path: Path) -> None:
    words = r"step 2: rnn.l0: the state is NaN at step 1, sequence 1, unit 1"
    with pytest.warns(gradflow.GradflowWarning, match=words):
        trained(tmp_path, [1.0, float("nan")], preset="pulse")


def test_what_a_callable_raises_ends_nothing_but_itself(tmp_path: Path) -> None:
    calls = []

    def fails(event: Event) -> None:
        calls.append(event)
        raise ValueError("no such room")

    words = "fails, given to gradflow.watch, raised ValueError: no such room; it is left out"
    with pytest.warns(gradflow.GradflowWarning, match=words):
        watch = trained(tmp_path, [1.0, 0.5, 1.0], on=["vanishing", fails])
    assert len(calls) == 1 and len(watch.history) == 3


def test_stop_training_ends_it_and_the_probe_is_kept(tmp_path: Path) -> None:
    def stops(event: Event) -> None:
        raise gradflow.StopTraining(event.sentence)

    with pytest.raises(gradflow.StopTraining, match=r"rnn\.l0 vanishes"):
        trained(tmp_path, [1.0, 0.5, 1.0], on=["vanishing", stops])
    assert gradflow.load(tmp_path).steps.tolist() == [1, 2]  # type: ignore[union-attr]


def test_a_target_gets_scalars_by_their_tags_and_figures_every_tenth_probe(tmp_path: Path) -> None:
    given: list[tuple[int, dict[str, float], list[str]]] = []

    class Target:
        closed = False

        def __call__(self, step: int, scalars: dict[str, float], figures: dict[str, Any]) -> None:
            given.append((step, scalars, list(figures)))

        def close(self) -> None:
            self.closed = True

    target = Target()
    trained(tmp_path, [0.5] * 12, to=target)
    assert [step for step, _, _ in given] == list(range(1, 13)) and target.closed
    assert [step for step, _, figures in given if figures] == [1, 11]
    scalars = given[0][1]
    assert scalars["gradflow/rnn.l0/horizon"] == 10
    assert scalars["gradflow/rnn.l0/rate"] == pytest.approx(-0.6931, abs=1e-4)
    assert scalars["gradflow/rnn.l0/nonfinite"] == 0 and "gradflow/rnn.l0/channels" not in scalars
    assert {"gradflow/loss", "gradflow/learning_rate", "gradflow/grad_norm_all"} <= set(scalars)


class SummaryWriter:
    """A writer that is closed as TensorBoard's is: what is written then would go into another file."""

    def __init__(self) -> None:
        self.all_writers: dict[str, object] | None = {}
        self.steps: list[int] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.steps.append(step)

    def add_image(self, *_: object, **__: object) -> None: ...

    def close(self) -> None:
        self.all_writers = None


def test_a_writer_that_is_closed_meanwhile_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    writer = SummaryWriter()
    words = (
        "to must be an open SummaryWriter, got one that was closed; make a new one, and close it"
    )
    with pytest.warns(
        gradflow.GradflowWarning, match=f"{words} after the watch; it is left"
    ) as all_:
        watch = trained(
            tmp_path, [1.0] * 5, lambda n: writer.close() if n == 1 else None, to=writer
        )
    assert len(all_) == 1 and set(writer.steps) == {1, 2}
    assert watch.history.steps.tolist() == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------- refusals

CLOSED = SummaryWriter()
CLOSED.close()
WRONG = {
    "every": ({"every": 0}, "every must be a whole number of steps of at least 1, got 0"),
    "budget": ({"budget": 2}, "budget must be a share of the wall time above 0 and up to 1"),
    "preset": ({"preset": "all"}, "preset must be one of pulse, rate, full, got 'all'"),
    "layers": ({"layers": 3}, "layers must be a name, a glob or a list of them, got 3"),
    "optimizer": ({"optimizer": "adam"}, "optimizer must be a torch.optim.Optimizer"),
    "scaler": ({"scaler": 1.0}, "scaler must be a GradScaler, got float"),
    "on": ({"on": "vanished"}, "on must be verdicts .* or limits on"),
    "on number": ({"on": 3}, "on must be rules such as"),
    "to": ({"to": 3}, r"to must be a callable \(step, scalars, figures\)"),
    "closed": (
        {"to": CLOSED},
        "to must be an open SummaryWriter, got one that was closed; make a new",
    ),
    "gather": ({"gather": 3}, "gather must be True or False, got 3"),
    "both": ({"resume": True, "force": True}, "resume and force must be not both true"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_a_sentence_and_the_training_goes_on(name: str, tmp_path: Path) -> None:
    asked, words = WRONG[name]
    with pytest.warns(gradflow.GradflowWarning, match=f"{words}.*; this training is not watched"):
        watch = trained(tmp_path, [1.0, 1.0], **asked)
    assert len(watch.history) == 0 and "nothing is watched" in repr(watch)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_scripted_model_is_refused_and_one_inside_ends_the_watching(tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][-1]

    scripted = torch.jit.script(Last())
    with pytest.warns(gradflow.GradflowWarning, match="model must be a module whose layers run in"):
        gradflow.watch(scripted, tmp_path / "a")
    inside = nn.Sequential(scripted)
    optimizer = torch.optim.SGD(inside.parameters())
    gradflow.watch(inside, tmp_path / "b", every=1)
    with pytest.warns(
        gradflow.GradflowWarning, match=r"ends at step 1: .*what torch\.jit scripted"
    ):
        stepped(inside, optimizer, lambda: inside(torch.ones(5, 2, 2)), 3)


def test_norms_of_a_loop_of_unknown_weights_are_missing_with_a_reason(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[0])
            for one in x:
                h = gradflow.tap(h=torch.tanh(self.step(one + h)))
            return h

    net = Loop()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    watch = gradflow.watch(net, tmp_path / "a", every=1, budget=None)
    stepped(net, optimizer, lambda: net(torch.ones(5, 2, 3)), 2)
    watch.close()
    data = watch.history.data
    assert data["grad_norm"].isnull().all() and (data["grad_norm_all"] > 0).all()
    (note,) = watch.history.notes
    assert "norms of the parameter gradients of loop are not given: which weights" in note.text


def test_a_folder_with_a_history_is_not_written_into(tmp_path: Path) -> None:
    trained(tmp_path, [1.0, 1.0])
    with pytest.warns(gradflow.GradflowWarning, match="holds probes of steps 1 to 2; give another"):
        trained(tmp_path, [1.0])
    watch = trained(tmp_path, [1.0, 1.0], resume=True)
    assert watch.history.steps.tolist() == [1, 2, 3, 4]
    assert [note.text for note in watch.history.notes] == ["the run goes on behind step 2"]
    assert trained(tmp_path, [1.0], force=True).history.steps.tolist() == [1]


def stepped(
    net: nn.Module, optimizer: torch.optim.Optimizer, run: Callable[[], Tensor], steps: int
) -> None:
    """So many steps of a training."""
    for _ in range(steps):
        run().sum().backward()
        optimizer.step()


def test_a_model_without_recurrent_layers_is_told_once(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters())
    watch = gradflow.watch(net, tmp_path, every=1)
    with pytest.warns(gradflow.GradflowWarning, match="ends at step 1: .*no recurrent") as caught:
        stepped(net, optimizer, lambda: net(torch.ones(3, 2)), 3)
    assert len(caught) == 1 and not net._forward_pre_hooks
    watch.close()


def test_a_model_that_is_never_called_is_told_of(tmp_path: Path) -> None:
    net = Rnn()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    gradflow.watch(net, tmp_path, every=1)
    with pytest.warns(
        gradflow.GradflowWarning, match="20 updates were made, and the forward of Rnn"
    ):
        stepped(net, optimizer, lambda: net.rnn(torch.ones(5, 2, 1))[0], 30)


def test_two_watches_on_one_model_are_one(tmp_path: Path) -> None:
    net = Rnn()
    first = gradflow.watch(net, tmp_path / "a")
    with pytest.warns(
        gradflow.GradflowWarning, match="it is watched already, into .*a; close that"
    ):
        gradflow.watch(net, tmp_path / "b")
    first.close()
    gradflow.watch(net, tmp_path / "b").close()


def test_wrong_lengths_end_the_probe_and_not_the_training(tmp_path: Path) -> None:
    with pytest.warns(gradflow.GradflowWarning) as caught:
        trained(tmp_path, [1.0] * 5, lengths=torch.tensor([3]))
    said = " ".join(str(one.message) for one in caught)
    assert "lengths" in said and "the training goes on" in said


def test_a_full_disk_ends_the_watching_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(number: int) -> None:
        if number == 1:

            def no_room(file: int, content: bytes) -> int:
                if len(content) < 100:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(file, content[:99])

            monkeypatch.setattr(writers.os, "write", no_room)

    words = (
        r"ends at step 3: the history could not be written \(OSError: .*No space left on device\)"
    )
    with pytest.warns(gradflow.GradflowWarning, match=words) as caught:
        trained(tmp_path, [1.0] * 6, full)
    monkeypatch.undo()
    assert len(caught) == 1
    assert gradflow.load(tmp_path).steps.tolist() == [1, 2]  # type: ignore[union-attr]


def test_a_fault_of_ours_is_told_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr("gradflow.watching.watched.seen", fails)
    with pytest.warns(gradflow.GradflowWarning) as caught:
        watch = trained(tmp_path, [1.0] * 6)
    said = [str(one.message) for one in caught]
    assert len(said) == 2
    assert "a training step could not be measured (RuntimeError: injected)" in said[0]
    assert "3 probes in a row failed" in said[1]
    assert len(watch.history) == 0


# --------------------------------------------------------------------------------------- budget


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def run(schedule: Schedule, clock: Clock, steps: int, step: float, cost: float) -> list[int]:
    """The steps that are probed of a training whose steps and probes take so long."""
    probed = []
    for number in range(1, steps + 1):
        begun = clock.now
        is_due = number >= schedule.due and schedule.is_due(number)
        clock.now += step
        if is_due:
            arrived, clock.now = clock.now, clock.now + cost
            schedule.probed(number, clock.now - begun, arrived - begun)
            probed.append(number)
        elif probed and number == probed[-1] + 1:
            schedule.plain(clock.now - begun)
    return probed


def test_the_interval_grows_until_the_budget_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("gradflow.watching.schedule.time", clock)
    schedule = Schedule(10, 0.02)
    probed = run(schedule, clock, 20_000, 0.01, 0.1)
    taken = clock.now - 100.0
    assert probed[0] == 1
    assert 0.1 * len(probed) <= 0.02 * taken
    assert 0.1 * len(probed) >= 0.015 * taken  # and it is used
    assert "to keep to 2 % of the time the next one comes after" in schedule.words()
    assert schedule.words() == ""


def test_cheap_probes_come_as_often_as_asked_and_never_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("gradflow.watching.schedule.time", clock)
    assert run(Schedule(10, 0.02), clock, 1000, 1.0, 0.001) == list(range(1, 1001, 10))
    assert run(Schedule(1, None), clock, 30, 0.001, 10.0) == list(range(1, 31))
    assert run(Schedule(1, 1.0), clock, 30, 0.001, 10.0) == list(range(1, 31))


def test_rules_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(InputError, match="on must compare with a number"):
        read_rules("horizon<1.2.3")
    assert [one.text for one in read_rules(["nan, dead", "rate>0"]).conditions] == [
        "nan",
        "dead",
        "rate>0",
    ]
