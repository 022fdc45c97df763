"""Where a training stands, in the terminal: a table of the last probe and a sentence per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from gradflow.history import History
from gradflow.history.table import extent
from gradflow.reporter.histories.course import course, courses
from gradflow.reporter.histories.groups import GROUP_COLUMNS, GroupRow, rows_of
from gradflow.reporter.histories.now import Now, now, worst_first
from gradflow.reporter.histories.page import note_words
from gradflow.reporter.text import SENTENCES, Column, Numbers, console_of, print_words

NOW_COLUMNS = (
    Column("layer", lambda one: one.course.name, words=True, may_fold=True),
    Column("cell", lambda one: one.course.cell, words=True, from_width=76, may_fold=True),
    Column("verdict", lambda one: one.verdict or "none", words=True, may_fold=True),
    Column("rate ± 95 %\nper step", lambda one: one.rate, may_fold=True),
    Column("half-\nlife", lambda one: one.half_life, from_width=70, may_fold=True),
    Column("horizon\nsteps", lambda one: one.horizon, may_fold=True),
)


def render_history(
    history: History,
    console: Console | None = None,
    *,
    verbose: bool = False,
    quiet: bool = False,
    by: str = "seed",
) -> None:
    """Print the last probe of every layer and what happened to it; ``verbose`` with all that was said.

    If ``quiet``, a sentence per layer only.
    """
    console = console or console_of()
    layers = [now(one) for one in courses([history])]
    ordered = worst_first(layers)
    if quiet:
        for one in ordered:
            print_words(console, Text(one.sentence))
        return
    head = f"gradflow: {history.title}, {extent(history)}"
    print_words(console, Text(head, style="bold"))
    print_words(console, Text(""))
    several = len(history.runs) > 1
    numbers = of_groups(rows_of(history, by)) if several else of_now(layers)
    console.print(numbers.shown(console))
    print_words(console, Text(""))
    for one in ordered if verbose else ordered[:SENTENCES]:
        print_words(console, Text(one.sentence), hang=2)
    if len(ordered) > SENTENCES and not verbose:
        where = "with -v, and on the page" if several else "in the table above"
        print_words(console, Text(f"{len(ordered) - SENTENCES} more {where}.", style="dim"))
    whole = [n for n in history.notes if history.swept and n.about in ("sweep", "warning")]
    told = [*whole[:3], *[n for n in history.notes if n.about == "nonfinite"][-3:]]
    shown = history.notes if verbose else told
    if shown:
        print_words(console, Text(""))
    for when, _, text in (note_words(note, history) for note in shown):
        print_words(console, Text(f"{when}: {text}", style="yellow"), hang=6)


def of_now(layers: Sequence[Now]) -> Numbers:
    """The last numbers of layers."""
    return Numbers(NOW_COLUMNS, layers)


def of_histories(runs: Mapping[str, History]) -> Numbers:
    """The last probe of every layer of several trainings."""
    return of_now(
        [now(course(one, layer, name)) for name, one in runs.items() for layer in one.layers]
    )


def of_groups(rows: Sequence[GroupRow]) -> Numbers:
    """A row per group of runs."""
    units = (
        f"Of the last checkpoint of each run; intervals are over {rows[0].group.by}s."
        if rows
        else ""
    )
    return Numbers(
        [Column(*one, words=True, may_fold=True) for one in GROUP_COLUMNS.items()], rows, units
    )
