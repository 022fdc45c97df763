"""Files that were made to do harm end in one printable sentence, and cost nothing before it."""

from __future__ import annotations

import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hostile_files
import numpy as np
import pytest
import torch

import gradflow
from gradflow import workflow
from gradflow.errors import GradflowError
from gradflow.history import History
from gradflow.loading import (
    Batch,
    describe,
    fit_batch,
    open_model,
    open_pretrained,
    read_batch,
    read_labels,
)


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
    assert refused(lambda: read(tmp_path / "x.pt"))


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


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
ROWS = b"J\0\xca\x9a\x3b"  # 10**9
EXPANDED = (  # a tensor of 10**9 rows, of one number
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + ROWS + b"\x85K\x00\x85\x89"
    b"ccollections\nOrderedDict\n)RtR"
)  # fmt: skip
DOUBLED = b"K\x01q\x01" + b"h\x01h\x01\x86q\x01" * 60  # a tuple of 2**60 entries, in 400 bytes
HEX = b"c_codecs\nencode\nq\x02X\x01\0\0\0aq\x01" + b"h\x02h\x01X\x03\0\0\0hex\x86Rq\x01" * 40
PICKLES = {
    "a set of the rows of an expanded tensor": b"c__builtin__\nset\n" + EXPANDED + b"\x85R",
    "the rows of one as arguments": b"cmy.pkg\nNet\n" + EXPANDED + b"R",
    "the numbers of one in another type": b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
    + EXPANDED + b"ctorch\nfloat64\nX\x03\0\0\0cpu\x89tR",
    "a key that is hashed 2**60 times": b"}" + DOUBLED + b"K\x02s",
    "a set of such keys": b"c__builtin__\nset\n]" + DOUBLED + b"a\x85R",
    "text that is doubled 40 times": HEX,
    "2,000 names": b"".join(b"cpkg\nC%d\n0" % n for n in range(2000)).replace(b"0c", b"c")[:-1],
    "a tensor without numbers behind it": b"ctorch._utils\n_rebuild_wrapper_subclass\n(ctorch\nTensor\ntR",
}  # fmt: skip


