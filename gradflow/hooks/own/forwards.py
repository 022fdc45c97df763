"""Forwards: tell of every call of some modules while a recording is open, and leave no trace.

The function `forward` is replaced where the class holds it: a copy or a pickle of a module that is
made meanwhile is a plain one, and ``module.forward`` called directly is seen as well. A module that
was given a forward of its own has that one replaced.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from gradflow.hooks.patch import observers_here, untraced

STOCK = "torch.nn."


@dataclass(eq=False)
class _Kept:
    """One forward that is replaced for the time being."""

    owner: Any  # a class or a module
    original: Any
    replacement: Any
    users: int = 0


_lock = threading.RLock()
_kept: dict[int, _Kept] = {}


def holder(module: nn.Module) -> type | nn.Module | None:
    """What holds a module's forward; None where that is torch.nn's own or no plain function."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if "forward" in vars(module):
        return module if callable(vars(module)["forward"]) else None
    for kind in type(module).__mro__:
        if "forward" not in vars(kind):
            continue
        stock = kind.__module__.startswith(STOCK) and kind is not nn.Sequential
        plain = isinstance(vars(kind)["forward"], FunctionType)
        return kind if plain and not stock else None
    return None


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Tell the observers of the calling thread of every call of these modules."""
    owners = {id(owner): owner for m in modules if (owner := holder(m)) is not None}
    with _lock:
        for owner in owners.values():
            _replace(owner)
    try:
        yield
    finally:
        with _lock:
            for key in owners:
                _release(key)


def _replace(owner: type | nn.Module) -> None:
    kept = _kept.get(id(owner))
    if kept is None:
        original = vars(owner)["forward"]
        new = _watched(original) if isinstance(owner, type) else _Instead(owner, original)
        kept = _kept[id(owner)] = _Kept(owner, original, new)
        _put(owner, new)
    kept.users += 1


def _release(key: int) -> None:
    kept = _kept[key]
    kept.users -= 1
    if kept.users:
        return
    del _kept[key]
    if vars(kept.owner).get("forward") is kept.replacement:  # else the user put another there
        _put(kept.owner, kept.original)


def _put(owner: type | nn.Module, forward: Any) -> None:
    if isinstance(owner, type):
        owner.forward = forward  # type: ignore[attr-defined]
    else:
        vars(owner)["forward"] = forward


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _told(self, functools.partial(original, self), args, kwargs)

    return untraced(functools.wraps(original)(forward))


class _Instead:
    """Stands in for the forward that one module was given; is copied and pickled as that one."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        self.original = original
        self.module = module

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _told(self.module, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return copy.copy, (self.original,)


def _told(
    module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    observers = observers_here()
    if not observers:
        return original(*args, **kwargs)
    calls = [(observer, observer.entered(module, args, kwargs)) for observer in observers]
    result, done = None, False
    try:
        result = original(*args, **kwargs)
        done = True
    finally:
        for observer, call in calls:
            if call is not None:
                observer.left(call, result if done else None)
    return result
