"""Two processes that train one model: the first is measured, and both train as without a watch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

import gradflow
from gradflow.history import History

TRAINS = """
import sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
import gradflow

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank, folder = distributed.get_rank(), sys.argv[1]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


for watched in (False, True):
    torch.manual_seed(0)
    net = DistributedDataParallel(Net())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    if watched:
        watch = gradflow.watch(net, folder + "/run", every=2, budget=None)
    torch.manual_seed(rank)
    for _ in range(6):
        net(torch.randn(15, 3, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([p.detach() for p in net.parameters()], f"{folder}/{rank}-{watched}.pt")
watch.close()
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without it")
def test_only_the_first_of_two_processes_is_measured_and_says_so(tmp_path: Path) -> None:
    script = tmp_path / "trains.py"
    script.write_text(TRAINS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(weights) == 4
    for other in weights[1:]:
        assert all(torch.equal(one, two) for one, two in zip(weights[0], other, strict=True))
    history = gradflow.load(tmp_path / "run")
    assert isinstance(history, History)
    assert history.steps.tolist() == [1, 3, 5] and history.layers == ("rnn.l0",)
    assert history["rnn.l0"]["sequences"].values.tolist() == [3, 3, 3]
    assert "of 2 processes that train together only rank 0 is measured" in history.notes[0].text
