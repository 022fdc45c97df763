"""Where a training stands, in the terminal: a table of the last probe and a sentence per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradflow.history import History
from gradflow.reporter.histories.course import course, courses
from gradflow.reporter.histories.groups import GROUP_COLUMNS, GroupRow, rows_of
from gradflow.reporter.histories.now import Now, now, worst_first
from gradflow.reporter.histories.page import extent_words
from gradflow.reporter.text import STYLES, console_of, empty_table, encoded, print_words

SENTENCES = 5  # the worst layers; the table holds all


@dataclass(frozen=True)
class NowColumn:
    """One column of the table; on a narrow console it is left out."""

    heading: str  # its words, on lines
    value: Callable[[Now], str]  # of a layer
    words: bool = False  # whether it holds words, else numbers
    from_width: int = 0  # letters of the console that it needs


NOW_COLUMNS = (
    NowColumn("layer", lambda one: one.course.name, words=True),
    NowColumn("cell", lambda one: one.course.cell, words=True, from_width=76),
    NowColumn("verdict", lambda one: one.verdict or "none", words=True),
    NowColumn("rate ± 95 %\nper step", lambda one: one.rate),
    NowColumn("half-\nlife", lambda one: one.half_life, from_width=70),
    NowColumn("horizon\nsteps", lambda one: one.horizon),
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
    head = f"gradflow: {history.title}, {extent_words(history)}"
    print_words(console, Text(head, style="bold"))
    print_words(console, Text(""))
    several = len(history.runs) > 1
    console.print(
        group_table(rows_of(history, by), console) if several else now_table(layers, console)
    )
    print_words(console, Text(""))
    for one in ordered if verbose else ordered[:SENTENCES]:
        print_words(console, Text(one.sentence), hang=2)
    if len(ordered) > SENTENCES and not verbose:
        where = "with -v, and on the page" if several else "in the table above"
        print_words(console, Text(f"{len(ordered) - SENTENCES} more {where}.", style="dim"))
    shown = history.notes if verbose else [n for n in history.notes if n.about == "nonfinite"][-3:]
    if shown:
        print_words(console, Text(""))
    for note in shown:
        print_words(
            console,
            Text(f"{history.counted_in} {note.step:,}: {note.text}", style="yellow"),
            hang=6,
        )


def render_histories(
    runs: Mapping[str, History], sentences: Sequence[str], console: Console | None = None
) -> None:
    """Print the last probes of several trainings in one table, and what differs between them."""
    console = console or console_of()
    layers = [
        now(course(history, layer, name))
        for name, history in runs.items()
        for layer in history.layers
    ]
    _tell(now_table(layers, console), sentences, console)


def render_groups(
    rows: Sequence[GroupRow], sentences: Sequence[str], console: Console | None = None
) -> None:
    """Print the groups of sweeps in one table, and what differs between them."""
    console = console or console_of()
    _tell(group_table(rows, console), sentences, console)


def _tell(table: Table, sentences: Sequence[str], console: Console) -> None:
    console.print(table)
    print_words(console, Text(""))
    for sentence in sentences:
        print_words(console, Text(sentence), hang=2)


def group_table(rows: Sequence[GroupRow], console: Console) -> Table:
    """A row per group of runs, the one that reaches least first."""
    table = empty_table(console)
    for heading in GROUP_COLUMNS:
        table.add_column(encoded(Text(heading), console), overflow="fold")
    for row in rows:
        texts = [Text(words(row)) for words in GROUP_COLUMNS.values()]
        texts[2].style = STYLES.get(row.verdict, "")
        table.add_row(*(encoded(text, console) for text in texts))
    return table


def now_table(layers: list[Now], console: Console) -> Table:
    """A row per layer, with its last numbers."""
    table = empty_table(console)
    columns = [column for column in NOW_COLUMNS if console.width >= column.from_width]
    for column in columns:
        table.add_column(
            encoded(Text(column.heading), console),
            justify="left" if column.words else "right",
            overflow="fold",
        )
    for one in layers:
        cells = [Text(column.value(one)) for column in columns]
        place = [column.heading for column in columns].index("verdict")
        cells[place].style = STYLES.get(one.verdict, "")
        table.add_row(*(encoded(cell, console) for cell in cells))
    return table
