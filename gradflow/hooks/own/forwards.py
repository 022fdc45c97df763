"""Watch every call of some modules while a recording is open; afterwards they are as before.

The function `forward` is replaced where the class holds it: a copy or a pickle of a module that is
made meanwhile is a plain one, and ``module.forward`` called directly is seen as well. A module that
was given a forward of its own has that one replaced.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from gradflow.hooks.guard import Point, guarded
from gradflow.hooks.patch import (
    Replaced,
    lock,
    observers_here,
    put_back,
    replace,
    run_as_it_is,
    something_is_compiled,
    traced_as,
    untraced,
)
from gradflow.process import held

TORCH_NN = "torch.nn."


_users: dict[int, set[Watching]] = {}  # who watches a forward, by the id of what holds it
_replaced: dict[int, Replaced] = {}


def holder(module: nn.Module) -> type | nn.Module | None:
    """What holds a module's forward; None where that is torch.nn's own or no plain function."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if "forward" in vars(module):
        return module if callable(vars(module)["forward"]) else None
    for kind in type(module).__mro__:
        if "forward" not in vars(kind):
            continue
        stock = kind.__module__.startswith(TORCH_NN) and kind is not nn.Sequential
        plain = isinstance(vars(kind)["forward"], FunctionType)
        return kind if plain and not stock else None
    return None


class Watching:
    """While it is open, the observers of the calling thread are notified of every call of some modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._owners = {id(owner): owner for m in modules if (owner := holder(m)) is not None}

    def open(self) -> None:
        """Begin to watch."""
        with held(lock):
            for key, owner in self._owners.items():
                _users.setdefault(key, set()).add(self)
                if key in _replaced:
                    continue
                make = _watched if isinstance(owner, type) else functools.partial(_Instead, owner)
                replace(owner, "forward", make, functools.partial(_replaced.__setitem__, key))

    def close(self) -> None:
        """Put back every forward that no recording watches any more."""
        with held(lock):
            for key in self._owners:
                _users.get(key, set()).discard(self)
                if _users.get(key):
                    continue
                if key in _replaced:
                    put_back(_replaced[key])
                    del _replaced[key]
                _users.pop(key, None)


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _told(self, functools.partial(original, self), args, kwargs)

    return traced_as(original, forward)


class _Instead:
    """Stands in for the forward that one module was given; is copied and pickled as that one."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        self.original = original
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        return _told(self.module, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return copy.copy, (self.original,)


def _told(
    module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    calls = _entered(module, args, kwargs)
    result, done = None, False
    try:
        result = original(*args, **kwargs)
        done = True
    finally:
        if calls:
            _left(module, calls, result if done else None)
    return result


@untraced
def _entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    calls = []
    for observer in observers_here():
        missed = functools.partial(observer.missed_cell, module)
        call = guarded(Point.ENTERED, missed, observer.entered, module, args, kwargs)
        if call is not None:
            calls.append((observer, call))
    return calls


@untraced
def _left(module: nn.Module, calls: list[Any], result: Any) -> None:
    for observer, call in calls:
        missed = functools.partial(observer.missed_cell, module)
        guarded(Point.LEFT, missed, observer.left, call, result)


for _code in (_told.__code__, _Instead.__call__.__code__):
    run_as_it_is(_code)  # what they call is compiled as it would be without them


class Ran:
    """Which of a model's direct children ran; only a message needs it.

    Hooks on modules take torch off its fast paths for attention, and have compiled code compiled
    again; where either could be, nothing is hooked and the message does without.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[str, None] = {}
        delicate = nn.MultiheadAttention, torch.jit.ScriptModule
        modules = nn.Module.modules(model)
        off = something_is_compiled() or any(isinstance(m, delicate) for m in modules)
        self._children = {} if off else dict(model.named_children())

    def open(self) -> None:
        """Hook them; the hooks only write a name into a dict: a guard torch.compile could not read."""
        for name, child in self._children.items():
            note = functools.partial(_note, self.names, f"{name} ({type(child).__name__})")
            child.register_forward_pre_hook(note)

    def close(self) -> None:
        """Take the hooks away, known by the dict, so that none can be made and not be known."""
        for child in self._children.values():
            hooks = child._forward_pre_hooks
            for key, hook in [*hooks.items()]:
                if isinstance(hook, functools.partial) and any(
                    one is self.names for one in hook.args
                ):
                    del hooks[key]


def _note(names: dict[str, None], name: str, *_: object) -> None:
    names[name] = None
