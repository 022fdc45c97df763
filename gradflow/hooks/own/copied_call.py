"""Run the first call of a user's cell again, on a copy, to see how it depends on its initial states.

Before the first step of a loop the states are constants mostly, and the user's graph does not hold
∂s_1/∂s_0. A copy of the module, on detached, independent states and with the random numbers and the
autocast of that call, does; it counts only if it gives the very bits that the call gave.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gradflow.hooks import patch
from gradflow.hooks.axes import Axis
from gradflow.hooks.dense import Place, Step
from gradflow.hooks.graph import NotReadable
from gradflow.hooks.guard import Point, guarded
from gradflow.hooks.own.nested import Path, leaves, replaced
from gradflow.hooks.own.returned import row_of, version_of
from gradflow.hooks.saved_tensors import saved_tensors_are_hooked
from gradflow.process import autocast, random_numbers_kept

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERYWHERE = tuple(f"_global{name}" for name in HOOKS)  # the same, of all modules


@dataclass(eq=False)
class Given:
    """What a call was given, and in which circumstances."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]  # parameter or keyword -> argument
    tensors: dict[Path, Tensor]
    versions: dict[Path, int | None]
    rng: Tensor
    autocast: tuple[str, bool, torch.dtype]
    views: dict[Path, Tensor] = field(default_factory=dict)  # copies, see `keep_views`

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]) -> Given:
        """Note them as they are now."""
        tensors = leaves(named)
        device = next((tensor.device.type for tensor in tensors.values()), "cpu")
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return Given(
            args=args,
            kwargs=kwargs,
            named=named,
            tensors=tensors,
            versions={path: version_of(tensor) for path, tensor in tensors.items()},
            rng=torch.get_rng_state(),
            autocast=(device, enabled, dtype),
        )

    def unchanged(self) -> set[int]:
        """The ids of the tensors that are still what they were."""
        return {
            id(tensor)
            for path, tensor in self.tensors.items()
            if self.versions[path] == version_of(tensor)
        }

    def keep_views(self) -> None:
        """Copy what is a view: a buffer that later steps are written into counts as changed."""
        for path, tensor in self.tensors.items():
            if tensor._is_view() and self.versions[path] == version_of(tensor):
                self.views[path] = tensor.detach().clone()

    def leaves_out(self) -> bool:
        """Whether some argument is None: a state that the module makes itself, perhaps."""
        return any(value is None for value in self.named.values())

    def still(self, path: Path) -> Tensor:
        """The tensor that was given there, if it is still what it was."""
        tensor = self.tensors.get(path)
        if tensor is None:
            raise NotReadable("no initial state was given")
        if version_of(tensor) != self.versions[path] and path in self.views:
            return self.views[path]
        if version_of(tensor) != self.versions[path]:
            raise NotReadable("an argument was changed in place since")
        return tensor


def first_step(
    module: nn.Module,
    given: Given,
    entry: dict[str, Path],
    states: Mapping[str, Path],
    place: Place,
    rows: dict[str, Tensor],
) -> Step | None:
    """The way from the states that a first call returned back to those it was given; None without one.

    entry and states give by state names where they were among the arguments, and among what the call
    returned; there they are in this place, and had these values (B, width).

    Raises:
        NotReadable: the module cannot be copied, or does not repeat itself.
    """
    if saved_tensors_are_hooked() or _is_watched():
        raise NotReadable(
            "what hooks of yours, a checkpoint or a mode would take for a call of yours"
        )
    fresh = {path: given.still(path).detach() for path in given.tensors}
    initial = {name: fresh[path].clone().requires_grad_() for name, path in entry.items()}
    fresh.update({path: initial[name] for name, path in entry.items()})
    returned = leaves(_run(module, given, fresh))
    again = {name: returned[path] for name, path in states.items() if path in returned}
    if any(
        name not in again or not torch.equal(row_of(again[name], place.axes[name]), row)
        for name, row in rows.items()
    ):
        raise NotReadable("a module that, run again on a copy, gives other numbers")
    axes = {name: place.axis_of(name, tensor.shape) for name, tensor in initial.items()}
    initial_rows = {name: row_of(tensor, axes[name]) for name, tensor in initial.items()}
    before = Place.of(initial, initial_rows, axes)
    now = Place.of(again, rows, place.axes)
    return Step.find(before, now, set(), 0)


