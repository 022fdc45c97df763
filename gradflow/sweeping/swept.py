"""`gradflow.sweep`: many checkpoints, each measured once, wherever there is a process for it."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradflow import loading
from gradflow._version import __version__
from gradflow.errors import FileError, InputError, must_be
from gradflow.history import History
from gradflow.limits import SWEEP_CHANGES
from gradflow.passes import check_options
from gradflow.sweeping.checkpoints import (
    VERSIONS,
    Checkpoint,
    CheckpointTask,
    Outcome,
    SweepSettings,
    checkpoints,
    state_of,
)
from gradflow.sweeping.engines import Engine, InProcess, Running, dask, of_caller, spawned
from gradflow.sweeping.result_files import (
    Entry,
    SweepFolder,
    digest_of_settings,
    key_of,
    read_shards,
)
from gradflow.sweeping.rows import joined
from gradflow.watching.asked import PRESETS

Progress = Callable[[str, float], None]


def sweep(
    paths_or_models: object,
    *,
    model: str | Callable[[], nn.Module] | nn.Module | None = None,
    batch: object = None,
    executor: Executor | None = None,
    preset: str = "rate",
    loss: str | Callable[..., Tensor] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    trust: bool = False,
) -> History:
    """Measure many checkpoints: when did it start, which seeds suffer, does width help?

    One row per checkpoint, of the runs one after the other, each by rising training step. That is read from
    the checkpoint (``step``, ``global_step``, ``iteration`` or ``epoch``), else from the digits of its name;
    ``history.data["step_from"]`` says which. A run is the folder of a checkpoint. A checkpoint that cannot be
    measured is a row without numbers and a sentence in ``history.data["failed"]``.

    Args:
        paths_or_models: a path, a pattern such as ``"runs/**/*.pt"``, a folder, or a list of them; or models,
            in a list or in a mapping of names such as ``"seed=0/step-100"``.
        model: what the files hold the weights of: ``"pkg.mod:Net(10, 20)"``, a class or function that
            returns the model, or a model.
        batch: what the model runs on: a path, a folder or pattern of several, an array, a pair (x, y), a
            mapping, or a list of mappings or paths. Of several batches gain and rate are means over batches,
            and intervals are over batches. Without one the weights are tried under several probes.
        executor: any `concurrent.futures.Executor`, also dask's, ``Client(...).get_executor()``; by default
            as many processes as there are cores, which needs ``if __name__ == "__main__":`` in a script.
            Models are measured in this process then.
        preset: what is measured of a layer: "pulse", "rate" or "full", as in `gradflow.watch`.
        loss: takes (output, target), or a name as of ``--loss``.
        folder: where results go; a sweep that was killed goes on from there. By default none are kept.
        resume: go on with what is in the folder.
        trust: open full pickles, which may run code from the files.

    Returns:
        The history; ``.runs`` has each run by its name.

    Raises:
        FileError: no file matches, or the folder is not to be written into.
        InputError: an argument is out of its range.

    >>> import torch, gradflow
    >>> models = {f"seed={n}/step-{step}": torch.nn.GRU(3, 8) for n in (0, 1) for step in (0, 100)}
    >>> history = gradflow.sweep(models, batch=torch.randn(20, 4, 3))
    >>> history.data["run"].values.tolist(), history.steps.tolist()
    (['seed=0', 'seed=0', 'seed=1', 'seed=1'], [0, 100, 0, 100])
    """
    if preset not in PRESETS:
        expected = f"one of {', '.join(PRESETS)}"
        raise InputError(must_be("preset", expected, repr(preset), "leave it out for rate"))
    settings = SweepSettings(
        spec=model, batches=batches_of(batch), loss=loss, preset=preset, trust=trust
    )
    place, found = None if folder is None else Path(folder), checkpoints(paths_or_models)
    return run_sweep(SweepRequest(found, settings, place, resume=resume, executor=executor))


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep was asked for."""

    checkpoints: list[Checkpoint]  # all of them, also those of other shards
    settings: SweepSettings  # how each is measured
    folder: Path | None = None  # for the results; None: they are not kept
    resume: bool = False  # go on with what is there
    force: bool = False  # throw away what is there
    shard: tuple[int, int] = (1, 1)  # which of how many
    executor: Executor | None = None  # of the caller's
    dask: str | None = None  # address of a scheduler, or "local"
    jobs: int | None = None  # processes; None: one a core

    @property
    def mine(self) -> list[Checkpoint]:
        """The checkpoints of this shard."""
        number, count = self.shard
        return self.checkpoints[number - 1 :: count]

    @property
    def processes(self) -> int:
        """As many as are of use."""
        allowed = getattr(os, "sched_getaffinity", None)  # not on every system
        cores = self.jobs or (len(allowed(0)) if allowed else os.cpu_count() or 1)
        return max(1, min(cores, len(self.mine)))


