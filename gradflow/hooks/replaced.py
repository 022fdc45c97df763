"""Replaced: functions of torch and of modules that are others for the time being.

Other libraries, and users, replace the same functions, also while ours are there. What they put on top
of ours is never undone: ours then stays beneath as a wrapper that only calls on, and is taken away when
it comes to light again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ABSENT = object()

lock = threading.RLock()  # held while anything is replaced or put back, and never for longer
_originals: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Replaced:
    """One attribute that is replaced."""

    space: Any
    name: str
    held: Any  # what the space's own dict held: `ABSENT` where it inherits the function


def ours(replacement: Any, original: Any) -> Any:
    """Mark a replacement of ours, so that it is known again wherever it turns up."""
    _originals[replacement] = original
    return replacement


def original_of(function: Any) -> Any:
    """The function beneath all replacements of ours that lie on top of it."""
    while True:
        try:
            function = _originals[function]
        except (KeyError, TypeError):  # not ours; not hashable or not to be referred to weakly
            return function


def replace(
    space: Any, name: str, make: Callable[[Any], Any], noted: Callable[[Replaced], object]
) -> None:
    """Put what is made of a function in its place; noted before, so that it is put back in any case."""
    original = original_of(getattr(space, name))
    noted(Replaced(space, name, vars(space).get(name, ABSENT)))
    _set(space, name, ours(make(original), original))


def put_back(replaced: Replaced) -> None:
    """Take ours away; what others have put on top of it meanwhile stays."""
    there = vars(replaced.space).get(replaced.name, ABSENT)
    beneath = original_of(there)
    if beneath is there:
        return  # somebody else's, who may call ours, or nothing of ours any more
    inherited = replaced.held is ABSENT
    if inherited:
        delattr(replaced.space, replaced.name)
    else:
        _set(replaced.space, replaced.name, beneath)


def _set(space: Any, name: str, function: Any) -> None:
    if isinstance(space, type) or not hasattr(space, "_modules"):
        setattr(space, name, function)
    else:  # a module: its own __setattr__ may be the user's
        vars(space)[name] = function


def at_fork(in_child: Callable[[], None]) -> None:
    """In a process forked from this one: call this, when nothing is half replaced."""

    held: list[int] = []  # the thread that forks; none where it began before this was registered

    def before() -> None:
        lock.acquire()
        held.append(threading.get_ident())

    def after() -> None:
        if held and held[-1] == threading.get_ident():
            held.pop()
            lock.release()

    def child() -> None:
        held.clear()
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # its holder may not be in this process
        in_child()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=child)
