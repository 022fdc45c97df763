"""A sweep: the same rows whichever engine measures them, and whatever ends it in the middle."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints as made
import numpy as np
import pytest
import torch
from seam import (
    VERSIONS,
    AddingModel,
    CheckpointTask,
    Engine,
    Outcome,
    Running,
    SweepFolder,
    checkpoints,
    measure_checkpoint,
    pooled_batches,
)

import gradflow
from gradflow import cli
from gradflow.errors import FileError, GradflowError, InputError
from gradflow.history import HISTORY_FILE, History, LayerProbe
from gradflow.loading import step_in_name
from gradflow.progress import Progress
from gradflow.sweeping import run_sweep, sweep_request


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seeds × eight steps, and a batch."""
    folder = tmp_path_factory.mktemp("adding")
    made.write_runs(folder / "runs")
    made.write_batch(folder / "batch.pt")
    return folder


@pytest.fixture
def serial() -> Iterator[Executor]:
    """This process, in one thread."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def swept(runs: Path, pattern: str, executor: Executor, **options: Any) -> History:
    """A sweep of these checkpoints on the batch."""
    batch = options.pop("batch", runs / "batch.pt")
    return gradflow.sweep(
        str(runs / "runs" / pattern), model=made.SPEC, batch=batch, executor=executor, **options
    )


def run(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", *arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def whole(runs: Path) -> Path:
    """All 64 checkpoints, measured in this process."""
    with ThreadPoolExecutor(1) as executor:
        swept(runs, "**/*.pt", executor, folder=runs / "whole")
    return runs / "whole"


# ------------------------------------------------------------------------------------- the rows


def test_a_row_is_what_a_batch_says_of_the_checkpoint(runs: Path, serial: Executor) -> None:
    """Against the model opened and analyzed by hand."""
    history = swept(runs, "seed=3/*.pt", serial, preset="full")
    saved = torch.load(runs / "runs" / "seed=3" / "15.pt", weights_only=True)
    batch = torch.load(runs / "batch.pt", weights_only=True)
    model = AddingModel("RNN", made.UNITS)
    model.load_state_dict(saved["state_dict"])
    with gradflow.record(model) as recording:
        loss = (model(batch["input"]) - batch["target"]).square().mean()
        loss.backward()
    layer = gradflow.analyze(recording)["rnn.l0"]
    row = history.data.sel(step=15, layer="rnn.l0")
    assert row["rate"] == pytest.approx(layer.rate.value, rel=1e-6)
    assert row["gain_low"] == pytest.approx(layer.gain.low, rel=1e-6)
    assert row["channels"] == layer.channels
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    weights = [p.grad for name, p in model.named_parameters() if name.startswith("rnn.")]
    norm = torch.stack([w.norm() for w in weights if w is not None]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert history.steps.tolist() == list(range(0, 40, 5))
    assert row["step_from"].item() == "global_step in the checkpoint"
    assert history.counted_in == "update"
    assert float(history.data["rate"][0, 0]) != float(row["rate"])


def test_all_runs_are_there_in_order(whole: Path) -> None:
    history = gradflow.load(whole)
    assert isinstance(history, History)
    assert (len(history), history.ended, history.title) == (64, True, "AddingModel")
    assert list(history.runs) == [f"seed={seed}" for seed in range(8)]
    assert all(run.steps.tolist() == list(range(0, 40, 5)) for run in history.runs.values())
    of_six = history.runs["seed=6"].data["rate"].values
    at = np.flatnonzero(history.data["run"].values == "seed=6")
    assert (of_six == history.data["rate"].values[at]).all() and np.isfinite(of_six).all()
    assert "training steps are from: global_step in the checkpoint" in history.notes[0].text
    with pytest.raises(InputError, match=r"layer must be one of rnn.l0"):
        _ = history["head"]


def test_two_shards_are_the_whole(runs: Path, whole: Path, serial: Executor) -> None:
    place, pattern = str(runs / "shards"), str(runs / "runs" / "**" / "*.pt")
    options = [
        pattern,
        "--model",
        made.SPEC,
        "--input",
        str(runs / "batch.pt"),
        "-q",
        "--jobs",
        "1",
    ]
    for shard in ("1/2", "2/2"):
        assert run(*options, "-o", place, "--shard", shard) == 0
    assert run("--gather", place) == 0
    assert (Path(place) / HISTORY_FILE).read_bytes() == (whole / HISTORY_FILE).read_bytes()


@pytest.mark.slow
def test_two_processes_are_as_one(runs: Path, whole: Path) -> None:
    place, pattern = runs / "processes", str(runs / "runs" / "**" / "*.pt")
    options = ["--model", made.SPEC, "--input", str(runs / "batch.pt"), "-q"]
    assert run(pattern, *options, "--jobs", "2", "-o", str(place)) == 0
    assert (place / HISTORY_FILE).read_bytes() == (whole / HISTORY_FILE).read_bytes()


def test_what_is_repeated_computes_nothing(runs: Path, serial: Executor, tmp_path: Path) -> None:
    first = swept(runs, "seed=1/*.pt", serial, folder=tmp_path / "a")
    seen = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a/results").iterdir()}

    class Never(Executor):
        def submit(self, function: Any, /, *arguments: Any, **names: Any) -> Future[Any]:
            if function is measure_checkpoint:
                raise AssertionError("nothing was to be computed")
            return serial.submit(function, *arguments, **names)

    again = swept(runs, "seed=1/*.pt", Never(), folder=tmp_path / "a", resume=True)
    assert again.data.identical(first.data)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a/results").iterdir()} == seen
    # a moved and renamed checkpoint is known by its content; other settings are not the same
    shutil.copytree(runs / "runs/seed=1", tmp_path / "moved")
    kept = gradflow.sweep(
        str(tmp_path / "moved"), model=made.SPEC, batch=runs / "batch.pt", executor=Never(),
        folder=tmp_path / "a", resume=True,
    )  # fmt: skip
    assert (kept.data["rate"].values == first.data["rate"].values).all()
    made.write_batch(tmp_path / "other.pt", seed=5)
    with pytest.raises(AssertionError, match="nothing was to be computed"):
        swept(
            runs, "seed=1/*.pt", Never(), folder=tmp_path / "a", resume=True,
            batch=tmp_path / "other.pt",
        )  # fmt: skip


# a process that has imported everything; each line that it reads begins a sweep in a copy of it
KILLED = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import gradflow, gradflow.demo, gradflow.sweeping
pattern, spec, batch, folder = sys.argv[1:]
for _ in sys.stdin:
    copy = os.fork()
    if not copy:
        with ThreadPoolExecutor(1) as executor:
            gradflow.sweep(pattern, model=spec, batch=batch, executor=executor, folder=folder, resume=True)
        os._exit(0)
    print(copy, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be copied here")
def test_it_is_killed_at_ten_moments_and_goes_on(runs: Path, whole: Path) -> None:
    place = runs / "killed"
    arguments = [str(runs / "runs/**/*.pt"), made.SPEC, str(runs / "batch.pt"), str(place)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    random = np.random.default_rng(0)

    def results() -> int:
        return len(list((place / "results").glob("*.jsonl")))

    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def begin() -> int:
            print(file=process.stdin, flush=True)
            return int(process.stdout.readline())

        for kill in range(10):
            copy = begin()
            while results() < 1 + 6 * kill:
                os.kill(copy, 0)  # it is there
                time.sleep(0.001)
            time.sleep(float(random.uniform(0, 0.05)))
            os.kill(copy, signal.SIGKILL)
            assert int(process.stdout.readline()) == -signal.SIGKILL
            assert not (place / HISTORY_FILE).exists()
        before = results()
        assert 55 <= before < 64
        begin()
        assert int(process.stdout.readline()) == 0
        process.stdin.close()
    assert (place / HISTORY_FILE).read_bytes() == (whole / HISTORY_FILE).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_told_to_end_it_takes_its_workers_along_and_goes_on(runs: Path, whole: Path) -> None:
    """In the background of a shell, where Ctrl-C is ignored, with a model that ignores SIGTERM itself."""
    (runs / "deaf.py").write_text(
        "import signal\nfrom gradflow.demo import AddingModel as Net\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    )
    place, pattern = runs / "told", str(runs / "runs" / "**" / "*.pt")
    options = [
        "-m",
        "gradflow",
        "sweep",
        pattern,
        "--input",
        str(runs / "batch.pt"),
        "-q",
        "--jobs",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(runs)])}
    deaf = [*options, "--model", "deaf:Net('RNN', 12)", "-o", str(place)]
    with subprocess.Popen(
        [sys.executable, *deaf], env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509
        start_new_session=True,
    ) as process:  # fmt: skip
        while not list((place / "results").glob("*.jsonl")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        process.terminate()
        said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert said == f"interrupted; what was measured is in {place}: go on with --resume\n"
    while True:  # until nobody is left of them
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    before = {path.name: path.stat().st_mtime_ns for path in (place / "results").glob("*.jsonl")}
    assert 0 < len(before) < 64
    again = [*options, "--resume", "--model", "deaf:Net('RNN', 12)", "-o", str(place)]
    subprocess.run([sys.executable, *again], env=environment, check=True, capture_output=True)
    after = {path.name: path.stat().st_mtime_ns for path in (place / "results").glob("*.jsonl")}
    assert len(after) == 64 and before.items() <= after.items()
    found, wanted = (gradflow.load(one).data for one in (place, whole))
    assert (found["rate"].values == wanted["rate"].values).all()


# ------------------------------------------------------------------------------ what can go wrong


def test_a_broken_checkpoint_is_a_row_with_its_sentence(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "runs/seed=0", tmp_path / "runs/seed=0")
    broken = tmp_path / "runs/seed=0/15.pt"
    broken.write_bytes(broken.read_bytes()[:300])
    torch.save({"input": torch.zeros(3)}, tmp_path / "runs/seed=0/17.pt")
    options = [str(tmp_path / "runs"), "--model", made.SPEC, "--input", str(runs / "batch.pt"),
               "-q", "--jobs", "1", "-o", str(tmp_path / "a")]  # fmt: skip
    assert run(*options) == 0
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "2 of 9 checkpoints failed"
    assert "15.pt is a damaged zip archive" in said
    assert run(*options, "--resume", "--fail-on", "exploding") == 1
    history = gradflow.load(tmp_path / "a")
    assert isinstance(history, History)
    data = history.data
    assert data["failed"].values[3].startswith(str(broken)) and not data["failed"].values[2]
    assert history.steps.tolist() == [0, 5, 10, 15, 17, 20, 25, 30, 35]
    assert np.isnan(data["rate"].values[3, 0]) and np.isfinite(data["rate"].values[5, 0])
    assert [note.about for note in history.notes].count("failed") == 2
    assert data["step_from"].values[3] == "digits of the name"


def test_conditions_are_of_the_last_checkpoint_of_each_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(runs / "runs/seed=0"), "--model", made.SPEC, "--input", str(runs / "batch.pt"),
               "-q", "--jobs", "1", "-o", str(tmp_path / "a")]  # fmt: skip
    assert run(*options, "--fail-on", "vanishing,horizon<2") == 1
    assert "--fail-on: rnn.l0: vanishing" in capsys.readouterr().err
    assert run(*options, "--resume", "--fail-on", "exploding,nan") == 0


def test_no_file_matches(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no file matches '.*\.pt'; check the path; a pattern"):
        checkpoints(str(tmp_path / "*.pt"))
    with pytest.raises(FileError, match="no file matches"):
        checkpoints([str(tmp_path / "a.pt")])
    with pytest.raises(InputError, match="what is swept must be paths of checkpoints, or models"):
        checkpoints(3)
    with pytest.raises(InputError, match="got an empty list"):
        checkpoints([])


def test_files_of_different_architectures_are_grouped_and_said(
    tmp_path: Path, serial: Executor
) -> None:
    for number, layer in enumerate([torch.nn.LSTM(3, 5), torch.nn.GRU(3, 4), torch.nn.LSTM(3, 5)]):
        torch.save(layer.state_dict(), tmp_path / f"step-{number}.pt")
    history = gradflow.sweep(tmp_path, executor=serial)
    assert {name: run.steps.tolist() for name, run in history.runs.items()} == {
        "(GRU 4)": [1],
        "(LSTM 5)": [0, 2],
    }
    said = " ".join(note.text for note in history.notes)
    assert "the checkpoints have 2 architectures: LSTM 5; GRU 4" in said
    assert "the folder holds several of them: each is shown as a run of its own" in said


def test_a_checkpoint_that_changes_while_it_is_read_is_read_again(
    runs: Path, tmp_path: Path, serial: Executor
) -> None:
    shutil.copytree(runs / "runs/seed=0", tmp_path / "runs")
    path, final = tmp_path / "runs/0.pt", (runs / "runs/seed=1/35.pt").read_bytes()

    class Changing(Executor):
        times = 0
        most = 1

        def submit(self, function: Any, /, *arguments: Any, **names: Any) -> Future[Any]:
            if function is measure_checkpoint and arguments[0].path == path:
                if self.times < self.most:
                    path.write_bytes(final)
                    os.utime(path, ns=(0, 10**9 * (10 * self.most + self.times)))
                self.times += 1
            return serial.submit(function, *arguments, **names)

    options = {"model": made.SPEC, "batch": runs / "batch.pt"}
    history = gradflow.sweep(tmp_path / "runs", executor=Changing(), **options)
    other = gradflow.sweep(runs / "runs/seed=1/35.pt", executor=serial, **options)
    at = history.data["checkpoint"].values.tolist().index(str(path))
    assert history.steps[at] == 35  # as it says now
    assert history.data["rate"].values[at] == other.data["rate"].values[0]
    Changing.most = 100
    history = gradflow.sweep(tmp_path / "runs", executor=Changing(), **options)
    failed = [words for words in history.data["failed"].values if words]
    assert failed == [f"{path} changed while it was read; sweep again when its training has ended"]


def test_two_sweeps_into_one_folder_at_once(tmp_path: Path) -> None:
    first = SweepFolder(tmp_path / "a", (1, 1))
    with pytest.raises(
        FileError, match=r"another sweep is writing into .*; wait until it has ended"
    ):
        SweepFolder(tmp_path / "a", (1, 1))
    with pytest.raises(FileError, match="another sweep is writing"):
        SweepFolder(tmp_path / "a", (1, 2))
    first.close()
    one, two = SweepFolder(tmp_path / "b", (1, 2)), SweepFolder(tmp_path / "b", (2, 2))
    with pytest.raises(FileError, match="another sweep is writing"):
        SweepFolder(tmp_path / "b", (2, 2))
    with pytest.raises(FileError, match="another sweep is writing"):
        SweepFolder(tmp_path / "b", (1, 1), resume=True)
    one.close()
    two.close()


def test_a_full_disk_ends_the_sweep_and_is_no_failure_of_a_checkpoint(
    runs: Path, tmp_path: Path, serial: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, written = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        if target.parent.name == "results":
            written.append(target)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(
        FileError,
        match=r"cannot write the sweep to .*: No space left on device; what .*: make room",
    ):
        swept(runs, "seed=0/*.pt", serial, folder=tmp_path / "a")
    assert len(list((tmp_path / "a/results").glob("*.jsonl"))) == 3 and len(written) == 4
    monkeypatch.undo()
    one = next((tmp_path / "a/results").glob("*.jsonl"))
    one.unlink()
    one.mkdir()
    with pytest.raises(FileError, match=rf"see what stands at results/{one.name}, and go on"):
        swept(runs, "seed=0/*.pt", serial, folder=tmp_path / "a", resume=True)
    one.rmdir()
    history = swept(runs, "seed=0/*.pt", serial, folder=tmp_path / "a", resume=True)
    assert len(history) == 8 and not any(history.data["failed"].values)


def test_folders_are_left_alone(runs: Path, tmp_path: Path, serial: Executor) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileError, match=r"not the folder of a sweep .it holds thesis.tex."):
        swept(runs, "seed=0/0.pt", serial, folder=tmp_path / "mine")
    swept(runs, "seed=0/0.pt", serial, folder=tmp_path / "a")
    with pytest.raises(FileError, match="holds a sweep already; add --resume"):
        swept(runs, "seed=0/0.pt", serial, folder=tmp_path / "a")
    with pytest.raises(FileError, match="is not the folder of a sweep; give the one"):
        gradflow.sweeping.gather(tmp_path / "mine")


def test_shards_that_are_not_there_are_said(runs: Path, tmp_path: Path) -> None:
    options = [str(runs / "runs/seed=0"), "--model", made.SPEC, "--input", str(runs / "batch.pt"),
               "-q", "--jobs", "1", "-o", str(tmp_path / "a"), "--shard", "2/3"]  # fmt: skip
    assert run(*options) == 0
    assert run(*options) == 2  # it is there already
    history = gradflow.sweeping.gather(tmp_path / "a")
    assert len(history) == 3 and not history.ended
    assert "of 3 shards 1, 3 have not begun" in " ".join(note.text for note in history.notes)
    assert run(*options, "--resume", "--seq-len", "3") == 2


HOSTILE: dict[str, Any] = {
    "no settings": {"settings": None}, "settings are a list": {"settings": []}, "no preset": {"preset": None},
    "shard of three": {"shard": [1, 2, 3]}, "shard of words": {"shard": ["1", "2"]},
    "shard 0": {"shard": [0, 2]},
    "no entries": {"entries": []}, "entries are words": {"entries": ["a"]},
    "an entry without a name": {"entries": [{}]},
    "a key elsewhere": {"entries": [{"name": "a", "run": "", "key": "../../../etc/passwd"}]},
    "a step of a word": {"entries": [{"name": "a", "run": "", "step": "9"}]},
    "nested": {"batches": [[[[[["a"]]]]]]},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [*HOSTILE, "a name without a number", "no object", "cut off", "deep"]
)
def test_shards_that_no_sweep_wrote_are_one_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = dict.fromkeys(("kind", "preset", "model", "gradflow", "torch", "settings"), "x")
    entry = {"name": "a.pt", "run": "", "key": "0" * 32}
    content = asked | {"batches": [], "seed": 0, "shard": [1, 1], "entries": [entry]}
    (tmp_path / "shards").mkdir()
    (tmp_path / "results").mkdir()
    path = tmp_path / "shards" / ("x-of-1.json" if "name" in kind else "1-of-1.json")
    text = json.dumps(content | HOSTILE.get(kind, {}))
    text = {"no object": "3", "cut off": text[:40], "deep": "[" * 100_000}.get(kind, text)
    path.write_text(text)
    assert run("--gather", str(tmp_path)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("Error: ") and " is not the list of a shard, or damaged; sweep" in said
    path.unlink()
    (tmp_path / "shards/1-of-1.json").write_text(json.dumps(content))
    assert run("--gather", str(tmp_path)) == 2
    assert "has a result yet; wait until one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "sweep needs checkpoints, got none"),
        (["x.pt", "--shard", "3/2"], "--shard must be i/n with 1 <= i <= n"),
        (["x.pt", "--shard", "1/2"], "--shard needs one folder"),
        (["x.pt", "--gather", "a"], "joins what is in DIR, got 'x.pt' as well"),
        (["x.pt", "--loss", "mse"], "--loss needs a batch"),
        (["x.pt", "--resume", "--force"], "give one of them"),
        (["x.pt", "--input", "none/*.pt"], "no batch matches 'none/\\*.pt'"),
        (["x.pt", "--dask", "tcp://h:1", "--jobs", "2"], "--jobs is for this machine"),
    ],
)
def test_options_that_cannot_be_meant(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(("way", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_ctrl_c_says_what_is_kept(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    way: BaseException, code: int,
) -> None:  # fmt: skip
    def interrupted(*_: object) -> None:
        raise way

    monkeypatch.setattr("gradflow.sweeping.run_sweep", interrupted)
    assert run(str(runs / "runs/seed=0"), "-o", str(tmp_path / "a")) == code
    said = f"interrupted; what was measured is in {tmp_path / 'a'}: go on with --resume\n"
    assert capsys.readouterr().err == said


def test_a_line_every_minute_in_a_pipe(
    runs: Path,
    serial: Executor,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gradflow.progress.PROGRESS_LINES", 0.0)
    request = sweep_request(
        [str(runs / "runs/seed=0")], None, input=str(runs / "batch.pt"), spec=made.SPEC
    )
    with Progress(lines=True) as progress:
        run_sweep(replace(request, executor=serial), progress)
    lines = capsys.readouterr().err.splitlines()
    told = re.compile(r"0:00:\d\d (\d) of 8 checkpoints(, \S+ a minute, about \d+ (s|min) left)?")
    assert [int(found[1]) for line in lines if (found := told.fullmatch(line))][-1] == 8
    assert any("a minute, about" in line for line in lines)


# ---------------------------------------------------------------------------------------- engines


def test_workers_with_other_versions_are_said_before_anything_runs(runs: Path) -> None:
    class Old(Executor):
        def submit(self, function: Any, /, *arguments: Any, **names: Any) -> Future[Any]:
            assert function is not measure_checkpoint
            future: Future[Any] = Future()
            future.set_result(("0.0.1", VERSIONS[1]))
            return future

    with pytest.raises(InputError, match=r"the workers must have gradflow .* got gradflow 0.0.1"):
        swept(runs, "seed=0/*.pt", Old())
    task = CheckpointTask("a", None, None, None, None, "", ("9", "9"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the workers must have gradflow 9"):
        measure_checkpoint(task)
    with pytest.raises(
        InputError, match=r"executor must be a concurrent.futures.Executor, got int"
    ):
        swept(runs, "seed=0/*.pt", 3)  # type: ignore[arg-type]


class Killing(Engine):
    """An engine whose process is killed by some of its tasks, each time or once."""

    width = 3

    def __init__(self, always: set[str], once: set[str]) -> None:
        self.always, self.once, self.new, self.broken = always, once, 0, False
        self.ran: list[str] = []

    def submit(self, task: CheckpointTask) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self.broken |= task.name in self.always | self.once
        self.once.discard(task.name)
        if self.broken:
            future.set_exception(BrokenExecutor("killed"))
        else:
            self.ran.append(task.name)
            future.set_result(Outcome(text=task.name))
        return future

    def renewed(self) -> bool:
        self.new, self.broken = self.new + 1, False
        return True


def test_a_process_that_is_killed_costs_one_row_and_only_where_it_is_to_blame() -> None:
    tasks = [CheckpointTask(str(n), None, None, None, None, "") for n in range(20)]  # type: ignore[arg-type]
    engine = Killing(always={"4", "17"}, once={"9"})
    outcomes: dict[str, Outcome] = {}

    def done(task: CheckpointTask, outcome: Outcome, lasting: bool) -> None:
        assert task.name not in outcomes and lasting == (not outcome.failed)
        outcomes[task.name] = outcome

    Running(engine, done, lambda: None).run(tasks)
    assert outcomes.keys() == {str(n) for n in range(20)}
    failed = {name for name, outcome in outcomes.items() if outcome.failed}
    assert failed == {"4", "17"} and engine.new >= 4
    assert "most likely for want of memory" in outcomes["4"].failed


@pytest.mark.slow
def test_a_script_without_its_guard_gets_a_sentence(runs: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import gradflow\ngradflow.sweep({str(runs / 'runs/seed=0')!r}, model={made.SPEC!r}, "
        f"batch={str(runs / 'batch.pt')!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and "if __name__ == '__main__':" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------- models and batches


def test_models_are_swept_as_they_are(serial: Executor) -> None:
    torch.manual_seed(0)
    models = {f"width={n}/seed={s}/step-7": torch.nn.GRU(3, n) for n in (4, 8) for s in (0, 1)}
    weights = {
        name: torch.nn.utils.parameters_to_vector(m.parameters()) for name, m in models.items()
    }
    history = gradflow.sweep(models, batch=torch.randn(20, 4, 3))
    assert list(history.runs) == [
        "width=4/seed=0",
        "width=4/seed=1",
        "width=8/seed=0",
        "width=8/seed=1",
    ]
    assert set(history.steps) == {7}
    for name, model in models.items():
        assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), weights[name])
        assert all(parameter.grad is None for parameter in model.parameters())
    same = gradflow.sweep([models["width=4/seed=1/step-7"]], batch=torch.randn(20, 4, 3))
    assert same.runs.keys() == {""}


def test_from_weights_alone_a_verdict_stands_where_all_probes_agree(
    tmp_path: Path, serial: Executor
) -> None:
    torch.manual_seed(0)
    rnn = torch.nn.RNN(3, 6)
    torch.save(rnn.state_dict(), tmp_path / "step-0.pt")
    with torch.no_grad():  # tanh at rest is a rotation; under noise it shrinks
        rnn.weight_hh_l0.copy_(torch.linalg.qr(torch.randn(6, 6)).Q)
        rnn.weight_ih_l0.mul_(8)
        for bias in (rnn.bias_hh_l0, rnn.bias_ih_l0):
            bias.zero_()
    torch.save(rnn.state_dict(), tmp_path / "step-1.pt")
    history = gradflow.sweep(tmp_path, executor=serial)
    assert history.data["verdict"].values[:, 0].tolist() == ["vanishing", "inconclusive"]
    assert any("l0 depends on the input: stable under inputs 0" in n.text for n in history.notes)


def test_batches_are_the_outer_unit_of_the_interval(
    runs: Path, tmp_path: Path, serial: Executor
) -> None:
    """Against the t-interval over the batches' own means, one sweep for each."""
    (tmp_path / "batches").mkdir()
    paths = [made.write_batch(tmp_path / f"batches/{n}.pt", seed=n) for n in range(4)]
    pattern = "seed=2/20.pt"
    alone = [swept(runs, pattern, serial, batch=path).data.isel(step=0, layer=0) for path in paths]
    together = swept(runs, pattern, serial, batch=tmp_path / "batches")
    row = together.data.isel(step=0, layer=0)
    gains = np.array([float(one["gain"]) for one in alone])
    half = 3.182446 * gains.std(ddof=1) / 2  # t of three degrees of freedom
    assert row["gain"] == pytest.approx(gains.mean(), rel=1e-12)
    assert row["gain_low"] == pytest.approx(gains.mean() - half, rel=1e-6)
    assert row["rate"] == pytest.approx(np.mean([float(one["rate"]) for one in alone]), rel=1e-12)
    assert row["loss"] == pytest.approx(np.mean([float(one["loss"]) for one in alone]), rel=1e-12)
    assert (row["batches"], row["sequences"]) == (4, 4 * made.SEQUENCES)
    profiles = np.array([one["profile"].values for one in alone])
    rms = np.log10((10 ** (2 * profiles)).mean(0)) / 2
    assert np.allclose(row["profile"], rms, atol=1e-6, equal_nan=True)
    assert any("a batch is the unit" in note.text for note in together.notes)
    # a batch of another length: gains are over the steps that all have
    made.write_batch(tmp_path / "batches/short.pt", seed=9, steps=12)
    row = swept(runs, pattern, serial, batch=tmp_path / "batches/*.pt").data.isel(step=0, layer=0)
    assert (row["gain_steps"], row["batches"], row["steps"]) == (11, 5, made.LENGTH)


