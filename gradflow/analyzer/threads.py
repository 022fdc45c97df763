"""How many threads an analysis may use.

torch keeps one number per thread, and one for the process that threads take over when they first
compute. Setting the first sets the second too; analyses in several threads at once therefore keep
account together, and the last one out leaves both as the first one in found them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gradflow.limits import ONE_THREAD


class _Account:
    """Who is inside, and what to go back to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside: dict[int, list[int]] = {}  # thread -> its numbers, as its analyses began
        self.process = 0  # what new threads took over before the first one went in

    def enter(self) -> None:
        """This thread computes with one thread from now on."""
        with self.lock:
            mine = torch.get_num_threads()
            if not self.inside:
                self.process = _of_a_new_thread()
            elif mine == 1 and threading.get_ident() not in self.inside:
                mine = self.process  # a new thread, which took over the one of the others
            self.inside.setdefault(threading.get_ident(), []).append(mine)
            torch.set_num_threads(1)

    def leave(self) -> None:
        """This thread gets back what it had; the last one out gives new threads what they had."""
        with self.lock:
            numbers = self.inside[threading.get_ident()]
            mine = numbers.pop()
            if not numbers:
                del self.inside[threading.get_ident()]
            torch.set_num_threads(mine)
            if not self.inside and mine != self.process:
                _in_a_new_thread(lambda: torch.set_num_threads(self.process))


_account = _Account()


def _forget_other_threads() -> None:
    """In a forked process only the thread that forked is left."""
    _account.lock = threading.Lock()
    here, others = threading.get_ident(), bool(_account.inside)
    _account.inside = {known: of for known, of in _account.inside.items() if known == here}
    if not _account.inside and others:
        torch.set_num_threads(_account.process)


os.register_at_fork(after_in_child=_forget_other_threads)


def _of_a_new_thread() -> int:
    found: list[int] = []
    _in_a_new_thread(lambda: found.append(torch.get_num_threads()))
    return found[0]


def _in_a_new_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@contextmanager
def fitting_threads(size: int) -> Iterator[None]:
    """One thread for small matrices, where waiting for each other costs more than the work."""
    if size > ONE_THREAD:
        yield
        return
    _account.enter()
    try:
        yield
    finally:
        _account.leave()
