"""Layers side by side, by any `concurrent.futures.Executor`, with the numbers of one after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any, TypeVar

import torch

from gradflow.analyzer.settings import Settings
from gradflow.errors import InputError
from gradflow.process import require_executor, settled, so_many_threads

Made = TypeVar("Made")


def silent(phase: str, share: float) -> None:
    """The progress of a part that is made elsewhere."""


def away(settings: Settings) -> Settings:
    """The same settings for a part that is made elsewhere, in another process, say."""
    return replace(settings, progress=silent)


def started(executor: Executor | None, make: Callable[..., Made], *parts: Any) -> Future[Made]:
    """Begin to make something, or make it at once where there is no executor.

    It has as many threads as here, on which the last bits of a sum depend.

    Args:
        executor: of the caller's.
        make: a function of a module.
        parts: its arguments.

    Raises:
        InputError: the executor is none.
    """
    if executor is None:
        return settled(Future(), make, *parts)
    require_executor(executor, "ThreadPoolExecutor(), ProcessPoolExecutor()")
    return executor.submit(_made, torch.get_num_threads(), make, parts)


def _made(threads: int, make: Callable[..., Made], parts: tuple[Any, ...]) -> Made:
    with so_many_threads(threads):
        return make(*parts)


def result_of(future: Future[Made], name: str, parts: tuple[Any, ...]) -> Made:
    """What was made.

    Args:
        future: of `started`.
        name: of the layer.
        parts: as they were handed on.

    Raises:
        InputError: they cannot be sent to another process.
    """
    try:
        return future.result()
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        try:
            pickle.dumps(parts)
        except Exception as why:  # noqa: BLE001  whatever an object raises that is not to be sent
            raise InputError(
                f"executor= hands layers to other processes, and {name} cannot be sent there "
                f"({type(why).__name__}: {why}); give a ThreadPoolExecutor, or leave it out"
            ) from error
        raise
