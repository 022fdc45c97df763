"""Several runs on one scale: a table, a picture, and what changed beyond its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from gradflow import reporter
from gradflow.analysis import HEADLINE, Analysis, LayerAnalysis
from gradflow.analyzer.rates import ROUNDING, quantile

COLUMNS = ["run", *HEADLINE]


@dataclass(frozen=True)
class Change:
    """One layer in two runs: the difference of its rates, with a 95 % interval."""

    layer: str
    before: str  # the first run
    after: str  # the other
    rate_before: float
    rate_after: float
    difference: float  # after − before, nats per step
    low: float  # of the difference; NaN where it is not known
    high: float
    larger: bool | None  # than its interval; None where that is not known
    sentence: str


def compare(runs: Mapping[str, Analysis]) -> pd.DataFrame:
    """One row per run and layer, in the order given.

    >>> import torch, gradflow
    >>> x = torch.randn(20, 4, 3)
    >>> runs = {c.__name__: gradflow.diagnose(c(3, 8), x) for c in (torch.nn.RNN, torch.nn.GRU)}
    >>> list(compare(runs)["run"])
    ['RNN', 'GRU']
    """
    tables = []
    for name, run in runs.items():
        table = run.frame("layers")
        table.insert(0, "run", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def changes(runs: Mapping[str, Analysis]) -> list[Change]:
    """What changed from the first run to each of the others, layer by layer.

    Layers are paired by name, or where each run has a single one. The interval of a difference of
    rates is Welch's (1947), over the rates of the sequences of both runs.

    >>> import torch, gradflow
    >>> x = torch.randn(20, 4, 3)
    >>> runs = {c.__name__: gradflow.diagnose(c(3, 8), x) for c in (torch.nn.RNN, torch.nn.GRU)}
    >>> [(change.layer, change.larger) for change in changes(runs)]
    [('l0', True)]
    """
    (first, before), *others = runs.items()
    found = []
    for name, after in others:
        for one, two in _pairs(before, after):
            found.append(_change(first, one, name, two))
    return found


def unpaired(runs: Mapping[str, Analysis]) -> list[str]:
    """A sentence on every layer that stands alone."""
    (first, before), *others = runs.items()
    notes = []
    for name, after in others:
        pairs = _pairs(before, after)
        for run, analysis, place in ((first, before, 0), (name, after, 1)):
            known = {pair[place].name for pair in pairs}
            alone = [layer.name for layer in analysis if layer.name not in known]
            if alone:
                verb = "is" if len(alone) == 1 else "are"
                notes.append(f"{', '.join(alone)} {verb} in {run} only")
    return list(dict.fromkeys(notes))


def _pairs(before: Analysis, after: Analysis) -> list[tuple[LayerAnalysis, LayerAnalysis]]:
    if len(before) == len(after) == 1:
        return [(next(iter(before)), next(iter(after)))]
    return [(layer, after[layer.name]) for layer in before if layer.name in after.layers]


def _change(first: str, before: LayerAnalysis, second: str, after: LayerAnalysis) -> Change:
    low, high = _interval(_rates(before), _rates(after))
    difference = after.rate.value - before.rate.value
    larger = None if math.isnan(low) else low > ROUNDING or high < -ROUNDING
    if math.isinf(difference):
        larger = True  # one is dead, the other is not
    change = Change(
        layer=before.name,
        before=first,
        after=second,
        rate_before=before.rate.value,
        rate_after=after.rate.value,
        difference=difference,
        low=low,
        high=high,
        larger=larger,
        sentence="",
    )
    return Change(**asdict(change) | {"sentence": _sentence(change, before, after)})


def _rates(layer: LayerAnalysis) -> np.ndarray:
    rates = layer.data["sequence_rate"].values
    return rates[np.isfinite(rates)]


def _interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Welch's interval of mean(after) − mean(before); NaN with fewer than two sequences in one."""
    if min(len(before), len(after)) < 2:
        return math.nan, math.nan
    difference = float(after.mean() - before.mean())
    errors = [float(values.var(ddof=1)) / len(values) for values in (before, after)]
    if sum(errors) <= ROUNDING**2:
        return difference, difference
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (before, after), strict=True)
    )
    half = quantile(freedom) * math.sqrt(sum(errors))
    return difference - half, difference + half


def _sentence(change: Change, before: LayerAnalysis, after: LayerAnalysis) -> str:
    """The change in words: verdicts, reach, and whether the difference counts."""
    name = change.layer if before.name == after.name else f"{before.name} → {after.name}"
    verdicts = f"{before.verdict} → {after.verdict}"
    if before.verdict == after.verdict:
        verdicts = f"{before.verdict} in both"
    reach = f"steps until gone: {reporter.gone_words(before)} → {reporter.gone_words(after)}"
    return f"{name}, {change.before} → {change.after}: {verdicts}; {reach}; {_verdict(change)}"


def _verdict(change: Change) -> str:
    if math.isnan(change.difference):
        return "the rates cannot be compared"
    if abs(change.difference) < ROUNDING:
        return "the rates do not differ"
    said = f"the rate differs by {_number(change.difference)}"
    if change.larger is None:
        return f"{said} per step, without an interval: give two sequences or more in each run"
    if math.isinf(change.difference):
        return f"{said}: exact zeros cut every path in one of them"
    interval = f"[{_number(change.low)}, {_number(change.high)}] per step"
    if change.larger:
        return f"{said} {interval}, more than sequences differ by chance"
    return f"{said} {interval}, no more than sequences differ by chance"


def _number(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def compare_runs(runs: Mapping[str, Analysis], folder: Path | None) -> str:
    """Compare runs; write comparison.png, comparison.csv and changes.csv; return what to print."""
    folder = folder or reporter.free_folder(Path("reports") / "comparison")
    table, changed = compare(runs), changes(runs)
    with reporter.whole_folder(folder) as work:
        figure = reporter.plot([run.titled(name) for name, run in runs.items()])
        (work / "comparison.png").write_bytes(reporter.png(figure))
        table.to_csv(work / "comparison.csv", index=False)
        rows = pd.DataFrame([asdict(change) for change in changed])
        rows.reindex(columns=list(Change.__dataclass_fields__)).to_csv(
            work / "changes.csv", index=False
        )
    reporter.render_comparison(runs, [*(change.sentence for change in changed), *unpaired(runs)])
    return f"picture: {folder / 'comparison.png'}"


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, told apart where they are the same.

    >>> names_of([Path("reports/rnn"), Path("reports/lstm/run.nc"), Path("old/rnn")])
    ['reports/rnn', 'lstm', 'old/rnn']
    """
    short = [path.parent.name if path.name == "run.nc" else path.stem for path in paths]
    names: list[str] = []
    for name, path in zip(short, paths, strict=True):
        chosen = name if name and short.count(name) == 1 else str(path)
        again = sum(known == chosen or known.startswith(f"{chosen} (") for known in names)
        names.append(f"{chosen} ({again + 1})" if again else chosen)
    return names


def is_run(path: Path) -> bool:
    """Whether a path is a saved run rather than a model file; one that is missing is."""
    return path.is_dir() or path.suffix == ".nc" or not path.exists()
