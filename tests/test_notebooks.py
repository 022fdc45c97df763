"""The notebooks as shipped: executed, equal to their sources, and opening as promised.

`python tests/notebooks.py --check` runs them, which takes minutes; these tests only look.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

import notebooks

SOURCES = sorted(notebooks.FOLDER.glob("*.py"))
NAMES = [file.stem for file in SOURCES]


@pytest.mark.parametrize("file", SOURCES, ids=NAMES)
def test_a_notebook_is_its_source_executed(file: Path) -> None:
    assert notebooks.differs(file) == ""


@pytest.mark.parametrize("file", SOURCES, ids=NAMES)
def test_no_cell_failed_or_warned(file: Path) -> None:
    book = nbformat.read(file.with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"0x[0-9a-f]{8,}|/tmp/|/home/", file.with_suffix(".ipynb").read_text())


@pytest.mark.parametrize("file", SOURCES, ids=NAMES)
def test_it_opens_with_the_terms_and_the_overview(file: Path) -> None:
    book = nbformat.read(file.with_suffix(".ipynb"), as_version=4)
    first = book.cells[0].source
    outside, folded = first.partition("<details>")[::2]
    assert first.startswith("# ") and "| 中文 |" in folded and "梯度消失" in folded
    chinese = [outside, folded.partition("</details>")[2], *(c.source for c in book.cells[1:])]
    assert not re.search("[\u4e00-\u9fff]", "".join(chinese)), "it stands where one looks for it"
    drawn = [cell for cell in book.cells if cell.cell_type == "code" and _pictures(cell)]
    assert "gradflow.plot(run" in drawn[0].source, "the first figure is the overview"


def _pictures(cell: nbformat.NotebookNode) -> list[str]:
    return [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("file", SOURCES, ids=NAMES)
def test_links_between_notebooks_hold(file: Path) -> None:
    for target in re.findall(r"\]\(([^)]+\.ipynb)\)", file.read_text()):
        assert (file.parent / target).is_file(), target


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / SOURCES[0].name
    file.write_text(SOURCES[0].read_text() + "\n# %%\nprint('more')\n")
    file.with_suffix(".ipynb").write_bytes(SOURCES[0].with_suffix(".ipynb").read_bytes())
    assert "is not what" in notebooks.differs(file)


def test_there_are_at_most_seven() -> None:
    """Six lessons, and the one on linear recurrences."""
    assert 1 <= len(SOURCES) <= 7
