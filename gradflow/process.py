"""What belongs to the whole process, borrowed: it is given back, also where several threads borrow.

Warnings, random numbers, standard output, torch's numbers of threads and matplotlib's style are the
same for all threads of a process. Saving and restoring them is not enough: of two threads that do so
at overlapping times, the one that leaves last restores what the other had set. So here either only
one's own entry is put in and taken out, or one waits for the other.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from gradflow.errors import InputError, must_be
from gradflow.limits import ONE_THREAD

Given = ParamSpec("Given")
Value = TypeVar("Value")


def lock() -> Any:
    """A lock, to be entered by one thread more than once, that a forked process finds free."""
    made = threading.RLock()
    os.register_at_fork(after_in_child=made._at_fork_reinit)  # type: ignore[attr-defined]
    return made


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """The lock is held inside, and free afterwards also where Ctrl-C came between two lines.

    Plain `with lock` keeps it for ever where an exception is raised behind its block and before its end.
    """
    if lock._is_owned():
        yield
        return
    try:
        try:
            lock.acquire()
            yield
        finally:
            _release(lock)
    finally:
        _release(lock)


def _release(lock: Any) -> None:
    if lock._is_owned():
        lock.release()


_random_lock, _thread_lock, _output_lock = lock(), lock(), lock()


class _OfThisThread:
    """Stands where a filter of warnings has the pattern of its text: matches in one thread only."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def match(self, _: str) -> bool:
        return threading.get_ident() == self._thread


class _Filter(tuple[Any, ...]):
    """A filter of warnings that equals itself alone, so that no other is taken out for it."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = tuple.__hash__


@contextmanager
def quiet() -> Iterator[None]:
    """No warning that is raised inside, in this thread, is shown or becomes an error.

    `warnings.catch_warnings` would put back all filters, those of other threads too.

    >>> import warnings
    >>> with warnings.catch_warnings(), quiet():
    ...     warnings.simplefilter("error")
    >>> with quiet():
    ...     warnings.warn("nobody hears of it")
    """
    entry: Any = _Filter(("ignore", _OfThisThread(), Warning, None, 0))
    found: Any = warnings.filters
    try:
        try:
            found.insert(0, entry)
            yield
        finally:
            _take_out(entry, found)
    finally:  # where Ctrl-C came meanwhile
        _take_out(entry, found)


def _take_out(entry: Any, found: Any) -> None:
    now: Any = warnings.filters  # another list while other code is catching warnings
    for filters in (found, now):
        if entry in filters:
            filters.remove(entry)


def settled(future: Future[Value], work: Callable[..., Value], *args: Any) -> Future[Value]:
    """A future that has what some work gives, or raises what it raises, as that of an executor.

    >>> settled(Future(), int, "7").result()
    7
    """
    try:
        future.set_result(work(*args))
    except Exception as error:  # noqa: BLE001  it is raised from the future
        future.set_exception(error)
    return future


def require_executor(executor: object, such_as: str) -> None:
    """Raise InputError for what takes no work."""
    if callable(getattr(executor, "submit", None)):
        return
    kind, advice = type(executor).__name__, f"give {such_as}, or leave it out"
    raise InputError(must_be("executor", "a concurrent.futures.Executor", kind, advice))


def without_modes(work: Callable[Given, Value]) -> Callable[Given, Value]:
    """A function in which the user's modes are off: what it makes lies on the CPU.

    `torch.set_default_device("cuda")` is such a mode.
    """

    @functools.wraps(work)
    def alone(*args: Given.args, **kwargs: Given.kwargs) -> Value:
        with torch._C.DisableTorchFunction():
            return work(*args, **kwargs)

    return alone


@contextmanager
def random_numbers_kept(devices: Sequence[Any] | None = ()) -> Iterator[None]:
    """What is drawn inside leaves the random numbers of torch, numpy and Python as they were.

    Threads that do so wait for each other.

    Args:
        devices: GPUs whose numbers are kept too; all where None.
    """
    with held(_random_lock):
        plain = random.getstate()
        arrays = np.random.get_state(legacy=False)  # noqa: NPY002  the user's model may draw there
        try:
            try:
                with torch.random.fork_rng(_all_devices() if devices is None else list(devices)):
                    yield
            finally:
                random.setstate(plain)
        finally:
            random.setstate(plain)  # again, where Ctrl-C came meanwhile
            np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def autocast(device: str, *, enabled: bool, dtype: torch.dtype | None = None) -> Iterator[None]:
    """torch.autocast, left also where Ctrl-C comes between two lines."""
    before = _autocast_of(device)
    try:
        try:
            with torch.autocast(device, enabled=enabled, dtype=dtype):
                yield
        finally:
            _cast_as(device, *before)
    finally:
        _cast_as(device, *before)


def _autocast_of(device: str) -> tuple[int, bool, bool, torch.dtype]:
    """How many autocasts lie around each other, whether casts are kept, whether it is on, its dtype."""
    # on one line: between two of them an exception may come
    depth = (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1]
    return (
        depth,
        torch.is_autocast_cache_enabled(),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    )


def _cast_as(device: str, depth: int, kept: bool, enabled: bool, dtype: torch.dtype) -> None:
    now = _autocast_of(device)
    if now == (depth, kept, enabled, dtype):
        return
    for _ in range(now[0] - depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(kept)
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)


def _all_devices() -> list[int]:
    """The GPUs in use: without a list torch warns of forking many."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


# standard output as it was found, and what stands for it inside
_printing: list[tuple[Any, Any]] = []


@contextmanager
def printed_to_stderr() -> Iterator[None]:
    """What is printed inside, in any thread, goes to standard error."""
    with held(_output_lock):
        _printing.append(_printing[0] if _printing else (sys.stdout, sys.stderr))
        sys.stdout = _printing[0][1]
    try:
        yield
    finally:
        with held(_output_lock):
            found, ours = _printing.pop()
            if not _printing and sys.stdout is ours:  # else other code replaced it: that stays
                sys.stdout = found


@contextmanager
def current_folder_importable(*folders: str) -> Iterator[None]:
    """The current folder, and others, are in front of ``sys.path`` inside, as with `python -m`."""
    added = [os.getcwd(), *folders]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


@contextmanager
def fitting_threads(size: int) -> Iterator[None]:
    """One thread for small matrices, where waiting for each other costs more than the work."""
    with nullcontext() if size > ONE_THREAD else so_many_threads(1):
        yield


@contextmanager
def so_many_threads(number: int) -> Iterator[None]:
    """This thread has so many for its sums, as the one has that it works for.

    torch keeps a number of threads for each thread, and one that new threads take over; setting the
    first sets the second too, which is set back at once.

    Args:
        number: of threads.
    """
    with held(_thread_lock):  # else a new thread may take over what another one sets
        before = torch.get_num_threads()
    if number == before:
        yield
        return
    _set_threads_here(number)
    try:
        yield
    finally:
        _set_threads_here(before)


def _set_threads_here(number: int) -> None:
    """How many threads this thread may use; what new ones get stays what it was."""
    read, set_here = threading.Event(), threading.Event()

    def put_back() -> None:
        others = torch.get_num_threads()
        read.set()
        set_here.wait()
        torch.set_num_threads(others)

    with held(_thread_lock):
        thread = threading.Thread(target=put_back)
        thread.start()
        try:
            read.wait()
            torch.set_num_threads(number)
        finally:
            set_here.set()
            thread.join()


@contextmanager
def many_objects() -> Iterator[None]:
    """While a file's objects are made, which all stay, Python does not look again and again for garbage.

    >>> with many_objects():
    ...     gc.isenabled()
    False
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
