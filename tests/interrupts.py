"""An exception at a line of gradflow's own that runs in a recorded step, and what it leaves behind.

`python tests/steadiness.py interrupts` goes through every line, the suite through a share of them.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from conftest import torch_is_as_found
from hostile import Everything
from torch import Tensor, nn

import gradflow
from gradflow.hooks import guard, patch

OWN = str(Path(gradflow.__file__).parent)
RECURRENCES = ("fused", "cells", "own", "tap", "scan")
WATCHED = {  # what is watched, and how -> preset
    "watched": "rate",
    "watched own": "pulse",
    "watched in a block": "pulse",
    "watched in full": "full",
}


class Timeout(Exception):
    """What the handler of a signal raises."""


class Stop(BaseException):
    """No `Exception`."""


ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit, Stop, Timeout)


class Model(nn.Module):
    """One kind of recurrence, and a dropout of the user's own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.every = kind, Everything()
        self.head, self.drop = nn.Linear(4, 2), nn.Dropout(0.2)

    def forward(self, x: Tensor, drawn: Callable[[], None]) -> Tensor:
        found = self.states(x, x.new_zeros(2, 4))
        drawn()
        found = self.drop(found)
        drawn()
        return self.head(found)  # type: ignore[no-any-return]

    def states(self, x: Tensor, h: Tensor) -> Any:
        every = self.every
        if self.kind == "fused":
            return every.rnn(x)[0][-1]
        if self.kind == "scan":
            return every.scanned(every.w(torch.cat([x[0], h], 1)), 0.6)[-1]
        cell: Any = {"cells": every.stock, "own": every.cell, "tap": every.tapped}[self.kind]
        for x_t in x:
            h = cell(x_t, h)
        return h


