"""A process that is killed while it writes loses at most the probe in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gradflow
from gradflow.history import History

# a process that has imported everything; each line that it reads begins a writer in a copy of it
WRITES = """
import os, sys
sys.path.insert(0, {tests!r})
import histories
from pathlib import Path
from gradflow.history import Writer
from dataclasses import replace

probes = histories.probes(40)
for _ in sys.stdin:
    copy = os.fork()
    if not copy:
        print(os.getpid(), flush=True)
        writer = Writer(Path(sys.argv[1]), resume=True, title="Net", **histories.HEADER)
        begun = writer.last_step
        for number in range(1, 100_000):
            probe = replace(probes[number % 40], step=begun + number, notes=())
            writer.probe(probe, histories.CELLS)
            print(probe.step, flush=True)
    os.waitpid(copy, 0)
    print("ended", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be copied here")
def test_it_is_killed_at_twenty_moments_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "writes.py"
    script.write_text(WRITES.format(tests=str(Path(__file__).parent)))
    folder = tmp_path / "run"
    random = np.random.default_rng(0)
    told = 0
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(20):
            print(file=process.stdin, flush=True)
            writer, first = int(process.stdout.readline()), process.stdout.readline()
            assert int(first) == told + 1
            time.sleep(float(random.uniform(0, 0.02)))
            os.kill(writer, signal.SIGKILL)
            lines = [first, *iter(process.stdout.readline, "ended\n")]
            said = max(int(line) for line in lines)
            history = gradflow.load(folder)
            assert isinstance(history, History)
            steps = history.steps
            # every probe that the writer was told is written is there, and at most one more
            assert steps.tolist() == list(range(1, int(steps[-1]) + 1))
            assert steps[-1] in (said, said + 1)
            assert np.isfinite(history.data["rate"]).all()
            told = int(steps[-1])
        process.stdin.close()
    assert len(history) > 40 and not history.ended
