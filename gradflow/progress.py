"""Progress on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from gradflow.limits import PROGRESS_LINES, PROGRESS_SECONDS


class Progress:
    """A line on stderr once something has taken two seconds; call it with (what, share done).

    Args:
        lines: where stderr is no terminal, print a line every minute.
    """

    def __init__(self, lines: bool = False) -> None:
        self._lines, self._printed = lines, time.monotonic()
        self._started = time.monotonic()
        self._display: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()

    def __call__(self, what: str, done: float, *, at_once: bool = False) -> None:
        """Show what is being done and which share of it is done; `at_once`: it will take seconds."""
        if self._lines and not sys.stderr.isatty():
            if time.monotonic() - self._printed >= PROGRESS_LINES:
                self._printed = time.monotonic()
                print(f"{self.clock()} {what}", file=sys.stderr, flush=True)  # noqa: T201
            return
        if self._display is None:
            early = time.monotonic() - self._started < PROGRESS_SECONDS and not at_once
            if early or not sys.stderr.isatty():
                return
            self._open()
        self._display.update(self._task, description=what, completed=done)

    def clock(self) -> str:
        """Time since the work began, "0:01:05".

        >>> Progress().clock()
        '0:00:00'
        """
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
        from rich.progress import Progress as Display

        class Clock(ProgressColumn):
            """Time since the work began; rich's own stops once a part of the work is complete."""

            def render(_, task: Task) -> str:
                return self.clock()

        self._display = Display(
            TextColumn("{task.description}"), BarColumn(bar_width=20), Clock(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._display.add_task("", total=1.0)
        self._display.start()
