"""No sentence writes a limit out: words of the page, pictures and README come from gradflow/limits.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradflow
from gradflow import limits

ROOT = Path(gradflow.__file__).parent
README = (ROOT.parent / "README.md").read_text()
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.name != "limits.py"]
WORDS = ("one decade", "a decade", "10⁻³", "< 0.05", "> 0.95")


def texts(source: str) -> Iterator[tuple[str, bool]]:
    """Every string of a source, and whether it is a docstring."""
    tree = ast.parse(source)
    bodies = [getattr(node, "body", []) for node in ast.walk(tree)]
    first = [body[0] for body in bodies if isinstance(body, list) and body]
    documents = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, id(node) in documents


def written_out(source: str) -> list[str]:
    """Strings, docstrings aside, that write a limit out."""
    return [
        text
        for text, document in texts(source)
        if not document and any(word in text for word in WORDS)
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_sentence_writes_a_limit_out(file: Path) -> None:
    found = written_out(file.read_text())
    allowed = ["10⁻³"] if file.name == "panels.py" else []  # a tick of the fixed colour scale
    assert found == allowed


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.html")), ids=lambda file: file.name)
def test_nor_does_the_page(file: Path) -> None:
    assert [word for word in WORDS if word in file.read_text()] == []


def test_a_limit_written_out_would_be_seen() -> None:
    source = 'def f():\n    """Below 10⁻³."""\n    return f"below 10⁻³ after {n} steps"'
    assert written_out(source) == ["below 10⁻³ after "]


def test_docstrings_that_name_a_limit_name_todays() -> None:
    """Whoever changes the limit is shown the docstrings that speak of it."""
    speaking = {
        word: [f.name for f in FILES if any(d and word in t for t, d in texts(f.read_text()))]
        for word in ("one decade", "10⁻³")
    }
    assert not speaking["one decade"] or limits.BAND_WORDS == "one decade", speaking
    assert not speaking["10⁻³"] or limits.GONE_WORDS == "10⁻³", speaking


def readme_rows() -> dict[str, str]:
    """The README's table of words, without its backquotes."""
    table = README.split("| you read | it means |\n|---|---|\n")[1].split("\n\n")[0]
    rows = (line.strip("|").split(" | ") for line in table.splitlines())
    return {name.strip().replace("`", ""): means.strip().replace("`", "") for name, means in rows}


def test_the_readme_explains_its_words_as_the_page_does() -> None:
    rows = readme_rows()
    assert rows.items() <= limits.GLOSSARY.items()
    assert all(any(verdict in name.split(", ") for name in rows) for verdict in limits.VERDICTS)


def test_another_meaning_would_be_seen() -> None:
    rows = readme_rows() | {"stable": "it changes by less than two decades over the span"}
    assert not rows.items() <= limits.GLOSSARY.items()