@pytest.mark.parametrize("read", [open_model, read_batch], ids=["model", "batch"])
@pytest.mark.parametrize("program", PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_would_take_for_ever_is_not_opened(
    read: Callable[[Path], object], program: bytes, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(4))
    assert refused(lambda: read(tmp_path / "x.pt"))


def test_the_pickle_that_is_judged_is_the_one_that_is_opened(tmp_path: Path) -> None:
    """Of two of one name, readers of zip archives take the first, or the last."""
    asked = b"\x80\x02cos\nsystem\n."
    said = []
    for first, second in ((asked, b"\x80\x02}."), (b"\x80\x02}.", asked)):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the name is there twice
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/data.pkl", first)
            archive.writestr("archive/data.pkl", second)
        said.append("asks to call os.system" in refused(lambda: open_model(tmp_path / "x.pt")))
    assert sorted(said) == [False, True]  # the other one is an empty mapping


def test_the_steps_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradflow.loading.pickled.PICKLE_STEPS", 900)
    for count, words in ((400, "no weights"), (1000, "takes more than 900 steps")):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # lists in lists
            archive.writestr("a/data.pkl", b"\x80\x02" + b"]" * count + b"a" * (count - 1) + b".")
            archive.writestr("a/version", "3\n")
        assert words in refused(lambda: open_model(tmp_path / "x.pt"))


LSTM = torch.nn.LSTM(3, 5, 2).state_dict()
SAVED: dict[str, object] = {
    "weights": LSTM,
    "a checkpoint": {"state_dict": LSTM, "epoch": 3, "lr": 1e-3, "more": [1, "ä\n", None, True, -(2**40)]},
    "views": {"a": LSTM["weight_ih_l0"].T, "b": LSTM["weight_ih_l0"][3:, ::2], "c": torch.tensor(2.5)},
    "types": {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in (
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.complex64,
        torch.float8_e4m3fn, torch.uint16)},
    "an optimizer": torch.optim.Adam(torch.nn.LSTM(2, 2).parameters()).state_dict(),
    "a parameter": {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.ones(2, requires_grad=True)},
    "settings": {"size": torch.Size((2, 3)), "type": torch.float16, "device": torch.device("cpu"), 7: ()},
}  # fmt: skip


def alike(one: Any, other: Any) -> bool:
    """Whether two values are of the same types, and the same bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.stride() == other.stride()
        same = same and one.requires_grad == other.requires_grad and one.shape == other.shape
        small = one.dtype.itemsize == 1 or one.dtype == torch.uint16
        return same and torch.equal(*(t.detach().float() if small else t for t in (one, other)))
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


@pytest.mark.parametrize("value", SAVED.values(), ids=SAVED)
def test_what_is_read_is_what_torch_reads(value: object, tmp_path: Path) -> None:
    for old in (False, True):
        kind = {"_use_new_zipfile_serialization": not old}
        torch.save({"input": torch.ones(6, 2, 3), "value": value}, tmp_path / "x.pt", **kind)
        try:
            expected = torch.load(tmp_path / "x.pt")["value"]
        except (
            AttributeError
        ):  # newer types in the older format, which torch writes and does not read
            continue
        read = read_batch(tmp_path / "x.pt").kwargs["value"]
        assert alike(read, expected)
        assert not alike(read, {})


def test_views_of_one_number_are_no_gigabytes(tmp_path: Path) -> None:
    for value in (torch.ones(1).expand(10**9), torch.ones(3, 1).expand(3, 10**8)):
        torch.save({"emb.weight": value, **torch.nn.LSTM(3, 5).state_dict()}, tmp_path / "x.pt")
        assert "more entries than the file holds" in refused(lambda: open_model(tmp_path / "x.pt"))
        torch.save({"input": torch.ones(6, 2, 3), "mask": [value]}, tmp_path / "b.pt")
        assert "more entries than the file holds" in refused(lambda: read_batch(tmp_path / "b.pt"))


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_that_announce_gigabytes_are_not_read(packed: bool, tmp_path: Path) -> None:
    header = (
        repr({"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}).encode() + b"\n"
    )
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (tmp_path / "x.npy").write_bytes(array)
    assert "announces 4,000,000,000,000 bytes" in refused(lambda: read_batch(tmp_path / "x.npy"))
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("input.npy", array if not packed else bytes(3 * 10**8))
    assert "it announces" in refused(lambda: read_batch(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (torch.nn.AdaptiveAvgPool1d(3), {"output_size": 10**9}),
        (torch.nn.ZeroPad1d(1), {"padding": (0, 10**9)}),
        (torch.nn.Embedding(5, 3), {"padding_idx": 10**9}),
        (torch.nn.GroupNorm(1, 3), {"num_groups": 0}),
        (torch.nn.Conv1d(3, 3, 1), {"stride": (10**30,)}),
    ],
    ids=lambda value: str(value)[:24],
)
def test_attributes_of_pickled_layers_are_in_their_range(
    module: torch.nn.Module, changes: dict[str, object], tmp_path: Path
) -> None:
    vars(module).update(changes)
    torch.save(torch.nn.Sequential(module, torch.nn.LSTM(3, 5)), tmp_path / "x.pt")
    assert "does not fit its own weights" in refused(lambda: open_model(tmp_path / "x.pt"))


def test_a_name_of_a_megabyte_loses_its_middle_everywhere(tmp_path: Path) -> None:
    key = "\x1b[31m" + "k" * 10**6
    state = {f"{key}.{name}": value for name, value in torch.nn.GRU(3, 5).state_dict().items()}
    torch.save(state | {7: torch.ones(3), (1, 2): torch.ones(3)}, tmp_path / "x.pt")
    (found,) = open_model(tmp_path / "x.pt").recurrent
    assert found.name.isprintable() and len(found.name) <= 200
    assert all(
        line.isprintable() and len(line) < 500 for line in describe(tmp_path / "x.pt").lines()
    )


SETTINGS = {
    "a width of 10**12": ({"hidden_size": 10**12}, "must be at most 2,147,483,648, got more"),
    "a chunk of a million": ({"chunk_size": 10**6}, "must be at most 1,024, got more"),
    "a number of 4,000 digits": ({"x": [[10**4000]]}, "must be at most 2,147,483,648, got more"),
    "code, somewhere inside": ({"text_config": [{"auto_map": {}}]}, "brings code of its own"),
    "code from the network": ({"attn_implementation": "kernels/x"}, "brings code of its own"),
    "no kind of model": ({"model_type": 3}, "does not say its model_type"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), SETTINGS.values(), ids=SETTINGS)
def test_settings_of_a_folder_are_read_before_anything_is_made(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    place = folder_of_transformers(tmp_path, changes)
    assert words in refused(lambda: open_pretrained(place))


def folder_of_transformers(place: Path, changes: dict[str, object] | None = None) -> Path:
    """As transformers writes it, but for its name no model that it knows."""
    for name, data in hostile_files.sound_folder().items():
        (place / name).write_bytes(data)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | (changes or {})))
    return place


def test_weights_of_a_folder_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    place = folder_of_transformers(tmp_path, {"num_hidden_layers": 10**6})
    assert "num_hidden_layers" in refused(lambda: open_pretrained(place))
    folder_of_transformers(place, {"num_hidden_layers": 2})
    (place / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in refused(lambda: open_pretrained(place))
    index = place / "model.safetensors.index.json"
    for names, words in (
        ({"a": "../other.safetensors"}, "no file of weights beside it"),
        ({"a": "weights.bin"}, "no file of weights beside it"),
        ({"a": "pipe.safetensors"}, "it is not a file"),
        ({}, "does not say where its weights are"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        if "pipe.safetensors" in names.values():
            os.mkfifo(place / "pipe.safetensors")
        assert words in refused(lambda: open_pretrained(place))


@pytest.mark.parametrize(
    ("text", "words"), [("[" * 10**5, "nested without end"), ("[]", "does not say its model_type")]
)
def test_settings_that_are_none_are_refused(text: str, words: str, tmp_path: Path) -> None:
    place = folder_of_transformers(tmp_path)
    (place / "config.json").write_text(text)
    assert words in refused(lambda: open_pretrained(place))


def test_a_text_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    place = folder_of_transformers(tmp_path)
    with (place / "config.json").open("r+b") as file:
        file.truncate(2**40)
    assert "1,099,511,627,776 bytes, more than any such" in refused(lambda: open_pretrained(place))
    assert "more than any such file" in refused(lambda: read_labels(place / "config.json"))


@pytest.mark.parametrize("read", [read_labels, gradflow.load, History.read, describe, read_batch])
@pytest.mark.parametrize("name", ["run.nc", "history.jsonl", "x.npy"])
def test_a_pipe_is_not_waited_for(
    read: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)
    assert refused(lambda: read(tmp_path / name))


RUN = gradflow.Analysis("x", {}, (), {})
PATHS: dict[str, Callable[[str], object]] = {
    "load": gradflow.load,
    "history": History.read,
    "save": RUN.save,
    "sweep": lambda path: gradflow.sweep([torch.nn.GRU(1, 1)], folder=path),
}


@pytest.mark.parametrize("use", PATHS.values(), ids=PATHS)
def test_a_nul_in_a_path_is_told_in_one_sentence(use: Callable[[str], object]) -> None:
    said = refused(lambda: use("a\0b"))
    assert said == "a\\x00b holds a NUL, which no path may; check where it is from"
    with pytest.warns(gradflow.GradflowWarning, match="holds a NUL"):
        gradflow.watch(torch.nn.GRU(1, 1), "a\0b")


def calls_of_inspection(file: Path) -> int:
    """Calls, and steps of generators, while a file is described."""
    count = 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(one_more)
    try:
        describe(file)
    finally:
        sys.setprofile(None)
    return count


def test_the_work_of_an_inspection_grows_with_the_layers_and_no_faster(tmp_path: Path) -> None:
    layer, calls = torch.nn.LSTM(1, 1).state_dict(), []
    for count in (100, 400):
        state = {f"l.{n}.{key}": value for n in range(count) for key, value in layer.items()}
        torch.save(state, tmp_path / "x.pt")
        assert len(describe(tmp_path / "x.pt").recurrent) == count
        calls.append(calls_of_inspection(tmp_path / "x.pt"))
    assert calls[1] < 5 * calls[0]  # four times as many; where every layer looks at all others, 16


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
    "one layer under two names": lambda file: twice(file, ["l0", "l1"]),
    "a layer twice": lambda file: twice(file, ["l0", "l0"]),
    "numbers of another file": lambda file: elsewhere(file["/layer0"]),
    "warnings without end": edited("/", warnings=["x"] * 10_001),
}


def twice(file: h5py.File, names: list[str]) -> None:
    """A second link to the only layer there is."""
    file["/layer1"] = file["/layer0"]
    edited("/", layers=names)(file)


def elsewhere(layer: h5py.Group) -> None:
    """An array whose numbers are the bytes of a file of the user's."""
    shape = layer["step_growth"].shape
    del layer["step_growth"]
    layer.create_dataset("step_growth", shape, "f8", external=[(__file__, 0, h5py.h5f.UNLIMITED)])


def test_of_a_run_no_name_is_looked_for(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the name of an array h5py searches all of the file, so that every layer reads all others."""
    (tmp_path / "r.nc").write_bytes(saved)
    monkeypatch.setattr(h5py.Dataset, "name", property(lambda _: pytest.fail("searched")))
    assert len(gradflow.load(tmp_path / "r.nc")) == 1


def test_a_run_of_more_layers_than_are_read_says_so(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.nc").write_bytes(saved)
    with h5py.File(tmp_path / "r.nc", "r+") as file:
        edited("/", layers=[f"l{n}" for n in range(513)])(file)
    assert "holds 513 layers, more than the 512" in refused(
        lambda: gradflow.load(tmp_path / "r.nc")
    )


def test_more_layers_or_steps_than_are_analyzed_are_refused_before_any_runs(tmp_path: Path) -> None:
    torch.save(torch.nn.GRU(1, 1, 65, bidirectional=True), tmp_path / "deep.pt")
    torch.save(torch.nn.ModuleList(torch.nn.RNN(1, 1) for _ in range(129)), tmp_path / "wide.pt")
    for name, count in (("deep.pt", 130), ("wide.pt", 129)):
        request = workflow.FileRequest(tmp_path / name)
        assert f"has {count} recurrent layers, more than the 128" in refused(
            lambda request=request: workflow.analyze_file(request)
        )
    torch.save(torch.nn.RNN(1, 1), tmp_path / "x.pt")
    np.savez_compressed(tmp_path / "b.npz", input=np.zeros((3 * 10**6, 1, 1), np.float32))
    request = workflow.FileRequest(tmp_path / "x.pt", input=tmp_path / "b.npz")
    assert "of at most 10,000 steps" in refused(lambda: workflow.analyze_file(request))
    many = Batch(inputs=(torch.zeros(2, 20_000, 1),))  # sequences, which may be as many
    assert fit_batch(many, torch.nn.RNN(1, 1)).inputs[0].shape == (2, 20_000, 1)


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
