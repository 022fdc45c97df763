"""Fonts: names and labels may be in any script; what no font at hand can draw becomes a box."""

from __future__ import annotations

import functools
from typing import Any, cast

import matplotlib
from matplotlib.font_manager import FontProperties, fontManager, get_font

# the first one comes with matplotlib; the others draw what it lacks, where they are installed
FAMILIES = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "SimHei",
    "Arial Unicode MS",
)  # fmt: skip
LATIN = 0x250  # letters before this one are in every font
BOX = "□"


@functools.cache
def installed() -> tuple[str, ...]:
    """Those of the families that this machine has."""
    known = set(fontManager.get_font_names())
    return tuple(family for family in FAMILIES if family in known)


def families() -> tuple[str, ...]:
    """The reader's own choice in matplotlib's rcParams, where it differs from the default; then ours."""
    chosen, default = cast("Any", matplotlib.rcParams), cast("Any", matplotlib.rcParamsDefault)
    if all(chosen[key] == default[key] for key in ("font.family", "font.sans-serif")):
        return installed()
    named: list[str] = []
    for family in chosen["font.family"]:
        named += chosen.get(f"font.{family}", [family])  # "serif", "sans-serif" stand for a list
    known = set(fontManager.get_font_names())
    return tuple(dict.fromkeys((*(one for one in named if one in known), *installed())))


@functools.cache
def _drawable(letter: str, families: tuple[str, ...]) -> bool:
    return any(
        get_font(fontManager.findfont(FontProperties(family=family))).get_char_index(ord(letter))
        for family in families
    )


def legible(text: str) -> str:
    """The text with a box for every letter that no font at hand can draw.

    >>> legible("∂L/∂h\\n$x$"), legible(chr(0xE000))
    ('∂L/∂h\\n$x$', '□')
    """
    if all(ord(letter) < LATIN for letter in text):
        return text
    found = families()
    return "".join(
        letter if ord(letter) < LATIN or _drawable(letter, found) else BOX for letter in text
    )


def inches(text: str, points: float) -> float:
    """How wide a legible text on one line is drawn.

    >>> inches("WWW", 7) > 2 * inches("iii", 7) > 0
    True
    """
    return _inches(text, points, families())


@functools.lru_cache(maxsize=4096)
def _inches(text: str, points: float, families: tuple[str, ...]) -> float:
    files = [fontManager.findfont(FontProperties(family=family)) for family in families]
    font = get_font(files)
    font.set_size(10 * points, 72)  # so large that letters are not rounded to whole pixels
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64 / 720
