"""Pickles of torch.save, read into plain objects by their opcodes: nothing that a file names is run.

A pickle is a program that names classes and functions and has them called. Here a few names stand for what
they make: dicts, and tensors over storages of the file. Every other one becomes a `Shell`, which only keeps
what it was given. So no number in a file takes memory or time on its word (``bytearray(5 * 10**9)``, a set
of a tensor expanded to 10¹² rows, a key that is a tuple of tuples of one tuple, which is hashed once per
path): an object costs what its bytes cost, and their steps are counted.
"""

from __future__ import annotations

import mmap
import struct
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from gradflow.limits import MOST_CLASSES, PICKLE_STEPS, UNPACKED_TIMES
from gradflow.loading.shells import Shell, stand_in

_KEYS = (str, int, float, type(None))  # what is hashed at once
_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_STORED = {
    **{f"torch.{n}": kind for n, kind in torch.storage._storage_type_to_dtype_map().items()},
    "torch.storage.UntypedStorage": torch.uint8,
}


class Suspicious(ValueError):
    """The file asks for something that weights never need; the text says for what."""


@dataclass(frozen=True)
class Odd:
    """What stands for a tensor that is no ordinary one."""

    words: str  # "a sparse one"


@dataclass(frozen=True)
class Name:
    """A class or function that the file names."""

    path: str  # "torch.nn.modules.rnn.LSTM"


@dataclass(frozen=True)
class Stored(Odd):
    """A storage of the file's."""

    dtype: torch.dtype
    bytes: torch.UntypedStorage


@dataclass(eq=False)
class Key:
    """A key that would have to be hashed, as a tuple of tuples."""

    kind: str  # its type


