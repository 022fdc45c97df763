"""One fused call as it was seen: copies, and the gradients that reach what it returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


@dataclass(eq=False)
class Call:
    """One fused call, copied, with the gradients that reached what it returned."""

    cell: str
    owner: str  # path of the module that holds the weights
    data: Tensor
    batch_sizes: Tensor | None
    unsorted: Tensor | None
    h0: Tensor
    c0: Tensor | None
    weights: tuple[Tensor, ...]  # copies
    weight_keys: tuple[int, ...]  # which tensors they were, see WeightUses
    has_biases: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    rng: Tensor | None
    autocast: tuple[str, bool, torch.dtype]
    returned: dict[str, Tensor]  # output, h_n, c_n: copies
    grad_enabled: bool
    differentiable: bool
    lengths: Tensor | None  # the user's own, for padded input
    grads: dict[str, Tensor] = field(default_factory=dict)  # output, h_n, c_n: summed
    graph_tasks: set[int] = field(default_factory=set)  # one entry per backward that came by
    second_order: bool = False  # a backward with create_graph=True came by

    def listen(
        self, name: str, tensor: Tensor, scale: Callable[[], float]
    ) -> list[RemovableHandle]:
        """From now on add up the gradients that reach a tensor the call returned.

        A hook on its node runs after every hook on the tensor, so that what a user's hook makes of
        the gradient is what is seen.
        """
        node, place = tensor.grad_fn, tensor.output_nr
        if node is None:
            return []
        return [node.register_prehook(lambda grads: self._caught(name, grads[place], scale()))]

    def _caught(self, name: str, grad: Tensor | None, scale: float) -> None:
        """Add a gradient that reached one of the returned tensors."""
        if grad is None:
            return
        self.second_order |= torch.is_grad_enabled()
        self.graph_tasks.add(torch._C._current_graph_task_id())
        grad = grad.detach() / scale if scale != 1.0 else grad.detach().clone()
        self.grads[name] = self.grads[name] + grad if name in self.grads else grad
