"""Heard: one call of a function of the registry, looked at before it runs, told of after it did."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn

from gradflow.hooks.copies import copied
from gradflow.hooks.guard import Point, guarded
from gradflow.hooks.linear.registry import Entry, Seen, Unread
from gradflow.hooks.linear.scanned import Scanned
from gradflow.hooks.own.nested import leaves
from gradflow.hooks.unreadable import NO_SEQUENCE, WRAPPED, is_wrapped, why_hidden

_FRAMES = 12  # how far up the module may be whose forward makes the call


class Heard:
    """One call on its way to those recordings whose model makes it."""

    def __init__(self, observers: list[Any], entry: Entry, function: Callable[..., Any]) -> None:
        self._entry, self._function = entry, function
        self._told: list[tuple[Any, str]] = []  # observers, and the path of the module in its model
        self._observers = observers
        self._given: dict[str, Any] = {}
        self._live: dict[str, Any] = {}

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Whose it is, and copies of what it is given: some functions change it."""
        for observer in self._observers:
            guarded(Point.SCAN, self._missed_by(observer, ""), self._find, observer)
        if self._told:
            guarded(Point.SCAN, self._missed, self._copy, args, kwargs)

    def after(self, results: Any) -> None:
        """Tell them what it was given and returned."""
        for observer, name in self._told:
            guarded(
                Point.SCAN, self._missed_by(observer, name), self._tell, observer, name, results
            )

    def _find(self, observer: Any) -> None:
        paths = (observer.path_of(module) for module in _calling())
        path = next((path for path in paths if path is not None), None)
        if path is None:
            return  # not of its model
        hidden = why_hidden()
        if hidden:
            observer.did_not_see(path or self._entry.cell, hidden)
        else:
            self._told.append((observer, path or self._entry.cell))

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            if self._entry.fused:
                raise Unread(self._entry.fused)
            self._live = self._entry.bound(self._function, args, kwargs)
        except Unread as why:
            self._missed(str(why))
            return
        tensors = leaves(self._live).values()
        if any(is_wrapped(tensor) for tensor in tensors):
            self._missed(WRAPPED)
        elif not all(tensor.numel() for tensor in tensors):
            self._missed(NO_SEQUENCE)
        self._given = {name: _copied(value) for name, value in self._live.items()}

    def _tell(self, observer: Any, name: str, results: Any) -> None:
        seen = Seen(self._given, self._live, results)
        try:
            fields = self._entry.read(seen)
        except Unread as why:
            observer.missed_scan(name, str(why))
            return
        name += fields.pop("part", "")  # a module may run several
        observer.saw_scan(Scanned(name=name, cell=self._entry.cell, **fields))
        observer.saw_inside(list(leaves(self._live).values()), list(leaves(results).values()))

    def _missed(self, why: str) -> None:
        """Of what none of them will be told."""
        for observer, name in self._told:
            observer.missed_scan(name, why)
        self._told = []

    def _missed_by(self, observer: Any, name: str) -> Callable[[str], object]:
        return functools.partial(observer.missed_scan, name or self._entry.cell)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return copied(value)
    if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
        return type(value)(_copied(each) for each in value)
    return None if isinstance(value, nn.Module) else value


def _calling() -> list[nn.Module]:
    """The modules whose methods are under way, the innermost first."""
    found: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            break
        module = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(module, nn.Module):
            found.append(module)
    return found
