"""What runs the tasks of a sweep: any `concurrent.futures.Executor`, a process pool by default.

A pool of our own is made anew when one of its processes is killed, and the tasks that were in flight run
again, one at a time, so that it is seen which of them ends its process. On a cluster that is the scheduler's
affair: dask runs the tasks of a lost worker again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from gradflow.errors import GradflowError, InputError
from gradflow.limits import DASK_SECONDS, SWEEP_WAITING
from gradflow.process import require_executor, settled
from gradflow.sweeping.checkpoints import VERSIONS, CheckpointTask, Outcome, other_versions
from gradflow.sweeping.one_checkpoint import measure_checkpoint

ASK_VERSIONS = "(__import__('gradflow').__version__, str(__import__('torch').__version__))"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # of a worker: one
WORKER_KILLED = (
    "the process that measured it was killed, most likely for want of memory; give fewer --jobs, or a "
    "smaller batch"
)


class InProcess(Executor):
    """This process, one task after the other."""

    def submit(self, work: Any, /, *args: Any, **names: Any) -> Future[Any]:
        """Do it at once."""
        return settled(Future(), functools.partial(work, *args, **names))


class Engine:
    """Runs tasks, so many at a time, by an executor that has its owner."""

    def __init__(self, executor: Executor, width: int | None = None) -> None:
        known = getattr(executor, "_max_workers", None)  # as many wait, so that no process does
        self.executor = executor
        self.width = width or (2 * known if isinstance(known, int) else SWEEP_WAITING)

    def submit(self, task: CheckpointTask) -> Future[Outcome]:
        """Hand it on."""
        job: Any = self.executor.submit(measure_checkpoint, task)
        return job if isinstance(job, Future) else _future_of(job)

    def renewed(self) -> bool:
        """Made anew after a process of it was killed; false where only its owner could."""
        return False


class SpawnedPool(Engine):
    """Processes of this machine, each with one thread."""

    executor: ProcessPoolExecutor

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        super().__init__(self._new())

    def _new(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.jobs, mp_context=spawn, initializer=_begin)

    def renewed(self) -> bool:
        """A pool is broken for good once a process of it is killed."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.executor = self._new()
        try:
            self.executor.submit(int).result()
        except BrokenExecutor:
            raise InputError(
                "no process of the sweep could begin; what it printed stands above. In a script "
                "gradflow.sweep must stand below if __name__ == '__main__':, as each process imports it"
            ) from None
        return True

    def end(self, *, now: bool) -> None:
        """End the processes; ``now`` in the middle of what they do."""
        processes = list((self.executor._processes or {}).values())
        self.executor.shutdown(wait=not now, cancel_futures=True)
        for process in processes if now else []:
            process.kill()


def _future_of(job: Any) -> Future[Outcome]:
    """Of a job that is none but has a ``result()``, as submitit's."""
    future: Future[Outcome] = Future()
    threading.Thread(target=settled, args=(future, job.result), daemon=True).start()
    return future


def _begin() -> None:
    """A process of the pool begins: Ctrl-C is its parent's affair, and it ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are started inside have one thread for their linear algebra."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ |= dict.fromkeys(THREADS, "1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def spawned(jobs: int) -> Iterator[Engine]:
    """A pool of so many processes, for a while.

    Raises:
        InputError: this is a process that a sweep started, importing the caller's script.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(
            "gradflow.sweep was called while a process that it started imported your script; put the "
            "call below if __name__ == '__main__':, or give an executor"
        )
    with _one_thread_each():
        pool = SpawnedPool(jobs)
        try:
            yield pool
        except BaseException:
            pool.end(now=True)
            raise
        pool.end(now=False)


@contextmanager
def of_caller(executor: object) -> Iterator[Engine]:
    """An executor of the caller's, which is not shut down.

    Args:
        executor: of `concurrent.futures`, of dask, MPI or submitit.

    Raises:
        InputError: it is none, or its workers have other versions.
    """
    require_executor(executor, "ProcessPoolExecutor(), Client(...).get_executor()")
    found: Any = executor
    _same_versions([_asked(lambda: found.submit(eval, ASK_VERSIONS).result())])
    yield Engine(found)


