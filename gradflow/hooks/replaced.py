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
from dataclasses import dataclass, field
from typing import Any

ABSENT = object()

lock = threading.RLock()  # held while anything is replaced or put back, and never for longer
_beneath: weakref.WeakKeyDictionary[Any, Beneath] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Beneath:
    """What lies beneath a replacement of ours."""

    original: Any
    inherited: set[int] = field(default_factory=set)  # ids of spaces that have it from elsewhere


@dataclass(frozen=True)
class Replaced:
    """One attribute that is replaced."""

    space: Any
    name: str


def original_of(function: Any) -> Any:
    """The function beneath all replacements of ours that lie on top of it."""
    while (beneath := _known(function)) is not None:
        function = beneath.original
    return function


def _known(function: Any) -> Beneath | None:
    try:
        return _beneath.get(function)
    except TypeError:  # not hashable, or not to be referred to weakly
        return None


def replace(
    space: Any, name: str, make: Callable[[Any], Any], noted: Callable[[Replaced], object]
) -> None:
    """Put what is made of a function in its place; noted before, so that it is put back in any case."""
    there = vars(space).get(name, ABSENT)
    ours = _known(there)  # left from a recording that somebody had put another on top of
    inherited = there is ABSENT if ours is None else id(space) in ours.inherited
    original = original_of(getattr(space, name))
    new = make(original)
    beneath = _beneath.setdefault(new, Beneath(original))  # one may stand in several spaces
    beneath.inherited.update({id(space)} if inherited else ())
    noted(Replaced(space, name))
    _set(space, name, new)


def put_back(replaced: Replaced) -> None:
    """Take ours away; what others have put on top of it meanwhile stays."""
    there = vars(replaced.space).get(replaced.name, ABSENT)
    ours = _known(there)
    if ours is None:
        return  # somebody else's, who may call ours, or nothing of ours any more
    if id(replaced.space) in ours.inherited:
        delattr(replaced.space, replaced.name)
    else:
        _set(replaced.space, replaced.name, original_of(there))


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
