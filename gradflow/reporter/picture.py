"""A matplotlib figure of its own: no pyplot, no display, the same bytes every time."""

from __future__ import annotations

import base64
import functools
import io
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gradflow.process import lock
from gradflow.reporter.fonts import families, legible
from gradflow.reporter.scale import palette

VECTORS = ("pdf", "svg")  # kinds of files that a picture is written as, but for PNG
INK, SOFT, FAINT = "#222222", "#595959", "#9a9a9a"

_LOOK = {
    # seaborn's style "ticks", whose import would take a second
    "axes.axisbelow": True,
    "grid.color": ".8",
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "text.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # letters stay letters, and the same figure gives the same bytes
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradflow",
}


_drawing = (
    lock()
)  # matplotlib has one style for all threads, and fonts that are drawn by one at a time


@contextmanager
def look() -> Iterator[None]:
    """matplotlib's defaults and the user's fonts, while drawing only; the user's style comes back."""
    if _drawing._is_owned():  # all that is drawn inside has them already
        yield
        return
    with _drawing:
        style = _LOOK | {"font.family": list(families())}
        with matplotlib.style.context(["default", style]):
            yield


@functools.cache
def _measuring(dpi: float) -> RendererAgg:
    """What measures words: one for all figures, since it remembers those it has measured."""
    return RendererAgg(1, 1, dpi)


def ending(name: str, letters: int) -> str:
    """The end of a name after an ellipsis, never from the middle of a number: layer 13 is not layer 3.

    >>> ending("model.layers.13.mixer", 7)
    '…13.mixer'
    """
    start = len(name) - letters
    while name[start - 1 : start + 1].isdigit():
        start -= 1
    return f"…{name[start:]}"


