"""Every error gradflow raises on purpose, and the shape of its sentences.

A message reads "<what> must be <expected>, got <actual>; <what to do>". The command line turns a
`GradflowError` into one line and exit code 2; anything else is a fault of gradflow's own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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


def must_be(what: str, expected: str, actual: object, advice: str) -> str:
    """Build the standard sentence.

    >>> must_be("span", "a whole number of at least 1", 0, "leave it out for the median length")
    'span must be a whole number of at least 1, got 0; leave it out for the median length'
    """
    return f"{what} must be {expected}, got {actual}; {advice}"
