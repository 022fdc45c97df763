"""Heard: one call of a function of the registry, looked at before it runs, told of after it did."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.hooks.copies import copied
from gradflow.hooks.guard import NO_SEQUENCE, WRAPPED, Point, guarded, is_wrapped, why_hidden
from gradflow.hooks.linear.scanned import LibraryCall, LibraryFunction, Scanned, Unread
from gradflow.hooks.own.returned import leaves
from gradflow.limits import CALLER_FRAMES

MASK = "attention_mask"  # what models call it: (B, T), 0 on padding
PADDED_BEFORE = (
    "its attention mask is 0 before or within sequences: those steps are shown as steps; pad at the end "
    "to have them left out"
)


@dataclass(frozen=True)
class Told:
    """One recording that is to be told of a call."""

    observer: Any
    name: str  # the path of the module in its model
    kind: str  # the module's class


class Heard:
    """One call on its way to those recordings whose model makes it."""

    def __init__(
        self, observers: list[Any], entry: LibraryFunction, function: Callable[..., Any]
    ) -> None:
        self._entry, self._function, self._observers = entry, function, observers
        self._told: list[Told] = []
        self._given: dict[str, Any] = {}
        self._live: dict[str, Any] = {}
        self._mask: Tensor | None = None  # (B, T) of the model's own, copied

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Whose it is, and copies of what it is given: some functions change it."""
        guarded(Point.SCAN, self._missed_by_all, self._find)
        if self._told:
            guarded(Point.SCAN, self._missed, self._copy, args, kwargs)

    def after(self, results: Any) -> None:
        """Tell them what it was given and returned."""
        for told in self._told:
            missed = functools.partial(told.observer.missed_scan, told.name)
            guarded(Point.SCAN, missed, self._tell, told, results)

    def _find(self) -> None:
        modules, self._mask = _calling()
        hidden = why_hidden()
        for observer in self._observers:
            for module in modules:
                path = observer.path_of(module)
                if path is None:
                    continue
                name = path or self._entry.cell
                if hidden:
                    observer.did_not_see(name, hidden)
                else:
                    self._told.append(Told(observer, name, type(module).__name__))
                break

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._entry.fused:
            return
        try:
            self._live = self._entry.bound(self._function, args, kwargs)
        except Unread as why:
            self._missed(str(why))
            return
        tensors = leaves(self._live).values()
        if any(is_wrapped(tensor) for tensor in tensors):
            self._missed(WRAPPED)
        elif not all(tensor.numel() for tensor in tensors):
            self._missed(NO_SEQUENCE)
        else:
            self._given = {name: _copied(value) for name, value in self._live.items()}

    def _tell(self, told: Told, results: Any) -> None:
        if self._entry.fused:
            if results is not None:  # without its kernel it does nothing
                told.observer.missed_scan(told.name, self._entry.fused)
            return
        seen = LibraryCall(self._given, self._live, results, told.kind)
        try:
            fields = {"cell": self._entry.cell} | self._entry.read(seen)
        except Unread as why:
            told.observer.missed_scan(told.name, str(why))
            return
        lengths, remark = _lengths(self._mask, fields["batch"], fields["steps"])
        fields["precision"] = _coarsest(fields.get("precision"), leaves(self._given).values())
        fields["notes"] = (*fields.get("notes", ()), *remark)
        name = told.name + fields.pop("part", "")  # a module may run several
        given = leaves(self._live).values()
        fields["inputs"] = tuple(one for one in given if one is not fields.get("initial"))
        told.observer.saw_scan(Scanned(name=name, lengths=lengths, **fields))
        told.observer.saw_inside(list(leaves(self._live).values()), list(leaves(results).values()))

    def _missed(self, why: str) -> None:
        """Of what none of them will be told."""
        for told in self._told:
            told.observer.missed_scan(told.name, why)
        self._told = []

    def _missed_by_all(self, why: str) -> None:
        for observer in self._observers:
            observer.missed_scan(self._entry.cell, why)


def _coarsest(known: torch.dtype | None, given: Iterable[Tensor]) -> torch.dtype:
    """In which a function computes at worst, which a mapping may know: that of its coarsest argument."""
    kinds = {tensor.dtype for tensor in given if tensor.is_floating_point()}
    kinds |= {known} if known is not None else set()
    for device in {tensor.device.type for tensor in given}:
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return copied(value)
    if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
        return [_copied(each) for each in value]
    return None if isinstance(value, nn.Module) else value


def _calling() -> tuple[list[nn.Module], Tensor | None]:
    """The modules whose methods are under way, the innermost first, and a mask that one of them has."""
    found: list[nn.Module] = []
    mask: Tensor | None = None
    frame: FrameType | None = sys._getframe(1)
    for _ in range(CALLER_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            break
        variables = frame.f_code.co_varnames[: frame.f_code.co_argcount + 16]
        if "self" not in variables:
            continue
        local = frame.f_locals
        if isinstance(local.get("self"), nn.Module):
            found.append(local["self"])
            given = local.get(MASK)
            if mask is None and isinstance(given, Tensor) and given.dim() == 2:
                mask = given.detach() != 0
    return found, mask


def _lengths(mask: Tensor | None, batch: int, steps: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """(B,) real steps where a mask (B, T) tells them, and what it tells else."""
    if mask is None or mask.shape[0] != batch or mask.shape[1] < steps:
        return None, ()
    here = mask[:, -steps:]
    if bool(here.all()):
        return None, ()
    if bool((here[:, 1:] <= here[:, :-1]).all()):
        return here.sum(1).cpu(), ()
    return None, (PADDED_BEFORE,)
