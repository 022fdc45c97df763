"""Two processes that train one model: both train as without a watch, and one or all are measured.

The oracle of what is gathered is one process that saw all sequences.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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
distributed.barrier()  # a process that is gone ends the other's connection
distributed.destroy_process_group()
"""


GATHERS = """
import copy, sys, warnings
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
import gradflow

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
distributed.init_process_group("gloo")
rank, folder = distributed.get_rank(), sys.argv[1]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.step, self.head = nn.LSTM(2, 20, 2), nn.Linear(20 + 3, 3), nn.Linear(3, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 3)
        for y in self.rnn(x)[0]:
            h = gradflow.tap(h=torch.tanh(self.step(torch.cat([y, h], 1))))
        return self.head(h)


def made(wrap):
    torch.manual_seed(0)
    net = Net()
    if wrap == "fsdp":
        fully_shard(net.rnn)
        return fully_shard(net)
    return DistributedDataParallel(net) if wrap == "ddp" else net


def batches(wrap, count):
    torch.manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 22, 2)
        yield x if wrap == "one" else x[:, 11 * rank : 11 * rank + 11]


def trained(wrap, where, steps=4, **asked):
    net = made(wrap)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    watch = gradflow.watch(net, f"{folder}/{where}", every=2, budget=None, **asked)
    done = 0
    try:
        for x in batches(wrap, steps):
            net(x).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.001)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    except gradflow.StopTraining:
        pass
    watch.close()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in net.parameters()]
    return done, weights


def recorded(wrap, **asked):
    net = made(wrap)
    with gradflow.record(net, **asked) as recording:
        net(next(batches(wrap, 1))).square().mean().backward()
    return recording


def stops(event):
    raise gradflow.StopTraining("enough")


# what is measured
if rank == 0:
    trained("one", "one")
    trained("one", "one-full", steps=1, preset="full")
for wrap in ("ddp", "fsdp"):
    trained(wrap, wrap, gather=True)
trained("ddp", "ddp-full", steps=1, preset="full", gather=True)

# a training is the same with and without
plain, watched = trained("fsdp", "x", layers="none"), trained("fsdp", "fsdp-first")
assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))

# what one process decides holds for all
done, _ = trained("ddp", "stopped", gather=True, on=["vanishing", stops] if rank == 0 else None)
assert done == 0, done  # both, before the first update
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    done, _ = trained("ddp", "ddp", gather=True)
assert done == 4 and "give another folder" in str(heard[0].message), heard

# recordings
want = recorded("one")
for wrap in ("ddp", "fsdp"):
    found = recorded(wrap, gather=True)
    assert list(found.tracks) == list(want.tracks)
    for track in want.values():
        mine = found[track.name]
        for name, grad in track.grads.items():
            torch.testing.assert_close(mine.grads[name], grad, rtol=1e-10, atol=0)
        assert mine.parity.status == track.parity.status
    judged, expected = gradflow.analyze(found), gradflow.analyze(want)
    for name in expected.layers:
        one, other = judged[name], expected[name]
        assert one.verdict == other.verdict and one.horizon == other.horizon
        assert abs(one.rate.value - other.rate.value) < 1e-10
        assert abs(one.rate.low - other.rate.low) < 1e-10
    assert "of all 2 ranks" in found.notes[0], found.notes
alone = recorded("fsdp")
assert alone["rnn.l0"].batch == 11 and alone["rnn.l0"].parity.status == "passed"


# a loop that nobody marks: found while its weights are whole, and told where they are given back
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(2 + 3, 3), nn.Linear(3, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 3)
        for y in x:
            h = torch.tanh(self.step(torch.cat([y, h], 1)))
        return self.head(h)


def loops(wrap, **asked):
    torch.manual_seed(0)
    net = nn.Sequential(Plain(), nn.Linear(1, 1))
    if wrap:
        fully_shard(net[0], **asked)
        fully_shard(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradflow.GradflowWarning)
        with gradflow.record(net) as recording:
            net(next(batches("ddp", 1))).square().mean().backward()
    assert not net._forward_pre_hooks or wrap
    return recording


want, kept, back = loops(False), loops(True, reshard_after_forward=False), loops(True)
assert list(kept.keys()) == list(want.keys()) == ["0"], (list(kept), list(want))
torch.testing.assert_close(kept["0"].grads, want["0"].grads, rtol=1e-10, atol=0)
one, other = gradflow.analyze(kept)["0"], gradflow.analyze(want)["0"]
assert one.verdict == other.verdict and abs(one.gain.value - other.gain.value) < 1e-10
(unseen,) = back.unseen
assert not len(back) and "reshard_after_forward=False" in unseen.sentence, unseen
assert "h = gradflow.tap(h=h)" in unseen.sentence and "0.step.weight" in unseen.sentence, unseen


# tensor parallelism: the totals are there, what other processes do inside a step is not
class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, h):
        return torch.tanh(self.down(torch.relu(self.up(torch.cat([x, h], 1)))))


torch.manual_seed(0)
cell, x = Shared(), torch.randn(6, 4, 2)
plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
shared = parallelize_module(copy.deepcopy(cell), init_device_mesh("cpu", (2,)), plan)
found = []
for one in (cell, shared):
    with gradflow.record(one) as recording:
        h = x.new_zeros(4, 3)
        for y in x:
            h = one(y, h)
        h.square().sum().backward()
    found.append(recording)
torch.testing.assert_close(found[1]["cell"].grads, found[0]["cell"].grads, rtol=1e-10, atol=0)
assert "shared out among processes (tensor parallelism)" in str(gradflow.analyze(found[1]))
distributed.barrier()  # a process that is gone ends the other's connection
distributed.destroy_process_group()
"""


