"""Run the first call of a user's cell again, on a copy, to see how it depends on its initial states.

Before the first step of a loop the states are constants mostly, and the user's graph does not hold
∂s_1/∂s_0. A copy of the module, on detached, independent states and with the random numbers and the
autocast of that call, does; it counts only if it gives the very bits that the call gave.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.hooks import patch
from gradflow.hooks.dense import Place, Step
from gradflow.hooks.graph import NotReadable, saved_tensors_are_hooked
from gradflow.hooks.own.leaves import Path, leaves, replaced
from gradflow.hooks.own.returned import row_of, version_of

# what copying or running a module of the user's own may raise, if it is not made to be copied
UNWILLING = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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

    def leaves_out(self) -> bool:
        """Whether some argument is None: a state that the module makes itself, perhaps."""
        return any(value is None for value in self.named.values())

    def still(self, path: Path) -> Tensor:
        """The tensor that was given there, if it is still what it was."""
        tensor = self.tensors.get(path)
        if tensor is None:
            raise NotReadable("no initial state was given")
        if version_of(tensor) != self.versions[path]:
            raise NotReadable("an argument was changed in place since")
        return tensor


def first_step(
    module: nn.Module,
    given: Given,
    entry: dict[str, Path],
    states: Mapping[str, Path],
    rows: dict[str, Tensor],
) -> Step | None:
    """The way from the states that a first call returned back to those it was given.

    Args:
        module: whose call it was.
        given: what it was given.
        entry: state name -> where it was among the arguments.
        states: state name -> where it was among what the call returned.
        rows: state name -> what it was, (B, width).

    Returns:
        None where no path leads back.

    Raises:
        NotReadable: the module cannot be copied, or does not repeat itself.
    """
    if saved_tensors_are_hooked() or _is_watched():
        raise NotReadable("what a checkpoint, or a mode of torch, would take for a call of yours")
    fresh = {path: given.still(path).detach() for path in given.tensors}
    initial = {name: fresh[path].clone().requires_grad_() for name, path in entry.items()}
    fresh.update({path: initial[name] for name, path in entry.items()})
    returned = leaves(_run(module, given, fresh))
    again = {name: returned[path] for name, path in states.items() if path in returned}
    if any(
        name not in again or not torch.equal(row_of(again[name]), row) for name, row in rows.items()
    ):
        raise NotReadable("a module that, run again on a copy, gives other numbers")
    before = Place.of(initial, {name: row_of(tensor) for name, tensor in initial.items()})
    now = Place.of(again, rows)
    return Step.find(before, now, set(), 0)


def _is_watched() -> bool:
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def _run(module: nn.Module, given: Given, tensors: dict[Path, Tensor]) -> Any:
    """What a copy of the module returns for these tensors in place of those that were given."""
    devices = {t.device for t in given.tensors.values() if t.device.type == "cuda"}
    device, enabled, dtype = given.autocast
    try:
        named = replaced(given.named, tensors)
        args = [named[key] for key in list(named)[: len(given.args)]]
        kwargs = {key: named[key] for key in given.kwargs}
        copied = copy.deepcopy(module)
        for part in copied.modules():
            for hooks in HOOKS:
                vars(part)[hooks].clear()
        with (
            patch.paused(),
            torch.random.fork_rng(list(devices)),
            torch.enable_grad(),
            torch.autocast(device, dtype=dtype, enabled=enabled),
        ):
            torch.set_rng_state(given.rng)
            return copied.forward(*args, **kwargs)
    except UNWILLING as error:
        raise NotReadable(
            f"a module that cannot be run on a copy ({str(error).splitlines()[0]})"
        ) from error
