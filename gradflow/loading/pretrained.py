"""Folders that transformers writes: a language model, and tokens to run it on.

Nothing is downloaded, and no code that a folder brings is run: ``trust_remote_code`` is False. Its settings
are plain numbers and words, and ask for no larger model than the folder holds weights of, before transformers
makes anything of them.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gradflow.errors import FileError, InputError, must_be, one_sentence, plain_name
from gradflow.limits import ANNOUNCED, CHUNK, LAYOUT_SECONDS, SETTING, UNPACKED_TIMES
from gradflow.loading.batch import read_batch
from gradflow.loading.contents import read_json
from gradflow.loading.file_kinds import READ_ERRORS
from gradflow.loading.words import reason
from gradflow.process import quiet

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MANY = re.compile(r"layers?$|blocks$|experts$|depth$")  # settings that count modules
_NO_SIZE = re.compile(r"theta|base|seed|length|period")  # settings that may be any number
KNOWN = "it must hold config.json and model.safetensors of a language model that transformers knows"


def is_pretrained(path: Path) -> bool:
    """Whether this is a folder of a model of transformers."""
    return path.is_dir() and (path / CONFIG).is_file()


def open_pretrained(path: Path) -> nn.Module:
    """The language model of a folder with config.json and .safetensors, in float32 and evaluation mode.

    Raises:
        InputError: transformers is not installed.
        FileError: the folder holds no model that transformers knows by itself, or not all of it.
    """
    try:
        return _open(path)
    except (FileError, InputError) as error:
        raise type(error)(one_sentence(error, str(path))) from error


def _open(path: Path) -> nn.Module:
    _check_settings(path, _mapping(path / CONFIG))
    held = _weights(path)
    _check_counts(path, held)
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{path} is a folder of transformers, which is not installed; "
            "pip install 'gradflow-rnn[transformers]'"
        ) from error
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, **options)
            wanted = _numbers_of(transformers.AutoModelForCausalLM, config)
            numbers = sum(map(math.prod, held.values()))
            if wanted > UNPACKED_TIMES * numbers + ANNOUNCED // 4:
                raise FileError(
                    f"{path} asks for a model of {wanted:,} numbers and holds weights of {numbers:,}; "
                    f"{KNOWN}"
                )
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except FileError:
        raise
    except (_TooLong, Exception) as error:  # whatever a library that is not ours raises is quoted
        raise FileError(
            f"transformers cannot open {path} as a language model ({_first_line(error)}); {KNOWN}"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise FileError(
            f"{path} lacks {len(missing)} weights of its model, such as {plain_name(missing[0])}, which "
            f"would be random numbers; {KNOWN}"
        )
    made: nn.Module = model
    return made.eval()


# ---------------------------------------------------------------------------- what the folder says


def _mapping(path: Path) -> dict[str, Any]:
    """The settings in a file of JSON."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is no JSON{reason(error)}; {KNOWN}") from error
    if not isinstance(found, dict):
        raise FileError(must_be(str(path), "an object of JSON", type(found).__name__, KNOWN))
    return found


