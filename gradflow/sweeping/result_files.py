"""The folder of a sweep: a small file for every result, and a list of checkpoints for every shard.

=====================  ========================================================================
results/KEY.jsonl      one row, the history of one probe; KEY is of content: of the checkpoint, the
                       batches and the settings, so that a result is found again wherever the files lie
shards/I-of-N.json     what a shard was asked to measure, and the key and step of each
history.jsonl          all rows joined, written when a sweep ends or is gathered
=====================  ========================================================================

Every file appears whole or not at all. A sweep holds a lock on its shard while it runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow import loading
from gradflow.errors import FileError, checked_path, plain_record, plain_value
from gradflow.history import HISTORY_FILE, row_facts, row_text
from gradflow.sweeping.checkpoints import VERSIONS, Checkpoint, Outcome, SweepSettings
from gradflow.writing import claim, clear, is_left, whole_file

RESULTS, SHARDS = "results", "shards"


@dataclass(frozen=True)
class Entry:
    """One checkpoint of a shard, and what came of it."""

    name: str  # of the checkpoint
    run: str  # its run
    key: str = ""  # of its result; "" where it could not be read
    step: int | None = None  # the training step that its name says
    step_from: str = ""  # in words
    counts: str = ""  # what it counts, as in `Source`
    failed: str = ""  # why there is no result


# ---------------------------------------------------------------------------------------- the key


def digest_of_settings(settings: SweepSettings) -> str:
    """What all results of a sweep depend on besides the checkpoint: batches, settings, code, versions.

    Args:
        settings: of the sweep.

    Raises:
        FileError: a batch or the code of the model cannot be read.
    """
    found = hashlib.sha256(repr(VERSIONS).encode())
    for name, value in vars(settings).items():
        if name not in ("batches", "spec", "loss", "target"):
            found.update(f"{name}={value!r};".encode())
    for batch in settings.batches:
        found.update(_of_file(batch) if isinstance(batch, Path) else _of_values(vars(batch)))
    if settings.target is not None:
        found.update(_of_file(settings.target))
    for option, code in (("--model", settings.spec), ("--loss", settings.loss)):
        found.update(_of_code(code, option))
    return found.hexdigest()


def key_of(checkpoint: Checkpoint, settings_digest: str) -> str:
    """Under which the result of a checkpoint is kept: of its content, whatever its name.

    Args:
        checkpoint: a file, or a model.
        settings_digest: of `digest_of_settings`.

    Raises:
        FileError: the file cannot be read.
    """
    found = hashlib.sha256(settings_digest.encode())
    if checkpoint.path is not None:
        found.update(_of_file(checkpoint.path))
    else:
        assert checkpoint.model is not None
        found.update(_of_module(checkpoint.model))
    return found.hexdigest()[:32]


def _of_file(path: Path) -> bytes:
    """Of the bytes of a file, read in pieces; of the files of a folder."""
    found = hashlib.sha256()
    try:
        if path.is_dir():
            for one in sorted(path.iterdir()):
                found.update(one.name.encode() + (_of_file(one) if one.is_file() else b""))
            return found.digest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    return found.digest()


def _of_values(value: Any) -> bytes:
    """Of tensors and plain values, however they are nested."""
    found = hashlib.sha256(type(value).__name__.encode())
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(plain.numpy().tobytes())
    elif isinstance(value, dict):
        for name, part in value.items():
            found.update(str(name).encode() + _of_values(part))
    elif isinstance(value, list | tuple):
        for part in value:
            found.update(_of_values(part))
    else:
        found.update(repr(value).encode())
    return found.digest()


def _of_module(model: nn.Module) -> bytes:
    """Of a model: its numbers, its parts and the mode it is in."""
    parts = [(name, part.training, part.extra_repr()) for name, part in model.named_modules()]
    return _of_values(dict(model.state_dict())) + repr(parts).encode() + _of_code(type(model), "")


def _of_code(code: object, option: str) -> bytes:
    """Of a class or function, by name or as it is, with the file it stands in."""
    if code is None:
        return b"none"
    if isinstance(code, nn.Module):
        return _of_module(code)
    if isinstance(code, str):
        path = loading.source_of(code, option) if ":" in code else None
        known = path is not None and path.is_file()
        return code.encode() + (_of_file(path) if path is not None and known else b"")
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(code).encode()  # type: ignore[arg-type]
    return repr(code).encode()


# ------------------------------------------------------------------------------------- the folder


class SweepFolder:
    """Where the results of a sweep, or of one shard of it, are.

    Args:
        folder: it is made.
        shard: which of how many, counted from 1.
        resume: go on with what is there.
        force: throw away what an earlier sweep left there.

    Raises:
        FileError: it holds a sweep and neither is given, it holds something else, another sweep is
            writing into it, or it cannot be written.
    """

    def __init__(
        self, folder: Path, shard: tuple[int, int], *, resume: bool = False, force: bool = False
    ) -> None:
        self.folder, self.shard = checked_path(folder), shard
        self._locks: list[int] = []
        try:
            _refuse_strange(folder)
            (folder / SHARDS).mkdir(parents=True, exist_ok=True)
            (folder / RESULTS).mkdir(exist_ok=True)
            for place in (folder, folder / RESULTS, folder / SHARDS):
                clear(place)
            self._lock(folder / SHARDS / ".lock", exclusive=shard == (1, 1))
            self._lock(folder / SHARDS / f".{self._name}.lock", exclusive=True)
            self._begin(resume, force)
        except OSError as error:
            self.close()
            raise FileError(
                f"cannot write the sweep to {folder}: {error.strerror or error}; give another folder"
            ) from error
        except FileError:
            self.close()
            raise

    @property
    def _name(self) -> str:
        return f"{self.shard[0]}-of-{self.shard[1]}"

    def _begin(self, resume: bool, force: bool) -> None:
        there = self._there()
        if there and not (resume or force):
            raise FileError(
                f"{self.folder} holds a sweep already; add --resume (resume=True) to go on with it, which "
                "computes only what is new, --force (force=True) to throw it away, or give another folder"
            )
        if there and force and not resume:
            if self.shard == (1, 1):
                for place in (RESULTS, SHARDS):
                    shutil.rmtree(self.folder / place)
                    (self.folder / place).mkdir()
                (self.folder / HISTORY_FILE).unlink(missing_ok=True)
            else:
                raise FileError(
                    f"a shard cannot throw away {self.folder}, where others write; remove the folder first"
                )

    def _there(self) -> bool:
        """Whether this shard, or a sweep of other shards, left something."""
        known = [path.stem for path in (self.folder / SHARDS).glob("*.json")]
        if self.shard == (1, 1):
            return bool(known) or any((self.folder / RESULTS).glob("*.jsonl"))
        return self._name in known or any(not one.endswith(f"-of-{self.shard[1]}") for one in known)

    def _lock(self, path: Path, *, exclusive: bool) -> None:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # which waits at no pipe
        self._locks.append(opened)
        if claim(opened, shared=not exclusive) is False:
            raise FileError(
                f"another sweep is writing into {self.folder}; wait until it has ended, give another "
                "folder, or share the work with --shard i/n"
            )

    def path_of(self, key: str) -> Path:
        """The file of a result."""
        return self.folder / RESULTS / f"{key}.jsonl"

    def holds(self, key: str, name: str) -> bool:
        """Whether there is a result, whole; the sentence of a failure is of one name only."""
        facts = row_facts(self.path_of(key))
        return facts is not None and (not facts.failed or facts.name == name)

    def keep(self, key: str, text: str) -> None:
        """Write a result.

        Raises:
            FileError: it cannot be written, which no checkpoint is to blame for.
        """
        try:
            with whole_file(self.path_of(key)) as file:
                file.write(text)
        except FileError as error:
            cause = error.__cause__
            full = isinstance(cause, OSError) and cause.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EFBIG,
            )
            why = getattr(cause, "strerror", None) or error
            advice = "make room" if full else f"see what stands at {RESULTS}/{key}.jsonl"
            raise FileError(
                f"cannot write the sweep to {self.folder}: {why}; what was measured "
                f"before is kept: {advice}, and go on with --resume"
            ) from error

    def keep_failure(self, key: str, name: str, outcome: Outcome) -> None:
        """Write why there is no result."""
        trained = None if outcome.trained is None else vars(outcome.trained)
        self.keep(key, row_text(None, {}, name=name, failed=outcome.failed, trained=trained))

    def list_entries(self, entries: Iterable[Entry], asked: dict[str, Any]) -> None:
        """Write what this shard was asked for, and what came of it."""
        content = asked | {"shard": list(self.shard), "entries": [asdict(one) for one in entries]}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        with whole_file(self.folder / SHARDS / f"{self._name}.json") as file:
            file.write(text + "\n")

    def close(self) -> None:
        """Let others write."""
        for opened in self._locks:
            os.close(opened)
        self._locks.clear()


def _refuse_strange(folder: Path) -> None:
    """A folder that holds something else than a sweep is left alone."""
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file, and a sweep needs a folder; give another name")
    if not folder.exists():
        return
    ours = {RESULTS, SHARDS, HISTORY_FILE, "report"}
    names = [path.name for path in folder.iterdir() if not is_left(path.name)]
    strange = sorted(name for name in names if name not in ours)
    if strange or (names and not (folder / SHARDS).is_dir()):
        held = ", ".join(strange[:3]) or "no sweep"
        raise FileError(
            f"{folder} is not the folder of a sweep (it holds {held}) and is left alone; give another"
        )


@dataclass(frozen=True)
class ShardList:
    """What one shard was asked for."""

    shard: tuple[int, int]  # which of how many
    settings: str  # the digest of its settings
    asked: dict[str, Any]  # how it was asked
    entries: list[Entry]  # its checkpoints


def read_shards(folder: Path) -> list[ShardList]:
    """The lists of all shards that began, in their order.

    Raises:
        FileError: there is none, or one cannot be read.
    """
    found = []
    for path in (folder / SHARDS).glob("*.json"):
        try:
            found.append(_shard_list(path.name, loading.read_json(path)))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise FileError(
                f"{path} is not the list of a shard, or damaged; sweep that shard again with --resume, or "
                "remove it"
            ) from error
    if not found:
        raise FileError(
            f"{folder} is not the folder of a sweep; give the one that was given to gradflow sweep as -o"
        )
    return sorted(found, key=lambda one: one.shard)


def _shard_list(name: str, content: Any) -> ShardList:
    """What a file of this name holds; ValueError, LookupError or TypeError where that is no list."""
    number, count = content["shard"]
    entries = [plain_record(Entry, one) for one in content["entries"]]
    whole = type(number) is int and type(count) is int and 1 <= number <= count
    keys = all(re.fullmatch("([0-9a-f]{32})?", one.key) for one in entries)  # no path elsewhere
    if not (whole and keys and entries) or name != f"{number}-of-{count}.json":
        raise ValueError("not as a sweep writes it")
    words = ("kind", "preset", "model", "batches", "seed", "gradflow", "torch", "settings")
    asked = {word: plain_value(content[word]) for word in words}
    if not all(type(asked[word]) is str for word in ("settings", "preset", "gradflow", "torch")):
        raise TypeError("settings of another type")
    return ShardList((number, count), asked["settings"], asked, entries)
