"""Words along an axis of steps: as many of the user's labels as fit, else the steps' numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from matplotlib.axis import Axis

from gradflow.reporter.charts.plot_lines import whole
from gradflow.reporter.fonts import BOX, families, inches, legible

SIZE = 7.0  # points
LABEL_LINE = 0.125  # inches between two lines of labels
MOST_INCHES = 0.8  # inches of a label
TICK = 0.1  # inches that a number takes beneath an axis in any case
FLAT_INCHES = 0.3  # inches up to which labels stand side by side beneath an axis, not upright
SEEN = {" ": "␣", "\n": "↵", "\t": "⇥"}  # what a reader would take for nothing


def readable(label: str) -> str:
    r"""A label on one line, shortened where it is long; what a reader cannot see gets a sign.

    >>> readable("\n"), readable(" "), readable("the sky"), readable("x" * 99)[-1]
    ('↵', '␣', 'the sky', '…')
    """
    return _cut(_seen(label))


def _seen(label: str) -> str:
    printed = "".join(letter if letter.isprintable() else " " for letter in label)
    return legible(SEEN.get(label) or " ".join(printed.split()))


def _cut(seen: str) -> str:
    if inches(seen, SIZE) <= MOST_INCHES:
        return seen
    fits = next(n for n in range(1, len(seen) + 1) if inches(seen[:n] + "…", SIZE) > MOST_INCHES)
    return seen[: fits - 1].rstrip() + "…"


def texts(labels: tuple[str, ...]) -> tuple[str, ...]:
    """What is written for labels; where they are too long, without a beginning that all share.

    >>> texts(("2024-03-01 05:00:00 UTC", "2024-03-01 06:00:00 UTC"))[0]
    '…05:00:00 UTC'
    """
    return _texts(labels, families())


@functools.lru_cache(maxsize=64)
def _texts(labels: tuple[str, ...], _: tuple[str, ...]) -> tuple[str, ...]:
    seen = [_seen(label) for label in labels]
    if len(set(seen)) > 1 and max(inches(one, SIZE) for one in seen) > MOST_INCHES:
        first, last = min(seen), max(seen)
        shared = next((first[:n] for n, one in enumerate(first) if last[n : n + 1] != one), first)
        # whole words and numbers only: what differs is read from where it begins
        start = next((n for n in range(len(shared), 0, -1) if not shared[n - 1].isalnum()), 0)
        seen = ["…" + one[start:] for one in seen] if start > 1 else seen
    return tuple(_cut(one) for one in seen)


def writable(labels: Sequence[str]) -> bool:
    """Whether the fonts at hand have letters for most of the labels.

    >>> writable(["the", "sky"]), writable([chr(0xE000), chr(0xE001)])
    (True, False)
    """
    drawn = [legible(label) for label in labels if label.strip()]
    lost = sum(set(one) <= {BOX} and BOX not in label
               for one, label in zip(drawn, filter(str.strip, labels), strict=True))  # fmt: skip
    return 2 * lost <= len(drawn)


def width(labels: Sequence[str]) -> float:
    """Inches of the widest of these labels."""
    return max((inches(text, SIZE) for text in texts(tuple(labels))), default=0.0)


def below(labels: Sequence[str]) -> float:
    """Inches that labels take beneath an axis, more than numbers do.

    >>> below(()), below(["a", "b"]), below(["France"]) > 0.2
    (0.0, 0.0, True)
    """
    wide = width(labels)
    return wide - TICK if wide > FLAT_INCHES else 0.0


def beside(labels: Sequence[str]) -> float:
    """Inches that labels take beside an axis, more than numbers do."""
    return max(0.0, width(labels) - FLAT_INCHES / 2)


def label_steps(axis: Axis, labels: Sequence[str], places: Iterable[float], most: int = 8) -> None:
    """Write the labels at their places, every n-th so that none meets the next; else numbers.

    The last place always has its label: it is the one nearest to the loss. Call it when the limits
    of the axis are set.
    """
    if not labels:
        axis.set_major_locator(whole(most))
        return
    box, (low, high) = axis.axes.get_window_extent(), sorted(axis.get_view_interval())
    figure = axis.get_figure(root=True)
    flat = axis is axis.axes.xaxis
    long = box.width if flat else box.height
    room = long / (figure.dpi if figure else 100)
    upright = flat and below(labels) > 0
    across = width(labels) + 0.08 if flat and not upright else LABEL_LINE
    shown = [(place, text) for place, text in zip(places, texts(tuple(labels)), strict=True)
             if low <= place <= high]  # fmt: skip
    every = max(1, math.ceil(across * (high - low) / room)) if room else 1
    shown = shown[::-1][::every]
    axis.set_ticks([place for place, _ in shown], [text for _, text in shown])
    for text in axis.get_ticklabels():
        text.set(parse_math=False, fontsize=SIZE, rotation=90 if upright else 0)