def _check_settings(path: Path, config: dict[str, Any]) -> None:
    """Refuse settings that name code, that no gradient goes through, or that are no sizes of a model."""
    if not isinstance(config.get("model_type"), str):
        raise FileError(f"{path / CONFIG} does not say its model_type; {KNOWN}")
    for other in ("generation_config.json", "adapter_config.json"):
        if (path / other).exists():
            _mapping(path / other)
    if (path / "adapter_config.json").exists():
        raise FileError(
            f"{path} holds an adapter, whose model lies elsewhere; merge it into its model and save that"
        )
    for name, value in _settings(config):
        shown = plain_name(name)
        if name == "auto_map":
            raise FileError(
                f"{path} brings code of its own for its model (auto_map in config.json), which is never "
                "run; build the model yourself and use gradflow.record around a training step"
            )
        if name == "quantization_config" and value is not None:
            raise FileError(
                f"{path} holds quantized weights, through which no gradient flows; take the model as it "
                "was before it was quantized"
            )
        if name.endswith("implementation") and isinstance(value, str) and not value.isidentifier():
            raise FileError(
                f"{path} asks for code from elsewhere ({shown} in config.json); take that line out"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = CHUNK if name == "chunk_size" else SETTING
        if abs(value) > most and not _NO_SIZE.search(name):
            got = f"{value:,}" if abs(value) < 10**20 else "a number of more than 20 digits"
            expected = f"at most {most:,}"
            raise FileError(must_be(f"{shown} in {path / CONFIG}", expected, got, KNOWN))


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, whatever it lies within; an entry of a list has the list's name."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        yield name, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, one) for one in value]


def _weights(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, by the headers of the files that hold them."""
    names = [WEIGHTS]
    if not (path / WEIGHTS).exists() and (path / INDEX).exists():
        names = _files_of(path / INDEX)
    held: dict[str, tuple[int, ...]] = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise FileError(f"{path} has no file {plain_name(name)}; {KNOWN}")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  it is no mapping
                    held[key] = tuple(opened.get_slice(key).get_shape())
        except (SafetensorError, *READ_ERRORS) as error:
            raise FileError(
                f"{file} is a damaged safetensors file{reason(error)}; download or save it again"
            ) from error
    return held


def _files_of(index: Path) -> list[str]:
    """The files that an index of weights names, which all lie beside it."""
    places = _mapping(index).get("weight_map")
    if not isinstance(places, dict):
        raise FileError(f"{index} has no weight_map; {KNOWN}")
    for name in places.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            shown = plain_name(name) if isinstance(name, str) else type(name).__name__
            expected = "names of .safetensors files beside it"
            raise FileError(must_be(f"weight_map in {index}", expected, shown, KNOWN))
    return list(dict.fromkeys(places.values()))


def _check_counts(path: Path, held: dict[str, tuple[int, ...]]) -> None:
    """Every layer, block and expert has weights of its own."""
    most = len(held) + max((max(shape, default=0) for shape in held.values()), default=0)
    for name, value in _settings(_mapping(path / CONFIG)):
        if isinstance(value, int) and _MANY.search(name) and value > most:
            expected = f"at most {most:,}, as there are weights"
            raise FileError(
                must_be(f"{plain_name(name)} in {path / CONFIG}", expected, f"{value:,}", KNOWN)
            )


# ------------------------------------------------------------------------- what the model would be


class _TooLong(BaseException):
    """It takes longer than a model does; no library takes it for an error of its own."""


def _numbers_of(maker: Any, config: Any) -> int:
    """How many numbers a model of these settings has; it is laid out without any."""
    with _at_most(LAYOUT_SECONDS), torch.device("meta"):
        model = maker.from_config(config, trust_remote_code=False)
    every = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() for tensor in every)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLong at the first call after so many seconds, in this thread."""
    until, before = time.monotonic() + seconds, sys.getprofile()

    def look(*_: object) -> None:
        if time.monotonic() > until:
            sys.setprofile(before)
            raise _TooLong(f"its settings describe no model that is laid out in {seconds:g} s")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_tokens(path: Path | None, vocabulary: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Tokens (B, T) from a file, or uniform random ones of this shape.

    Raises:
        InputError: what the file holds are no tokens of this vocabulary.
    """
    if path is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocabulary, shape, generator=generator)
    inputs = read_batch(path).inputs
    tokens = inputs[0]
    tokens = tokens.unsqueeze(0) if tokens.dim() == 1 else tokens
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool)
    if len(inputs) > 1 or tokens.dim() != 2 or not whole or tokens.shape[1] < 2:
        kind = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise InputError(
            must_be("the tokens", "whole numbers of shape (B, T), T at least 2", kind, "save ids")
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        expected = f"from 0 to {vocabulary - 1}, the model's vocabulary"
        raise InputError(
            must_be("the tokens", expected, f"{low} to {high}", "use the model's own tokenizer")
        )
    return tokens.long()
