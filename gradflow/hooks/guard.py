"""The guard: what gradflow cannot do inside the user's own step becomes a note, never an exception there.

Every point at which the user's code calls into gradflow while a recording is open is a `Point`, and
all that gradflow does there is called by `guarded`. Within it the user's function modes, dispatch modes
and tensor subclasses are off. Two kinds of errors are passed on: an `InputError`, by which the user learns
of a wrong argument (not while a training is watched: it goes on), and what did not come of gradflow's
work (Ctrl-C, an exit, the time limit of a signal's handler). In any case `failed` is called, so that
what is incomplete can be left out: `Withheld` says what that was.

An exception from outside is put into whatever runs: the handler of a signal, another thread
(``PyThreadState_SetAsyncExc``), a debugger that is left can raise any exception between two
instructions of anybody's code. Such a one is not a fault of the code that it happened to meet.
"""

from __future__ import annotations

import contextlib
import dis
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import CodeType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from gradflow.errors import InputError

# instructions that neither fail nor call anything: what comes up there came from outside
CANNOT_FAIL = [
    "NOP", "PUSH_NULL", "PRECALL", "LOAD_CONST", "LOAD_FAST", "STORE_FAST", "POP_TOP", "COPY", "SWAP",
    "JUMP_FORWARD", "JUMP_BACKWARD", "RETURN_VALUE", "RETURN_CONST",
]  # fmt: skip


def is_from_outside(error: BaseException) -> bool:
    """Whether an exception was raised by a signal's handler, or where nothing can fail.

    >>> try:
    ...     [][0]
    ... except IndexError as error:
    ...     is_from_outside(error)
    False
    """
    handlers = set(_handlers())
    frames = [*_frames(error.__traceback__)]
    if any(code in handlers or _is_quiet(code, at) for code, at in frames):
        return True
    # another thread's comes without words, at any line; what a call raises has some, but for these
    last = dis.opname[frames[-1][0].co_code[frames[-1][1]]] if frames else ""
    wordless = not error.args and not isinstance(error, MemoryError | StopIteration)
    return wordless and last.startswith("CALL")


def _frames(traceback: TracebackType | None) -> Iterator[tuple[CodeType, int]]:
    """The code that the exception came through, and the place of the instruction in each."""
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lasti
        traceback = traceback.tb_next


def _is_quiet(code: CodeType, at: int) -> bool:
    name, number = dis.opname[code.co_code[at]], code.co_code[at + 1]
    # the first of a function; a generator that goes on has another number there
    return name in CANNOT_FAIL or (name, number) == ("RESUME", 0)


def _handlers() -> Iterator[CodeType]:
    """The code of all handlers of signals, of those that are written in Python."""
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        function = getattr(handler, "func", handler)  # of a partial
        called = function if hasattr(function, "__code__") else getattr(type(function), "__call__")  # noqa: B004, B009
        code = getattr(called, "__code__", None)
        if isinstance(code, CodeType):
            yield code


NO_NUMBERS = (
    "ran on the meta device or on fake tensors, which hold no numbers; run it on real data inside "
    "the block"
)
NO_SEQUENCE = "was given an empty batch; give it at least one sequence"
TRANSFORMED = (
    "ran inside a transform of torch.func (vmap, grad, jacrev) or a trace, where nothing is seen; "
    "call the model plainly inside the block"
)
BATCHED = (
    "gradients of several outputs at once (is_grads_batched=True, or jacobian(vectorize=True)) came "
    "through it too; they are not counted"
)
COMPLEX = (
    "returns complex tensors, and only real states are read; carry real and imaginary part in one "
    "real tensor (torch.view_as_real) and mark it: h = gradflow.tap(h=h) inside the loop"
)
ONLY_BATCHED = (
    "only gradients of several outputs at once (is_grads_batched=True, or jacobian(vectorize=True)) "
    "came through it, which are not those of a loss; call loss.backward() inside the block"
)
WRAPPED = (
    "was given tensors of a class that computes with them in its own way (__torch_dispatch__), whose "
    "numbers are not read; run it on plain tensors inside the block"
)
QUANTIZED = "torch.ao.nn.quantized"
_KEY = torch._C._TorchDispatchModeKey
INFRA = (_KEY.FAKE, _KEY.PROXY, _KEY.FUNCTIONAL)  # modes in which a model is looked at, not run


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and nothing else."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor))


