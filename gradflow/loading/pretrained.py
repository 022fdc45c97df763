"""Folders that transformers writes: a language model, and tokens to run it on.

Nothing is downloaded, and no code that a folder brings is run: ``trust_remote_code`` is False.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import FileError, InputError, must_be, one_sentence, plain_name
from gradflow.limits import CHUNK, SETTING
from gradflow.loading.batch import read_batch
from gradflow.loading.contents import read_json
from gradflow.loading.words import reason


def is_pretrained(path: Path) -> bool:
    """Whether this is a folder of a model of transformers."""
    return path.is_dir() and (path / "config.json").is_file()


def open_pretrained(path: Path) -> nn.Module:
    """The language model of a folder with config.json and .safetensors, in float32 and evaluation mode.

    Raises:
        InputError: transformers is not installed.
        FileError: the folder holds no model that transformers knows by itself.
    """
    _check_settings(path)
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{path} is a folder of transformers, which is not installed; "
            "pip install 'gradflow-rnn[transformers]'"
        ) from error
    try:
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
    made: nn.Module = model
    return made.eval()


def _refused(path: Path, why: str) -> FileError:
    known = "it must hold config.json and model.safetensors of a model that transformers knows"
    return FileError(one_sentence(f"{why}; {known}", str(path)))


def _check_settings(folder: Path) -> None:
    """Refuse settings that name code, or numbers that are no sizes of a model, before anything is made."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{path} is no JSON{reason(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _refused(folder, f"{path} does not say its model_type")
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
        if isinstance(value, int) and abs(value) > most:
            raise _refused(
                folder, f"{plain_name(name)} in {path} must be at most {most:,}, got more"
            )


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
