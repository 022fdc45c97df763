"""The processes that train one model together, where what each of them measured is put together.

With ``gather=True`` of `gradflow.record` and `gradflow.watch`, sequences are those of all processes, in the
order of their ranks, and gradients those of the mean of their losses, which is what DistributedDataParallel
and FSDP2's ``fully_shard`` train by. Every process says it. A recording is sent whole to all of them. Of an
update that is watched the first process gets sums, and the steps of the at most 16 sequences that a verdict
rests on (with preset "full" the recordings); it decides which steps are probed, and it alone writes.

They meet in a group of their own (gloo), beside the one the training uses: what is exchanged here never
stands in the way of a gradient that is averaged there. Each says in the store of the training's group that
it is there, and only when all are do they exchange anything: where one has left, by `Watch.close` or with
its process, the others read it there and go on without. One that does not come within ten minutes, at the
beginning within one, ends the gathering, not the training. Of FSDP2 the weights are read
while their forward runs, when they are whole. Layers of tensor parallelism, of which no process ever holds
a whole weight, get no verdict, in words. DeepSpeed is untried: up to ZeRO stage 2 each process holds whole
weights, so record ``engine.module``; of stage 3 nothing is promised.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, ClassVar

from torch import Tensor, distributed

from gradflow.errors import GradflowError, InputError, RecordingError, must_be
from gradflow.limits import RANKS_BEGIN, RANKS_PAUSE, RANKS_SECONDS


class ApartError(GradflowError):
    """The processes did not come together: one of them is elsewhere, or gone."""


def world() -> tuple[int, int]:
    """The number of this process, its rank, and how many there are; (0, 1) without a group.

    >>> world()
    (0, 1)
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


