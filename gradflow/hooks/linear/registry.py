"""The registry: functions of other packages that run a linear recurrence, and where they can be called from.

Nothing of another package is imported here: a function is found where the user has loaded its module,
and only then. A name that a version does not have is skipped. A new function is one `LibraryFunction` in
``state_spaces`` or ``matrix_memories``, and a test of its mapping against a slow loop.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gradflow.hooks.linear.matrix_memories import MATRIX_MEMORIES
from gradflow.hooks.linear.scanned import LibraryFunction
from gradflow.hooks.linear.state_spaces import STATE_SPACES

ENTRIES = (*STATE_SPACES, *MATRIX_MEMORIES)  # every function of the registry


@dataclass(frozen=True)
class Attribute:
    """Where a function of the registry is to be found: an attribute of a module, class or model part."""

    space: Any
    name: str
    entry: LibraryFunction


def places(parts: Iterable[Any]) -> Iterator[Attribute]:
    """Where the functions of the registry can be called from: in their modules, wherever another module
    has taken them from there, and in these parts of a model, which may hold them as attributes."""
    last = next(reversed(sys.modules), "")
    holding = _holding((len(sys.modules), last, id(sys.modules.get(last))))
    known: dict[int, LibraryFunction] = {}
    for entry in ENTRIES:
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
    roots = {module.partition(".")[0] for entry in ENTRIES for module in entry.modules}
    if not roots & sys.modules.keys():
        return []
    names = {entry.owner[0] or entry.owner[1] for entry in ENTRIES}
    return [
        (module, path, name)
        for path, module in loaded
        if isinstance(module, ModuleType)
        for name in names
        if name in vars(module)
    ]
