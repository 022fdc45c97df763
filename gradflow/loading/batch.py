"""``--input`` and ``--target``: read a batch from a file and fit it to a model.

A batch file holds an array, a pair (x, y), or a mapping with ``input``, ``target``, ``lengths``;
further keys are keyword arguments of the model. Nothing in it runs: no object arrays, weights only.
"""

from __future__ import annotations

import glob
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gradflow.errors import FileError, GradflowError, InputError, must_be, one_sentence, printable
from gradflow.limits import ANNOUNCED, MOST_STEPS
from gradflow.loading.contents import checked, read_torch
from gradflow.loading.file_kinds import READ_ERRORS, about_dangling
from gradflow.loading.state_dicts import is_recurrent
from gradflow.loading.words import article, reason, some
from gradflow.process import quiet

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
SAVE = 'save it with torch.save({"input": x, "target": y}, "batch.pt")'


@dataclass(frozen=True)
class Batch:
    """What a model is called with: ``model(*inputs, **kwargs)``."""

    inputs: tuple[Tensor, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Tensor | None = None
    lengths: Tensor | None = None  # (B,) real steps of each sequence
    notes: tuple[str, ...] = ()


def files_of(pattern: str, suffixes: Sequence[str]) -> list[Path]:
    """The files that a path, a pattern or a folder stands for, in the order of their names.

    Args:
        pattern: as it was typed; it may match folders.
        suffixes: of the files that are meant in a folder.

    Returns:
        Paths; none where nothing matches. A path without a file is given as it is.
    """
    path = Path(pattern)
    if path.is_dir():
        found = [path]
    elif path.exists() or not glob.has_magic(pattern):
        return [path]
    else:
        found = [Path(one) for one in glob.glob(pattern, recursive=True)]
    inside = (file for one in found if one.is_dir() for file in one.rglob("*"))
    known = [one for one in inside if one.suffix.lower() in suffixes]
    return sorted({one for one in [*found, *known] if one.is_file()}, key=natural)


def natural(name: str | Path) -> list[tuple[int, int, str]]:
    """What names are sorted by: numbers in them by their size, step-9 before step-10."""
    parts = re.split(r"(\d+)", str(name))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def batch_files(given: str | os.PathLike[str], target: Path | None = None) -> list[Path]:
    """The batches that a path, a folder or a pattern stands for, in the order of their names.

    Args:
        given: as it was typed.
        target: the targets of a batch in a file of their own.

    Raises:
        FileError: no file matches.
        InputError: targets in one file are given for several batches.
    """
    found = files_of(os.fspath(given), SUFFIXES)
    if not found:
        kinds = f"files that end in {', '.join(SUFFIXES)}"
        raise FileError(
            f"no batch matches {os.fspath(given)!r}; check the path: {kinds} are looked for"
        )
    if target is not None and len(found) > 1:
        raise InputError(
            f"--target is for one batch, got {len(found)}; save each batch with its target"
        )
    return found


def read_batch(
    input_path: str | os.PathLike[str], target_path: str | os.PathLike[str] | None = None
) -> Batch:
    """Read a batch from ``.npy``, ``.npz``, ``.pt`` (weights only) or ``.safetensors``.

    Raises FileError where a file cannot be read as one, InputError where what it holds is no batch.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/batch.npz", input=np.ones((7, 2, 3)), lengths=[7, 4])
    ...     batch = read_batch(f"{folder}/batch.npz")
    >>> batch.inputs[0].shape, batch.lengths
    (torch.Size([7, 2, 3]), tensor([7, 4]))
    """
    try:
        return _batch_of(Path(input_path), target_path)
    except (FileError, InputError) as error:  # one line, whatever the keys in the file are
        typed = [str(one) for one in (input_path, target_path) if one is not None]
        raise type(error)(one_sentence(error, *typed)) from error


def as_batch(value: object, label: str = "batch") -> Batch:
    """A batch of what a file would hold: an array, a pair (x, y), or a mapping.

    Args:
        value: what was given.
        label: what it is called in an error.

    Raises:
        InputError: it is no batch.

    >>> as_batch((np.ones((7, 2, 3)), np.ones(2))).target.shape
    torch.Size([2])
    """
    batch = _as_batch(value, label)
    _check(batch, label)
    return batch


def _batch_of(path: Path, target_path: str | os.PathLike[str] | None) -> Batch:
    batch = _as_batch(_read(path), str(path))
    if target_path is not None:
        target = _as_target(_read(Path(target_path)), str(target_path))
        notes = batch.notes
        if batch.target is not None:
            notes = (*notes, f"the target in {path} was replaced by {target_path}")
        batch = replace(batch, target=target, notes=notes)
    _check(batch, str(path))
    return batch


def _read(path: Path) -> object:
    if path.suffix.lower() not in SUFFIXES and not path.is_dir():
        raise FileError(
            must_be(f"{path}", f"one of {', '.join(SUFFIXES)}", repr(path.suffix), SAVE)
        )
    if not path.is_file():
        gone = about_dangling(path)
        if gone:
            raise FileError(f"the batch {gone}; link it anew, or {SAVE}")
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileError(f"the batch {path} {what}; check the path, or {SAVE}")
    try:
        with quiet():
            found = _READERS[_content(path) or path.suffix.lower()](path)
        return checked(found, str(path), SAVE, batch=True)
    except GradflowError:
        raise
    except PermissionError as error:
        raise FileError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile, *READ_ERRORS) as error:
        if "Object arrays" in str(error):
            held = "object arrays, which can run code when opened; convert it to numbers"
            raise FileError(f"{path} holds {held} and {SAVE}") from error
        if "magic string" in str(error):
            raise FileError(f"{path} is no file of numpy's; {SAVE}") from error
        if isinstance(error, pickle.UnpicklingError):
            held = (
                "objects other than tensors, numbers, lists and dicts, or is no file of torch.save"
            )
            raise FileError(f"{path} holds {held}; {SAVE}") from error
        raise FileError(
            f"{path} is damaged or not what its name says{reason(error)}; {SAVE}"
        ) from error


