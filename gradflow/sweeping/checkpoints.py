"""Which checkpoints a sweep is of, and what a worker is told of each and gives back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import torch
from torch import Tensor, nn

from gradflow import loading
from gradflow._version import __version__
from gradflow.errors import FileError, InputError, must_be
from gradflow.history.probe import TrainingStep
from gradflow.loading import files_of, natural, run_folder, step_in_name

VERSIONS = (__version__, str(torch.__version__))  # that every worker must have
MODEL_FILES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl")  # looked for in a folder


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a sweep."""

    name: str  # its path as it was found, or the name of a model that was given
    run: str  # its folder below the one that all have in common, with the seed of its name
    named: TrainingStep | None  # the training step that its name says
    path: Path | None = None  # of a file
    model: nn.Module | None = None  # or the model itself


def checkpoints(given: object) -> list[Checkpoint]:
    """All that a sweep is asked to measure, in the order of their names, those of one run together.

    Args:
        given: a path, a pattern such as 'runs/**/*.pt', a folder, or a list of them; a model, a list of
            models, or a mapping of names such as "seed=0/step-100" to models.

    Returns:
        At least one.

    Raises:
        FileError: no file matches.
        InputError: something else was given.
    """
    if isinstance(given, nn.Module):
        given = [given]
    if isinstance(given, Mapping):
        return _of_models({str(name): model for name, model in given.items()})
    some = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(some, Iterable):
        raise _neither(given)
    every = list(some)
    if every and all(isinstance(one, nn.Module) for one in every):
        return _of_models({str(number): model for number, model in enumerate(every)})
    if not every or not all(isinstance(one, str | os.PathLike) for one in every):
        raise _neither(given)
    found = sorted({path for one in every for path in _files(os.fspath(one))}, key=natural)
    return _in_runs([Checkpoint(str(path), "", step_in_name(path), path=path) for path in found])


def _neither(given: object) -> InputError:
    kind = type(given).__name__
    advice = "write for example gradflow.sweep('runs/**/*.pt')"
    expected = "paths of checkpoints, or models, at least one"
    got = f"an empty {kind}" if isinstance(given, list | tuple | set) and not given else kind
    return InputError(must_be("what is swept", expected, got, advice))


def _of_models(models: Mapping[str, object]) -> list[Checkpoint]:
    if not models or not all(isinstance(model, nn.Module) for model in models.values()):
        raise _neither(models)
    found = [
        Checkpoint(name, "", step_in_name(PurePath(name)), model=model)  # type: ignore[arg-type]
        for name, model in models.items()
    ]
    return _in_runs(found)


def _files(pattern: str) -> list[Path]:
    """The checkpoints that a path, a pattern or a folder stands for.

    What transformers and accelerate write beside a model is none, unless it is given by its own path.
    """
    found = files_of(pattern, MODEL_FILES)
    if not found or (len(found) == 1 and not found[0].exists()):
        advice = (
            "check the path; a pattern such as 'runs/**/*.pt' must be quoted, and ** is any folder"
        )
        raise FileError(f"no file matches {pattern!r}; {advice}")
    beside = re.compile(
        r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states)(_\d+)?\.(pt|pth|bin|pkl)"
    )
    models = [one for one in found if not beside.fullmatch(one.name) or one == Path(pattern)]
    if not models:
        raise FileError(
            f"{pattern!r} matches no model, only what trainers write beside one, such as {found[0]}; give "
            "the folder, or a pattern such as 'runs/**/*.safetensors'"
        )
    return models


def _in_runs(found: list[Checkpoint]) -> list[Checkpoint]:
    """The same with the run of each: what of the folders differs, and a seed in a file's name."""
    folders = [run_folder(PurePath(one.name)).parts for one in found]
    every = set(folders)
    shared = 0
    while len(every) > 1 and len({parts[: shared + 1] for parts in every}) == 1:
        shared += 1
    shared = max(map(len, every)) if len(every) == 1 else shared
    while (
        len(every) > 1
        and all(len(parts) > shared for parts in every)
        and len({parts[-1] for parts in every}) == 1
    ):  # "checkpoints" at the end of each says nothing
        folders = [parts[:-1] for parts in folders]
        every = set(folders)
    runs = ["/".join(parts[shared:]) for parts in folders]
    seeds = [re.search(r"seed[=_-]?\d+", PurePath(one.name).stem, re.IGNORECASE) for one in found]
    named = ["/".join(filter(None, [run, seed[0] if seed else ""]))
             for run, seed in zip(runs, seeds, strict=True)]  # fmt: skip
    made = [replace(one, run=run) for one, run in zip(found, named, strict=True)]
    return sorted(made, key=lambda one: natural(one.run))


# ------------------------------------------------------------------------------ what a worker is told


@dataclass(frozen=True)
class SweepSettings:
    """What is the same for all checkpoints of a sweep."""

    spec: str | Callable[[], nn.Module] | nn.Module | None = None  # whose weights the files hold
    member: str | None = None  # one of several models in a file
    batches: tuple[Path | loading.Batch, ...] = ()  # what the model runs on; none: probes
    target: Path | None = None  # the targets of a batch in a file of their own
    loss: str | Callable[..., Tensor] | None = None  # by name, or the user's own
    output: str | None = None  # which part of the model's output
    span: int | None = None  # the distance of interest
    train: bool | None = None  # the mode the model runs in; None: evaluation
    probe_steps: int = 100  # T of a probe
    probe_batch: int | None = None  # B of a probe; None: 16, or fewer
    seed: int = 0  # of whatever is drawn
    trust: bool = False  # open a full pickle
    preset: str = "rate"  # what is measured of a layer, as in `gradflow.watch`


FileState = tuple[int, int, int]  # inode, bytes and nanoseconds of the last change


def state_of(path: Path) -> FileState:
    """By what it is seen that a file changed; an OSError where it is gone."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class CheckpointTask:
    """What a worker is told to measure."""

    name: str  # of the checkpoint
    path: Path | None  # its file
    state: FileState | None  # of the file when its content was read for the key
    model: nn.Module | None  # or the model itself
    settings: SweepSettings  # of the sweep
    key: str  # of its content
    versions: tuple[str, str] = VERSIONS  # of gradflow and torch where the sweep began


@dataclass(frozen=True)
class Outcome:
    """What a worker gives back."""

    text: str = ""  # the row; "" where there is none
    failed: str = ""  # why not, one sentence
    changed: bool = False  # the file changed while it was read: try again
    trained: TrainingStep | None = None  # as the file says, where there is no row


def other_versions(there: tuple[str, str], here: tuple[str, str]) -> str:
    """The sentence for a worker with other versions, of gradflow and torch there and here."""
    return (
        f"the workers must have gradflow {here[0]} and torch {here[1]} as this process has, got gradflow "
        f"{there[0]} and torch {there[1]}; install the same on all, or the numbers could differ"
    )
