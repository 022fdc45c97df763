"""Every error gradflow raises on purpose, and the shape of its sentences.

A message reads "<what> must be <expected>, got <actual>; <what to do>". The command line turns a
`GradflowError` into one line and exit code 2; anything else is a fault of gradflow's own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from gradflow.limits import NAME_LETTERS, SENTENCE_LETTERS, TEXT_LETTERS


class GradflowError(Exception):
    """The base of all of gradflow's own errors. Its text is a sentence for the user.

    >>> import gradflow
    >>> try:
    ...     gradflow.load("reports/none")
    ... except gradflow.GradflowError as error:
    ...     print(error)
    there is no run at reports/none; give a folder written by gradflow, or its run.nc
    """


class InputError(GradflowError, ValueError):
    """An argument, an option or an array does not have the value or shape it must have."""


class FileError(GradflowError):
    """A file cannot be read as what it was given for, or a folder cannot be written."""


class RecordingError(GradflowError, LookupError):
    """What was asked of a recording was not seen while it was open."""


class UserCodeError(GradflowError):
    """The user's model or loss raised on this input; the original error is the cause."""


class StopTraining(GradflowError):
    """What a callable given to `gradflow.watch` raises to end the training; any other error does not.

    >>> import gradflow
    >>> def rule(event):
    ...     raise gradflow.StopTraining("the gradient is gone")
    """


class GradflowWarning(UserWarning):
    """Something a user should know before trusting a result; the result is still given.

    >>> import warnings, torch, gradflow
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", gradflow.GradflowWarning)      # "no recurrent layer ran"
    ...     with gradflow.record(torch.nn.LSTM(1, 1)) as recording:
    ...         pass
    >>> len(recording)
    0
    """


_collecting = threading.local()  # `sentences`: where a thread's warnings go instead


def warn(sentence: str, stacklevel: int = 1) -> None:
    """Warn of something, or add it to what `collected_warnings` of this thread collects."""
    sentences = getattr(_collecting, "sentences", None)
    if sentences is None:
        warnings.warn(sentence, GradflowWarning, stacklevel=stacklevel + 1)
    else:
        sentences.append(sentence)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """gradflow's own warnings of this thread as a list of sentences; all others are raised as ever.

    >>> with collected_warnings() as sentences:
    ...     warn("no backward ran")
    >>> sentences
    ['no backward ran']
    """
    before, sentences = getattr(_collecting, "sentences", None), list[str]()
    _collecting.sentences = sentences
    try:
        yield sentences
    finally:
        _collecting.sentences = before


def printable(text: object) -> str:
    r"""The text on one line: line ends and control characters are escaped as in ``repr``.

    >>> printable("a\nb.weight")
    'a\\nb.weight'
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in said)


def plain_name(name: str) -> str:
    r"""A name from a file as it may be printed, kept and written anywhere; most names are that already.

    >>> plain_name("rnn.weight_hh_l0"), plain_name("a\nb"), len(plain_name("k" * 10**6))
    ('rnn.weight_hh_l0', 'a\\nb', 200)
    """
    if name.isprintable() and len(name) <= NAME_LETTERS:
        return name
    half = NAME_LETTERS // 2
    if len(name) > NAME_LETTERS:  # before the rest, of which it may have a megabyte
        name = f"{name[:NAME_LETTERS]}…{name[-NAME_LETTERS:]}"
    shown = printable(name)
    return shown if len(shown) <= NAME_LETTERS else f"{shown[: half - 1]}…{shown[-half:]}"


def checked_path(path: object) -> Path:
    """A path as any system may have it; FileError for one with a NUL in it."""
    if "\0" in str(path):
        raise FileError(f"{printable(path)} holds a NUL, which no path may; check where it is from")
    return Path(str(path))


def plain_text(value: str) -> str:
    """A text from a file, line by line as it may be printed; ValueError for more than a page bears."""
    if len(value) > TEXT_LETTERS:
        raise ValueError("a text that no run has")
    return "\n".join(map(printable, value.split("\n")))


def plain_value(value: Any, depth: int = 3) -> Any:
    """Text, numbers, and lists and mappings of them, as JSON holds them; TypeError for anything deeper."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, list) and depth:
        return [plain_value(inner, depth - 1) for inner in value]
    if isinstance(value, dict) and depth:
        return {plain_name(key): plain_value(inner, depth - 1) for key, inner in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError("lists in lists in lists")


def plain_record(kind: type[Any], content: Any) -> Any:
    """A dataclass of texts and whole numbers as JSON holds it; TypeError or ValueError where it is none."""
    known = {one.name: str(one.type) for one in fields(kind)}
    if type(content) is not dict:
        raise TypeError("no record")
    for name, value in content.items():
        text, whole = type(value) is str, type(value) is int and 0 <= value < 2**63
        if not (
            text if known.get(name) == "str" else whole or (value is None and "None" in known[name])
        ):
            raise TypeError(f"{name} of another type")
    return kind(**{name: plain_value(value) for name, value in content.items()})


def one_sentence(text: object, *typed: str, most: int = SENTENCE_LETTERS) -> str:
    r"""What is said of a file, on one line of at most `SENTENCE_LETTERS`; what to do stays whole.

    Args:
        text: a sentence that may hold names from the file, of any length and with any letters.
        typed: what the user typed; however long it is, it is counted as 30 letters.
        most: letters, where it is not a file's word that makes the sentence long.

    >>> said = one_sentence("it holds " + "k" * 10**6 + "\n; save it again")
    >>> len(said), said[-20:]
    (300, 'kkkk…; save it again')
    """
    said = str(text)
    for word in {printable(word) for word in typed if len(word) > 30}:
        most += said.count(word) * (len(word) - 30)
    if len(said) > 4 * most:  # a megabyte of it need not be escaped
        said = f"{said[: 2 * most]}…{said[-2 * most :]}"
    said = printable(said)
    if len(said) <= most:
        return said
    held, _, advice = said.rpartition("; ")
    if not held or len(advice) > most - 70:  # no room for what is wrong
        held, advice = said, ""
    end = f"…; {advice}" if advice else "…"
    return held[: most - len(end)] + end


def must_be(what: str, expected: str, actual: object, advice: str) -> str:
    """Build the standard sentence.

    >>> must_be("span", "a whole number of at least 1", 0, "leave it out for the median length")
    'span must be a whole number of at least 1, got 0; leave it out for the median length'
    """
    return f"{what} must be {expected}, got {actual}; {advice}"
