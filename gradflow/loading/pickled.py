"""What the pickle in a file of torch.save would do when it is opened, told from its opcodes; nothing is run.

torch's safe reader calls a short list of functions with whatever arguments the file holds. Some of them take
memory or time on the word of a number (``bytearray(5 * 10**9)``, ``set`` of a tensor expanded to 10¹² rows, a
key that is a tuple of tuples of one tuple, which is hashed once per path). `scan` follows the pickle's stack
without making the objects, and refuses such calls.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import Any

from gradflow.limits import HASHED_ENTRIES, MOST_CLASSES, TUPLE_DEPTH
from gradflow.loading.shells import MAPPINGS

_REBUILT = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in (
        *("parameter", "parameter_with_state", "qtensor", "tensor", "tensor_v2", "tensor_v3"),
        *("sparse_tensor", "meta_tensor_no_storage", "nested_tensor"),
    )
)
_HASHING = ("builtins.set", "collections.OrderedDict", "collections.Counter")  # torch calls them
_LATIN = ("latin1", "latin-1", "utf-8", "ascii")  # codecs that bytes are pickled with


class Suspicious(ValueError):
    """The file asks for something that weights never need; the text says for what."""


@dataclass
class Asked:
    """What a pickle asks for when it is opened."""

    size: int  # bytes of the file
    names: dict[str, None] = field(default_factory=dict)  # that it would import
    hashed: int = 0  # entries of its keys, each as often as it is hashed
    numbers: int = 0  # entries of its storages, in torch.save's older format


class _Name:
    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class _List:
    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class _Tuple(_List):
    """A tuple, with what hashing it costs: its entries, each as often as it is reached."""

    __slots__ = ("depth", "weight")

    depth: int  # tuples within each other
    weight: int

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        weight, depth = 1 + len(items), 1
        for item in items:
            if type(item) is _Tuple:
                weight += item.weight - 1
                depth = max(depth, item.depth + 1)
        self.weight, self.depth = weight, depth


class _Made:
    """What a call returned."""

    __slots__ = ("by",)

    def __init__(self, by: str) -> None:
        self.by = by


_DICT, _SET = _Made("builtins.dict"), _Made("builtins.set")
_long_at = struct.Struct("<I").unpack_from


def scan(data: Any, start: int, asked: Asked) -> int:
    """Follow one pickle from a place in the bytes of a file; the place behind it.

    Raises Suspicious for what weights never need, and LookupError, ValueError or struct.error where the
    pickle is damaged or has opcodes that torch's safe reader refuses.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[int, Any] = {}
    at = start
    while True:
        code = data[at]
        at += 1
        if code in _FIXED:
            length, make = _FIXED[code]
            stack.append(make(data, at))
            at += length
        elif code == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif code == 0x72:  # LONG_BINPUT
            memo[_long_at(data, at)[0]] = stack[-1]
            at += 4
        elif code == 0x68:  # BINGET
            stack.append(memo[data[at]])
            at += 1
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[_long(data, at)])
            at += 4
        elif code == 0x28:  # MARK
            outer.append(stack)
            stack = []
        elif code == 0x74:  # TUPLE
            made, stack = _Tuple(stack), outer.pop()
            stack.append(made)
        elif code in (0x85, 0x86, 0x87):  # TUPLE1 … TUPLE3
            count = code - 0x84
            stack[-count:] = [_Tuple(_last(stack, count))]
        elif code == 0x58:  # BINUNICODE
            length = _long(data, at)
            stack.append(_text(data, at + 4, length))
            at += 4 + length
        elif code == 0x55:  # SHORT_BINSTRING
            stack.append(_text(data, at + 1, data[at]))
            at += 1 + data[at]
        elif code == 0x8A:  # LONG1
            length = data[at]
            stack.append(int.from_bytes(data[at + 1 : at + 1 + length], "little", signed=True))
            at += 1 + length
        elif code == 0x63:  # GLOBAL
            name, at = _global(data, at)
            asked.names[name] = None
            if len(asked.names) > MOST_CLASSES:
                raise Suspicious(f"names more than {MOST_CLASSES:,} classes and functions")
            stack.append(_Name(name))
        elif code == 0x51:  # BINPERSID
            stack.append(_storage(stack.pop(), asked))
        elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments, asked))
        elif code == 0x62:  # BUILD
            state = stack.pop()
            _built(stack[-1], state, asked)
        elif code in (0x73, 0x75, 0x61, 0x65):  # SETITEM, SETITEMS, APPEND, APPENDS
            count = {0x73: 2, 0x61: 1}.get(code, 0)
            items = _last(stack, count) if count else stack
            stack = stack[:-count] if count else outer.pop()
            _fill(stack[-1], items, code in (0x73, 0x75), asked)
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x2E:  # STOP
            stack.pop()
            return at
        else:
            raise ValueError(f"an opcode {code} that no weights have")


def _fill(container: Any, items: list[Any], keyed: bool, asked: Asked) -> None:
    if keyed:
        for key in items[::2]:
            _hash(key, asked)
    elif type(container) is _List:
        container.items += items


def _long(data: Any, at: int) -> int:
    return int(_long_at(data, at)[0])


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("nothing on the stack")
    return stack[-count:]


