"""Reports that are killed, that meet a full disk or each other: what is at their place afterwards.

`python tests/steadiness.py files` does so often, the suite a few times.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import synthetic

import gradflow
from gradflow.reporter import report

FORMATS = ("json", "csv", "nc")
NAMES = (
    "with spaces ",
    "two\nlines",
    "ü漢字🙂",
    "n" * 250,
    "ж" * 120,
    "-o",
    "'\"$(x)`",
    "a\\b",
    "%s{}",
)


def forked(work: Callable[[], object]) -> tuple[int, int]:
    """Run it in a process of its own: its number, and where its sentence can be read."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    said = "done"
    try:
        work()
    except gradflow.GradflowError as error:
        said = str(error)
    except BaseException:  # noqa: BLE001  whatever it is, it is to be told
        said = traceback.format_exc()
    os.write(write, said.encode())
    os._exit(0)


def outcome(child: int, read: int) -> str:
    """What it said at its end; nothing where it was killed."""
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


def whole(folder: Path) -> str:
    """Which report is there: the name of its layer; nothing where there is no folder.

    Raises:
        AssertionError: there is a folder that is not whole.
    """
    if not folder.exists():
        return ""
    found = sorted(path.name for path in folder.iterdir())
    expected = ["findings.csv", "lags.csv", "layers.csv", "run.nc", "steps.csv", "summary.json"]
    assert [name for name in expected if name not in found] == [], f"mixed: {found}"
    (layer,) = gradflow.load(folder)
    assert layer in (folder / "summary.json").read_text("utf-8")
    assert layer in (folder / "layers.csv").read_text("utf-8")
    return str(layer)


def took(folder: Path) -> float:
    """Seconds that a report takes in a process of its own."""
    began = time.perf_counter()
    outcome(*forked(lambda: report(synthetic.carrying(), folder, formats=FORMATS)))
    return time.perf_counter() - began


def killed(folder: Path, after: float, *, force: bool) -> str:
    """What is there when a report was killed after so many seconds; before it, an older one was."""
    if force and not folder.exists():
        report(synthetic.vanishing(), folder, formats=FORMATS)
    it = forked(lambda: report(synthetic.carrying(), folder, formats=FORMATS, force=force))
    time.sleep(after)
    os.kill(it[0], signal.SIGKILL)
    outcome(*it)
    return whole(folder)


def on_a_full_disk(folder: Path, most: int) -> str:
    """What a report says where no file may have more bytes than that."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        report(synthetic.carrying(), folder, formats=FORMATS, force=True)

    return outcome(*forked(write))


def at_once(folder: Path, *, force: bool) -> tuple[str, list[str]]:
    """Which of two reports that are written at once is there, and what both said."""
    start = time.time() + 0.05 + random.random() / 100

    def write(analysis: gradflow.Analysis) -> None:
        time.sleep(max(0.0, start - time.time()))
        report(analysis, folder, formats=FORMATS, force=force)

    both = [forked(lambda a=a: write(a)) for a in (synthetic.vanishing(), synthetic.carrying())]
    said = [outcome(*one) for one in both]
    return whole(folder), said
