"""``--labels``: words for the steps of the batch, read from a file."""

from __future__ import annotations

from pathlib import Path

from gradflow.errors import FileError, InputError, must_be, one_sentence, printable
from gradflow.loading.contents import read_json, read_text
from gradflow.loading.words import reason

SAVE_LABELS = "write one label per line, or a .json list of strings"


def read_labels(path: Path) -> tuple[str, ...]:
    """Labels of steps from a text file with one per line, or from a ``.json`` list of strings.

    An empty line is an empty label; what ends the last line begins no other.

    Raises:
        FileError: the file cannot be read as UTF-8 text, or as JSON where its name says so.
        InputError: the JSON is no list of strings.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "words.txt").write_text("the\\nclouds\\n")
    ...     read_labels(Path(folder, "words.txt"))
    ('the', 'clouds')
    """
    try:
        is_json = path.suffix.lower() == ".json"
        found = read_json(path) if is_json else _lines(read_text(path))
    except (OSError, ValueError) as error:
        said = f"cannot read labels from {path}{reason(error)}; {SAVE_LABELS}"
        raise FileError(one_sentence(said, str(path))) from error
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise InputError(must_be(printable(path), "a list of strings", _kind(found), SAVE_LABELS))
    return tuple(found)


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _kind(found: object) -> str:
    """What JSON held in place of a list of strings."""
    if not isinstance(found, list):
        return type(found).__name__
    kinds = {type(part).__name__ for part in found if not isinstance(part, str)}
    return f"a list with {', '.join(sorted(kinds))}"
