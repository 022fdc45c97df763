"""The guard: what gradflow cannot do inside the user's own step becomes a note, never an exception there.

Every point at which the user's code calls into gradflow while a recording is open is a `Point`, and
all that gradflow does there is called by `guarded`. Within it the user's function modes, dispatch modes
and tensor subclasses are off. Two kinds of errors are passed on: an `InputError`, by which the user learns
of a wrong argument (not while a training is watched: it goes on), and what did not come of gradflow's
work (Ctrl-C, an exit, the time limit of a signal's handler). In any case `failed` is called, so that
what is incomplete can be left out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from gradflow.errors import InputError
from gradflow.hooks.outside import is_from_outside
from gradflow.hooks.unreadable import is_looked_at

Value = TypeVar("Value")
Failed = Callable[[str], object]  # told why, in a few words
busy: set[int] = set()  # threads in which gradflow itself computes, which is not recorded
lenient: set[int] = set()  # threads whose training goes on even after a wrong argument
LONGEST = 120  # characters of a cause that are quoted


class Point(Enum):
    """Where the user's code calls into gradflow -> what could not be done there."""

    OPENING = "the recording could not be opened"
    FUSED = "one of its calls could not be recorded"
    CELL = "one of its steps could not be recorded"
    TAP = "one of its taps could not be recorded"
    SCAN = "one of its scans could not be recorded"
    ENTERED = "one of its calls could not be followed"
    LEFT = "what one of its calls returned could not be followed"
    AGAIN = "its first step could not be run again on a copy"
    SCALER = "the scale of a GradScaler could not be read"
    BACKWARD = "the graph of a backward could not be looked at"
    GRADIENT = "a gradient that reached it could not be read"
    WEIGHT = "a gradient of its weights could not be read"
    CLOSING = "the recording could not be closed in order"
    PROBE = "a training step could not be measured"


def guarded(
    point: Point, failed: Failed, work: Callable[..., Value], *args: Any, **kwargs: Any
) -> Value | None:
    """What the work returns; None where it fails, and then `failed` is called with the reason.

    This is the one place where any exception is caught: an error of gradflow's must not end a training
    step that would have run without it. It is not hidden: `failed` puts it into words for the user, and
    withholds what is no longer whole.
    """
    alone = Unnoticed()
    try:
        try:
            try:
                alone.enter()
                return _do(point, work, *args, **kwargs)
            finally:
                alone.leave()
        finally:  # where Ctrl-C came meanwhile, first everything is put back
            alone.leave()
    except BaseException as error:
        failed(f"{point.value} ({briefly(error)})")
        strict = isinstance(error, InputError) and threading.get_ident() not in lenient
        if strict or not isinstance(error, Exception) or is_from_outside(error):
            raise
        return None


def _do(point: Point, work: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """The work; a test makes it fail at a point of its choice."""
    return work(*args, **kwargs)


class Unnoticed:
    """Within it the user's modes and tensor subclasses are off, and nothing is recorded.

    Afterwards the grad mode is as before. It may be left twice, or after an entry that failed.
    """

    def __init__(self) -> None:
        self._first = threading.get_ident() not in busy
        self._functions = torch._C._get_torch_function_state()  # type: ignore[attr-defined]
        off = torch._C._len_torch_dispatch_stack() and not is_looked_at()
        self._modes = _get_current_dispatch_mode_stack() if off else []
        self._grad = torch.is_grad_enabled()

    def enter(self) -> None:
        """From here on."""
        busy.add(threading.get_ident())
        off = torch._C._TorchFunctionState.ALL_DISABLED  # type: ignore[attr-defined]
        torch._C._set_torch_function_state(off)  # type: ignore[attr-defined]
        for _ in self._modes:
            _pop_mode()

    def leave(self) -> None:
        """Up to here."""
        for mode in self._modes[torch._C._len_torch_dispatch_stack() :]:
            _push_mode(mode)
        torch._C._set_torch_function_state(self._functions)  # type: ignore[attr-defined]
        if self._first:
            busy.discard(threading.get_ident())
        if torch.is_grad_enabled() is not self._grad:  # where even leaving no_grad was cut short
            torch.set_grad_enabled(self._grad)


@dataclass(frozen=True, eq=False)
class Hook:
    """A guarded hook that changes nothing of what it is given."""

    point: Point
    failed: Failed
    work: Callable[..., object]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        guarded(self.point, self.failed, self.work, *args, **kwargs)


def briefly(error: BaseException) -> str:
    """An error in a few printable words on one line.

    >>> briefly(ValueError("first line" + chr(10) + "second")), briefly(KeyError())
    ('ValueError: first line', 'KeyError')
    """
    with contextlib.suppress(Exception):  # an error's own text may raise
        said = " ".join("".join(c if c.isprintable() else " " for c in _line(error)).split())
        if said:
            cut = said if len(said) <= LONGEST else f"{said[:LONGEST].rstrip()} ..."
            return f"{type(error).__name__}: {cut}"
    return type(error).__name__


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")
