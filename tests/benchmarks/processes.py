"""Whole processes: starting Python, `gradflow --help`, `import gradflow`, a whole analysis; sweeps."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gradflow
from benchmarks.rows import Row, ratio_row
from benchmarks.timing import in_pairs, seconds
from gradflow.sweeping import run_sweep, sweep_request

STARTS = (
    ("gradflow --help", ("-m", "gradflow", "--help"), 0.25),
    ("import gradflow", ("-c", "import gradflow"), 0.25),
    ("import torch, for comparison", ("-c", "import torch"), None),
)


def run(*arguments: str, folder: str | None = None) -> float:
    """Wall-clock seconds of one process."""
    command = [sys.executable, *arguments]
    return seconds(lambda: subprocess.run(command, capture_output=True, check=True, cwd=folder))


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Seconds beyond those of Python itself, pair by pair."""
    rounds = 1 if quick else 9
    for what, arguments, most in STARTS[:2] if quick else STARTS:
        run(*arguments)
        more = [run(*arguments) - run("-c", "pass") for _ in range(rounds)]
        low, median, high = np.quantile(more, [0.25, 0.5, 0.75])
        yield Row(
            "processes", f"{what}, beyond starting Python", float(median), "s",
            low=float(low), high=float(high), most=None if quick else most,
        )  # fmt: skip
    if not quick:
        yield whole_analysis()
        yield page_over_torch()


def whole_analysis() -> Row:
    """The command on a state_dict: three probes, the report with all its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        model = nn.LSTM(10, 64, 2, batch_first=True)
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        times = [run("-m", "gradflow", "analyze", "model.pt", folder=folder) for _ in range(3)]
        case = {"cell": "LSTM", "H": 64, "layers": 2, "T": 100}
        what = "gradflow analyze model.pt, a whole process"
        return Row("whole runs", what, float(np.median(times)), "s", case)


def page_over_torch(rounds: int = 5) -> Row:
    """Processor seconds of the command on two small layers over those of importing torch, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(nn.LSTM(10, 20, 2).state_dict(), Path(folder) / "model.pt")
        command = ("-m", "gradflow", "analyze", "model.pt")
        found = [
            (spent(*command, folder=folder), spent("-c", "import torch", folder=folder))
            for _ in range(rounds + 1)
        ][1:]  # the first one compiles what is imported
    pages, imports = np.array(found).T
    low, median, high = np.quantile(pages / imports, [0.25, 0.5, 0.75])
    return Row(
        "whole runs", "a page from weights alone over importing torch, processor time", float(median), "×",
        {"cell": "LSTM", "H": 20, "layers": 2, "T": 100}, float(low), float(high), most=3.0,
        note=f"{np.median(pages):.3g} s against {np.median(imports):.3g} s, {rounds} pairs",
    )  # fmt: skip


def spent(*arguments: str, folder: str) -> float:
    """Processor seconds of one process; what it imports stays compiled, as where it is installed."""
    before = os.times()
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
    environment = {**os.environ, **compiled}
    command = [sys.executable, *arguments]
    subprocess.run(command, capture_output=True, check=True, cwd=folder, env=environment)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def write_checkpoints(folder: Path, count: int, layers: int) -> dict[str, str]:
    """So many checkpoints of eight runs, all of other weights, and a batch; how a sweep asks for them."""
    for number in range(count):
        torch.manual_seed(number)
        place = folder / "runs" / f"seed={number % 8}"
        place.mkdir(parents=True, exist_ok=True)
        state = {"state_dict": nn.LSTM(3, 4, layers).state_dict(), "global_step": number // 8}
        torch.save(state, place / f"{number // 8}.pt")
    torch.save({"input": torch.randn(12, 2, 3)}, folder / "batch.pt")
    return {"spec": f"torch.nn:LSTM(3, 4, {layers})", "input": str(folder / "batch.pt")}


def sweeps(*, quick: bool) -> Iterator[Row]:
    """What a checkpoint of a sweep costs in time and memory, and what a second process brings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, layers = (8, 2) if quick else (1000, 12)
        asked = write_checkpoints(folder, count, layers)
        case = {"checkpoints": count, "layers": layers, "T": 12, "B": 2}
        runs = str(folder / "runs")
        yield from large_sweep(folder, ["--model", asked["spec"], "--input", asked["input"]], case)
        few = str(Path(runs) / ("seed=0" if quick else "seed=[01]")) + "/*.pt"

        def swept(jobs: int) -> None:
            run_sweep(sweep_request([few], None, jobs=jobs, **asked))

        pairs = 1 if quick else 2
        ratio = in_pairs(lambda: swept(1), lambda: swept(2), pairs=pairs, warm_up=False)
        case |= {"checkpoints": count // 8 if quick else count // 4}
        goal = {} if quick else {"least": 1.7}
        yield ratio_row("sweeps", "one process against two, with their starts", ratio, case, **goal)


def large_sweep(folder: Path, options: list[str], case: dict[str, int]) -> Iterator[Row]:
    """A sweep by one process beside the one that hands out: time a row, memory as it goes on, opening."""
    command = [sys.executable, "-m", "gradflow", "sweep", str(folder / "runs"), *options]
    began = time.perf_counter()
    held: list[tuple[int, float, float]] = []  # results, MiB of the parent, MiB of its process
    with subprocess.Popen([*command, "--jobs", "1", "-q", "-o", str(folder / "swept")],
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        while process.poll() is None:
            done = sum(1 for _ in (folder / "swept" / "results").glob("*.jsonl"))
            if 0 < done < case["checkpoints"]:
                both = [
                    resident(process.pid),
                    max(map(resident, children(process.pid)), default=0.0),
                ]
                held.append((done, both[0], both[1]))
            time.sleep(0.5)
    spent = time.perf_counter() - began
    what = "a checkpoint of a sweep by one process, its start and its page included"
    yield Row("sweeps", what, spent / case["checkpoints"], "s", case, note=f"{spent:.0f} s in all")
    for place, who in ((1, "the process that hands out"), (2, "the one that measures")):
        early, late = (
            [one[place] for one in held if low <= one[0] / case["checkpoints"] < high]
            for low, high in ((0.1, 0.3), (0.9, 1.0))
        )
        if early and late:
            note = (
                f"{max(early):.0f} MiB at a tenth to three tenths, {max(late):.0f} MiB at the end"
            )
            ratio = max(late) / max(early)
            yield Row("sweeps", f"memory of {who}, at the end against early on", ratio, "×", case,
                      most=1.1, note=note)  # fmt: skip
    opened = seconds(lambda: gradflow.load(folder / "swept").data)
    yield Row("sweeps", "the history of a sweep opened", opened, "s", case, most=5.0)


def children(process: int) -> list[int]:
    """The processes that a process started."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(one) for one in listed.read_text().split()] if listed.exists() else []


def resident(process: int) -> float:
    """MiB of memory that a process holds now; 0 where the system does not tell, or it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
