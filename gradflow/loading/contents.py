"""Model files as plain objects, read without running what is in them.

Nothing here runs code from the file unless ``trust`` is given: archives of torch.save are loaded
with ``weights_only=True`` inside a scoped allow-list of inert entries (`gradflow.loading.shells`).
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.serialization import safe_globals

from gradflow.errors import FileError, UserCodeError
from gradflow.limits import UNPACKED_TIMES
from gradflow.loading.ages import about_opening, is_of_age, older_layers_open
from gradflow.loading.file_kinds import READ_ERRORS, sniff
from gradflow.loading.imports import current_folder_importable
from gradflow.loading.pickled import Asked, Suspicious, scan
from gradflow.loading.plain import checked
from gradflow.loading.shells import allow_list, is_forbidden
from gradflow.loading.words import RESAVE, RESAVE_OR_TRUST, analyze_command, reason, some
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
        return Contents(kind, checked(READERS[kind](path), str(path), RESAVE))
    if trust:
        return Contents(kind, _read_trusted(path, kind))
    if kind == "pickle":
        raise FileError(
            f"{path} holds a Python pickle that torch.save did not write"
            f"{_naming(_named_by(path))}, and opening one can run any code; {RESAVE_OR_TRUST} "
            f"{analyze_command(path, '--trust')}"
        )
    names = tuple(asked_by(path, kind).names)
    return Contents(kind, checked(_read_weights_only(path, kind, names), str(path), RESAVE))


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
                f"need, so it was not opened; {RESAVE_OR_TRUST} "
                f"{analyze_command(path, '--trust')}"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            # The older format keeps modules in a way that torch's safe reader does not read.
            older = " (in torch.save's format from before 1.6)" if kind == "legacy" else ""
            raise FileError(
                f"{path} holds objects{older}{_naming(names)} that cannot be opened without running "
                f"code from the file; {RESAVE_OR_TRUST} "
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


def asked_by(path: Path, kind: str, todo: str = RESAVE) -> Asked:
    """What the pickles of a file of torch.save ask for; nothing is imported, made or run.

    todo is what to do instead, for the error. Raises FileError where they ask for what weights never need.
    """
    size = path.stat().st_size
    asked = Asked(size)
    try:
        if kind == "torch":
            scan(_pickle_in(path), 0, asked)
        elif kind == "legacy":
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                at = 0
                for _ in range(
                    5
                ):  # magic number, protocol, system, the object, names of its storages
                    at = scan(data, at, asked)
            if asked.numbers > size:
                raise Suspicious(f"asks for memory for {asked.numbers:,} numbers")
    except Suspicious as error:
        raise FileError(
            f"{path} {error} when it is opened, and holds {size:,}, so it was not opened; {todo}"
            if "asks for" in str(error)
            else f"{path} {error} when it is opened, so it was not opened; {todo}"
        ) from error
    except READ_ERRORS as error:
        raise FileError(
            f"{path} is a damaged file of torch.save{reason(error)}; copy or download it again, or {todo}"
        ) from error
    return asked


def _pickle_in(path: Path) -> bytes:
    """The pickle of an archive, by the reader that torch.load uses: others may read other bytes."""
    with path.open("rb") as file:
        reader = torch._C.PyTorchFileReader(file)
        claimed = sum(map(reader.get_record_size, reader.get_all_records()))
        if claimed > UNPACKED_TIMES * path.stat().st_size + 2**20:
            raise Suspicious(f"asks for {claimed:,} bytes of memory")
        return bytes(reader.get_record("data.pkl"))


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
