"""Several runs on one scale: a table, a picture, and what changed beyond its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gradflow import reporter
from gradflow.analysis import Analysis, LayerAnalysis, Rate
from gradflow.analysis.results import welch
from gradflow.errors import InputError, must_be
from gradflow.history import History
from gradflow.limits import RATE_ROUNDING, ROUND_TELLS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERVIEWS = 4  # runs whose overviews are drawn one below the other; more are a trend


@dataclass(frozen=True)
class Change:
    """One layer in two runs: the difference of its gains or rates, with a 95 % interval."""

    layer: str
    before: str  # the first run
    after: str  # the other
    rate_before: float
    rate_after: float
    gain_before: float  # over the span, nats
    gain_after: float
    compared: str  # "gain" where both are over as many steps, else "rate"
    difference: float  # after − before of that, in nats, of a rate per step
    low: float  # of the difference; NaN where it is not known
    high: float
    among: int  # how many differences are looked at: each interval is so wide that all hold
    larger: bool | None  # than its interval; None where that is not known
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """What `gradflow.compare` gives: what changed from the first run to each of the others."""

    runs: Mapping[str, Analysis] | Mapping[str, History]  # by name, in the order given
    # a row per run and layer, of trainings also per probe, as `frame("layers")` has them; of sweeps a
    # row per group of runs
    table: pd.DataFrame
    changes: pd.DataFrame  # a row per layer and other run
    sentences: tuple[str, ...]  # how many differences are more than chance, and each in words
    notes: tuple[str, ...]  # what else than the model differs between the runs
    numbers: reporter.Numbers  # the last of them as people read them
    drawn: Callable[[], Figure]  # makes the figure
    narrow: Callable[[], Figure] | None = None  # the same for a telephone, where there is one

    @property
    def figure(self) -> Figure:
        """The runs on one scale; of more than four, gain and horizon from run to run."""
        return self.drawn()

    def summary(self) -> dict[str, Any]:
        """The same for a script, in the types of strict JSON."""
        return reporter.comparison_summary(self.runs, self.changes, self.sentences, self.notes)

    def save(self, folder: str | Path, *, force: bool = False, draw: bool = True) -> Path:
        """Write comparison.html, .json, .png, .csv and changes.csv into a folder, whole or not at all.

        Args:
            folder: the files go here.
            force: replace an earlier comparison.
            draw: whether page and picture are made, too.

        Returns:
            The path of the page.
        """
        picture = reporter.png(self.figure) if draw else b""
        with reporter.whole_folder(Path(folder), force=force) as work:
            if draw:
                (work / "comparison.png").write_bytes(picture)
                (work / "comparison.html").write_text(self._page(picture), "utf-8")
            words = json.dumps(self.summary(), allow_nan=False, indent=2)
            (work / "comparison.json").write_text(words, "utf-8")
            self.table.to_csv(work / "comparison.csv", index=False)
            self.changes.to_csv(work / "changes.csv", index=False)
        return Path(folder) / "comparison.html"

    def _page(self, picture: bytes) -> str:
        names = list(dict.fromkeys(map(self.numbers.columns[0].value, self.numbers.things)))
        both = picture, reporter.png(self.narrow()) if self.narrow else b""
        return reporter.comparison_page(names, self.sentences, self.notes, both, self.numbers)

    def __repr__(self) -> str:
        return "\n".join([*self.sentences, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return reporter.comparison_html(
            self.sentences, self.notes, reporter.png(self.figure), self.numbers
        )


def compare(
    *runs: Analysis | History | Mapping[str, Analysis] | Mapping[str, History], by: str = "seed"
) -> Comparison:
    """Say what changed from the first run to each of the others, and whether by more than chance.

    Layers are paired by name, and compared by the gain over the span in decades, or the rate in nats
    per step, with a 95 % interval over sequences, of several batches over batches (Welch 1947), that
    holds for all of them at once. Of trainings the last probes are compared, of sweeps the groups of runs.

    Args:
        runs: two or more analyses or two or more histories, or one mapping from the names that they
            shall have; of sweeps one is enough.
        by: of sweeps, what the runs of one group differ in.

    Returns:
        A `Comparison`: prints as sentences; ``.table``, ``.changes``, ``.figure``, ``.save(folder)``.

    Raises:
        InputError: fewer than two runs, or something that cannot be compared.

    >>> import torch, gradflow
    >>> _, x = torch.manual_seed(0), torch.randn(20, 4, 3)
    >>> before, after = (gradflow.diagnose(c(3, 8), x) for c in (torch.nn.RNN, torch.nn.GRU))
    >>> found = gradflow.compare(before, after)
    >>> list(found.table["run"]), list(found.changes["larger"])
    (['RNN', 'GRU'], [True])
    """
    named: dict[str, Any] = {}
    for run in runs:
        given = run if isinstance(run, Mapping) else {_free(run, named): run}
        for name, one in given.items():
            if not isinstance(one, Analysis | History):
                advice = "analyze a recording first, or give gradflow.load(path)"
                raise InputError(
                    must_be(
                        "what is compared", "an Analysis or a History", type(one).__name__, advice
                    )
                )
            named[str(name)] = one
    trainings = [name for name, one in named.items() if isinstance(one, History)]
    if trainings and len(trainings) < len(named):
        raise InputError(
            f"compare needs runs of one kind, got the history of a training, {trainings[0]}, beside the "
            "analysis of a batch; compare trainings with trainings"
        )
    if len(named) < 2 and not any(named[name].swept for name in trainings):
        raise InputError(
            must_be(
                "what is compared", "two runs or more", len(named), "give the one before as well"
            )
        )
    if trainings:
        from gradflow.trainings import compared  # which makes Comparisons, too

        return compared(named, by)
    found = changes(named)
    rows = pd.DataFrame([asdict(change) for change in found])
    tables = [run.frame("layers").assign(run=name) for name, run in named.items()]
    table = pd.concat(tables, ignore_index=True)
    return Comparison(
        runs=named,
        table=table[["run", *(column for column in table if column != "run")]],
        changes=rows.reindex(columns=list(Change.__dataclass_fields__)),
        sentences=(headline(found), *(change.sentence for change in found), *unpaired(named)),
        notes=tuple(circumstances(named)),
        numbers=reporter.of_runs(named),
        **_figures(named),
    )


def _figures(runs: Mapping[str, Analysis]) -> dict[str, Callable[[], Figure]]:
    if len(runs) > OVERVIEWS:
        return {
            "drawn": lambda: reporter.draw_trend(runs),
            "narrow": lambda: reporter.draw_trend(runs, wide=3.15),
        }
    titled = [run.titled(name) for name, run in runs.items()]
    return {"drawn": lambda: reporter.plot(titled), "narrow": lambda: reporter.plot_narrow(titled)}


def _free(run: Any, taken: Mapping[str, Analysis]) -> str:
    """The run's title, numbered where another has the same."""
    title = str(getattr(run, "title", type(run).__name__))
    again = sum(known == title or known.startswith(f"{title} (") for known in taken)
    return f"{title} ({again + 1})" if again else title


