"""The page: one HTML file that reads offline, escaped, whole without JavaScript, at most a megabyte.

Its order: a sentence per layer, the overview, what to try, the maps, the rest folded, provenance.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from gradflow._version import __version__
from gradflow.analysis import Analysis, Finding, LayerAnalysis
from gradflow.limits import (
    BAND_WORDS,
    DECAY_FLOOR_SHARE,
    GATE_CLOSED,
    GLOSSARY,
    GONE_WORDS,
    NEVER_FORGETS,
    PAGE_BYTES,
)
from gradflow.recording.track import unnumbered
from gradflow.reporter.digest import other_findings, predicted, predictions, strict, top_findings
from gradflow.reporter.kinds import KINDS
from gradflow.reporter.numbers import (
    cell_words,
    channel_words,
    gain_words,
    gone_words,
    half_life_words,
    number_words,
    percent_words,
    rate_words,
    window_words,
)
from gradflow.reporter.picture import Drawn, data_url
from gradflow.reporter.prepare import span_share
from gradflow.reporter.readout import as_json

ROOM = 780  # pixels of the first screen that words may fill before they are set denser
LONG_WORD = 40  # letters of a word from which on it may be broken
TOP = 3  # layers said at the top of the page; the others follow below
BOXED = ("snippet", "next_command")  # provenance shown in a box of its own

LABEL_WORDS = {  # in plain words; a page explains those it shows
    "depends on the input": "The verdict is not the same under all probes; your own data decides.",
    "chaotic": "States that differ by little grow apart, e-fold every 1/rate steps, while the states "
    "themselves do not grow: the largest Lyapunov exponent is above 0. The gradient from farther back "
    "grows as fast and drowns what is near; clipping makes it shorter and changes nothing else. Cut the "
    "state or force it back to the data (teacher forcing) every ln 2/rate steps, or shrink W_hh.",
    "no recurrence": "One step only: no state was handed on.",
    "not finite": "NaN or infinity occurs, so no rate can be given.",
    "no gains": "How one step's state depends on the one before is not known; states and gradients of "
    "the loss are shown all the same.",
    "not exponential": "The gain falls or grows fast at first and ever more slowly later, as a power of "
    "the distance: read the curve, not the rate or the half-life.",
    "not settled": "In so few steps the rate does not show what it is in the long run: its interval is wide, "
    "and the sentence gives the gain alone.",
    "one sequence": "The interval is over sequences, and a single one has none.",
    "range-limited": "Gains become smaller or larger than the model's own numbers can be. gradflow's "
    "go on; the model's gradient is 0 or infinite there.",
    "short": "So few steps that the first ones, which settle, are counted as well.",
    "transient growth": f"The gain rises by more than {BAND_WORDS} at some distance, which the rate "
    "does not show.",
}

FigureKey = tuple[str, str]  # (kind, layer name); "" for all layers, "top" for the worst


@dataclass(frozen=True)
class Shown:
    """One picture on the page."""

    source: str  # data: URI
    alt: str
    title: str  # the kind of picture, in words
    message: str  # what it shows
    wide: int  # pixels as drawn, for the page to keep the place
    high: int
    told: Markup  # its numbers for page.js


def page(analysis: Analysis, figures: Mapping[FigureKey, Drawn]) -> str:
    """Build the page from an analysis and its pictures by (kind, layer name).

    The picture ``("overview", "top")`` heads the page, ``("overview", "narrow")`` stands for it on
    a narrow screen, ``("overview", "")`` is the overview of all layers where there are more. Pictures
    that would take the page above a megabyte are left out, the least important first, and the page
    says so.
    """
    told, findings = analysis.told, top_findings(analysis)
    high = first_screen(analysis, told, findings)
    render = functools.partial(
        template("page.html").render,
        analysis=analysis,
        dense=high > ROOM,
        top=told[:TOP],
        others=told[TOP:],
        noun="run" if len({unnumbered(n) for n in analysis}) == 1 < len(analysis) else "layer",
        findings=findings,
        more_findings=other_findings(analysis),
        # one shown where there is room, the others folded: the first screen holds all findings
        opened=next((f for f in findings if predictions(analysis, f) and high < 1.2 * ROOM), None),
        linear=[layer for layer in analysis.values() if is_linear(layer)],
        decay_words=decay_words,
        labels={name: LABEL_WORDS[name] for name in LABEL_WORDS if _shown(name, analysis)},
        predicted=predicted,
        predictions=predictions,
        reach_words=reach_words,
        kinds=[name for name, kind in KINDS.items() if kind is not None and kind.folded],
        window_title=f"{analysis.title}: gradient flow",
        facts=provenance_rows(analysis.provenance),
        none_found=_none_found(analysis),
        snippet=analysis.provenance.get("snippet", ""),
        glossary=GLOSSARY,
        next_command=analysis.provenance.get("next_command", ""),
        version=__version__,
    )
    words = len(render(pictures={}, left_out=[]).encode())
    pictures, left_out = embed(analysis, figures, words)
    return render(pictures=pictures, left_out=left_out)


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of the pages, which escapes whatever is put into it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradflow.reporter", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breaks"] = breaks
    # the one script: the page allows no other, so that nothing slipped into it can run
    script = resources.files("gradflow.reporter").joinpath("templates/page.js").read_text("utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    words = (cell_words, channel_words, gain_words, gone_words, half_life_words, rate_words, span_share,
             window_words)  # fmt: skip
    environment.globals |= {one.__name__: one for one in words} | {
        "script": Markup(script),
        "script_hash": base64.b64encode(digest).decode("ascii"),
    }
    return environment.get_template(name)


def is_linear(layer: LayerAnalysis) -> bool:
    """Whether the layer is a linear recurrence, whose decays are known."""
    return "decay" in layer.data and not bool(np.isnan(layer.data["decay"].values).all())


def decay_words(layer: LayerAnalysis) -> str:
    """How the decays of a linear recurrence lie on this batch."""
    forget, keep, floor, at_floor, moves = layer.data["decay"].values.tolist()
    said = []
    if not moves:
        said.append("its decays are the same at every step of every sequence")
    said.append(
        f"{percent_words(keep)} of the {layer.size} entries never forget (|a| above "
        f"{NEVER_FORGETS:g} throughout), {percent_words(forget)} forget within a step (|a| below "
        f"{GONE_WORDS} on average)"
    )
    said.append(f"the smallest decay seen is {number_words(floor)}")
    if moves and at_floor >= DECAY_FLOOR_SHARE and floor > 0:
        said[-1] += f", and {percent_words(at_floor)} of all lie at it, as at a bound"
    erased = layer.data["head_erased"].values
    if len(erased) and not np.isnan(erased).all():
        most = int(np.nanargmax(erased))
        said.append(
            f"head {most + 1} erases most: at {percent_words(float(erased[most]))} of the steps less "
            f"than {GATE_CLOSED:g} of the direction of its key is left"
        )
    return "; ".join(said) + "."


def breaks(text: str) -> Markup:
    """Very long dotted names with places where a line may end, behind every dot and underscore.

    >>> breaks("rnn.l0 halves"), breaks(f"encoder.{'temporal' * 4}_backbone <")
    (Markup('rnn.l0 halves'), Markup('encoder.<wbr>temporaltemporaltemporaltemporal_<wbr>backbone &lt;'))
    """
    words = str(escape(text)).split(" ")
    return Markup(" ").join(
        Markup(re.sub(r"([._])(?=[A-Za-z])", r"\1<wbr>", word) if len(word) > LONG_WORD else word)
        for word in words
    )


def first_screen(
    analysis: Analysis, told: Sequence[LayerAnalysis], findings: Sequence[Finding]
) -> int:
    """About how many pixels high warnings, verdicts and findings are in a window 1280 wide."""
    high = 45 + sum(6 + 19 * _lines(warning, 150) for warning in analysis.warnings)
    for layer in told[:TOP]:
        words = [layer.verdict, layer.sentence, *layer.labels]
        high += 30 + 20 * _lines(" ".join(words), 60)
        high += sum(17 * _lines(line, 72) for line in analysis.alone_of(layer))
    high += 35 * (len(told) > TOP)
    for finding in findings:
        high += 12 + 17 * _lines(f"{finding.layer}: {finding.message} {finding.where}", 60)
        high += 2 + 17 * _lines(f"Try: {finding.advice} {finding.source}", 66)
        high += (12 + 15 * _lines(finding.code, 72)) if finding.code else 0
        high += 20 if predictions(analysis, finding) else 0
    shown = next((n for one in findings if (n := len(predictions(analysis, one)))), 0)
    high += 17 * (2 + shown) if shown else 0
    boxes = [str(analysis.provenance[name]) for name in BOXED if analysis.provenance.get(name)]
    return high + sum(40 + 15 * _lines(box, 72) for box in boxes)


def _lines(text: str, letters: int) -> int:
    """How many lines a text takes, a line holding so many letters."""
    return sum(max(1, -(-len(line) // letters)) for line in text.split("\n"))


def _none_found(analysis: Analysis) -> str:
    """What to say where there is no finding."""
    if all(layer.verdict == "stable" for layer in analysis.values()):
        return "Nothing here needs a remedy."
    if all(layer.verdict == "stable" or "no gains" in layer.labels for layer in analysis.values()):
        return "Where gains are not known, no cause is looked for."
    return "No cause was found; the verdict says what would decide."


def _shown(label: str, analysis: Analysis) -> bool:
    return any(label in layer.labels for layer in analysis.values())


def reach_words(layer: LayerAnalysis, *, short: bool = False) -> str:
    """What the bar of span against horizon shows, in words."""
    if layer.verdict == "dead" and not layer.gain.steps:
        return "reaches no earlier step"
    if gone_words(layer) == "none":
        return "not measured"
    reach = layer.searched if layer.horizon is None else layer.horizon
    of_span = f"{reach} of {layer.span} steps"
    if short:
        whole = layer.horizon is None and layer.searched >= layer.span - 1
        if whole:
            return f"some direction reaches all {layer.span} steps"
        most = (
            "some direction reaches ≥" if layer.horizon is None else "no direction reaches beyond"
        )
        return f"{most} {of_span}"
    if layer.horizon is None:
        return f"some direction above {GONE_WORDS} at every distance measured, up to {of_span}"
    return f"every direction below {GONE_WORDS} after {of_span}"


def embed(
    analysis: Analysis, figures: Mapping[FigureKey, Drawn], words: int
) -> tuple[dict[FigureKey, Shown], list[str]]:
    """The pictures that fit beside so many bytes of words, and the names of those that do not."""
    room = PAGE_BYTES - words - 1_000 * len(figures)  # what is said of each picture
    shown: dict[FigureKey, Shown] = {}
    left_out: list[FigureKey] = []
    told_of = [key for key in figures if not _is_empty_fold(analysis, key)]
    for key in sorted(told_of, key=functools.partial(_importance, analysis)):
        png, web = figures[key].png, figures[key].web
        narrow = figures.get(("overview", "narrow")) if key == ("overview", "top") else None
        told = Markup("") if key == ("overview", "narrow") else as_json(figures[key], narrow)
        size = 4 * -(-len(web) // 3) + len(told.encode())
        if size > room:
            left_out.append(key)
            continue
        room -= size
        source = data_url(web, "webp")
        wide, high = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        kind = KINDS[key[0]]
        title = (kind and kind.title) or key[0].replace("-", " ")
        message = figures[key].message
        alt = alternative(analysis, key, message)
        shown[key] = Shown(source, alt, title, message, wide, high, told)
    return shown, _names(left_out)


def _is_empty_fold(analysis: Analysis, key: FigureKey) -> bool:
    """Whether a reader would unfold a picture of gains only to read that there are none."""
    kind, layer = KINDS[key[0]], analysis.layers.get(key[1])
    if kind is None or layer is None or "no gains" not in layer.labels:
        return False
    return kind.folded and kind.of_gains


def _names(keys: Sequence[FigureKey]) -> list[str]:
    """What was left out, by layer, so that a deep stack does not fill the page with names."""
    kinds: dict[str, list[str]] = {}
    for kind, name in keys:
        kinds.setdefault(name, []).append(kind)
    return [
        f"{name} ({', '.join(some) if len(some) <= 3 else f'{len(some)} figures'})"
        if name
        else ", ".join(some)
        for name, some in kinds.items()
    ]


def _importance(analysis: Analysis, key: FigureKey) -> tuple[int, int, int]:
    kind, name = key
    worst = [layer.name for layer in analysis.worst_first]
    place = worst.index(name) if name in worst else -1
    order = list(KINDS).index(kind)
    drawn = KINDS[kind]
    # the head of the page, what is not folded of the layers named there, then layer by layer
    part = 0 if drawn is None else 2 if drawn.folded or place >= TOP else 1
    return (part, place, order)


def alternative(analysis: Analysis, key: FigureKey, message: str) -> str:
    """The words that stand for a picture where it cannot be seen."""
    kind, name = key
    if name in analysis.layers:
        layer = analysis.layers[name]
        words = message or layer.gradient_note or layer.sentence
        return f"{kind} of {name}: {words}"
    if kind != "overview":
        return f"{kind} of all layers: {message}"
    titles = "; ".join(layer.title for layer in analysis.told[:4])
    return f"{kind}: gradient of every unit over the steps, and gain over the distance. {titles}"


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Provenance as plain rows of name and value, what has a box of its own left out."""
    return [
        (str(name).replace("_", " "), value if isinstance(value, str) else _said(value))
        for name, value in provenance.items()
        if name not in BOXED
    ]


def _said(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(part, str | int) for part in value):
        return ", ".join(map(str, value))
    return json.dumps(strict(value), ensure_ascii=False).strip('"')
