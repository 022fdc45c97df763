"""One page with plots, and the table of the README, from the numbers of a run."""

from __future__ import annotations

import base64
import statistics
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from seam import DIRECT, INK, SOFT, VERDICT_COLOURS, Picture, look, png

Found = dict[str, Any]
TEMPLATE = Path(__file__).with_name("page.html")
ON_THE_PAGE_ONLY = ("map in float", "peak above", "S = 512", "import gradflow", "memory of the ",
                    "one process against two", "the history of a sweep", "a step between two probes",
                    "gradflow --help", "functional.jacobian")  # fmt: skip
# the beginning of a goal -> what bounds it, by profiles of the very cases that are measured
BOUNDS = {
    "recorded step": "the scan back over time is a Python loop: every step is a dozen small operations, "
    "which a narrow layer's own fused kernel does not pay for.",
    "exact map, spectral": "beside the product itself, which takes less than half of the time, it is the "
    "proof that no direction was missed (a Gram matrix and its Cholesky factor, where no direction has "
    "60 % of the norm), products with thin matrices, and QR and eigenvalues of small ones, which run on "
    "one thread while the peak is that of two.",
}
GOOD, BAD = VERDICT_COLOURS["stable"], VERDICT_COLOURS["exploding"]


def write(found: Found, folder: Path) -> None:
    """Write index.html beside the JSON."""
    pictures = {
        name: base64.b64encode(png(draw(found))).decode()
        for name, draw in PICTURES.items()
        if name in found["parts"]
    }
    rows = [row for part in found["parts"].values() for row in part]
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    text = template.render(
        goals=goals(found),
        bounds=bounds(found),
        rows=rows,
        machine=found["machine"],
        pictures=pictures,
        said=said,
    )
    (folder / "index.html").write_text(text)


def bounds(found: Found) -> dict[str, str]:
    """What bounds each goal that is missed, or that a single shape misses."""
    tight = [goal["what"] for goal in goals(found) if goal["met"] == "no"] + ["recorded step"]
    return {
        begin: why for begin, why in BOUNDS.items() if any(what.startswith(begin) for what in tight)
    }


def said(row: dict[str, Any]) -> str:
    """A value with its unit."""
    return f"{number(row['value'])} {row['unit']}"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shape(row: dict[str, Any]) -> str:
    """The shape of a recorded model in a few letters."""
    case = row["case"]
    extra = " bidirectional" * case["bidirectional"] + " packed" * case["packed"]
    layers = f" {case['layers']} layers" if case["layers"] > 1 else ""
    return f"{case['cell']} H {case['hidden']} T {case['steps']}{layers}{extra}"


def goals(found: Found) -> list[dict[str, str]]:
    """Every goal: what, against what is asked, and what was reached."""
    table = []
    steps = [r for r in found["parts"].get("recording", []) if r["what"].startswith("recorded")]
    if steps:
        middle = statistics.median(row["value"] for row in steps)
        least, most = min(r["value"] for r in steps), max(r["value"] for r in steps)
        table.append(
            {
                "what": f"recorded step against the plain step, median of {len(steps)} shapes",
                "goal": "at most 2.5 ×",
                "reached": f"{middle:.2f} × ({least:.2f} to {most:.2f})",
                "met": "yes" if middle <= 2.5 else "no",
            }
        )
    for part, rows in found["parts"].items():
        for row in rows:
            if part == "recording" or row["met"] is None:
                continue
            least = row["least"] is not None
            bound = row["least"] if least else row["most"]
            sizes = ", ".join(f"{k} = {v}" for k, v in row["case"].items() if k in ("S", "T", "H"))
            table.append(
                {
                    "what": row["what"] + (f" ({sizes})" if sizes else ""),
                    "goal": f"at {'least' if least else 'most'} {number(bound)} {row['unit']}",
                    "reached": said(row),
                    "met": "yes" if row["met"] else "no",
                }
            )
    return table


