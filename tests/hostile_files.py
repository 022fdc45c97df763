"""Strategies for files that were made, or have come, to do harm: a role, a name, and bytes of each kind."""

from __future__ import annotations

import base64
import copy
import functools
import importlib.util
import io
import json
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import gradflow
from gradflow.history import History, LayerProbe, Note, Probe, Writer

Case = tuple[str, str, bytes]  # role, name, bytes
MODEL_ROLES = ("inspect", "inspect", "inspect", "model", "model with a batch")
BATCH_ROLES = ("batch", "batch", "target", "tokens")
NAMES = (
    *("w", "weight_hh_l0", "rnn.weight_hh_l0", "weight_ih_l0", "emb.weight", "fc.bias", "input"),
    *(
        "target",
        "lengths",
        "state_dict",
        "model",
        "a\nb",
        "\x1b[31mred",
        "k" * 10**6,
        "",
        ".",
        "a..b",
    ),
    *("weight_hh_l999999999", "..weight_hh_l0", "\u202e", "\ud800x", "é" * 300, "weight_hh_l0_g"),
)
NUMBERS = (0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31), 2**40, 10**9, 5 * 10**9, 10**18)
ODD_JSON = (
    *(None, True, 0, -1, 3, 10**30, 1e308, "x", "", "\x1b[2J\n", "k" * 10**6, [], {}, [[]], ["x"]),
    *({"a": 1}, [1, "x", None], float("nan"), float("inf")),
)


def torch_bytes(value: object, **options: object) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, buffer, **options)
    return buffer.getvalue()


@functools.cache
def odd_tensors() -> tuple[torch.Tensor, ...]:
    """One of each kind that is not a plain matrix of floats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = torch.ones(20, 5, requires_grad=True)
        attributed = torch.ones(20, 5)
        attributed.note = "x" * 99  # type: ignore[attr-defined]
        return (
            torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)]),
            torch.ones(20, 5).to_sparse(), torch.eye(5).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(20, 5), 0.1, 0, torch.qint8),
            torch.quantize_per_channel(torch.ones(20, 5), torch.ones(20), torch.zeros(20), 0, torch.qint8),
            torch.ones(1).expand(10**6, 10**6), torch.ones(1, 5).expand(20, 5),
            torch.ones(1).expand(10**9), torch.ones(3, 1).expand(3, 10**7), torch.ones(20, 5).int(),
            torch.ones(20, 5, device="meta"), torch.ones(10**7, 10**7, device="meta"),
            torch.ones(20, 5) * 1j, torch.ones(0, 5), torch.ones(0), torch.ones(()),
            torch.ones(20, 5).bool(), torch.ones(20, 5, dtype=torch.float8_e4m3fn),
            torch.full((20, 5), torch.nan), torch.full((20, 5), torch.inf), torch.ones(20, 5).half(),
            torch.ones(5, 20).T, hooked, attributed, torch.ones([1] * 20), torch.ones(20, 5) * 1e38,
            torch.tensor([5, -1]), torch.tensor(7), torch.ones(20, 5).to(torch.uint8),
        )  # fmt: skip


def plain_tensors() -> st.SearchStrategy[torch.Tensor]:
    """Small ones of floats."""
    sizes = st.lists(st.sampled_from((1, 2, 3, 5, 15, 20)), min_size=0, max_size=3)
    return sizes.map(lambda size: torch.linspace(-1, 1, int(np.prod(size))).reshape(size))


LEAVES = st.one_of(
    plain_tensors(), st.sampled_from(range(29)).map(lambda n: odd_tensors()[n]),
    st.sampled_from(NUMBERS), st.sampled_from(NAMES), st.none(), st.booleans(), st.floats(),
    st.sampled_from((b"x", b"\x00" * 9, torch.float16, torch.device("cpu"), torch.Size((3, 2)))),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(NAMES), st.sampled_from(NUMBERS), st.none(), st.text(max_size=5), st.floats(),
    st.tuples(st.sampled_from(NAMES), st.integers(0, 3)), st.booleans(),
)  # fmt: skip


@st.composite
def values(draw: st.DrawFn, depth: int = 3) -> object:
    """Containers of anything that torch.save writes."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(LEAVES)
    kind = draw(st.sampled_from(("dict", "weights", "list", "tuple", "set", "shared", "module")))
    if kind in ("dict", "weights"):
        found = {draw(KEYS): draw(values(depth - 1)) for _ in range(draw(st.integers(0, 4)))}
        weights: dict[Any, Any] = dict(nn.LSTM(3, 5).state_dict()) if kind == "weights" else {}
        return OrderedDict(weights | found) if draw(st.booleans()) else weights | found
    if kind == "shared":
        held = draw(values(depth - 1))
        for number in range(draw(st.integers(1, 25))):
            held = {f"a{i}": held for i in range(9)} if number % 2 else [held, held]
        return held
    if kind == "module":
        return draw(modules())
    if kind == "set":
        return set(draw(st.lists(st.sampled_from((*NUMBERS, *NAMES)), max_size=3)))
    items = [draw(values(depth - 1)) for _ in range(draw(st.integers(0, 4)))]
    return tuple(items) if kind == "tuple" else items


