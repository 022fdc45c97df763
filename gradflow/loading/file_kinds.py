"""What kind of file a model file is, by its bytes; what cannot be read is refused in words."""

from __future__ import annotations

import difflib
import os
import pickle
import shlex
import stat
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import torch

from gradflow.errors import FileError
from gradflow.loading.words import RESAVE, analyze_command, reason, some

# What torch's and Python's readers raise on a damaged or hostile file; nothing else is expected.
READ_ERRORS = (
    pickle.UnpicklingError, struct.error, SyntaxError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error, ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # after the two protocol bytes of torch.save
PICKLED = ("torch", "legacy", "pickle")  # kinds of files that may ask to run code
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")


def sniff(path: Path) -> str:
    """Tell "torch", "legacy", "safetensors" or "pickle" by the first bytes, or refuse in words."""
    _require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise FileError(
            f"cannot read {path}: {error.strerror or error}; check its permissions with "
            f"ls -l {shlex.quote(str(path))}"
        ) from error
    if not head:
        raise FileError(f"{path} is empty (0 bytes): its save or download failed; {RESAVE}")
    if head.startswith(b"PK"):
        return _sniff_zip(path)
    if head[:1] == b"\x80" and head[2:].startswith(LEGACY_MAGIC):
        return "legacy"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32:
        return "safetensors"
    _refuse_foreign(path, head)
    if len(head) > 1 and head[:1] == b"\x80" and head[1] <= pickle.HIGHEST_PROTOCOL:
        return "pickle"
    _refuse_text(path, head)
    raise FileError(
        f"{path} holds bytes of no format gradflow knows (they start with {head[:4]!r}); {RESAVE}"
    )


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        if not isinstance(error, FileNotFoundError):
            raise FileError(f"cannot read {path}: {why}; check the path") from error
        gone = about_dangling(path)
        if gone:
            raise FileError(f"{gone}; link it anew, or give the file itself") from error
        raise FileError(f"there is no file {path}; {_near_names(path)}") from error
    if stat.S_ISDIR(mode):
        raise FileError(_about_folder(path))
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is not a regular file; give a file of weights")


def about_dangling(path: Path) -> str:
    """What to say of a link whose target is gone, or "" where the path is no such link."""
    if not path.is_symlink() or path.exists():
        return ""
    return f"{path} is a link whose target is gone: {os.readlink(path)} is not there"


def _near_names(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if _may_be_model(entry)]
    except OSError:
        return f"nor a readable folder {path.parent}; check the path with ls"
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {shlex.quote(str(path.with_name(near[0])))}"
    return f"list what is there with: ls {shlex.quote(str(path.parent))}"


def _may_be_model(path: Path) -> bool:
    """Whether it is worth a suggestion: a file of weights by its name, or a folder of transformers."""
    if path.is_dir():
        return (path / "config.json").exists()
    return path.suffix.lower() in WEIGHT_SUFFIXES and path.exists()


def _about_folder(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}; check its permissions"
    if "run.nc" in names:
        return f"{path} is the folder of a run; type: gradflow report {shlex.quote(str(path))}"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return f"{path} is a folder of transformers; type: {analyze_command(path)}"
    if "saved_model.pb" in names:
        return f"{path} is a TensorFlow SavedModel; gradflow reads PyTorch weights: {RESAVE}"
    if any(name.endswith(".distcp") for name in names):
        return (
            f"{path} is a torch.distributed checkpoint; type: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(path))} "
            "weights.pt, then: gradflow analyze weights.pt"
        )
    for suffix in WEIGHT_SUFFIXES:
        for name in names:
            if name.endswith(suffix):
                return f"{path} is a folder; give the file in it: {analyze_command(path / name)}"
    return f"{path} is a folder without a file of weights; give a file: {RESAVE}"


def _sniff_zip(path: Path) -> str:
    if _holds_pickle(path):
        return "torch"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except READ_ERRORS as error:
        raise FileError(
            f"{path} is a damaged zip archive, most likely cut short by an interrupted save or "
            f"download{reason(error)}; copy or download it again, or {RESAVE}"
        ) from error
    short = {name.partition("/")[2] or name for name in names} | set(names)
    pickled = "data.pkl" in short
    if "constants.pkl" in short or any(name.startswith("code/") for name in short):
        raise FileError(_about_torchscript(path))
    if (
        any(name.startswith("models/") or name == "archive_format" for name in short)
        and not pickled
    ):
        raise FileError(
            f"{path} is an exported program of torch.export, which fixes the graph that gradflow "
            f"hooks; {RESAVE}"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise FileError(_about_numpy(path))
    if "model.weights.h5" in short:
        raise FileError(f"{path} is a Keras model; gradflow reads PyTorch weights: {RESAVE}")
    if not pickled:
        raise FileError(
            f"{path} is a zip archive with {some(names) or 'nothing in it'}, which torch.save did "
            f"not write; unpack it and give the file of weights: gradflow analyze FILE"
        )
    return "torch"


def _holds_pickle(path: Path) -> bool:
    """Whether torch's own reader, with which it is opened, finds a pickle, and no compiled code."""
    try:
        with path.open("rb") as file:
            names = torch._C.PyTorchFileReader(file).get_all_records()
    except READ_ERRORS:
        return False
    compiled = "constants.pkl" in names or any(name.startswith("code/") for name in names)
    return "data.pkl" in names and not compiled


def _about_torchscript(path: Path) -> str:
    quoted = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
    code = (
        f"import torch; torch.save(torch.jit.load('{quoted}', map_location='cpu').state_dict(), "
        "'weights.pt')"
    )
    return (
        f"{path} is a TorchScript archive, compiled code whose layers cannot be hooked; take its "
        f'weights out, if you trust its author, with: python -c "{code}", '
        "then type: gradflow analyze weights.pt"
    )


def _about_numpy(path: Path) -> str:
    return (
        f"{path} holds numpy arrays, not a model; give it as the batch: "
        f"gradflow analyze MODEL --input {shlex.quote(str(path))}"
    )


def _refuse_foreign(path: Path, head: bytes) -> None:
    if head.startswith(b"\x93NUMPY"):
        raise FileError(_about_numpy(path))
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        if path.suffix == ".nc":
            raise FileError(
                f"{path} is a netCDF file, such as a run of gradflow; type: "
                f"gradflow report {shlex.quote(str(path))}"
            )
        raise FileError(
            f"{path} is an HDF5 file, as Keras writes; gradflow reads PyTorch weights: {RESAVE}"
        )
    onnx = head[:1] == b"\x08" and any(word in head for word in (b"pytorch", b"onnx", b"torch"))
    if path.suffix == ".onnx" or onnx:
        raise FileError(
            f"{path} is an ONNX graph, which has no PyTorch layers to hook; go back to the model "
            f"it was exported from: {RESAVE}"
        )
    for magic, start, what in _FOREIGN:
        if head[start : start + len(magic)] == magic:
            raise FileError(f"{path} is {what}; gradflow reads PyTorch weights: {RESAVE}")


_FOREIGN = (
    (b"GGUF", 0, "a GGUF file"),
    (b"TFL3", 4, "a TensorFlow Lite model"),
    (b"\x1f\x8b", 0, "a gzip archive; unpack it first with gunzip"),
    (b"BZh", 0, "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", 0, "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", 0, "a 7z archive; unpack it first"),
    (b"ustar", 257, "a tar archive; unpack it first"),
    (b"\x89PNG", 0, "a PNG picture"),
    (b"%PDF", 0, "a PDF document"),
    (b"\x7fELF", 0, "a compiled program"),
)


def _refuse_text(path: Path, head: bytes) -> None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else only the last character was cut in two
            return
        text = head[: error.start].decode("utf-8")
    if not text or any(ord(letter) < 9 for letter in text):
        return
    if text.startswith("version https://git-lfs"):
        raise FileError(
            f"{path} is a pointer of git LFS, not the weights; type: git lfs pull, "
            f"then: {analyze_command(path)}"
        )
    if text.lstrip().lower().startswith(("<!doctype html", "<html")):
        raise FileError(f"{path} is a web page, so its download went wrong; download it again")
    if path.suffix == ".py":
        raise FileError(
            f"{path} is Python source, which goes with weights; type: gradflow analyze WEIGHTS "
            f"--model {shlex.quote(f'{path}:Net(...)')}"
        )
    first = text.splitlines()[0][:40] if text.split() else ""
    raise FileError(f"{path} is a text file (it starts with {first!r}), not weights; {RESAVE}")
