"""The command: run the parts, write JSON and page, put the table into the README."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    gain_maps,
    growth,
    linear,
    memory,
    page,
    processes,
    recorded_steps,
    versions,
    watched_steps,
)
from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "reports" / "benchmarks"
PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "recording": recorded_steps.measure,
    "maps": gain_maps.measure,
    "memory": memory.measure,
    "growth": growth.measure,
    "linear": linear.measure,
    "processes": processes.measure,
    "sweeps": processes.sweeps,
    "watching": watched_steps.measure,
}
MARKS = "<!-- benchmarks: python tests/benchmark.py --readme -->", "<!-- end of benchmarks -->"


def main(arguments: list[str]) -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description="Measure gradflow's speed and memory as ratios.")
    parser.add_argument("--only", choices=PARTS, action="append", help="run these parts only")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--readme", action="store_true", help="put the last run into README.md")
    parser.add_argument(
        "--against", metavar="REVISION", help="only print ratios to an earlier version"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        name, hidden, steps = asked.child
        memory.child(name, int(hidden), int(steps))
    elif asked.against:
        for row in versions.measure(quick=asked.quick, against=asked.against):
            print(f"{row.what}: {row.value:.3f} × ({row.note})", flush=True)
    elif asked.readme:
        into_readme(json.loads((asked.output / "benchmarks.json").read_text()))
    else:
        run(asked.only or list(PARTS), asked.output, quick=asked.quick)
    return 0


def run(parts: list[str], folder: Path, *, quick: bool) -> None:
    """Run parts, and write everything again after each; parts not run keep their last numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "benchmarks.json"
    known = json.loads(file.read_text()) if file.exists() and set(parts) != set(PARTS) else {}
    found: dict[str, Any] = {"machine": machine(), "parts": known.get("parts", {})}
    for part in parts:
        rows = []
        for row in PARTS[part](quick=quick):
            rows.append(row.as_dict())
            goal = {None: "", True: "  goal met", False: "  goal missed"}[row.met]
            print(f"{part}: {row.what}: {row.value:.3g} {row.unit}{goal}  {row.note}", flush=True)
        found["parts"][part] = rows
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    page.write(found, folder)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", listing.read_text()) if listing.exists() else []
    return names[0] if names else platform.machine()


def into_readme(found: dict[str, Any]) -> None:
    """Replace what stands between the marks in README.md by the goals and what was reached."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    first, last = MARKS
    before, _, rest = text.partition(first)
    _, _, after = rest.partition(last)
    readme.write_text(f"{before}{first}\n{page.markdown(found)}\n{last}{after}")
