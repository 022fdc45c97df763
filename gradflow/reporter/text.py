"""The terminal: a table of verdicts, a sentence per layer, at most three findings, the warnings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradflow.analysis import Analysis, Finding, Prediction
from gradflow.reporter.digest import other_findings, predicted, predictions, top_findings
from gradflow.reporter.numbers import (
    cell_words,
    channel_words,
    count_words,
    gain_words,
    gone_words,
    half_life_words,
    rate_words,
    window_words,
)
from gradflow.reporter.page import provenance_rows

STYLES = {
    "vanishing": "bold blue",
    "exploding": "bold red",
    "stable": "green",
    "dead": "bold reverse",
    "inconclusive": "yellow",
}
WIDEST = 100  # longer lines are hard to read
# the same look as box.SIMPLE_HEAD where only ASCII can be written
ASCII_HEAD = box.Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)
SENTENCES = 5  # the worst layers; the table holds all


@dataclass(frozen=True)
class Column:
    """One column of a table; on a narrow console it is left out."""

    heading: str  # its words, on lines
    value: Callable[[Any], str]  # of what a row is about
    from_width: int = 0  # letters of the console that it needs
    words: bool = False  # whether it holds words, else numbers
    may_fold: bool = False  # whether its cells may be broken


@dataclass(frozen=True)
class Numbers:
    """A table in words, for the terminal, a page, a notebook."""

    columns: Sequence[Column]  # one of them is headed "verdict"
    things: Sequence[Any]  # what the rows are about
    units: str = "Rate in nats per step; half-life, window and horizon in steps."  # on a page

    def shown(self, console: Console) -> Table:
        """As much of it as the console has room for, in what it can encode."""
        columns = [column for column in self.columns if console.width >= column.from_width]
        table = empty_table(console)
        for column in columns:
            table.add_column(
                encoded(Text(column.heading), console),
                justify="left" if column.words else "right",
                overflow="fold",
                no_wrap=not column.may_fold,
            )
        for thing in self.things:
            cells = [Text(column.value(thing)) for column in columns]
            for column, cell in zip(columns, cells, strict=True):
                if column.heading == "verdict":
                    cell.style = STYLES.get(cell.plain.partition(" ")[0], "")
            table.add_row(*(encoded(cell, console) for cell in cells))
        return table


COLUMNS = (
    Column("layer", lambda layer: layer.name, words=True, may_fold=True),
    Column("cell", cell_words, from_width=76, words=True),
    Column("verdict", lambda layer: layer.verdict, words=True),
    Column("gain over\nthe span", gain_words, from_width=88),
    Column("rate ± 95 %\nper step", lambda layer: rate_words(layer.rate), may_fold=True),
    Column("half-\nlife", half_life_words, from_width=86),
    Column("window\nfor 5 %", window_words, from_width=90),
    Column("horizon\nsteps", gone_words),
    Column("channels\nat distance", channel_words, from_width=50),
)


def of_runs(runs: Mapping[str, Analysis]) -> Numbers:
    """The layers of several runs, under the names of the runs."""

    def of_layer(column: Column) -> Column:
        return replace(column, value=lambda named: column.value(named[1]))

    run = Column("run", lambda named: str(named[0]), words=True, may_fold=True)
    layers = [(name, layer) for name, analysis in runs.items() for layer in analysis.judged]
    return Numbers([run, *map(of_layer, COLUMNS)], layers)


_PLAIN = str.maketrans(
    {"−": "-", "∞": "inf", "∂": "d", "′": "'", "·": ".", "×": "x", "≤": "<=", "≥": ">=", "–": "-",
     "—": "-", "…": "...", "→": "->", "‖": "|", "δ": "delta", "λ": "lambda", "÷": "/", "±": "+-",
     "⟨": "<", "⟩": ">", "₁": "1", "½": "1/2", "σ": "sigma", "“": '"', "”": '"', "’": "'"}
)  # fmt: skip
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


class _Console(Console):
    """A console that leaves it to the caller what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console_of() -> Console:
    """The console of standard output."""
    return _Console()


def render(analysis: Analysis, console: Console | None = None, *, verbose: bool = False) -> None:
    """Print an analysis; honours the console's width, colours and encoding.

    If ``verbose``, every finding is printed and what the numbers rest on, else the three that tell
    most. Where the console cannot
    encode a character it is spelled in ASCII, so a pipe never fails.
    """
    console = console or console_of()
    print_words(console, Text(f"gradflow: {analysis.title}", style="bold"))
    print_words(console, Text(""))
    console.print(Numbers(COLUMNS, analysis.judged).shown(console))
    print_words(console, Text(""))
    _sentences(console, analysis)
    others = other_findings(analysis)
    chosen = [*top_findings(analysis), *(others if verbose else [])]
    for number, finding in enumerate(chosen, start=1):
        _finding(console, number, finding)
        _predictions(console, predictions(analysis, finding))
    if others and not verbose:
        left = len(others)
        words = f"{count_words(left, 'more finding')} on the page, or with -v."
        print_words(console, Text(words, style="dim"))
    _notes(console, analysis.warnings)
    if verbose:
        _basis(console, analysis)


