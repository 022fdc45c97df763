"""One call of a function that runs a linear recurrence: how its arguments are read, what is handed over.

A `LibraryFunction` names a function of another package by its module and its name, and maps the
arguments of one call to A_t, B_t and C_t, the fields of a `Scanned`; what the mappings share of layouts
and precision stands below.

Letters: T steps, B sequences, D channels, N numbers a channel, H heads, d_k, d_v sizes of keys, values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradflow.cells.linear import LinearSteps


@dataclass(frozen=True, kw_only=True, eq=False)
class Scanned:
    """One call of a function that runs a linear recurrence over all of its steps.

    Whoever observes such a function makes one and hands it to ``observer.saw_scan(scanned)`` of every
    observer in ``patch.observers_here()``, by `guarded`. The tensors that are live are listened to and
    let go; `make` is asked when the track is read, perhaps never, and may close over copies or
    detached tensors only. What it makes must not depend on what the model does afterwards.
    """

    name: str  # of the track, the path of the module: "layers.0.mixer"
    cell: str  # what people call it: "Mamba", "gated delta rule"; "scan" where the user marks one
    steps: int  # T
    batch: int  # B
    shape: tuple[int, ...]  # of one state: (heads, d_k, d_v), (channels, N), (channels,)
    make: Callable[[], LinearSteps]  # A_t, B_t, C_t from copies of the arguments
    output: Tensor | None = None  # live: y as the function returned it; see LinearSteps.read
    final: Tensor | None = None  # live: the last state that the function returned
    # ∂L/∂final as (B, *shape), where its layout is another; None: a view of it is
    final_back: Callable[[Tensor], Tensor] | None = None
    initial: Tensor | None = None  # live: the first state that the function was given
    inputs: tuple[Tensor, ...] = ()  # live: all else that it was given
    # why no gradient can come to the first state that was given, a cut; "" where one can
    cut: str = ""
    lengths: Tensor | None = None  # (B,) real steps, where a mask of the model's tells; None: all
    # (T, B) steps that begin anew, A_t = 0: a new document; no cut where a track begins
    cuts: Tensor | None = None
    states: Tensor | None = None  # live: all states (T, B, *shape) or what is a view of them
    # ∂L/∂states as (T, B, *shape), where its layout is another
    states_back: Callable[[Tensor], Tensor] | None = None
    reverse: bool = False  # true: the steps were processed from the last input step to the first
    # in which the function computes, where that is not what its output has: it is held against that
    precision: torch.dtype | None = None
    notes: tuple[str, ...] = ()  # what a reader should know about the track


class Unread(Exception):
    """A call that is not understood, in words that go on after "it was not recorded: "."""


@dataclass(frozen=True)
class LibraryCall:
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


def _nothing(seen: LibraryCall) -> dict[str, Any]:
    """Of a function of which nothing can be read."""
    return {}


@dataclass(frozen=True)
class LibraryFunction:
    """A function that runs a linear recurrence over all steps of its arguments."""

    modules: tuple[str, ...]  # names, each a whole module or a package with all that is below it
    name: str  # in the module: "mamba_selective_scan", "RecurrentGemmaRglru._rnn_scan"
    cell: str  # what people call it: "Mamba", "gated delta rule"
    reads: str = ""  # the arguments that the mapping reads, in the function's own order
    # fields of `Scanned` beside name and cell
    read: Callable[[LibraryCall], dict[str, Any]] = _nothing
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


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least, as models keep their states: half precision is widened, float64 stays."""
    return tensor if tensor.dtype in (torch.float64, torch.complex128) else tensor.float()


def time_first(tensor: Tensor) -> Tensor:
    """(B, T, ...) as (T, B, ...)."""
    return tensor.transpose(0, 1)


def time_last(tensor: Tensor) -> Tensor:
    """(B, D, T) as (T, B, D)."""
    return tensor.permute(2, 0, 1)


def time_third(tensor: Tensor) -> Tensor:
    """(B, H, T, ...) as (T, B, H, ...)."""
    return tensor.movedim(2, 0)


def swapped(tensor: Tensor) -> Tensor:
    """A state (B, H, d_v, d_k) as (B, H, d_k, d_v), and the other way round."""
    return tensor.transpose(-1, -2)


def repeated(tensor: Tensor, heads: int, axis: int) -> Tensor:
    """Groups of heads that share keys, each repeated for every head of its group."""
    if tensor.shape[axis] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[axis], dim=axis)