def changes(runs: Mapping[str, Analysis]) -> list[Change]:
    """What changed from the first run to each of the others, layer by layer.

    Layers are paired by name; in the order in which they ran where no name is in both runs and each
    has as many. Compared are the gains over the span, or, where these are of different steps, the
    rates. The interval of a difference is Welch's (1947), over the sequences, or the batches, of both
    runs; of rates it is widened by what has not settled in either. Of n differences each interval is one
    of 1 − 0.05/n, so that where nothing but the batch differs, 95 of 100 comparisons find none beyond
    chance (Bonferroni).

    >>> import torch, gradflow
    >>> _, x = torch.manual_seed(0), torch.randn(20, 4, 3)
    >>> runs = {c.__name__: gradflow.diagnose(c(3, 8), x) for c in (torch.nn.RNN, torch.nn.GRU)}
    >>> [(change.layer, change.larger) for change in changes(runs)]
    [('l0', True)]
    """
    (first, before), *others = runs.items()
    pairs = [(name, pair) for name, after in others for pair in _pairs(before, after)]
    return [_change(first, one, name, two, len(pairs)) for name, (one, two) in pairs]


def unpaired(runs: Mapping[str, Analysis]) -> list[str]:
    """A sentence on every layer that stands alone."""
    (first, before), *others = runs.items()
    notes = []
    for name, after in others:
        pairs = _pairs(before, after)
        for run, analysis, place in ((first, before, 0), (name, after, 1)):
            known = {pair[place].name for pair in pairs}
            alone = [layer.name for layer in analysis.values() if layer.name not in known]
            if alone:
                verb = "is" if len(alone) == 1 else "are"
                notes.append(f"{', '.join(alone)} {verb} in {run} only")
    return list(dict.fromkeys(notes))


