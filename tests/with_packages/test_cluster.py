"""A sweep on a real dask cluster: the same rows, also where a worker is killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoints as made

import gradflow
from gradflow import cli
from gradflow.errors import InputError
from gradflow.history import HISTORY_FILE

distributed = pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # dask's own, as its workers come and go
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seeds × eight steps, a batch, and the sweep of them in this process."""
    folder = tmp_path_factory.mktemp("adding")
    made.write_runs(folder / "runs")
    made.write_batch(folder / "batch.pt")
    with ThreadPoolExecutor(1) as executor:
        gradflow.sweep(
            folder / "runs", model=made.SPEC, batch=folder / "batch.pt", executor=executor,
            folder=folder / "whole",
        )  # fmt: skip
    return folder


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A cluster of two processes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_a_worker_is_killed_in_the_middle(runs: Path, client: object) -> None:
    """Its tasks run again: nothing is lost, nothing is there twice."""
    place = runs / "cluster"
    pids = list(client.run(os.getpid).values())  # type: ignore[attr-defined]
    killed: list[int] = []

    def kill() -> None:
        while len(list((place / "results").glob("*.jsonl"))) < 10:
            time.sleep(0.005)
        os.kill(pids[0], signal.SIGKILL)
        killed.append(pids[0])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    gradflow.sweep(
        runs / "runs", model=made.SPEC, batch=runs / "batch.pt", folder=place,
        executor=client.get_executor(pure=False),  # type: ignore[attr-defined]
    )  # fmt: skip
    killer.join(10)
    assert killed and killed[0] not in client.run(os.getpid).values()  # type: ignore[attr-defined]
    assert len(list((place / "results").glob("*.jsonl"))) == 64
    assert (place / HISTORY_FILE).read_bytes() == (runs / "whole" / HISTORY_FILE).read_bytes()


def test_a_cluster_by_its_address(runs: Path, client: object) -> None:
    address = client.scheduler.address  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["sweep", str(runs / "runs/seed=1"), "--model", made.SPEC, "--input", str(runs / "batch.pt"),
             "--dask", address, "-o", str(runs / "address"), "-q"]
        )  # fmt: skip
    assert not stop.value.code
    assert len(gradflow.load(runs / "address")) == 8


def test_a_cluster_with_other_versions_is_said(
    runs: Path, client: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradflow.sweeping import engines

    monkeypatch.setattr(engines, "VERSIONS", ("9.9", "9.9"))
    with (
        pytest.raises(
            InputError, match=r"must have gradflow 9.9 and torch 9.9 as this process has, got"
        ),
        engines.dask(client.scheduler.address, 1),  # type: ignore[attr-defined]
    ):
        pass


def test_submitit_by_the_same_door(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs are no futures; here they are processes of this machine."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    files = [runs / "runs/seed=1/0.pt", runs / "runs/seed=1/35.pt"]
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    found = gradflow.sweep(files, model=made.SPEC, batch=runs / "batch.pt", executor=executor)
    whole = gradflow.load(runs / "whole").runs["seed=1"].data.isel(step=[0, -1])
    assert (found.data["rate"].values == whole["rate"].values).all()
    assert (found.data["profile"].values == whole["profile"].values).all()


MPI = """
import sys
from mpi4py.futures import MPIPoolExecutor
import gradflow
if __name__ == "__main__":  # each worker imports this file
    files, model, batch, folder = sys.argv[1:]
    with MPIPoolExecutor() as executor:
        gradflow.sweep(files, model=model, batch=batch, executor=executor, folder=folder)
"""


MPIEXEC = shutil.which("mpiexec") if find_spec("mpi4py") else None

if MPIEXEC is not None:  # where the engine is at hand

    def test_mpi_by_the_same_door(runs: Path, tmp_path: Path) -> None:
        """Two workers and the process that hands out, under a real mpiexec."""
        (tmp_path / "script.py").write_text(MPI)
        one = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
               "OMPI_MCA_rmaps_base_oversubscribe": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
        command = [
            MPIEXEC,
            "-n",
            "3",
            sys.executable,
            "-m",
            "mpi4py.futures",
            str(tmp_path / "script.py"),
        ]
        given = [
            str(runs / "runs/seed=1"),
            made.SPEC,
            str(runs / "batch.pt"),
            str(tmp_path / "swept"),
        ]
        subprocess.run([*command, *given], env=os.environ | one, check=True, timeout=300)
        found, whole = (
            gradflow.load(tmp_path / "swept"),
            gradflow.load(runs / "whole").runs["seed=1"],
        )
        assert (found.data["rate"].values == whole.data["rate"].values).all()  # type: ignore[union-attr]


def test_a_cluster_that_cannot_be_reached(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradflow.sweeping import engines

    monkeypatch.setattr(engines, "DASK_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(SystemExit) as stop:
            cli.main(
                ["sweep", str(runs / "runs/seed=1"), "-o", str(runs / "none"), "--dask", address]
            )
        assert stop.value.code == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"Error: the dask cluster at {address} cannot be reached")
        assert len(said.splitlines()) == 1