def axis_by_run(module: nn.Module, given: Given, path: Path, axes: list[Axis]) -> Axis:
    """Of several axes of one output that may be its batch, the one that an input shares.

    A copy of the module runs with inputs that need a gradient: the first entry along the batch
    depends on the first sequence of the input and on no other. Where that cannot be seen it is the
    first of the axes.
    """
    if saved_tensors_are_hooked() or _is_watched():
        return axes[0]
    try:
        fresh = {place: given.still(place).detach() for place in given.tensors}
        inputs = [
            fresh.setdefault(place, tensor).requires_grad_()
            for place, tensor in fresh.items()
            if tensor.is_floating_point() and tensor.dim() > 1
        ]
        output = leaves(_run(module, given, fresh)).get(path)
    except NotReadable:
        return axes[0]
    inputs = [] if output is None else [one for one in inputs if one.shape != output.shape]
    if output is None or not output.requires_grad or not inputs:
        return axes[0]
    for axis in axes:
        if axis is None:
            continue
        # an input of another length there (embeddings of nodes) has no row for each sequence
        told = [one for one in inputs if len(one) == output.shape[axis]]
        if not told:
            continue
        grads = torch.autograd.grad(
            output.select(axis, 0).sum(), told, retain_graph=True, allow_unused=True
        )
        rows = [(grad != 0).flatten(1).any(1) for grad in grads if grad is not None]
        if rows and all(bool(row[0]) and not bool(row[1:].any()) for row in rows):
            return axis
    return axes[0]


def _is_watched() -> bool:
    """Whether a global hook or an active mode would see a module that is run."""
    modes = [mode for mode in _get_current_function_mode_stack() if not _is_default_device(mode)]
    return bool(modes or torch._C._len_torch_dispatch_stack()) or any(
        vars(nn.modules.module)[hooks] for hooks in EVERYWHERE
    )


def _is_default_device(mode: object) -> bool:
    """Of torch.set_default_device, or `with torch.device(...)`."""
    return isinstance(mode, DeviceContext)


def _run(module: nn.Module, given: Given, tensors: dict[Path, Tensor]) -> Any:
    """What a copy of the module returns for these tensors in place of those that were given."""
    why: list[str] = []
    result = guarded(Point.AGAIN, why.append, _run_copy, module, given, tensors)
    if why:
        raise NotReadable(f"a module that cannot be run on a copy: {why[0]}")
    return result


def _run_copy(module: nn.Module, given: Given, tensors: dict[Path, Tensor]) -> Any:
    devices = {t.device for t in given.tensors.values() if t.device.type == "cuda"}
    device, enabled, dtype = given.autocast
    named = replaced(given.named, tensors)
    args = [named[key] for key in list(named)[: len(given.args)]]
    kwargs = {key: named[key] for key in given.kwargs}
    copied = copy.deepcopy(module)
    if _shares(module, copied):
        raise TypeError("its copy shares parts with it")
    for part in nn.Module.modules(copied):
        for hooks in HOOKS:
            vars(part)[hooks].clear()
    with (
        patch.paused(),
        random_numbers_kept(list(devices)),
        torch.enable_grad(),
        autocast(device, dtype=dtype, enabled=enabled),
    ):
        torch.set_rng_state(given.rng)
        with torch._C._EnableTorchFunction():  # the default device, which `guarded` put off
            return copied.forward(*args, **kwargs)


def _shares(module: nn.Module, copied: nn.Module) -> bool:
    """Whether what a copy does can be seen in the module: in a part, a weight, a list or a dict."""
    mine = {id(part) for part in nn.Module.modules(module)}
    mine |= {id(value) for part in nn.Module.modules(module) for value in _kept_by(part)}
    theirs = list(nn.Module.modules(copied))
    return any(id(value) in mine for value in [*theirs, *(v for m in theirs for v in _kept_by(m))])


def _kept_by(module: nn.Module) -> list[Any]:
    """The tensors and containers that a module keeps, and what its functions have closed over."""
    held = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
    for function in [value for value in held if isinstance(value, FunctionType)]:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        held += [getattr(value, "__self__", value) for value in cells]  # a method is its module's
    kinds = nn.Module | Tensor | list | dict | set
    return [value for value in held if isinstance(value, kinds)]
