"""`watch`: one line in a training script, and some of its steps are measured."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow._version import __version__
from gradflow.distributed import AllProcesses, ApartError, is_shared_out, world
from gradflow.errors import FileError, GradflowError, InputError, StopTraining, warn
from gradflow.history import History, Note, Probe, Writer
from gradflow.history.tags import Target
from gradflow.hooks.ancestry import title_of
from gradflow.hooks.guard import Point, briefly, guarded
from gradflow.hooks.lengths import Lengths
from gradflow.hooks.observe import gathered
from gradflow.hooks.stepwise import Stepwise
from gradflow.limits import CLIPPED, WATCH_FAILURES, WATCH_FIGURES, WATCH_FRAMES, WATCH_UNSEEN
from gradflow.recording import Recording
from gradflow.watching.alerts import Alerts, Event, notes_of, read_rules
from gradflow.watching.asked import WatchArguments, checked
from gradflow.watching.gradnorms import GradNorms
from gradflow.watching.probing import (
    MeasuredUpdate,
    all_gone,
    joined,
    layer_lengths,
    lengths_of,
    ready,
    seen,
)
from gradflow.watching.schedule import Schedule
from gradflow.watching.targets import scalars_of, targets_of
from gradflow.watching.updates import GradientMarks, Hooks, ModelOptimizer, scaler_above, trains

_watched: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


def watch(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: Any = None,
    every: int = 100,
    budget: float | None = 0.02,
    preset: str = "rate",
    layers: str | list[str] | None = None,
    lengths: Lengths = None,
    scaler: Any = None,
    to: Any = None,
    on: Any = None,
    resume: bool = False,
    force: bool = False,
    gather: bool = False,
) -> Watch:
    """Measure some of a model's training steps from now on, and write them into a folder.

    The training is bit for bit what it is without: the same weights, the same random numbers. Between
    two probes a forward hook on the model and one on the optimizer remain. Where something cannot be
    watched, a warning says so and the training goes on.

    Args:
        model: the module that the training loop calls; its layers are found as by `gradflow.record`.
        folder: of the run, which gets ``history.jsonl``; `gradflow.load` reads it, also meanwhile.
        optimizer: whose steps are counted; by default the first that updates the model. Probes are
            made at its steps, of the gradients that all backwards since the one before brought.
        every: the fewest steps between two probes.
        budget: the share of the wall time that probes may take: where they are dear they come more
            rarely. None or 1 for no limit. The first step is probed in any case.
        preset: "pulse" (gradients, gates, norms, NaN), "rate" (also rate, horizon and verdict, from
            at most 16 sequences) or "full" (what `gradflow.analyze` gives, saved beside the history).
        layers: names or globs of the layers to keep; all by default.
        lengths: (B,) real steps of padded sequences, or a callable of a layer's input, as of `record`.
        scaler: the GradScaler whose scale multiplies the loss; by default the one that is used.
        to: a callable ``(step, scalars, figures)``, or a writer that `gradflow.integrations` knows, or a
            list of them: they get the numbers of each probe.
        on: rules as of ``--fail-on`` ("vanishing,nan,horizon<20"), a callable of an `Event`, or a list
            of both: called once when a rule becomes true of a layer and once when it ends. By default
            a change of verdict that lasted three probes is warned of. `StopTraining` raised in it ends
            the training.
        resume: go on behind the history that is there.
        force: throw that away.
        gather: of a model that several processes train: measure the sequences of all, and the mean of
            their losses; see `gradflow.distributed`. By default only the first process is measured.

    Returns:
        A `Watch`, which need not be kept; ``watch.history`` is what was measured so far.

    Raises:
        StopTraining: never here; a callable of yours may raise it later.

    >>> import tempfile, torch, gradflow
    >>> model = torch.nn.GRU(3, 8)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     watch = gradflow.watch(model, f"{folder}/a", every=2, budget=None)
    ...     for _ in range(4):
    ...         model(torch.randn(20, 4, 3))[0][-1].square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     watch.close()
    ...     history = gradflow.load(f"{folder}/a")
    >>> history.steps.tolist(), history["l0"]["verdict"].values.tolist()
    ([1, 3], ['vanishing', 'vanishing'])
    """
    made, processes = Watch(), None
    try:
        processes = AllProcesses(gather)
        asked = checked(model, folder, optimizer, every, budget, preset, layers, lengths, scaler)
        begun = read_rules(on), targets_of(to), processes
        made._begin(model, asked, *begun, resume=resume, force=force)
    except GradflowError as error:
        if processes is not None:
            processes.leave(f"does not watch: {error}")
        warn(f"{error}; this training is not watched", stacklevel=2)
    return made


class Watch:
    """What `gradflow.watch` gives: the history so far, and ways to say where a step or the run ends.

    >>> import tempfile, torch, gradflow
    >>> model = torch.nn.GRU(3, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     watch = gradflow.watch(model, f"{folder}/a")
    ...     with watch.step():                         # no optimizer is needed then
    ...         model(torch.randn(20, 4, 3))[0][-1].square().mean().backward()
    ...     watch.close()
    ...     len(watch.history)
    1
    """

    def __init__(self) -> None:
        self._on = False
        self._folder: Path | None = None
        self._done = 0  # updates that are over
        self._open: Stepwise | None = None
        self._backwards = 0  # of the probe that is open
        self._before: GradNorms | None = None  # before clipping, of the last backward
        self._after: GradNorms | None = None  # as the optimizer read them
        self._optimizer: Optimizer | None = None  # that stepped inside a block

    def _begin(
        self,
        model: nn.Module,
        asked: WatchArguments,
        alerts: Alerts,
        targets: list[Target],
        processes: AllProcesses,
        *,
        resume: bool,
        force: bool,
    ) -> None:
        """Open the file and hook the model."""
        other = _watched.get(model)
        if other is not None and other._on:
            raise InputError(
                f"the model must be watched once, it is watched already, into {other._folder}; close "
                "that watch first"
            )
        self._asked, self._alerts, self._targets = asked, alerts, targets
        self._processes = processes
        header = {
            "title": title_of(model),
            "preset": asked.preset,
            "every": asked.every,
            "budget": asked.budget,
            "gradflow": __version__,
            "torch": str(torch.__version__),
            "started": time.time(),
            "processes": processes.size,
        }
        rank, size = world()
        if rank and processes.size == 1:  # another process writes
            return
        self._open_file(resume=resume, force=force, first=rank == 0, header=header)
        self._model, self._process = weakref.ref(model), os.getpid()
        self._schedule = Schedule(asked.every, asked.budget)
        self._owner = ModelOptimizer(model, asked.optimizer)
        self._seen_optimizer = asked.optimizer is not None
        self._forwards = self._failures = self._probes = self._unseen = 0
        self._in_closure = self._in_block = False
        self._scaler = asked.scaler
        self._late = 1.0  # a scale that is still to be divided out
        self._timed = math.nan  # when the forward of a step that is to be timed began
        self._loss: Any = None  # told by the user
        self._said: set[str] = set()
        self._begun_with = self._done
        self._hooks = Hooks(self, model, asked.optimizer)
        self._on = True
        _watched[model] = self
        self._finalizer = weakref.finalize(self, _ended, self._writer, targets, processes)
        if self._writer is None:
            return
        if self._done:
            words = f"the run goes on behind step {self._done}"
            self._note(Note(self._done, "resumed", words))
        for words in _words_on_processes(model, size, processes):
            self._note(Note(self._done, "warning", words))

    def _open_file(self, *, resume: bool, force: bool, first: bool, header: dict[str, Any]) -> None:
        """Of several processes the first opens it, and all learn where it stands or why it cannot."""
        asked, why = self._asked, ""
        self._writer: Writer | None = None
        if first:
            try:
                self._writer = Writer(asked.folder, resume=resume, force=force, **header)
                self._folder, self._done = asked.folder, self._writer.last_step
                gone = asked.folder.glob("step-*.nc") if force else ()
                for old in gone:
                    old.unlink()
            except GradflowError as error:
                why = str(error)
        try:
            self._done, why = self._processes.every("the beginning", (self._done, why))[0]
        except ApartError:
            if self._writer is not None:
                self._writer.close()
            raise
        if why:
            raise FileError(why)

    # -- what the hooks call ------------------------------------------------------------------

    def before_forward(self, module: nn.Module) -> None:
        """The root module is called: a probe may begin, or the one that is open end."""
        if self._open is None and self._done + 1 < self._schedule_due():
            return
        self._before_forward(module)

    def _schedule_due(self) -> int:
        return self._schedule.due if self._seen_optimizer or self._in_block else 0

    def _before_forward(self, module: nn.Module) -> None:
        if not self._on or os.getpid() != self._process or not trains(module):
            return
        self._unseen = 0
        if self._open is not None and self._open.recorder.is_cut_short():
            self._discard()
        elif self._open is not None and self._backwards:
            self._end_at_forward(module)
        elif self._open is None and self._forwards and not (self._seen_optimizer or self._in_block):
            self._done += 1  # nobody says where an update ends: each forward is one
        if self._open is None and self._done + 1 >= self._schedule.due:
            self._open_probe(module)
        self._forwards += 1
        if self._open is not None:
            self._open.recorder.own.begin_again()

    def _end_at_forward(self, module: nn.Module) -> None:
        """A forward after a backward: another micro-batch, or another update."""
        opened = self._open
        if opened is None or self._in_block:
            return
        if self._in_closure:
            self._close_probe(None, updated=True)
        elif self._marks.thrown_away or (not self._seen_optimizer and self._marks.moved):
            moved = self._marks.moved and not self._seen_optimizer
            if moved or not self._seen_optimizer:
                self._close_probe(None, updated=True)
                self._done += 1
            elif guarded(Point.PROBE, self._failed, all_gone, opened.recording):
                self._close_probe(None, updated=False)  # an update that a scaler skipped
            else:
                self._discard()

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to step."""
        if not self._on or os.getpid() != self._process or not self._owner.is_models(optimizer):
            return
        if not self._seen_optimizer:
            self._seen_optimizer = True
            if self._open is None:  # forwards were counted so far
                self._done = max(self._done, self._begun_with)
        if self._open is not None:
            self._find_scaler(self._open)
        if self._open is not None and not self._in_block:
            if self._backwards:
                self._close_probe(optimizer, updated=True)
            elif not closure:
                self._discard()
        elif self._open is not None:
            self._optimizer = optimizer
            if not closure:  # else forward and backward are still to come
                self._after_norms(optimizer)
        elif not math.isnan(self._timed):
            self._schedule.plain(time.perf_counter() - self._timed)
            self._timed = math.nan
        if not self._in_block:  # what a closure does is part of the update that begins here
            self._done += self._in_closure + (not closure)
        self._in_closure = closure
        self._unseen += 1
        if self._unseen == WATCH_UNSEEN and not self._forwards:
            _warn(
                f"{WATCH_UNSEEN} updates were made, and the forward of {type(self._model()).__name__} "
                "was never called with gradients on and in training mode, so no step was measured; "
                "give gradflow.watch the module that the training loop calls"
            )

    # -- one probe ----------------------------------------------------------------------------

    def _open_probe(self, module: nn.Module) -> None:
        if not self._is_due(self._done + 1):
            return
        asked = self._asked
        self._began = time.perf_counter()
        self._backwards, self._forwards, self._late = 0, 0, 1.0
        self._before = self._after = self._optimizer = None
        jacobians = False if asked.preset == "pulse" else None
        given = (module, asked.layers, asked.lengths, self._scaler, jacobians, self._reached)
        opened = guarded(Point.PROBE, self._failed, Stepwise, *given)
        if opened is not None:
            self._open = opened
            opened.recorder.processes = self._processes.size
            opened.recorder.thrown_away = lambda: self._marks.thrown_away
            try:
                opened.open()
            except BaseException:  # Ctrl-C: what is half open sees nothing as it is
                self._discard()
                raise

    def _is_due(self, step: int) -> bool:
        """Whether this step is probed; of several processes the first decides for all."""
        due = self._schedule.is_due(step) if self._processes.first else False
        agreed = self._together(("due", step), (due, self._schedule.due))
        if agreed is None:
            return False
        due, self._schedule.due = agreed[0]
        return due

    def _together(self, where: tuple[str, int], brought: Any) -> list[Any] | None:
        """What all processes bring; None where they did not come together, which ends the watching."""
        try:
            return self._processes.every(where, brought)
        except ApartError as error:
            self._stop(str(error))
            return None

    def _reached(self, scale: float) -> None:
        """A backward brought something to the model's parameters."""
        model = self._model()
        if model is None:
            return
        self._backwards += 1
        self._marks = GradientMarks(model)
        self._before = GradNorms(model, scale)

    def _after_norms(self, optimizer: Optimizer) -> None:
        """What the optimizer reads: unscaled and clipped, unless it unscales by itself."""
        model = self._model()
        if model is None or self._after is not None:
            return
        scale = getattr(optimizer, "grad_scale", None)
        found = GradNorms(model, 1.0 if scale is None else float(scale))
        if found.all > 0 or not self._in_closure:  # else they were zeroed meanwhile
            self._after = found

    def _find_scaler(self, opened: Stepwise) -> None:
        """A scaler whose `scale` was not seen: ``scaler.scale(model(x))`` looks it up before the forward."""
        self._late = 1.0
        if self._scaler is None and opened.recorder.scaler is not None:
            self._scaler = opened.recorder.scaler
        if self._scaler is None:
            self._scaler = scaler_above(WATCH_FRAMES)
            if self._scaler is not None and self._scaler.is_enabled():
                self._late = float(self._scaler.get_scale())

    def _discard(self) -> None:
        """What was recorded belongs to no update of this model."""
        if self._open is not None:
            self._open.put_back()
            self._open = None
            self._schedule.lost(self._done, time.perf_counter() - self._began)

    def _close_probe(self, optimizer: Optimizer | None, *, updated: bool) -> None:
        """Measure what was recorded, write it down, and tell whoever asked."""
        if self._open is not None and self._open.recorder.is_cut_short():
            self._discard()
        opened = self._open
        if opened is None:
            return
        arrived = time.perf_counter()
        try:
            self._open = None
            made = self._measured(opened, optimizer, updated)
        finally:
            opened.put_back()
        if not self._on:
            return
        step, ends = self._done + 1, None
        if self._processes.first:
            ends = self._take(made, step, arrived)
        self._agree(step, ends)
        self._timed = math.nan

    def _take(
        self, made: tuple[Probe, MeasuredUpdate] | None, step: int, arrived: float
    ) -> StopTraining | None:
        """Write a probe down and tell of it, in the process that does; what ends the training, if any."""
        now = time.perf_counter()
        if made is None:
            self._schedule.lost(step, now - self._began)
            self._schedule.due = step + self._asked.every
            self._failures += 1
            if self._failures >= WATCH_FAILURES:
                self._stop(f"{WATCH_FAILURES} probes in a row failed")
            return None
        self._failures = 0
        probe, measured = made
        alerts = self._alerts.copied()  # a probe that Ctrl-C keeps from being written is made again
        events = alerts.after(step, measured)
        cost = self._schedule.probed(step, now - self._began, arrived - self._began)
        self._write(self._whole(probe, measured, events, cost), measured)
        self._alerts = alerts
        try:
            self._tell(probe, events)
        except StopTraining as error:
            return error
        return None

    def _agree(self, step: int, ends: StopTraining | None) -> None:
        """All processes go on, or stop, as the one that writes says."""
        said = self._together(("told", step), (self._on, self._schedule.due, ends))
        if ends is None and said is not None:
            on, self._schedule.due, ends = said[0]
            if not on and self._on:
                self._leave()
        if ends is not None:
            raise ends

    def _measured(
        self, opened: Stepwise, optimizer: Optimizer | None, updated: bool
    ) -> tuple[Probe, MeasuredUpdate] | None:
        """All numbers of the update; of several processes in the first one alone."""
        failed: list[str] = []
        with torch.no_grad():
            known = guarded(Point.PROBE, failed.append, self._ready, opened, optimizer)
            steps = None if known is None else layer_lengths(known)
            parts = self._together(("lengths", self._done + 1), steps)
            if parts is None:
                return None
            if not any(parts) and None not in parts:
                self._stop(opened.recording.empty_reason)
                return None
            mine, rank, preset = None, self._processes.rank, self._asked.preset
            if preset == "full":  # the recording is that of all processes already
                parts, rank = parts[:1], 0
            sees = preset != "full" or self._processes.first
            if known is not None and None not in parts and sees:
                lengths = lengths_of(parts)
                mine = guarded(Point.PROBE, failed.append, seen, known, preset, lengths, rank)
            brought = (mine, self._before, self._after, self._told_loss(opened), failed)
            try:
                every = self._processes.every(("seen", self._done + 1), brought, at_first=True)
            except ApartError as error:
                self._stop(str(error))
                return None
        if not every:
            return None
        why = next((one[4][0] for one in every if one[4]), "")
        if why:
            self._failed(why)
            return None
        return guarded(Point.PROBE, self._failed, self._joined, every, optimizer, updated)

    def _ready(self, opened: Stepwise, optimizer: Optimizer | None) -> Recording:
        """The recording of this process, with full that of all."""
        sentences = opened.close()
        if optimizer is not None:
            self._after_norms(optimizer)
        if self._asked.preset == "full" and self._processes.size > 1:
            sentences += gathered(opened.recording, self._processes)
        self._new_warnings(sentences)
        opened.recording.notes = []
        return ready(opened.recording) if len(opened.recording) else opened.recording

    def _told_loss(self, opened: Stepwise) -> float:
        """What this process brings to the loss."""
        if self._loss is None:
            return opened.recorder.loss / self._late
        return _as_number(self._loss) / self._processes.size

    def _joined(
        self, every: list[Any], optimizer: Optimizer | None, updated: bool
    ) -> tuple[Probe, MeasuredUpdate]:
        """The numbers of the update from what each process brought."""
        parts = [one[0] for one in every if one[0] is not None]
        measured = joined(parts)
        before, after = (_of_whole([one[place] for one in every]) for place in (1, 2))
        layers, decades = dict(measured.layers), math.log10(self._late)
        if before is not None and self._late != 1:
            before = before.divided(self._late)
        for name, layer in layers.items():
            for level in ("level", "level_h"):
                if level in layer.values:
                    layer.values[level] -= decades
            if before is not None and not before.knows(name):
                self._new_warnings([_without_norms(name)])
            if before is not None and after is not None:
                layer.values["grad_norm"] = before.of_layer(name)
                layer.values["grad_norm_clipped"] = after.of_layer(name)
        values = {
            "loss": sum(one[3] for one in every),
            "grad_norm_all": math.nan if before is None else before.all,
            "grad_norm_all_clipped": math.nan if after is None else after.all,
            "clipped": _clipped(before, after),
            "scale": math.nan if before is None else before.scale,
            "updated": float(updated),
            "forwards": float(self._forwards),
            "step_seconds": self._schedule.step_seconds,
        }
        rates = () if optimizer is None else tuple(float(g["lr"]) for g in optimizer.param_groups)
        return Probe(self._done + 1, values, layers, rates), measured

    def _whole(
        self, probe: Probe, measured: MeasuredUpdate, events: list[Event], cost: float
    ) -> Probe:
        """The probe with what is known when it is over."""
        notes = notes_of(events)
        words = self._schedule.words()
        if words:
            notes.append(Note(probe.step, "interval", words))
        for sentence in measured.notes:
            if sentence not in self._said:
                self._said.add(sentence)
                notes.append(Note(probe.step, "warning", sentence))
        ends = {
            "probe_seconds": cost,
            "interval": float(self._schedule.interval),
            "time": time.time(),
        }
        probe.values.update(ends)
        return Probe(probe.step, probe.values, probe.layers, probe.learning_rates, tuple(notes))

    def _write(self, probe: Probe, measured: MeasuredUpdate) -> None:
        if self._writer is None:
            return
        try:
            self._writer.probe(probe, measured.cells)
            if measured.analysis is not None and self._folder is not None:
                measured.analysis.save(self._folder / f"step-{probe.step}.nc")
        except (OSError, FileError) as error:
            self._stop(f"the history could not be written ({briefly(error)})")

    def _note(self, note: Note) -> None:
        if self._writer is None:
            return
        try:
            self._writer.note(note)
        except OSError as error:
            self._stop(f"the history could not be written ({briefly(error)})")

    # -- who is told --------------------------------------------------------------------------

    def _tell(self, probe: Probe, events: list[Event]) -> None:
        """The callables of the user, each on its own: what they raise ends nothing but them."""
        if not self._alerts.callbacks:
            for event in events:
                if event.holds:
                    _warn(f"step {event.step}: {event.sentence}")
        scalars = scalars_of(probe) if self._targets else {}
        figures = self._figures() if self._probes % WATCH_FIGURES == 0 else {}
        self._probes += 1
        for target in list(self._targets):
            self._asks(target, self._targets, probe.step, dict(scalars), dict(figures))
        for event in events:
            for callback in list(self._alerts.callbacks):
                self._asks(callback, self._alerts.callbacks, event)

    def _figures(self) -> dict[str, Callable[[], Any]]:
        folder = self._folder

        def waterfall() -> Any:
            from gradflow.runs import load
            from gradflow.workflow import plot

            return plot(load(folder))  # type: ignore[arg-type]

        return {"gradflow/waterfall": waterfall}

    def _asks(self, target: Callable[..., object], some: list[Any], *args: Any) -> None:
        try:
            target(*args)
        except StopTraining:
            raise
        except Exception as error:  # noqa: BLE001  the user's own code, which must not end the training
            some.remove(target)
            name = getattr(target, "__name__", type(target).__name__)
            said = f"{name}, given to gradflow.watch, raised {briefly(error)}"
            said = str(error) if isinstance(error, InputError) else said
            _warn(f"{said}; it is left out from now on")

    def _failed(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            _warn(f"step {self._done + 1}: {why}; the training goes on")
            self._note(Note(self._done + 1, "failed", why))

    def _new_warnings(self, sentences: list[str]) -> None:
        for sentence in sentences:
            if sentence not in self._said:
                self._said.add(sentence)
                self._note(Note(self._done + 1, "warning", sentence))

    def _stop(self, why: str) -> None:
        if self._on:
            if self._writer is not None:
                with contextlib.suppress(OSError):  # that is perhaps why
                    self._writer.note(Note(self._done + 1, "failed", f"the watching ended: {why}"))
            self._leave()
            _warn(f"gradflow.watch ends at step {self._done + 1}: {why}; the training goes on")

    # -- the user's side ----------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, loss: Any = None) -> Iterator[Watch]:
        """Say where one training step begins and ends; nobody has to.

        Args:
            loss: the step's loss, a number, a tensor or a callable that gives one at the end of the
                block; by default what the backwards began from.

        Returns:
            A context manager that gives this watch. What runs inside is one update, whatever
            optimizers step, and none need.

        >>> import tempfile, torch, gradflow
        >>> model = torch.nn.GRU(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     watch = gradflow.watch(model, f"{folder}/a")
        ...     with watch.step(loss=0.5):
        ...         model(torch.randn(20, 4, 3))[0].sum().backward()
        ...     watch.close()
        ...     watch.history.data["loss"].item()
        0.5
        """
        if not self._on:
            yield self
            return
        if self._open is not None:
            self._discard()
        self._in_block, self._loss, whole = True, loss, False
        try:
            yield self
            whole = True
        finally:
            self._in_block = False
            if self._on and not whole:
                self._discard()
            elif self._on:
                try:
                    if self._open is not None and self._backwards:
                        self._close_probe(self._optimizer, updated=True)
                    self._discard()
                finally:
                    self._done += 1
            self._loss = None

    def begin_at(self, step: int) -> None:
        """Say how many updates were made before this watch, where training goes on from a checkpoint.

        Args:
            step: updates so far; fewer than are counted already say nothing.

        >>> import tempfile, torch, gradflow
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     watch = gradflow.watch(torch.nn.GRU(3, 8), f"{folder}/a")
        ...     watch.begin_at(1000)
        ...     watch.close()
        ...     repr(watch).rpartition(", ")[2]
        '1000 updates so far'
        """
        if self._open is None:
            self._done = max(self._done, step)

    @property
    def history(self) -> History:
        """What was measured so far, as `gradflow.load` reads it from the folder."""
        if self._folder is None:
            return History.of("", [])
        return History.read(self._folder)

    def close(self) -> None:
        """End the watching: the model and the optimizer are as they were.

        >>> import tempfile, torch, gradflow
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     watch = gradflow.watch(torch.nn.GRU(3, 8), f"{folder}/a")
        ...     watch.close()
        ...     watch.history.ended
        True
        """
        if self._on:
            self._leave()

    def _leave(self) -> None:
        self._on = False
        self._discard()
        self._hooks.remove()
        self._finalizer()

    def __repr__(self) -> str:
        if self._folder is None:
            return "Watch: nothing is watched"
        state = "on" if self._on else "ended"
        return f"Watch into {self._folder}, {state}, {self._done} updates so far"


def _ended(writer: Writer | None, targets: list[Target], processes: AllProcesses) -> None:
    """The watching is over, by `close` or with the process."""
    processes.leave("has ended its watch, which gather=True needs in every process")
    if writer is not None:
        writer.close()
    for target in targets:
        close = getattr(target, "close", None)
        if callable(close):
            close()


def _warn(sentence: str) -> None:
    """Warn at the line of the training that is under way, whatever lies between it and here."""
    between, level = ("torch", "gradflow", "contextlib"), 2
    frame = sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in between:
        frame, level = frame.f_back, level + 1
    warn(sentence, stacklevel=level)


def _as_number(loss: Any) -> float:
    """A loss that was told, NaN where it is no number."""
    value = loss() if callable(loss) and not isinstance(loss, Tensor) else loss
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _clipped(before: GradNorms | None, after: GradNorms | None) -> float:
    """Whether the optimizer read smaller gradients than the backward left; NaN where not known."""
    if before is None or after is None or not math.isfinite(before.all + after.all):
        return math.nan
    return float(after.all < (1 - CLIPPED) * before.all)


def _of_whole(parts: list[GradNorms | None]) -> GradNorms | None:
    """Norms of whole parameters, where all processes that hold parts of them have brought theirs."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    return GradNorms.together(known) if len(known) == world()[1] else known[0]


def _without_norms(layer: str) -> str:
    return (
        f"norms of the parameter gradients of {layer} are not given: which weights its steps use is not "
        "known; those of all parameters hold them"
    )


def _words_on_processes(model: nn.Module, size: int, processes: AllProcesses) -> list[str]:
    """What to know of the numbers of several processes that train one model."""
    if size == 1:
        return []
    if processes.size > 1:
        return [
            f"of {size} processes that train together all are measured: sequences are those of all of "
            "them, the loss and its gradients are those of the mean of their losses"
        ]
    found = [
        f"of {size} processes that train together only rank 0 is measured: totals are of its own "
        "sequences, norms of parameter gradients of what the ranks make of them together; "
        "gather=True measures all"
    ]
    if any(map(is_shared_out, nn.Module.parameters(model))):
        found.append(
            "norms of parameter gradients are not known: each process holds a part of every parameter "
            "(fully_shard), and only rank 0 is measured; gather=True puts the parts together"
        )
    return found
