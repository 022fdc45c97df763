"""Watch the recurrent functions of torch while a recording is open, without changing a bit.

``torch._VF`` and ``torch`` hold the four functions every fused layer ends in, and the four that
nn.LSTMCell, nn.GRUCell and nn.RNNCell end in. While at least one
recording is open they are replaced by wrappers that call the original and then tell the observers of
the calling thread. A TorchFunctionMode would see the same calls, but moves torch off its fast paths.

What torch.compile makes into a graph stays the graph it would be without a recording: there the
wrapper is traced as the original alone, and nothing is seen. ``GradScaler.scale`` is watched too, and
so is the one door through which every backward enters torch's engine: there the graph is complete and
nothing of it is freed yet.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

FUSED = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN_TANH", "rnn_relu": "RNN_RELU"}
SINGLE = {f"{name}_cell": cell for name, cell in FUSED.items()}
_SPACES: tuple[Any, ...] = (torch._VF, torch)
_LAYER = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PLACES = {  # the names of their arguments, for whoever calls them by name
    "fused": ("input", "hx", "params", *_LAYER, "batch_first"),
    "packed": ("data", "batch_sizes", "hx", "params", *_LAYER),
    "cell": ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
}
_ABSENT = object()
_FRAMES = 8  # how far up a module's forward may be from the function it calls


@dataclass(frozen=True)
class FusedCall:
    """The arguments of one call of a fused function, whatever its signature, and what it returned."""

    cell: str
    data: Tensor  # (T, B, I), (B, T, I) with batch_first, or packed (N, I)
    batch_sizes: Tensor | None  # (T,), packed
    initial: tuple[Tensor, ...]  # h0, or h0 and c0: (layers * directions, B, width)
    weights: tuple[Tensor, ...]
    has_biases: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    results: tuple[Tensor, ...]  # output, h_n and, for an LSTM, c_n
    rng: Tensor | None  # state of the CPU generator before the call, when dropout was drawn
    module: nn.Module | None  # whose forward made the call
    unsorted: Tensor | None  # packed: sorted place of each of the user's sequences
    module_input: Any  # what the module's forward was given


@dataclass(frozen=True)
class CellCall:
    """The arguments of one call of a single-step function, and what it returned."""

    cell: str
    data: Tensor  # (B, I)
    initial: tuple[Tensor, ...]  # h, or h and c: (B, H)
    weights: tuple[Tensor, ...]  # weight_ih, weight_hh, then the biases if there are any
    results: tuple[Tensor, ...]  # h, or h and c: (B, H)
    training: bool
    module: nn.Module | None


class Observer(Protocol):
    """Whoever wants to hear of recurrent calls."""

    thread: int

    def wants(self, weights: tuple[Tensor, ...], module: nn.Module | None) -> bool: ...
    def saw(self, call: FusedCall) -> None: ...
    def saw_cell(self, call: CellCall) -> None: ...
    def saw_tap(
        self, name: str, states: dict[str, Tensor], rows: dict[str, Tensor], frame: FrameType
    ) -> None: ...
    def saw_scaler(self, scaler: torch.amp.GradScaler) -> None: ...
    def before_backward(self, roots: tuple[Any, ...], create_graph: bool) -> None: ...
    def after_backward(self) -> None: ...
    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def left(self, call: Any, result: Any) -> None: ...


_lock = threading.RLock()
_paused: set[int] = set()  # threads in which gradflow itself is running the user's code
_observers: list[Observer] = []
_replaced: list[tuple[Any, str, object]] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell the observer of every recurrent call of its thread; put everything back at the end."""
    with _lock:
        _observers.append(observer)
        if len(_observers) == 1:
            _install()
    try:
        yield
    finally:
        with _lock:
            _observers.remove(observer)
            if not _observers:
                _restore()


def is_observed() -> bool:
    """Whether any recording is open, in any thread."""
    return bool(_observers)


def observers_here() -> list[Observer]:
    """The observers of the calling thread."""
    thread = threading.get_ident()
    if thread in _paused:
        return []
    return [observer for observer in _observers if observer.thread == thread]


@contextmanager
def paused() -> Iterator[None]:
    """Tell nobody of what runs in this thread."""
    thread = threading.get_ident()
    _paused.add(thread)
    try:
        yield
    finally:
        _paused.discard(thread)


def _install() -> None:
    for space in _SPACES:
        for tell, functions in ((_tell, FUSED), (_tell_cell, SINGLE)):
            for name, cell in functions.items():
                original = getattr(space, name)
                _replaced.append((space, name, space.__dict__.get(name, _ABSENT)))
                setattr(space, name, _watched(original, cell, tell))
    scale = torch.amp.GradScaler.scale
    _replaced.append((torch.amp.GradScaler, "scale", scale))
    torch.amp.GradScaler.scale = _watched_scale(scale)  # type: ignore[method-assign]
    run: Any = torch.autograd._engine_run_backward
    _replaced.append((torch.autograd, "_engine_run_backward", run))
    torch.autograd._engine_run_backward = _watched_backward(run)


def _restore() -> None:
    while _replaced:
        space, name, before = _replaced.pop()
        if before is _ABSENT:
            delattr(space, name)
        else:
            setattr(space, name, before)


