"""Model files as plain objects, read without running what is in them.

Nothing here runs code from the file unless ``trust`` is given: archives of torch.save are loaded
with ``weights_only=True`` inside a scoped allow-list of inert entries (`gradflow.loading.shells`).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.serialization import safe_globals

from gradflow.errors import FileError, UserCodeError
from gradflow.loading.ages import about_opening, is_of_age, older_layers_open
from gradflow.loading.file_kinds import READ_ERRORS, sniff
from gradflow.loading.imports import current_folder_importable
from gradflow.loading.shells import allow_list, is_forbidden
from gradflow.loading.words import RESAVE, analyze_command, reason, some
from gradflow.process import lock, printed_to_stderr, quiet


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
        return Contents(kind, READERS[kind](path))
    if trust:
        return Contents(kind, _read_trusted(path, kind))
    asked = asked_by(path, kind)
    refuse_huge(path, asked)
    names = tuple(asked.names)
    if kind == "pickle":
        raise FileError(
            f"{path} holds a Python pickle that torch.save did not write"
            f"{_naming(names)}, and opening one can run any code; {RESAVE}, or, only if you trust "
            f"the file's author: {analyze_command(path, '--trust')}"
        )
    return Contents(kind, _read_weights_only(path, kind, names))


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
_reading = lock()


def _read_weights_only(path: Path, kind: str, names: tuple[str, ...]) -> object:
    try:
        # An open file, for of a path torch.load trusts the suffix: ".safetensors" of a zip.
        with (
            path.open("rb") as file,
            _reading,  # what torch may read is the same list for all threads
            safe_globals(allow_list(names)),
            quiet(),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        forbidden = [name for name in names if is_forbidden(name)]
        if forbidden:
            raise FileError(
                f"{path} asks to call {some(forbidden)} when it is opened, which weights never "
                f"need, so it was not opened; {RESAVE}, or, only if you trust the file's author: "
                f"{analyze_command(path, '--trust')}"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            # The older format keeps modules in a way that torch's safe reader does not read.
            older = " (in torch.save's format from before 1.6)" if kind == "legacy" else ""
            raise FileError(
                f"{path} holds objects{older} that cannot be opened without running code from the "
                f"file{_naming(names)}; {RESAVE}, or, only if you trust the file's author: "
                f"{analyze_command(path, '--trust')}"
            ) from error
        raise FileError(
            f"{path} is a damaged file of torch.save{reason(error)}; copy or download it again, "
            f"or {RESAVE}"
        ) from error


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
    with (
        path.open("rb") as file,
        current_folder_importable(),
        printed_to_stderr(),
        quiet(),
    ):
        if kind == "pickle":
            return pickle.load(file)  # noqa: S301 - the user said --trust
        return torch.load(file, map_location="cpu", weights_only=False)


@dataclass
class Asked:
    """What a pickle asks for when it is opened."""

    names: dict[str, None] = field(default_factory=dict)  # that it would import
    largest: int = 0  # whole number in it


def asked_by(path: Path, kind: str) -> Asked:
    """What a pickle would import and how large its numbers are, by its opcodes; nothing is imported."""
    asked = Asked()
    try:
        with quiet():  # strange escapes in a damaged file
            _scan_file(path, kind, asked)
    except READ_ERRORS:
        pass  # a damaged file: the reader itself will say so
    return asked


def refuse_huge(path: Path, asked: Asked, todo: str = RESAVE) -> None:
    """Raise FileError where a pickle asks for a bytearray of more bytes than the file has.

    torch's own safe reader allows it. todo is what to do instead, for the error.
    """
    if "builtins.bytearray" in asked.names and asked.largest > path.stat().st_size:
        raise FileError(
            f"{path} asks for {asked.largest:,} bytes of memory when it is opened, and holds "
            f"{path.stat().st_size:,}, so it was not opened; {todo}"
        )


def _scan_file(path: Path, kind: str, asked: Asked) -> None:
    if kind == "torch":
        with zipfile.ZipFile(path) as archive:
            member = next(n for n in archive.namelist() if n.split("/")[-1] == "data.pkl")
            _scan_pickle(io.BytesIO(archive.read(member)), asked)
    else:
        with path.open("rb") as file:
            # torch.save's older format: magic number, protocol, system, then the object
            for _ in range(4 if kind == "legacy" else 1):
                _scan_pickle(file, asked)


def _scan_pickle(file: IO[bytes], asked: Asked) -> None:
    strings: list[str] = []
    protocol = 0
    for opcode, argument, _ in pickletools.genops(file):
        if isinstance(argument, int) and opcode.name != "PROTO":
            asked.largest = max(asked.largest, argument)
        if opcode.name == "PROTO" and isinstance(argument, int):
            protocol = argument
        elif opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if protocol < 3:  # Python 2's names, as the unpicklers read them
                module, name = NAME_MAPPING.get((module, name), (module, name))
                module = IMPORT_MAPPING.get(module, module)
            asked.names[f"{module}.{name}"] = None
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            asked.names[f"{strings[-2]}.{strings[-1]}"] = None
        elif isinstance(argument, str):
            strings = [*strings[-1:], argument]


def _naming(names: tuple[str, ...]) -> str:
    plain = ("collections.", "torch._utils.", "torch.storage.", "builtins.")
    own = [name for name in names if not name.startswith(plain) and "Storage" not in name]
    return f" (it names {some(own)})" if own else ""
