"""Files of every kind, changed where it hurts, handed to gradflow: success, or one short sentence.

In the suite `tests/test_fuzz_files.py` tries a few hundred; for a night, and for the counts in reports/:

    python tests/fuzz_files.py --hours 8              what fails is kept in tests/fuzz_corpus
    python tests/fuzz_files.py --minutes 5 --counts   writes its rows into reports/hostile_files.md as well
    python tests/fuzz_files.py --only folders         of kinds with this word in their name alone

Each file is read in a process of its own, forked from one that has imported everything, so that a crash, a
file that takes for ever and memory that is taken on the word of a header all show.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# that one file may take, of processor, memory and reader
SECONDS, MEBIBYTES, LETTERS = 20, 2048, 300
ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "fuzz_corpus"
COUNTS = ROOT / "reports" / "hostile_files.md"
HEAD = f"""# Files made to do harm

Made by `python tests/fuzz_files.py --counts`: each file is read in a process of its own, and may take
{SECONDS} s of processor, {MEBIBYTES} MiB (torch and Python take 400 of them) and one printable sentence of
{LETTERS} letters.

| kind of file | tried | opened | refused | failed | longest, s of processor | peak, MiB |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """How one file went."""

    code: int  # exit code; −n of signal n
    said: str  # on standard error
    shown: str  # on standard output
    seconds: float  # of processor
    mebibytes: float  # peak of memory

    def cost(self) -> float:
        """Seconds of processor."""
        return self.seconds

    def peak(self) -> float:
        """MiB."""
        return self.mebibytes

    @property
    def wrong(self) -> str:
        """Which limit it broke, or ""."""
        if self.code not in (0, 2):
            return f"exit {self.code}: {self.said[-1500:]}"
        sentences = self.said.strip("\n").split("\n")
        if self.code == 2 and (
            len(sentences) != 1
            or not sentences[0].startswith("Error: ")
            or not sentences[0].isprintable()
            or len(sentences[0]) > LETTERS + len("Error: ")
        ):
            return f"not one printable sentence of {LETTERS} letters: {self.said[:1500]!r}"
        if not all(line.isprintable() for line in self.shown.split("\n")):
            return f"letters of the file printed raw: {self.shown[:1500]!r}"
        if self.seconds > SECONDS:
            return f"{self.seconds:.0f} s"
        if self.mebibytes > MEBIBYTES:
            return f"{self.mebibytes:.0f} MiB"
        return ""


# ---------------------------------------------------------------- reading, in a process of its own


def read(role: str, path: str) -> None:
    """What gradflow does with a file in each of its roles; ends with the command line's exit code."""
    from gradflow import cli

    if not ROLES[role]:
        sys.exit(cli._code(lambda: _read_here(role, Path(path)), [path]))
    cli.main([path if word == "FILE" else word for word in ROLES[role]])


def _read_here(role: str, path: Path) -> None:
    import click

    import gradflow
    from gradflow import reporter
    from gradflow.loading import read_tokens

    if role == "tokens":
        read_tokens(path, 50, (2, 5), 0)
        return
    run = gradflow.load(path)
    click.echo(repr(run).split("\n")[0])
    if isinstance(run, gradflow.Analysis):
        json.dumps(reporter.summary(run), allow_nan=False)
        reporter.render(run)
    else:
        json.dumps(reporter.history_summary(run), allow_nan=False)
        reporter.render_history(run)
        for kind in ("layers", "steps", "lags", "gates", "notes"):
            run.frame(kind)


PROBED = ("--no-report", "--seq-len", "5", "--batch", "2")
ROLES = {  # the command of each; FILE is the file
    "inspect": ("inspect", "FILE"),
    "model": ("analyze", "FILE", *PROBED),
    "model with a batch": ("analyze", "FILE", "--input", "batch.pt", "--no-report"),
    "batch": ("analyze", "model.pt", "--input", "FILE", "--no-report"),
    "target": ("analyze", "model.pt", "--input", "batch.pt", "--target", "FILE", "--no-report"),
    "labels": ("analyze", "model.pt", "--input", "batch.pt", "--labels", "FILE", "--no-report"),
    "folder": ("analyze", "FILE", *PROBED),  # of transformers; its bytes are those of a zip archive
    "tokens": (),
    "load": (),
    "report": ("report", "FILE", "-o", "again", "--force"),
    "compare": ("compare", "run.nc", "FILE", "-o", "both"),
    "trusted": ("inspect", "FILE", "--trust"),  # runs what the file says: so that a limit is broken
}


def serve() -> None:
    """Read roles and paths from standard input, one in a line, and answer with outcomes."""
    import torch

    torch.set_num_threads(1)
    sound = {"tokens": "batch.pt", "load": "run.nc", "report": "run.nc", "compare": "run.nc"}
    for role in ROLES:  # whatever is imported late
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            read(role, sound.get(role, "batch.pt" if role == "target" else "model.pt"))
    for line in sys.stdin:
        role, path = json.loads(line)
        print(json.dumps(asdict(_forked(role, path))), flush=True)