def why_hidden() -> str:
    """Why nothing that runs now may be read, or nothing: a trace, an export, a transform of torch.func."""
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return TRANSFORMED
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return TRANSFORMED
    if not is_looked_at():
        return ""
    only_fake = not any(torch._C._get_dispatch_mode(mode) for mode in INFRA if mode != _KEY.FAKE)
    return NO_NUMBERS if only_fake else TRANSFORMED


def is_looked_at() -> bool:
    """Whether torch takes the model down without running it: on fake tensors, or into a graph."""
    stack = torch._C._len_torch_dispatch_stack()
    return bool(stack) and any(torch._C._get_dispatch_mode(mode) for mode in INFRA)


def is_batched(tensor: object) -> bool:
    """Whether a tensor stands for a whole batch of gradients, one per output."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return isinstance(tensor, Tensor) and bool(legacy(tensor))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether only the tensor's own class knows its numbers."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def why_not_read(given: Iterable[Tensor], returned: Iterable[Tensor]) -> str:
    """Why what a call returned can be no state, or nothing."""
    tensors = list(returned)
    shapes = {tensor.shape for tensor in given if tensor.is_complex()}
    if any(tensor.is_complex() and tensor.shape in shapes for tensor in tensors):
        return COMPLEX
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return NO_SEQUENCE if floating and not any(t.numel() for t in floating) else ""


def foreign_code(modules: Collection[nn.Module]) -> str:
    """What to say of a model in which torch runs layers that are no Python modules any more."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return (
            "what torch.jit scripted or traced runs outside Python, where nothing is seen; record "
            "the model as it was before torch.jit.script or torch.jit.trace"
        )
    if any(type(module).__module__.startswith(QUANTIZED) for module in modules):
        return "quantized layers have no gradient; record the model as it was before quantization"
    return ""


class Withheld:
    """The layers that are left out, why, and what else could not be done, in sentences."""

    def __init__(self) -> None:
        self._why: dict[str, str] = {}  # name of a layer, a cell or a tap -> what failed
        self._remarks: dict[str, None] = {}
        self._stock: set[str] = set()  # paths of layers of torch's own
        self._every_stock = False

    def leave(self, name: str, why: str) -> None:
        """Leave out what has this name; the first reason is the one that is given."""
        self._why.setdefault(str(name), why)

    def leave_stock(self, path: str | None, why: str) -> None:
        """Leave out a layer of torch's own, all of them where it is not known which one failed."""
        self._stock.add(path or "")
        self._every_stock |= path is None
        self.leave(path or ("a recurrent layer" if path is None else "the layer"), why)

    def remark(self, sentence: str) -> None:
        """Note what concerns no single layer."""
        self._remarks[sentence] = None

    def has(self, name: str) -> bool:
        """Whether a cell or a tap of this name is left out."""
        return name in self._why

    def stock(self, path: str) -> bool:
        """Whether a layer of torch's own is left out."""
        return self._every_stock or path in self._stock

    @property
    def layers(self) -> list[str]:
        """What is left out, a sentence each."""
        return [
            f"{name} is left out of the recording: {why}; the model's own step ran as it does without"
            for name, why in self._why.items()
        ]

    @property
    def sentences(self) -> list[str]:
        """All there is to say."""
        return [*self.layers, *self._remarks]


Value = TypeVar("Value")
Failed = Callable[[str], object]  # told why, in a few words
busy: set[int] = set()  # threads in which gradflow itself computes, which is not recorded
lenient: set[int] = set()  # threads whose training goes on even after a wrong argument
cut_short: set[int] = set()  # threads in whose step an exception from outside met gradflow's work
LONGEST = 120  # characters of a cause that are quoted


