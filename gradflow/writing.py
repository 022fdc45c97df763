"""Files and folders that appear whole or not at all, whatever happens to the process that writes them.

What is not whole yet lies beside its place under a name of its own, and its writer holds a lock on it for as
long as it lives. A process that is killed leaves it without one: `clear` takes it away, and puts back what
the process had set aside.
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
except (
    ImportError
):  # not on Windows: there nothing hinders two writers, and nothing is cleared away
    fcntl = None  # type: ignore[assignment]

# what is not whole yet, or not wanted any more; and what has been set aside for a moment
_LEFT = re.compile(r"\.gradflow-(part|old)-[0-9a-f]{16}")
_AT_CURRENT, _EXCHANGE = -100, 2  # of renameat2


@contextmanager
def whole_file(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A new file that takes its place when all is written, and is removed when anything fails.

    Args:
        path: of the file; where it is a link, of what it points to.
        binary: it takes bytes, not text.

    Raises:
        FileError: it cannot be written; an older file at its place is as it was.
    """
    place = Path(os.path.realpath(path))
    options: dict[str, Any] = {} if binary else {"encoding": "utf-8", "newline": "\n"}
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

    Args:
        folder: its place. Where an older folder is there, the two change places at once.
        check: raises FileError where the place must not be written to; called when all is written.

    Raises:
        FileError: it cannot be written; an older folder at its place is as it was.
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
    there = "nothing was written there"
    with suppress(OSError):
        there = (
            "what is there is whole, and none of it of this report" if folder.exists() else there
        )
    why = error.strerror or error
    return FileError(f"cannot write the report to {folder}: {why}, {there}; give another folder")


def is_left(name: str) -> bool:
    """Whether a name is that of something not whole, of a process that writes or was killed."""
    return _LEFT.fullmatch(name) is not None


def clear(folder: Path, kind: str = "") -> None:
    """Take away what killed processes left in a folder; what they had set aside is put back.

    Nothing of a process that lives is touched, and nothing where the file system has no locks to tell.

    Args:
        folder: where they wrote.
        kind: only "old", what they had set aside.
    """
    if fcntl is None:
        return
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
    """Lock an open file or folder until it is closed, or its process has ended.

    Args:
        opened: its descriptor.
        shared: others may hold it too, shared.
        wait: until it is free.

    Returns:
        Whether it is ours now; None where there are no locks.
    """
    if fcntl is None:
        return None
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(opened, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
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
    try:
        return os.path.samestat(os.fstat(opened), os.lstat(path))
    except FileNotFoundError:
        return False


def _clear(part: Path) -> None:
    opened = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        mode = os.fstat(opened).st_mode
        ours = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        if ours and claim(opened) and _is_at(opened, part):
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
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    return rename(_AT_CURRENT, names[0], _AT_CURRENT, names[1], _EXCHANGE) == 0