def _text(data: Any, at: int, length: int) -> str:
    if at + length > len(data):
        raise IndexError("it ends within a text")
    # Only what may name a codec or a place is ever looked at
    return str(data[at : at + min(length, 4 * 80)], "utf-8", "replace")


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


_FIXED: dict[int, tuple[int, Any]] = {
    0x4B: (1, lambda data, at: data[at]),  # BININT1
    0x4D: (2, lambda data, at: struct.unpack_from("<H", data, at)[0]),  # BININT2
    0x4A: (4, lambda data, at: struct.unpack_from("<i", data, at)[0]),  # BININT
    0x47: (8, lambda data, at: None),  # BINFLOAT
    0x4E: (0, lambda data, at: None),  # NONE
    0x88: (0, lambda data, at: None),  # NEWTRUE
    0x89: (0, lambda data, at: None),  # NEWFALSE
    0x29: (0, lambda data, at: _Tuple([])),  # EMPTY_TUPLE
    0x5D: (0, lambda data, at: _List([])),  # EMPTY_LIST
    0x7D: (0, lambda data, at: _DICT),  # EMPTY_DICT
    0x8F: (0, lambda data, at: _SET),  # EMPTY_SET
}


def _hash(key: Any, asked: Asked) -> None:
    """Count what hashing a key costs."""
    if not isinstance(key, _Tuple):
        return
    asked.hashed += key.weight
    if asked.hashed > asked.size + HASHED_ENTRIES or key.depth > TUPLE_DEPTH:
        raise Suspicious("holds tuples in tuples as keys that would take for ever to look up")


def _storage(place: Any, asked: Asked) -> _Made | _Name:
    """A storage; in the older format its memory is taken before its numbers are read.

    Of a module the older format names the class here, which torch's safe reader refuses.
    """
    items = place.items if isinstance(place, _Tuple) else []
    if items[:1] == ["module"] and isinstance(items[1], _Name):
        return items[1]
    numbers = items[4] if len(items) > 4 else 0
    if isinstance(numbers, int):
        asked.numbers += max(numbers, 0)
    return _Made("storage")


def _is_mapping(name: str) -> bool:
    """Whether a pickled class is opened as a dict; as `gradflow.loading.shells` decides."""
    known = name in ("collections.OrderedDict", "collections.Counter", "builtins.dict")
    return known or name.rpartition(".")[2].lower().endswith(MAPPINGS)


def _called(function: Any, arguments: Any, asked: Asked) -> _Made:
    if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
        raise Suspicious("calls something that is no function")
    _check_call(function.path, arguments.items, asked)
    return _Made(function.path)


def _check_call(name: str, arguments: list[Any], asked: Asked) -> None:
    """Raise Suspicious where a function of torch's list would take memory or time on a number's word."""
    if name in _REBUILT or (name in _HASHING and not arguments):
        return  # as of every tensor
    if name == "builtins.bytearray":
        sizes = [one for one in arguments if isinstance(one, int)]
        if sizes and sizes[0] > asked.size:
            raise Suspicious(f"asks for {sizes[0]:,} bytes of memory")
        fine = all(isinstance(one, int | str | _List) for one in arguments)
    elif name == "_codecs.encode":
        fine = all(isinstance(one, str) for one in arguments) and arguments[1:] in (
            *([], *([codec] for codec in _LATIN)),
        )
    elif name.startswith("collections.") and name not in _HASHING:
        fine = True  # opened as something empty
    elif name in _HASHING or _is_mapping(name):
        fine = all(isinstance(one, _List) or one is _DICT or one is _SET for one in arguments)
        for one in arguments:
            for entry in one.items if isinstance(one, _List) else ():
                _hash(entry, asked)
    elif name == "torch._tensor._rebuild_from_type_v2":
        function, kind, inner, *_ = [*arguments, None, None, None]
        fine = (
            isinstance(function, _Name)
            and isinstance(kind, _Name)
            and isinstance(inner, _Tuple)
            and function.path in _REBUILT
        )
    elif name.startswith("torch._utils."):
        fine = False
    elif name.startswith("torch.") and name.endswith(("Tensor", "Storage")):
        fine = not arguments
    elif name == "torch.Size":
        fine = all(isinstance(one, _List) for one in arguments)
    else:
        fine = True  # a name that stands for nothing, see `gradflow.loading.shells`, or is refused
    if not fine:
        raise Suspicious(f"calls {name} with arguments that weights never have")


def _built(made: Any, state: Any, asked: Asked) -> None:
    """Objects of torch's own take tuples and dicts; whatever else is only kept by a stand-in."""
    inert = isinstance(made, _Made) and not made.by.startswith(("torch.", "builtins."))
    if inert and not _is_mapping(made.by):
        return
    module = isinstance(made, _Made) and made.by.startswith("torch.nn.modules.")
    fine = (
        isinstance(state, _Tuple)
        or state is None
        or (isinstance(state, _Made) and _is_mapping(state.by))
    )
    if isinstance(state, _Tuple):
        for entry in state.items:
            _hash(entry, asked)
    if not fine and not module:
        raise Suspicious("fills an object with something that is no state")
