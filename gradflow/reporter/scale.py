"""The one colour scale of gradflow: fixed for every model, ± six powers of ten.

Navy has vanished, pale yellow is as at the loss, dark red has exploded. Undefined is grey, an exact
zero black, NaN or Inf magenta. Pictures of two models can therefore be laid side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_rgb

from gradflow.errors import InputError, must_be

DECADES = 6  # the scale ends at 10⁻⁶ and 10⁶
STEPS = 10  # colours per decade

ANCHORS = ("#0b2858", "#1f5699", "#5ba3d0", "#fdf3b8", "#f3945c", "#c3263a", "#560012")
UNDEFINED = "#c9c9c9"
ZERO = "#000000"
BAD = "#ff00ff"
WRONG = "#b800b8"  # the same, dark enough for words
DIRECT = "#d97000"  # the part of a gradient that a hook shows
# lines that are no verdict: gates, paths, blocks, parameters; told apart by their dashes as well
SERIES = ("#1f5699", "#d97000", "#1d7a4f", "#c3263a", "#8a6100")
# activations of gates: not a gradient, so in a colour of its own, dark is closed and light is open
GATE_STEPS = 20
_GATE_RAMP = LinearSegmentedColormap.from_list(
    "gates", ("#06302c", "#1d7f74", "#9ad6c8", "#f1faf6"), N=GATE_STEPS + 1
)(np.linspace(0, 1, GATE_STEPS + 1))[:, :3]  # (colours, 3)
GATE_COLOURS = ListedColormap(_GATE_RAMP, name="gates")

Limits = tuple[float, float]  # powers of ten at both ends of the scale
FIXED: Limits = (-float(DECADES), float(DECADES))
_limits: ContextVar[Limits] = ContextVar("limits", default=FIXED)


@contextmanager
def narrowed(limits: Sequence[float] | None) -> Iterator[None]:
    """Colours that end at other powers of ten, where they are asked for; 1 keeps its pale yellow."""
    held = _limits.set(FIXED if limits is None else _checked(limits))
    try:
        yield
    finally:
        _limits.reset(held)


def ends() -> Limits:
    """The powers of ten at which the colours end now."""
    return _limits.get()


def _checked(limits: Sequence[float]) -> Limits:
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not -DECADES <= low < 0 < high <= DECADES:
        expected = f"two powers of ten, from {-DECADES} to below 0 and from above 0 to {DECADES}"
        advice = "limits=(-2, 2) gives all colours to 10⁻² … 10²"
        raise InputError(must_be("limits", expected, repr(limits), advice))
    return low, high


VERDICT_COLOURS = {
    "vanishing": "#1f5699",
    "exploding": "#c3263a",
    "stable": "#1d7a4f",
    "dead": "#000000",
    "inconclusive": "#8a6100",
}

_STOPS = np.linspace(0, 1, 2 * DECADES * STEPS + 1)
_RAMP = LinearSegmentedColormap.from_list("gradflow", ANCHORS, N=len(_STOPS))(_STOPS)[
    :, :3
]  # (colours, 3)
COLOURS = ListedColormap(_RAMP, name="gradflow")


def paint(log10: np.ndarray, bad: np.ndarray | None = None) -> np.ndarray:
    """Turn log10 of a ratio into colours, (rows, columns) → (rows, columns, 3) uint8.

    NaN is undefined (grey), −inf an exact zero (black), ``bad`` marks NaN or Inf (magenta).

    >>> import numpy as np
    >>> paint(np.array([[-np.inf, np.nan]])).tolist()
    [[[0, 0, 0], [201, 201, 201]]]
    """
    low, high = ends()
    place = np.nan_to_num(log10, nan=0.0, neginf=low, posinf=high)
    place = np.where(place < 0, place * (DECADES / -low), place * (DECADES / high))
    place = np.clip(np.rint((place + DECADES) * STEPS), 0, 2 * DECADES * STEPS).astype(int)
    rgb = np.rint(COLOURS(place)[..., :3] * 255).astype(np.uint8)
    rgb[np.isnan(log10)] = _bytes(UNDEFINED)
    rgb[np.isneginf(log10)] = _bytes(ZERO)
    if bad is not None:
        rgb[bad] = _bytes(BAD)
    return rgb


def paint_gates(values: np.ndarray) -> np.ndarray:
    """Turn shares of the way from shut (0) to open (1) into colours; NaN is grey.

    >>> paint_gates(np.array([[0.0, np.nan]])).tolist()
    [[[6, 48, 44], [201, 201, 201]]]
    """
    place = np.rint(np.clip(np.nan_to_num(values), 0, 1) * GATE_STEPS).astype(int)
    rgb = np.rint(GATE_COLOURS(place)[..., :3] * 255).astype(np.uint8)
    rgb[np.isnan(values)] = _bytes(UNDEFINED)
    return rgb


def palette() -> list[int]:
    """The 256 colours every picture is stored with: the scale, greys, accents and their tints."""
    colours = [tuple(row) for row in np.rint(_RAMP * 255).astype(int).tolist()]
    colours += [tuple(row) for row in np.rint(_GATE_RAMP * 255).astype(int).tolist()]
    colours += [_bytes(UNDEFINED), _bytes(ZERO), _bytes(BAD)]
    for accent in (*VERDICT_COLOURS.values(), DIRECT, WRONG):
        rgb = np.array(_bytes(accent))
        tints = (0.0, 0.12, 0.25, 0.37, 0.5, 0.62, 0.75, 0.8, 0.85, 0.92)
        colours += [tuple(np.rint(rgb + (255 - rgb) * tint).astype(int).tolist()) for tint in tints]
    unique = list(dict.fromkeys(colours))
    greys = np.linspace(255, 0, 256 - len(unique)).round().astype(int)
    unique += [(grey, grey, grey) for grey in greys.tolist()]
    return [value for colour in unique for value in colour]


def _bytes(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue
