"""Nothing outside gradflow/cells names a cell: what is special about one stands in its own file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradflow

ROOT = Path(gradflow.__file__).parent
CELL = re.compile(r"\b(LSTM|GRU|RNN)(Cell)?\b|\bRNN_\w+|\b(lstm|gru|rnn_tanh|rnn_relu)(_cell)?\b")
# The demo is a user's model; the others speak: of the demo, of how letters are read, an example.
SPEAK = ("demo.py", "demo.py", "cli.py", "loading/words.py", "hooks/mistakes.py")
FILES = [
    file
    for file in sorted(ROOT.rglob("*.py"))
    if file.parent.name != "cells" and str(file.relative_to(ROOT)) not in SPEAK
]


def named(source: str) -> Iterator[str]:
    """Cells that the code of a file names, in strings or names; docstrings may have examples."""
    tree = ast.parse(source)
    bodies = [getattr(node, "body", []) for node in ast.walk(tree)]
    first = [body[0] for body in bodies if isinstance(body, list) and body]
    documents = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = getattr(node, "attr", getattr(node, "id", getattr(node, "value", None)))
        if isinstance(text, str) and id(node) not in documents and CELL.search(text):
            yield text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_names_a_cell(file: Path) -> None:
    assert list(named(file.read_text())) == []


def test_a_cell_that_is_named_would_be_seen() -> None:
    assert list(named('if track.cell == "LSTM":\n    kind = nn.GRU')) == ["LSTM", "GRU"]
    assert list(named('def f():\n    """An LSTM."""')) == []