class Point(Enum):
    """Where the user's code calls into gradflow -> what could not be done there."""

    OPENING = "the recording could not be opened"
    FUSED = "one of its calls could not be recorded"
    CELL = "one of its steps could not be recorded"
    TAP = "one of its taps could not be recorded"
    SCAN = "one of its scans could not be recorded"
    ENTERED = "one of its calls could not be followed"
    LEFT = "what one of its calls returned could not be followed"
    AGAIN = "its first step could not be run again on a copy"
    SCALER = "the scale of a GradScaler could not be read"
    BACKWARD = "the graph of a backward could not be looked at"
    GRADIENT = "a gradient that reached it could not be read"
    WEIGHT = "a gradient of its weights could not be read"
    CLOSING = "the recording could not be closed in order"
    PROBE = "a training step could not be measured"


def guarded(
    point: Point, failed: Failed, work: Callable[..., Value], *args: Any, **kwargs: Any
) -> Value | None:
    """What the work returns; None where it fails, and then `failed` is called with the reason.

    This is the one place where any exception is caught: an error of gradflow's must not end a training
    step that would have run without it. It is not hidden: `failed` puts it into words for the user, and
    withholds what is no longer whole.
    """
    alone = Unnoticed()
    try:
        try:
            try:
                alone.enter()
                return _do(point, work, *args, **kwargs)
            finally:
                alone.leave()
        finally:  # where Ctrl-C came meanwhile, first everything is put back
            alone.leave()
    except BaseException as error:
        failed(f"{point.value} ({briefly(error)})")
        strict = isinstance(error, InputError) and threading.get_ident() not in lenient
        if strict or not isinstance(error, Exception) or is_from_outside(error):
            cut_short.add(threading.get_ident())
            raise
        return None


def _do(point: Point, work: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """The work; a test makes it fail at a point of its choice."""
    return work(*args, **kwargs)


class Unnoticed:
    """Within it the user's modes and tensor subclasses are off, and nothing is recorded.

    Afterwards the grad mode is as before. It may be left twice, or after an entry that failed.
    """

    def __init__(self) -> None:
        self._first = threading.get_ident() not in busy
        self._functions = torch._C._get_torch_function_state()  # type: ignore[attr-defined]
        off = torch._C._len_torch_dispatch_stack() and not is_looked_at()
        self._modes = _get_current_dispatch_mode_stack() if off else []
        self._grad = torch.is_grad_enabled()

    def enter(self) -> None:
        """From here on."""
        busy.add(threading.get_ident())
        off = torch._C._TorchFunctionState.ALL_DISABLED  # type: ignore[attr-defined]
        torch._C._set_torch_function_state(off)  # type: ignore[attr-defined]
        for _ in self._modes:
            _pop_mode()

    def leave(self) -> None:
        """Up to here."""
        for mode in self._modes[torch._C._len_torch_dispatch_stack() :]:
            _push_mode(mode)
        torch._C._set_torch_function_state(self._functions)  # type: ignore[attr-defined]
        if self._first:
            busy.discard(threading.get_ident())
        if torch.is_grad_enabled() is not self._grad:  # where even leaving no_grad was cut short
            torch.set_grad_enabled(self._grad)


@dataclass(frozen=True, eq=False)
class Hook:
    """A guarded hook that changes nothing of what it is given."""

    point: Point
    failed: Failed
    work: Callable[..., object]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        guarded(self.point, self.failed, self.work, *args, **kwargs)


def briefly(error: BaseException) -> str:
    """An error in a few printable words on one line.

    >>> briefly(ValueError("first line" + chr(10) + "second")), briefly(KeyError())
    ('ValueError: first line', 'KeyError')
    """
    with contextlib.suppress(Exception):  # an error's own text may raise
        said = " ".join("".join(c if c.isprintable() else " " for c in _line(error)).split())
        if said:
            cut = said if len(said) <= LONGEST else f"{said[:LONGEST].rstrip()} ..."
            return f"{type(error).__name__}: {cut}"
    return type(error).__name__


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def note_hooks(states: Iterable[Tensor], places: Iterable[list[str]]) -> None:
    """Say it in the notes of loops where the user's own hooks lie on the states that a call starts from."""
    if not any(getattr(state, "_backward_hooks", None) for state in states):
        return
    note = (
        "a hook of yours lies on its states: what it does to gradients is in the totals, but not in the "
        "gains, which are of what the steps compute"
    )
    for notes in places:
        notes += [note] if note not in notes else []
