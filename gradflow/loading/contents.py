"""Model files as plain objects, read without running what is in them.

`read` is the door: behind it nobody sees a tensor, a name or a number that was not `checked`.
Nothing here runs code from the file unless ``trust`` is given: archives of torch.save are
read by their opcodes (`gradflow.loading.pickled`) into inert stand-ins (`gradflow.loading.shells`).
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gradflow.errors import FileError, InputError, UserCodeError, must_be, plain_name
from gradflow.limits import ANNOUNCED, TEXT_BYTES
from gradflow.loading.ages import about_opening, is_of_age, older_layers_open
from gradflow.loading.file_kinds import READ_ERRORS, sniff
from gradflow.loading.pickled import Key, Odd, Suspicious, unpickled
from gradflow.loading.shells import Shell, is_forbidden
from gradflow.loading.words import RESAVE, RESAVE_OR_TRUST, analyze_command, reason, some
from gradflow.process import current_folder_importable, lock, printed_to_stderr, quiet


@dataclass(frozen=True)
class Contents:
    """What a file held, before anyone asked what it means."""

    kind: str  # as `gradflow.loading.file_kinds.sniff` tells
    value: object


def read(path: Path, trust: bool = False) -> Contents:
    """Read a model file into plain objects; without ``trust`` nothing in it runs.

    Raises FileError with what the file holds and the next command.
    """
    kind = sniff(path)
    if kind in READERS:
        return Contents(kind, checked(READERS[kind](path), str(path), RESAVE))
    if trust:
        return Contents(kind, _read_trusted(path, kind))
    if kind == "pickle":
        raise FileError(
            f"{path} holds a Python pickle that torch.save did not write"
            f"{_naming(_named_by(path))}, and opening one can run any code; {RESAVE_OR_TRUST} "
            f"{analyze_command(path, '--trust')}"
        )
    return Contents(kind, checked(read_torch(path, kind), str(path), RESAVE))


def read_torch(path: Path, kind: str, todo: str = RESAVE, plain: bool = False) -> object:
    """What a file of torch.save holds, "torch" or "legacy"; nothing of it is imported or run.

    todo is what to do instead, for the error. Raises UnpicklingError where it is to be plain, as a batch is,
    and holds objects of other classes than tensors and Python's containers.
    """
    try:
        value, unpickler = unpickled(path, kind)
    except Suspicious as error:
        held = f", and holds {path.stat().st_size:,}" if "asks for" in str(error) else ""
        raise FileError(
            f"{path} {error} when it is opened{held}, so it was not opened; {todo}"
        ) from error
    except READ_ERRORS as error:
        raise FileError(
            f"{path} is a damaged file of torch.save{reason(error)}; copy or download it again, or {todo}"
        ) from error
    forbidden = [name for name in unpickler.names if is_forbidden(name)]
    if forbidden and not plain:
        raise FileError(
            f"{path} asks to call {some(forbidden)} when it is opened, which weights never need, so it "
            f"was not opened; {RESAVE_OR_TRUST} {analyze_command(path, '--trust')}"
        )
    if plain and (forbidden or unpickler.kept):
        raise pickle.UnpicklingError(some([*forbidden, *unpickler.kept]))
    return value


def read_text(path: Path) -> str:
    """A text that lies beside a model: labels, settings, the index of its weights.

    Raises OSError where it cannot be read, ValueError where it is no UTF-8 or larger than any such file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")  # the end of a pipe would be waited for
    if status.st_size > TEXT_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, more than any such file")
    with path.open(encoding="utf-8-sig") as file:
        return file.read(TEXT_BYTES)


def read_json(path: Path) -> object:
    """What such a text holds as JSON; raises as `read_text`."""
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("its brackets are nested without end") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, *READ_ERRORS) as error:
        raise FileError(
            f"{path} is a damaged safetensors file{reason(error)}; download or save it again, then "
            f"type: {analyze_command(path)}"
        ) from error


READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": _read_safetensors
}  # can hold no code
_reading = lock()  # how older layers are opened is the same for all threads


