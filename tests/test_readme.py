"""The README's code runs as it stands, and its length is kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {})  # noqa: S102  the README is ours
    assert (tmp_path / "reports" / "run" / "report.html").exists()


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path


def test_every_command_is_shown() -> None:
    from gradflow.cli import gradflow

    for command in gradflow.commands:
        assert f"gradflow {command}" in README.read_text(), command