@functools.cache
def stock() -> tuple[nn.Module, ...]:
    """Modules that gradflow builds anew."""
    return (
        nn.LSTM(3, 5), nn.GRU(3, 5, 2, bidirectional=True), nn.RNN(3, 5), nn.LSTMCell(3, 5),
        nn.Sequential(nn.Embedding(5, 3), nn.LSTM(3, 5)), nn.LSTM(3, 5, proj_size=2),
        nn.Sequential(nn.Linear(3, 3), nn.ZeroPad2d(1), nn.GRU(3, 5)),
        nn.ModuleDict({"conv": nn.Conv1d(3, 3, 2), "rnn": nn.GRU(3, 5)}),
        nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(3, 3), nn.RNN(3, 5)),
        nn.Sequential(nn.AdaptiveAvgPool1d(3), nn.LSTM(3, 5)),
        nn.Sequential(nn.Unflatten(2, (3, 1)), nn.GRU(3, 5)),
        nn.Sequential(nn.ConstantPad1d(1, 0.0), nn.LSTM(5, 5)), nn.Sequential(nn.Dropout(0.1), nn.GRU(3, 5)),
        nn.Sequential(nn.LocalResponseNorm(2), nn.LSTM(3, 5)),
        nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.LSTM(4, 5)),
    )  # fmt: skip


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """Stock modules with attributes that they cannot have."""
    model = copy.deepcopy(draw(st.sampled_from(range(len(stock()))).map(lambda n: stock()[n])))
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from(list(model.modules())))
        name = draw(st.sampled_from(sorted(vars(part))))
        new = draw(
            st.one_of(st.sampled_from(NUMBERS), LEAVES, st.tuples(st.sampled_from(NUMBERS), st.just(1)),
                      st.just({}), st.just([]), st.just(OrderedDict({"x": None})), st.just(part))
        )  # fmt: skip
        vars(part)[name] = new
    if draw(st.integers(0, 5)) == 0 and "_modules" in vars(model):
        held = vars(model)["_modules"]
        if isinstance(held, dict):
            held[draw(st.sampled_from(NAMES))] = draw(st.sampled_from((nn.GRU(3, 5), None, 3)))
    return model


@st.composite
def saved_values(draw: st.DrawFn, roles: tuple[str, ...] = MODEL_ROLES + BATCH_ROLES) -> Case:
    """Anything, as torch.save writes it."""
    old = draw(st.integers(0, 4)) == 0
    try:
        data = torch_bytes(draw(values()), _use_new_zipfile_serialization=not old)
    except Exception:  # noqa: BLE001 - what torch.save itself does not take is no file
        data = torch_bytes({})
    return draw(st.sampled_from(roles)), "x.pt", data


