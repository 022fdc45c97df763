"""Folders that transformers writes: a language model, and tokens to run it on.

Nothing is downloaded, and no code that a folder brings is run: ``trust_remote_code`` is False.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gradflow.errors import FileError, InputError, must_be, one_sentence, plain_name, warn
from gradflow.limits import ANNOUNCED, CHUNK, SETTING
from gradflow.loading.batch import read_batch
from gradflow.loading.contents import read_json
from gradflow.loading.file_kinds import READ_ERRORS
from gradflow.loading.words import reason, some


def is_pretrained(path: Path) -> bool:
    """Whether this is a folder of a model of transformers."""
    return path.is_dir() and (path / "config.json").is_file()


def open_pretrained(path: Path) -> nn.Module:
    """The language model of a folder with config.json and .safetensors, in float32 and evaluation mode.

    Raises:
        InputError: transformers is not installed.
        FileError: the folder holds no model that transformers knows by itself.
    """
    numbers = _check_settings(path)
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{path} is a folder of transformers, which is not installed; "
            "pip install 'gradflow-rnn[transformers]'"
        ) from error
    logging.getLogger("transformers").setLevel(logging.CRITICAL)  # one sentence says what is wrong
    try:
        _check_size(transformers, path, numbers)
        with redirect_stderr(io.StringIO()):  # bars of progress
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            )
    except Exception as error:  # whatever a library that is not ours raises is quoted
        said = f"transformers cannot open {path} as a language model ({_first_line(error)})"
        raise _refused(path, said) from error
    if loaded["missing_keys"]:
        raise _refused(path, f"{path} lacks weights of its model, which would be random numbers")
    if loaded["unexpected_keys"]:
        unused = some([plain_name(name) for name in sorted(loaded["unexpected_keys"])])
        warn(f"weights that the model has no place for were left out: {unused}")
    made: nn.Module = model
    return made.eval()


def _refused(path: Path, why: str) -> FileError:
    known = "it must hold config.json and model.safetensors of a model that transformers knows"
    return FileError(one_sentence(f"{why}; {known}", str(path)))


def _held(folder: Path) -> tuple[int, int]:
    """How many tensors, and numbers in them, the files of weights hold, told from their headers."""
    tensors = numbers = 0
    for path in _files_of_weights(folder):
        try:
            if not path.is_file():
                raise ValueError("it is not a file")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    tensors += 1
                    numbers += math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, *READ_ERRORS) as error:
            raise _refused(folder, f"{path} cannot be read{reason(error)}") from error
    return tensors, numbers


def _files_of_weights(folder: Path) -> list[Path]:
    """One file, or those that an index names, all of which lie in the folder itself."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    found = _json(folder, index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places:
        raise _refused(folder, f"{index} does not say where its weights are")
    names = list(dict.fromkeys(map(str, places.values())))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise _refused(
                folder, f"{index} names {plain_name(name)!r}, no file of weights beside it"
            )
    return [folder / name for name in names]


def _json(folder: Path, path: Path) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{path} is no JSON{reason(error)}") from error


def _check_size(transformers: Any, folder: Path, numbers: int) -> None:
    """Refuse settings that ask for far more than the weights hold, by a model without numbers."""
    options = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    asked = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    if asked > 2 * numbers + ANNOUNCED // 4:  # some pack two into a byte, some share one
        raise ValueError(f"its settings ask for {asked:,} numbers, its weights hold {numbers:,}")


def _check_settings(folder: Path) -> int:
    """Refuse settings that name code, or numbers that are no sizes of a model, before anything is made.

    Returns how many numbers the weights hold.
    """
    path = folder / "generation_config.json"
    if path.exists():  # transformers reads it without being asked
        _json(folder, path)
    if (folder / "adapter_config.json").exists():
        raise _refused(
            folder, f"{folder} is an adapter of another model, so merge them, and save that"
        )
    path = folder / "config.json"
    config = _json(folder, path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _refused(folder, f"{path} does not say its model_type")
    tensors, numbers = _held(folder)
    waiting = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.items() if isinstance(value, dict) else [(name, one) for one in value]
        if name == "auto_map" or (name.endswith("implementation") and "/" in str(value)):
            raise FileError(
                f"{folder} brings code of its own for its model ({plain_name(name)} in config.json), which "
                "is never run; build the model yourself and use gradflow.record around a training step"
            )
        most = CHUNK if name == "chunk_size" else SETTING
        if re.search(r"(layers?|blocks|depth|experts)$", name):  # as many things are made at once
            most = max(CHUNK, tensors)
        if isinstance(value, int) and abs(value) > most:
            raise _refused(
                folder, f"{plain_name(name)} in {path} must be at most {most:,}, got more"
            )
    return numbers


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