@functools.lru_cache(maxsize=64)
def _watched(
    original: Callable[..., Any], cell: str, tell: Callable[..., Any]
) -> Callable[..., Any]:
    """One wrapper for all recordings: compiled code is guarded by its identity."""

    @untraced
    def heard(args: Any, kwargs: dict[str, Any]) -> Any:
        mine = observers_here()
        if not mine:
            return original(*args, **kwargs)
        return tell(mine, original, cell, _in_order(args, kwargs, fused=tell is _tell))

    def watched(*args: Any, **kwargs: Any) -> Any:
        return heard(args, kwargs)

    return _traced_as(original, functools.wraps(original, updated=())(watched))


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any], *, fused: bool) -> tuple[Any, ...]:
    """Arguments given by name, at their places; torch itself gives all of them by place."""
    if not kwargs:
        return args
    packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
    names = _PLACES["cell" if not fused else "packed" if packed else "fused"]
    return args + tuple(kwargs[name] for name in names[len(args) :] if name in kwargs)


@functools.lru_cache(maxsize=64)
def _watched_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    @untraced
    def heard(scaler: torch.amp.GradScaler) -> None:
        for observer in observers_here():
            observer.saw_scaler(scaler)

    def scale(self: torch.amp.GradScaler, outputs: Any) -> Any:
        heard(self)
        return original(self, outputs)

    return _traced_as(original, functools.wraps(original)(scale))


@functools.lru_cache(maxsize=64)
def _watched_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @untraced
    def heard(outputs: Any, args: tuple[Any, ...]) -> None:
        create_graph = len(args) > 2 and bool(args[2])  # after grad_tensors and retain_graph
        for observer in observers_here():
            observer.before_backward(tuple(outputs), create_graph)

    @untraced
    def over() -> None:
        for observer in observers_here():
            observer.after_backward()

    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        heard(outputs, args)
        result = original(outputs, *args, **kwargs)
        over()
        return result

    return _traced_as(original, functools.wraps(original)(run_backward))


def _traced_as(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper, for which torch.compile reads the original, also in its table of what it knows.

    Called from where nothing is compiled it runs as it is, never as a compiled graph of its own.
    """
    function._torchdynamo_inline = original  # type: ignore[attr-defined]
    if hasattr(eval_frame, "_FrameExecStrategy"):
        strategy = eval_frame._FrameExecStrategy(
            eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        )
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    elif hasattr(eval_frame, "skip_code"):  # torch before 2.7
        eval_frame.skip_code(function.__code__)
    return function


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with all it calls, kept away from torch.compile.

    Where torch._dynamo is not loaded, its second of import is saved: the marks that
    ``torch.compiler.disable`` would set are set by hand, for whoever compiles inside the block.
    """
    if "torch._dynamo" in sys.modules or not hasattr(eval_frame, "_FrameExecStrategy"):
        return torch.compiler.disable(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


def _tell(observers: list[Observer], original: Callable[..., Any], cell: str, args: Any) -> Any:
    packed = not isinstance(args[3], bool)  # a list of weights, where the other form has has_biases
    data, batch_sizes = (args[0], args[1]) if packed else (args[0], None)
    hidden, weights, has_biases, layers, dropout, training, bidirectional = args[
        1 + packed : 8 + packed
    ]
    module, locals_ = _calling_module()
    interested = [o for o in observers if o.wants(tuple(weights), module)]
    draws = bool(dropout) and training and layers > 1
    rng = torch.get_rng_state() if interested and draws else None
    results = original(*args)
    call = FusedCall(
        cell=cell,
        data=data,
        batch_sizes=batch_sizes,
        initial=tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,),
        weights=tuple(weights),
        has_biases=has_biases,
        layers=layers,
        dropout=float(dropout),
        training=training,
        bidirectional=bidirectional,
        batch_first=False if packed else args[8],
        results=results,
        rng=rng,
        module=module,
        unsorted=locals_.get("unsorted_indices") if packed else None,
        module_input=locals_.get("orig_input"),
    )
    for observer in interested:
        observer.saw(call)
    return results


def _tell_cell(
    observers: list[Observer], original: Callable[..., Any], cell: str, args: Any
) -> Any:
    data, hidden = args[:2]
    weights = tuple(weight for weight in args[2:] if weight is not None)
    module, _ = _calling_module()
    interested = [observer for observer in observers if observer.wants(weights, module)]
    results = original(*args)
    if not interested:
        return results
    call = CellCall(
        cell=cell,
        data=data,
        initial=tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,),
        weights=weights,
        results=tuple(results) if isinstance(results, (tuple, list)) else (results,),
        training=module is None or module.training,
        module=module,
    )
    for observer in interested:
        observer.saw_cell(call)
    return results


def _calling_module() -> tuple[nn.Module | None, dict[str, Any]]:
    """The recurrent module whose forward is calling, and that forward's variables.

    The order of packed sequences is known nowhere else: the fused function sees them sorted.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            break
        module = frame.f_locals.get("self")
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return module, dict(frame.f_locals)
    return None, {}