@st.composite
def saved_modules(draw: st.DrawFn) -> Case:
    """Stock modules with attributes out of their range."""
    try:
        data = torch_bytes(draw(modules()))
    except Exception:  # noqa: BLE001 - likewise
        data = torch_bytes({})
    return draw(st.sampled_from(MODEL_ROLES)), "x.pt", data


# ------------------------------------------------------------------------------- pickles by hand

GLOBALS = (
    *("__builtin__ bytearray", "__builtin__ set", "collections OrderedDict", "collections Counter"),
    *("_codecs encode", "torch Tensor", "torch FloatTensor", "torch Size", "torch.storage UntypedStorage"),
    *("torch FloatStorage", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_wrapper_subclass", "torch._utils _rebuild_qtensor"),
    "torch.nn.parameter Parameter",
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_nested_tensor", "torch device"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._tensor _rebuild_from_type_v2", "torch float32"),
    *("torch._utils _rebuild_device_tensor_from_cpu_tensor", "torch.nn.modules.rnn LSTM", "os system"),
    *("my.pkg Config", "my.pkg ConfigDict", "collections defaultdict", "torch.serialization _get_layout"),
    *("__builtin__ complex", "torch._utils _rebuild_parameter_with_state", "torch sparse_coo"),
)  # fmt: skip


def _int(number: int) -> bytes:
    raw = number.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def _unicode(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


ATOMS = st.one_of(
    st.sampled_from(NUMBERS).map(_int),
    st.sampled_from(("storage", "0", "1", "cpu", "hex", "zlib", "latin1", "x", *NAMES)).map(
        _unicode
    ),
    st.sampled_from(GLOBALS).map(lambda name: f"c{name.replace(' ', chr(10))}\n".encode()),
    st.sampled_from((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"G" + bytes(8), b"K\x05")),
)
STORAGE = b"(" + _unicode("storage") + b"ctorch\nFloatStorage\n" + _unicode("0") + _unicode("cpu")
OPERATIONS = st.sampled_from(
    (b"R", b"R", b"R", b"\x81", b"b", b"(", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a", b"e", b"q\x01",
     b"h\x01", b"h\x01", b"Q", b"h\x01h\x01\x86q\x01", STORAGE + b"K\x04tQ",
     b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x04tQK\x00" + b"K\x02K\x02\x86K\x02K\x01\x86"
     b"\x89ccollections\nOrderedDict\n)RtR",
     b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x04tQK\x00" + _int(10**9) + b"K\x02\x86"
     b"K\x00K\x00\x86\x89ccollections\nOrderedDict\n)RtRq\x01")
)  # fmt: skip


@st.composite
def pickles(draw: st.DrawFn) -> Case:
    """Programs for torch's safe reader, most of which call something."""
    program = [b"\x80\x02}q\x01"]
    for _ in range(draw(st.integers(1, 12))):
        program.append(draw(st.one_of(ATOMS, OPERATIONS)))
        if draw(st.integers(0, 2)) == 0:  # a whole call
            count = draw(st.integers(0, 3))
            name = draw(st.sampled_from(GLOBALS)).replace(" ", "\n")
            arguments = b"".join(draw(st.one_of(ATOMS, OPERATIONS)) for _ in range(count))
            program.append(f"c{name}\n(".encode() + arguments + b"tR")
    doubled = draw(st.sampled_from((0, 0, 0, 5, 60)))
    program.append(b"h\x01h\x01\x86q\x01" * doubled)
    data = b"".join(program) + b"."
    if draw(st.booleans()):
        magic = (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        )
        body = magic + data + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
        return draw(st.sampled_from(MODEL_ROLES + BATCH_ROLES)), "x.pt", body
    members = {
        "a/data.pkl": data,
        "a/version": b"3\n",
        "a/data/0": bytes(16),
        "a/byteorder": b"little",
    }
    return draw(st.sampled_from(MODEL_ROLES + BATCH_ROLES)), "x.pt", zipped(members)


# ---------------------------------------------------------------------------------------- archives


def zipped(members: dict[str, bytes], packed: bool = False) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray | None = None, **header: object) -> bytes:
    """As numpy writes it, with a header that may say anything."""
    buffer = io.BytesIO()
    array = np.ones((6, 2, 3), dtype=np.float32) if array is None else array
    np.save(buffer, array)
    if not header:
        return buffer.getvalue()
    said = {"descr": "<f4", "fortran_order": False, "shape": (6, 2, 3)} | header
    text = repr(said).encode("latin-1", "replace")
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(text) + 1, 65535)) + text + b"\n"
    return head + array.tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """Arrays of numpy's that announce what they do not hold."""
    header = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "shape": st.lists(st.sampled_from(NUMBERS), max_size=3).map(tuple),
                "descr": st.sampled_from(
                    ("<f8", "|O", "<U9", "<c8", ">i4", "|V0", "|S0", "<f2", "<M8[s]", 3, "x")
                ),
                "fortran_order": st.sampled_from((True, 3, "x")),
                "extra": st.just(1),
            },
        )
    )  # fmt: skip
    return npy(**header)


