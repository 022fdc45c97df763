"""What `open_model` refuses: a sentence with what the file holds and the next command, no traceback.

Hostile files must not run anything: each of them tries to create a file, which must not exist after.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradflow.errors import FileError, GradflowError, UserCodeError
from gradflow.loading import describe, open_model


def saved(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


WEIGHTS = torch_bytes(nn.LSTM(3, 5).state_dict())
FILES = {
    "empty": ("a.pt", b"", r"is empty \(0 bytes\).*torch.save\(model.state_dict"),
    "text": ("a.pt", b"epoch 1 loss 0.3\n", "is a text file.*epoch 1"),
    "text in another script": ("a.pt", ("é" * 400).encode(), "text file"),
    "python": ("net.py", b"class Net: pass\n", r"Python source.*--model .*net.py:Net"),
    "json": ("config.json", b'{"hidden": 5}', "text file"),
    "lfs": ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
    "web page": ("a.pt", b"<!DOCTYPE html><html>", "web page.*download it again"),
    "numpy": ("a.npy", npy(), "numpy arrays, not a model.*gradflow analyze MODEL --input"),
    "npz": ("a.npz", npz(), "numpy arrays, not a model.*gradflow analyze MODEL --input"),
    "zip": ("a.zip", zipped("readme.txt", "b/c.txt"), "zip archive with readme.txt, b/c.txt"),
    "empty zip": ("a.zip", zipped(), "zip archive with nothing in it"),
    "torchscript": ("a.pt", zipped("a/data.pkl", "a/constants.pkl", "a/code/x.py"), "TorchScript"),
    "pt2": ("a.pt2", zipped("a/archive_format", "a/models/model.json"), "torch.export"),
    "keras": ("a.keras", zipped("config.json", "model.weights.h5"), "Keras model"),
    "hdf5": ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5 file, as Keras"),
    "run": ("run.nc", b"\x89HDF\r\n\x1a\n" + bytes(50), "gradflow report .*run.nc"),
    "onnx": ("a.onnx", b"\x08\x08\x12\x07pytorch\x1a\x031.0", "ONNX graph"),
    "onnx renamed": ("a.pt", b"\x08\x08\x12\x07pytorch\x1a\x031.0", "ONNX graph"),
    "gguf": ("a.gguf", b"GGUF\x03\x00", "GGUF"),
    "tflite": ("a.tflite", b"\x1c\x00\x00\x00TFL3", "TensorFlow Lite"),
    "gzip": ("a.pt.gz", b"\x1f\x8b\x08\x00", "gzip archive; unpack it first"),
    "picture": ("a.png", b"\x89PNG\r\n\x1a\n\x00", "PNG picture"),
    "noise": ("a.bin", bytes(range(255, 0, -1)), "no format gradflow knows"),
    "short": ("a.pt", WEIGHTS[: len(WEIGHTS) // 2], "cut short.*copy or download it again"),
    "only a head": ("a.pt", b"PK\x03\x04", "cut short"),
    "plain pickle": ("a.pkl", pickle.dumps({"a": 1}, 4), "Python pickle that torch.save did not"),
    "cut pickle": ("a.pkl", pickle.dumps(list(range(99)), 2)[:20], "Python pickle"),
    "legacy cut": (
        "a.pt",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "damaged file of torch.save",
    ),
    "safetensors cut": ("a.safetensors", safetensors(b'{"a": '), "damaged safetensors"),
    "safetensors claims": (
        "a.safetensors",
        safetensors(
            b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
        ),
        "damaged safetensors",
    ),
    "one byte": ("a.pt", b"\x80", "no format gradflow knows"),
    "tensor": ("a.pt", torch_bytes(torch.ones(3, 2)), r"single tensor of shape \(3, 2\).*--input"),
    "pair": ("a.pt", torch_bytes((torch.ones(3), torch.ones(3))), "tuple of 2 items.*--input"),
    "number": ("a.pt", torch_bytes(5), "type int, no weights"),
    "none": ("a.pt", torch_bytes(None), "no weights"),
    "no tensors": ("a.pt", torch_bytes({"epoch": 3}), "mapping without tensors .keys: epoch"),
    "empty dict": ("a.pt", torch_bytes({}), "an empty mapping"),
    "no recurrence": (
        "a.pt",
        torch_bytes(nn.Linear(3, 2).state_dict()),
        r"state_dict without recurrent weights: 2 tensors, .*weight \(2, 3\).*--model 'pkg.mod:Net",
    ),
    "pickled linear": ("a.pt", torch_bytes(nn.Linear(3, 2)), "without recurrent weights"),
    "transformer": (
        "a.pt",
        torch_bytes(nn.TransformerEncoderLayer(4, 2, 8)),
        "TransformerEncoderLayer.*--trust",
    ),
    "optimizer": ("a.pt", torch_bytes({"state": {}, "param_groups": [{"lr": 1}]}), "no weights"),
}


@pytest.mark.parametrize(("name", "data", "match"), FILES.values(), ids=FILES.keys())
def test_other_files_are_named_and_refused(tmp_path: Path, name: str, data: bytes, match) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FileError, match=match) as caught:
        open_model(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_real_torchscript_archive_and_the_command_that_helps(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still about
        torch.jit.script(nn.LSTM(3, 5)).save("script.pt")
    with pytest.raises(FileError, match="TorchScript") as caught:
        open_model("script.pt")
    code = str(caught.value).split('python -c "')[1].split('"')[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code)  # noqa: S102 - the very line that the sentence tells people to type
    assert str(open_model("weights.pt").recurrent[0]) == "LSTM(3 → 5)"


def test_missing_files_and_folders(tmp_path: Path) -> None:
    saved(tmp_path / "weights.pt", {})
    with pytest.raises(FileError, match=r"no file .*did you mean .*weights.pt$"):
        open_model(tmp_path / "weight.pt")
    (tmp_path / "notes.py").touch()
    for name in ("zzzzzzz", "notes.pt"):  # what is no model is no suggestion
        with pytest.raises(FileError, match="list what is there with: ls"):
            open_model(tmp_path / name)
    with pytest.raises(FileError, match=r"a folder; give the file in it: .*weights.pt"):
        open_model(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(FileError, match="folder without a file of weights"):
        open_model(tmp_path / "run")
    (tmp_path / "run" / "run.nc").touch()
    with pytest.raises(FileError, match="gradflow report"):
        open_model(tmp_path / "run")
    with pytest.raises(FileError, match="not a regular file"):
        open_model("/dev/null")
    with pytest.raises(FileError, match="cannot read"):
        open_model("a\0b.pt")


def test_a_link_whose_target_is_gone_is_not_suggested(tmp_path: Path) -> None:
    link = tmp_path / "dangling.pt"
    link.symlink_to("target.pt")
    with pytest.raises(FileError, match=r"a link whose target is gone: target.pt is not") as caught:
        open_model(link)
    assert "did you mean" not in str(caught.value)
    with pytest.raises(FileError, match="list what is there with: ls"):
        open_model(tmp_path / "dangling.p")
    saved(tmp_path / "target.pt", nn.LSTM(3, 5).state_dict())
    assert open_model(link).recurrent[0].kind == "LSTM"


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "w.pt", {})

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FileError, match="Permission denied; check its permissions"):
        open_model(path)


# --- weights that contradict themselves -----------------------------------------------------------


def changed(**changes: object) -> dict[str, object]:
    state: dict[str, object] = dict(nn.LSTM(3, 5, num_layers=2).state_dict())
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(20, 5), 0.1, 0, torch.qint8)


def sparse() -> torch.Tensor:
    return torch.ones(20, 5).to_sparse()


CONTRADICTIONS = {
    "rows": (lambda: changed(weight_hh_l0=torch.ones(13, 5)), "4, 3 or 1 times as many rows"),
    "two": (lambda: changed(weight_hh_l0=torch.ones(10, 5)), "4, 3 or 1 times as many rows"),
    "zero": (lambda: changed(weight_hh_l0=torch.ones(0, 0)), "4, 3 or 1 times"),
    "no inputs": (lambda: changed(weight_ih_l0=torch.ones(20, 0)), "at least one input feature"),
    "scalar": (lambda: changed(weight_hh_l0=torch.tensor(1.0)), "must be matrices"),
    "cube": (lambda: changed(weight_ih_l0=torch.ones(2, 2, 2)), "must be matrices"),
    "no ih": (lambda: changed(weight_ih_l0=None), "but no weight_ih_l0"),
    "no bias": (lambda: changed(bias_hh_l1=None), "lacks bias_hh_l1"),
    "no first layer": (lambda: changed(weight_hh_l0=None), "but no weight_hh_l0"),
    "far layer": (lambda: changed(weight_hh_l999999999999=torch.ones(20, 5)), "lacks"),
    "half reverse": (
        lambda: changed(weight_hh_l0_reverse=torch.ones(20, 5)),
        "looks like an LSTM .*lacks",
    ),
    "upper inputs": (lambda: changed(weight_ih_l1=torch.ones(20, 4)), r"must have shape \(20, 5\)"),
    "whole numbers": (lambda: changed(weight_hh_l0=torch.ones(20, 5).int()), "of type int32"),
    "complex": (lambda: changed(weight_hh_l0=torch.ones(20, 5) * 1j), "of type complex64"),
    "sparse": (lambda: changed(weight_hh_l0=sparse()), "sparse"),
    "quantised": (lambda: changed(weight_hh_l0=quantized()), "a quantized one"),
    "meta": (lambda: changed(weight_hh_l0=torch.ones(20, 5, device="meta")), "without numbers"),
    "huge": (
        lambda: changed(weight_hh_l0=torch.ones(1).expand(4 * 10**6, 10**6)),
        "more entries than the file holds",
    ),
    "split in a strange way": (
        lambda: {"weight_hh_l0_g": torch.ones(7), "weight_hh_l0_v": torch.ones(20, 5)},
        "not weight-norm",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "match"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradicting_weights_get_a_sentence(tmp_path: Path, make, match: str) -> None:
    path = saved(tmp_path / "w.pt", make())
    with pytest.raises(FileError, match=match):
        open_model(path)


def test_values_that_are_no_tensors_are_left_out_and_said(tmp_path: Path) -> None:
    state = changed(extra="text", number=3, step=torch.tensor(5))
    opened = open_model(saved(tmp_path / "w.pt", state))
    assert opened.notes == ("entries that are no tensors were left out: extra, number",)


# --- hostile pickles ------------------------------------------------------------------------------


class Call:
    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def evil_state(marker: str) -> object:
    state = dict(nn.LSTM(3, 5).state_dict())
    state["x"] = Call(os.system, f"touch {marker}")
    return state


def evil_module(function, *args) -> nn.Module:
    module = nn.LSTM(3, 5)
    module.__dict__["forward"] = Call(function, *args)
    return module


def evil_open(marker: str) -> object:
    return {"state_dict": nn.LSTM(3, 5).state_dict(), "hyper_parameters": Call(open, marker, "w")}


HOSTILE = {
    "system": evil_state,
    "only system": lambda m: Call(os.system, f"touch {m}"),
    "eval": lambda m: {"a": Call(eval, f"open({m!r}, 'w')")},
    "exec in a module": lambda m: evil_module(exec, f"open({m!r}, 'w')"),
    "open": evil_open,
    "getattr": lambda m: {"a": Call(getattr, "text", "upper")},
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_does_not_run(tmp_path: Path, make, legacy: bool, monkeypatch) -> None:
    marker = tmp_path / "ran"
    options = {"_use_new_zipfile_serialization": not legacy}
    path = saved(tmp_path / "evil.pt", make(str(marker)), **options)
    with pytest.raises(
        FileError, match=r"was not opened.*only if you trust the file's author: .*--trust"
    ):
        open_model(path)
    with pytest.raises(FileError, match="--trust"):
        describe(path)
    assert not marker.exists()


def third_party(marker: str) -> None:
    Path(marker).touch()


def test_a_function_of_another_package_is_not_called(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    state = dict(nn.LSTM(3, 5).state_dict()) | {"x": Call(third_party, str(marker))}
    opened = open_model(saved(tmp_path / "w.pt", state))  # the weights are there, the call is not
    assert opened.recurrent[0].kind == "LSTM"
    assert not marker.exists()


def shout(*_: object) -> None:
    raise RuntimeError("code from the file ran")


def test_what_the_file_put_into_a_module_does_not_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LSTM(3, 5))
    model[0].forward = shout
    model.register_forward_hook(shout)
    model[0].register_forward_pre_hook(shout)
    model[0].weight_hh_l0.requires_grad_(False)
    opened = open_model(saved(tmp_path / "m.pt", model))
    opened.model(torch.ones(4, 2, 3))[0].sum().backward()
    assert "forward" not in vars(opened.model[0])
    assert "dropped" in " ".join(opened.notes)
    expected = set(vars(nn.LSTM(3, 5)))
    assert set(vars(opened.model[0])) == expected


def shell_state(module: nn.Module, **changes: object) -> nn.Module:
    module.__dict__.update(changes)
    return module


LIARS = {
    "hidden": lambda: shell_state(nn.LSTM(3, 5), hidden_size=10**9),
    "overflow": lambda: shell_state(nn.LSTM(3, 5), hidden_size=2**62),
    "layers": lambda: shell_state(nn.LSTM(3, 5), num_layers=10**12),
    "layers text": lambda: shell_state(nn.LSTM(3, 5), num_layers="many"),
    "size text": lambda: shell_state(nn.LSTM(3, 5), hidden_size="x"),
    "size list": lambda: shell_state(nn.LSTM(3, 5), hidden_size=[5]),
    "padding": lambda: nn.Sequential(shell_state(nn.Embedding(4, 3), padding_idx=10**9)),
    "rows": lambda: nn.Sequential(shell_state(nn.Embedding(4, 3), num_embeddings=10**15)),
    "modules": lambda: shell_state(nn.Sequential(nn.LSTM(3, 5)), _modules={"0": 5}),
    "key": lambda: shell_state(nn.Sequential(), _modules={"a.b": nn.LSTM(3, 5)}),
    "flag": lambda: shell_state(nn.LSTM(3, 5), bidirectional="yes"),
    "projection": lambda: shell_state(nn.LSTM(3, 5), proj_size=99),
}


@pytest.mark.parametrize("make", LIARS.values(), ids=LIARS.keys())
def test_a_module_that_lies_about_itself_is_refused(tmp_path: Path, make) -> None:
    with pytest.raises(FileError, match=r"\w+ \w+"):
        open_model(saved(tmp_path / "m.pt", make()))


def test_a_module_inside_itself_and_a_tower_of_shared_modules(tmp_path: Path) -> None:
    loop = nn.Sequential(nn.LSTM(3, 5))
    loop._modules["self"] = loop
    with pytest.raises(FileError, match="nests more than"):
        open_model(saved(tmp_path / "loop.pt", loop))
    tower: nn.Module = nn.LSTM(3, 5)
    for _ in range(40):  # two doors to the next floor: 2^40 paths
        tower = nn.Sequential(tower, tower)
    with pytest.raises(FileError, match="nests more than"):
        open_model(saved(tmp_path / "tower.pt", tower))


def test_trust_runs_and_quotes(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path / "w.pt", evil_state(str(marker)))
    assert open_model(path, trust=True).recurrent[0].kind == "LSTM"
    assert marker.exists()
    with pytest.raises(UserCodeError, match="raised RuntimeError: code from the file ran"):
        open_model(saved(tmp_path / "x.pt", Call(shout)), trust=True)
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({"model": nn.GRU(3, 5)}))
    assert open_model(plain, trust=True).recurrent[0].kind == "GRU"


def test_a_class_that_cannot_be_found_is_said(tmp_path: Path) -> None:
    data = torch_bytes(nn.LSTM(3, 5)).replace(
        b"torch.nn.modules.rnn\nLSTM", b"torch.nn.modules.rnm\nLSTX"
    )
    path = tmp_path / "m.pt"
    path.write_bytes(_with_valid_checksums(data))
    with pytest.raises(FileError, match=r"torch.nn.modules.rnm.LSTX"):
        open_model(path)
    with pytest.raises(UserCodeError, match="ModuleNotFoundError"):
        open_model(path, trust=True)


def _with_valid_checksums(data: bytes) -> bytes:
    """Write a zip anew from its raw parts, since its entries were changed in place."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            with io.BytesIO(data) as raw:
                raw.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", raw.read(4))
                raw.seek(info.header_offset + 30 + name + extra)
                new.writestr(info.filename, raw.read(info.file_size))
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_never_end_in_a_traceback(tmp_path: Path, legacy: bool) -> None:
    """Flip bytes anywhere in a pickle: it opens, or a GradflowError says why not."""
    buffer = io.BytesIO()
    model = nn.Sequential(nn.Embedding(4, 3), nn.LSTM(3, 2))
    torch.save(model, buffer, _use_new_zipfile_serialization=not legacy)
    original = buffer.getvalue()
    choose = random.Random(0)
    path = tmp_path / "m.pt"
    for _ in range(150):
        data = bytearray(original)
        for _ in range(choose.choice((1, 1, 3))):
            data[choose.randrange(len(data))] = choose.randrange(256)
        rest = bytes(data)
        if not legacy:
            # what cannot be read as a zip any more is written as it is
            with contextlib.suppress(
                zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError
            ):
                rest = _with_valid_checksums(rest)
        path.write_bytes(rest)
        with contextlib.suppress(GradflowError):
            open_model(path)
