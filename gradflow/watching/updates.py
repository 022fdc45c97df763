"""Where an update of a model begins and ends, seen from its forward pass and its optimizer alone.

A probe is opened at the root module's forward, where gradients are enabled and the module trains, and
closed at the optimizer's step. What lies between two updates belongs to one: the micro-batches of
accumulated gradients. Where no optimizer of torch is used, a forward after a backward whose gradients were
thrown away, or whose weights moved, begins the next update.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradflow.distributed import local_part
from gradflow.hooks.patch import untraced


class Watcher(Protocol):
    """Who is told of the updates."""

    def before_forward(self, module: nn.Module) -> None: ...
    def before_step(self, optimizer: Optimizer, closure: bool) -> None: ...


class ForwardHook:
    """The one hook on the root module; that of a copied or pickled module does nothing."""

    def __init__(self, watcher: Watcher | None) -> None:
        self.watcher = _nobody if watcher is None else weakref.ref(watcher)

    def __call__(self, module: nn.Module, args: Any) -> None:
        watcher = self.watcher()
        if watcher is not None:
            watcher.before_forward(module)

    def __deepcopy__(self, memo: Any) -> ForwardHook:
        return ForwardHook(None)

    def __reduce__(self) -> Any:
        return ForwardHook, (None,)


def _nobody() -> None:
    """In place of a watcher."""
    return


untraced(ForwardHook.__call__)


class Hooks:
    """What is hooked for one watch, and taken away at its end."""

    def __init__(self, watcher: Watcher, model: nn.Module, optimizer: Optimizer | None) -> None:
        told = weakref.ref(watcher)
        self._handles = [model.register_forward_pre_hook(ForwardHook(watcher), prepend=True)]

        def stepping(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            watching = told()
            if watching is not None:
                watching.before_step(optimizer, _has_closure(args, kwargs))

        untraced(stepping)
        if optimizer is None:
            self._handles.append(register_optimizer_step_pre_hook(stepping))
        else:
            self._handles.append(optimizer.register_step_pre_hook(stepping))
        self._gone = weakref.finalize(watcher, _removed, list(self._handles))

    def remove(self) -> None:
        """Take them away."""
        self._gone()


def _removed(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _has_closure(args: Any, kwargs: Any) -> bool:
    return kwargs.get("closure") is not None or any(callable(one) for one in args[1:2])


def scaler_above(depth: int) -> Any:
    """The GradScaler whose `step` has called this, so many frames up at most; None without one."""
    frame = inspect.currentframe()
    for _ in range(depth):
        if frame is None:
            break
        one = frame.f_locals.get("self")
        if isinstance(one, torch.amp.GradScaler):
            return one
        frame = frame.f_back
    return None


class ModelOptimizer:
    """Which optimizer is the model's."""

    def __init__(self, model: nn.Module, given: Optimizer | None) -> None:
        self._model, self._given = weakref.ref(model), given is not None
        self._first: Any = None if given is None else weakref.ref(given)
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def is_models(self, optimizer: Optimizer) -> bool:
        """Whether this is the optimizer whose steps are counted: the given one, else the first that
        updates a parameter of the model."""
        first = None if self._first is None else self._first()
        if optimizer is first or self._given:
            return True
        if first is not None or optimizer in self._others:
            return False
        model = self._model()
        mine = (
            set() if model is None else {id(parameter) for parameter in nn.Module.parameters(model)}
        )
        if any(id(one) in mine for group in optimizer.param_groups for one in group["params"]):
            self._first = weakref.ref(optimizer)
            return True
        self._others.add(optimizer)
        return False


class GradientMarks:
    """What a backward left in some parameters, by which it is seen whether an update followed."""

    def __init__(self, model: nn.Module) -> None:
        held = ((one, one.grad) for one in nn.Module.parameters(model))
        # of a shard perhaps none
        found = [one for one, grad in held if grad is not None and local_part(grad).numel()]
        self._marked: list[tuple[Tensor, int]] = [(one, one._version) for one in found[-1:]]

    @property
    def thrown_away(self) -> bool:
        """Whether the gradients are gone."""
        return any(
            one.grad is None or not bool(local_part(one.grad).any()) for one, _ in self._marked
        )

    @property
    def moved(self) -> bool:
        """Whether the weights were written to."""
        return any(one._version != version for one, version in self._marked)


def trains(module: nn.Module) -> bool:
    """Whether a forward that begins now is one of training."""
    return module.training and torch.is_grad_enabled()