@st.composite
def numpy_files(draw: st.DrawFn) -> Case:
    """.npy, .npz, compressed or not, that hold other things than they say."""
    role = draw(st.sampled_from(BATCH_ROLES))
    if draw(st.booleans()):
        return role, "x.npy", draw(arrays())
    names = st.sampled_from(("input", "target", "lengths", "arr_0", "x", "a\nb", "\x1b[1m", "../x"))
    members = {f"{draw(names)}.npy": draw(arrays()) for _ in range(draw(st.integers(0, 3)))}
    if draw(st.integers(0, 6)) == 0:
        members["input.npy"] = npy(
            np.zeros((draw(st.sampled_from((10, 400))), 250, 1000), dtype=np.float32)
        )
    return (
        role,
        draw(st.sampled_from(("x.npz", "x.pt", "x.npy"))),
        zipped(members, draw(st.booleans())),
    )


@st.composite
def archives(draw: st.DrawFn) -> Case:
    """Archives of torch.save with members of other sizes, twice, or missing, and sizes that are lies."""
    data = bytearray(draw(st.sampled_from(seeds())))
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    name = draw(st.sampled_from(sorted(members)))
    change = draw(st.sampled_from(("drop", "grow", "twice", "sizes", "prefix", "zeros", "order")))
    if change == "drop":
        del members[name]
    elif change == "grow":
        members[name] += bytes(draw(st.sampled_from((1, 100, 10**6))))
    elif change == "twice":
        members["b/data.pkl"] = draw(st.sampled_from((b"\x80\x02}.", b"\x80\x02N.")))
    elif change == "zeros":
        members[name] = bytes(draw(st.sampled_from((10, 10**8))))
    elif change == "order":
        members = dict(sorted(members.items(), reverse=True))
    made = bytearray(zipped(members, packed=draw(st.booleans())))
    if change == "prefix":
        made = bytearray(b"PK\x03\x04" + bytes(99)) + made
    if change == "sizes":
        at = made.rfind(b"PK\x01\x02")
        field = draw(st.sampled_from((20, 24, 42)))  # compressed size, size, place
        made[at + field : at + field + 4] = struct.pack(
            "<I", draw(st.sampled_from((0, 5, 2**30, 2**32 - 1)))
        )
    return draw(st.sampled_from(MODEL_ROLES + BATCH_ROLES)), "x.pt", bytes(made)


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Sound archives of torch.save."""
    weights = nn.LSTM(3, 5).state_dict()
    return (
        torch_bytes(weights), torch_bytes(nn.GRU(3, 5)), torch_bytes({"input": torch.ones(6, 2, 3)}),
        torch_bytes({"state_dict": weights, "epoch": 3, "hyper_parameters": {"a": [1, 2]}}),
    )  # fmt: skip


@st.composite
def safetensors(draw: st.DrawFn) -> Case:
    """Headers that announce other tensors than there are."""
    tensors = {
        "weight_hh_l0": torch.ones(20, 5),
        "weight_ih_l0": torch.ones(20, 3),
        "input": torch.ones(6, 2, 3),
    }
    data = save(tensors)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entry = header[draw(st.sampled_from(sorted(header)))]
    field = draw(st.sampled_from(("shape", "dtype", "data_offsets", "new")))
    entry[field] = draw(
        st.one_of(
            st.lists(st.sampled_from(NUMBERS), max_size=3),
            st.sampled_from(ODD_JSON),
            st.just("F8_E4M3"),
        )
    )
    header[draw(st.sampled_from(NAMES))] = draw(st.sampled_from((entry, {}, 3, {"a": "b"})))
    text = json.dumps(header).encode()
    claimed = draw(st.sampled_from((len(text), len(text), len(text), 5, 2**31, 2**40)))
    role = draw(st.sampled_from(("inspect", "model", *BATCH_ROLES)))
    return role, "x.safetensors", struct.pack("<Q", claimed) + text + data[8 + length :]


# ------------------------------------------------------------------------ folders of transformers

Members = dict[str, bytes]  # name in a folder -> bytes


@functools.cache
def sound_folder() -> Members:
    """A folder as transformers writes it, of which what gradflow itself reads is sound."""
    config = {
        "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_size": 5, "vocab_size": 20,
        "num_hidden_layers": 2, "chunk_size": 256, "bos_token_id": 0, "rope_theta": 10**9,
        "layer_types": ["a", "b"], "text_config": {"num_experts": 3, "quantization_config": None},
    }  # fmt: skip
    weights = {"embeddings.weight": torch.ones(20, 5), "layers.0.w": torch.ones(20, 5)}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(weights)}


@functools.cache
def real_folder(name: str) -> Members:
    """A folder that transformers itself has written, in several files of weights."""
    with tempfile.TemporaryDirectory() as place:
        model: Any = importlib.import_module("with_packages.models").transformers_model(name)
        model.save_pretrained(place, max_shard_size="2KB" if name.startswith("M") else "1GB")
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


REAL = ("Mamba", "Mamba2", "Rwkv", "Qwen3Next", "RecurrentGemma", "FalconH1", "Jamba")
SETTINGS = (
    *("auto_map", "quantization_config", "num_hidden_layers", "chunk_size", "attn_implementation"),
    *("hidden_size", "vocab_size", "model_type", "tie_word_embeddings", "n_layers", "num_experts"),
    *("a\nb", "\x1b[31m_layers", "k" * 10**6),
)
SETTING_VALUES = (*ODD_JSON, *NUMBERS, "kernels/x", {"auto_map": {}}, [10**12], 1e12, -1.5, 1000)
TEXTS = (
    *(b"", b"[", b"null", b"[]", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", b"NaN", b"[" * 10**5),
    *(b'{"a":' * 50_000, b"9" * 10**5, b'{"model_type": "' + b"k" * 10**6 + b'"}', b"{}"),
)
PLACES = ("model-1.safetensors", "../model.pt", "/etc/passwd", "model-1.bin", 3, None, *NAMES)


def _settings_of(members: Members) -> dict[str, Any] | None:
    try:
        found = json.loads(members["config.json"])
    except (LookupError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@st.composite
def edited_folders(draw: st.DrawFn, sound: Callable[[], Members] = sound_folder) -> Case:
    """A folder of transformers with other settings, weights, or files."""
    members = dict(sound())
    kinds = ("setting", "setting", "setting", "text", "index", "weights", "drop", "other")
    for change in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2)):
        config = _settings_of(members)
        if change == "setting" and config is not None:
            names = st.sampled_from((*sorted(config), *SETTINGS))
            for _ in range(draw(st.integers(1, 3))):
                config[draw(names)] = draw(st.sampled_from(SETTING_VALUES))
            members["config.json"] = json.dumps(config).encode()
        elif change == "text":
            members["config.json"] = draw(st.sampled_from(TEXTS))
        elif change == "index":
            members["model-1.safetensors"] = members.pop("model.safetensors", b"")
            places = {name: draw(st.sampled_from(PLACES)) for name in ("w", "embeddings.weight")}
            index = draw(st.sampled_from(({"weight_map": places}, {"weight_map": 3}, {}, [])))
            members["model.safetensors.index.json"] = json.dumps(index).encode()
        elif change == "weights":
            members["model.safetensors"] = draw(safetensors())[2]
        elif change == "drop":
            members.pop(draw(st.sampled_from(sorted(members))), None)
        elif change == "other":
            other = draw(st.sampled_from(("generation_config.json", "adapter_config.json")))
            members[other] = draw(st.sampled_from(TEXTS))
    return "folder", "x.zip", zipped(members)


# -------------------------------------------------------------------------------- bytes and text

MAGICS = (
    *(b"", b"\x80", b"PK", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00", b"\x89HDF\r\n\x1a\n"),
    b"\x80\x02",
    *(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"GGUF", b"\x08\x08\x12\x07pytorch", b"\xff\xfe", b"["),
    *(b'\x08\0\0\0\0\0\0\0{"a": 1', b'{"kind": "header", "schema": 1}\n', b"<html", b"\x1f\x8b", b"ustar"),
)  # fmt: skip
ANY_ROLE = st.sampled_from((*MODEL_ROLES, *BATCH_ROLES, "labels", "load", "report", "compare"))
SUFFIX = {
    "labels": (".txt", ".json"),
    "load": (".nc", ".jsonl"),
    "report": (".nc",),
    "compare": (".nc",),
}


@st.composite
def short_bytes(draw: st.DrawFn) -> Case:
    """Few bytes, most of which begin like a file of some kind."""
    role = draw(ANY_ROLE)
    data = draw(st.sampled_from(MAGICS)) + draw(st.binary(max_size=40))
    suffix = draw(
        st.sampled_from(SUFFIX.get(role, (".pt", ".npy", ".npz", ".safetensors", ".csv")))
    )
    return role, f"history{suffix}" if suffix == ".jsonl" else f"x{suffix}", data


@st.composite
def changed_bytes(draw: st.DrawFn, sound: Callable[[], tuple[Case, ...]]) -> Case:
    """A sound file with some bytes changed, cut or repeated."""
    role, name, held = draw(st.sampled_from(sound()))
    data = bytearray(held)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(
            st.sampled_from(("flip", "flip", "flip", "cut", "drop", "twice", "ones", "number"))
        )
        if change == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at:]
        elif change == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif change == "twice":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        elif change == "ones":
            data[at : at + 8] = b"\xff" * 8
        else:
            data[at : at + 8] = struct.pack("<q", draw(st.sampled_from(NUMBERS)))
    return role, name, bytes(data)


@functools.cache
def sound_models() -> tuple[Case, ...]:
    """Files of models and batches as they should be."""
    weights = nn.LSTM(3, 5).state_dict()
    old = torch_bytes(weights, _use_new_zipfile_serialization=False)
    batch = torch_bytes({"input": torch.ones(6, 2, 3)})
    cases: list[Case] = [("inspect", "x.pt", data) for data in (*seeds(), old)]
    cases += [("batch", "x.pt", batch), ("batch", "x.npy", npy()), ("target", "x.npy", npy())]
    cases += [("inspect", "x.safetensors", save(dict(weights)))]
    return (*cases, ("batch", "x.npz", zipped({"input.npy": npy()}, packed=True)))


@st.composite
def labels(draw: st.DrawFn) -> Case:
    """Labels of other kinds, lengths and letters."""
    if draw(st.booleans()):
        value = draw(
            st.one_of(
                st.sampled_from(ODD_JSON),
                st.lists(st.sampled_from(ODD_JSON), min_size=5, max_size=7),
            )
        )
        text = draw(
            st.sampled_from((json.dumps(value), "[" * 10**5, "9" * 10**5, json.dumps(["a"] * 6)))
        )
        return "labels", "x.json", text.encode()
    lines = draw(st.lists(st.sampled_from((*NAMES, "word")), min_size=5, max_size=7))
    return "labels", "x.txt", "\n".join(lines).encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------ runs and histories


@functools.cache
def sound_runs() -> tuple[Case, ...]:
    """A run of a few steps, as it was saved."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = gradflow.diagnose(nn.LSTM(3, 4), torch.randn(8, 3, 3)).save(f"{folder}/run.nc")
        return (("load", "x.nc", path.read_bytes()),)


