"""Layers, and mapped sequences of a layer, side by side by any `concurrent.futures.Executor`.

The numbers are those of one after the other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import torch

from gradflow.errors import InputError
from gradflow.process import settled, so_many_threads

Made = TypeVar("Made")


def each(
    executor: Executor | None,
    name: str,
    make: Callable[..., Made],
    parts: Iterable[tuple[Any, ...]],
) -> Iterator[Made]:
    """What is made of each part, in their order; without an executor only as it is asked for."""
    if executor is None:
        yield from (make(*part) for part in parts)
        return
    coming = [(started(executor, make, *part), part) for part in parts]
    yield from (result_of(future, name, part) for future, part in coming)


def started(executor: Executor | None, make: Callable[..., Made], *parts: Any) -> Future[Made]:
    """Begin to make something of parts by a function of a module, or make it at once without an executor.

    It has as many threads as here, on which the last bits of a sum depend.
    """
    if executor is None:
        return settled(Future(), make, *parts)
    return executor.submit(_made, torch.get_num_threads(), make, parts)


def _made(threads: int, make: Callable[..., Made], parts: tuple[Any, ...]) -> Made:
    with so_many_threads(threads):
        return make(*parts)


def result_of(future: Future[Made], name: str, parts: tuple[Any, ...]) -> Made:
    """What was made of these parts; an InputError where they cannot be sent to another process."""
    try:
        return future.result()
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        try:
            pickle.dumps(parts)
        except Exception as why:  # noqa: BLE001  whatever an object raises that is not to be sent
            raise InputError(
                f"executor= hands parts to other processes, and {name} cannot be sent there "
                f"({type(why).__name__}: {why}); give a ThreadPoolExecutor, or leave it out"
            ) from error
        raise
