"""The members of a file that holds several things: modules and state_dicts in lists and dicts.

A member is named by the keys and indices that lead to it: ``encoder``, ``0``, ``models.encoder``.
Nothing of the file is run: modules of classes that are not opened stay inert shells.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import FileError, InputError, must_be, printable
from gradflow.limits import CONTAINER_DEPTH, MOST_CONTAINERS
from gradflow.loading.recurrent import from_tensors
from gradflow.loading.shells import Shell, foreign_classes, tensors_of
from gradflow.loading.state_dicts import NOT_WEIGHTS, fold, is_recurrent, renamed, tensors_in
from gradflow.loading.words import article, some


@dataclass(frozen=True)
class Member:
    """One module or state_dict of a file, and the name that leads to it."""

    name: str  # "encoder", "0", "models.encoder"
    module: nn.Module | Shell | None  # None for a state_dict
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def recurrent(self) -> bool:
        """Whether it holds recurrent weights."""
        return any(map(is_recurrent, self.tensors))

    @property
    def foreign(self) -> list[str]:
        """Classes in it whose code is not opened from a file."""
        return foreign_classes(self.module) if isinstance(self.module, Shell) else []

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def __str__(self) -> str:
        held = f" with {layers}" if (layers := self.layers) else ""
        return printable(f"{self.name!r}, {kind_of(self.module, self.tensors)}{held}")

    @property
    def layers(self) -> str:
        """Its recurrent layers in words, "LSTM(3 → 5)", or "" where there are none to tell."""
        try:
            found = from_tensors(fold(renamed(self.tensors)))
        except FileError:
            return ""
        return some([str(layer) for layer in found])


def kind_of(value: object, tensors: Mapping[str, Tensor] | None = None) -> str:
    """What a value is, in two words: "a GRU", "a state_dict", "an object of the class pkg.Net".

    >>> kind_of(nn.Identity()), kind_of(None), kind_of(3.5)
    ('an Identity', 'None', 'a float')
    """
    if tensors is not None and value is None:
        return "a state_dict"
    if isinstance(value, Shell):
        stock = value.path.startswith("torch.")
        return article(value.path.rpartition(".")[2] if stock else value.path)
    return "None" if value is None else article(type(value).__name__)


def members_of(value: object) -> list[Member]:
    """Every module and state_dict in what a file held, outermost and first ones first.

    A module is one member, whatever is in it. Losses, optimizers, and mappings whose names are
    those of optimizers, schedulers and settings are none.

    >>> [member.name for member in members_of([nn.GRU(3, 5), {"net": nn.Linear(2, 2)}])]
    ['0', '1.net']
    """
    found: dict[str, Member] = {}
    for name, item in _places(value):
        member = _as_member(name, item)
        if member is not None:
            found.setdefault(name, member)
    return list(found.values())


def pick(value: object, wanted: str) -> tuple[str, object]:
    """Find the member of this name: its full name, and what is there.

    A name leads through keys, indices, and on into a module's children and a state_dict's
    prefixes. A name that starts further inside is taken if only one place has it.

    Raises InputError where there is none, or more than one, with those that are there.

    >>> pick({"models": {"a": nn.GRU(3, 5)}}, "a")
    ('models.a', GRU(3, 5))
    """
    direct = _followed(value, wanted)
    if direct is not None:
        return wanted, direct.value
    inner = {
        f"{name}.{wanted}": follow.value
        for name, place in _places(value)
        if (follow := _followed(place, wanted)) is not None
    }
    if len(inner) == 1:
        return next(iter(inner.items()))
    if inner:
        raise InputError(
            must_be(
                "--member", "the name of one member", f"{wanted!r}, which {len(inner)} places have",
                f"give the whole name: {some(list(inner), 6)}",
            )
        )  # fmt: skip
    raise InputError(_not_there(value, wanted))


def named_list(members: list[Member], most: int = 6) -> str:
    """The members in words, recurrent ones first."""
    ordered = sorted(members, key=lambda member: not member.recurrent)
    return "; ".join(map(str, ordered[:most])) + (
        f"; and {len(ordered) - most} more" if len(ordered) > most else ""
    )


@dataclass(frozen=True)
class _Found:
    """What a name led to, which may be None."""

    value: object


def _not_there(value: object, wanted: str) -> str:
    members = members_of(value)
    if members:
        return must_be(
            "--member", "the name of a member of the file", repr(wanted),
            f"it holds {named_list(members)}",
        )  # fmt: skip
    keys = tensors_in(value) if isinstance(value, Mapping) else {}
    heads = [
        repr(head) for head in dict.fromkeys(k.partition(".")[0] for k in renamed(keys) if "." in k)
    ]
    if heads:
        return must_be(
            "--member", "a part of the one state_dict in the file", repr(wanted),
            f"its parts are {some(heads, 6)}",
        )  # fmt: skip
    return f"--member {wanted!r} asks for a part of a file that holds one thing; leave it out"


def _places(value: object) -> Iterator[tuple[str, object]]:
    """What lies in a container, however nested, with its name; each object once, nearest first."""
    waiting, seen = [("", value, 0)], {id(value)}
    for _ in range(MOST_CONTAINERS):
        if not waiting:
            return
        name, container, depth = waiting.pop(0)
        for key, item in _children(container):
            place = f"{name}.{key}" if name else key
            if id(item) in seen or not (_is_container(item) or _is_module(item)):
                continue
            seen.add(id(item))
            weights = tensors_in(item) if isinstance(item, Mapping) else {}
            named_otherwise = isinstance(item, Mapping) and NOT_WEIGHTS.search(key)
            if named_otherwise and not any(map(is_recurrent, weights)):
                continue
            yield place, item
            if not _is_module(item) and depth < CONTAINER_DEPTH:
                waiting.append((place, item, depth + 1))


def _children(container: object) -> list[tuple[str, object]]:
    if isinstance(container, Mapping):
        return [(str(key), item) for key, item in container.items()]
    if isinstance(container, list | tuple):
        return [(str(index), item) for index, item in enumerate(container)]
    if isinstance(container, nn.Module):
        return list(container._modules.items())
    if isinstance(container, Shell):
        return [(str(key), item) for key, item in _inside(container).items()]
    return list(vars(container).items()) if hasattr(container, "__dict__") else []


def _inside(shell: Shell) -> dict[Any, Any]:
    return shell.group("_modules") if shell.is_module else shell.attributes


def _is_module(item: object) -> bool:
    return isinstance(item, nn.Module) or (isinstance(item, Shell) and item.is_module)


def _is_container(item: object) -> bool:
    """Lists, tuples, dicts, and objects that hold members as attributes; no optimizer."""
    if isinstance(item, Mapping):
        return "param_groups" not in item
    if isinstance(item, list | tuple):
        return True
    if isinstance(item, Shell):
        return not {"param_groups", "optimizer"} & set(item.attributes)
    plain = isinstance(item, type | Tensor | torch.optim.Optimizer) or inspect.isroutine(item)
    held = getattr(item, "__dict__", None)
    return not plain and isinstance(held, dict) and "optimizer" not in held


def _as_member(name: str, item: object) -> Member | None:
    if isinstance(item, Shell) and item.is_module:
        return None if _is_loss(item) else Member(name, item, tensors_of(item))
    if isinstance(item, nn.Module):
        state = {k: v for k, v in item.state_dict().items() if isinstance(v, Tensor)}
        return None if _is_loss(item) else Member(name, item, state)
    if isinstance(item, Mapping) and (tensors := tensors_in(item)):
        return Member(name, None, tensors)
    return None


def _is_loss(item: nn.Module | Shell) -> bool:
    path = item.path if isinstance(item, Shell) else type(item).__module__
    return "modules.loss" in path


def _followed(value: object, name: str) -> _Found | None:
    """What the keys of a name lead to inside a value; None where they lead nowhere."""
    for key, item in sorted(_children(value), key=lambda child: -len(child[0])):
        if key == name:
            return _Found(item)
        if name.startswith(f"{key}.") and not isinstance(item, Tensor):
            inner = _followed(item, name.removeprefix(f"{key}."))
            if inner is not None:
                return inner
    if isinstance(value, Mapping):
        for tensors in (tensors_in(value), renamed(tensors_in(value))):
            part = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.")
            }
            if part:
                return _Found(part)
    return None
