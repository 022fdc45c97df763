"""The gradients that backwards bring to what was kept of a loop, and why there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.errors import RecordingError
from gradflow.hooks.call import SECOND_ORDER
from gradflow.hooks.graph import Edge
from gradflow.hooks.guard import BATCHED, ONLY_BATCHED, Hook, Point, is_batched, why_hidden
from gradflow.recording.source import Source


@dataclass(eq=False)
class HeardGradients:
    """What a source of marks, or of calls, adds up: each of these has ``grads`` by name."""

    scale: Callable[[], float]  # what the loss is multiplied by
    graph_tasks: set[int] = field(default_factory=set, kw_only=True)  # one entry per backward
    lost: str = field(default="", kw_only=True)  # why what the backwards brought is no total
    # a backward of several outputs at once reached it, which is not counted
    batched: bool = field(default=False, kw_only=True)
    ran_backward: bool = field(default=False, kw_only=True)  # whether any ran in the block

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: what the loss is multiplied by is read no more."""
        return vars(self) | {"scale": float}

    def forget(self) -> None:
        """What backwards brought so far counts no more."""
        self.graph_tasks.clear()
        for one in self._kept():
            one.grads.clear()

    @property
    def version(self) -> int:
        """How many backwards reached the loop."""
        return len(self.graph_tasks)

    def _kept(self) -> Sequence[Any]:
        """The marks, or the calls: ``grad_enabled``, ``differentiable`` and ``grads`` of each."""
        raise NotImplementedError

    def _needs_none(self) -> str:
        """Why none of them needs a gradient, and what to do."""
        raise NotImplementedError

    def _spoken(self) -> str:
        """What is said to be reached: "states"."""
        return "states"

    def _rows(self, one: Any, name: str, grad: Tensor) -> Tensor:
        """A gradient as it is kept."""
        return grad

    def listen(self, one: Any, edges: dict[str, Edge]) -> list[RemovableHandle]:
        """Add up the gradients that reach some tensors, after all hooks of the user's own."""
        return [
            node.register_prehook(Hook(Point.GRADIENT, self.lose, self._catcher(one, name, output)))
            for name, (node, output) in edges.items()
        ]

    def lose(self, why: str) -> None:
        """What the backwards brought, and will bring, is no total."""
        self.lost = self.lost or why
        self.graph_tasks.add(torch._C._current_graph_task_id())

    def _counts(self, grad: Tensor) -> bool:
        """Note that a backward came by; whether its gradient is to be added up."""
        if is_batched(grad) or why_hidden():
            self.batched = True
            return False
        if torch.is_grad_enabled():
            self.lost = self.lost or SECOND_ORDER
        self.graph_tasks.add(torch._C._current_graph_task_id())
        return True

    def _catcher(
        self, one: Any, name: str, output: int
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        def catch(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[output]
            if grad is None or not self._counts(grad):
                return
            grad = self._rows(one, name, grad.detach()) / self.scale()
            one.grads[name] = one.grads[name] + grad if name in one.grads else grad

        return catch

    def _has_gradient(self) -> bool:
        return not self.lost and any(one.grads for one in self._kept())

    def unread(self) -> bool:
        """Whether a backward ran and did not come here, though it could have."""
        able = any(one.grad_enabled and one.differentiable for one in self._kept())
        if self.lost or self.batched:
            return False
        return able and self.ran_backward and not self.version

    def why_no_gradient(self) -> str:
        """Why there is no gradient here, and what to do."""
        if self.lost:
            return self.lost
        if self.batched:
            return ONLY_BATCHED
        if not any(one.grad_enabled for one in self._kept()):
            return (
                "it ran inside torch.no_grad(), or inside a checkpoint with use_reentrant=True; run it "
                "with gradients enabled, or the checkpoint with use_reentrant=False"
            )
        if not any(one.differentiable for one in self._kept()):
            return self._needs_none()
        if self.ran_backward:
            return (
                f"a backward ran but did not reach its {self._spoken()}: they are detached, or the "
                "loss ignores them; make the loss depend on them"
            )
        return "no backward ran inside the block; call loss.backward() before the block ends"

    def reached(self) -> Tensor | None:
        """(T, B): where the loss reaches the states."""
        raise NotImplementedError

    def arriving(self) -> Tensor | None:
        """The same: what reaches the states from outside their own recurrence."""
        return self.reached()

    def trains_recurrence(self) -> None:
        """Its weights were not seen."""

    def contributions(self, sequences: Tensor) -> None:
        """Its weights were not seen."""

    def alone(self) -> None:
        """There is no other reading: what goes into the steps was not seen."""

    def changed(self, **_: float) -> tuple[Source, dict[str, Tensor]]:
        """Nothing.

        Raises:
            RecordingError: always.
        """
        raise RecordingError("its steps are the user's own code, which is not run again")

    def _batched_note(self) -> list[str]:
        return [BATCHED] if self.batched else []
