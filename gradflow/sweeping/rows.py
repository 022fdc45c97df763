"""From results to the rows of one history: their order, their runs, and what is to be said of them all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradflow.analysis import Gain, Rate
from gradflow.analyzer.paced import Paced
from gradflow.history import History, Note, Row, Source, join_rows, row_facts
from gradflow.history.probe import TrainingStep
from gradflow.loading import natural
from gradflow.sweeping.result_files import Entry


@dataclass(frozen=True)
class _Known:
    """A checkpoint with what its result says of it."""

    entry: Entry  # as it was listed
    path: Path | None  # of its result; None where there is none
    title: str  # of its model; "" where that is not known
    kind: str  # its architecture in words; "" where that is not known
    trained: TrainingStep  # the training step; found nowhere where none is said
    failed: str  # why there are no numbers


def joined(
    folder: Path,
    entries: Sequence[Entry],
    path_of: Callable[[str], Path],
    asked: dict[str, Any],
    absent: str = "",
) -> Path:
    """Write the history of a sweep.

    Args:
        folder: where it goes.
        entries: all checkpoints, those of one run together.
        path_of: where the result of a key is.
        asked: how the sweep was asked for.
        absent: which shards have not begun, in words.

    Returns:
        The path of its file.
    """
    known = [_known(one, path_of) for one in entries]
    missing = [one for one in known if one.path is None and not one.failed]
    known = [one for one in known if one.path is not None or one.failed]
    known, said = _by_architecture(_numbered(known))
    rows = [
        Row(
            one.trained.number,
            Source(
                one.entry.name, one.entry.run, one.trained.found, one.failed, one.trained.counts
            ),
            one.path,
        )
        for one in sorted(known, key=lambda one: (natural(one.entry.run), one.trained.number))
    ]
    titles = dict.fromkeys(one.title for one in known if one.title)
    notes = [Note(0, "sweep", text) for text in [*_about_steps(known), *said]]
    if missing or absent:
        none = f"{len(missing)} checkpoints have no result yet" if missing else ""
        words = " and ".join(filter(None, [none, absent]))
        notes.append(Note(0, "warning", f"{words}: this is the part of the sweep that is there"))
    notes += [Note(row.step, "failed", row.source.failed) for row in rows if row.source.failed]
    header = {name: value for name, value in asked.items() if name != "kind"}
    return join_rows(
        folder,
        rows,
        notes,
        ended=not (missing or absent),
        title=next(iter(titles)) if len(titles) == 1 else "several models",
        swept=True,
        checkpoints=len(known),
        failed=sum(bool(one.failed) for one in known),
        **header,
    )


def _known(entry: Entry, path_of: Callable[[str], Path]) -> _Known:
    """What the result of a checkpoint says of it."""
    path = path_of(entry.key) if entry.key else None
    facts = None if path is None else row_facts(path)
    said = TrainingStep(entry.step or 0, entry.step_from, entry.counts)
    if facts is None:
        return _Known(entry, None, "", "", said, entry.failed)
    failed = entry.failed or facts.failed
    shown = None if failed else path
    return _Known(entry, shown, facts.title, facts.kind, facts.trained or said, failed)


def _numbered(known: Sequence[_Known]) -> list[_Known]:
    """Checkpoints that say no training step, counted within their run, behind those of it that say one."""
    counts: Counter[str] = Counter()
    said: dict[str, int] = {}
    for one in known:
        said[one.entry.run] = max(said.get(one.entry.run, 0), one.trained.number)
    found = []
    for one in known:
        if not one.trained.found:
            counts[one.entry.run] += 1
            place = said[one.entry.run] + counts[one.entry.run]
            named = TrainingStep(place, "place in the order of names", "checkpoint")
            one = replace(one, trained=named)
        found.append(one)
    return found


def _by_architecture(known: Sequence[_Known]) -> tuple[list[_Known], list[str]]:
    """Runs that hold several architectures, each a run of its own; and sentences on them."""
    kinds: dict[str, dict[str, int]] = {}
    for one in known:
        if one.kind:
            of_run = kinds.setdefault(one.entry.run, {})
            of_run[one.kind] = of_run.get(one.kind, 0) + 1
    every = dict.fromkeys(kind for of_run in kinds.values() for kind in of_run)
    said = []
    if len(every) > 1:
        said.append(f"the checkpoints have {len(every)} architectures: {'; '.join(every)}")
    mixed = {run: list(of_run) for run, of_run in kinds.items() if len(of_run) > 1}
    if mixed:
        names = ", ".join(run or "the folder" for run in mixed)
        said.append(f"{names} holds several of them: each is shown as a run of its own")
    found = []
    for one in known:
        if one.entry.run in mixed:
            kind = one.kind or mixed[one.entry.run][0]
            run = f"{one.entry.run} ({kind})".strip()
            one = replace(one, entry=replace(one.entry, run=run))
        found.append(one)
    return found, said


def _about_steps(known: Sequence[_Known]) -> list[str]:
    """Where the training steps stand, and where that differs within a run."""
    where = Counter(one.trained.found for one in known)
    parts = [f"{words} ({count})" if len(where) > 1 else words for words, count in where.items()]
    said = [f"training steps are from: {'; '.join(parts)}"] if parts else []
    by_run: dict[str, set[str]] = {}
    for one in known:
        by_run.setdefault(one.entry.run, set()).add(one.trained.found)
    several = [run or "the run" for run, found in by_run.items() if len(found) > 1]
    if several:
        said.append(
            f"{', '.join(several)}: these steps are of several kinds, so that their order may be wrong"
        )
    return said


def standings(history: History) -> list[Paced]:
    """Every layer of every run at its last checkpoint that was measured, named by both.

    Args:
        history: of a sweep.
    """
    found = []
    for run, one in history.runs.items():
        good = [place for place, words in enumerate(one.data["failed"].values) if not words]
        for layer in one.layers if good else ():
            row = one.data.isel(step=good[-1]).sel(layer=layer)
            found.append(_standing(f"{run} {layer}".strip(), row))
    return found


def _standing(name: str, row: Any) -> Paced:
    def number(what: str) -> float:
        return float(row[what])

    def whole(what: str) -> int | None:
        return int(number(what)) if math.isfinite(number(what)) else None

    labels = ("not finite",) * (number("nonfinite") == 1)
    labels += ("not settled",) * (number("rate_settled") == 0)
    rate, gain = (
        Rate(*(number(f"{what}{end}") for end in ("", "_low", "_high")))
        for what in ("rate", "gain")
    )
    return Paced(
        name=name,
        verdict=str(row["verdict"].item()),
        gain=Gain(gain.value, gain.low, gain.high, whole("gain_steps") or 0),
        rate=rate,
        settling=number("rate_settling"),
        settled=number("rate_settled") != 0,
        half_life=number("half_life"),
        horizon=whole("horizon"),
        searched=whole("searched") or 0,
        span=whole("span") or 0,
        sequences=whole("sequences_rated") or 0,
        channels=whole("channels"),
        labels=labels,
    )
