"""How many threads an analysis may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = (
    160  # states of at most this width are faster on one thread, and far faster on a busy machine
)


@contextmanager
def fitting_threads(size: int) -> Iterator[None]:
    """One thread for small matrices, where waiting for each other costs more than the work."""
    before = torch.get_num_threads()
    if size <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
