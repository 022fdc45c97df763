"""What belongs to the whole process is as it was after every call, also of several threads at once."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
import torch
from seam import look
from torch import Tensor, nn

import gradflow
from gradflow import process
from gradflow.limits import ONE_THREAD
from gradflow.process import fitting_threads, printed_to_stderr, quiet, random_numbers_kept

FOUND = 3


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(FOUND)
    yield
    torch.set_num_threads(before)


def of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def state() -> dict[str, Any]:
    """All that a thread shares with the others, to be compared."""
    return {
        "threads": (torch.get_num_threads(), of_a_new_thread()),
        "functions": dict(vars(torch._VF)) | {"backward": torch.autograd._engine_run_backward},
        "filters": list(warnings.filters),
        "shown by": warnings.showwarning,
        "torch drew": torch.get_rng_state().tolist(),
        "numpy drew": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python drew": random.getstate(),
        "style": dict(mpl.rcParams),
        "backend": mpl.get_backend(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "printed to": (sys.stdout, sys.stderr),
        "path": list(sys.path),
    }


def overlap(borrowed: Callable[[], AbstractContextManager[Any]]) -> list[str]:
    """What is left changed by two threads of which the one that began first ends first."""
    before, inside, out = state(), threading.Event(), threading.Event()

    def first() -> None:
        with borrowed():
            inside.set()
            time.sleep(0.05)
        out.set()

    def second() -> None:
        inside.wait()
        with borrowed():
            out.wait()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = state()
    return [name for name in before if before[name] != after[name]]


@contextmanager
def kept_and_drawn() -> Iterator[None]:
    with random_numbers_kept():
        torch.manual_seed(random.randrange(99))
        np.random.rand()  # noqa: NPY002
        yield


@contextmanager
def forked_and_drawn() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.randrange(99))
        yield


@contextmanager
def one_thread_each_for_itself() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BORROWED = [quiet, kept_and_drawn, printed_to_stderr, lambda: fitting_threads(ONE_THREAD), look]
SAVED_AND_RESTORED = [
    (warnings_ignored, "filters"),
    (forked_and_drawn, "torch drew"),
    (lambda: contextlib.redirect_stdout(io.StringIO()), "printed to"),
    (one_thread_each_for_itself, "threads"),
    (lambda: matplotlib.style.context("dark_background"), "style"),
]


@pytest.mark.parametrize("borrowed", BORROWED)
def test_what_two_threads_borrow_is_given_back(borrowed: Any) -> None:
    assert overlap(borrowed) == []


@pytest.mark.parametrize(("borrowed", "changed"), SAVED_AND_RESTORED, ids=lambda x: str(x)[:20])
def test_what_is_only_saved_and_restored_would_be_seen(borrowed: Any, changed: str) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(matplotlib.style.context([]))
        stack.enter_context(random_numbers_kept())
        stack.enter_context(contextlib.redirect_stdout(sys.stdout))
        assert changed in overlap(borrowed)


def test_warnings_of_other_threads_are_heard() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("mine", stacklevel=1)
            thread = threading.Thread(target=lambda: warnings.warn("theirs", stacklevel=1))
            thread.start()
            thread.join()
    assert [str(warning.message) for warning in caught] == ["theirs"]


def test_quiet_ends_within_what_somebody_else_catches() -> None:
    before = list(warnings.filters)
    mine, theirs = quiet(), warnings.catch_warnings()
    mine.__enter__()
    theirs.__enter__()
    mine.__exit__(None, None, None)
    assert list(warnings.filters) == before
    theirs.__exit__(None, None, None)
    assert list(warnings.filters) == before


def stress(analysis: Callable[[], AbstractContextManager[None]], seed: int) -> list[int]:
    """Analyses that begin and end in any order; what later threads get, and these ones after it."""
    rng, after = random.Random(seed), []
    waits = [(rng.random() / 100, rng.random() / 100) for _ in range(6)]

    def work(before: float, inside: float) -> None:
        for _ in range(3):
            time.sleep(before)
            with analysis():
                torch.ones(3).sum()
                time.sleep(inside)
        after.append(torch.get_num_threads())

    threads = [threading.Thread(target=work, args=pair) for pair in waits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*after, of_a_new_thread(), torch.get_num_threads()]


@pytest.mark.parametrize("seed", range(4))
def test_many_analyses_at_once_leave_the_number_of_threads(seed: int) -> None:
    assert set(stress(lambda: fitting_threads(ONE_THREAD), seed)) == {FOUND}


def test_a_number_that_is_not_given_back_would_be_seen() -> None:
    assert any(set(stress(one_thread_each_for_itself, seed)) != {FOUND} for seed in range(8))


def test_small_states_get_one_thread_and_wide_ones_all() -> None:
    with fitting_threads(ONE_THREAD + 1):
        assert torch.get_num_threads() == FOUND
    with fitting_threads(ONE_THREAD), fitting_threads(ONE_THREAD):
        assert torch.get_num_threads() == 1
        assert of_a_new_thread() == FOUND  # a thread of the user's keeps what it gets
    assert (torch.get_num_threads(), of_a_new_thread()) == (FOUND, FOUND)


def test_a_number_of_ones_own_stays_a_threads_own() -> None:
    """The one that the process has for new threads may be another than this thread's."""
    thread = threading.Thread(target=lambda: torch.set_num_threads(5))
    thread.start()
    thread.join()
    with fitting_threads(ONE_THREAD):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), of_a_new_thread()) == (FOUND, 5)


