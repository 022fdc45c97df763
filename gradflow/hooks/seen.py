"""Seen: one call of a recurrent function of torch's own, its arguments by name and what it returned."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradflow.hooks.guard import Point, guarded

_LAYER = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PLACES = {  # the names of their arguments, for whoever calls them by name
    "fused": ("input", "hx", "params", *_LAYER, "batch_first"),
    "packed": ("data", "batch_sizes", "hx", "params", *_LAYER),
    "cell": ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
}
_OWN = 5  # frames of gradflow's own between the function that looks and the one that is watched
_FRAMES = 8  # how far up a module's forward may be from the function it calls


@dataclass(frozen=True)
class FusedCall:
    """The arguments of one call of a fused function, whatever its signature, and what it returned."""

    cell: str
    data: Tensor  # (T, B, I), (B, T, I) with batch_first, or packed (N, I)
    batch_sizes: Tensor | None  # (T,), packed
    initial: tuple[Tensor, ...]  # h0, or h0 and c0: (layers * directions, B, width)
    weights: tuple[Tensor, ...]
    has_biases: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    results: tuple[Tensor, ...]  # output, h_n and, of a cell with a c, c_n
    rng: Tensor | None  # state of the CPU generator before the call, when dropout was drawn
    module: nn.Module | None  # whose forward made the call
    unsorted: Tensor | None  # packed: sorted place of each of the user's sequences
    module_input: Any  # what the module's forward was given


@dataclass(frozen=True)
class CellCall:
    """The arguments of one call of a single-step function, and what it returned."""

    cell: str
    data: Tensor  # (B, I)
    initial: tuple[Tensor, ...]  # h, or h and c: (B, H)
    weights: tuple[Tensor, ...]  # weight_ih, weight_hh, then the biases if there are any
    results: tuple[Tensor, ...]  # h, or h and c: (B, H)
    training: bool
    module: nn.Module | None


class Listener(Protocol):
    """Whoever wants to hear of recurrent calls."""

    def wants(self, weights: tuple[Tensor, ...], module: nn.Module | None) -> bool: ...
    def saw(self, call: FusedCall) -> None: ...
    def saw_cell(self, call: CellCall) -> None: ...
    def missed(self, module: nn.Module | None, why: str) -> None: ...


@dataclass(eq=False)
class Telling:
    """One call on its way to those who listen: looked at before it runs, told of after it did."""

    listeners: list[Any]  # Listener
    cell: str
    single: bool  # a function of one step
    module: nn.Module | None = None  # whose forward makes the call
    locals: dict[str, Any] = field(default_factory=dict)  # of that forward
    known: dict[str, Any] = field(default_factory=dict)
    interested: list[Any] = field(default_factory=list)

    @property
    def point(self) -> Point:
        """Where in the user's step this is."""
        return Point.CELL if self.single else Point.FUSED

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments, and who wants to hear of them."""
        guarded(self.point, self._missed_by_all, self._find)
        guarded(self.point, self._missed_by_all, self._look, args, kwargs)

    def after(self, results: Any) -> None:
        """Tell everyone who does of what was returned."""
        for listener in self.interested:
            missed = functools.partial(self._missed_by, listener)
            guarded(self.point, missed, self._tell, listener, results)

    def _find(self) -> None:
        self.module, self.locals = _calling_module()

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = _in_order(args, kwargs, fused=not self.single)
        known = _of_cell(args) if self.single else _of_layer(args)
        interested = [o for o in self.listeners if o.wants(known["weights"], self.module)]
        if not self.single:
            draws = known["dropout"] and known["training"] and known["layers"] > 1
            known["rng"] = torch.get_rng_state() if interested and draws else None
            packed = known["batch_sizes"] is not None
            known["unsorted"] = self.locals.get("unsorted_indices") if packed else None
            known["module_input"] = self.locals.get("orig_input")
        self.known, self.interested = known, interested

    def _tell(self, listener: Listener, results: Any) -> None:
        named = {**self.known, "cell": self.cell, "module": self.module}
        if not self.single:
            listener.saw(FusedCall(results=results, **named))
            return
        every = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        training = self.module is None or self.module.training
        listener.saw_cell(CellCall(results=every, training=training, **named))

    def _missed_by_all(self, why: str) -> None:
        for listener in self.listeners:
            self._missed_by(listener, why)

    def _missed_by(self, listener: Listener, why: str) -> None:
        listener.missed(self.module, why)


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any], *, fused: bool) -> tuple[Any, ...]:
    """Arguments given by name, at their places; torch itself gives all of them by place."""
    if not kwargs:
        return args
    packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    names = _PLACES["cell" if not fused else "packed" if packed else "fused"]
    return args + tuple(kwargs[name] for name in names[len(args) :] if name in kwargs)


def _of_layer(args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a fused function by name."""
    packed = not isinstance(args[3], bool)  # a list of weights, where the other form has has_biases
    data, batch_sizes = (args[0], args[1]) if packed else (args[0], None)
    hidden, weights, has_biases, layers, dropout, training, bidirectional = args[
        1 + packed : 8 + packed
    ]
    return {
        "data": data,
        "batch_sizes": batch_sizes,
        "initial": tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,),
        "weights": tuple(weights),
        "has_biases": has_biases,
        "layers": layers,
        "dropout": float(dropout),
        "training": training,
        "bidirectional": bidirectional,
        "batch_first": False if packed else args[8],
    }


def _of_cell(args: tuple[Any, ...]) -> dict[str, Any]:
    """The same of a function of one step."""
    data, hidden = args[:2]
    return {
        "data": data,
        "initial": tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,),
        "weights": tuple(weight for weight in args[2:] if weight is not None),
    }


def _calling_module() -> tuple[nn.Module | None, dict[str, Any]]:
    """The recurrent module whose forward is calling, and that forward's variables.

    The order of packed sequences is known nowhere else: the fused function sees them sorted.
    """
    frame: FrameType | None = sys._getframe(_OWN)
    for _ in range(_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            break
        module = frame.f_locals.get("self")
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return module, dict(frame.f_locals)
    return None, {}
