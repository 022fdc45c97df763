"""The registry: functions of other packages that run a linear recurrence, and what their arguments mean.

An `Entry` names a function by its module and its name, and maps the arguments of one call to A_t, B_t
and C_t. Nothing is imported here: a function is found where the user has loaded its module, and only
then. A name that a version does not have is skipped. A new function is one entry in one of the files of
``kinds``, and a test of its mapping against a slow loop.

Letters: T steps, B sequences, D channels, N numbers a channel, H heads, d_k, d_v sizes of keys, values.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor


class Unread(Exception):
    """A call that is not understood, in words that go on after "it was not recorded: "."""


@dataclass(frozen=True)
class Seen:
    """One call of a function of the registry, after it returned."""

    given: dict[str, Any]  # its arguments by name, tensors as detached copies made before it ran
    live: dict[str, Any]  # the same as they were given
    results: Any  # what it returned, live
    kind: str  # the class of the module that called it

    def result(self, place: int = 0) -> Any:
        """What it returned at this place; all of it where it is no tuple and the place is the first."""
        if isinstance(self.results, (tuple, list)):
            return self.results[place] if place < len(self.results) else None
        return self.results if place == 0 else None

    def initial(self, name: str) -> Tensor | None:
        """The first state that it was given, live."""
        found: Tensor | None = self.live.get(name)
        return found


def _nothing(seen: Seen) -> dict[str, Any]:
    """Of a function of which nothing can be read."""
    return {}


@dataclass(frozen=True)
class Entry:
    """A function that runs a linear recurrence over all steps of its arguments."""

    modules: tuple[str, ...]  # names, each a whole module or a package with all that is below it
    name: str  # in the module: "mamba_selective_scan", "RecurrentGemmaRglru._rnn_scan"
    cell: str  # what people call it: "Mamba", "gated delta rule"
    reads: str = ""  # the arguments that the mapping reads, in the function's own order
    read: Callable[[Seen], dict[str, Any]] = _nothing  # fields of `Scanned` beside name and cell
    # that change what is computed in a way that is not read, unless None, False or left out
    refuses: tuple[str, ...] = ()
    ignores: str = ""  # that change how, not what: the size of a chunk
    fused: str = ""  # why nothing can be read of this function at all, if so

    @property
    def owner(self) -> tuple[str, str]:
        """The class that holds it, or "", and its name there."""
        holder, _, name = self.name.rpartition(".")
        return holder, name

    def is_of(self, path: str) -> bool:
        """Whether a module of this name is one of its own."""
        return any(path == each or path.startswith(f"{each}.") for each in self.modules)

    def bound(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a call by name, defaults filled in."""
        names = self.reads.split()
        signature = inspect.signature(function)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return dict(zip(names, args, strict=False)) | kwargs  # it does not tell its arguments
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = dict(bound.arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name)
        self._check(signature, named)
        return named

    def _check(self, signature: inspect.Signature, named: dict[str, Any]) -> None:
        missing = [name for name in self.reads.split() if name not in signature.parameters]
        if missing:
            raise Unread(f"{self.name} of this version has no argument {missing[0]!r}")
        for name in self.refuses:
            if named.get(name) is not None and named[name] is not False:
                raise Unread(f"its argument {name!r} is not understood")
        known = {*self.reads.split(), *self.ignores.split(), *self.refuses, "self"}
        for name, parameter in signature.parameters.items():
            if name in known or parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            if named[name] is not None and named[name] is not parameter.default:
                raise Unread(f"its argument {name!r} is not understood")


@dataclass(frozen=True)
class Attribute:
    """Where a function of the registry is to be found: an attribute of a module, class or model part."""

    space: Any
    name: str
    entry: Entry


def entries() -> tuple[Entry, ...]:
    """Every function of the registry."""
    from gradflow.hooks.linear.kinds import ENTRIES

    return ENTRIES


def places(parts: Iterable[Any]) -> Iterator[Attribute]:
    """Where the functions of the registry can be called from: in their modules, wherever another module
    has taken them from there, and in these parts of a model, which may hold them as attributes."""
    last = next(reversed(sys.modules), "")
    holding = _holding((len(sys.modules), last, id(sys.modules.get(last))))
    known: dict[int, Entry] = {}
    for entry in entries():
        holder, name = entry.owner
        for module, path, held in holding:
            if held != (holder or name) or not entry.is_of(path):
                continue
            space = vars(module).get(holder) if holder else module
            function = None if space is None else vars(space).get(name)
            if callable(function):
                known.setdefault(id(function), entry)
                if holder and known[id(function)] is entry:
                    yield Attribute(space, name, entry)
    if not known:
        return
    for module, _, held in holding:
        if id(vars(module).get(held)) in known:
            yield Attribute(module, held, known[id(vars(module)[held])])
    for space in (sys.modules.get("__main__"), *parts):
        for name, value in list(vars(space).items()) if space is not None else []:
            function = value.func if isinstance(value, functools.partial) else value
            if id(function) in known:
                yield Attribute(space, name, known[id(function)])


@functools.lru_cache(maxsize=1)
def _holding(stamp: tuple[int, str, int]) -> list[tuple[ModuleType, str, str]]:
    """The loaded modules that hold something of a name of the registry: module, its name, the name.

    It is looked for again when more modules are loaded, which the stamp tells.
    """
    loaded = list(sys.modules.items())
    roots = {module.partition(".")[0] for entry in entries() for module in entry.modules}
    if not roots & sys.modules.keys():
        return []
    names = {entry.owner[0] or entry.owner[1] for entry in entries()}
    return [
        (module, path, name)
        for path, module in loaded
        if isinstance(module, ModuleType)
        for name in names
        if name in vars(module)
    ]