def headline(found: Sequence[Change]) -> str:
    """How many of the differences are more than chance, in one line.

    >>> headline([])
    'Nothing is compared: no layer of one run is in another, and they are paired by name.'
    """
    if not found:
        return (
            "Nothing is compared: no layer of one run is in another, and they are paired by name."
        )
    larger = sum(change.larger is True for change in found)
    unknown = sum(change.larger is None for change in found)
    together = " for all at once" if len(found) > 1 else ""
    said = (
        f"Differences beyond chance (95 % interval{together}): {larger or 'none'} of {len(found)}"
    )
    return f"{said}, {unknown} without an interval." if unknown else f"{said}."


def circumstances(runs: Mapping[str, Analysis]) -> list[str]:
    """What else than the model differs between the runs, in a sentence each.

    >>> import torch, gradflow
    >>> short, long = (gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(T, 4, 3)) for T in (20, 40))
    >>> circumstances({"short": short, "long": long})[0]
    'short ran for 20 steps, long for 40: rates of short sequences hold more of their transient'
    """
    (first, before), *others = runs.items()
    notes = []
    for name, after in others:
        steps = [max((layer.steps for layer in run.values()), default=0) for run in (before, after)]
        if steps[0] != steps[1]:
            notes.append(
                f"{first} ran for {steps[0]} steps, {name} for {steps[1]}: rates of short sequences "
                "hold more of their transient"
            )
        inputs = [_input(run) for run in (before, after)]
        if inputs[0] != inputs[1] and all(inputs):
            notes.append(
                f"{first} was measured on {inputs[0]}, {name} on {inputs[1]}: the input decides the "
                "rate, so a difference may be the input's; give both the same --input"
            )
        modes = [str(run.provenance.get("mode", "")) for run in (before, after)]
        if modes[0] != modes[1] and all(modes):
            notes.append(
                f"{first} ran in {modes[0]} mode, {name} in {modes[1]} mode: dropout and "
                "normalisation differ"
            )
    return notes


def _input(run: Analysis) -> str:
    """What a run was measured on, without the shape where steps and sequences are said elsewhere."""
    said = str(run.provenance.get("input", ""))
    if said.startswith("probes: "):
        return "probes"
    return "" if said.startswith("shape ") else said


def _pairs(before: Analysis, after: Analysis) -> list[tuple[LayerAnalysis, LayerAnalysis]]:
    if len(before) == len(after) and not set(before.layers) & set(after.layers):
        return list(zip(before.values(), after.values(), strict=True))
    return [(layer, after[layer.name]) for layer in before.values() if layer.name in after.layers]


def _change(
    first: str, before: LayerAnalysis, second: str, after: LayerAnalysis, among: int
) -> Change:
    by_gain = before.gain.steps == after.gain.steps > 0
    one, two = (layer.gain if by_gain else layer.rate for layer in (before, after))
    difference = two.value - one.value
    found = Rate(difference, *welch(_each(before, by_gain), _each(after, by_gain), among))
    if not by_gain:  # what has not settled in either run
        unsettled = [one.data.get("rate_settling", 0.0) for one in (before, after)]
        found = found.wider(*map(float, unsettled))
    low, high = found.low, found.high
    least = _least(by_gain)
    larger = None if math.isnan(low) else low > least or high < -least
    if math.isinf(difference):
        larger = True  # one is dead, the other is not
    if one.value == two.value == -math.inf:
        larger = False
    change = Change(
        layer=before.name,
        before=first,
        after=second,
        rate_before=before.rate.value,
        rate_after=after.rate.value,
        gain_before=before.gain.value,
        gain_after=after.gain.value,
        compared="gain" if by_gain else "rate",
        difference=difference,
        low=low,
        high=high,
        among=among,
        larger=larger,
        sentence="",
    )
    return Change(**asdict(change) | {"sentence": _sentence(change, before, after)})


def _each(layer: LayerAnalysis, by_gain: bool) -> np.ndarray:
    """The gain, over the steps that all are compared by, or the rate of every sequence that has one."""
    what = "gain" if by_gain else "rate"
    if f"file_{what}" in layer.data:  # of several batches each is one
        values = layer.data[f"file_{what}"].values
        return values[np.isfinite(values)]
    values = layer.data[f"sequence_{what}"].values
    if by_gain:
        values = values[layer.data["sequence_steps"].values == layer.gain.steps]
    return values[np.isfinite(values)]