class AllProcesses:
    """All processes of `torch.distributed`, as they meet at one point after another.

    Args:
        gather: as it was asked for: whether they meet at all.

    Raises:
        InputError: it is neither true nor false, or there is no group of processes yet.
        ApartError: the others did not ask for it as well.
    """

    # groups of all processes, each beside the one of the training; neither is kept alive here
    _groups: ClassVar[weakref.WeakKeyDictionary[Any, Any]] = weakref.WeakKeyDictionary()
    _asked = 0  # how often they were to meet so far

    def __init__(self, gather: object) -> None:
        if not isinstance(gather, bool):
            raise InputError(must_be("gather", "True or False", repr(gather), "leave it out"))
        self.rank, self.size = world() if gather else (0, 1)
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        if gather and several and not distributed.is_initialized():
            raise InputError(
                "gather=True must find the group of all processes, got none yet; call "
                "torch.distributed.init_process_group first"
            )
        if self.size == 1:
            return
        AllProcesses._asked += 1
        self._name, self._points = f"gradflow/{AllProcesses._asked}", 0
        self._beside = weakref.ref(distributed.group.WORLD)
        self._come(
            f"not every process asked for gather=True within {RANKS_BEGIN} s; ask for it in all of "
            "them, or in none",
            RANKS_BEGIN,
        )
        if distributed.group.WORLD not in AllProcesses._groups:
            made = distributed.new_group(
                backend="gloo", timeout=timedelta(seconds=RANKS_SECONDS), group_desc="gradflow"
            )
            AllProcesses._groups[distributed.group.WORLD] = weakref.ref(made)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and says what all have measured."""
        return self.rank == 0

    def every(self, where: object, brought: Any, *, at_first: bool = False) -> list[Any]:
        """What each process brought to this point, in the order of their ranks; each gets all of it.

        Args:
            where: what the point is, the same for all of them: by it they know that they are at the
                same one.
            brought: anything that can be pickled.
            at_first: whether the first process alone gets it; the others get an empty list.

        Raises:
            ApartError: they are at different points, or one did not come.
        """
        if self.size == 1:
            return [brought]
        found: list[Any] = [None] * self.size if self.first or not at_first else []
        if at_first:
            self._meet(distributed.gather_object, (where, brought), found or None)
        else:
            self._meet(distributed.all_gather_object, found, (where, brought))
        return self._at_one_point(where, found)

    def leave(self, why: str) -> None:
        """Say that this process meets the others no more; they go on without it.

        Args:
            why: what it did, in words that follow its rank.
        """
        if self.size > 1:
            with contextlib.suppress(RuntimeError, ApartError):  # they are gone already
                store = self._store()
                if store is not None:
                    store.set(f"{self._name}/left", f"rank {self.rank} {why}")

    def _store(self) -> Any:
        """Where the processes leave words for each other; None where their group has none (MPI)."""
        if distributed.group.WORLD is None or distributed.group.WORLD is not self._beside():
            raise ApartError("the group of the processes was destroyed")
        return distributed.distributed_c10d._get_default_store()

    def _come(self, absent: str, seconds: float) -> None:
        """Come to the next point, and wait there for the others.

        Args:
            absent: what to say where one does not come.
            seconds: how long to wait.

        Raises:
            ApartError: one has left, or does not come.
        """
        store = self._store()
        if store is None:
            return
        self._points += 1
        here, left = f"{self._name}/{self._points}", f"{self._name}/left"
        try:
            if store.add(f"{here}/came", 1) == self.size:  # the last one
                store.set(f"{here}/all", "")
                for word in ("came", "all"):  # that nobody asks for any more
                    store.delete_key(f"{self._name}/{self._points - 1}/{word}")
            until, pause = time.monotonic() + seconds, RANKS_PAUSE[0]
            while not store.check([f"{here}/all"]):
                gone = store.check([left])
                if gone and not store.check([f"{here}/all"]):
                    raise ApartError(store.get(left).decode())
                if time.monotonic() > until:
                    self.leave(f"waited no longer than {seconds} s for the others")
                    raise ApartError(absent)
                time.sleep(pause)
                pause = min(2 * pause, RANKS_PAUSE[1])
        except RuntimeError as error:
            raise ApartError(_apart(error)) from error

    def _meet(self, exchange: Callable[..., object], *args: Any) -> None:
        self._come(
            f"not every process came to this step within {RANKS_SECONDS} s; let all of them make the "
            "same training steps",
            RANKS_SECONDS,
        )
        made = AllProcesses._groups[distributed.group.WORLD]()
        try:
            exchange(*args, group=made)
        except RuntimeError as error:
            raise ApartError(_apart(error)) from error

    def _at_one_point(self, where: object, found: list[Any]) -> list[Any]:
        others = [rank for rank, (at, _) in enumerate(found) if at != where]
        if others:
            raise ApartError(
                f"the processes are at different points: rank {self.rank} at {where}, rank "
                f"{others[0]} at {found[others[0]][0]}"
            )
        return [one for _, one in found]


def _apart(error: RuntimeError) -> str:
    """What torch says where it could not bring them together."""
    why = str(error).partition("\n")[0]
    return f"the processes did not come together ({why})"


def can_be_sent(x: Any) -> bool:
    """Whether an object can be handed to another process.

    >>> can_be_sent([1.0]), can_be_sent(lambda: 1.0)
    (True, False)
    """
    try:
        pickle.dumps(x)
    except (pickle.PicklingError, AttributeError, TypeError, RecordingError):
        return False
    return True


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is shared out among several, or the tensor itself."""
    return tensor.to_local() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]


def is_shared_out(tensor: Tensor) -> bool:
    """Whether it is a DTensor: FSDP2's shards of a weight, or those of tensor parallelism."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def holders(tensor: Tensor) -> int:
    """How many processes hold the same part of it: 1 where each has its own.

    >>> import torch
    >>> holders(torch.zeros(3))
    1
    """
    if not is_shared_out(tensor):
        return 1
    sizes: Iterable[int] = tensor.device_mesh.shape  # type: ignore[attr-defined]
    found = 1
    for size, placement in zip(sizes, tensor.placements, strict=True):  # type: ignore[attr-defined]
        found *= size if placement.is_replicate() else 1
    return found