class Unpickler:
    """Reads pickles one after the other; `names` is what they name, `kept` what only a `Shell` stands for."""

    def __init__(self, storage: Callable[[str, int], torch.UntypedStorage]) -> None:
        self.names: dict[str, None] = {}
        self.kept: dict[str, None] = {}
        self._storage = storage  # its name and bytes -> the storage
        self._stored: dict[str, torch.UntypedStorage] = {}
        self._steps = 0

    def read(self, data: Any, at: int) -> tuple[Any, int]:
        """The object of the pickle that begins there, and the place behind it.

        Raises Suspicious for what weights never need, and LookupError, ValueError, TypeError, RuntimeError or
        struct.error where the pickle is damaged or has opcodes that torch.save does not write.
        """
        stack: list[Any] = []
        outer: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            self._spend(1)
            code = data[at]
            at += 1
            if code in _FIXED:
                length, make = _FIXED[code]
                stack.append(make(data, at))
                at += length
            elif code in _SIZED:
                width, make = _SIZED[code]
                length = int.from_bytes(data[at : at + width], "little")
                at += width + length
                stack.append(make(data, at - length, length))
            elif code in (0x71, 0x72):  # BINPUT, LONG_BINPUT
                memo[data[at] if code == 0x71 else _long(data, at)] = stack[-1]
                at += 1 if code == 0x71 else 4
            elif code in (0x68, 0x6A):  # BINGET, LONG_BINGET
                stack.append(memo[data[at] if code == 0x68 else _long(data, at)])
                at += 1 if code == 0x68 else 4
            elif code == 0x28:  # MARK
                outer.append(stack)
                stack = []
            elif code == 0x74:  # TUPLE
                made, stack = tuple(stack), outer.pop()
                stack.append(made)
            elif code in (0x85, 0x86, 0x87):  # TUPLE1 … TUPLE3
                stack.append(tuple(_taken(stack, code - 0x84)))
            elif code == 0x63:  # GLOBAL
                name, at = _global(data, at)
                self.names[name] = None
                if len(self.names) > MOST_CLASSES:
                    raise Suspicious(f"names more than {MOST_CLASSES:,} classes and functions")
                if not name.startswith(("torch.", "collections.", "builtins.", "_codecs.")):
                    self.kept[name] = None
                stack.append(_DTYPES.get(name) or Name(name))
            elif code == 0x51:  # BINPERSID
                stack.append(self._stored_at(*stack.pop()))
            elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
                function, arguments = _taken(stack, 2)
                if not isinstance(function, Name) or not isinstance(arguments, tuple):
                    raise Suspicious("calls something that is no function")
                stack.append(self._called(function.path, arguments))
            elif code == 0x62:  # BUILD
                state = stack.pop()
                if isinstance(stack[-1], Shell):  # whatever else there is has no state that is read
                    stack[-1].state = state
            elif code in (0x73, 0x61):  # SETITEM, APPEND
                _fill(stack, _taken(stack, 2 if code == 0x73 else 1), code == 0x73)
            elif code in (0x75, 0x65):  # SETITEMS, APPENDS
                items, stack = stack, outer.pop()
                _fill(stack, items, code == 0x75)
            elif code == 0x80:  # PROTO
                at += 1
            elif code == 0x2E:  # STOP
                return stack.pop(), at
            else:
                raise ValueError(f"an opcode {code} that no weights have")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > PICKLE_STEPS:
            raise Suspicious(f"takes more than {PICKLE_STEPS:,} steps")

    def _stored_at(
        self, what: str, kind: Any, name: Any, _: Any = None, numbers: int = 0, *view: Any
    ) -> Any:
        if what == "module":  # of the older format, with the source of its class
            return kind
        dtype = _STORED[kind.path]
        if name not in self._stored:
            self._stored[name] = self._storage(name, numbers * dtype.itemsize)
        if any(view) or self._stored[name].nbytes() != numbers * dtype.itemsize:
            raise ValueError("a storage that another one is a part of")
        return Stored("a bare storage", dtype, self._stored[name])

    def _called(self, name: str, given: tuple[Any, ...]) -> Any:
        """What a class or function of the file's stands for."""
        first: Any = given[0] if given else None
        if name == "torch._utils._rebuild_tensor_v2":
            return _tensor(first.dtype, *given[:5])
        if name == "torch._utils._rebuild_tensor_v3":
            return _tensor(given[6], *given[:5])
        if name.startswith("torch._utils._rebuild_parameter"):
            return Parameter(first, bool(given[1])) if isinstance(first, Tensor) else first
        if name == "torch._tensor._rebuild_from_type_v2":
            kind = given[1].path
            if kind in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                return self._called(first.path, given[2])
            return Odd(f"one of the class {kind.rpartition('.')[2]}")
        if name.startswith("torch._utils._rebuild_"):
            kind = name.removeprefix("torch._utils._rebuild_").partition("_")[0]
            return Odd(_ODD.get(kind, f"a {kind} one"))
        if name in ("builtins.bytearray", "_codecs.encode", "torch.serialization._get_layout"):
            return b""  # of which nothing is read
        if name == "torch.device":
            return torch.device(*given)
        self._spend(len(first) if isinstance(first, list | tuple) else 0)
        if name in ("builtins.set", "builtins.frozenset"):
            return {one for one in first or () if isinstance(one, _KEYS)}
        if name == "collections.deque":
            return []
        if name == "torch.Size":
            return torch.Size(first or ())
        kind = OrderedDict if name in _MAPPINGS else stand_in(name)
        if kind is OrderedDict:  # of pairs, where it is an old one
            pairs = [one for one in (first if isinstance(first, list) else ()) if len(one) == 2]
            return OrderedDict((_key(key), value) for key, value in pairs)
        self.kept[name] = None
        return kind(*given)


_MAPPINGS = ("collections.OrderedDict", "collections.Counter", "builtins.dict")
_ODD = {
    "qtensor": "a quantized one",
    "meta": "one without numbers (a meta tensor)",
    "nested": "a nested tensor, one that is nested (tensors of several shapes in one)",
}


def _tensor(
    dtype: torch.dtype, stored: Stored, offset: int, size: Any, stride: Any, grad: Any
) -> Tensor:
    made = torch.empty(0, dtype=dtype).set_(stored.bytes, offset, tuple(size), tuple(stride))
    return made.requires_grad_() if grad is True else made


def _fill(stack: list[Any], items: list[Any], keyed: bool) -> None:
    held = stack[-1]
    if keyed and isinstance(held, dict):
        held.update(zip(map(_key, items[::2]), items[1::2], strict=True))
    elif not keyed and isinstance(held, list):
        held += items


def _key(key: Any) -> Any:
    return key if isinstance(key, _KEYS) else Key(type(key).__name__)


