"""Execute the notebooks from their text sources, and keep the pairs equal.

    python tests/notebooks.py            # run every notebooks/*.py and write the .ipynb beside it
    python tests/notebooks.py 04         # only those whose name starts so
    python tests/notebooks.py --check    # run them, write nothing; fail where a pair differs

The source is the percent format that Jupyter, VS Code and jupytext read.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent.parent / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def source(file: Path) -> nbformat.NotebookNode:
    """The notebook that a text source stands for, with cells numbered, not yet run."""
    book = jupytext.read(file, fmt="py:percent")
    book.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    return book


def run(file: Path) -> nbformat.NotebookNode:
    """Run a source from a kernel of its own; an error in a cell is raised."""
    book = source(file)
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day
    return book


def cells(book: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Kind and text of every cell."""
    return [(cell.cell_type, cell.source) for cell in book.cells]


def differs(file: Path) -> str:
    """Why a source and its notebook are no pair, "" if they are."""
    other = file.with_suffix(".ipynb")
    if not other.exists():
        return f"{other.name} is missing; run python tests/notebooks.py {file.stem}"
    book = nbformat.read(other, as_version=4)
    if cells(book) != cells(source(file)):
        return f"{other.name} is not what {file.name} says; run python tests/notebooks.py"
    if any(cell.cell_type == "code" and cell.execution_count is None for cell in book.cells):
        return f"{other.name} was not executed; run python tests/notebooks.py {file.stem}"
    return ""


def main(arguments: list[str]) -> int:
    """Run what is asked for."""
    check = "--check" in arguments
    starts = tuple(a for a in arguments if not a.startswith("-")) or ("",)
    bad = 0
    for file in sorted(FOLDER.glob("*.py")):
        if not file.name.startswith(starts):
            continue
        begun = time.perf_counter()
        book = run(file)
        print(f"{file.name}: ran in {time.perf_counter() - begun:.0f} s", flush=True)
        if not check:
            nbformat.write(book, file.with_suffix(".ipynb"))
        elif reason := differs(file):
            bad += 1
            print(reason)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
