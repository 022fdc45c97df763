"""Fonts: names and labels may be in any script; what no font at hand can draw becomes a box."""

from __future__ import annotations

import functools

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


@functools.cache
def _drawable(letter: str) -> bool:
    return any(
        get_font(fontManager.findfont(FontProperties(family=family))).get_char_index(ord(letter))
        for family in installed()
    )


def legible(text: str) -> str:
    """The text with a box for every letter that no font at hand can draw.

    >>> legible("∂L/∂h\\n$x$"), legible(chr(0xE000))
    ('∂L/∂h\\n$x$', '□')
    """
    return "".join(letter if ord(letter) < LATIN or _drawable(letter) else BOX for letter in text)


@functools.lru_cache(maxsize=4096)
def inches(text: str, points: float) -> float:
    """How wide a legible text on one line is drawn.

    >>> inches("WWW", 7) > 2 * inches("iii", 7) > 0
    True
    """
    files = [fontManager.findfont(FontProperties(family=family)) for family in installed()]
    font = get_font(files)
    font.set_size(10 * points, 72)  # so large that letters are not rounded to whole pixels
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64 / 720