def _content(path: Path) -> str:
    """The suffix that a file's bytes deserve, or "" where they do not tell."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"\x93NUMPY"):
        return ".npy"
    if len(head) > 8 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32:
        return ".safetensors"
    if not head:
        raise FileError(f"the batch {path} is empty (0 bytes): its save or download failed; {SAVE}")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise FileError(
                f"the batch {path} is a damaged zip archive, most likely cut short by an "
                f"interrupted save or download; copy it again, or {SAVE}"
            )
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        torch_made = any(name.rpartition("/")[2] == "data.pkl" for name in names)
        numpy_made = any(name.endswith(".npy") for name in names)
        return ".pt" if torch_made else ".npz" if numpy_made else ""
    return ""


def _array(file: IO[bytes], size: int) -> np.ndarray:
    """One array of numpy's from a file of this size, whose header may announce any other."""
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(file)
    announced, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if not dtype.hasobject and (announced > held or min(shape, default=0) < 0):
        raise ValueError(f"it announces {announced:,} bytes of numbers and holds {held:,}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return _array(file, path.stat().st_size)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        announced = sum(info.file_size for info in members)
        if announced > max(ANNOUNCED, path.stat().st_size):
            raise ValueError(f"it announces {announced:,} bytes of numbers")
        arrays = {}
        for info in members:
            with archive.open(info) as file:
                arrays[info.filename.removesuffix(".npy")] = _array(file, info.file_size)
        return arrays


def _torch(path: Path) -> object:
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
    return read_torch(path, "torch" if archive else "legacy", SAVE, plain=True)


_READERS: dict[str, Callable[[Path], object]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _torch,
    ".pth": _torch,
    ".safetensors": lambda path: load_file(path, device="cpu"),
}


def _as_batch(value: object, label: str) -> Batch:
    if isinstance(value, Tensor | np.ndarray):
        return Batch((_tensor(value, f"the array in {label}"),))
    if isinstance(value, Mapping):
        return _from_mapping({str(key): item for key, item in value.items()}, label)
    if isinstance(value, list | tuple):
        if len(value) == 2 and all(isinstance(item, Tensor | np.ndarray) for item in value):
            first, second = value
            note = f"{label} holds a pair: read as (input, target)"
            return Batch(
                (_tensor(first, f"the input in {label}"),),
                target=_tensor(second, f"the target in {label}"),
                notes=(note,),
            )
        raise InputError(
            must_be(f"a list in {label}", "a pair (x, y) of arrays", f"{len(value)} items", SAVE)
        )
    expected = "an array, a pair or a mapping"
    raise InputError(must_be(label, expected, article(type(value).__name__), SAVE))


def _from_mapping(value: Mapping[str, object], label: str) -> Batch:
    rest = dict(value)
    if "input" not in rest and set(rest) <= {"arr_0", "arr_1"} and rest:  # np.savez(file, x, y)
        return _as_batch(
            [rest[key] for key in sorted(rest)] if len(rest) == 2 else rest["arr_0"], label
        )
    if "input" not in rest and any(map(is_recurrent, rest)):
        raise InputError(
            f"{label} holds the weights of a model, and --input takes a batch: the numbers the model "
            f"reads; in your training code {SAVE}"
        )
    if "input" not in rest:
        keys = some(list(rest), 6) or "none"
        raise InputError(must_be(f"the keys of {label}", "input, target, lengths", keys, SAVE))
    given = rest.pop("input")
    several = given if isinstance(given, list | tuple) and given else (given,)
    if all(isinstance(item, int | float) for item in several):
        several = (several,)  # a plain list of numbers is one array
    target, lengths = rest.pop("target", None), rest.pop("lengths", None)
    return Batch(
        inputs=tuple(_tensor(item, f"the input in {label}") for item in several),
        kwargs={
            key: _tensor(item, f"{key} in {label}") if isinstance(item, np.ndarray) else item
            for key, item in rest.items()
        },
        target=None if target is None else _tensor(target, f"the target in {label}"),
        lengths=None if lengths is None else _lengths(lengths, label),
        notes=(printable(f"passed to the model by keyword: {some(list(rest), 6)}"),)
        if rest
        else (),
    )


def _as_target(value: object, label: str) -> Tensor:
    if isinstance(value, Mapping):
        named = {str(key): item for key, item in value.items()}
        keys = list(named)
        chosen = "target" if "target" in keys else keys[0] if len(keys) == 1 else None
        if chosen is None:
            shown = some(keys, 6) or "none"
            raise InputError(must_be(f"the keys of {label}", "target", shown, "name it target"))
        value = named[chosen]
    return _tensor(value, f"the target in {label}")


def _tensor(value: object, label: str) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else _from_numpy(value, label)
    if tensor.is_complex():
        raise InputError(
            must_be(label, "real numbers", tensor.dtype, "give real and imaginary parts")
        )
    if tensor.numel() == 0:
        shape = tuple(tensor.shape)
        raise InputError(
            must_be(label, "a non-empty array", f"shape {shape}", "check how it was saved")
        )
    return tensor


def _from_numpy(value: object, label: str) -> Tensor:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(
            must_be(label, "an array of numbers", article(type(value).__name__), SAVE)
        ) from error
    if array.dtype.kind not in "biufc":
        got = "object arrays" if array.dtype.kind == "O" else f"dtype {array.dtype}"
        raise InputError(must_be(label, "an array of numbers", got, SAVE))
    kind = array.dtype.kind
    wide: Any = {"u": np.int64 if array.dtype.itemsize > 1 else np.uint8, "c": np.complex128}.get(
        kind
    )
    if kind == "f" and array.dtype.itemsize not in (2, 4, 8):
        wide = np.float64  # numpy's long double, which torch does not know
    # A native, contiguous copy: torch reads neither big-endian nor read-only arrays
    target_type = np.dtype(wide) if wide is not None else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=target_type, order="C"))


