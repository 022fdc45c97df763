"""Parity: are the parameter gradients rebuilt from δ_t those of this very backward?

A hook on each weight that a fused call used adds up what the backwards bring it. Rebuilt gradients
sum over all calls that used the weight: ∂L/∂W_ih = Σ δ_t x_tᵀ, ∂L/∂W_hh = Σ δʰ_t h_{t−1}ᵀ.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradflow.hooks.guard import Hook, Point, is_batched, why_hidden
from gradflow.hooks.patch import is_of_another_recording
from gradflow.limits import PARITY_FLOAT32, PARITY_FLOAT64, PARITY_HALF
from gradflow.recording.source import Parity

BOUNDS = {
    torch.float64: PARITY_FLOAT64,
    torch.float32: PARITY_FLOAT32,
    torch.float16: PARITY_HALF,
    torch.bfloat16: PARITY_HALF,
}


class LoopUser(Protocol):
    """A layer and direction of a loop of calls."""

    def parts(self) -> Sequence[WeightUser]: ...


class WeightUser(Protocol):
    """A layer and direction of one call, or of several with the same weights."""

    def weight_keys(self) -> dict[str, int]: ...
    def rebuilt(self) -> dict[str, Tensor] | None: ...
    def from_kernel(self) -> dict[str, Tensor] | None: ...


class WeightUses:
    """Which weights the calls of a recording used, and the gradients those weights received."""

    def __init__(self, model: nn.Module) -> None:
        self._thread = threading.get_ident()
        self._keys: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._grads: dict[int, Tensor] = {}
        self._frozen: set[int] = set()
        self._lost: dict[int, str] = {}  # weights of which some gradient was not read -> why
        self._bounds: dict[int, float] = {}
        self._hooks: set[Hook] = set()  # on weights
        self._users: list[LoopUser] = []
        names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._tied = {known for known, count in names.items() if count > 1}
        self._tied_keys: set[int] = set()
        self._own, self._own_keys = set(names), set[int]()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: what was caught, not what caught it."""
        return vars(self) | {"_hooks": set(), "_keys": {}}

    def key(self, weight: Tensor, scale: Callable[[], float]) -> int:
        """A number for this weight tensor; from now on its gradients are added up."""
        known = self._keys.get(id(weight))
        if known is not None and known[0]() is weight:
            if torch.is_autocast_enabled(weight.device.type):
                self._bounds[known[1]] = max(self._bounds[known[1]], _bound(weight))
            return known[1]
        key = len(self._bounds)
        self._keys[id(weight)] = (weakref.ref(weight), key)
        self._bounds[key] = _bound(weight)
        if id(weight) in self._tied:
            self._tied_keys.add(key)
        if id(weight) in self._own:
            self._own_keys.add(key)
        if weight.requires_grad:
            lose = functools.partial(self._lost.__setitem__, key)
            add = Hook(Point.WEIGHT, lose, self._adder(key, scale))
            self._hooks.add(add)
            weight.register_hook(add)
        else:
            self._frozen.add(key)
        return key

    def _adder(self, key: int, scale: Callable[[], float]) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            if is_batched(grad) or why_hidden() or is_of_another_recording(self._thread):
                return
            grad = grad.detach() / scale()
            self._grads[key] = self._grads[key] + grad if key in self._grads else grad

        return add

    def forget(self) -> None:
        """What backwards brought so far counts no more."""
        self._grads.clear()

    def foreign(self, keys: Mapping[str, int]) -> frozenset[str]:
        """Of weight name -> key, the names of those that are no parameters of the model."""
        return frozenset(name for name, key in keys.items() if key not in self._own_keys)

    def note(self, user: LoopUser) -> None:
        """Remember a layer whose δ_t will be asked for."""
        self._users.append(user)

    def close(self) -> None:
        """Stop listening."""
        for reference, _ in self._keys.values():
            hooks = getattr(reference(), "_backward_hooks", None) or {}
            for place, hook in [*hooks.items()]:
                if isinstance(hook, Hook) and hook in self._hooks:
                    del hooks[place]
        self._keys.clear()
        self._hooks.clear()  # a recording is sent to other processes without them

    def caught(self, users: Sequence[WeightUser]) -> dict[int, Tensor]:
        """Key -> gradient of every weight these layers used, each weight once."""
        keys = {key for user in users for key in user.weight_keys().values()}
        known = self._grads.keys() - self._lost.keys()
        return {key: self._grads[key] for key in sorted(keys) if key in known}

    def check(self, user: WeightUser) -> Parity:
        """Hold the rebuilt gradients of this layer's weights against the caught ones."""
        keys = {n: k for n, k in user.weight_keys().items() if k not in self._frozen}
        lost = [self._lost[key] for key in keys.values() if key in self._lost]
        if lost:
            return Parity("not applicable", None, lost[0])
        caught = {name: self._grads[key] for name, key in keys.items() if key in self._grads}
        if not keys:
            return Parity(
                "not applicable", None, "the weights are frozen, so they have no gradient"
            )
        if not caught:
            return Parity("not applicable", None, "no backward reached the weights")
        mine = {name: keys[name] for name in caught}
        error = self._distance(mine, caught, "rebuilt")
        if error is None:
            return Parity("not applicable", None, "no backward reached the layer's outputs")
        if not all(bool(grad.isfinite().all()) for grad in caught.values()):
            return Parity("not applicable", None, "the parameter gradients are not finite")
        bound = max(self._bounds[key] for key in keys.values())
        if error <= bound:
            return Parity("passed", error, f"within {bound:g} of the largest entry")
        if any(key in self._tied_keys for key in keys.values()):
            return Parity("not applicable", error, "the weight is shared with another module")
        # The kernel's own backward, given the same direct gradients, is the second opinion.
        own = self._distance_to_kernel(user)
        if own is not None and own <= bound:
            return Parity("not applicable", error, "the loss reads the weight elsewhere too")
        return Parity("failed", error, f"above the bound of {bound:g} of the largest entry")

    def _distance(self, keys: dict[str, int], caught: dict[str, Tensor], how: str) -> float | None:
        totals: dict[str, Tensor] = {}
        for user in (part for loop in self._users for part in loop.parts()):
            theirs = user.weight_keys()
            shared = [n for n in keys if n in theirs and theirs[n] == keys[n]]
            parts = getattr(user, how)() if shared else None
            if parts is None:
                continue
            for name in shared:
                totals[name] = totals[name] + parts[name] if name in totals else parts[name]
        if not totals:
            return None
        return max(relative_error(totals[name], caught[name]) for name in totals)

    @staticmethod
    def _distance_to_kernel(user: WeightUser) -> float | None:
        mine, kernel = user.rebuilt(), user.from_kernel()
        if mine is None or kernel is None:
            return None
        return max(relative_error(mine[name], kernel[name]) for name in kernel)


def _bound(weight: Tensor) -> float:
    """How far rounding may take the gradient of a weight, in what it is computed in at this moment."""
    device, dtype = weight.device.type, weight.dtype
    if dtype is torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return BOUNDS.get(dtype, PARITY_FLOAT32)


def relative_error(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry; 0 for two zeros, NaN if one has a NaN."""
    mine, theirs = mine.double(), theirs.double()
    largest = theirs.abs().max()
    difference = (mine - theirs).abs().max()
    if not torch.isfinite(difference):
        return float("nan")
    return float(difference / largest) if largest > 0 else float(difference)