RUN_ROLES = (*("load",) * 8, "report", "compare")


@st.composite
def edited_runs(draw: st.DrawFn) -> Case:
    """A saved run with a field, an array, a label or a group changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.nc")
        path.write_bytes(sound_runs()[0][2])
        with h5py.File(path, "r+") as file:
            for _ in range(draw(st.integers(1, 2))):
                draw(edits(file))
        return draw(st.sampled_from(RUN_ROLES)), "x.nc", path.read_bytes()


@st.composite
def edits(draw: st.DrawFn, file: h5py.File) -> None:
    """One edit of an open run."""
    group = file[draw(st.sampled_from(("/", "/layer0", "/layer0", "/layer0")))]
    if "gradflow" not in group.attrs or draw(st.integers(0, 1)):
        draw(_edited_array(file))
        return
    header = json.loads(group.attrs["gradflow"])
    place = header
    name = draw(st.sampled_from(sorted(place)))
    while isinstance(place[name], dict) and place[name] and draw(st.booleans()):
        place = place[name]
        name = draw(st.sampled_from(sorted(place)))
    if draw(st.integers(0, 4)) == 0:
        del place[name]
    else:
        same = [value for value in ODD_JSON if type(value) is type(place[name])] or list(ODD_JSON)
        place[name] = draw(st.sampled_from(draw(st.sampled_from((same, list(ODD_JSON))))))
    group.attrs["gradflow"] = json.dumps(header)


@st.composite
def _edited_array(draw: st.DrawFn, file: h5py.File) -> None:
    group = file["/layer0"]
    name = draw(st.sampled_from(sorted(group)))
    if not isinstance(group.get(name), h5py.Dataset):  # None: an earlier edit's link to nowhere
        return
    held = group[name]
    change = draw(
        st.sampled_from(
            ("delete", "numbers", "numbers", "shape", "huge", "words", "attribute", "link")
        )
    )
    if change == "attribute":
        held.attrs[
            draw(st.sampled_from(("units", "scale_factor", "_FillValue", "dtype", "coordinates")))
        ] = draw(st.sampled_from(("days since 2000-01-01", "seconds", 1e300, "bool", "x y")))
    elif change == "numbers" and 0 < held.size < 10**6 and held.dtype.kind in "fi":
        value = draw(st.sampled_from((np.nan, np.inf, -np.inf, 1e308, -1.0, 0.0, 1e-320)))
        with np.errstate(all="ignore"):
            held[...] = np.full(held.shape, value).astype(held.dtype)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del group[name]
        if change == "shape":
            group[name] = np.ones(draw(st.sampled_from(((), (3,), (2, 2), (0,)))))
        elif change == "huge":
            group.create_dataset(
                name, shape=(10**6, 10**6), dtype="f8", chunks=(100, 100), compression="gzip"
            )
        elif change == "words":
            group[name] = np.array([draw(st.sampled_from(NAMES[:14])).encode()], dtype=object)
        elif change == "link":
            group[name] = h5py.SoftLink(draw(st.sampled_from(("/layer0", "/", "/nowhere"))))


@functools.cache
def sound_histories() -> tuple[Case, ...]:
    """A history of a few probes."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), title="LSTM", every=1)
        for step in range(1, 7):
            layer = LayerProbe(
                {"rate": -0.1, "gain": -3.0, "horizon": 9.0}, "vanishing", {"f": {"gate_mean": 0.5}},
                np.arange(4), np.linspace(0, -3, 4), np.linspace(0, -1, 4),
            )  # fmt: skip
            notes = (Note(step, "verdict", "l0 vanishes", "l0"),)
            writer.probe(
                Probe(step, {"loss": 1.0 / step}, {"l0": layer}, (0.1,), notes), {"l0": "LSTM"}
            )
        writer.close()
        assert len(History.read(folder)) == 6
        return (("load", "history.jsonl", Path(folder, "history.jsonl").read_bytes()),)