def _lengths(value: object, label: str) -> Tensor:
    lengths = _tensor(value, f"lengths in {label}")
    whole = not lengths.is_floating_point() or bool((lengths == lengths.round()).all())
    if lengths.ndim != 1 or not whole or lengths.dtype == torch.bool or bool((lengths < 1).any()):
        got = lengths.tolist() if lengths.numel() <= 8 else f"shape {tuple(lengths.shape)}"
        expected = "one whole number of at least 1 per sequence"
        raise InputError(
            must_be(f"lengths in {label}", expected, got, "give the real steps of each")
        )
    return lengths.long()


def _check(batch: Batch, label: str) -> None:
    first = batch.inputs[0]
    if first.ndim == 0:
        raise InputError(
            must_be(f"the input in {label}", "an array with a time axis", "a single number", SAVE)
        )
    # Which axis is the batch is the model's affair, so only what fits neither is refused.
    shape = tuple(first.shape)
    leading = set(shape[:2])
    if batch.lengths is not None:
        if len(batch.lengths) not in leading:
            expected = f"one per sequence of an input of shape {shape}"
            raise InputError(must_be("lengths", expected, f"{len(batch.lengths)} of them", SAVE))
        longest = int(batch.lengths.max())
        if longest > max(leading):
            raise InputError(
                must_be("lengths", f"at most the {max(leading)} steps of the input", longest, SAVE)
            )
    target = batch.target
    if (
        target is not None
        and target.ndim
        and first.ndim > 1
        and not leading & set(target.shape[:2])
    ):
        expected = f"as many sequences as the input of shape {shape}"
        raise InputError(
            must_be(
                "the target", expected, f"shape {tuple(target.shape)}", "save both from one batch"
            )
        )


