"""A training while it runs, in the terminal: where each layer stands, and its last probes as a waterfall."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradflow.history import History
from gradflow.limits import GONE_DECADES
from gradflow.reporter.histories.course import Course, course
from gradflow.reporter.histories.now import Now, now
from gradflow.reporter.histories.story import updates
from gradflow.reporter.histories.waterfall import depth
from gradflow.reporter.numbers import number_words
from gradflow.reporter.scale import DECADES, paint
from gradflow.reporter.text import STYLES, console_of, encoded, is_plain

PROBES = 60  # of the waterfall, the last ones
SECONDS = 1.0  # between two looks at the file
PATIENCE = 4.0  # times what drawing took, between two drawings
FALL_LINES = (8, 6, 4, 3, 2)  # lines of a waterfall: the largest for which all layers fit
MARGIN = 6  # letters left of it
TALL = 12  # lines of a window that has room for a second line of the key
BESIDE = MARGIN + PROBES + 2  # letters of a run, for another one to stand beside it
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=+*#@"
SHADES = (" ", "░", "▒", "▓", "█")  # without colours: gone, then ever less lost
PLAIN_SHADES = (" ", ".", "-", "+", "#")
GREW, BROKEN, NOTHING = "^", "!", "~"  # without colours: grown tenfold, NaN or Inf, no such step


@dataclass(frozen=True)
class Followed:
    """One run that is looked at."""

    name: str  # what it is called
    history: History  # reads on when asked to


def follow(
    runs: Sequence[Followed],
    console: Console | None = None,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Show runs until all have ended or Ctrl-C comes; in a pipe a line for each probe."""
    console = console or console_of()
    if not console.is_terminal:
        _print_lines(runs, console, wait)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        size = None
        while True:
            found = [run.history.refresh() for run in runs]
            started = time.monotonic()
            if any(found) or size != console.size or all(run.history.ended for run in runs):
                size = console.size
                live.update(view(runs, console), refresh=True)
            if all(run.history.ended for run in runs):
                return
            wait(max(SECONDS, PATIENCE * (time.monotonic() - started)))


# --------------------------------------------------------------------------------- a line a probe


def _print_lines(runs: Sequence[Followed], console: Console, wait: Callable[[float], None]) -> None:
    done = [0] * len(runs)
    while True:
        for place, run in enumerate(runs):
            run.history.refresh()
            if len(run.history) < done[place]:  # another history took its place
                done[place] = 0
            for line in lines(run, done[place], several=len(runs) > 1):
                console.print(encoded(Text(line), console), soft_wrap=True, highlight=False)
            done[place] = len(run.history)
        if all(run.history.ended for run in runs):
            break
        wait(SECONDS)
    for run in runs:
        if not len(run.history):
            said = [note.text for note in run.history.notes[-1:]]
            words = "; ".join([f"{run.name}: no probe was made, and it ended", *said])
            console.print(encoded(Text(words), console), soft_wrap=True, highlight=False)


def lines(run: Followed, start: int, *, several: bool) -> Iterator[str]:
    """A line for each probe from a place on, in the order in which they were written."""
    if len(run.history) <= start:
        return
    data = run.history.data.isel(step=slice(start, None))
    for place in range(data.sizes["step"]):
        probe = data.isel(step=slice(place, place + 1))
        step, loss = int(probe["step"].item()), float(probe["loss"].item())
        words = [run.name] if several else []
        words.append(f"update {updates(step)}")
        words += [f"loss {number_words(loss)}"] if np.isfinite(loss) else []
        words += ["clipping acted"] if float(probe["clipped"].item()) == 1 else []
        for layer in run.history.layers:
            words.append(line_of(now(course(run.history, layer, data=probe))))
        yield "  ".join(words).removesuffix(";")


def line_of(one: Now) -> str:
    """One layer at one probe in a few words."""
    said = [one.course.layer, one.verdict or "no verdict"]
    if one.rate != "none":
        said.append(f"rate {one.rate}")
    if one.horizon != "none":
        said.append("never gone" if one.horizon == "never" else f"horizon {one.horizon}")
    elif np.isfinite(one.course.gone[-1]):
        said.append(f"this loss's gradient gone after {one.course.gone[-1]:.0f}")
    if one.course.bad.any():
        said.append("NaN or Inf")
    return " ".join(said) + ";"


