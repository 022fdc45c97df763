"""A folder of results: written whole beside its place, then moved there, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradflow.analysis import FRAMES
from gradflow.errors import FileError

# one of them in every report or comparison
MARKS = ("run.nc", "summary.json", "report.html", "layers.csv", "changes.csv")
# what one may hold: a folder with anything else in it is never replaced
OURS = {"report.html", "summary.json", "run.nc", "figures", *(f"{kind}.csv" for kind in FRAMES)}
OURS |= {
    "comparison.png",
    "comparison.csv",
    "comparison.html",
    "comparison.json",
    "changes.csv",
}
OURS |= {f"{kind}.csv" for kind in ("gates", "notes", "groups")}  # of a history


def free_folder(base: str | Path) -> Path:
    """The first of base, base-2, base-3, … that does not exist."""
    base = Path(base)
    number, folder = 1, base
    try:
        while folder.exists() or folder.is_symlink():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    except OSError as error:  # too long a name
        raise _unwritable(folder, error) from error
    return folder


def check_folder(folder: Path, *, force: bool = False) -> None:
    """Refuse a place that must not be written to; with ``force`` a report in it may be replaced.

    Raises FileError with the sentence for the user.
    """
    try:
        _check(folder, force)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _check(folder: Path, force: bool) -> None:
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
    made = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield new
        new.chmod(0o755)
        _move(new, folder, force)
    except (OSError, FileError) as error:
        failed = error.__cause__ if isinstance(error, FileError) else error
        if not isinstance(failed, OSError):
            raise
        raise _unwritable(folder, failed) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # only an empty one goes: nothing came of it


def _move(new: Path, folder: Path, force: bool) -> None:
    check_folder(folder, force=force)  # another process may have made it in the meantime
    if not folder.exists():
        new.rename(folder)
        return
    old = _beside(folder)
    try:
        folder.rename(old / "report")
        new.rename(folder)
    except BaseException:
        with suppress(OSError):  # another process has put its own there meanwhile
            (old / "report").rename(folder)
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> Path:
    """A place for what is not whole yet, or not wanted any more; a process that is killed leaves it."""
    return Path(tempfile.mkdtemp(prefix=".gradflow-part-", dir=folder.parent))


def _unwritable(folder: Path, error: OSError) -> FileError:
    there = "nothing was written there"
    with suppress(OSError):
        there = (
            "what is there is whole, and none of it of this report" if folder.exists() else there
        )
    why = error.strerror or error
    return FileError(f"cannot write the report to {folder}: {why}, {there}; give another folder")
