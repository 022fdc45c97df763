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
    found: Numbers = _moved(numbers, device)
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        every = {name: _moved(one, device) for name, one in value.items()}
        return value if all(every[name] is value[name] for name in value) else every
    if type(value) in (list, tuple):
        if _alike(value):
            if value[0].device == device:
                return value
            return type(value)(torch.stack(list(value)).to(device).unbind())  # moved at once
        each = [_moved(one, device) for one in value]
        return value if all(map(operator.is_, each, value)) else type(value)(each)
    if is_dataclass(value) and not isinstance(value, type):
        known = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        new = {name: _moved(one, device) for name, one in known.items()}
        changed = {name: one for name, one in new.items() if one is not known[name]}
        return replace(value, **changed) if changed else value
    return value


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
