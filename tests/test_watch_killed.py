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

WRITES = """
import sys
sys.path.insert(0, {tests!r})
import histories
from pathlib import Path
from gradflow.history import Writer
from dataclasses import replace

writer = Writer(Path(sys.argv[1]), resume=True, title="Net", **histories.HEADER)
probes = histories.probes(40)
begun = writer.last_step
for number in range(1, 100_000):
    probe = replace(probes[number % 40], step=begun + number, notes=())
    writer.probe(probe, histories.CELLS)
    print(probe.step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_it_is_killed_at_twenty_moments_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "writes.py"
    script.write_text(WRITES.format(tests=str(Path(__file__).parent)))
    folder = tmp_path / "run"
    random = np.random.default_rng(0)
    told = 0
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        ) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert int(first) == told + 1
            time.sleep(float(random.uniform(0, 0.02)))
            process.send_signal(signal.SIGKILL)
            lines = [first, *process.stdout.read().splitlines()]
        said = max(int(line) for line in lines if line.strip().isdigit())
        history = gradflow.load(folder)
        assert isinstance(history, History)
        steps = history.steps
        # every probe that the writer was told is written is there, and at most one more
        assert steps.tolist() == list(range(1, int(steps[-1]) + 1))
        assert steps[-1] in (said, said + 1)
        assert np.isfinite(history.data["rate"]).all()
        told = int(steps[-1])
    assert len(history) > 40 and not history.ended