def _read_trusted(path: Path, kind: str) -> object:
    try:
        try:
            return _unpickled(path, kind)
        except AttributeError as error:
            if not isinstance(error.obj, nn.RNNBase):
                raise
            with _reading, older_layers_open():
                return _unpickled(path, kind)
    except (Exception, SystemExit) as error:  # a trusted pickle runs any code
        if is_of_age(error):
            raise UserCodeError(about_opening(path, error)) from error
        raise UserCodeError(
            f"opening {path} with --trust raised {type(error).__name__}: {error}; its classes must "
            f"be importable from the current folder (not defined in a notebook or __main__): "
            f"start gradflow where they are, or {RESAVE} --model 'pkg.mod:Net(...)'"
        ) from error


def _unpickled(path: Path, kind: str) -> object:
    # What the file prints must not mix with the JSON that goes to standard output.
    with path.open("rb") as file, current_folder_importable(), printed_to_stderr(), quiet():
        if kind == "pickle":
            return pickle.load(file)  # noqa: S301 - the user said --trust
        return torch.load(file, map_location="cpu", weights_only=False)


def _named_by(path: Path) -> tuple[str, ...]:
    """What a pickle that torch.save did not write would import, as far as its first MiB tells."""
    names: dict[str, None] = {}
    strings: list[str] = []
    with path.open("rb") as file:
        head = io.BytesIO(file.read(2**20))
    try:
        with quiet():  # strange escapes in a damaged file
            for opcode, argument, _ in pickletools.genops(head):
                if opcode.name in ("GLOBAL", "INST"):
                    names[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    names[f"{strings[-2]}.{strings[-1]}"] = None
                elif isinstance(argument, str):
                    strings = [*strings[-1:], argument]
    except READ_ERRORS:
        pass  # it is refused in any case
    return tuple(names)


def _naming(names: tuple[str, ...]) -> str:
    plain = ("collections.", "torch._utils.", "torch.storage.", "builtins.")
    own = [name for name in names if not name.startswith(plain) and "Storage" not in name]
    return f" (it names {some(own)})" if own else ""


# ---------------------------------------------------------- what it made of a file

_FREE = (str, bytes, bytearray, int, float, bool, complex, type(None))  # hold nothing


def checked(value: object, label: str, todo: str, *, batch: bool = False) -> object:
    """Walk what a file held, each object once, and leave only what nobody behind has to doubt.

    Names in mappings are text on one line and at most `NAME_LETTERS` long, or plain numbers. Tensors are
    torch's own, dense and on the CPU, carry no hooks and no attributes of the file's, are not
    nested, and together stand for no more numbers than the file holds, give or take a few small views.
    The containers are changed in place; they belong to nobody else yet.

    Args:
        value: as torch's or safetensors' reader made it.
        label: the file, for the error.
        todo: what to do instead, for the error.
        batch: whether the file was given as one.

    Raises:
        FileError: a tensor is of a kind that is not read; of a batch, InputError.
    """
    beyond = _claims()
    waiting: list[tuple[str, object]] = [("", value)]
    seen = {id(value)}
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, Tensor | Odd):
            wrong = item.words if isinstance(item, Odd) else beyond(item)
            if wrong:
                where = f"{name} in {label}" if name else label
                said = must_be(where, "an ordinary dense tensor", wrong, todo)
                raise InputError(said) if batch else FileError(said)
            continue
        for key, inner in _entries(item):
            if not isinstance(inner, _FREE) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((key or name, inner))
    return value


def _claims() -> Callable[[Tensor], str]:
    """What counts the bytes that all tensors stand for; it says so where they are far more than there are."""
    seen: set[int] = set()  # starts of storages
    held = claimed = 0  # bytes of all storages, of all tensors

    def beyond(tensor: Tensor) -> str:
        nonlocal held, claimed
        storage = tensor.untyped_storage()
        held += 0 if storage.data_ptr() in seen else storage.nbytes()
        seen.add(storage.data_ptr())
        claimed += tensor.numel() * tensor.element_size()
        # A layer that is used in several places is in the file once, and under several names
        if claimed <= 8 * held + ANNOUNCED:
            return ""
        return f"one of shape {tuple(tensor.shape)}, more entries than the file holds"

    return beyond


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
    return f"a key of type {key.kind if isinstance(key, Key) else type(key).__name__}"
