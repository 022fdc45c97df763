"""What a layer's sentences, numbers and figures say, against its gain map made the slow way.

    python tests/contradictions.py 200     # draws so many layers and prints what does not agree

The oracle is the product of `step_jacobians`, pair by pair, with a logarithm of its own. Whatever a
reader can see (verdict, sentence, title, half-life, horizon, bar, lag curve, dotted line, Lyapunov
figure, findings, tables) is held against it.
"""

from __future__ import annotations

import html
import io
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from seam import charts_lag_curve as lag_curve
from seam import charts_triangle as triangle
from seam import (
    gain_words,
    half_life_words,
    lag_gradient,
    lyapunov,
    page,
    quantile,
    rate_words,
    render,
    span_share,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.analyzer import step_jacobians
from gradflow.recording import Track

DECADE, GONE, HALF = math.log(10), math.log(1e-3), -math.log(2)
KINDS = ("linear", "tanh", "LSTM", "GRU")


# ------------------------------------------------------------------------------------ random layers


class Driven(nn.Module):
    """h' = exp(spread · x_1) W h + x: a linear recurrence whose steps differ from one another."""

    def __init__(self, hidden: int, spread: float) -> None:
        super().__init__()
        self.w, self.hidden, self.spread = nn.Linear(hidden, hidden, bias=False), hidden, spread

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.w(h) * (self.spread * x[:, :1]).exp() + x


@dataclass(frozen=True)
class Drawn:
    """A layer, what ran through it, and what it was asked."""

    words: str
    recording: gradflow.Recording
    span: int | None


def drawn(seed: int) -> Drawn:
    """A random layer: its cell, scale, steps, sequences, lengths, cuts and span by the seed."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    hidden, batch = int(random.integers(1, 13)), int(random.choice([1, 2, 3, 8]))
    steps, scale = int(random.integers(2, 60)), float(np.exp(random.uniform(-1.5, 1.2)))
    shape = random.choice(["whole", "lengths", "cuts"])
    span = None if random.random() < 0.6 else int(random.integers(2, 80))
    lengths = torch.full((batch,), steps)
    if shape == "lengths":
        lengths = torch.from_numpy(random.integers(1, steps + 1, batch))
        lengths[0] = steps
    every = int(random.integers(1, steps + 1)) if shape == "cuts" else 0
    x = float(np.exp(random.uniform(-3, 1))) * torch.randn(steps, batch, 3, dtype=torch.float64)
    words = (
        f"seed {seed}: {kind} {hidden}, T {steps}, B {batch}, × {scale:.2g}, {shape}, span {span}"
    )
    if kind == "linear":
        cell = Driven(hidden, float(random.choice([0.0, 0.3]))).double()
        cell.w.weight.data *= 2 * scale
        return Drawn(words, _stepped(cell, x.repeat(1, 1, 4)[..., :hidden], every), span)
    module = {"tanh": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}[kind](3, hidden).double()
    for weight in module.parameters():
        weight.data *= scale
    if kind != "tanh" and random.random() < 0.5:  # a gate that keeps
        module.bias_ih_l0.data[hidden : 2 * hidden] += float(random.uniform(1, 6))
    return Drawn(words, _run(module, x, lengths, every), span)


def _stepped(cell: Driven, x: Tensor, every: int) -> gradflow.Recording:
    with gradflow.record(cell) as recording:
        h, loss = x.new_zeros(x.shape[1], cell.hidden), x.new_zeros(())
        for t, x_t in enumerate(x):
            h = h.detach() if every and t and t % every == 0 else h
            h = cell(x_t, h)
            loss = loss + h.tanh().sum()
        (loss if every else h.tanh().sum()).backward()
    return recording


def _run(module: nn.Module, x: Tensor, lengths: Tensor, every: int) -> gradflow.Recording:
    with gradflow.record(module) as recording:
        if every:
            state, seen = None, []
            for chunk in x.split(every):
                state = _detached(state)
                out, state = module(chunk) if state is None else module(chunk, state)
                seen.append(out)
            torch.cat(seen).sin().sum().backward()
        elif bool((lengths < len(x)).any()):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            pad_packed_sequence(module(packed)[0])[0].sin().sum().backward()
        else:
            module(x)[0][-1].sin().sum().backward()
    return recording


def _detached(state: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
    if isinstance(state, tuple):
        return tuple(part.detach() for part in state)
    return None if state is None else state.detach()


# ----------------------------------------------------------------------------------- the slow map


@dataclass(frozen=True)
class Map:
    """ln singular values of P(t'←t) of every sequence, processing order."""

    singular: np.ndarray  # (B, T, T, S), largest first; NaN across a cut, past the end, and t' < t
    lengths: list[int]

    @property
    def spectral(self) -> np.ndarray:
        """(B, T, T)."""
        return self.singular[..., 0]


def slow_map(track: Track) -> Map:
    """Pair by pair, one step more at a time, every product kept with its logarithm."""
    stack, cuts = step_jacobians(track), track.cuts.cpu()
    steps, batch, size, _ = stack.shape
    found = np.full((batch, steps, steps, size), np.nan)
    for b in range(batch):
        length = int(track.lengths[b])
        products, logs = torch.zeros(0, size, size, dtype=torch.float64), torch.zeros(0)
        for t in range(length):
            if t and bool(cuts[t, b]):
                products, logs = products[:0], logs[:0]
            products = torch.cat([stack[t, b] @ products, torch.eye(size)[None].double()])
            logs = torch.cat([logs, torch.zeros(1)]).double()
            peak = products.abs().amax((1, 2))
            safe = torch.where(peak > 0, peak, 1.0)
            products, logs = products / safe[:, None, None], logs + safe.log()
            values = torch.linalg.svdvals(products).log() + logs[:, None]
            found[b, t + 1 - len(products) : t + 1, t] = values.numpy()
    return Map(found, [int(length) for length in track.lengths])


# ------------------------------------------------------------------------------- what must agree


def contradictions(layer: LayerAnalysis, seen: Map) -> list[str]:
    """Whatever of a layer does not agree with its map or with itself, in words; [] if all does."""
    found = []
    for part in (_gain, _verdict, _curve, _half_life, _sentence, _rate, _figures, _findings, _bar):
        found += [f"{part.__name__[1:]}: {said}" for said in part(layer, seen)]
    return found


def near(one: float, two: float, room: float = 2e-3) -> bool:
    """Equal to rounding, or to what an iteration may leave."""
    return one == two or abs(one - two) <= room + 1e-6 * abs(two)


def shown(number: str, value: float) -> bool:
    """Whether a number in a sentence is this value, to its three digits."""
    return near(float(number.replace("−", "-")), value, 0.006 * abs(value) + 1e-9)


def _stretches(seen: Map, b: int) -> list[tuple[int, int]]:
    """First and last state of every stretch without a cut."""
    whole, first, found = seen.spectral[b], 0, []
    for t in range(1, seen.lengths[b] + 1):
        if t == seen.lengths[b] or np.isnan(whole[t - 1, t]):
            found.append((first, t - 1))
            first = t
    return [(start, end) for start, end in found if end > start]


def _gain(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """The mean over sequences of ln gain over one number of steps, with its t-interval."""
    over, values = layer.gain.steps, []
    if over > layer.span:
        yield f"over {over} steps of a span of {layer.span}"
    for b in range(len(seen.lengths)):
        windows = [
            seen.spectral[b, end - (place + 1) * over, end - place * over]
            for first, end in _stretches(seen, b)
            for place in range((end - first) // over if over else 0)
        ]
        if windows:
            low, high = np.sort(windows)[[(len(windows) - 1) // 2, len(windows) // 2]]
            values.append(low if np.isinf(low) else (low + high) / 2)
            if not near(float(layer.data["sequence_gain"][b]), values[-1]):
                yield f"sequence {b}: {float(layer.data['sequence_gain'][b])}, not {values[-1]}"
    alive = np.array([value for value in values if np.isfinite(value)])
    if not values or layer.steps == 1 or len(alive) <= len(values) / 2:
        return
    if not near(layer.gain.value, float(alive.mean())):
        yield f"{layer.gain}, where the mean is {alive.mean()}"
    if len(alive) > 1 and np.ptp(alive) > 1e-9:
        half = quantile(len(alive) - 1) * alive.std(ddof=1) / math.sqrt(len(alive))
        if not near((layer.gain.high - layer.gain.low) / 2, half):
            yield f"{layer.gain}, where half the interval is {half}"


def _verdict(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """The equivalence test on that interval."""
    gain, expected = layer.gain, "inconclusive"
    if gain.value == -math.inf or (layer.steps > 1 and not gain.steps):
        expected = "dead"
    elif gain.high < -DECADE:
        expected = "vanishing"
    elif gain.low > DECADE:
        expected = "exploding"
    elif gain.low > -DECADE and gain.high < DECADE:
        expected = "stable"
    if layer.steps > 1 and layer.verdict != expected:
        yield f"{layer.verdict}, where the interval {gain} says {expected}"


def _pairs(layer: LayerAnalysis, seen: Map) -> Iterator[tuple[int, np.ndarray]]:
    """Every lag with the ln gains of all pairs of the mapped sequences."""
    sources = layer.data["source"].values
    for lag in range(layer.steps):
        at = sources[sources + lag < layer.steps]
        values = seen.spectral[layer.data["sequence"].values][:, at, at + lag].ravel()
        yield lag, values[~np.isnan(values)]


def _curve(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """The median at every lag, the horizon that is read off it, and how far was searched."""
    gone, searched = None, 0
    for lag, values in _pairs(layer, seen):
        if not len(values):
            continue
        searched = lag
        ordered = np.sort(values)
        low, high = ordered[[(len(values) - 1) // 2, len(values) // 2]]
        median = low if np.isinf(low) else (low + high) / 2
        if not near(float(layer.data["lag_median"][lag]), median):
            yield f"lag {lag}: {float(layer.data['lag_median'][lag])}, not {median}"
        if gone is None and lag and median < GONE:
            gone = lag
    if layer.horizon != gone or layer.searched != searched:
        yield f"gone after {layer.horizon} of {layer.searched}, not {gone} of {searched}"


def _half_life(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """Where the curve falls by half, as steady as a half-life is said to be."""
    median, half = layer.data["lag_median"].values, layer.half_life
    fallen = np.flatnonzero(median[1:] <= HALF) + 1
    own = math.inf
    if len(fallen):
        at = int(fallen[0])
        drop = median[at - 1] - median[at]
        own = at if not np.isfinite(drop) or drop <= 0 else at - (HALF - median[at]) / drop
    by_rate = layer.rate.value < 0 and near(half * -layer.rate.value, math.log(2), 1e-6)
    if by_rate and not layer.rate_told:
        yield f"{half} by a rate that has not settled"
    elif by_rate and layer.rate.low < 0 < layer.rate.high:
        yield f"{half} by a rate that may be 0"
    elif by_rate and math.isfinite(own):
        if not (half / 2 <= own <= 2 * half or abs(own - half) <= 1):
            yield f"{half} by the rate, where the curve has it at {own}"
    elif by_rate:
        if layer.searched and half * 1.5 < layer.searched:
            yield f"{half} by the rate, where the curve has not fallen in {layer.searched} steps"
    elif not (near(half, own) or (math.isnan(half) and math.isinf(own))):
        yield f"{half}, where the curve has it at {own}"
    if half_life_words(layer) == "never" and layer.verdict in ("vanishing", "dead"):
        yield f"never, though {layer.verdict}"


def _rate(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """Rate and gain beside one another; the dotted line; exponents in order."""
    rate, gain = layer.rate, layer.gain
    fit = layer.data["lag_fit"].values
    if not layer.rate_told and np.isfinite(fit).any():
        yield "a dotted line of a rate that has not settled"
    slope = np.diff(fit[np.isfinite(fit)])
    if len(slope) and not near(float(slope.mean()), rate.value, 1e-9):
        yield f"the dotted line falls by {slope.mean()}, the rate is {rate.value}"
    exponents = layer.lyapunov
    known = exponents is not None and np.isfinite(exponents[0])
    if known and not (near(exponents[0], rate.value, 1e-9) and (np.diff(exponents) <= 1e-12).all()):
        yield f"exponents {exponents} of a rate {rate.value}"
    off = abs(rate.value - gain.pace) * gain.steps if gain.steps else math.nan
    ends = rate.low * gain.steps, rate.high * gain.steps
    beyond = ends[0] > gain.high or ends[1] < gain.low
    apart = layer.rate_told and math.isfinite(gain.low) and off > 0.2 * DECADE and beyond
    if apart and "rate in the long run" not in layer.sentence:
        yield f"rate {rate} and gain {gain} disagree without a word"
    if layer.rate_told and "has not settled" in layer.sentence:
        yield "a rate that has settled is said not to have"


def _each_loss(layer: LayerAnalysis) -> float:
    """Median over the loss steps with half of the sequence behind them, from the triangle's array."""
    found = layer.data["log10_triangle"].sel(state=layer.main_state).isel(sequence=0)
    reach = []
    for row, step in zip(found.values, found["loss_step"].values.astype(int), strict=True):
        past = row[step:] if layer.reverse else row[step::-1]
        past = past[: int(np.argmax(np.isnan(past)))] if np.isnan(past).any() else past
        if np.isfinite(row[step]) and len(past) >= max(2, layer.steps / 2):
            below = np.flatnonzero(past - row[step] < -3)
            reach.append(float(below[0]) if len(below) else math.inf)
    return sorted(reach)[(len(reach) - 1) // 2]


def _seen_back(layer: LayerAnalysis) -> float:
    """Steps back from the last loss step, itself among them, at which its gradient is known and not gone."""
    profile = layer.data["log10_grad"].sel(state=layer.main_state).values
    return int((~np.isnan(profile)).any(0).sum()) if math.isinf(layer.loss_reach) else math.nan


NAMED = {  # how many steps back: whatever says so, in sentence, title, picture, page or terminal
    r"window of (\d+) steps? keeps ∂L/∂W_hh": lambda layer: layer.window,
    r"gone in every direction after (\d+)": lambda layer: layer.horizon,
    r"layer's best direction lasts (\d+)": lambda layer: layer.horizon,
    r"no direction left after (\d+)": lambda layer: layer.horizon,
    r"no direction survives (\d+)": lambda layer: layer.horizon,
    r"no direction reaches beyond (\d+)": lambda layer: layer.horizon,
    r"some direction reaches all (\d+)": lambda layer: (
        layer.span if layer.horizon is None else None
    ),
    r"some direction reaches ≥ (\d+)": lambda layer: layer.searched,
    r"this loss's gradient reaches back all (\d+)": _seen_back,
    r"every direction below 10⁻³ after (\d+)": lambda layer: layer.horizon,
    r"this loss's gradient is gone (\d+) steps?": lambda layer: layer.loss_reach,
    r"one loss step's gradient is gone (\d+) steps?": _each_loss,
}
UNNAMED = r"(?:gone|felt|lasts|left after|window of|reach(?:es)?)\D{0,30}\b\d+"


def unnamed(layer: LayerAnalysis, texts: dict[str, str]) -> Iterator[str]:
    """Steps back without a name, or under a name that has another number elsewhere."""
    for where, text in texts.items():
        for pattern, value in NAMED.items():
            for number in re.findall(pattern, text):
                if float(number) != value(layer):
                    yield f"{where}: {pattern!r} is {number}, where it is {value(layer)}"
            text = re.sub(pattern, "", text)
        for said in re.findall(UNNAMED, text):
            yield f"{where}: {said!r} has no name"


def everything_said(run: Analysis, layer: LayerAnalysis) -> dict[str, str]:
    """What sentence, title, pictures, page and terminal say of the only layer of a run."""
    screen = Console(width=200, file=io.StringIO(), record=True, color_system=None)
    render(run, screen, verbose=True)
    shown = page(run, {})
    body = re.sub(r"<dl id=.words.*?</dl>", "", shown, flags=re.S)
    body = re.sub(r"<style.*?</style>|<script.*?</script>", "", body, flags=re.S)
    labels = " ".join(re.findall(r'aria-label="([^"]*)"', body))
    return {
        "sentence": layer.sentence,
        "title": layer.title,
        "overview": "\n".join(words.get_text() for words in gradflow.plot(run).texts),
        "triangle": triangle.prepare(layer).message,
        "lag gradient": lag_gradient.prepare(layer).message,
        "page": " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body) + labels).split()),
        "terminal": " ".join(screen.export_text().split()),
    }


PATTERNS = {
    r"halves every (\S+) steps?": lambda layer: layer.half_life,
    r"has halved after (\S+) steps": lambda layer: layer.half_life,
    r"shrinks (\S+)-fold at every step": lambda layer: math.exp(-layer.rate.value),
    r"tenfold every (\S+) steps?": lambda layer: DECADE / layer.rate.value,
    r"in every direction after (\d+) ": lambda layer: layer.horizon,
    **NAMED,
    r"of your (\d+) steps": lambda layer: layer.span,
    r"of the (\d+) steps? of a typical stretch": lambda layer: layer.span,
    r"10⁻³ after the (\d+) steps? measured": lambda layer: layer.searched,
    r"loses (\S+) decades": lambda layer: -layer.decades,
    r"grows by (\S+) decades": lambda layer: layer.decades,
    r"\((\S+) decades over": lambda layer: layer.decades,
    r"decades over (\d+) steps?\b": lambda layer: layer.gain.steps,
    r"would make (\S+) decades": lambda layer: layer.rate.value * layer.gain.steps / DECADE,
    r"long run, (\S+) per step": lambda layer: layer.rate.value,
    r"no direction survives (\d+) steps": lambda layer: layer.horizon,
}


def _sentence(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """Every number of sentence and title, and the directions that are said to survive."""
    for text in (layer.sentence, layer.title):
        for pattern, value in PATTERNS.items():
            for number in re.findall(pattern, text):
                right = value(layer)
                if "decades" in pattern and text is layer.title and "every direction" not in text:
                    continue  # of the loss's own gradient
                if right is None or not shown(number.rstrip(","), float(right)):
                    yield f"{number!r} in {text!r}, where it is {right}"
        for kept, over in re.findall(
            r"(\d+|all \d+) (?:of \d+ )?directions? survives? (\d+)", text
        ):
            count = _survivors(layer, seen, int(over))
            if count is not None and int(kept.removeprefix("all ")) != count:
                yield f"{kept} survive {over} steps in {text!r}, where {count} do"
    verb = {"vanishing": "vanishes", "exploding": "explodes", "stable": "is stable", "dead": "is dead",
            "inconclusive": r"is inconclusive|ran for one|has no step|gets no"}  # fmt: skip
    if not re.search(verb[layer.verdict], layer.sentence):
        yield f"{layer.verdict}: {layer.sentence!r}"
    if layer.verdict == "vanishing" and re.search(
        r"carr(y|ies) the gradient|survive \d", layer.title
    ):
        yield f"vanishing: {layer.title!r}"
    if layer.verdict == "stable" and re.search(r"no direction survives|decades", layer.title):
        yield f"stable: {layer.title!r}"


def _survivors(layer: LayerAnalysis, seen: Map, over: int) -> int | None:
    """Median over the mapped sequences of the singular values that are left of the longest stretch."""
    counts = []
    for b in layer.data["sequence"].values:
        whole = _stretches(seen, b)
        if not whole:
            continue
        first, last = max(whole, key=lambda ends: ends[1] - ends[0])
        if last - first >= over:
            counts.append(int((seen.singular[b, first, first + over] >= GONE - 1e-9).sum()))
    return int(np.median(counts)) if counts else None


def _figures(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """What the lag curve and the Lyapunov figure say."""
    said = lag_curve.prepare(layer).message
    for every in re.findall(r"halves every (\S+) steps", said):
        if not layer.rate_told or every != half_life_words(layer):
            yield f"{said!r}, half-life {layer.half_life}"
    if "rate" in said and (not layer.rate_told or rate_words(layer.rate) not in said):
        yield f"{said!r}, rate {layer.rate}"
    if layer.horizon is not None and layer.searched and f" {layer.horizon} step" not in said:
        yield f"{said!r}, gone after {layer.horizon}"
    if "never below" in said and layer.verdict in ("vanishing", "dead"):
        yield f"{said!r}, though {layer.verdict}"
    spectrum = lyapunov.prepare(layer).message
    if spectrum and layer.rate_told:
        if "every direction fades" in spectrum and layer.verdict in ("stable", "exploding"):
            yield f"{spectrum!r}, though {layer.verdict}"
        if re.search(r" keeps? ", spectrum) and layer.verdict == "vanishing":
            yield f"{spectrum!r}, though vanishing"
    if spectrum and not layer.rate_told and "have not settled" not in spectrum:
        yield f"{spectrum!r}, though the rate has not settled"


def _findings(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """Numbers and signs of findings on the verdict."""
    for finding in layer.findings:
        if finding.name in ("vanishing", "exploding"):
            if finding.name != layer.verdict or not near(finding.value or 0.0, layer.decades):
                yield f"{finding.name} {finding.value}, where it is {layer.verdict} {layer.decades}"
            if "rate" in finding.message and not layer.rate_told:
                yield f"{finding.message!r}, though the rate has not settled"
        if finding.name == "transient-growth":
            peak = float(np.nanmax(layer.data["lag_median"].values))
            if not near(finding.value or 0.0, peak):
                yield f"a rise by {finding.value}, where the curve's is {peak}"
    severity = layer.decades_over_span
    signs = {"vanishing": severity < 0, "exploding": severity > 0}
    if not signs.get(layer.verdict, True):
        yield f"{severity} decades over the span, though {layer.verdict}"


def _bar(layer: LayerAnalysis, seen: Map) -> Iterator[str]:
    """The bar of horizon against span, and the gain in the table."""
    share = span_share(layer)
    if layer.horizon is not None and not near(share, min(1.0, layer.horizon / layer.span)):
        yield f"a bar of {share}, gone after {layer.horizon} of {layer.span}"
    if layer.horizon is None and layer.searched >= layer.span and share < 1 and layer.gain.steps:
        yield f"a bar of {share}, still there after all {layer.span}"
    words = gain_words(layer)
    if math.isfinite(layer.gain.value) and not words.startswith(("−", "+", "0")):
        yield f"{words!r} of {layer.gain}"


def disagreements(seed: int) -> list[str]:
    """Draw a layer, analyze it, and hold it against its map."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradflow.errors.GradflowWarning)
        made = drawn(seed)
        analysis: Analysis = gradflow.analyze(made.recording, span=made.span)
    return [
        f"{made.words}, {layer.name}: {said}"
        for layer in analysis.values()
        for said in [
            *contradictions(layer, slow_map(made.recording[layer.name])),
            *unnamed(layer, everything_said(analysis, layer)),
        ]
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for number in range(first, first + int(sys.argv[1])):
        for words in disagreements(number):
            print(words, flush=True)
