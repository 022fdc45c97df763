"""An analysis leaves torch's numbers of threads as it found them, also where several run at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from gradflow.analyzer.threads import fitting_threads
from gradflow.limits import ONE_THREAD

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


@contextmanager
def each_for_itself() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
def test_many_analyses_at_once_leave_the_number_of_threads(seed: int) -> None:
    assert set(stress(lambda: fitting_threads(ONE_THREAD), seed)) == {FOUND}


def test_a_number_that_is_not_given_back_would_be_seen() -> None:
    assert any(set(stress(each_for_itself, seed)) != {FOUND} for seed in range(8))


def test_small_states_get_one_thread_and_wide_ones_all() -> None:
    with fitting_threads(ONE_THREAD + 1):
        assert torch.get_num_threads() == FOUND
    with fitting_threads(ONE_THREAD), fitting_threads(ONE_THREAD):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), of_a_new_thread()) == (FOUND, FOUND)


def test_a_number_of_ones_own_stays_a_threads_own() -> None:
    """The one that the process has for new threads may be another than this thread's."""
    thread = threading.Thread(target=lambda: torch.set_num_threads(5))
    thread.start()
    thread.join()
    with fitting_threads(ONE_THREAD):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), of_a_new_thread()) == (FOUND, 5)