# --------------------------------------------------------------------------------------- the view


def view(runs: Sequence[Followed], console: Console) -> RenderableType:
    """All runs, side by side where they fit, else one below the other."""
    beside = max(1, min(len(runs), (console.width + 2) // (BESIDE + 2)))
    rows = -(-len(runs) // beside)
    room = max(4, (console.height - 3) // rows)
    width = min(console.width, BESIDE) if beside > 1 else console.width
    shown = [_run(run, console, room, width) for run in runs]
    if beside == 1:
        return Group(*shown, _key(console))
    return Group(Columns(shown, width=BESIDE, padding=(0, 2)), _key(console))


def _key(console: Console) -> Text:
    """What the colours, or the letters, mean, and the axes."""
    text = Text(" " * MARGIN, no_wrap=True)
    if _coloured(console):
        decades = np.linspace(-DECADES, DECADES, 2 * DECADES + 1)
        text.append("vanished ", style="dim")
        for rgb in paint(decades).tolist():
            text.append("█", style=f"rgb({','.join(map(str, rgb))})")
        text.append(" exploded; pale: as at the loss", style="dim")
    else:
        shades = PLAIN_SHADES if is_plain(console) else SHADES
        far = ("0.1", "0.01", "0.001")
        less = " ".join(f"{one}>{share}" for one, share in zip(shades[3:0:-1], far, strict=True))
        text.append(f"{shades[4]} as at the loss {less}, blank gone, {GREW} grown", style="dim")
    if console.height >= TALL:
        words = "across: the last probes; down: steps back; bars: reach"
        text.append("\n" + " " * MARGIN + words, style="dim")
    return encoded(text, console)


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color and not is_plain(console)


def _run(run: Followed, console: Console, room: int, width: int) -> RenderableType:
    """One run in so many lines and letters."""
    head = _head(run, console, width)
    history = run.history
    if not len(history):
        return Group(head, encoded(Text("no probe yet", style="dim"), console))
    layers = history.layers
    data = history.data.isel(step=slice(-PROBES, None))
    high = next((lines for lines in FALL_LINES if 1 + len(layers) * (lines + 1) <= room), 0)
    fits = len(layers) if high else max(1, min(len(layers), room - 3))
    parts: list[RenderableType] = [head]
    shown = [now(course(history, layer, data=data)) for layer in layers[:fits]]
    if not high:
        parts.append(_table(shown, console))
    for one in shown if high else ():
        parts += [_words(one, console, width), *_waterfall(one.course, console, high, width)]
    if fits < len(layers):
        left = len(layers) - fits
        more = f"and {left} more {'layer' if left == 1 else 'layers'}: make the window higher"
        parts.append(_cut(Text(more, style="dim"), console, width))
    return Group(*parts)


def _head(run: Followed, console: Console, width: int) -> Text:
    history = run.history
    words = [f"{run.name}: {history.title}"]
    if len(history):
        last = history.data.isel(step=-1)
        words.append(f"update {updates(int(last['step']))}")
        loss = float(last["loss"])
        words += [f"loss {number_words(loss)}"] if np.isfinite(loss) else []
        words += ["clipping acted"] if float(last["clipped"]) == 1 else []
    words.append("ended" if history.ended else "running" if len(history) else "waiting")
    return _cut(Text(", ".join(words), style="bold"), console, width)


def _cut(text: Text, console: Console, width: int) -> Text:
    text = encoded(text, console)
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis" if not is_plain(console) else "crop")
    return text


def _words(one: Now, console: Console, width: int) -> Text:
    """A line on a layer: verdict, rate, horizon, half-life where it fits, a sparkline of the reach."""
    verdict = one.verdict or "no verdict"
    spark = sparkline(one.course, console, 20 if width >= 70 else 8)
    gone = {"none": "", "never": "never gone"}.get(one.horizon, f"horizon {one.horizon}")
    rate = "" if one.rate in ("none", "not settled") else f"rate {one.rate}"
    half = "" if one.half_life in ("none", "never") or not rate else f"halves in {one.half_life}"
    for left_out in ((), (half,), (half, rate)):
        parts = (one.course.layer, verdict, rate, gone, half)
        said = [part for part in parts if part and part not in left_out]
        if len("  ".join([*said, spark])) <= width:
            break
    text = encoded(Text("  ".join(said)), console)
    text.truncate(max(8, width - len(spark) - 2), overflow="crop")
    place = text.plain.find(verdict, len(one.course.layer))
    if place >= 0:
        text.stylize(STYLES.get(one.verdict, "dim"), place, place + len(verdict))
    text.append(f"  {spark}", style="dim")
    text.no_wrap = True
    return text


def _table(shown: Sequence[Now], console: Console) -> Table:
    """A line per layer, where there is no room for more."""
    table = Table.grid(padding=(0, 2))
    for _ in range(5):
        table.add_column(no_wrap=True, overflow="crop")
    for one in shown:
        cells = [one.course.layer, one.verdict or "no verdict", one.rate, one.horizon,
                 sparkline(one.course, console)]  # fmt: skip
        styles = ["", STYLES.get(one.verdict, "dim"), "", "", "dim"]
        table.add_row(*(encoded(Text(words, style=style), console)
                        for words, style in zip(cells, styles, strict=True)))  # fmt: skip
    return table


def sparkline(one: Course, console: Console, most: int = 20) -> str:
    """The reach at the last probes as bars, of all that there is to reach; a blank where unknown."""
    bars = PLAIN_BARS if is_plain(console) else BARS
    reach = one.reach[-most:]
    span = one.numbers["span"][-most:]
    known = span[~np.isnan(span)]
    whole = max(2.0, float(known[-1])) if len(known) else max(2.0, float(one.lag[-1]) + 1)
    share = np.clip(np.nan_to_num(reach, nan=0.0, posinf=whole) / (whole - 1), 0, 1)
    places = np.minimum((share * len(bars)).astype(int), len(bars) - 1)
    return "".join(
        " " if unknown else bars[place]
        for place, unknown in zip(places, np.isnan(reach), strict=True)
    )


def _waterfall(one: Course, console: Console, high: int, width: int) -> list[Text]:
    """The gradient of the last loss step, probes across, steps back from the loss down."""
    columns = min(PROBES, max(1, width - MARGIN))
    colours = _coloured(console)
    rows = 2 * high if colours else high
    values, bad, lags = grid(one, rows, columns)
    found = []
    for line in range(high):
        lag = lags[2 * line] if colours else lags[line]
        label = "loss" if line == 0 else f"{lag:,.0f}" if line in (high // 2, high - 1) else ""
        text = Text(f"{label:>{MARGIN - 1}} ", style="dim")
        text.no_wrap = True
        if colours:
            _add_blocks(text, values[2 * line : 2 * line + 2], bad[2 * line : 2 * line + 2])
        else:
            text.append("".join(_letters(values[line], bad[line], plain=is_plain(console))))
        found.append(text)
    return found


def grid(one: Course, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log10 of the profile of the last probes, whether it was NaN or Inf, and the lag of each row."""
    known = np.flatnonzero(~np.isnan(one.profile).all(axis=0))
    lag = one.lag[known] if len(known) else np.zeros(1)
    profile = (
        one.profile[-columns:][:, known] if len(known) else np.full((len(one.step), 1), np.nan)
    )
    down = np.linspace(0.0, float(depth(lag[-1])), rows)
    row = np.abs(depth(lag)[None, :] - down[:, None]).argmin(axis=1)
    values = profile[-columns:][:, row].T
    bad = np.isnan(values) & one.bad[-columns:][None, :]
    return values, np.asarray(bad), lag[row]


def _add_blocks(text: Text, values: np.ndarray, bad: np.ndarray) -> None:
    """Two rows as one line: the upper one in the letters' colour, the lower one behind them."""
    upper, lower = paint(values, bad)
    for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
        text.append(
            "▀", style=f"rgb({','.join(map(str, above))}) on rgb({','.join(map(str, below))})"
        )


def _letters(values: np.ndarray, bad: np.ndarray, *, plain: bool) -> Iterator[str]:
    """One row without colours: the fuller a letter, the less was lost."""
    shades = PLAIN_SHADES if plain else SHADES
    for value, broken in zip(values.tolist(), bad.tolist(), strict=True):
        if broken:
            yield BROKEN
        elif np.isnan(value):
            yield NOTHING
        elif value >= 1:
            yield GREW
        elif value < GONE_DECADES:
            yield shades[0]
        else:
            yield shades[min(4, 4 + int(np.floor(min(0.0, value))))] if value < 0 else shades[4]
