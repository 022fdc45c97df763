"""The page of a training: one HTML file that reads offline, escaped, whole without JavaScript.

Its order: a sentence per layer, the waterfall, what was said during the training, rates, horizons, gates,
norms and clipping, all numbers, how the run was watched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from markupsafe import Markup

from gradflow._version import __version__
from gradflow.history import History, Note
from gradflow.history.table import extent
from gradflow.limits import GONE_WORDS, PAGE_BYTES
from gradflow.reporter.histories.groups import GroupRow, reach_words
from gradflow.reporter.histories.kinds import HISTORY_KINDS
from gradflow.reporter.histories.now import Now, worst_first
from gradflow.reporter.histories.story import updates
from gradflow.reporter.numbers import count_words, percent_words, rate_words
from gradflow.reporter.page import provenance_rows, template
from gradflow.reporter.picture import Drawn, data_url
from gradflow.reporter.readout import as_json

HEAD_LAYERS = 2  # layers whose waterfall heads the page; the others follow below
DRAWN_LAYERS = 6  # layers that have pictures on the page
SAID = 3  # notes at the head of the page, the last ones
NOTES = 500  # notes on the page, the last ones
TITLES = {
    "waterfall": "Waterfall",
    "rates": "Rates, with their intervals",
    "horizons": "Horizons",
    "gates": "Gates",
    "norms": "Gradient norms and clipping",
}


@dataclass(frozen=True)
class Embedded:
    """One picture on the page."""

    source: str  # data: URI
    alt: str  # words that stand for it
    wide: int  # pixels as drawn
    high: int  # the same
    told: Markup  # its numbers for page.js


def worst_layers(layers: Sequence[Now], most: int) -> list[Now]:
    """So many of the worst layers, in the order in which they ran."""
    chosen = worst_first(list(layers))[:most]
    return [one for one in layers if one in chosen]


def history_page(
    history: History,
    layers: Sequence[Now],
    pictures: Mapping[tuple[str, str], Drawn],
    groups: Sequence[GroupRow] = (),
) -> str:
    """Build the page from a history, its layers and its pictures by (kind, layer name).

    Pictures that would take the page above a megabyte are left out, the least important first, and the
    page says so.
    """
    notes = [note for note in history.notes if note.about != "resumed"]
    alerts = [note for note in notes if note.about in ("alert", "nonfinite", "failed", "warning")]
    changes = [note for note in notes if note.about == "verdict"]
    head = (alerts or changes)[-SAID:]
    ordered = worst_first(list(layers))
    heads = [("groups", "top"), ("waterfall", "top"), ("waterfall", layers[0].course.name)]
    render = functools.partial(
        template("history.html").render,
        title=history.title or "model",
        window_title=f"{history.title or 'model'}: gradient flow during training",
        extent=extent(history),
        warnings=_warnings(history),
        top=ordered[:3],
        others=ordered[3:],
        layers=list(layers),
        undrawn=max(0, len(layers) - DRAWN_LAYERS),
        groups=groups,
        rate_words=rate_words,
        reach_words=reach_words,
        swept=history.swept,
        counted_in=history.counted_in,
        noun=layers[0].course.noun,
        first=next(key for key in heads if key in pictures or key == heads[-1]),
        second=("waterfall", "top") if ("groups", "top") in pictures else None,
        head=[note_words(note, history) for note in head],
        notes=[note_words(note, history) for note in notes[-NOTES:]],
        unsaid=max(0, len(notes) - NOTES),
        kinds=list(TITLES.items()),
        gone=GONE_WORDS,
        facts=_facts(history),
        version=__version__,
    )
    words = len(render(pictures={}, left_out=[]).encode())
    shown, left_out = _embed(layers, pictures, words)
    return render(pictures=shown, left_out=left_out)


def _embed(
    layers: Sequence[Now], pictures: Mapping[tuple[str, str], Drawn], words: int
) -> tuple[dict[tuple[str, str], Embedded], list[str]]:
    """The pictures that fit beside so many bytes of words, and the names of those that do not."""
    room = PAGE_BYTES - words - 1_000 * len(pictures)
    said = {one.course.name: one.sentence for one in layers}
    order = [one.course.name for one in worst_first(list(layers))]
    shown: dict[tuple[str, str], Embedded] = {}
    left_out = []

    def importance(key: tuple[str, str]) -> tuple[int, int]:
        kind, layer = key
        return (-1, 0) if layer == "top" else (order.index(layer), list(HISTORY_KINDS).index(kind))

    if ("waterfall", "top") in pictures:  # those in it are not shown once more
        inside = {("waterfall", one.course.name) for one in worst_layers(layers, HEAD_LAYERS)}
        pictures = {key: picture for key, picture in pictures.items() if key not in inside}
    for key in sorted(pictures, key=importance):
        picture, web = pictures[key].png, pictures[key].web
        told = as_json(pictures[key])
        size = 4 * -(-len(web) // 3) + len(told.encode())
        if size > room:
            left_out.append(f"{key[1]} ({key[0]})")
            continue
        room -= size
        wide, high = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        layer = said.get(
            key[1], " ".join(said[one.course.name] for one in worst_layers(layers, HEAD_LAYERS))
        )
        shown[key] = Embedded(
            source=data_url(web, "webp"),
            alt=f"{key[0]}: {layer}",
            wide=round(wide / 1.8),
            high=round(high / 1.8),
            told=told,
        )
    return shown, left_out


def note_words(note: Note, history: History) -> tuple[str, str, str]:
    """When, of what, and the sentence."""
    start = note.about if history.swept else "at the start"
    when = f"{history.counted_in} {updates(note.step)}" if note.step else start
    return when, note.about, note.text


def _warnings(history: History) -> list[str]:
    """What to know before the rest."""
    found = []
    if history.swept:
        lost = sum(bool(source.failed) for source in history.sources if source is not None)
        if lost:
            found.append(
                f"{count_words(lost, 'checkpoint')} could not be measured: see what was said."
            )
        if not history.ended:
            found.append("This sweep is not whole: the page shows what there is so far.")
    elif not history.ended:
        found.append(
            "This training is not over, or its process was ended: the page shows what there is so far."
        )
    if history.damaged:
        lines = count_words(history.damaged, "line")
        found.append(f"{lines} of the history could not be read, cut off by a kill or a full disk.")
    return found


def _facts(history: History) -> list[tuple[str, str]]:
    """How the run was watched, and what that cost."""
    known = {name: value for name, value in history.header.items()
             if name != "title" and value is not None}  # fmt: skip
    if isinstance(known.get("started"), int | float) and 0 <= known["started"] < 2**33:
        when = datetime.fromtimestamp(known["started"], UTC)
        known["started"] = f"{when:%Y-%m-%d %H:%M:%S} UTC"
    if "budget" in known:
        share = known["budget"]
        known["budget"] = percent_words(share) if isinstance(share, int | float) else "no limit"
    rows = provenance_rows(known)
    data = history.data
    probe, plain = data["probe_seconds"].values, data["step_seconds"].values
    gaps = np.diff(history.steps)
    if len(gaps) and not history.swept:
        ends = dict.fromkeys((int(gaps.min()), int(gaps.max())))
        rows.append(("steps between probes", " to ".join(map(str, ends))))
    if np.isfinite(probe).any() and np.isfinite(plain).any():
        ratio = float(np.nanmedian(probe)) / max(1e-12, float(np.nanmedian(plain)))
        rows.append(("a probe added, in plain steps, median", f"{ratio:.3g}"))
        steps = float(np.nansum(plain[1:] * gaps)) if len(gaps) else float(np.nansum(plain))
        share = float(np.nansum(probe)) / max(1e-12, steps + float(np.nansum(probe)))
        rows.append(("share of the time taken by probes", percent_words(share)))
    return rows
