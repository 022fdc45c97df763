"""One recurrent call as it was seen: copies, and the gradients that reach what it returned."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.guard import Hook, Point, is_batched, why_hidden


@dataclass(eq=False)
class Inner:
    """One layer of a call that ran with phantom inputs, and what its backwards brought."""

    inputs: int  # I of this layer
    output: Tensor | None  # a copy; None of the top layer, whose output the call returned
    # "phantom", and below the top "output": what came from above
    grads: dict[str, Tensor] = field(default_factory=dict)
    graph_tasks: set[int] = field(default_factory=set)


SECOND_ORDER = (
    "a backward with create_graph=True came through it, and what it brings is not a total; record a "
    "backward of the loss alone"
)


@dataclass(eq=False)
class Call:
    """One fused call, copied, with the gradients that reached what it returned.

    A call of a single-step function is one of T = 1: its h stands as output and as the last h, and the
    gradients that reached h stand at output.
    """

    cell: str
    owner: str  # path of the module that holds the weights
    data: Tensor
    batch_sizes: Tensor | None
    unsorted: Tensor | None
    initial: dict[str, Tensor]  # state name -> (layers · D, B, width)
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
    returned: dict[str, Tensor]  # output, and the last states by name: copies
    grad_enabled: bool
    differentiable: bool
    lengths: Tensor | None  # the user's own, for padded input
    grads: dict[str, Tensor] = field(default_factory=dict)  # at what was returned: summed
    graph_tasks: set[int] = field(default_factory=set)  # one entry per backward that reached it
    lost: str = ""  # why what the backwards brought is no total, if it is none
    batched: bool = False  # a backward of several outputs at once reached it, which is not counted
    single: bool = False  # of a single-step function
    totals: bool = (
        False  # what reaches the states beside h has come through h, which is made of them
    )
    within: int | None = None  # the backward that a reentrant checkpoint made the call again in
    entering: dict[str, Tensor] = field(default_factory=dict)  # gradients at the initial states
    inner: tuple[Inner, ...] = ()  # layer by layer, where it ran with phantom inputs

    @property
    def h0(self) -> Tensor:
        """The initial h, of whose layout the other states are."""
        return self.initial["h"]

    def started(self) -> Tensor:
        """The initial states side by side, (layers · D, B, S)."""
        return torch.cat(list(self.initial.values()), dim=2)

    def ended(self) -> Tensor:
        """The states that were returned, likewise."""
        return torch.cat([self.returned[name] for name in self.initial], dim=2)

    def columns(self) -> dict[str, slice]:
        """Where each state is in them."""
        ends = list(itertools.accumulate(state.shape[2] for state in self.initial.values()))
        return dict(zip(self.initial, map(slice, [0, *ends], ends), strict=True))

    def listen(
        self, name: str, tensor: Tensor, scale: Callable[[], float]
    ) -> list[RemovableHandle]:
        """From now on add up the gradients that reach a tensor the call returned.

        A hook on its node runs after every hook on the tensor, so that what a user's hook makes of
        the gradient is what is seen.
        """
        return self._hook(tensor, lambda grad: self._caught(name, grad, scale()))

    def listen_at_entry(
        self, name: str, tensor: Tensor, scale: Callable[[], float]
    ) -> list[RemovableHandle]:
        """The same for an initial state the call was given."""
        return self._hook(tensor, lambda grad: self._entered(name, grad, scale()))

    def listen_inside(
        self, inner: Inner, tensors: list[Tensor], scale: Callable[[], float]
    ) -> list[RemovableHandle]:
        """The same for a layer's phantom inputs, which stand last in what it was given, and its output."""
        given, output = tensors

        def phantom(grad: Tensor) -> None:
            inner.graph_tasks.add(self._task())
            _add(inner.grads, "phantom", grad[..., inner.inputs :], scale())

        handles = self._hook(given, phantom)
        if inner.output is not None:
            handles += self._hook(output, lambda grad: _add(inner.grads, "output", grad, scale()))
        return handles

    @property
    def inner_known(self) -> bool:
        """Whether every backward that came brought what its layers' phantom inputs get."""
        return bool(self.inner) and all(one.graph_tasks == self.graph_tasks for one in self.inner)

    def _task(self) -> int:
        return torch._C._current_graph_task_id() if self.within is None else self.within

    def _hook(self, tensor: Tensor, work: Callable[[Tensor], None]) -> list[RemovableHandle]:
        node, place = tensor.grad_fn, tensor.output_nr
        if node is None:
            return []

        def reached(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[place]
            if grad is None:
                return
            if is_batched(grad) or why_hidden():
                self.batched = True
                return
            work(grad)

        return [node.register_prehook(Hook(Point.GRADIENT, self.lose, reached))]

    def lose(self, why: str) -> None:
        """What the backwards brought, and will bring, is no total."""
        self.lost = self.lost or why
        self.graph_tasks.add(torch._C._current_graph_task_id())

    def _caught(self, name: str, grad: Tensor, scale: float) -> None:
        """Add a gradient that reached one of the returned tensors."""
        if torch.is_grad_enabled():
            self.lost = self.lost or SECOND_ORDER
        self.graph_tasks.add(self._task())
        if self.single:
            grad = grad.unsqueeze(0)
        _add(self.grads, name, grad, scale)

    def _entered(self, name: str, grad: Tensor, scale: float) -> None:
        _add(self.entering, name, grad.unsqueeze(0) if self.single else grad, scale)


def _add(grads: dict[str, Tensor], name: str, grad: Tensor, scale: float) -> None:
    grad = grad.detach() / scale if scale != 1.0 else grad.detach().clone()
    grads[name] = grads[name] + grad if name in grads else grad
