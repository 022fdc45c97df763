"""Folders that transformers writes: a language model, and tokens to run it on.

Nothing is downloaded, and no code that a folder brings is run: ``trust_remote_code`` is False.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import FileError, InputError, must_be
from gradflow.loading.batch import read_batch


def is_pretrained(path: Path) -> bool:
    """Whether this is a folder of a model of transformers."""
    return path.is_dir() and (path / "config.json").is_file()


def open_pretrained(path: Path) -> nn.Module:
    """The language model of a folder with config.json and .safetensors, in float32 and evaluation mode.

    Raises:
        InputError: transformers is not installed.
        FileError: the folder holds no model that transformers knows by itself.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{path} is a folder of transformers, which is not installed; "
            "pip install 'gradflow-rnn[transformers]'"
        ) from error
    try:
        brings = "auto_map" in json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise FileError(f"{path / 'config.json'} is no JSON ({_first_line(error)})") from error
    if brings:
        raise FileError(
            f"{path} brings code of its own for its model (auto_map in config.json), which is never run; "
            "build the model yourself and use gradflow.record around a training step"
        )
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise FileError(
            f"transformers cannot open {path} as a language model ({_first_line(error)}); it must hold "
            "config.json and model.safetensors of a model that transformers knows"
        ) from error
    return model.eval()


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
