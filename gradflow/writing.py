"""Files and folders that appear whole or not at all, whatever happens to the process that writes them.

What is not whole yet lies beside its place, and its writer holds a lock on it for as long as it lives. Of a
process that was killed nothing is locked: `clear` takes it away, and puts back what had been set aside.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gradflow.errors import FileError

try:
    import fcntl
# not on Windows: there nothing hinders two writers, and nothing is cleared away
except ImportError:
    fcntl = None  # type: ignore[assignment]


@contextmanager
def whole_file(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A new file that takes its place when all is written, and is removed when anything fails.

    Raises FileError where it cannot be written; an older file at its place is as it was.
    """
    place = Path(os.path.realpath(path))  # a link goes on to point there
    text = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}  # as in JSON
    options: dict[str, Any] = {} if binary else text
    try:
        with _part_of(place, folder=False) as part:
            with part.open("wb" if binary else "w", **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(place)
    except OSError as error:
        there = "it is as it was" if os.path.exists(place) else "nothing was written"
        why = error.strerror or error
        raise FileError(f"cannot write {path}: {why}; {there}, give another place") from error


@contextmanager
def whole_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new folder that takes its place when all is written, and is removed when anything fails.

    ``check`` raises FileError where an older one must stay; else the two change places at one moment.
    """
    made = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear(folder.parent)
        with _part_of(folder, folder=True) as new:
            yield new
            new.chmod(0o755)
            check()  # another process may have made it in the meantime
            _put(new, folder)
    except (OSError, FileError) as error:
        failed = error.__cause__ if isinstance(error, FileError) else error
        if not isinstance(failed, OSError):
            raise
        raise unwritable(folder, failed) from error
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # only an empty one goes: nothing came of it


def unwritable(folder: Path, error: OSError) -> FileError:
    """Why a report cannot be written, and what is at its place."""
    there = "what is there is whole, and none of it of this report"
    there = there if os.path.exists(folder) else "nothing was written there"
    why = error.strerror or error
    return FileError(f"cannot write the report to {folder}: {why}, {there}; give another folder")


def is_left(name: str) -> bool:
    """Whether a name is that of something not whole, of a process that writes or was killed."""
    return re.fullmatch(r"\.gradflow-(part|old)-[0-9a-f]{16}", name) is not None


def clear(folder: Path, kind: str = "") -> None:
    """Take away what killed processes left in a folder; what they had set aside is put back.

    Nothing of a process that lives is touched, and nothing where the file system has no locks to tell.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            if is_left(name) and kind in name:
                with suppress(OSError):
                    _clear(folder / name)


def put_back(place: Path) -> None:
    """Where a process was killed while it replaced a folder, its old content is there again."""
    if not os.path.lexists(place):
        clear(place.parent, "old")


def claim(opened: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed; whether it is ours, None where there are no locks."""
    if fcntl is None:
        return None
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(opened, how if wait else how | fcntl.LOCK_NB)
    except OSError as error:  # another holds it, or a file system without locks
        return False if isinstance(error, BlockingIOError) else None
    return True


@contextmanager
def _part_of(place: Path, kind: str = "part", *, folder: bool) -> Iterator[Path]:
    """A new file or folder beside a place, locked inside; what is left of it at the end goes."""
    part, lock = _made(place, kind, folder)
    try:
        yield part
    finally:
        with suppress(OSError):
            _take_away(part)
        if lock is not None:
            os.close(lock)


def _take_away(part: Path) -> None:
    """Remove what is left, and what was set aside once its place is taken: until then it is put back."""
    if not part.is_dir():
        part.unlink(missing_ok=True)
        return
    for held in part.iterdir() if "-old-" in part.name else ():
        if not os.path.lexists(part.parent / held.name):
            held.rename(part.parent / held.name)
    shutil.rmtree(part, ignore_errors=True)


def _made(place: Path, kind: str, folder: bool) -> tuple[Path, int | None]:
    while True:
        part = place.parent / f".gradflow-{kind}-{secrets.token_hex(8)}"
        if folder:
            part.mkdir(0o700)
        else:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if fcntl is None:
            return part, None
        with suppress(FileNotFoundError):  # another process found it before it was locked
            lock = os.open(part, os.O_RDONLY if folder else os.O_RDWR)
            claim(lock, wait=True)
            if _is_at(lock, part):
                return part, lock
            os.close(lock)


def _is_at(opened: int, path: Path) -> bool:
    """Whether what is open still lies at a path."""
    return path.exists() and os.path.samestat(os.fstat(opened), os.lstat(path))


def _clear(part: Path) -> None:
    opened = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        mode = os.fstat(opened).st_mode
        if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and claim(opened) and _is_at(opened, part):
            _take_away(part)
    finally:
        os.close(opened)


def _put(new: Path, place: Path) -> None:
    """Put a whole folder into its place; an old one is then where the new one was, or gone."""
    if not place.exists():
        new.rename(place)
    elif not _exchanged(new, place):
        with _part_of(place, "old", folder=True) as old:
            place.rename(old / place.name)
            new.rename(place)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two names change places at one moment; False where the system, or the file system, cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    here, exchange = ctypes.c_int(-100), ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    names = [ctypes.c_char_p(os.fsencode(path.absolute())) for path in (one, other)]
    return bool(rename(here, names[0], here, names[1], exchange) == 0)
