"""What is tried at length: `python tests/steadiness.py [interrupts] [soak] [files]`, all without a name.

Counts go into reports/steadiness.md, a row for each thing that is tried. `soak reports=40 analyses=0` does
less of the one and nothing of the other, `interrupts every=10` takes one line of ten,
`recorded=0` of watched steps alone.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import folders
import interrupts
import soak
import torch

REPORT = Path(__file__).parent.parent / "reports" / "steadiness.md"
HEAD = """# Steadiness

Made by `python tests/steadiness.py`: what is interrupted, repeated and cut off, and what failed. Time is of
the processor, in seconds; memory is the largest that the process had until then, in MiB.

| what | tried | passed | failed | time | memory | |
|---|---|---|---|---|---|---|
"""
TIMES = {
    "recordings": 10_000,
    "analyses": 1_000,
    "reports": 200,
    "long": 1,
    "every": 1,
    "recorded": 1,
}
MOST = 1000  # bytes by which a repetition may grow
Row = tuple[str, int, int, str]  # what, tried, failed, words


def interrupted() -> Iterator[Row]:
    """Every line of a recorded or watched step that is gradflow's, where it runs first and last."""
    for kind in (*(interrupts.RECURRENCES if TIMES["recorded"] else ()), *interrupts.WATCHED):
        trial = interrupts.trial_of(kind)
        tried = sorted({at for r in interrupts.lines_of(trial).values() for at in (r[0], r[-1])})
        tried, errors = tried[:: TIMES["every"]], interrupts.ERRORS
        wrong = [interrupts.interrupted(trial, at, errors[n % 4]) for n, at in enumerate(tried)]
        for one in filter(None, wrong):
            print(*one, sep="\n", flush=True)
        share = f"one line of {TIMES['every']}" if TIMES["every"] > 1 else ""
        yield f"an exception at a line, {kind}", len(tried), sum(map(bool, wrong)), share


def soaked() -> Iterator[Row]:
    """Many of one thing in this process, and very long sequences."""
    for name in soak.PARTS:
        times = TIMES[name]
        if not times:
            continue
        work, models = soak.PARTS[name]()
        grown = soak.growth(work, times, models)
        failed = grown.bytes_each > MOST + 2 * grown.noise or bool(grown.more)
        more = (
            ", ".join(f"{count:+} {what}" for what, count in grown.more.items()) or "nothing else"
        )
        words = f"{grown.bytes_each:+.0f} ± {grown.noise:.0f} bytes each, {more}"
        yield name, times, int(failed), words
    for kind, steps in soak.LONG.items() if TIMES["long"] else ():
        work = soak.long(kind, steps)
        work()
        work()  # allocators go on filling up in the second
        before = soak.resident()
        for _ in range(3):
            work()
        each = (soak.resident() - before) / 3
        yield f"T = {steps:,}, {kind}", 5, int(each > 2**20), f"{each / 2**10:+.0f} KiB each"


def cut_off() -> Iterator[Row]:
    """Reports that are killed, meet a full disk, or each other."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        took = folders.took(place / "timed")
        for words, times, trial in (
            ("kill -9", 100, lambda n, p: folders.killed(p, took * n / 80, force=bool(n % 2))),
            (
                "a full disk",
                40,
                lambda n, p: folders.on_a_full_disk(p, 2_000 * n) or folders.whole(p),
            ),
            ("two at once", 40, lambda n, p: folders.at_once(p, force=bool(n % 2))),
        ):
            failed = 0
            for number in range(times):
                try:
                    trial(number, place / f"{words} {number}")
                except AssertionError as error:
                    print(words, number, error, flush=True)
                    failed += 1
            yield f"a report, {words}", times, failed, "whole or absent"


PARTS = {"interrupts": interrupted, "soak": soaked, "files": cut_off}


def written(rows: dict[str, str]) -> None:
    """Put rows into the report, in place of those of the same name."""
    known: dict[str, str] = {}
    if REPORT.exists():
        lines = [x for x in REPORT.read_text("utf-8").splitlines() if x.startswith("| ")]
        known = {line.split("|")[1].strip(): line for line in lines[1:]}
    REPORT.write_text(HEAD + "\n".join((known | rows).values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bad = 0
    TIMES.update({k: int(v) for k, _, v in (a.partition("=") for a in sys.argv[1:]) if v})
    for part in [one for one in sys.argv[1:] if "=" not in one] or PARTS:
        began = time.process_time()
        for what, tried, failed, words in PARTS[part]():
            now = time.process_time()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            counts = f"{tried:,} | {tried - failed:,} | {failed} | {now - began:.0f} | {peak:,}"
            row = f"| {what} | {counts} | {words} |"
            print(row, flush=True)
            written({what: row})
            began, bad = now, bad + failed
    sys.exit(bool(bad))