@st.composite
def edited_histories(draw: st.DrawFn) -> Case:
    """A history with lines whose fields are others, or with other lines."""
    lines = sound_histories()[0][2].decode().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        try:
            content = json.loads(lines[at])
        except (ValueError, RecursionError):
            continue
        if not isinstance(content, dict):
            continue
        change = draw(
            st.sampled_from(("field", "field", "field", "drop", "twice", "numbers", "other"))
        )
        if change == "field" and content:
            name = draw(st.sampled_from(sorted(content)))
            content[name] = draw(
                st.sampled_from((*ODD_JSON, [3, 1], ["a\x1b[31m"], ["l0", "l0"], "end", "note"))
            )
            lines[at] = json.dumps(content)
        elif change == "drop":
            del lines[at]
        elif change == "twice":
            lines[at:at] = [lines[at]] * 3
        elif change == "other":
            lines[at] = draw(
                st.sampled_from(
                    ("[" * 10**5, "{}", "null", "k" * 10**6, '{"kind": "probe", "step": 9')
                )
            )
        elif "numbers" in content and isinstance(content["numbers"], str):
            packed = np.frombuffer(base64.b64decode(content["numbers"]), dtype="u1").copy()
            value = draw(st.sampled_from((0xFF, 0x7F, 0x00, 0x41)))
            packed[draw(st.integers(0, len(packed) - 1)) :] = value
            content["numbers"] = base64.b64encode(packed.tobytes()).decode()
            lines[at] = json.dumps(content)
        if not lines:
            break
    role = draw(st.sampled_from(("load", "load", "load", "report")))
    return role, "history.jsonl", ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