def _forked(role: str, path: str) -> Outcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(30 * SECONDS)  # of the clock, where the machine has others to serve
            resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
            code = 3
            try:
                read(role, path)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 3
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        _, status, used = os.wait4(child, 0)
        out.seek(0), err.seek(0)
        return Outcome(
            os.waitstatus_to_exitcode(status),
            err.read(10**6).decode("utf-8", "replace"),
            out.read(10**6).decode("utf-8", "replace"),
            used.ru_utime + used.ru_stime,
            used.ru_maxrss / 1024,
        )


class Reader:
    """Tries files, in a folder with a model, a batch and a run beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_companions(folder)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __call__(self, role: str, name: str, data: bytes) -> Outcome:
        """The outcome of one file."""
        path = self.folder / name
        if role == "folder":
            zipfile.ZipFile(io.BytesIO(data)).extractall(path)
        else:
            path.write_bytes(data)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([role, name]) + "\n")
        self.process.stdin.flush()
        outcome = Outcome(**json.loads(self.process.stdout.readline()))
        subprocess.run(["rm", "-rf", "--", str(path)], check=True)
        if role == "compare" and outcome.code != 0 and (self.folder / "both").exists():
            return Outcome(3, "compare left a folder behind", "", 0.0, 0.0)
        subprocess.run(["rm", "-rf", str(self.folder / "both")], check=True)
        return outcome

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@contextlib.contextmanager
def reading() -> Iterator[Reader]:
    """A reader in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
        try:
            yield reader
        finally:
            reader.close()


def make_companions(folder: Path) -> None:
    """The sound files that go with one that is not."""
    import torch

    import gradflow

    torch.manual_seed(0)
    model = torch.nn.LSTM(3, 5)
    torch.save(model, folder / "model.pt")
    torch.save({"input": torch.randn(6, 2, 3)}, folder / "batch.pt")
    gradflow.diagnose(model, torch.randn(6, 2, 3)).save(folder / "run.nc")


# ---------------------------------------------------------------------------- a night, and counts


def keep(role: str, name: str, data: bytes) -> Path:
    """Keep a file that failed; its name tells its role."""
    CORPUS.mkdir(exist_ok=True)
    mark = hashlib.sha256(data).hexdigest()[:8]
    path = CORPUS / f"{role.replace(' ', '_')}-{mark}{Path(name).suffix}"
    path.write_bytes(data)
    return path


def night(seconds: float, counts: bool, seed: int, only: str) -> int:
    """Try files for so long; how many failed."""
    import hostile_files

    tried: dict[str, list[Outcome]] = {}
    until = time.monotonic() + seconds

    def attempt(kind: str, case: hostile_files.Case) -> None:
        if time.monotonic() < until:
            outcome = reader(*case)
            tried.setdefault(kind, []).append(outcome)
            if outcome.wrong:
                print(f"{kind}: {keep(*case)} as {case[0]}: {outcome.wrong}\n", flush=True)

    with reading() as reader:
        while time.monotonic() < until:
            for kind, strategy in hostile_files.KINDS.items():
                if only not in kind:
                    continue
                seed += 1
                hostile_files.each(strategy, partial(attempt, kind), 20, seed)
    rows = {}
    for kind, outcomes in tried.items():
        sound = [one for one in outcomes if not one.wrong]
        opened = sum(one.code == 0 for one in sound)
        counted = (len(outcomes), opened, len(sound) - opened, len(outcomes) - len(sound))
        longest, most = (max(map(get, outcomes)) for get in (Outcome.cost, Outcome.peak))
        rows[kind] = f"| {kind} | {' | '.join(map(str, counted))} | {longest:.1f} | {most:.0f} |"
    print(*rows.values(), sep="\n")
    if counts:
        written(rows)
    return sum(bool(one.wrong) for outcomes in tried.values() for one in outcomes)


def written(rows: dict[str, str]) -> None:
    """Put rows into the report, in place of those of the same kinds."""
    lines = COUNTS.read_text("utf-8").splitlines() if COUNTS.exists() else []
    known = {line.split("|")[1].strip(): line for line in lines[len(HEAD.splitlines()) :]}
    COUNTS.write_text(HEAD + "\n".join((known | rows).values()) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--only", default="", help="a word of the kinds that are tried")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--counts", action="store_true", help=f"write {COUNTS.name}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    seconds = 3600 * options.hours + 60 * options.minutes
    sys.exit(night(seconds or 60.0, options.counts, options.seed, options.only) > 0)


if __name__ == "__main__":
    main()