class Zoneout(nn.Module):
    """A cell that draws from everybody's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        kept = random.random() < 0.3 or np.random.rand() < 0.3  # noqa: NPY002
        new = torch.dropout(self.inner(torch.cat([x, h], 1)).tanh(), 0.2, train=True)
        return 0.5 * h + 0.5 * new if kept else new


class Loop(nn.Module):
    def __init__(self, cell: nn.Module, size: int) -> None:
        super().__init__()
        self.cell, self.size = cell, size

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.size)
        for step in x:
            h = self.cell(step, h)
        return h


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(2, 6, num_layers=2),
    "gru": lambda: nn.GRU(2, 5, bidirectional=True),
    "rnn": lambda: nn.RNN(2, 7, nonlinearity="relu"),
    "cells": lambda: Loop(nn.GRUCell(2, 4), 4),
    "own": lambda: Loop(Zoneout(), 5),
}


def recorded(name: str, seed: int) -> dict[str, Any]:
    """Numbers of one model, recorded, analyzed and drawn; weights and data have generators of their own."""
    numbers = torch.Generator().manual_seed(seed)
    with random_numbers_kept():  # torch's layers draw their weights from everybody's
        torch.manual_seed(seed)
        model = MODELS[name]()
        x = torch.randn(12, 3, 2, generator=numbers)
        with gradflow.record(model) as recording:
            out = model(x)
            (out[0][-1] if isinstance(out, tuple) else out).square().sum().backward()
    run = gradflow.analyze(recording)
    picture = gradflow.plot(run)._repr_png_()  # type: ignore[attr-defined]
    grads = [track.grad_h.tolist() for track in recording.values() if track.grad_h is not None]
    return {"frame": run.frame("layers").to_csv(), "grads": grads, "picture": picture}


def diagnosed(name: str, seed: int) -> dict[str, Any]:
    """Numbers of a model with dropout in a pass of gradflow's own."""
    with random_numbers_kept():
        torch.manual_seed(seed)
        model = nn.LSTM(2, 4, num_layers=2, dropout=0.4)
        run = gradflow.diagnose(model, torch.randn(9, 3, 2))
    return {"frame": run.frame("layers").to_csv()}


TASKS: list[tuple[Callable[[str, int], dict[str, Any]], str, int]] = [
    *((recorded, name, 1) for name in MODELS),
    *((diagnosed, "dropout", seed) for seed in (1, 2)),
]


def wrong_at_once(tasks: list[Any], serial: list[dict[str, Any]]) -> list[Any]:
    """What threads at once get otherwise than one after the other, and what they leave changed."""
    before = state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: task[0](*task[1:]), tasks))
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    return changed + [
        (*task[1:], key)
        for task, alone, beside in zip(tasks, serial, found, strict=True)
        for key in alone
        if alone[key] != beside[key]
    ]


def test_threads_at_once_give_the_serial_results_and_leave_all_as_found() -> None:
    assert wrong_at_once(TASKS, [work(name, seed) for work, name, seed in TASKS]) == []


def goes_wrong(tasks: list[Any], serial: list[Any]) -> bool:
    """Whether the numbers differ, or a dropout that somebody else drew in between is refused."""
    try:
        return bool(wrong_at_once(tasks, serial))
    except gradflow.errors.RecordingError:
        return True


def test_threads_that_do_not_wait_for_each_other_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = 4 * TASKS[-2:]
    serial = 4 * [work(name, seed) for work, name, seed in TASKS[-2:]]
    with random_numbers_kept():
        monkeypatch.setattr(process, "held", contextlib.nullcontext)
        assert any(goes_wrong(tasks, serial) for _ in range(20))


def test_a_cell_that_draws_numbers_of_numpy_and_python_trains_as_without_a_recording() -> None:
    """Its first step is run again on a copy."""

    def trained(watched: bool) -> list[Any]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        model = Loop(Zoneout(), 5)
        with gradflow.record(model) if watched else contextlib.nullcontext():
            for _ in range(3):
                model(torch.randn(6, 2, 2)).sum().backward()
        drawn = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
        return [*drawn, *(weight.grad.tolist() for weight in model.parameters())]

    assert trained(True) == trained(False)
