"""The gradients of the steps of one loop, whatever its steps are made of, and why there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.errors import RecordingError
from gradflow.hooks.call import SECOND_ORDER
from gradflow.hooks.graph import Edge
from gradflow.hooks.guard import BATCHED, ONLY_BATCHED, Hook, Point, is_batched, why_hidden
from gradflow.limits import DIFFERENCE_ROUNDING
from gradflow.recording.source import Backward, Source


class LoopGradients:
    """Last loss steps, single loss steps and reasons: one source of them for every kind of loop.

    A kind of loop gives where the loss reaches it and what single steps bring back: torch's layers from
    their equations, marked states from the Jacobians of the graph, linear recurrences from their maps.
    """

    lost: str  # why what the backwards brought is no total
    batched: bool  # a backward of several outputs at once reached it, which is not counted
    ran_backward: bool  # whether any ran in the block, perhaps not through here
    reverse = False  # processed from the last input step to the first

    def kept(self) -> Sequence[Any]:
        """Marks or calls, each with ``grad_enabled``, ``differentiable``, ``grads`` by name."""
        raise NotImplementedError

    def _said(self) -> tuple[str, str, str]:
        """What is said where all ran without gradient, where none needs one, where no backward came."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """How many backwards reached the loop."""
        raise NotImplementedError

    @property
    def real(self) -> Tensor | None:
        """(B,) the real steps of every sequence; None where all are T."""
        raise NotImplementedError

    def reached(self) -> Tensor | None:
        """(T, B) in input time, padding included: where the loss reaches the states, if known."""
        raise NotImplementedError

    def _alone(
        self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None
    ) -> Backward | None:
        """Total gradients (n, T, m, ·) of what arrives at the chosen input steps (n, m) alone, −1 for none.

        Without a dtype they are computed and given in the track's own. None where they are not known.
        """
        raise NotImplementedError

    def _trimmed(self, array: Tensor, sequences: Tensor | None = None) -> Tensor:
        """NaN past the real steps of all sequences, or of some: (..., T, m, ·) in input time."""
        if self.real is None:
            return array
        real = self.real if sequences is None else self.real[sequences.to(self.real.device)]
        time = torch.arange(array.shape[-3], device=array.device).unsqueeze(1)
        past = time >= real.to(array.device)
        return array.masked_fill(past.unsqueeze(2), float("nan")) if bool(past.any()) else array

    def last(self) -> Backward | None:
        """Total gradients of each sequence's last loss step alone, last in processing order, if known."""
        arrives = self.reached()
        if arrives is None:
            return None
        time = torch.arange(len(arrives), device=arrives.device).unsqueeze(1)
        if self.real is not None:
            arrives = arrives & (time < self.real.to(arrives.device))
        order = time.flip(0) if self.reverse else time
        newest, chosen = torch.where(arrives, order, -1).max(0)
        every = torch.arange(arrives.shape[1], device=arrives.device)
        with torch.no_grad():
            found = self._alone(every, chosen.masked_fill(newest < 0, -1).unsqueeze(0), None)
        return None if found is None else _first(found)

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps, (n, T, m, ·); None where they are not known."""
        with torch.no_grad():
            return self._alone(sequences, loss_steps.unsqueeze(1).expand(-1, len(sequences)), dtype)

    def unread(self) -> bool:
        """Whether a backward ran and did not come here, though it could have."""
        if self.lost or self.batched:
            return False
        able = any(one.grad_enabled and one.differentiable for one in self.kept())
        return able and self.ran_backward and not self.version

    def why_no_gradient(self) -> str:
        """Why there is no gradient here, and what to do."""
        if self.lost:
            return self.lost
        if self.batched:
            return ONLY_BATCHED
        without, frozen, not_reached = self._said()
        if not any(one.grad_enabled for one in self.kept()):
            return without
        if not any(one.differentiable for one in self.kept()):
            return frozen
        if self.ran_backward:
            return not_reached
        return "no backward ran inside the block; call loss.backward() before the block ends"


def difference(total: Tensor, part: Tensor, size: Tensor) -> Tensor:
    """total − part, (B, ·) real or complex, exactly 0 where that is no more than rounding."""
    left = total - part
    bound = DIFFERENCE_ROUNDING * torch.finfo(total.dtype).eps * size.amax(dim=-1, keepdim=True)
    return left.masked_fill(left.abs() <= bound, 0.0)


def _first(found: Backward) -> Backward:
    """Of several loss steps the first, (T, m, ·)."""
    delta, recurrent = (None if d is None else d[0] for d in (found.delta, found.delta_hh))
    grads = {name: grad[0] for name, grad in found.grads.items()}
    return replace(found, grads=grads, delta=delta, delta_hh=recurrent)


@dataclass(eq=False)
class HeardGradients(LoopGradients):
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
        for one in self.kept():
            one.grads.clear()

    @property
    def version(self) -> int:
        """How many backwards reached the loop."""
        return len(self.graph_tasks)

    def _needs_none(self) -> str:
        """Why none of them needs a gradient, and what to do."""
        raise NotImplementedError

    def _spoken(self) -> str:
        """What is said to be reached."""
        return "states"

    def _said(self) -> tuple[str, str, str]:
        return (
            "it ran inside torch.no_grad(), or inside a checkpoint with use_reentrant=True; run it "
            "with gradients enabled, or the checkpoint with use_reentrant=False",
            self._needs_none(),
            f"a backward ran but did not reach its {self._spoken()}: they are detached, or the "
            "loss ignores them; make the loss depend on them",
        )

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
        return not self.lost and any(one.grads for one in self.kept())

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
