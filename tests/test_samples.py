"""The sample reports: small, and each with the command that makes it in its first lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
import validation

PAGES = sorted(samples.FOLDER.glob("*.html"))


@pytest.mark.parametrize("file", PAGES, ids=[file.name for file in PAGES])
def test_a_page_says_how_it_was_made(file: Path) -> None:
    lines = file.read_text().split("\n")
    assert samples.COMMAND in lines[1] and samples.PAGES[file.name] in lines[1]
    assert lines[0] == "<!DOCTYPE html>", "a comment before it would leave standards mode"
    assert file.stat().st_size < 1e6


def test_there_are_two_or_three_reports_and_the_readme_names_every_file() -> None:
    assert sorted(samples.PAGES) == [file.name for file in PAGES]
    folder = samples.FOLDER.parent
    readme = (folder / "README.md").read_text()
    for file in folder.glob("*/*"):
        assert f"{file.parent.name}/{file.name}" in readme
    assert "python tests/samples.py" in readme


def test_the_table_of_known_numbers_says_how_it_was_made() -> None:
    first = (validation.FOLDER / "validation.md").read_text().split("\n")[0]
    assert "python tests/validation.py" in first