class Picture(Figure):
    """A figure that pyplot does not know of, and that a notebook shows all the same."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=100)
        FigureCanvasAgg(self)
        # panels and what each says under the pointer: see `gradflow.reporter.readout`
        self.readouts: list[tuple[Axes, Any]] = []

    def _repr_png_(self) -> bytes:
        return png(self)

    def inches(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at a place in inches, measured from the top left corner."""
        wide, high = self.get_size_inches()
        box = (left / wide, 1 - (top + height) / high, width / wide, height / high)
        return self.add_axes(box)

    def words(self, left: float, top: float, text: str, **style: Any) -> Text:
        """Text whose upper left corner is at a place in inches; what you see, not mathtext."""
        wide, high = self.get_size_inches()
        place: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False} | style
        return self.text(left / wide, 1 - top / high, legible(text), **place)

    def width_of(self, text: Text) -> float:
        """The drawn width of a text, in inches."""
        return text.get_window_extent(_measuring(self.dpi)).width / self.dpi

    def folded(self, words: str, width: float, **style: Any) -> list[str]:
        """Words on one line where they fit a width in inches, else on two."""
        text = self.words(0, 0, words, **style)
        room = self.width_of(text)
        text.remove()
        if room <= width or " " not in words:
            return [words]
        # as many letters as fit on average, and a few less: letters are not equally wide
        most = max(8, int(0.96 * len(words) * width / room))
        for letters in range(min(most, len(words) // 2 + 1), most):  # two lines of about one length
            lines = textwrap.wrap(words, letters)
            if len(lines) == 2:
                return lines
        first, *rest = textwrap.wrap(words, most)
        return [first, " ".join(rest)] if rest else [first]

    def shortened(self, words: str, name: str, width: float, **style: Any) -> str:
        """Words in which a long name loses its beginning, until they fit a width in inches.

        What is said of a layer matters more than the whole of its name, and names differ at the end.
        """
        text, kept, letters = self.words(0, 0, words, **style), name, len(name)
        while self.width_of(text) > width and letters > 13 and name in words:
            letters = max(13, letters - 4)
            kept = ending(name, letters)
            text.set_text(legible(words.replace(name, kept, 1)))
        text.remove()
        return words if kept == name else words.replace(name, kept, 1)

    def fit(self, text: Text, width: float, smallest: float = 7.0) -> Text:
        """Make a text fit a width in inches: smaller letters first, then an ellipsis."""
        size = float(text.get_fontsize())
        while self.width_of(text) > width and size > smallest:
            size -= 0.5
            text.set_fontsize(size)
        words = text.get_text()
        while self.width_of(text) > width and len(words) > 8:
            words = words[: -max(1, len(words) // 20)].rstrip()
            text.set_text(words + " …")
        return text


@dataclass(frozen=True)
class Drawn:
    """A picture ready to be written or put on a page."""

    png: bytes  # its pixels
    web: bytes  # the same for a page, as WebP
    told: Mapping[str, list[dict[str, Any]]]  # what it says under the pointer
    vectors: Mapping[str, bytes]  # "pdf", "svg" -> the same picture, where asked for
    message: str = ""  # what it shows, in its own words


def write_pictures(place: Path, pictures: Mapping[str, Drawn], kind: str) -> None:
    """Write pictures by the stem of their names into a folder, as "png", "pdf" or "svg"."""
    place.mkdir(exist_ok=True)
    for stem, picture in pictures.items():
        data = picture.png if kind == "png" else picture.vectors[kind]
        (place / f"{stem}.{kind}").write_bytes(data)


def webp(png: bytes) -> bytes:
    """The very same pixels in a quarter fewer bytes, for a page, which has little room."""
    packed = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.save(packed, "WEBP", lossless=True, quality=25, method=2)
    return packed.getvalue()


def data_url(picture: bytes, kind: str) -> str:
    """A picture as the source of an element of a page.

    >>> data_url(b"...", "png")
    'data:image/png;base64,Li4u'
    """
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def vector(figure: Figure, kind: str) -> bytes:
    """A figure as PDF or SVG, its letters as text; the same figure gives the same bytes."""
    packed, named = io.BytesIO(), {"pdf": "CreationDate", "svg": "Date"}
    with look():
        figure.savefig(packed, format=kind, metadata={named[kind]: None})
    return packed.getvalue()


def png(figure: Figure, dpi: int = 180) -> bytes:
    """A figure as PNG in gradflow's own 256 colours; the same figure gives the same bytes."""
    image = Image.fromarray(_nearest(_drawn(figure, dpi)))
    image.putpalette(palette())
    packed = io.BytesIO()
    image.save(packed, format="PNG", compress_level=6)
    return packed.getvalue()


def _drawn(figure: Figure, dpi: int) -> np.ndarray:
    """The figure's pixels, (height, width, 4); its own resolution and canvas come back."""
    found_dpi, found_canvas = figure.dpi, figure.canvas
    try:
        figure.dpi = dpi
        canvas = FigureCanvasAgg(figure)
        with look():
            canvas.draw()
        return np.array(canvas.buffer_rgba())
    finally:
        figure.dpi = found_dpi
        figure.set_canvas(found_canvas)


@functools.cache
def _places() -> np.ndarray:
    """For every colour, 1 + its place in the palette, or 0 where it was not looked for yet."""
    return np.zeros(1 << 24, dtype=np.uint16)


def _nearest(pixels: np.ndarray) -> np.ndarray:
    """The place in the palette of every pixel (…, 4); a colour that is in it stays exactly that."""
    # a table over all colours is faster than sorting the pixels
    table, codes = _places(), pixels.view(np.dtype("<u4"))[..., 0] & 0xFFFFFF
    found = table[codes]
    if not found.all():
        new = np.unique(codes[found == 0])
        known = np.array(palette(), dtype=np.int32).reshape(-1, 3)
        rgb = np.stack([new & 255, (new >> 8) & 255, new >> 16], axis=1).astype(np.int32)
        for some, colours in zip(_chunks(new), _chunks(rgb), strict=True):
            table[some] = 1 + np.square(colours[:, None] - known).sum(axis=2).argmin(axis=1)
        found = table[codes]
    return (found - 1).astype(np.uint8)


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    return np.array_split(values, max(1, len(values) // 2048))
