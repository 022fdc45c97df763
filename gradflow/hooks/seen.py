"""Seen: one call of a recurrent function of torch's own, its arguments by name and what it returned."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradflow.cells import CELLS
from gradflow.hooks import phantom
from gradflow.hooks.guard import Point, guarded

_LAYER = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PLACES = {  # the names of their arguments, which may also be given by name
    "fused": ("input", "hx", "params", *_LAYER, "batch_first"),
    "packed": ("data", "batch_sizes", "hx", "params", *_LAYER),
    "cell": ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
}
_OWN = 5  # frames of gradflow's own between the function that looks and the one that is watched
_FRAMES = 8  # how far up a module's forward may be from the function it calls


@dataclass(frozen=True, kw_only=True)
class SeenCall:
    """The arguments of one call of a recurrent function by name, and what it returned.

    States are in the order in which the cell names them. Of a function of one step data is (B, I), and
    states are (B, width).
    """

    cell: str
    single: bool  # a function of one step
    data: Tensor  # (T, B, I), (B, T, I) with batch_first, or packed (N, I)
    initial: tuple[Tensor, ...]  # (layers * directions, B, width)
    weights: tuple[Tensor, ...]
    has_biases: bool
    training: bool
    results: tuple[Tensor, ...]  # output, then the last states; of one step the states
    module: nn.Module | None  # whose forward made the call
    batch_sizes: Tensor | None = None  # (T,), packed
    layers: int = 1
    dropout: float = 0.0
    bidirectional: bool = False
    batch_first: bool = False
    rng: Tensor | None = None  # state of the CPU generator before the call, when dropout was drawn
    unsorted: Tensor | None = None  # packed: sorted place of each of the user's sequences
    module_input: Any = None  # what the module's forward was given
    inner: tuple[phantom.Layer, ...] = ()  # layer by layer, where it ran with phantom inputs


class Listener(Protocol):
    """What is notified of recurrent calls."""

    exact: bool  # whether the step must be bit-identical

    def wants(self, weights: tuple[Tensor, ...], module: nn.Module | None) -> bool: ...
    def saw(self, call: SeenCall) -> None: ...
    def missed(self, module: nn.Module | None, why: str) -> None: ...


@dataclass(eq=False)
class Telling:
    """One call and its listeners: its arguments are read before it runs, its results after."""

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
        """Read the arguments, and ask each listener whether the call is of its model."""
        guarded(self.point, self._missed_by_all, self._find)
        guarded(self.point, self._missed_by_all, self._look, args, kwargs)

    def after(self, results: Any) -> None:
        """Hand the call with its results to those listeners."""
        for listener in self.interested:
            missed = functools.partial(self._missed_by, listener)
            guarded(self.point, missed, self._tell, listener, results)

    def _find(self) -> None:
        self.module, self.locals = _calling_module()

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = _in_order(args, kwargs, fused=not self.single)
        known = self._of_step(args) if self.single else _of_layer(args)
        interested = [o for o in self.listeners if o.wants(known["weights"], self.module)]
        if not self.single:
            draws = known["dropout"] and known["training"] and known["layers"] > 1
            known["rng"] = torch.get_rng_state() if interested and draws else None
            packed = known["batch_sizes"] is not None
            known["unsorted"] = self.locals.get("unsorted_indices") if packed else None
            known["module_input"] = self.locals.get("orig_input")
        self.known, self.interested = known, interested

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the call: as it is, or with phantom inputs where a listener lets it."""
        if self.single or not self.interested or all(one.exact for one in self.interested):
            return original(*args, **kwargs)
        inner: list[phantom.Layer] = []
        results = guarded(self.point, _as_it_is, self._run_phantoms, original, inner)
        if results is None:
            return original(*args, **kwargs)
        self.known["inner"] = tuple(inner)
        return results

    def _run_phantoms(self, original: Callable[..., Any], inner: list[phantom.Layer]) -> Any:
        if not phantom.can_run(self.known):
            return None
        try:
            return phantom.run(self.cell, original, self.known, inner)
        except Exception:
            if self.known["rng"] is not None:
                torch.set_rng_state(self.known["rng"])
            raise

    def _tell(self, listener: Listener, results: Any) -> None:
        named: dict[str, Any] = {"cell": self.cell, "single": self.single, "module": self.module}
        listener.saw(SeenCall(results=_states(results), **named, **self.known))

    def _of_step(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of a function of one step by name."""
        weights = tuple(weight for weight in args[2:] if weight is not None)
        return {
            "data": args[0],
            "initial": _states(args[1]),
            "weights": weights,
            "has_biases": CELLS[self.cell].has_biases(len(weights)),
            "training": self.module is None or self.module.training,
        }

    def _missed_by_all(self, why: str) -> None:
        for listener in self.listeners:
            self._missed_by(listener, why)

    def _missed_by(self, listener: Listener, why: str) -> None:
        listener.missed(self.module, why)


def _as_it_is(_why: str) -> None:
    """The call then runs as it is, and nothing is missing."""


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
        "initial": _states(hidden),
        "weights": tuple(weights),
        "has_biases": has_biases,
        "layers": layers,
        "dropout": float(dropout),
        "training": training,
        "bidirectional": bidirectional,
        "batch_first": False if packed else args[8],
    }


def _states(given: Any) -> tuple[Tensor, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


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