def markdown(found: Found) -> str:
    """The goals as a table for the README, with the machine."""
    lines = ["| what | goal | measured |", "|---|---|---|"]
    for goal in goals(found):
        if any(words in goal["what"] for words in ON_THE_PAGE_ONLY):
            continue
        missed = "" if goal["met"] == "yes" else " (missed)"
        lines.append(f"| {goal['what']} | {goal['goal']} | {goal['reached']}{missed} |")
    m = found["machine"]
    where = f"{m['processor']}, {m['threads']} threads, torch {m['torch']}"
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on {where}; [the page](reports/benchmarks/index.html) has every shape.",
        ]
    )


# ------------------------------------------------------------------------------------- the plots


def draw_recording(found: Found) -> Picture:
    """A dot per shape: the recorded step over the plain step, with quartiles."""
    rows = [r for r in found["parts"]["recording"] if r["what"].startswith("recorded")]
    with look():
        figure = Picture(8.2, 0.9 + 0.24 * len(rows))
        figure.words(0.2, 0.1, TITLES["recording"], fontsize=10, fontweight="bold", color=INK)
        axes = figure.inches(2.6, 0.4, 5.3, 0.24 * len(rows))
        for place, row in enumerate(reversed(rows)):
            axes.plot([row["low"], row["high"]], [place, place], color=INK, lw=1)
            axes.plot(row["value"], place, "o", color=GOOD if row["met"] else BAD, ms=5)
        axes.set_yticks(range(len(rows)), [shape(row) for row in reversed(rows)], fontsize=7.5)
        axes.axvline(2.5, color=SOFT, ls="--", lw=1)
        axes.axvline(1.0, color=SOFT, lw=0.8)
        axes.set_xlim(0, max(4.0, 1.1 * max(row["high"] for row in rows)))
        axes.set_xlabel("times a plain step; bars: quartiles; dashed: the goal")
    return figure


def draw_growth(found: Found) -> Picture:
    """Seconds against size, log-log, with the fitted power."""
    rows = found["parts"]["growth"]
    with look():
        figure = Picture(8.2, 4.9)
        figure.words(0.2, 0.1, TITLES["growth"], fontsize=10, fontweight="bold", color=INK)
        for place, row in enumerate(rows):
            left, top = 0.7 + 2.6 * (place % 3), 0.65 + 2.2 * (place // 3)
            draw_power(figure.inches(left, top, 1.8, 1.4), row)
    return figure


def draw_power(axes: Axes, row: dict[str, Any]) -> None:
    """One series of sizes."""
    sizes, times = row["case"]["sizes"], row["case"]["seconds"]
    axes.loglog(sizes, times, "o-", color=VERDICT_COLOURS["vanishing"], ms=4, lw=1.2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    theory = row["note"].partition("in theory ")[2].partition(";")[0]
    axes.set_title(f"{row['what']}\npower {row['value']:.2f} (theory {theory})", fontsize=8)
    axes.set_xlabel(row["case"]["along"], labelpad=1)
    axes.set_ylabel("seconds", labelpad=1)


def draw_memory(found: Found) -> Picture:
    """Peak memory of a plain step, a recorded one and an analysis."""
    rows = [row for row in found["parts"]["memory"] if row["what"].startswith("peak")]
    colours = {
        "plain step": SOFT,
        "recorded step": VERDICT_COLOURS["vanishing"],
        "analysis": DIRECT,
    }
    with look():
        figure = Picture(8.2, 0.9 + 0.26 * len(rows))
        figure.words(0.2, 0.1, TITLES["memory"], fontsize=10, fontweight="bold", color=INK)
        axes = figure.inches(2.6, 0.4, 5.0, 0.26 * len(rows))
        for place, row in enumerate(reversed(rows)):
            name = row["what"].partition(": ")[2]
            axes.barh(place, row["value"], color=colours[name], height=0.7)
        names = [
            f"{row['what'].partition(': ')[2]}, H {row['case']['H']} T {row['case']['T']}"
            for row in reversed(rows)
        ]
        axes.set_yticks(range(len(rows)), names, fontsize=7.5)
        axes.set_xlabel("peak memory above the start of the process, MiB")
    return figure


TITLES = {
    "recording": "A recorded training step, against the plain one",
    "growth": "How time grows",
    "memory": "Peak memory",
}
PICTURES = {"recording": draw_recording, "memory": draw_memory, "growth": draw_growth}