def sweep_request(
    paths: Sequence[str],
    folder: Path | None,
    *,
    input: str | os.PathLike[str] | None = None,
    seq_len: int | None = None,
    batch: int | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
    force: bool = False,
    jobs: int | None = None,
    dask: str | None = None,
    target: Path | None = None,
    **settings: Any,
) -> SweepRequest:
    """What `gradflow sweep` was asked for; ``settings`` are the others of `SweepSettings`.

    Raises:
        InputError: options do not go together.
        FileError: no file matches.
    """
    if not paths:
        raise InputError("sweep needs checkpoints, got none; type: gradflow sweep 'runs/**/*.pt'")
    of_batch = {name: settings.get(name) for name in ("loss", "output", "train")}
    check_options(input, seq_len=seq_len, batch=batch, target=target, **of_batch)
    if dask is not None and jobs is not None and dask != "local":
        raise InputError("--jobs is for this machine, and --dask has its own workers; leave it out")
    if resume and force:
        raise InputError("--resume goes on with a sweep, --force throws it away; give one of them")
    whole = SweepSettings(batches=batches_of(input, target), target=target, **settings)
    whole = replace(whole, probe_steps=seq_len or 100, probe_batch=batch)
    return SweepRequest(
        checkpoints(list(paths)),
        whole,
        folder,
        resume=resume,
        force=force,
        shard=shard,
        dask=dask,
        jobs=jobs,
    )


def batches_of(given: object, target: Path | None = None) -> tuple[Path | loading.Batch, ...]:
    """The batches that a sweep runs its models on.

    Args:
        given: as ``batch`` of `sweep`; None for none.
        target: the targets of a batch in a file of their own.

    Raises:
        FileError: no file matches.
        InputError: something is no batch.
    """
    if given is None:
        return ()
    if isinstance(given, loading.Batch):
        return (given,)
    if isinstance(given, str | os.PathLike):
        return tuple(loading.batch_files(given, target))
    several = (
        isinstance(given, list) and given and not all(isinstance(one, Tensor) for one in given)
    )
    if several and all(isinstance(one, str | os.PathLike | Mapping | tuple) for one in given):  # type: ignore[attr-defined]
        return tuple(part for one in given for part in batches_of(one))  # type: ignore[attr-defined]
    return (loading.as_batch(given),)


def run_sweep(request: SweepRequest, progress: Progress | None = None) -> History:
    """Measure what a request asks for: the rows of this shard; a GradflowError as of `sweep`."""
    if not request.mine:
        number, count = request.shard
        raise InputError(
            f"shard {number} of {count} has nothing to do: there are {len(request.checkpoints)} "
            "checkpoints; take fewer shards"
        )
    digest = digest_of_settings(request.settings)
    with contextlib.ExitStack() as stack:
        place = request.folder
        if place is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = SweepFolder(place, request.shard, resume=request.resume, force=request.force)
        stack.callback(folder.close)
        work = Sweeping(request, folder, digest, progress)
        work.run()
        entries = [work.entries[one.name] for one in request.mine]
        if request.shard != (1, 1):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        join = joined(place, entries, folder.path_of, work.asked)
        history = History.read(join)
        return history if join.parent == request.folder else history.detached()


def _engine(request: SweepRequest) -> AbstractContextManager[Engine]:
    """What runs the tasks of a request."""
    if request.executor is not None:
        return of_caller(request.executor)
    if request.dask is not None:
        return dask(request.dask, request.processes)
    if request.mine[0].path is None:  # models in memory
        return contextlib.nullcontext(Engine(InProcess(), 1))
    return spawned(request.processes)