class _Shown:
    """A case whose repr fits a screen."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __repr__(self) -> str:
        role, name, data = self.case
        return f"({role!r}, {name!r}, {data[:200]!r}… of {len(data)} bytes)"


def each(
    strategy: st.SearchStrategy[Case], attempt: Callable[[Case], None], count: int, seed: int
) -> None:
    """Call a function with so many files of a kind."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy.map(_Shown))
    def attempts(shown: _Shown) -> None:
        attempt(shown.case)

    attempts()


KINDS: dict[str, st.SearchStrategy[Case]] = {
    "few bytes": short_bytes(),
    "values of torch.save": saved_values(),
    "pickled stock modules": saved_modules(),
    "pickles by hand": pickles(),
    "archives": archives(),
    "safetensors": safetensors(),
    "folders of transformers": edited_folders(),
    "numpy's files": numpy_files(),
    "labels": labels(),
    "runs edited": edited_runs(),
    "histories edited": edited_histories(),
    "models and batches with bytes changed": changed_bytes(sound_models),
    "runs with bytes changed": changed_bytes(sound_runs),
    "histories with bytes changed": changed_bytes(sound_histories),
}
if importlib.util.find_spec("transformers"):
    KINDS["folders that transformers opens"] = st.sampled_from(REAL).flatmap(
        lambda name: edited_folders(functools.partial(real_folder, name))
    )