@contextmanager
def dask(address: str, jobs: int) -> Iterator[Engine]:
    """A dask cluster, for a while.

    Args:
        address: of its scheduler, or "local" for one of this machine.
        jobs: workers of a local one.

    Raises:
        InputError: dask is not installed, the cluster cannot be reached, has no worker, or its workers
            have other versions.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise InputError("--dask needs dask; type: pip install 'gradflow-rnn[cluster]'") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread_each())
        stack.callback(logging.disable, logging.NOTSET)
        try:
            if address == "local":
                cluster = LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
                address = stack.enter_context(cluster)
            client = stack.enter_context(Client(address, timeout=DASK_SECONDS))
        except (OSError, TimeoutError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"the dask cluster at {address} cannot be reached ({reason}); start it with dask scheduler "
                "and dask worker, check the address, or give --dask local"
            ) from None
        workers = len(client.ncores())
        if not workers:
            raise InputError(
                f"the dask cluster at {address} has no worker; start one: dask worker {address}"
            )
        _same_versions(_asked(lambda: list(client.run(eval, ASK_VERSIONS).values())))
        try:
            yield Engine(client.get_executor(pure=False), 2 * sum(client.ncores().values()))
        except BaseException:  # what dask says of tasks that end with it helps nobody
            logging.disable()
            raise


def _asked(ask: Callable[[], Any]) -> Any:
    """What workers answer; a worker without gradflow or torch does not."""
    try:
        return ask()
    except ImportError as error:
        there = str(error).removeprefix("No module named ").strip("'")
        raise InputError(
            f"the workers must have gradflow {VERSIONS[0]} and torch {VERSIONS[1]} as this process has, "
            f"got workers without {there}; install the same on all"
        ) from None


def _same_versions(found: list[Any]) -> None:
    for one in found:
        if tuple(one) != VERSIONS:
            raise InputError(other_versions(tuple(one), VERSIONS))


# -------------------------------------------------------------------------------- running tasks


# with a task, its outcome, and whether that is for good; what it returns is to run once more
Done = Callable[[CheckpointTask, Outcome, bool], CheckpointTask | None]


@dataclass
class Running:
    """Tasks on their way through an engine."""

    engine: Engine  # what runs them
    done: Done  # called with each outcome
    tick: Callable[[], None]  # called about every second
    again: deque[CheckpointTask] = field(default_factory=deque)  # to run once more

    def run(self, tasks: Iterable[CheckpointTask]) -> None:
        """Run all tasks, a few at a time, and hand on each outcome as it comes.

        Args:
            tasks: taken one by one, as they are needed.

        Raises:
            GradflowError: a worker has another version, or the engine takes no more tasks.
        """
        coming, flying = iter(tasks), dict[Future[Outcome], CheckpointTask]()
        while True:
            while len(flying) < self.engine.width and (task := self._next(coming)) is not None:
                flying[self._submitted(task)] = task
            if not flying:
                return
            lost = self._finished(flying)
            if lost:  # which of all that were in flight ended the process?
                lost += flying.values()
                flying.clear()
                self._renew()
                for task in lost:
                    if self._finished({self._submitted(task): task}):
                        self._renew()
                        self.done(task, Outcome(failed=WORKER_KILLED), False)

    def _next(self, coming: Iterator[CheckpointTask]) -> CheckpointTask | None:
        return self.again.popleft() if self.again else next(coming, None)

    def _submitted(self, task: CheckpointTask) -> Future[Outcome]:
        try:
            return self.engine.submit(task)
        except BrokenExecutor as error:
            future: Future[Outcome] = Future()
            future.set_exception(error)
            return future

    def _renew(self) -> None:
        if not self.engine.renewed():
            raise InputError(
                "the workers of the executor were killed, and it takes no more tasks; make it anew, and go "
                "on with resume=True"
            )

    def _finished(self, flying: dict[Future[Outcome], CheckpointTask]) -> list[CheckpointTask]:
        """Wait for one or more of them; those whose process was killed."""
        finished: set[Future[Outcome]] = set()
        while not finished:
            finished, _ = wait(flying, timeout=1.0, return_when=FIRST_COMPLETED)
            self.tick()
        lost = []
        for future in finished:
            task, lasting = flying.pop(future), True
            try:
                outcome = future.result()
            except BrokenExecutor:
                lost.append(task)
                continue
            except GradflowError:
                raise
            except Exception as error:  # noqa: BLE001  whatever it is, it is the row of one checkpoint
                said = " ".join(str(error).split())
                outcome, lasting = Outcome(failed=f"{type(error).__name__}: {said}"), False
            repeat = self.done(task, outcome, lasting)
            if repeat is not None:
                self.again.append(repeat)
        return lost
