"""Outside: an exception that did not come of what ran, but was put into it.

The handler of a signal, another thread (``PyThreadState_SetAsyncExc``), a debugger that is left: each can
raise any exception between two instructions of anybody's code. Such a one is not a fault of the code that
it happened to meet, and is not to be taken for one.
"""

from __future__ import annotations

import dis
import signal
from collections.abc import Iterator
from types import CodeType, TracebackType

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
