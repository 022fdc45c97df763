"""Draw known numbers against those gradflow measures, with their intervals, and print them.

    python tests/validation.py        # about a minute; writes reports/samples/validation/

Three panels: Lyapunov exponents of systems from the literature and of networks, the coverage of the
95 % interval by simulation, half-lives and horizons with a closed form. Seeds are fixed and were
not chosen: of many 95 % intervals, one in twenty misses.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from known import (
    COUNTS,
    REPEATS,
    Memory,
    Row,
    coverage,
    coverage_of_a_regression,
    coverage_of_one,
    literature,
    memories,
    networks,
)
from matplotlib.axes import Axes
from seam import DIRECT, FAINT, INK, SOFT, VERDICT_COLOURS, Picture, look, png

FOLDER = Path(__file__).parent.parent / "reports/samples/validation"
EXACT, LIMIT, MISS = VERDICT_COLOURS["vanishing"], VERDICT_COLOURS["stable"], "#c3263a"


def draw_exponents(figure: Picture, ax: Axes, rows: list[Row], top: float) -> None:
    step, place, names = 0.205, top + 0.42, ""
    for row in rows:
        if row.group != names:
            place += 0.12 * bool(names)
            figure.words(0.3, place, row.group, fontsize=8.5, color=SOFT, style="italic")
            place, names = place + step, row.group
        y = place + 0.062
        figure.words(0.3, place, row.name, fontsize=8.5)
        figure.words(3.62, place, number(row.known, row.within), fontsize=8.5, ha="right")
        figure.words(4.36, place, number(row.rate.value), fontsize=8.5, ha="right")
        colour = LIMIT if row.within else EXACT if row.holds else MISS
        if row.within:
            ax.plot([-row.within, row.within], [y, y], color=LIMIT, alpha=0.25, lw=6.5,
                    solid_capstyle="butt")  # fmt: skip
        low, high = row.rate.low - row.known, row.rate.high - row.known
        ax.plot([low, high], [y, y], color=colour, lw=1.5, solid_capstyle="butt")
        ax.plot([row.rate.value - row.known], [y], "o", color=colour, ms=4.5)
        place += step
    head = {"fontsize": 8.5, "color": SOFT}
    figure.words(0.3, top + 0.16, "system, largest exponent first", **head)
    figure.words(3.62, top + 0.16, "known", ha="right", **head)
    figure.words(4.36, top + 0.16, "measured", ha="right", **head)
    ax.axvline(0, color=FAINT, lw=0.8, zorder=0)
    ax.set(xlim=(-0.072, 0.072), ylim=(place, top + 0.36), yticks=[],
           xlabel="measured − known, 95 % interval",
           xticks=[-0.05, 0, 0.05], xticklabels=["−0.05", "0", "0.05"])  # fmt: skip


def number(value: float, within: float = 0.0) -> str:
    """Four digits after the point, two or three of a limit."""
    text = f"≈ {value:.3f}" if within else f"{value:.4f}"
    return text.replace("-", "−")


def draw_coverage(ax: Axes, found: dict[str, list[float]], one: float) -> None:
    ax.fill_between([0.5, 5.5], 92, 97, color="#ededed", lw=0, zorder=0)
    ax.axhline(95, color=FAINT, lw=0.8, ls=(0, (4, 3)))
    styles = zip(found, (EXACT, DIRECT, LIMIT), "os^", (-0.16, 0.0, 0.16), strict=True)
    for kind, colour, marker, shift in styles:
        places = np.arange(1, 1 + len(COUNTS)) + shift
        shares = 100 * np.array(found[kind])
        error = 1.96 * np.sqrt(shares * (100 - shares) / REPEATS)
        ax.errorbar(places, shares, error, fmt=marker, color=colour, ms=4.5, lw=1, label=kind)
    error = 196 * np.sqrt(one * (1 - one) / REPEATS)
    ax.errorbar([0], [100 * one], error, fmt="D", color=INK, ms=4.5, lw=1,
                label="one: AR(0.5), 800 steps")  # fmt: skip
    ax.set(ylim=(89.5, 99.5), xlim=(-0.5, 5.5), xticks=range(6), xticklabels=["1", *map(str, COUNTS)],
           xlabel="sequences", ylabel="intervals that hold the truth, %")  # fmt: skip
    ax.legend(loc="lower center", frameon=False, ncols=2, columnspacing=1, handletextpad=0.3,
              bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)  # fmt: skip


def draw_memories(ax: Axes, found: list[Memory]) -> None:
    ax.plot([0.3, 5000], [0.3, 5000], color=FAINT, lw=0.8, zorder=0)
    searched = found[0].searched
    ax.axhline(searched, color=FAINT, lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.text(0.36, searched * 1.15, f"searched: {searched} steps", fontsize=8, color=SOFT)
    halves = np.array([one.half_life for one in found])
    ax.plot(*halves.T, "o", color=EXACT, ms=5, label="half-life")
    reached = [one.horizon for one in found if one.horizon[1] is not None]
    beyond = [one.horizon[0] for one in found if one.horizon[1] is None]
    ax.plot(*np.array(reached, float).T, "s", color=DIRECT, ms=5, label="horizon, gain < 10⁻³")
    ax.plot(beyond, [searched] * len(beyond), "^", color=DIRECT, mfc="white", ms=6,
            label="horizon beyond what was searched")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(0.3, 5000), ylim=(0.3, 5000),
           xlabel="known, steps", ylabel="measured, steps")  # fmt: skip
    ticks = [1, 10, 100, 1000]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    ax.legend(loc="lower right", frameon=False, handletextpad=0.3, borderaxespad=0.3)


# -------------------------------------------------------------------------------------- the page


def draw(rows: list[Row], shares: dict[str, list[float]], one: float, straight: float,
         found: list[Memory]) -> Picture:  # fmt: skip
    """One figure of three panels, placed in inches."""
    groups = len({row.group for row in rows})
    high = 0.205 * (len(rows) + groups) + 0.12 * (groups - 1) + 0.06
    figure = Picture(11.6, high + 1.8)
    title = {"fontsize": 11, "fontweight": "bold"}
    small = {"fontsize": 8.5, "color": SOFT, "linespacing": 1.35}
    with look():
        top = 0.42
        figure.words(0.3, 0.14, "Lyapunov exponents: known against measured", **title)
        ax = figure.inches(4.62, top + 0.36, 2.4, high)
        draw_exponents(figure, ax, rows, top)
        statistical = [
            row for row in rows if not row.within and row.rate.high > row.rate.low + 1e-9
        ]
        holding = sum(row.holds for row in statistical)
        figure.words(0.3, top + high + 0.85, (
            "In nats per step. Blue: known exactly or to all digits shown; "
            f"{holding} of {len(statistical)} intervals over sixteen orbits\nhold the known exponent "
            "(red: not). Points without a bar are exact to rounding. Green: a limit of large\nnetworks, "
            "the pale bar how far off it may be; the interval is over six of them."), **small)  # fmt: skip
        left, wide = 7.95, 3.35
        figure.words(left - 0.5, 0.14, "Does the 95 % interval cover?", **title)
        middle = top + 0.62
        draw_coverage(figure.inches(left, middle, wide, 2.5), shares, one)
        figure.words(left - 0.5, middle + 3.05, (
            "Grey: claimed for two sequences and more. Random walks of\n100 steps, 3000 samples each; bars: "
            "error of the simulation.\nOne sequence alone is given batch means. The interval of one\n"
            f"straight line through the lags would cover {100 * straight:.0f} %."), **small)  # fmt: skip
        lower = middle + 4.4
        figure.words(left - 0.5, lower - 0.32, "Half-life and horizon", **title)
        draw_memories(figure.inches(left, lower, wide, 3.1), found)
        figure.words(left - 0.5, lower + 3.65, (
            "Layers that decay by a known factor at every step: scalar RNNs,\nand LSTMs without recurrent "
            "weights by their forget bias.\n300 steps each."), **small)  # fmt: skip
    return figure


def table(rows: list[Row], shares: dict[str, list[float]], found: list[Memory]) -> str:
    """The numbers of the figure as text."""
    lines = ["Made by `python tests/validation.py`.", "", "| exponent of | known | from | measured | 95 % |",
             "|---|---|---|---|---|"]  # fmt: skip
    name = ""
    for row in rows:
        name = row.name or name
        interval = f"{row.rate.low:.4f} … {row.rate.high:.4f}"
        known = f"{row.known:.4f}" + (f" ± {row.within:g}" if row.within else "")
        lines.append(f"| {name} | {known} | {row.source} | {row.rate.value:.4f} | {interval} |")
    lines += ["", "| coverage, % | " + " | ".join(f"{n} sequences" for n in COUNTS) + " |",
              "|---" * (len(COUNTS) + 1) + "|"]  # fmt: skip
    for kind, covering in shares.items():
        lines.append(f"| {kind} | " + " | ".join(f"{100 * share:.1f}" for share in covering) + " |")
    lines += [
        "",
        "| layer | half-life, known | measured | horizon, known | measured |",
        "|---" * 5 + "|",
    ]
    for one in found:
        horizon = one.horizon[1] if one.horizon[1] is not None else f"> {one.searched}"
        halves = " | ".join(f"{value:.4f}" for value in one.half_life)
        lines.append(f"| {one.name} | {halves} | {one.horizon[0]} | {horizon} |")
    return re.sub(r"-(?=\d)", "−", "\n".join(lines)) + "\n"


def main() -> None:
    """Measure, draw, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [*literature(), *networks()]
    shares, found = coverage(), list(memories())
    figure = draw(rows, shares, coverage_of_one(), coverage_of_a_regression(), found)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "validation.png").write_bytes(png(figure))
    (FOLDER / "validation.md").write_text(table(rows, shares, found))
    print(table(rows, shares, found))
    print(f"wrote {FOLDER / 'validation.png'}")


if __name__ == "__main__":
    main()
