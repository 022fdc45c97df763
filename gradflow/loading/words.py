"""Small parts of sentences: names fit to print, articles, what to type next, why a reader gave up."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from gradflow.errors import printable
from gradflow.limits import SHOWN_LETTERS

# Letters that are read out by name, so that they take "an".
_SPELLED = ("lstm", "rnn", "mlp", "ndarray")
RESAVE = (
    "where the model is, run torch.save(model.state_dict(), 'weights.pt'), "
    "then type: gradflow analyze weights.pt"
)
RESAVE_OR_TRUST = (  # followed by the command with --trust
    "where the model is, run torch.save(model.state_dict(), 'weights.pt'), "
    "or, only if you trust the file's author:"
)


def article(word: str) -> str:
    """The word behind "a" or "an", as it is read aloud.

    >>> article("LSTM"), article("GRU"), article("int")
    ('an LSTM', 'a GRU', 'an int')
    """
    lower = word.lower()
    an = lower.startswith((*"aeio", *_SPELLED)) or (lower[:1] == "u" and lower[:4] != "uint")
    return f"{'an' if an else 'a'} {word}"


def reason(error: BaseException, most: int = 160) -> str:
    """Why a reader gave up, in words and in brackets, or "" where the error holds no words.

    >>> reason(EOFError()), reason(ValueError("bad shape")), reason(AssertionError(7))
    (' (it ends too early)', ' (bad shape)', '')
    """
    if isinstance(error, KeyError):  # its text is the bare key
        return " (one part of it refers to another that is not there)"
    strerror = getattr(error, "strerror", None)  # without the number and the path again
    lines = str(strerror or error).splitlines()
    if lines and len(re.findall(r"[^\W\d_]{2,}", lines[0])) >= 2:
        return f" ({printable(lines[0][:most])})"
    if isinstance(error, EOFError):
        return " (it ends too early)"
    if isinstance(error, MemoryError):
        return " (it claims more than fits in memory)"
    return ""


def analyze_command(path: Path, options: str = "") -> str:
    """Spell the command that analyzes this file, safe to paste into a shell."""
    return f"gradflow analyze {shlex.quote(str(path))}{' ' + options if options else ''}"


def some(names: list[str], most: int = 3) -> str:
    """The first names, each cut where it is very long, and how many more there are.

    >>> some(["x", "k" * 1000])
    'x, kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk…'
    """
    shown = ", ".join(
        name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}…" for name in names[:most]
    )
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
