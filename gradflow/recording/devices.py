"""Numbers that move from one device to another together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradflow.limits import DEVICE_WIDEST

CPU = torch.device("cpu")
Numbers = TypeVar("Numbers")


def moved(numbers: Numbers, device: torch.device) -> Numbers:
    """Every tensor of some dataclass, dict, list or tuple on a device; the same one where all are.

    >>> moved({"h": [torch.zeros(1)]}, CPU)
    {'h': [tensor([0.])]}
    """
    found: Any = numbers
    if isinstance(found, Tensor):
        return found.to(device)  # type: ignore[return-value]
    if isinstance(found, dict):
        every = {name: moved(value, device) for name, value in found.items()}
        return found if all(every[name] is found[name] for name in found) else every  # type: ignore[return-value]
    if type(found) in (list, tuple):
        if _alike(found):
            if found[0].device == device:
                return numbers
            return type(found)(torch.stack(list(found)).to(device).unbind())  # moved at once
        each = [moved(value, device) for value in found]
        return found if all(map(operator.is_, each, found)) else type(found)(each)
    if is_dataclass(found) and not isinstance(found, type):
        known = {one.name: getattr(found, one.name) for one in fields(found) if one.init}
        new = {name: moved(value, device) for name, value in known.items()}
        changed = {name: value for name, value in new.items() if value is not known[name]}
        made: Numbers = replace(found, **changed) if changed else found
        return made
    return numbers


def _alike(values: Sequence[Any]) -> bool:
    if not values or not all(isinstance(value, Tensor) for value in values):
        return False
    return len({(value.shape, value.dtype, value.device) for value in values}) == 1


def where_computed(size: int, device: torch.device) -> torch.device:
    """The device for many small steps of a state of this width: on an accelerator each is a call.

    >>> where_computed(64, torch.device("cuda"))
    device(type='cpu')
    """
    return CPU if size < DEVICE_WIDEST else device
