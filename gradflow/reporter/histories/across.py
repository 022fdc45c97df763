"""What all pictures of a training share: the axis of training steps, the strips of verdicts and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from gradflow.reporter.charts.chart import Chart, log_limits, whole
from gradflow.reporter.fonts import inches
from gradflow.reporter.histories.course import Course
from gradflow.reporter.histories.story import stretches, updates
from gradflow.reporter.scale import BAD, DIRECT, UNDEFINED, VERDICT_COLOURS

STRIP = 0.15  # inches of a strip
WIDTH = 7.2  # inches of all panels
SMALL = 7.0  # points of the words in a strip
COLOUR_NAMES = {  # what a reader calls them
    **dict(zip(VERDICT_COLOURS.values(), ("blue", "red", "green", "black", "brown"), strict=True)),
    DIRECT: "orange",
    BAD: "magenta",
}
OFF = "#ececec"  # clipping was there to act, and did not


@dataclass(frozen=True)
class Shared:
    """The limits that the pictures of several layers and runs have in common."""

    steps: tuple[float, float]  # training steps, from and to
    lags: float  # the largest step back from the loss
    courses: tuple[Course, ...]  # all that are drawn

    @property
    def counted_in(self) -> str:
        """What the training steps of all count; of several kinds no more than that they are steps."""
        found = {one.counted_in for one in self.courses}
        return found.pop() if len(found) == 1 else "training step"

    def limits(self, what: str) -> tuple[float, float]:
        """Of an axis: "loss", "rate" as they are; "horizon", "norm" as log10."""
        if what == "loss":
            return _limits([one.numbers["loss"] for one in self.courses])
        if what == "rate":
            return _rate_limits(self.courses)
        if what == "horizon":
            most = max(
                (float(np.nanmax([1.0, *one.numbers["span"]])) for one in self.courses), default=1
            )
            return -0.05, max(np.log10(max(most, self.lags, 2.0)) + 0.12, 0.3)
        norms = [one.numbers[n] for one in self.courses for n in ("grad_norm", "grad_norm_clipped")]
        return log_limits([np.log10(n[np.isfinite(n) & (n > 0)]) for n in norms], 12)


def _rate_limits(courses: Sequence[Course]) -> tuple[float, float]:
    """Room for zero and for nearly all rates; intervals may leave the axis."""
    rates = np.concatenate([one.numbers["rate"] for one in courses])
    ends = np.concatenate([one.numbers[n] for one in courses for n in ("rate_low", "rate_high")])
    rates, ends = (values[np.isfinite(values)] for values in (rates, ends))
    if not len(rates):
        return -1.0, 1.0
    known = np.concatenate([rates, np.quantile(ends, (0.05, 0.95)) if len(ends) else []])
    low, high = min(0.0, float(known.min())), max(0.0, float(known.max()))
    margin = max(0.08 * (high - low), 1e-4)
    return low - margin, high + margin


@dataclass(frozen=True, kw_only=True)
class Along(Chart):
    """A picture over the training steps of one layer."""

    course: Course  # its layer
    shared: Shared  # what it has in common with the others
    strips: tuple[Strip, ...]  # beneath the title


@dataclass(frozen=True)
class Strip:
    """A row of coloured pieces over the training steps."""

    name: str  # what it shows
    pieces: tuple[StripPiece, ...]  # one after the other


@dataclass(frozen=True)
class StripPiece:
    """One colour from a training step to another."""

    start: float  # training step at its left end
    stop: float  # at its right end
    colour: str  # of the piece
    words: str  # what it means

    def fits(self, steps: tuple[float, float]) -> bool:
        """Whether its words have room in it."""
        room = WIDTH * (self.stop - self.start) / (steps[1] - steps[0])
        return bool(self.words) and inches(self.words, SMALL) + 0.06 < room


def edges(step: np.ndarray) -> np.ndarray:
    """Where the part of each probe begins and ends on the axis: half-way between two probes, never below 0.

    >>> edges(np.array([1, 101, 301])).tolist(), edges(np.array([5])).tolist()
    ([0.0, 51.0, 201.0, 401.0], [4.5, 5.5])
    """
    if len(step) < 2:
        return np.array([step[0] - 0.5, step[0] + 0.5])
    middle = (step[1:] + step[:-1]) / 2
    first, last = step[0] - (middle[0] - step[0]), step[-1] + (step[-1] - middle[-1])
    return np.concatenate([[max(first, min(0.0, float(step[0])))], middle, [last]])


def shared_by(courses: Sequence[Course]) -> Shared:
    """The limits that these courses have in common."""
    ends = [edges(one.step)[[0, -1]] for one in courses if len(one.step)]
    known = [one.lag[~np.isnan(one.profile).all(axis=0)] for one in courses]
    lags = [float(one[-1]) for one in known if len(one)]
    return Shared(
        steps=(min(float(end[0]) for end in ends), max(float(end[1]) for end in ends)),
        lags=max(lags, default=1.0),
        courses=tuple(courses),
    )


def _limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    known = np.concatenate([np.zeros(0), *values])
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    # of many, the very highest may leave the axis
    low, high = float(known.min()), float(np.quantile(known, 0.995 if len(known) > 400 else 1.0))
    margin = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
    return low - margin, high + margin


def strips_of(course: Course) -> tuple[Strip, ...]:
    """The strips of a layer: its verdicts, and where clipping acted, each where it is known."""
    edge = edges(course.step)
    found = []
    if np.any(course.verdict != ""):
        pieces = [
            StripPiece(
                edge[run.start],
                edge[run.stop],
                VERDICT_COLOURS.get(run.verdict, UNDEFINED),
                run.verdict,
            )
            for run in stretches(course.verdict, lasting=1)
        ]
        found.append(Strip("verdict", tuple(pieces)))
    acts = course.numbers["clipped"]
    if (acts == 1).any():
        words = np.where(acts == 1, "clipping acted", np.where(acts == 0, "none", ""))
        colours = {"clipping acted": DIRECT, "none": OFF, "": UNDEFINED}
        pieces = [
            StripPiece(edge[run.start], edge[run.stop], colours[run.verdict],
                  run.verdict.replace("none", ""))
            for run in stretches(words, lasting=1)
        ]  # fmt: skip
        found.append(Strip("clipping", tuple(pieces)))
    if course.bad.any():
        words = np.where(course.bad, "NaN or Inf", "")
        pieces = [
            StripPiece(
                edge[run.start], edge[run.stop], BAD if run.verdict else "#ffffff", run.verdict
            )
            for run in stretches(words, lasting=1)
        ]
        found.append(Strip("finite", tuple(pieces)))
    return tuple(found)


def unwritten(charts: Sequence[Along]) -> dict[str, str]:
    """Colour -> its meaning, for those of the strips that stand nowhere with their words in them."""
    told, seen = set(), {}
    for chart in charts:
        for strip in chart.strips:
            for piece in strip.pieces:
                seen[piece.colour] = piece.words
                if piece.fits(chart.shared.steps):
                    told.add(piece.colour)
    return {colour: words for colour, words in seen.items() if words and colour not in told}


def colour_words(charts: Sequence[Along]) -> str:
    """The same as a sentence, for pictures without a row of colours below them."""
    said = [
        f"{COLOUR_NAMES.get(colour, 'grey')} {words}" for colour, words in unwritten(charts).items()
    ]
    return f"In the strips: {', '.join(said)}." if said else ""


def draw_strip(ax: Axes, strip: Strip, shared: Shared) -> None:
    """The pieces of a strip with their words, where they fit."""
    ax.set(xlim=shared.steps, ylim=(0, 1), xticks=[], yticks=[])
    ax.set_ylabel(strip.name, rotation=0, ha="right", va="center", labelpad=4, fontsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for piece in strip.pieces:
        ax.add_patch(
            Rectangle((piece.start, 0), piece.stop - piece.start, 1, facecolor=piece.colour, lw=0)
        )
        if piece.fits(shared.steps):
            ax.text(
                (piece.start + piece.stop) / 2, 0.46, piece.words, ha="center", va="center",
                fontsize=SMALL, color=_readable(piece.colour),
            )  # fmt: skip


def _readable(colour: str) -> str:
    red, green, blue = to_rgb(colour)
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.55 else "white"


def step_axis(ax: Axes, shared: Shared, *, label: bool) -> None:
    """The training steps along the bottom of a panel."""
    ax.set_xlim(*shared.steps)
    ax.xaxis.set_major_locator(whole(8))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: updates(value)))
    ax.tick_params(labelbottom=label)
    if label:
        words = {
            "update": "training step (updates)",
            "checkpoint": "checkpoint, in the order of names",
        }
        ax.set_xlabel(words.get(shared.counted_in, shared.counted_in), labelpad=2)


def change_lines(ax: Axes, course: Course) -> None:
    """A thin line wherever the verdict changed for good."""
    edge = edges(course.step)
    for run in stretches(course.verdict)[1:]:
        ax.axvline(edge[run.start], color="black", lw=0.6, ls=(0, (2, 2)), alpha=0.7, zorder=5)