def _least(by_gain: bool) -> float:
    """What gains or rates are measured to, nats; nothing smaller is a difference."""
    return ROUND_TELLS if by_gain else RATE_ROUNDING


def _sentence(change: Change, before: LayerAnalysis, after: LayerAnalysis) -> str:
    """The change in words: verdicts, reach, and whether the difference counts."""
    name = change.layer if before.name == after.name else f"{before.name} → {after.name}"
    verdicts = f"{before.verdict} → {after.verdict}"
    if before.verdict == after.verdict:
        verdicts = f"{before.verdict} in both{_pace(change, before.verdict)}"
    gone = reporter.gone_words(before), reporter.gone_words(after)
    reach = f"{gone[0]} in both" if gone[0] == gone[1] else f"{gone[0]} → {gone[1]}"
    return (
        f"{name}, {change.before} → {change.after}: {verdicts}; horizon in steps: {reach}; "
        f"{_verdict(change, after, _units(before, after))}"
    )


def _pace(change: Change, verdict: str) -> str:
    """Whether what both runs do became faster, where that is more than chance."""
    if not change.larger or verdict not in ("vanishing", "exploding"):
        return ""
    faster = (change.difference > 0) == (verdict == "exploding")
    return ", faster" if faster else ", more slowly"


def _units(*layers: LayerAnalysis) -> str:
    """What the intervals are over: of a run of several batches they are over batches."""
    found = ["batches" if "file_gain" in layer.data else "sequences" for layer in layers]
    return " and ".join(dict.fromkeys(found))


def _verdict(change: Change, after: LayerAnalysis, units: str) -> str:
    what = f"largest gain over {after.gain.steps} steps" if change.compared == "gain" else "rate"
    if math.isnan(change.difference):
        values = (
            (change.gain_before, change.gain_after)
            if change.compared == "gain"
            else (change.rate_before, change.rate_after)
        )
        if values == (-math.inf, -math.inf):
            return "exact zeros cut every path in both"
        return f"the {change.compared}s cannot be compared"
    if abs(change.difference) < _least(change.compared == "gain"):
        return f"the {what} does not differ"
    way = "rises" if change.difference > 0 else "falls"
    if math.isinf(change.difference):
        return f"the {what} {way} without limit: exact zeros cut every path in one of them"
    unit, scale = ("decades", math.log(10)) if change.compared == "gain" else ("per step", 1.0)
    said = f"the {what} {way} by {abs(change.difference) / scale:.3g} {unit}"
    if change.larger is None:
        return f"{said}, without an interval: give two {units} or more in each run"
    ends = f"[{_number(change.low / scale)}, {_number(change.high / scale)}]"
    together = f" for all {change.among} at once" if change.among > 1 else ""
    said = f"{said}, 95 % interval {ends}{together}"
    return f"{said}: {'more' if change.larger else 'no more'} than {units} differ by chance"


def _number(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, told apart where they are the same.

    >>> names_of([Path("reports/rnn"), Path("reports/lstm/run.nc"), Path("old/rnn")])
    ['reports/rnn', 'lstm', 'old/rnn']
    >>> names_of([Path("gradflow-demo/rnn/report"), Path("gradflow-demo/lstm/report")])
    ['rnn', 'lstm']
    """
    short = [run_name(path) for path in paths]
    names: list[str] = []
    for name, path in zip(short, paths, strict=True):
        same = {other for other, its in zip(paths, short, strict=True) if its == name}
        chosen = name if name and len(same) == 1 else str(path)
        again = sum(known == chosen or known.startswith(f"{chosen} (") for known in names)
        names.append(f"{chosen} ({again + 1})" if again else chosen)
    return names


def run_name(path: Path) -> str:
    """What a run or model file is called, by its path; what every run is called tells nothing.

    >>> run_name(Path("demo/rnn/report/run.nc")), run_name(Path("models/before.pt"))
    ('rnn', 'before')
    """
    while path.name in ("run.nc", "report", "history.jsonl") and path.parent.name:
        path = path.parent
    return path.name if path.is_dir() else path.stem


def is_run(path: Path) -> bool:
    """Whether a path is a saved run rather than a model file; a missing one, by its suffix."""
    return path.is_dir() or path.suffix in (".nc", ".jsonl") or not (path.exists() or path.suffix)
