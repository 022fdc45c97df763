"""Any bytes end in success or in one short sentence: files of every kind, and those that once did not."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_files
import pytest
from fuzz_files import CORPUS, Outcome, Reader, reading

KEPT = sorted(CORPUS.iterdir()) if CORPUS.is_dir() else []


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with reading() as opened:
        yield opened


@pytest.mark.parametrize("kind", hostile_files.KINDS)
def test_files_of_a_kind_end_in_success_or_one_sentence(kind: str, reader: Reader) -> None:
    seen: list[Outcome] = []

    def attempt(case: hostile_files.Case) -> None:
        seen.append(reader(*case))
        assert not seen[-1].wrong, (case[:2], seen[-1].wrong)

    hostile_files.each(hostile_files.KINDS[kind], attempt, count=14, seed=1)
    assert len(seen) >= 10  # fewer where a kind has fewer


@pytest.mark.parametrize("path", KEPT, ids=[path.name for path in KEPT])
def test_what_failed_once_does_not_again(path: Path, reader: Reader) -> None:
    role, _, _ = path.name.partition("-")
    name = f"history{path.suffix}" if path.suffix == ".jsonl" else f"x{path.suffix}"
    outcome = reader(role.replace("_", " "), name, path.read_bytes())
    assert not outcome.wrong


SOUND = Outcome(2, "Error: x.pt is empty; save it again\n", "", 1.0, 400.0)
BROKEN = {
    "a crash": Outcome(-11, "", "", 0.1, 300.0),
    "a fault": Outcome(3, "Traceback", "", 0.1, 300.0),
    "two lines": Outcome(2, "Error: a\nError: b\n", "", 0.1, 300.0),
    "raw letters": Outcome(2, "Error: \x1b[31m\n", "", 0.1, 300.0),
    "raw letters shown": Outcome(0, "", "layer \x1b[31m\n", 0.1, 300.0),
    "a long sentence": Outcome(2, f"Error: {'k' * 301}\n", "", 0.1, 300.0),
    "too long": Outcome(0, "", "", 21.0, 300.0),
    "too much": Outcome(0, "", "", 0.1, 2049.0),
}


@pytest.mark.parametrize("outcome", BROKEN.values(), ids=BROKEN)
def test_every_limit_can_be_broken(outcome: Outcome) -> None:
    assert not SOUND.wrong
    assert outcome.wrong


class Call:
    """What a pickle calls when it is opened."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_crashes_and_memory_are_seen(reader: Reader) -> None:
    for call, wrong in ((Call(os.abort), "exit -6"), (Call(bytearray, 2 * 2**30), " MiB")):
        outcome = reader("trusted", "x.pkl", pickle.dumps(call))
        assert wrong in outcome.wrong, outcome
