"""A folder of results: where it may be written, and what it may replace there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gradflow import writing
from gradflow.analysis import FRAMES
from gradflow.errors import FileError, checked_path

# one of them in every report or comparison
MARKS = ("run.nc", "summary.json", "report.html", "layers.csv", "changes.csv")
# what one may hold: a folder with anything else in it is never replaced
OURS = {"report.html", "summary.json", "run.nc", "figures", *(f"{kind}.csv" for kind in FRAMES)}
OURS |= {"comparison.png", "comparison.csv", "comparison.html", "comparison.json", "changes.csv"}
OURS |= {f"{kind}.csv" for kind in ("gates", "notes", "groups")}  # of a history


def free_folder(base: str | Path) -> Path:
    """The first of base, base-2, base-3, … that does not exist."""
    base = Path(base)
    number, folder = 1, base
    writing.put_back(base)
    try:
        while folder.exists() or folder.is_symlink():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    except OSError as error:  # too long a name
        raise writing.unwritable(folder, error) from error
    return folder


def check_folder(folder: Path, *, force: bool = False) -> None:
    """Refuse a place that must not be written to; with ``force`` a report in it may be replaced.

    Raises FileError with the sentence for the user.
    """
    try:
        _check(checked_path(folder), force)
    except OSError as error:
        raise writing.unwritable(folder, error) from error


def _check(folder: Path, force: bool) -> None:
    writing.put_back(folder)
    if folder.is_symlink():
        raise FileError(f"{folder} is a link and is left alone; give the folder it points to")
    if not folder.exists():
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        denied = "is a file" if not above.is_dir() else ""
        denied = denied or ("" if os.access(above, os.W_OK | os.X_OK) else "is read-only for you")
        if denied:
            raise FileError(
                f"cannot write the report to {folder}: {above} {denied}; give another folder"
            )
        return
    if not folder.is_dir():
        raise FileError(f"{folder} is a file, and a report needs a folder; give another name")
    if not force:
        raise FileError(
            f"{folder} exists and is left alone; give another folder, or --force (force=True in "
            "Python) to replace the report in it"
        )
    writing.clear(folder)
    if not any(folder.iterdir()):
        return
    strange = sorted(path.name for path in folder.iterdir() if path.name not in OURS)
    if strange or not any((folder / mark).is_file() for mark in MARKS):
        what = f" (it holds {', '.join(strange[:3])})" if strange else ""
        raise FileError(
            f"{folder} does not look like a gradflow report{what} and is left alone; "
            "give another folder"
        )


@contextmanager
def whole_folder(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder that takes its place when all is written, and is removed when anything fails."""
    with writing.whole_folder(folder, partial(check_folder, folder, force=force)) as new:
        yield new