LEAVES = """
import sys, time, warnings
import torch
from torch import distributed, nn
import gradflow

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank, folder = distributed.get_rank(), sys.argv[1]


def told(leaves, where, refused=None):
    \"\"\"What the process that stays is told, and that it does not wait.\"\"\"
    torch.manual_seed(0)
    net, steps, heard = nn.GRU(2, 4), 0, []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.monotonic()
        asked = dict(every=1, budget=None, gather=True)
        if rank == leaves and refused is not None:
            asked |= refused
        watch = gradflow.watch(net, f"{folder}/{where}", **asked)
        for step in range(5):
            if rank == leaves and step == 2:
                watch.close()
            net(torch.randn(9, 3, 2))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        watch.close()
    took = time.monotonic() - began
    assert took < 60, took  # it would be ten minutes
    distributed.barrier()
    return [str(one.message) for one in caught]


for leaves in (0, 1):
    heard = told(leaves, f"leaves-{leaves}")
    words = f"gradflow.watch ends at step 3: rank {leaves} has ended its watch, which gather=True needs"
    assert (heard == []) if rank == leaves else (len(heard) == 1 and words in heard[0]), heard
for leaves in (0, 1):
    heard = told(leaves, f"refused-{leaves}", {"every": 0})
    words = "every must be a whole number" if rank == leaves else f"rank {leaves} does not watch: every"
    assert len(heard) == 1 and words in heard[0] and "this training is not watched" in heard[0], heard
heard = told(1, "whole", {})  # and what comes after all that is whole again, until it leaves
assert len(heard) == 1 - rank, heard

# a recording that an exception ends in one process
try:
    net = nn.GRU(2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradflow.record(net, gather=True) as recording:
            net(torch.randn(9, 3, 2))[0].square().mean().backward()
            if rank:
                raise KeyError
    (heard,) = caught
    assert "of rank 0 alone: rank 1 left the block of its recording" in str(heard.message), heard
    assert recording["l0"].batch == 3
except KeyError:
    assert rank
distributed.barrier()
distributed.destroy_process_group()
"""


def torchrun(script: str, folder: Path) -> None:
    path = folder / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", path, folder]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def unlike(one: History, other: History) -> list[str]:
    """The numbers of two histories that differ by more than rounding."""
    timed = {"time", "probe_seconds", "step_seconds"}
    found = []
    for name in set(one.data.data_vars) - timed:
        mine, theirs = one.data[name].values, other.data[name].values
        if mine.dtype.kind in "OUT":
            same = (mine == theirs).all()
        else:
            same = np.allclose(mine, theirs, rtol=1e-6, atol=1e-12, equal_nan=True)
        found += [] if same else [str(name)]
    return found


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without it")
def test_only_the_first_of_two_processes_is_measured_and_says_so(tmp_path: Path) -> None:
    torchrun(TRAINS, tmp_path)
    weights = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(weights) == 4
    for other in weights[1:]:
        assert all(torch.equal(one, two) for one, two in zip(weights[0], other, strict=True))
    history = gradflow.load(tmp_path / "run")
    assert isinstance(history, History)
    assert history.title == "Net" and history.steps.tolist() == [1, 3, 5]
    assert history.layers == ("rnn.l0",)
    assert history["rnn.l0"]["sequences"].values.tolist() == [3, 3, 3]
    assert "of 2 processes that train together only rank 0 is measured" in history.notes[0].text


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without it")
def test_what_two_processes_gather_is_what_one_would_have_seen(tmp_path: Path) -> None:
    torchrun(GATHERS, tmp_path)
    one, full = gradflow.load(tmp_path / "one"), gradflow.load(tmp_path / "one-full")
    assert isinstance(one, History) and isinstance(full, History)
    assert one.layers == ("rnn.l0", "rnn.l1", "loop") and one.steps.tolist() == [1, 3]
    assert one["rnn.l0"]["sequences"].values.tolist() == [22, 22]
    assert (one.data["clipped"] == 1).all()
    for wrap in ("ddp", "fsdp"):
        gathered = gradflow.load(tmp_path / wrap)
        assert isinstance(gathered, History)
        assert unlike(one, gathered) == []
        assert "all are measured" in gathered.notes[0].text and gathered.title == "Net"
    gathered = gradflow.load(tmp_path / "ddp-full")
    assert isinstance(gathered, History) and unlike(full, gathered) == []
    first = gradflow.load(tmp_path / "fsdp-first")
    assert isinstance(first, History)
    assert {"sequences", "level", "grad_norm_all"} <= set(unlike(one, first))  # it can fail
    assert first["rnn.l0"]["sequences"].values.tolist() == [11, 11]
    assert first.data["grad_norm_all"].isnull().all()
    assert "gather=True puts the parts together" in first.notes[1].text


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without it")
def test_where_one_process_leaves_the_others_go_on_at_once(tmp_path: Path) -> None:
    torchrun(LEAVES, tmp_path)
    for leaves in (0, 1):
        history = gradflow.load(tmp_path / f"leaves-{leaves}")
        assert isinstance(history, History)
        assert history.steps.tolist() == [1, 2] and history.ended
        said = [note.text for note in history.notes if note.about == "failed"]
        assert len(said) == leaves and all("rank 1 has ended its watch" in one for one in said)
