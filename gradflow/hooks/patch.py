"""Watch the recurrent functions of torch while a recording is open, without changing a bit.

``torch._VF`` and ``torch`` hold the function that every fused layer of a kind of cell ends in, and
the one that a single step of it ends in. While at least one recording is open they are replaced by
wrappers that call the original and then tell the observers of the calling thread. A
TorchFunctionMode would see the same calls, but moves torch off its fast paths.

Other libraries, and users, replace the same functions, also while ours are there. What they put on top
of ours is never undone: our wrapper then stays below theirs, does nothing but call the original, and is
removed as soon as it is the attribute again.

What torch.compile makes into a graph stays the graph it would be without a recording: there the
wrapper is traced as the original alone, and nothing is seen. ``GradScaler.scale`` is watched too, and
so is the function through which every backward enters torch's engine: when it is called the graph is
complete and nothing of it is freed yet.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

from gradflow.cells import CELLS
from gradflow.hooks.graph import alone, refuse_alone
from gradflow.hooks.guard import Point, busy, guarded, is_batched, is_wrapped, why_hidden
from gradflow.hooks.linear.heard import Heard
from gradflow.hooks.linear.registry import places
from gradflow.hooks.linear.scanned import LibraryFunction, Scanned
from gradflow.hooks.seen import Listener, Telling
from gradflow.process import held

ABSENT = object()

lock = threading.RLock()  # held while anything is replaced or put back, and never for longer
_beneath: weakref.WeakKeyDictionary[Any, Beneath] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Beneath:
    """What one of our wrappers replaced."""

    original: Any
    inherited: set[int] = field(default_factory=set)  # ids of spaces that only inherited it


@dataclass(frozen=True)
class Replaced:
    """One attribute that is replaced."""

    space: Any
    name: str


def original_of(function: Any) -> Any:
    """The function that our wrappers, perhaps several around each other, replaced."""
    while (beneath := _known(function)) is not None:
        function = beneath.original
    return function


def _known(function: Any) -> Beneath | None:
    try:
        return _beneath.get(function)
    except TypeError:  # not hashable, or not to be referred to weakly
        return None


def replace(
    space: Any, name: str, make: Callable[[Any], Any], noted: Callable[[Replaced], object]
) -> None:
    """Replace a function by what `make` makes of it; `noted` is called first, so that it can be put back."""
    there = vars(space).get(name, ABSENT)
    ours = _known(there)  # left from a recording after which another wrapper lay on top
    inherited = there is ABSENT if ours is None else id(space) in ours.inherited
    original = original_of(getattr(space, name))
    new = make(original)
    beneath = _beneath.setdefault(new, Beneath(original))  # one may stand in several spaces
    beneath.inherited.update({id(space)} if inherited else ())
    noted(Replaced(space, name))
    _set(space, name, new)


def put_back(replaced: Replaced) -> None:
    """Remove our wrapper; a wrapper that another library put around it meanwhile stays."""
    there = vars(replaced.space).get(replaced.name, ABSENT)
    ours = _known(there)
    if ours is None:
        return  # another library's wrapper, perhaps around ours, or the original
    if id(replaced.space) in ours.inherited:
        delattr(replaced.space, replaced.name)
    else:
        _set(replaced.space, replaced.name, original_of(there))


def _set(space: Any, name: str, function: Any) -> None:
    if isinstance(space, type) or not hasattr(space, "_modules"):
        setattr(space, name, function)
    else:  # a module: its own __setattr__ may be the user's
        vars(space)[name] = function


def at_fork(in_child: Callable[[], None]) -> None:
    """Call this in every process forked from here, which is forked while nothing is half replaced."""

    held: list[int] = []  # the thread that forks; none where it began before this was registered

    def before() -> None:
        lock.acquire()
        held.append(threading.get_ident())

    def after() -> None:
        if held and held[-1] == threading.get_ident():
            held.pop()
            lock.release()

    def child() -> None:
        held.clear()
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # its holder may not be in this process
        in_child()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=child)


class Observer(Listener, Protocol):
    """What is notified of everything that is watched in one thread: a recorder."""

    thread: int

    def saw_tap(
        self, name: str, states: dict[str, Tensor], rows: dict[str, Tensor], frame: FrameType
    ) -> None: ...
    def saw_inside(self, given: list[Tensor], results: list[Tensor]) -> None: ...
    def modules(self) -> Iterable[nn.Module]: ...
    def path_of(self, module: nn.Module) -> str | None: ...
    def saw_scan(self, scanned: Scanned, code: tuple[object, ...] = ()) -> None: ...
    def missed_scan(self, name: str, why: str) -> None: ...
    def saw_scaler(self, scaler: torch.amp.GradScaler) -> None: ...
    def did_not_see(self, name: str, why: str) -> None: ...
    def missed_tap(self, name: str, why: str) -> None: ...
    def missed_cell(self, module: nn.Module, why: str) -> None: ...
    def scale_unknown(self, why: str) -> None: ...
    def graph_unknown(self, why: str) -> None: ...
    def unwatched(self) -> AbstractContextManager[None]: ...
    def before_backward(self, roots: tuple[Any, ...], create_graph: bool) -> None: ...
    def after_backward(self) -> None: ...
    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def left(self, call: Any, result: Any) -> None: ...


_paused: set[int] = set()  # threads in which gradflow itself is running the user's code
_under_way: set[int] = set()  # threads in which a call that is told of is running
_observers: list[Observer] = []
_replaced: list[Replaced] = []


def nothing_is_under_way() -> None:
    """A recording opens: what Ctrl-C may have left half done in this thread is over."""
    for threads in (_paused, _under_way, busy):
        threads.discard(threading.get_ident())


def listen(observer: Observer) -> None:
    """Tell the observer of every recurrent call of its thread."""
    with held(lock):
        _keep([*_observers, observer])
        if len(_observers) == 1:
            _install()
        _install_scans(observer)


def stop_listening(observer: Observer) -> None:
    """Tell it no more, and put everything back where it was the last."""
    with held(lock):
        _keep([known for known in _observers if known is not observer])
        if not _observers:
            _restore()


def _keep(observers: list[Observer]) -> None:
    """A new list: other threads may be going through the old one."""
    global _observers  # noqa: PLW0603  what is open is a state of the process
    _observers = observers


def is_observed() -> bool:
    """Whether any recording is open, in any thread."""
    return bool(_observers)


def observers_here() -> list[Observer]:
    """The observers of the calling thread."""
    thread = threading.get_ident()
    if thread in _paused or thread in busy:
        return []
    return [observer for observer in _observers if observer.thread == thread]


def is_of_another_recording(thread: int) -> bool:
    """Whether what runs now is a step that another recording's thread runs, not this one's."""
    here = threading.get_ident()
    return here != thread and any(observer.thread == here for observer in _observers)


@contextmanager
def paused() -> Iterator[None]:
    """Notify no observer of what runs in this thread."""
    thread = threading.get_ident()
    _paused.add(thread)
    try:
        yield
    finally:
        _paused.discard(thread)


def _install() -> None:
    for spec in CELLS.values():
        for function in filter(None, (spec.whole, spec.step)):
            name, single = function.__name__, function is spec.step
            for holder in spec.holders:
                make = functools.partial(_watched, name=name, cell=spec.name, single=single)
                replace(holder, name, make, _replaced.append)
    replace(torch.amp.GradScaler, "scale", _watched_scale, _replaced.append)
    replace(torch.autograd, "_engine_run_backward", _watched_backward, _replaced.append)
    replace(torch.jit, "script", _watched_script, _replaced.append)


def _install_scans(observer: Observer) -> None:
    """The functions of the registry that are loaded, and where the model of this observer holds them."""
    for place in places(observer.modules()):
        make = functools.partial(_watched_function, entry=place.entry)
        replace(place.space, place.name, make, _replaced.append)


def _restore() -> None:
    while _replaced:
        put_back(_replaced[-1])
        _replaced.pop()


def _in_child() -> None:
    """In a forked process only the recordings of the thread that forked are still open."""
    here = threading.get_ident()
    _paused.intersection_update({here})
    _under_way.intersection_update({here})
    busy.intersection_update({here})
    _keep([observer for observer in _observers if observer.thread == here])
    if not _observers:
        _restore()


at_fork(_in_child)


def _told(
    telling: Telling | Heard, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """Run a call that observers are told of; what it calls itself is part of it."""
    thread = threading.get_ident()
    telling.before(args, kwargs)
    try:
        _under_way.add(thread)
        results = original(*args, **kwargs)
    finally:
        _under_way.discard(thread)
    telling.after(results)
    return results


@functools.lru_cache(maxsize=64)
def _watched(
    original: Callable[..., Any], name: str, cell: str, single: bool
) -> Callable[..., Any]:
    """One wrapper for all recordings: compiled code is guarded by its identity."""

    @untraced
    def heard(args: Any, kwargs: dict[str, Any]) -> Any:
        mine = observers_here()
        if (
            not mine or threading.get_ident() in _under_way
        ):  # another library's wrapper lies between two of ours
            return original(*args, **kwargs)
        telling = Telling(mine, cell, single)
        return _told(telling, functools.partial(telling.run, original), args, kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        return heard(args, kwargs)

    found = traced_as(original, functools.wraps(original, updated=())(watched))
    builtins: Any = torch.jit._builtins
    if id(original) in builtins._get_builtin_table():  # torch.jit.script may run in the block
        builtins._register_builtin(found, f"aten::{name}")
    return found


@functools.lru_cache(maxsize=256)
def _watched_function(original: Callable[..., Any], entry: LibraryFunction) -> Callable[..., Any]:
    """The same for a function of the registry; those that it calls itself are part of it."""

    @untraced
    def heard(args: Any, kwargs: dict[str, Any]) -> Any:
        mine = observers_here()
        again = torch._C._current_graph_task_id() != -1  # a checkpoint that computes again
        if not mine or threading.get_ident() in _under_way or again:
            return original(*args, **kwargs)
        return _told(Heard(mine, entry, original), original, args, kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        return heard(args, kwargs)

    return traced_as(original, functools.wraps(original, updated=())(function))


@functools.lru_cache(maxsize=64)
def _watched_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    @untraced
    def heard(scaler: torch.amp.GradScaler) -> None:
        for observer in observers_here():
            guarded(Point.SCALER, observer.scale_unknown, observer.saw_scaler, scaler)

    def scale(self: torch.amp.GradScaler, outputs: Any) -> Any:
        heard(self)
        return original(self, outputs)

    return traced_as(original, functools.wraps(original)(scale))


@functools.lru_cache(maxsize=64)
def _watched_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @untraced
    def heard(args: tuple[Any, ...]) -> None:
        for observer in observers_here():
            guarded(Point.BACKWARD, observer.graph_unknown, _before_backward, observer, *args[:4])

    @untraced
    def over() -> None:
        for observer in observers_here():
            guarded(Point.BACKWARD, observer.graph_unknown, observer.after_backward)

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        if alone:
            refuse_alone(bool(kwargs.get("accumulate_grad")))
        heard(args)
        result = original(*args, **kwargs)
        over()
        return result

    return traced_as(original, functools.wraps(original)(run_backward))


@functools.lru_cache(maxsize=64)
def _watched_script(original: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.jit.script reads is the source of a module, which must be the user's own."""

    def script(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for observer in observers_here():
                stack.enter_context(observer.unwatched())
            return original(*args, **kwargs)

    return traced_as(original, functools.wraps(original)(script))


def _before_backward(
    observer: Observer, roots: Any, grads: Any = (), _keep: Any = False, create_graph: Any = False
) -> None:
    wrapped = any(isinstance(root, Tensor) and is_wrapped(root) for root in roots)
    if not (why_hidden() or wrapped or any(is_batched(grad) for grad in grads)):
        observer.before_backward(tuple(roots), bool(create_graph))


def something_is_compiled() -> bool:
    """Whether torch.compile was called in this process; merely loading it, as optimizers do, is not."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    known = getattr(frames, "cached_backends", None)
    if known is None:
        return frames is not None
    return any(backend is not None for backend in known.values())  # None: compilation disabled


def traced_as(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper, which torch.compile treats as the original, also in its table of known functions.

    Called from where nothing is compiled it runs as it is, never as a compiled graph of its own.
    """
    function._torchdynamo_inline = original  # type: ignore[attr-defined]
    run_as_it_is(function.__code__)
    return function


def run_as_it_is(code: CodeType) -> None:
    """Never compile this code as a graph of its own; what it calls may be compiled."""
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, default))


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with all it calls, kept away from torch.compile.

    Where torch._dynamo is not loaded, its second of import is saved: the marks that
    ``torch.compiler.disable`` would set are set by hand, in case torch.compile is called inside the block.
    """
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function
