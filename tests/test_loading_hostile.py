"""Files that were made to do harm end in one printable sentence, and cost nothing before it."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

import gradflow
from gradflow.errors import GradflowError
from gradflow.loading import open_model, read_batch


@pytest.fixture
def nested() -> torch.Tensor:
    """Tensors of two shapes in one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the API may still change
        return torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)])


def refused(read: Callable[[], object]) -> str:
    """The sentence that it ends in."""
    with pytest.raises(GradflowError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("read", [open_model, read_batch], ids=["model", "batch"])
def test_memory_that_a_pickle_asks_for_is_not_given(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    asked = (5 * 10**12).to_bytes(6, "little")  # no machine has them
    pickle = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + asked + b"\x85R."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
    assert "asks for 5,000,000,000,000 bytes of memory" in refused(lambda: read(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    "key", ["\x1b[31mred\nblue\x07", "k" * 10**6], ids=["escapes", "a megabyte"]
)
def test_keys_of_a_batch_are_printed_on_one_short_line(key: str, tmp_path: Path) -> None:
    torch.save({key: torch.ones(3, 2, 4)}, tmp_path / "b.pt")
    said = refused(lambda: read_batch(tmp_path / "b.pt"))
    assert said.isprintable() and len(said) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["input", "target"])
def test_a_nested_tensor_in_a_batch_is_no_dense_one(
    name: str, nested: torch.Tensor, tmp_path: Path
) -> None:
    torch.save({"input": torch.ones(6, 2, 3)} | {name: nested}, tmp_path / "b.pt")
    assert "got a nested tensor" in refused(lambda: read_batch(tmp_path / "b.pt"))


def test_a_nested_tensor_among_weights_is_named(nested: torch.Tensor, tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(torch.nn.LSTM(3, 5).state_dict())
    torch.save(weights | {"weight_hh_l0": nested}, tmp_path / "x.pt")
    assert "nested (tensors of several shapes in one)" in refused(
        lambda: open_model(tmp_path / "x.pt")
    )


def edited(group: str, **changes: object) -> Callable[[h5py.File], None]:
    """Other fields in a header of a saved run; None takes one out."""

    def edit(file: h5py.File) -> None:
        header = json.loads(file[group].attrs["gradflow"]) | changes
        header = {name: value for name, value in header.items() if value is not None}
        file[group].attrs["gradflow"] = json.dumps(header)

    return edit


EDITS: dict[str, Callable[[h5py.File], None]] = {
    "no title": edited("/", title=None),
    "warnings that are no list": edited("/", warnings=3),
    "provenance that is text": edited("/", provenance="x"),
    "brackets without end": lambda file: file["/"].attrs.__setitem__("gradflow", "[" * 100_000),
    "a verdict that is none": edited("/layer0", verdict="maybe"),
    "no step": edited("/layer0", steps=0),
    "a sentence that is a number": edited("/layer0", sentence=0),
    "an array less": lambda file: file["/layer0"].__delitem__("gate_mean"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A run, as a file."""
    path = tmp_path_factory.mktemp("run") / "ok.nc"
    torch.manual_seed(0)
    gradflow.diagnose(torch.nn.LSTM(3, 4), torch.randn(12, 3, 3)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_run_that_somebody_wrote_into_is_no_run(
    edit: Callable[[h5py.File], None], saved: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "e.nc"
    path.write_bytes(saved)
    assert len(gradflow.load(path)) == 1
    with h5py.File(path, "r+") as file:
        edit(file)
    assert "is damaged, or is not a run saved by gradflow" in refused(lambda: gradflow.load(path))
