"""Batches from files: every form that is read, and the sentence for every form that is not."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from seam import reason
from torch import Tensor, nn

from gradflow.errors import FileError, GradflowError, InputError
from gradflow.loading import Batch, fit_batch, read_batch

X = np.arange(42, dtype=np.float64).reshape(7, 2, 3)
Y = np.ones((2, 1), dtype=np.float32)
LENGTHS = [7, 4]


def npy(path: Path, value: Any) -> Path:
    np.save(path / "b.npy", value, allow_pickle=True)
    return path / "b.npy"


def npz(path: Path, *args: Any, **arrays: Any) -> Path:
    np.savez(path / "b.npz", *args, **arrays)
    return path / "b.npz"


def pt(path: Path, value: object) -> Path:
    torch.save(value, path / "b.pt")
    return path / "b.pt"


def tensors(path: Path, **arrays: Any) -> Path:
    save_file({k: torch.as_tensor(v) for k, v in arrays.items()}, path / "b.safetensors")
    return path / "b.safetensors"


FORMS = {
    "npy": lambda p: npy(p, X),
    "npz": lambda p: npz(p, input=X, target=Y, lengths=LENGTHS),
    "npz pair": lambda p: npz(p, X, Y),
    "npz single": lambda p: npz(p, X),
    "pt": lambda p: pt(p, torch.as_tensor(X)),
    "pt pair": lambda p: pt(p, (torch.as_tensor(X), torch.as_tensor(Y))),
    "pt list": lambda p: pt(p, [torch.as_tensor(X), torch.as_tensor(Y)]),
    "pt mapping": lambda p: pt(
        p, {"input": torch.as_tensor(X), "target": torch.as_tensor(Y), "lengths": LENGTHS}
    ),
    "pt in a tuple": lambda p: pt(p, {"input": (torch.as_tensor(X),), "lengths": LENGTHS}),
    "safetensors": lambda p: tensors(p, input=X, target=Y, lengths=LENGTHS),
    "big endian": lambda p: npy(p, X.astype(">f8")),
    "long double": lambda p: npy(p, X.astype(np.longdouble)),
    "fortran": lambda p: npy(p, np.asfortranarray(X)),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_read(tmp_path: Path, write) -> None:
    batch = read_batch(write(tmp_path))
    (x,) = batch.inputs
    assert x.dtype == torch.float64
    assert x.tolist() == X.tolist()
    if batch.target is not None:
        assert batch.target.tolist() == Y.tolist()
    if batch.lengths is not None:
        assert batch.lengths.tolist() == LENGTHS
        assert batch.lengths.dtype == torch.int64


def test_further_keys_are_keyword_arguments_and_a_target_may_stand_apart(tmp_path: Path) -> None:
    path = pt(tmp_path, {"input": torch.as_tensor(X), "target": torch.ones(2), "flag": True})
    np.save(tmp_path / "y.npy", Y)
    batch = read_batch(path, tmp_path / "y.npy")
    assert batch.kwargs == {"flag": True}
    assert batch.target is not None
    assert batch.target.shape == (2, 1)
    assert "flag" in " ".join(batch.notes)
    assert "replaced" in " ".join(batch.notes)


def test_several_inputs(tmp_path: Path) -> None:
    batch = read_batch(pt(tmp_path, {"input": [torch.ones(7, 2, 3), torch.zeros(1, 2, 5)]}))
    assert [tuple(x.shape) for x in batch.inputs] == [(7, 2, 3), (1, 2, 5)]


Point = collections.namedtuple("Point", "x y")
BAD = {
    "no file": (lambda p: p / "b.npy", FileError, "does not exist"),
    "folder": (lambda p: (p / "b.npy").mkdir() or p / "b.npy", FileError, "is a folder"),
    "suffix": (lambda p: p / "b.csv", FileError, r"one of .npy, .npz, .pt.*got '.csv'"),
    "objects": (lambda p: npy(p, np.array([{"a": 1}], dtype=object)), FileError, "object arrays"),
    "objects in npz": (
        lambda p: npz(p, input=np.array([None], dtype=object)),
        FileError,
        "object arrays",
    ),
    "zeros": (
        lambda p: (p / "b.npy").write_bytes(bytes(200)) and p / "b.npy",
        FileError,
        "b.npy is no file of numpy's; save it",
    ),
    "class": (lambda p: pt(p, {"input": Point}), FileError, "objects other than tensors"),
    "text": (lambda p: npy(p, np.array(["a"])), InputError, "array of numbers, got dtype <U1"),
    "record": (
        lambda p: npy(p, np.zeros(3, dtype=[("a", "f4")])),
        InputError,
        "an array of numbers",
    ),
    "complex": (lambda p: npy(p, X * 1j), InputError, "real numbers"),
    "empty": (lambda p: npy(p, np.ones((0, 2, 3))), InputError, r"non-empty.*\(0, 2, 3\)"),
    "scalar": (lambda p: npy(p, 5.0), InputError, "a time axis, got a single number"),
    "number": (lambda p: pt(p, 5), InputError, "an array, a pair or a mapping, got an int"),
    "three": (lambda p: pt(p, [torch.ones(1)] * 3), InputError, r"pair \(x, y\).*3 items"),
    "keys": (lambda p: npz(p, x=X, y=Y), InputError, "input, target, lengths, got x, y"),
    "no keys": (lambda p: pt(p, {}), InputError, "got none"),
    "lengths": (lambda p: npz(p, input=X, lengths=[7, 4, 2]), InputError, "got 3 of them"),
    "long": (lambda p: npz(p, input=X, lengths=[9, 4]), InputError, "at most the 7 steps"),
    "zero": (lambda p: npz(p, input=X, lengths=[0, 4]), InputError, r"at least 1.*got \[0, 4\]"),
    "half": (lambda p: npz(p, input=X, lengths=[1.5, 4]), InputError, "whole number"),
    "table": (lambda p: npz(p, input=X, lengths=[[7, 4]]), InputError, "whole number"),
    "target": (
        lambda p: npz(p, input=X, target=np.ones(5)),
        InputError,
        r"as many sequences.*\(5,\)",
    ),
    "text target": (
        lambda p: pt(p, {"input": torch.ones(2, 2), "target": "x"}),
        InputError,
        "target",
    ),
    "sparse": (lambda p: pt(p, torch.ones(3, 3).to_sparse()), InputError, "dense"),
    "meta": (lambda p: pt(p, torch.ones(3, 3, device="meta")), InputError, "dense"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("write", "error", "match"), BAD.values(), ids=BAD.keys())
def test_what_is_no_batch_gets_a_sentence(tmp_path: Path, write, error, match: str) -> None:
    with pytest.raises(error, match=match):
        read_batch(write(tmp_path))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"hello there", b"PK\x03\x04", bytes(range(256))])
def test_damaged_files_get_a_sentence(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"b{suffix}"
    path.write_bytes(data)
    with pytest.raises(GradflowError, match=r"batch\.pt"):
        read_batch(path)


def test_the_bytes_decide_not_the_suffix(tmp_path: Path) -> None:
    x = torch.as_tensor(X)
    torch.save({"input": x}, tmp_path / "torch")
    save_file({"input": x}, tmp_path / "safe")
    with (tmp_path / "zip").open("wb") as file:
        np.savez(file, input=X)
    with (tmp_path / "array").open("wb") as file:
        np.save(file, X)
    for content in ("torch", "safe", "zip", "array"):
        for suffix in (".npy", ".npz", ".pt", ".safetensors"):
            path = tmp_path / f"{content}{suffix}"
            path.write_bytes((tmp_path / content).read_bytes())
            assert torch.equal(read_batch(path).inputs[0], x), path.name


def test_a_reason_is_words_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b.pt"
    path.write_bytes(b"hello there")  # as a pickle: look up entry 101, which nothing has stored
    with pytest.raises(
        FileError, match=r"damaged file of torch.save \(one part of it refers to"
    ) as caught:
        read_batch(path)
    assert "101" not in str(caught.value).replace(str(tmp_path), "")
    assert reason(RuntimeError(101)) == reason(OSError()) == ""
    assert reason(ValueError("two\x07 words\nmore")) == r" (two\x07 words)"


def test_a_link_without_its_target(tmp_path: Path) -> None:
    (tmp_path / "b.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(FileError, match=r"b.pt is a link whose target is gone: .*gone.pt is not"):
        read_batch(tmp_path / "b.pt")


def test_a_target_file_is_one_array(tmp_path: Path) -> None:
    x = npy(tmp_path, X)
    np.savez(tmp_path / "y.npz", a=Y, b=Y)
    with pytest.raises(InputError, match=r"keys of .*y.npz must be target, got a, b"):
        read_batch(x, tmp_path / "y.npz")


# --- fit_batch ---------------------------------------------------------------------------------


def fitted(x: Tensor, model: nn.Module, **rest: Any) -> Batch:
    return fit_batch(Batch((x,), **rest), model)


def test_floats_take_the_models_dtype() -> None:
    batch = fitted(torch.ones(7, 2, 3).double(), nn.LSTM(3, 5), target=torch.ones(2).double())
    assert batch.inputs[0].dtype == batch.target.dtype == torch.float32
    assert "the input was cast from float64 to float32" in batch.notes
    double = fitted(torch.ones(7, 2, 3), nn.LSTM(3, 5).double())
    assert double.inputs[0].dtype == torch.float64
    assert fitted(torch.ones(7, 2, 3), nn.LSTM(3, 5)).notes == ()


def test_whole_numbers_stay_for_an_embedding_and_are_cast_without_one() -> None:
    model = nn.Sequential(nn.Embedding(9, 3), nn.LSTM(3, 5))
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        batch = fitted(torch.ones(7, 2, dtype=dtype), model)
        model(batch.inputs[0])
    assert "embedding" in " ".join(batch.notes)
    assert fitted(torch.ones(7, 2, 3).long(), nn.LSTM(3, 5)).inputs[0].dtype == torch.float32


def test_whole_targets_and_further_arguments_stay_whole() -> None:
    batch = fitted(torch.ones(7, 2, 3), nn.LSTM(3, 5), target=torch.ones(2).long())
    assert batch.target.dtype == torch.int64
    kwargs = {"ids": torch.ones(2).long(), "scale": torch.ones(2).double(), "flag": True}
    batch = fitted(torch.ones(7, 2, 3), nn.Linear(3, 3), kwargs=kwargs)
    assert batch.kwargs["ids"].dtype == torch.int64
    assert batch.kwargs["scale"].dtype == torch.float32
    assert batch.kwargs["flag"] is True


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence_for_a_bare_module_gets_a_batch_axis(batch_first: bool) -> None:
    batch = fitted(torch.ones(7, 3), nn.LSTM(3, 5, batch_first=batch_first))
    assert batch.inputs[0].shape == ((1, 7, 3) if batch_first else (7, 1, 3))
    assert "a batch axis was added" in " ".join(batch.notes)


@pytest.mark.parametrize("shape", [(7, 2, 4), (3,), (1, 7, 2, 3)])
def test_a_bare_module_checks_its_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \(T, B, I\) with I = 3 for this LSTM"):
        fitted(torch.ones(shape), nn.LSTM(3, 5))