@dataclass
class Sweeping:
    """A sweep under way."""

    request: SweepRequest  # what is done
    folder: SweepFolder  # where results go
    digest: str  # of the settings
    progress: Progress | None  # who is told
    entries: dict[str, Entry] = field(default_factory=dict)  # name -> what came of it
    _waiting: dict[str, list[Any]] = field(default_factory=dict)  # key -> names that wait for it
    _changes: dict[str, int] = field(default_factory=dict)  # name -> how often its file changed
    _computed: int = 0  # results that were computed, not found
    _began: float = field(default_factory=time.monotonic)

    @property
    def asked(self) -> dict[str, Any]:
        """How the sweep was asked for, as its files say it."""
        settings = self.request.settings
        names = [
            one.name if isinstance(one, Path) else "a batch in memory" for one in settings.batches
        ]
        model = settings.spec
        return {
            "kind": "sweep",
            "preset": settings.preset,
            "model": model if isinstance(model, str) or model is None else type(model).__name__,
            "batches": names,
            "seed": settings.seed,
            "gradflow": __version__,
            "torch": VERSIONS[1],
            "settings": self.digest,
        }

    def run(self) -> None:
        """Measure all checkpoints of this shard that have no result yet."""
        mine = self.request.mine
        for one in mine:
            self.entries[one.name] = _entry(one)
        missing = iter(self._missing(mine))
        first = next(missing, None)
        if first is not None:  # else no process is started
            with _engine(self.request) as engine:
                self._list()
                Running(engine, self._done, self._tick).run(itertools.chain([first], missing))
        self._list()

    def _list(self) -> None:
        self.folder.list_entries(self.entries.values(), self.asked)

    def _missing(self, mine: Iterable[Checkpoint]) -> Iterator[CheckpointTask]:
        for one in mine:
            task = self._task(one)
            if task is not None:
                yield task

    def _task(self, one: Checkpoint) -> CheckpointTask | None:
        """What is to be computed of a checkpoint; None where its result is there, or on its way."""
        try:
            state = None if one.path is None else state_of(one.path)
            key = key_of(one, self.digest)
        except (OSError, FileError) as error:
            why = (
                f"cannot read {one.path}: {error.strerror}" if isinstance(error, OSError) else error
            )
            self.entries[one.name] = replace(_entry(one), failed=str(why))
            return None
        self.entries[one.name] = replace(_entry(one), key=key)
        if self.folder.holds(key, one.name):
            return None
        waiting = self._waiting.setdefault(key, [])
        waiting.append(one.name)
        if len(waiting) > 1:
            return None
        return CheckpointTask(one.name, one.path, state, one.model, self.request.settings, key)

    def _done(self, task: CheckpointTask, outcome: Outcome, lasting: bool) -> CheckpointTask | None:
        """Keep what came of a task."""
        names = self._waiting.pop(task.key, [task.name])
        if outcome.changed:
            return self._once_more(task, names)
        self._computed += 1
        if outcome.text:
            self.folder.keep(task.key, outcome.text)
        for name in names:
            if not outcome.text:
                self.entries[name] = replace(self.entries[name], failed=outcome.failed)
        if not outcome.text and lasting:
            self.folder.keep_failure(task.key, task.name, outcome)
        self._tick()
        return None

    def _once_more(self, task: CheckpointTask, names: list[str]) -> CheckpointTask | None:
        """A file changed while it was read: it is another one now."""
        by_name = {one.name: one for one in self.request.mine}
        found = None
        for name in names:
            self._changes[name] = self._changes.get(name, 0) + 1
            if self._changes[name] >= SWEEP_CHANGES:
                why = f"{name} changed while it was read; sweep again when its training has ended"
                self.entries[name] = replace(self.entries[name], key="", failed=why)
                continue
            found = self._task(by_name[name]) or found
        return found

    def _tick(self) -> None:
        if self.progress is not None:
            pending = sum(map(len, self._waiting.values()))
            known = sum(1 for one in self.entries.values() if one.key or one.failed) - pending
            self.progress(self._words(known), known / len(self.entries))

    def _words(self, known: int) -> str:
        """How far it is, how fast it goes, how long it may take."""
        said = f"{known} of {len(self.entries)} checkpoints"
        minutes = (time.monotonic() - self._began) / 60
        if not self._computed:
            return said
        pace = self._computed / minutes
        left = (len(self.entries) - known) / pace
        return f"{said}, {pace:.3g} a minute, about {_minutes(left)} left"


def _minutes(minutes: float) -> str:
    """A time in words.

    >>> _minutes(0.4), _minutes(7.2), _minutes(150)
    ('24 s', '8 min', '2.5 h')
    """
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{int(minutes) + 1} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _entry(one: Checkpoint) -> Entry:
    if one.named is None:
        return Entry(one.name, one.run)
    return Entry(one.name, one.run, "", one.named.number, one.named.found, one.named.counts)


def gather(folder: str | os.PathLike[str]) -> History:
    """Join what shards wrote into one history, in the same folder.

    Args:
        folder: that was given to all shards.

    Returns:
        The history; where a shard has not ended, of what there is, with a note.

    Raises:
        FileError: it is not the folder of a sweep, nothing was measured yet, or its shards were swept with
            different settings.
    """
    place = Path(folder)
    shards = read_shards(place)
    first = shards[0]
    for one in shards[1:]:
        if one.settings != first.settings or one.shard[1] != first.shard[1]:
            raise FileError(
                f"shards {first.shard[0]} of {first.shard[1]} and {one.shard[0]} of {one.shard[1]} in "
                f"{place} were swept with different settings or numbers of shards, and are not joined; "
                "sweep them into folders of their own"
            )
    count, there = first.shard[1], {one.shard[0] for one in shards}
    out = [
        str(number) for number in range(1, min(count, len(there) + 3) + 1) if number not in there
    ]
    more = ["…"] * (count > len(there) + len(out))
    absent = (
        f"of {count} shards {', '.join(out + more)} {'has' if len(out) == 1 else 'have'} not begun"
    )
    files = SweepFolder(place, (1, 1), resume=True)
    try:
        entries = list({one.name: one for shard in shards for one in shard.entries}.values())
        history = History.read(
            joined(place, entries, files.path_of, first.asked, absent if out else "")
        )
    finally:
        files.close()
    if not len(history):
        raise FileError(
            f"no shard in {place} has a result yet; wait until one has measured a checkpoint"
        )
    return history