def _long(data: Any, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _taken(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("nothing on the stack")
    taken = stack[-count:]
    del stack[-count:]
    return taken


def _text(data: Any, at: int, length: int) -> str:
    if at + length > len(data):
        raise IndexError("it ends within a text")
    return str(data[at : at + length], "utf-8", "surrogatepass")


def _line(data: Any, at: int) -> tuple[str, int]:
    end = data.find(b"\n", at)
    if end < 0:
        raise IndexError("it ends within a name")
    return str(data[at:end], "utf-8"), end + 1


def _global(data: Any, at: int) -> tuple[str, int]:
    module, at = _line(data, at)
    name, at = _line(data, at)
    if (module, name) in NAME_MAPPING:  # Python 2's names, as torch's reader takes them
        module, name = NAME_MAPPING[(module, name)]
    elif module in IMPORT_MAPPING:
        module = IMPORT_MAPPING[module]
    return f"{module}.{name}", at


_SIZED: dict[int, tuple[int, Any]] = {  # bytes of their length, and what is made of so many bytes
    0x58: (4, _text),  # BINUNICODE
    0x55: (1, _text),  # SHORT_BINSTRING
    0x8A: (
        1,
        lambda data, at, n: int.from_bytes(data[at : at + n], "little", signed=True),
    ),  # LONG1
}
_FIXED: dict[int, tuple[int, Any]] = {
    0x4B: (1, lambda data, at: data[at]),  # BININT1
    0x4D: (2, lambda data, at: struct.unpack_from("<H", data, at)[0]),  # BININT2
    0x4A: (4, lambda data, at: struct.unpack_from("<i", data, at)[0]),  # BININT
    0x47: (8, lambda data, at: struct.unpack_from(">d", data, at)[0]),  # BINFLOAT
    0x4E: (0, lambda data, at: None),  # NONE
    0x88: (0, lambda data, at: True),  # NEWTRUE
    0x89: (0, lambda data, at: False),  # NEWFALSE
    0x29: (0, lambda data, at: ()),  # EMPTY_TUPLE
    0x5D: (0, lambda data, at: []),  # EMPTY_LIST
    0x7D: (0, lambda data, at: {}),  # EMPTY_DICT
    0x8F: (0, lambda data, at: set()),  # EMPTY_SET
}


# --------------------------------------------------------------- the two formats of torch.save


def unpickled(path: Path, kind: str) -> tuple[Any, Unpickler]:
    """What a file of torch.save holds, "torch" an archive or "legacy", and who has read it.

    Raises Suspicious for what weights never need, and torch's and Python's errors on a damaged file.
    """
    with path.open("rb") as file:
        return _archived(file, path.stat().st_size) if kind == "torch" else _of_old(file)


def _archived(file: Any, size: int) -> tuple[Any, Unpickler]:
    reader: Any = torch._C.PyTorchFileReader(file)
    claimed = sum(map(reader.get_record_size, reader.get_all_records()))
    if claimed > UNPACKED_TIMES * size + 2**20:
        raise Suspicious(f"asks for {claimed:,} bytes of memory")
    order = reader.get_record("byteorder") if reader.has_record("byteorder") else b"little"
    if order != sys.byteorder.encode():
        raise ValueError("it was written on a machine of another order of bytes")

    def storage(name: str, length: int) -> torch.UntypedStorage:
        if reader.get_record_size(f"data/{name}") != length:
            raise ValueError("a storage has another size than the file says")
        read = reader.get_storage_from_record(f"data/{name}", length, torch.UntypedStorage)
        held: torch.UntypedStorage = read._typed_storage()._untyped_storage
        return held

    unpickler = Unpickler(storage)
    return unpickler.read(bytes(reader.get_record("data.pkl")), 0)[0], unpickler


def _of_old(file: Any) -> tuple[Any, Unpickler]:
    """Magic number, protocol, system, the object, names of its storages, and the storages."""
    held: dict[str, torch.UntypedStorage] = {}
    free = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    left = len(free)

    def storage(name: str, length: int) -> torch.UntypedStorage:
        nonlocal left
        left -= max(length, 0)
        if left < 0:
            raise Suspicious(f"asks for memory for {length:,} bytes")
        held[name] = torch.UntypedStorage(length)
        return held[name]

    unpickler, at, found = Unpickler(storage), 0, []
    with free as data:
        for _ in range(5):
            value, at = unpickler.read(data, at)
            found.append(value)
        for name in found[4]:
            length = held[name].nbytes()
            numbers = struct.unpack_from("<q", data, at)[0]
            if (numbers and length % numbers) or at + 8 + length > len(data):
                raise EOFError("a storage is cut off")
            if length:
                read = torch.frombuffer(
                    bytearray(data[at + 8 : at + 8 + length]), dtype=torch.uint8
                )
                torch.empty(0, dtype=torch.uint8).set_(held[name]).copy_(read)
            at += 8 + length
    return found[3], unpickler