class Trial:
    """A training step of one model that is always the same, perhaps recorded, perhaps interrupted."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(3)
        self.model = Model(kind)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.drawn: list[Tensor] = []  # random numbers after each draw of the step
        self.plain = self.step(recorded=False)[0]
        self.whole_draws = [torch.Generator().manual_seed(5).get_state(), *self.drawn]
        self.step()  # what is done once only
        self.whole = self.step()[1]

    def step(self, *, recorded: bool = True) -> tuple[list[Tensor], Any]:
        """The step: all that could differ, and the recording."""
        self.model.load_state_dict(self.start)
        self.model.zero_grad()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        torch.manual_seed(5)
        self.drawn.clear()

        def drawn() -> None:
            self.drawn.append(torch.get_rng_state())

        x = torch.randn(3, 2, 3)
        drawn()
        block = gradflow.record(self.model) if recorded else nullcontext()
        with block as recording:
            loss = self.model(x, drawn).pow(2).sum()
            scaler.scale(loss).backward()
            optimizer.step()
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        return [loss.detach(), torch.get_rng_state(), *weights], recording

    def forth_and_back(self) -> None:
        """A recorded step without what torch does with exceptions in an optimizer or a state dict."""
        torch.manual_seed(5)
        x = torch.randn(3, 2, 3)
        with gradflow.record(self.model):
            self.model(x, lambda: None).pow(2).sum().backward()

    def around(self) -> dict[str, Any]:
        """All that a step must leave as it was, to be compared."""
        modules = [*self.model.modules()]
        hooks = {
            f"{name} of {type(module).__name__} {number}": len(value)
            for number, module in enumerate(modules)
            for name, value in vars(module).items()
            if name.endswith("_hooks")
        }
        autocast = [torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()]
        torch.autocast_increment_nesting()
        return hooks | {
            "hooks of weights": [len(p._backward_hooks or ()) for p in self.model.parameters()],
            "attributes": [sorted(vars(module)) for module in modules],
            "forwards": [type(module).forward for module in modules],
            "training": [module.training for module in modules],
            "torch's functions": torch_is_as_found(),
            "GradScaler": torch.amp.GradScaler.scale,
            "torch.jit.script": torch.jit.script,
            "gradients are on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "autocast": [*autocast, torch.autocast_decrement_nesting()],
            "__torch_function__": torch._C._get_torch_function_state(),
            "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
            "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False),
            "numpy's random numbers": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "Python's random numbers": random.getstate(),
            "threads": threading.active_count(),
            "filters of warnings": [*warnings.filters],
            "an open recording": patch.is_observed(),
        }

    def left_behind(self, before: dict[str, Any], *, drawn: slice) -> list[str]:
        """What an interrupted step changed, and what goes on otherwise after it.

        Its random numbers are those after one of these draws of a step that is not interrupted.
        """
        after = self.around()
        wrong = [name for name in before if before[name] != after[name]]
        numbers = torch.get_rng_state()
        if not any(torch.equal(numbers, state) for state in self.whole_draws[drawn]):
            wrong.append("torch's random numbers")
        if not free_for_others():
            wrong.append("a lock that is held")
        plain, (recorded, recording) = self.step(recorded=False)[0], self.step()
        wrong += [] if all(map(torch.equal, plain, self.plain)) else ["the next step"]
        wrong += [] if all(map(torch.equal, recorded, self.plain)) else ["the next recorded step"]
        return wrong + ([] if self.is_whole(recording) else ["the next recording"])

    def is_whole(self, recording: gradflow.Recording) -> bool:
        """Whether a recording is what it is where nothing went wrong."""
        whole = self.whole
        return (
            [*recording.tracks] == [*whole.tracks]
            and recording.notes == whole.notes
            and all(torch.equal(recording[n].grad_h, whole[n].grad_h) for n in whole.tracks)
        )


class WatchedTrial(Trial):
    """A training of three steps that `gradflow.watch` follows; the second is perhaps interrupted.

    Whoever trains catches that, and makes the step again if the weights did not move yet.
    """

    def __init__(self, how: str) -> None:
        super().__init__("own" if how.endswith("own") else "fused")
        self.how = how
        self.alone, *_ = self.trained(None)
        self.trained(Lines())  # what is done once only
        self.undisturbed, self.history, _ = self.trained(Lines())

    def trained(self, lines: Lines | None) -> tuple[list[Tensor], Any, BaseException | None]:
        """What the training leaves, its history and what came out of the second step."""
        self.model.load_state_dict(self.start)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(5)
        out: BaseException | None = None
        with tempfile.TemporaryDirectory() as name:
            asked = {"every": 1, "budget": None, "preset": WATCHED[self.how]}
            watch = None if lines is None else gradflow.watch(self.model, name, **asked)
            for number in range(3):
                x = torch.randn(3, 2, 3)
                drawn = torch.get_rng_state()
                with traced(lines) if lines and number == 1 else nullcontext():
                    try:
                        self.one(optimizer, watch, x)
                        continue
                    except BaseException as error:  # noqa: BLE001  any of them is what is asked for
                        out = error
                if not self.updated:
                    torch.set_rng_state(drawn)
                    self.one(optimizer, watch, x)
            history = watch and whole_history(watch)
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        return [torch.get_rng_state(), *weights], history, out

    def one(self, optimizer: Any, watch: Any, x: Tensor) -> None:
        """One step, and its update."""
        self.updated = False
        with watch.step() if watch and self.how.endswith("block") else nullcontext():
            optimizer.zero_grad()
            self.model(x, lambda: None).pow(2).sum().backward()
            optimizer.step()
            self.updated = True


def whole_history(watch: gradflow.Watch) -> dict[Any, Any]:
    """The notes of a history, and what each step shows; of one that is damaged nothing."""
    watch.close()
    history = watch.history
    data = history.data[["loss", "grad_norm_all", "level", "grad_norm", "rate", "gain", "verdict"]]
    found: dict[Any, Any] = {int(step): data.sel(step=step) for step in history.steps}
    found["notes"] = [note for note in history.notes if note.about != "interval"]
    found["layers"] = history.layers
    sound = history.ended and not history.damaged and sorted({*history.steps}) == [*history.steps]
    return found if sound else {}


def interrupted_watch(trial: WatchedTrial, at: int, kind: type[BaseException]) -> list[str]:
    """Interrupt a watched step there; what is wrong after the training."""
    before, error = trial.around(), kind()
    with raising(error) as act:
        lines = Lines(at, act)
        left, history, out = trial.trained(lines)
    wrong = [] if out is error else [f"what came out is {out!r}"]
    del out
    error.__traceback__ = None
    after = trial.around()
    wrong += [name for name in before if before[name] != after[name]]
    wrong += [] if free_for_others() else ["a lock that is held"]
    wrong += [] if not (guard.busy or guard.lenient) else ["gradflow is taken to be at work"]
    wrong += [] if all(map(torch.equal, left, trial.alone)) else ["what the training leaves"]
    whole = trial.history
    wrong += [] if {1, 3} <= {*history} else [f"the history of {[*history]}"]
    wrong += [
        f"what the history has as {name}"
        for name in {*history} - {"notes"}
        if not (
            history[name].equals(whole[name]) if name in (1, 2, 3) else history[name] == whole[name]
        )
    ]
    more = [note for note in history.get("notes", []) if note not in whole["notes"]]
    told = (2, "failed", f"{guard.Point.PROBE.value} ({kind.__name__})")
    wrong += [f"a note: {one}" for one in more if (one.step, one.about, one.text) != told]
    return [f"{lines.where} ({kind.__name__}): {one}" for one in wrong]


def free_for_others() -> bool:
    """Whether another thread can open a recording."""

    def one() -> None:
        with gradflow.record(nn.RNN(1, 1)) as recording:
            recording.empty_reason = "nothing ran, which is not warned of here"
        done.set()

    done = threading.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread = threading.Thread(target=one, daemon=True)
        thread.start()
        thread.join(10)
    return done.is_set()


class Lines:
    """Traces the lines of gradflow's own; where the n-th of them is about to run, it calls `act`."""

    def __init__(self, at: int = -1, act: Callable[[], object] = lambda: None) -> None:
        self.at, self.act, self.run, self.where = at, act, 0, ""
        self.places: dict[tuple[CodeType, int], list[int]] = {}  # a line -> when it ran

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        if event == "line":
            self.run += 1
            self.places.setdefault((frame.f_code, frame.f_lineno), []).append(self.run)
            if self.run == self.at:
                name = Path(frame.f_code.co_filename).relative_to(OWN)
                self.where = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
                self.act()
        return self


