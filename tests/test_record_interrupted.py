"""Ctrl-C, an exit, a time limit at every line of gradflow's own: all is as before, and training goes on.

The suite takes a share of the lines; `python tests/steadiness.py interrupts` takes all of them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Any

import pytest
import torch
from hostile import Everything
from interrupts import (
    ERRORS,
    RECURRENCES,
    WATCHED,
    Timeout,
    Trial,
    WatchedTrial,
    interrupted,
    lines_of,
)

import gradflow
from gradflow import process
from gradflow.hooks import guard

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::gradflow.GradflowWarning"),
]
SHARE = 24  # one line of so many


@pytest.mark.parametrize("kind", RECURRENCES)
def test_an_exception_at_any_line_leaves_all_as_found(kind: str) -> None:
    trial = Trial(kind)
    first = [runs[0] for runs in lines_of(trial).values()]
    assert len(first) > 1000
    tried = first[RECURRENCES.index(kind) :: SHARE]
    wrong = [interrupted(trial, at, ERRORS[n % len(ERRORS)]) for n, at in enumerate(tried)]
    assert [one for some in wrong for one in some] == []


@pytest.mark.parametrize("how", WATCHED)
def test_an_exception_in_a_watched_step_leaves_training_and_history_as_they_are(how: str) -> None:
    trial = WatchedTrial(how)
    first = [runs[0] for runs in lines_of(trial).values()]
    assert len(first) > 2000
    few = 40 if WATCHED[how] == "full" else 4  # an analysis a step takes seconds
    tried = first[[*WATCHED].index(how) :: few * SHARE]
    wrong = [interrupted(trial, at, ERRORS[n % 4]) for n, at in enumerate(tried)]
    assert [one for some in wrong for one in some] == []


def test_what_a_watched_step_leaves_behind_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = WatchedTrial("watched")
    for function, gone, words in (
        (gradflow.hooks.recorder.Recorder.saw, "is_cut_short", "the history of"),
        (gradflow.hooks.patch.stop_listening, "put_back", "gradflow is taken to be at work"),
    ):
        at = first_line_of(trial, function.__code__, function.__name__)
        for kind in (gradflow.hooks.stepwise.Stepwise, gradflow.hooks.stepwise.StepRecorder):
            if hasattr(kind, gone):
                monkeypatch.setattr(kind, gone, lambda _: False)
        wrong = interrupted(trial, at, KeyboardInterrupt)
        monkeypatch.undo()
        for observer in [*gradflow.hooks.patch._observers]:
            gradflow.hooks.patch.stop_listening(observer)
        assert any(words in one for one in wrong), (gone, wrong)


def first_line_of(trial: Trial, function: Any, name: str) -> int:
    """When a step first comes to the last line of a function."""
    runs = {line: at[0] for (code, line), at in lines_of(trial).items() if code is function}
    assert runs, name
    return runs[max(runs)]


def test_a_patch_that_stays_and_a_held_lock_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("fused")
    at = first_line_of(trial, gradflow.hooks.patch.listen.__code__, "listen")
    with monkeypatch.context() as patch:
        patch.setattr(process, "_release", lambda _: None)
        wrong = interrupted(trial, at, KeyboardInterrupt)
    gradflow.hooks.patch.lock.release()
    assert any("a lock that is held" in one for one in wrong)
    with monkeypatch.context() as patch:
        patch.setattr(gradflow.hooks.observe.OpenRecording, "put_back", lambda _: None)
        patch.setattr(gradflow.hooks.observe.OpenRecording, "close", lambda _: [])
        wrong = interrupted(trial, at, KeyboardInterrupt)
    for observer in [*gradflow.hooks.patch._observers]:
        gradflow.hooks.patch.stop_listening(observer)
    assert any("torch's functions" in one for one in wrong)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "is_from_outside", lambda _: False)
        wrong = interrupted(trial, at, Timeout)
    assert any("what came out is None" in one for one in wrong)


class Cancelled(Exception):
    """What another thread raises in this one."""


def test_an_exception_of_another_thread_is_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes at any instruction, of gradflow's, of torch's or of the model's, and has no words."""
    trial, here, cancelled = Trial("own"), threading.get_ident(), 0
    lost: list[Any] = []  # in a __del__, whose exceptions Python drops
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    before = trial.around()
    set_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def cancel(wait: float) -> None:
        time.sleep(wait)
        set_in(ctypes.c_ulong(here), ctypes.py_object(Cancelled))

    for number in range(40):
        thread = threading.Thread(target=cancel, args=(number * 2e-4,))
        try:
            thread.start()
            for _ in range(60):
                trial.forth_and_back()
        except Cancelled:
            cancelled += 1
        thread.join()
        assert trial.left_behind(before, drawn=slice(None)) == []
    assert cancelled + len(lost) == 40 and cancelled > 30


def test_an_exception_between_a_call_and_its_link_is_what_comes_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two lists of one length: what closes the block must not fail over them in its place."""

    class Links(list[Any]):
        def append(self, link: Any) -> None:
            if len(self) == 4:
                raise KeyboardInterrupt
            super().append(link)

    chain = sys.modules["gradflow.hooks.loops.stitch"].Chain
    add = chain.add
    monkeypatch.setattr(chain, "add", lambda self, *one: (linked(self), add(self, *one)))

    def linked(self: Any) -> None:
        self.links = self.links if isinstance(self.links, Links) else Links(self.links)

    def run() -> None:
        state = None
        with gradflow.record(cell):
            for x in torch.randn(9, 2, 3):
                state = cell(x, state)

    cell = torch.nn.LSTMCell(3, 4)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not cell._forward_hooks and "forward" not in vars(cell)


def test_an_error_of_gradflows_own_is_not_taken_for_one_from_outside() -> None:
    faults: list[Any] = [lambda: "a"[len("a")], lambda: {}["a"], lambda: 1 / 0, lambda: None.a]  # type: ignore[attr-defined]
    faults += [lambda: torch.ones(2) @ torch.ones(3), lambda: int("a"), lambda: next(iter([]))]

    def asserted() -> None:
        raise AssertionError

    for fault in [*faults, asserted]:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            fault()
        assert not guard.is_from_outside(caught.value), caught.value


def test_two_threads_record_one_model_at_once() -> None:
    """Each sees its own calls and gradients, those of shared weights too."""
    model, both = Everything(), threading.Barrier(2)
    model.rnn.dropout = 0.0
    inputs = [torch.randn(5, 2, 3) for _ in range(2)]
    found: dict[int, Any] = {}

    def work(number: int, wait: Any) -> None:
        with gradflow.record(model) as recording:
            wait()
            output = model(inputs[number])
            wait()
            output.pow(2).sum().backward()
            wait()
        found[number] = recording

    alone = []
    for number in range(2):
        work(number, lambda: None)
        alone.append(found[number])
    threads = [threading.Thread(target=work, args=(n, both.wait)) for n in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    for number in range(2):
        assert found[number].notes == alone[number].notes
        for track in alone[number].values():
            beside = found[number][track.name]
            assert torch.equal(beside.grad_h, track.grad_h)
            assert beside.parity.status == track.parity.status, track.name