def fit_batch(batch: Batch, model: nn.Module) -> Batch:
    """Bring a batch to the model's dtype and device; whole numbers stay whole for embeddings.

    A bare ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` gets its input checked, and a batch axis where one
    sequence was given without. Raises InputError where the input cannot be right for the model.

    >>> fit_batch(Batch((torch.ones(7, 2, 3, dtype=torch.float64),)), nn.LSTM(3, 5)).inputs[0].dtype
    torch.float32
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    dtype = weights[0].dtype if weights else torch.get_default_dtype()
    device = weights[0].device if weights else torch.device("cpu")
    embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    notes = list(batch.notes)

    def fit(value: Any, name: str, whole: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point() and value.dtype != dtype:
            notes.append(f"{name} was cast from {_short(value.dtype)} to {_short(dtype)}")
            return value.to(device, dtype)
        if not value.is_floating_point() and not whole:
            notes.append(f"{name} was cast from {_short(value.dtype)} to {_short(dtype)}")
            return value.to(device, dtype)
        if value.dtype in (torch.uint8, torch.int8, torch.int16):
            return value.to(device, torch.long)  # embeddings read int32 and int64 only
        if name == "the input" and not value.is_floating_point() and value.dtype != torch.bool:
            notes.append("the input holds whole numbers and was kept so, for the model's embedding")
        return value.to(device)

    inputs = tuple(
        fit(value, "the input" if i == 0 else f"input {i + 1}", whole=embeds or i > 0)
        for i, value in enumerate(batch.inputs)
    )
    fitted = replace(
        batch,
        inputs=inputs,
        kwargs={key: fit(value, key, whole=True) for key, value in batch.kwargs.items()},
        target=fit(batch.target, "the target", whole=True),
    )
    _check_steps(fitted.inputs[0], model)
    if isinstance(model, nn.RNNBase):
        fitted = _fit_bare(fitted, model, notes)
    return replace(fitted, notes=tuple(dict.fromkeys(notes)))


def _check_steps(first: Tensor, model: nn.Module) -> None:
    """Refuse more steps than are analyzed one by one; the layers say which axis is time."""
    axes = {int(part.batch_first) for part in model.modules() if isinstance(part, nn.RNNBase)}
    if first.dim() > 1 and any(first.shape[axis] > MOST_STEPS for axis in axes):
        expected = f"of at most {MOST_STEPS:,} steps"
        advice = "cut its sequences, or record a part of a step with gradflow.record"
        raise InputError(must_be("the input", expected, f"shape {tuple(first.shape)}", advice))


def _fit_bare(batch: Batch, model: nn.RNNBase, notes: list[str]) -> Batch:
    first = batch.inputs[0]
    kind = type(model).__name__
    if first.shape[-1] != model.input_size or first.ndim not in (2, 3):
        axes = "(B, T, I)" if model.batch_first else "(T, B, I)"
        expected = f"{axes} with I = {model.input_size} for this {kind}"
        raise InputError(must_be("the input", expected, f"shape {tuple(first.shape)}", SAVE))
    if first.ndim == 2:
        axis = 0 if model.batch_first else 1
        notes.append("the input is one sequence: a batch axis was added")
        target = batch.target
        if target is not None and target.ndim == 2 and len(target) == len(first):
            target = target.unsqueeze(axis)
        batch = replace(batch, inputs=(first.unsqueeze(axis), *batch.inputs[1:]), target=target)
    return batch


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_lengths(lengths: Sequence[int] | Tensor | None, batch: int, steps: int) -> None:
    """Raise InputError unless there is one length in 1 … ``steps`` for each sequence."""
    if lengths is None:
        return
    values = [int(n) for n in lengths]
    if len(values) != batch:
        expected = f"one per sequence, {batch} in all"
        raise InputError(
            must_be("lengths", expected, f"{len(values)} of them", "check batch_first")
        )
    if values and not 1 <= min(values) <= max(values) <= steps:
        expected = f"between 1 and the {steps} steps of the output"
        got = f"{min(values)} to {max(values)}"
        raise InputError(must_be("lengths", expected, got, "check batch_first and the lengths"))
