"""What a reader made of a file, brought into a form that the rest may trust: names, tensors, containers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from gradflow.errors import FileError, InputError, must_be, plain_name
from gradflow.limits import ANNOUNCED
from gradflow.loading.shells import Shell

_FREE = (str, bytes, bytearray, int, float, bool, complex, type(None))  # hold nothing


def checked(value: object, label: str, todo: str, *, dense: bool = False) -> object:
    """Walk what a file held, each object once, and leave only what nobody behind has to doubt.

    Names in mappings are text on one line and at most `NAME_LETTERS` long, or plain numbers. Tensors are
    torch's own, on the CPU or without numbers, carry no hooks and no attributes of the file's, are not
    nested, and together stand for no more numbers than the file holds, give or take a few small views.
    The containers are changed in place; they belong to nobody else yet.

    Args:
        value: as torch's or safetensors' reader made it.
        label: the file, for the error.
        todo: what to do instead, for the error.
        dense: refuse sparse, quantized and meta tensors too, as in a batch.

    Raises:
        FileError: a tensor is of a kind that is not read; of a batch, InputError.
    """
    sizes = Claims()
    waiting: list[tuple[str, object]] = [("", value)]
    seen = {id(value)}
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, Tensor):
            wrong = _strip(item, dense) or sizes.beyond(item)
            if wrong:
                where = f"{name} in {label}" if name else label
                said = must_be(where, "an ordinary dense tensor", wrong, todo)
                raise InputError(said) if dense else FileError(said)
            continue
        for key, inner in _entries(item):
            if not isinstance(inner, _FREE) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((key or name, inner))
    return value


class Claims:
    """How many bytes all tensors stand for, and how many there are."""

    def __init__(self) -> None:
        self.stored: dict[int, int] = {}  # start of a storage -> its bytes
        self.held = 0  # bytes of all storages
        self.claimed = 0  # bytes of all tensors

    def beyond(self, tensor: Tensor) -> str:
        """Count one more; says so where they stand for far more than there is."""
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return ""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.stored:
            self.stored[storage.data_ptr()] = storage.nbytes()
            self.held += storage.nbytes()
        self.claimed += tensor.numel() * tensor.element_size()
        # A layer that is used in several places is in the file once, and under several names
        if self.claimed <= 8 * self.held + ANNOUNCED:
            return ""
        return f"one of shape {tuple(tensor.shape)}, more entries than the file holds"


def _strip(tensor: Tensor, dense: bool) -> str:
    """What is wrong with a tensor's kind, or ""; hooks and attributes that the file gave it go."""
    if type(tensor) not in (Tensor, Parameter):
        return f"one of the class {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor, one that is nested (tensors of several shapes in one)"
    if tensor.device.type not in ("cpu", "meta"):
        return f"one on the device {tensor.device.type}"
    if dense and tensor.is_quantized:
        return "a quantized one"
    if dense and tensor.layout != torch.strided:
        return f"a sparse one ({tensor.layout})"
    if dense and tensor.device.type == "meta":
        return "one without numbers (a meta tensor)"
    tensor._backward_hooks = None
    vars(tensor).clear()
    return ""


def _entries(item: object) -> Iterator[tuple[str, object]]:
    """What lies in a container, and its name where it has one; names are made plain on the way."""
    if isinstance(item, dict):
        _rename(item)
        yield from ((key if isinstance(key, str) else str(key), item[key]) for key in item)
    elif isinstance(item, list | tuple | set | frozenset):
        yield from (("", inner) for inner in item)
    elif isinstance(item, Shell):
        yield from (("", inner) for inner in (item.args, item.state))


def _rename(item: dict[Any, Any]) -> None:
    """Names that are neither short text on one line nor small numbers are written in such text."""
    plain = {key: _plain_key(key) for key in item}
    if all(new is key for key, new in plain.items()):
        return
    held = dict(item)
    item.clear()
    for key, value in held.items():
        new, again = plain[key], 1
        while new in item:
            again += 1
            new = f"{plain[key]} ({again})"
        item[new] = value


def _plain_key(key: object) -> object:
    if isinstance(key, str):
        return plain_name(key)
    if key is None or isinstance(key, bool | float) or (isinstance(key, int) and abs(key) < 2**63):
        return key
    return f"a key of type {type(key).__name__}"
