"""Tensors that were seen while the graph was made: what the user's modules were given and returned.

Beside them are the local variables of the code that called: there the states of a loop have their
names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType

from torch import Tensor

from gradflow.hooks.graph import Edge
from gradflow.limits import HELD_ENTRIES, HELD_LOCALS

NOT_THEIRS = ("torch.nn.modules.module", "gradflow.", "torch._dynamo", "functools")


class Held:
    """Tensors by the edge of the graph where they sit."""

    def __init__(self) -> None:
        self.tensors: dict[Edge, Tensor] = {}
        self.names: dict[Edge, str] = {}
        self._size = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep these, those that need a gradient."""
        for tensor in tensors:
            node = tensor.grad_fn
            if node is None or tensor.is_inference():
                continue
            edge = (node, tensor.output_nr)
            if edge not in self.tensors and self._size < HELD_ENTRIES:
                self._size += tensor.numel()
                self.tensors[edge] = tensor.detach()

    def hold_locals(self) -> None:
        """Keep the variables of the code that calls the module whose call is being told of."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if not str(frame.f_globals.get("__name__", "")).startswith(NOT_THEIRS):
                break
            frame = frame.f_back
        if frame is None or frame.f_code.co_name == "<module>":
            return
        for name, value in list(frame.f_locals.items())[:HELD_LOCALS]:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                self.hold((value,))
                self.names[value.grad_fn, value.output_nr] = name

    def clear(self) -> None:
        """Release all of them."""
        self.tensors.clear()
        self.names.clear()
        self._size = 0