def render_sentences(analysis: Analysis, console: Console | None = None) -> None:
    """Print one sentence per layer, the worst first, each on a line of its own."""
    console = console or console_of()
    for layer in analysis.told:
        print_words(console, Text(layer.sentence))


def render_comparison(
    numbers: Numbers,
    sentences: Sequence[str],
    notes: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print several runs in one table, what changed between them, and what to know about that."""
    console = console or console_of()
    console.print(numbers.shown(console))
    print_words(console, Text(""))
    for sentence in sentences:
        print_words(console, Text(sentence), hang=2)
    _notes(console, notes)


def empty_table(console: Console) -> Table:
    """A table without columns, in what the console can encode."""
    look = ASCII_HEAD if is_plain(console) else box.SIMPLE_HEAD
    return Table(box=look, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)


def _sentences(console: Console, analysis: Analysis) -> None:
    layers = analysis.told
    for layer in layers[:SENTENCES]:
        print_words(console, Text(layer.sentence), hang=2)
        for words in analysis.alone_of(layer):
            print_words(console, Text(f"  {words}", style="dim"), hang=4)
    if len(layers) > SENTENCES:
        left = len(layers) - SENTENCES
        print_words(console, Text(f"{left} more in the table above.", style="dim"))


def _notes(console: Console, notes: Sequence[str]) -> None:
    if notes:
        print_words(console, Text(""))
    for note in notes:
        print_words(console, Text(f"note: {note}", style="yellow"), hang=6)


def _basis(console: Console, analysis: Analysis) -> None:
    """Provenance and parity, as at the end of the page."""
    print_words(console, Text(""))
    print_words(console, Text("what the numbers rest on", style="bold"))
    for layer in analysis.values():
        error = "" if layer.parity.error is None else f", relative error {layer.parity.error:.1e}"
        reason = f": {layer.parity.reason}" if layer.parity.reason else ""
        said = f"parity of {layer.name} with the backward: {layer.parity.status}{error}{reason}"
        print_words(console, Text(f"  {said}"), hang=4)
    for name, value in provenance_rows(analysis.provenance):
        print_words(console, Text(f"  {name}: {value}"), hang=4)


def _finding(console: Console, number: int, finding: Finding) -> None:
    where = f" ({finding.where})" if finding.where else ""
    print_words(console, Text(""))
    said = Text(f"{number}. {finding.layer}: {finding.message}{where}", style="bold")
    print_words(console, said, hang=3)
    source = f" [{finding.source}]" if finding.source else ""
    if finding.advice:
        print_words(console, Text(f"   {finding.advice}{source}"), hang=3)
    for line in finding.code.splitlines():
        print_words(console, Text(f"   {line}", style="cyan"))


def _predictions(console: Console, made: Sequence[Prediction]) -> None:
    if made:
        print_words(console, Text(f"   {predicted(made[0])}", style="dim"), hang=3)
    for prediction in made:
        print_words(console, Text(f"   - {prediction.message}"), hang=5)


def print_words(console: Console, text: Text, hang: int | None = None) -> None:
    """Print one paragraph; with ``hang`` wrapped, its later lines indented, else as it is."""
    text = encoded(text, console)
    if hang is not None:
        width = max(20, min(console.width, WIDEST))
        lines = textwrap.wrap(
            text.plain, width, subsequent_indent=" " * hang, break_on_hyphens=False
        )
        text = Text("\n".join(lines), style=text.style)
    console.print(text, soft_wrap=True, highlight=False)


def is_plain(console: Console) -> bool:
    """Whether only ASCII can be written."""
    return not str(console.encoding).lower().startswith("utf")


def encoded(text: Text, console: Console) -> Text:
    """The same text in what the console can encode, control characters taken out."""
    plain = "".join(char for char in text.plain if char == "\n" or char.isprintable())
    if is_plain(console):
        plain = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda power: f"^{power[0].translate(_RAISED)}", plain)
        plain = plain.translate(_PLAIN).encode("ascii", "replace").decode("ascii")
    if plain == text.plain:
        return text
    return Text(plain, style=text.style)
