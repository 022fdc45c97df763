"""Functions of torch and of modules that are replaced while a recording is open.

Other libraries, and users, replace the same functions, also while ours are there. What they put on top
of ours is never undone: our wrapper then stays below theirs, does nothing but call the original, and is
removed as soon as it is the attribute again.
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
    """What one of our wrappers replaced."""

    original: Any
    inherited: set[int] = field(default_factory=set)  # ids of spaces that only inherited it


@dataclass(frozen=True)
class Replaced:
    """One attribute that is replaced."""

    space: Any
    name: str


def original_of(function: Any) -> Any:
    """The function that our wrappers, perhaps several around each other, replaced."""
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
    """Replace a function by what `make` makes of it; `noted` is called first, so that it can be put back."""
    there = vars(space).get(name, ABSENT)
    ours = _known(there)  # left from a recording after which another wrapper lay on top
    inherited = there is ABSENT if ours is None else id(space) in ours.inherited
    original = original_of(getattr(space, name))
    new = make(original)
    beneath = _beneath.setdefault(new, Beneath(original))  # one may stand in several spaces
    beneath.inherited.update({id(space)} if inherited else ())
    noted(Replaced(space, name))
    _set(space, name, new)


def put_back(replaced: Replaced) -> None:
    """Remove our wrapper; a wrapper that another library put around it meanwhile stays."""
    there = vars(replaced.space).get(replaced.name, ABSENT)
    ours = _known(there)
    if ours is None:
        return  # another library's wrapper, perhaps around ours, or the original
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
    """Call this in every process forked from here, which is forked while nothing is half replaced."""

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
