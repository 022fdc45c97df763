"""The house: stages import only the nouns, importing gradflow is light, and every name is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradflow

ROOT = Path(gradflow.__file__).parent
STAGES = ("hooks", "analyzer", "reporter", "loading")
NOUNS = (
    "recording",
    "analysis",
    "history",
    "cells",
    "errors",
    "limits",
    "process",
    "writing",
    "distributed",
    "_version",
)
PLOTTING = ("matplotlib", "seaborn", "PIL")


def imported(source: str) -> set[str]:
    """Modules that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def trespasses(stage: str, source: str) -> list[str]:
    """Rooms of the house that a file of this stage must not enter, but does."""
    allowed = (stage, *NOUNS)
    rooms = {name.split(".")[1] for name in imported(source) if name.startswith("gradflow.")}
    wrong = [room for room in rooms if room not in allowed and room != "__init__"]
    libraries = {name.split(".")[0] for name in imported(source)}
    forbidden = (*PLOTTING, "click") if stage in ("analyzer", "hooks") else ()
    return sorted([*wrong, *(library for library in forbidden if library in libraries)])


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_only_the_nouns(stage: str) -> None:
    for file in sorted((ROOT / stage).rglob("*.py")):
        assert trespasses(stage, file.read_text()) == [], file


def source_files(noun: str) -> list[Path]:
    """The files of a noun, which is a module or a package."""
    return sorted((ROOT / noun).glob("*.py")) or [ROOT / f"{noun}.py"]


@pytest.mark.parametrize(
    "noun", ["recording", "analysis", "history", "errors", "limits", "process", "writing"]
)
def test_nouns_import_no_stage(noun: str) -> None:
    rooms = {
        name.split(".")[1]
        for file in source_files(noun)
        for name in imported(file.read_text())
        if name.startswith("gradflow.")
    }
    assert rooms <= set(NOUNS)


def test_a_trespass_would_be_seen() -> None:
    assert trespasses("hooks", "from gradflow.analyzer import analyze") == ["analyzer"]
    assert trespasses("analyzer", "def f():\n    import matplotlib.pyplot") == ["matplotlib"]
    assert trespasses("reporter", "from gradflow.hooks.replay import Replay") == ["hooks"]


def loaded_after(code: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter after running the code."""
    script = f"import sys\n{code}\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_gradflow_loads_neither_torch_nor_a_plotting_library() -> None:
    assert loaded_after("import gradflow") & {"torch", *PLOTTING} == set()


def test_recording_and_analyzing_load_no_plotting_library() -> None:
    loaded = loaded_after("import gradflow\ngradflow.record, gradflow.analyze, gradflow.diagnose")
    assert "torch" in loaded
    assert loaded & {*PLOTTING, "click"} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"from gradflow.cli import main\ntry:\n    main({arguments})\nexcept SystemExit: pass"
    assert "torch" not in loaded_after(code)


@pytest.mark.parametrize("name", [n for n in gradflow.__all__ if not n.startswith("__")])
def test_public_names_are_documented_and_reachable(name: str) -> None:
    assert name in dir(gradflow)
    assert (getattr(gradflow, name).__doc__ or "").strip()


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        _ = gradflow.recrod