@contextmanager
def traced(lines: Lines) -> Iterator[None]:
    """All that runs inside, in this thread."""
    sys.settrace(lines)
    try:
        yield
    finally:
        sys.settrace(None)


def trial_of(kind: str) -> Trial:
    """A step that is recorded, or one that is watched."""
    return WatchedTrial(kind) if kind in WATCHED else Trial(kind)


def lines_of(trial: Trial) -> dict[tuple[CodeType, int], list[int]]:
    """Every line of a recorded or watched step, and when it runs: counted among all of them."""
    lines = Lines()
    if isinstance(trial, WatchedTrial):
        trial.trained(lines)
        return lines.places
    with traced(lines):
        trial.step()
    return lines.places


@contextmanager
def raising(error: BaseException) -> Iterator[Callable[[], object]]:
    """What raises the error: itself or, of a `Timeout`, by the handler of a signal."""

    def throw(*_: object) -> None:
        raise error

    if not isinstance(error, Timeout):
        yield throw
        return
    before = signal.signal(signal.SIGUSR1, throw)
    try:
        yield lambda: signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def interrupted(trial: Trial, at: int, kind: type[BaseException]) -> list[str]:
    """Interrupt a recorded or watched step there; what is wrong after it."""
    if isinstance(trial, WatchedTrial):
        return interrupted_watch(trial, at, kind)
    before, error = trial.around(), kind()
    out: BaseException | None = None
    with raising(error) as act:
        lines = Lines(at, act)
        with traced(lines):
            try:
                trial.step()
            except BaseException as found:  # noqa: BLE001  any of them is what is asked for
                out = found
    wrong = [] if out is error else [f"what came out is {out!r}"]
    del out
    error.__traceback__ = None  # as after `except`, where its frames are let go
    noted = len(trial.drawn)  # or the next, which was about to be noted
    wrong += trial.left_behind(before, drawn=slice(noted, noted + 2))
    return [f"{lines.where} ({kind.__name__}): {one}" for one in wrong]