def test_analyze_takes_a_folder_of_batches_as_a_sweep_does(
    runs: Path, tmp_path: Path, serial: Executor, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "batches").mkdir()
    paths = [made.write_batch(tmp_path / f"batches/{n}.pt", seed=n) for n in range(3)]
    model = str(runs / "runs/seed=2/20.pt")

    def analyzed(batches: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            cli.main(
                [
                    "analyze",
                    model,
                    "--model",
                    made.SPEC,
                    "--input",
                    batches,
                    "--json",
                    "--no-report",
                ]
            )
        assert not stop.value.code
        return dict(json.loads(capsys.readouterr().out))

    found = analyzed(str(tmp_path / "batches"))
    row = swept(runs, "seed=2/20.pt", serial, batch=tmp_path / "batches").data.isel(step=0, layer=0)
    layer = found["layers"][0]
    for end, name in (("value", "gain"), ("low", "gain_low"), ("high", "gain_high")):
        assert layer["gain"][end] == pytest.approx(float(row[name]), rel=1e-6)
    assert layer["verdict"] == row["verdict"].item()
    full = swept(runs, "seed=2/20.pt", serial, batch=tmp_path / "batches", preset="full").data
    for end, name in (("value", "rate"), ("low", "rate_low"), ("high", "rate_high")):
        assert layer["rate"][end] == pytest.approx(float(full[name][0, 0]), rel=1e-9)
    assert float(full["rate_settling"][0, 0]) > 0  # what has not settled is in both
    alone = [analyzed(str(path))["layers"][0] for path in paths]
    rates = [one["rate"]["value"] for one in alone]
    assert layer["rate"]["value"] == pytest.approx(np.mean(rates), rel=1e-9)
    half = 4.302653 * np.std(rates, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    half = np.hypot(half, float(full["rate_settling"][0, 0]))
    assert layer["rate"]["value"] - layer["rate"]["low"] == pytest.approx(half, rel=1e-6)
    middle = int(np.argsort([one["gain"]["value"] for one in alone])[1])
    assert found["warnings"][0].startswith(
        "gain, rate and verdict are means over 3 batches with 95 %"
    )
    assert f"all else is of {middle}.pt" in found["warnings"][0]
    assert "means over 2 batches" in analyzed(str(tmp_path / "batches/[12].pt"))["warnings"][0]
    # of other lengths: over the steps that all have
    made.write_batch(tmp_path / "batches/short.pt", seed=9, steps=12)
    assert analyzed(str(tmp_path / "batches"))["layers"][0]["gain"]["steps"] == 11


def test_pooling_of_what_is_not_finite() -> None:
    parts = [
        {"a": LayerProbe({"gain": -np.inf, "rate": -np.inf, "horizon": 1.0, "gain_steps": 9.0})},
        {"a": LayerProbe({"gain": -np.inf, "rate": -np.inf, "horizon": np.nan, "gain_steps": 9.0})},
        {"a": LayerProbe({"gain": -1.0, "rate": -0.1, "horizon": np.inf, "gain_steps": 9.0})},
    ]
    layers, _ = pooled_batches(parts)
    assert layers["a"].verdict == "dead" and np.isnan(layers["a"].values["horizon"])
    assert pooled_batches(parts[:1])[0]["a"].values["horizon"] == 1


@pytest.mark.parametrize(
    ("name", "step"),
    [("a/epoch=3-step=400.ckpt", 400), ("a/ckpt_12.pt", 12), ("a/seed3.pt", None),
     ("a/seed-3_step9.pt", 9), ("checkpoint-70/model.safetensors", 70), ("seed-7/last.pt", None)],
)  # fmt: skip
def test_steps_in_names(name: str, step: int | None) -> None:
    found = step_in_name(Path(name))
    assert (None if found is None else found.number) == step


def test_folders_of_transformers_hold_one_model_each(tmp_path: Path, serial: Executor) -> None:
    """What its trainer writes beside a model is no checkpoint, in a folder and in a pattern."""
    from safetensors.torch import save_file

    for seed in (0, 1):
        for step in (500, 1000):
            place = tmp_path / f"out/seed={seed}/checkpoint-{step}"
            place.mkdir(parents=True)
            save_file(torch.nn.GRU(3, 4).state_dict(), place / "model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
                torch.save({"state": {}}, place / name)
    history = gradflow.sweep(tmp_path / "out", executor=serial)
    assert {name: run.steps.tolist() for name, run in history.runs.items()} == {
        "seed=0": [500, 1000],
        "seed=1": [500, 1000],
    }
    assert not any(history.data["failed"].values)
    assert len(checkpoints(str(tmp_path / "out/seed=0/checkpoint-*"))) == 2
    assert len(checkpoints(str(tmp_path / "out/**/*.safetensors"))) == 4
    with pytest.raises(FileError, match=r"matches no model, only what trainers write beside one"):
        checkpoints(str(tmp_path / "out/**/*.pt"))
    optimizer = str(tmp_path / "out/seed=0/checkpoint-500/optimizer.pt")
    assert [one.name for one in checkpoints(optimizer)] == [optimizer]  # asked for by name


def test_a_checkpoint_without_a_step_stands_behind_those_with_one(serial: Executor) -> None:
    """It takes the place of none of them."""
    names = ["a/best", "a/epoch1", "a/epoch2", "b/first", "b/second"]
    history = gradflow.sweep(
        {name: torch.nn.GRU(3, 4) for name in names}, batch=torch.randn(9, 2, 3)
    )
    assert {name: run.steps.tolist() for name, run in history.runs.items()} == {
        "a": [1, 2, 3],
        "b": [1, 2],
    }
    assert history.data["checkpoint"].values[2] == "a/best"
    assert any("a: these steps are of several kinds" in note.text for note in history.notes)


def test_two_layers_of_other_spans_keep_their_own(serial: Executor) -> None:
    """One batch is measured over the steps that `analyze` takes, though layers differ in length."""

    class Pyramid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = torch.nn.GRU(2, 4), torch.nn.GRU(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.high(self.low(x)[0][::4])[0]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Pyramid(), torch.randn(40, 3, 2)
    run, history = gradflow.diagnose(model, x), gradflow.sweep(model, batch=x)
    for layer in ("low.l0", "high.l0"):
        assert history.data["gain_steps"].sel(layer=layer).item() == run[layer].gain.steps
    assert run["low.l0"].gain.steps > run["high.l0"].gain.steps


def test_runs_are_what_differs_of_the_folders() -> None:
    models = dict.fromkeys(
        [
            "logs/a/seed=0/checkpoints/1.pt",
            "logs/a/seed=1/checkpoints/1.pt",
            "logs/b/checkpoints/1.pt",
        ],
        torch.nn.GRU(1, 1),
    )
    assert [one.run for one in checkpoints(models)] == ["a/seed=0", "a/seed=1", "b"]


def test_a_thousand_checkpoints_of_twelve_layers_open_fast(tmp_path: Path) -> None:
    """The joined file of as many rows, made up, opens within five seconds."""
    from histories import probes

    from gradflow.history import Row, Source, join_rows, row_text

    one = probes(1)[0]
    layers = {f"rnn.l{n}": one.layers["rnn.l0"] for n in range(12)}
    text = row_text(type(one)(0, one.values, layers), dict.fromkeys(layers, "LSTM"), title="Net")
    (tmp_path / "row.jsonl").write_text(text)
    rows = [
        Row(
            n // 8, Source(f"{n}.pt", f"seed={n % 8}", "digits of the name"), tmp_path / "row.jsonl"
        )
        for n in range(1000)
    ]
    join_rows(tmp_path, rows, [], ended=True, title="Net")
    began = time.process_time()
    history = gradflow.load(tmp_path)
    assert isinstance(history, History)
    assert history.data["rate"].shape == (1000, 12) and len(history.runs) == 8
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["9-of-9.json", ".lock"])
def test_a_pipe_in_the_folder_of_a_sweep_is_not_waited_for(whole: Path, name: str) -> None:
    place = whole / "shards" / name
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with contextlib.suppress(FileError):
        gradflow.sweeping.gather(whole)
    place.unlink()


def test_the_list_of_a_shard_is_plain_json(whole: Path) -> None:
    listed = json.loads((whole / "shards/1-of-1.json").read_text())
    assert len(listed["entries"]) == 64 and listed["shard"] == [1, 1]
    assert {entry["key"] for entry in listed["entries"]} == {
        path.stem for path in (whole / "results").glob("*.jsonl")
    }
    (whole / "shards/1-of-1.json").write_text("{")
    with pytest.raises(GradflowError, match="or damaged; sweep that shard again"):
        gradflow.sweeping.gather(whole)
    (whole / "shards/1-of-1.json").write_text(json.dumps(listed))
