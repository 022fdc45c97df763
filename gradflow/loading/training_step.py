"""How far a training was when a checkpoint was saved: in the file, or in its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

import torch
from torch import Tensor

from gradflow.history.probe import TrainingStep

STEP_KEYS = ("step", "global_step", "iteration", "epoch")  # of a checkpoint, the first one counts
_NAMED = ("global_step", "step", "iteration", "iter", "epoch")  # the same in its name
_FOLDER = re.compile(r"(checkpoint|ckpt|global_?step|step|iter|epoch)[-_=]?\d+", re.IGNORECASE)


def step_in(value: object) -> TrainingStep | None:
    """The training step that a checkpoint holds.

    Args:
        value: what the file held.

    >>> step_in({"epoch": 3, "global_step": 900, "state_dict": {}})
    TrainingStep(number=900, found='global_step in the checkpoint', counts='update')
    """
    if not isinstance(value, Mapping):
        return None
    for key in STEP_KEYS:
        number = _whole(value.get(key))
        if number is not None:
            counts = "epoch" if key == "epoch" else "update"
            return TrainingStep(number, f"{key} in the checkpoint", counts)
    return None


def _whole(value: object) -> int | None:
    """A count, however it was saved."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.device.type != "meta"
        value = value.item() if plain and value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 2**63 and value == int(value) else None


def step_in_name(path: PurePath) -> TrainingStep | None:
    """The training step that the name of a file holds, or of its folder where that is one step's.

    Args:
        path: of the file.

    >>> step_in_name(PurePath("seed-3/epoch=2-step=400.ckpt"))
    TrainingStep(number=400, found='digits of the name', counts='')
    >>> step_in_name(PurePath("a/checkpoint-500/model.safetensors")).number
    500
    >>> step_in_name(PurePath("epoch_3.pt")).found
    'epoch in the name'
    >>> step_in_name(PurePath("seed-3/last.pt")) is None
    True
    """
    for name in (path.stem, path.parent.name if _FOLDER.fullmatch(path.parent.name) else ""):
        found = _digits(name)
        if found is not None:
            return found
    return None


def _digits(name: str) -> TrainingStep | None:
    for word in _NAMED:
        found = re.search(rf"(?<![a-z]){word}[=_-]?(\d{{1,15}})", name, re.IGNORECASE)
        if found:
            if word == "epoch":
                return TrainingStep(int(found[1]), "epoch in the name", "epoch")
            return TrainingStep(int(found[1]), "digits of the name")
    rest = re.sub(r"seed[=_-]?\d+", "", name, flags=re.IGNORECASE)
    every = re.findall(r"\d{1,15}", rest)
    return TrainingStep(int(every[-1]), "digits of the name") if every else None


def run_folder(path: PurePath) -> PurePath:
    """The folder of the run that a checkpoint belongs to: not the one that holds this step alone.

    Args:
        path: of the file.

    >>> run_folder(PurePath("a/checkpoint-500/model.safetensors")).as_posix()
    'a'
    """
    folder = path.parent
    alone = _digits(path.stem) is None and _FOLDER.fullmatch(folder.name)
    return folder.parent if alone else folder
