"""CONTRIBUTING.md says what is so: its names are there, are reached in that order, its files exist."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import gradflow
from gradflow.reporter import png

ROOT = Path(gradflow.__file__).parent
PAGE = (ROOT.parent / "CONTRIBUTING.md").read_text()
MOST_WORDS = 20


def section(heading: str) -> str:
    """The text under a heading of the page."""
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


STOPS = [tuple(cell.strip("`") for cell in row[:2]) for row in rows("How a gradient travels")]


def found(name: str, file: str) -> Any:
    """The object of this name in this file of the package; AttributeError where it is gone."""
    dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    thing = getattr(importlib.import_module(f"gradflow.{dotted}"), name)
    assert thing.__module__ == f"gradflow.{dotted}", f"{name} is only imported in {file}"
    return thing


@pytest.mark.parametrize(("name", "file"), STOPS)
def test_every_name_on_the_way_is_there(name: str, file: str) -> None:
    assert found(name, file)


def test_a_name_that_is_gone_or_has_moved_would_be_seen() -> None:
    with pytest.raises(AttributeError, match="Recoder"):
        found("Recoder", "hooks/recorder.py")
    with pytest.raises(AssertionError, match="only imported"):
        found("Call", "hooks/recorder.py")


@contextmanager
def noted(things: list[Any]) -> Iterator[list[Any]]:
    """The things in the order in which they are first called, or instances of them first made."""
    order: list[Any] = []
    functions = {thing.__code__: thing for thing in things if inspect.isfunction(thing)}
    classes = {thing.__init__: thing for thing in things if inspect.isclass(thing)}

    def note(thing: Any) -> None:
        if thing not in order:
            order.append(thing)

    def called(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in functions:
            note(functions[frame.f_code])

    def making(original: Callable[..., None], kind: type) -> Callable[..., None]:
        def made(self: Any, *args: Any, **kwargs: Any) -> None:
            note(kind)
            original(self, *args, **kwargs)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for original, kind in classes.items():
            patch.setattr(kind, "__init__", making(original, kind))
        before = sys.getprofile()
        sys.setprofile(called)
        try:
            yield order
        finally:
            sys.setprofile(before)


def test_a_gradient_travels_this_way() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(3, 8), torch.randn(20, 4, 3)
    things = [inspect.unwrap(found(*stop)) for stop in STOPS]
    with noted(things) as order:
        with gradflow.record(model) as recording:
            model(x)[0][-1].square().sum().backward()
        png(gradflow.plot(gradflow.analyze(recording)))
    assert [thing.__name__ for thing in order] == [name for name, _ in STOPS]


def test_another_order_would_be_seen() -> None:
    def one() -> None:
        """First."""

    def other() -> None:
        """Second."""

    with noted([one, other]) as order:
        other()
        one()
        other()
    assert order == [other, one]


def test_the_files_that_recipes_touch_are_there_and_at_most_three() -> None:
    for what, touched, _ in rows("Recipes"):
        files = re.findall(r"`([^`]+)`", touched)
        assert 1 <= len(files) <= 3, what
        for file in files:
            place = ROOT.parent / file if file == "README.md" else ROOT / file
            assert place.parent.is_dir() if "NEW" in file else place.is_file(), file


def test_every_name_in_a_recipe_is_one_of_the_files_it_touches_or_of_the_tests() -> None:
    tests = ROOT.parent / "tests"
    for what, touched, how in rows("Recipes"):
        sources = [ROOT / file for file in re.findall(r"`([^`]+)`", touched)]
        folders = {ROOT.parent if file.name == "README.md" else file.parent for file in sources}
        text = "".join(f.read_text() for folder in folders for f in folder.glob("*.py"))
        for name in re.findall(r"`([^`]+)`", how):
            if name.startswith("tests/"):
                assert (tests.parent / name).is_file(), name
            elif name.endswith(".py"):
                assert (ROOT / name).is_file(), name
                text += (ROOT / name).read_text()
        for name in re.findall(r"`(\w+)(?:\.(?!py)\w+)?`", how):
            assert re.search(rf"\b{name}\b", text), f"{what}: {name}"


def test_each_of_the_words_is_used_in_the_package_and_there_are_few() -> None:
    words = [row[0] for row in rows("The house's own words")]
    assert 0 < len(words) <= MOST_WORDS
    for word in words:
        pattern = re.compile(rf"\b{word.replace(' ', '[ _]')}s?\b", re.I)
        used = [f for f in ROOT.rglob("*.py") if pattern.search(f.read_text())]
        assert len(used) >= 2, word
