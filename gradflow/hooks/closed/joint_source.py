"""What is read of a closed loop: all states that cross from one step to the next, as one.

Letters: T steps of the loop, B sequences, S the width of all its states side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.closed.parts import MarkedPart, PartLayer, StockPart
from gradflow.hooks.closed.standing import Standing
from gradflow.hooks.guard import Hook, Point
from gradflow.hooks.loops.arrivals import Arrivals
from gradflow.hooks.loops.loss_steps import sheets
from gradflow.hooks.loops.stitch import Chain
from gradflow.hooks.tapped import Mark, TapSource, Words
from gradflow.recording import Backward, Forward, Parity

CLOSED = Words(
    step="step",
    steps="steps",
    states="states",
    more="what goes around the loop is more than a state, and no gain is one number: totals and the "
    "gradient's own profile are right all the same",
    kind="a closed loop of several parts: each layer's weights are held against its own track",
)


@dataclass(eq=False)
class JointSource(TapSource):
    """The joint state of a closed loop, one mark per step."""

    cell: str = "loop"
    members: list[PartLayer] = field(default_factory=list)
    # of each mark: a part -> its step
    ends: list[dict[StockPart | MarkedPart, int]] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)  # states that no call returned
    one_system: int = 0  # the number of sequences where all of them are one state
    _filled: tuple[int, int] = (-1, -1)

    @property
    def words(self) -> Words:
        """The words for its steps and states in sentences."""
        return CLOSED

    @property
    def version(self) -> int:
        """How many backwards reached the loop."""
        return len(self.graph_tasks.union(*(part.tasks for part in self.parts)))

    @property
    def parts(self) -> list[Any]:
        """What the loop is made of."""
        return list({id(member.part): member.part for member in self.members}.values())

    def listen_at(self, mark: Mark, place: Standing) -> list[RemovableHandle]:
        """Add up the gradients that reach what no call returned; calls are listened to already."""
        handles = []
        for edge, views in place.views.items():
            for view in views:
                if view.name in self.extras:
                    handles.append(edge[0].register_prehook(self._at(mark, edge[1], view)))
        return handles

    def _at(self, mark: Mark, output: int, view: Any) -> Any:
        def catch(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[output]
            if grad is not None and self._counts(grad):
                self._add(mark, view.name, view.take(grad.detach()) / self.scale())

        return Hook(Point.GRADIENT, self.lose, catch)

    def _add(self, mark: Mark, name: str, rows: Tensor) -> None:
        rows = rows.reshape(mark.states[name].shape)
        mark.grads[name] = mark.grads[name] + rows if name in mark.grads else rows

    # -- gradients that reached the calls ----------------------------------------------------

    def fill(self) -> None:
        """Put what reached the calls on the marks, as the graph has it: at h and the output, at c."""
        stamp = (len(self.marks), self.version)
        if self._filled == stamp:
            return
        self._filled = stamp
        self.lost = self.lost or next((part.lost for part in self.parts if part.lost), "")
        self.batched |= any(part.batched for part in self.parts)
        for mark, ends in zip(self.marks, self.ends, strict=True):
            for member in self.members:
                step = ends[member.part]
                for state, name in member.names.items():
                    grad = member.part.arrived(step, member.layer, state)
                    mark.grads.pop(name, None)
                    if grad is not None:
                        self._add(mark, name, grad)
        self._steps = None

    def _has_gradient(self) -> bool:
        self.fill()
        return super()._has_gradient()

    def forward(self) -> Forward:
        """States; what no call returned was not seen, and is NaN."""
        found = super().forward()
        states = {
            name: torch.full_like(state, torch.nan) if name in self.extras else state
            for name, state in found.states.items()
        }
        return Forward(states=states, initial={}, gates={}, inputs=None)

    def backward(self) -> Backward | None:
        """Total gradients; those of the layers are their own tracks' totals."""
        found = super().backward()
        if found is None:
            return None
        grads = dict(found.grads)
        for member in self.members:
            totals = self.totals_of(member)
            for state, name in member.names.items():
                if totals is not None:
                    grads[name] = self._trimmed(totals[state].reshape(grads[name].shape))
        return Backward(grads=grads, direct=found.direct, delta=None, delta_hh=None)

    def totals_of(self, member: PartLayer) -> dict[str, Tensor] | None:
        """State -> total gradient at the end of every step of the loop, (T, B, width)."""
        if not isinstance(member.part, StockPart):
            return None  # what reaches the marks is the total
        loop = member.part.loop
        scans = loop.scans(member.layer)
        if scans is None:
            return None
        found = {}
        for state in member.names:
            grads = [scan.grads["h" if state == "output" else state] for _, scan in scans]
            each = loop.per_call(grads)
            if state == "output":
                each = [call[:-1].transpose(0, 1).flatten(1).unsqueeze(0) for call in each]
            found[state] = self._at_ends(member.part, each)
        return found

    def _at_ends(self, part: StockPart, each: list[Tensor]) -> Tensor:
        """(T, B, ·) of every step of the loop, of what each call (t, b, ·) has at its last step."""
        ends = [calls[part] for calls in self.ends]
        return self.layout.placed({n: each[place][-1:] for n, place in enumerate(ends)})

    def _direct_as_in_graph(self) -> Tensor:
        rows = super()._direct_as_in_graph()
        if self.knows_alone():
            self._within_kernels(rows.unsqueeze(2), torch.arange(rows.shape[1]))
        return rows

    def member_of(self, chain: Chain, layer: int) -> PartLayer:
        """The piece of the joint state that one layer of a chain is."""
        return next(
            member
            for member in self.members
            if isinstance(member.part, StockPart)
            and member.part.chain is chain
            and member.layer == layer
        )

    # -- one loss step alone -----------------------------------------------------------------

    def knows_alone(self) -> bool:
        """Whether the gradients of one loss step can be told: not of losses within a chunk."""
        if self.one_system or not all(part.read_at_ends for part in self.parts):
            return False
        chains = [part.chain for part in self.parts if isinstance(part, StockPart)]
        return self.layout.even or all(self.layout.is_that_of(chain.layout) for chain in chains)

    def reached(self) -> Tensor | None:
        """(T, B): where the loss reaches the loop, or None."""
        return super().reached() if self.knows_alone() else None

    def _alone(
        self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None
    ) -> Backward | None:
        return super()._alone(sequences, chosen, dtype) if self.knows_alone() else None

    def _pulled_back(self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None) -> Tensor:
        """As the graph has it, and what comes through other results of the same kernel."""
        rows = super()._pulled_back(sequences, chosen, dtype)
        self._within_kernels(rows, sequences)
        return rows

    def _within_kernels(self, rows: Tensor, sequences: Tensor) -> None:
        """Add to rows (T, m, n, S) of independent results what each brings to the others of its call."""
        for part in self.parts:
            if isinstance(part, StockPart) and not part.chain.calls[0].totals:
                self._within_kernel(part, rows, sequences)

    def _within_kernel(self, part: StockPart, rows: Tensor, sequences: Tensor) -> None:
        columns = self.parted(rows)
        steps = part.chain.layout.parts
        ends = [int(steps[calls[part]].ends[0]) for calls in self.ends]
        times = torch.tensor(ends if self.layout.even else range(len(rows)), device=rows.device)
        each = torch.arange(rows.shape[1], device=rows.device).unsqueeze(1)
        places = (times.view(-1, 1, 1) * rows.shape[1] + each).expand(rows.shape[:3]).flatten()
        stack = sheets(part.loop, (0, 0), _nothing(part), rows.dtype, sequences.to(rows.device))
        flow: Tensor | None = None
        for layer, sheet in zip(reversed(range(part.layers)), stack, strict=True):
            names = self.member_of(part.chain, layer).names
            state = torch.cat([columns[name] for name in names.values()], dim=3)
            state = state.flatten(0, 2)
            if flow is not None:
                state[:, : flow.shape[1]] += flow
            scan, _ = sheet.back(places, state)
            flow = sheet.below(places, scan) if layer else None
            for kind, name in names.items():
                columns[name].copy_(scan.grads[kind][0].view(*rows.shape[:3], -1))

    def notes(self) -> list[str]:
        """What a step and a state of it are."""
        held = f"{self.name} is a closed loop: its state is all that crosses from step to step"
        held += f" ({', '.join(self.names)})"
        if self.one_system:
            held += (
                f", and as its {self.one_system} sequences depend on one another (messages between "
                "the nodes of a graph, statistics over the batch) they are one system"
            )
        sizes = {size for part in self.parts for size in part.sizes}
        if sizes != {1}:
            held += f"; one step of it is one call, of up to {max(sizes)} steps of the layer"
        if self.extras:
            held += f"; {', '.join(self.extras)}: returned by no recurrent layer, values not seen"
            if self._begins_without_extras():
                held += (
                    "; at its first step they are not known, and what goes through them from there is in "
                    "neither gradients nor gains"
                )
        reason = self.why_no_operator()
        return [held] + ([f"its step Jacobians are not known: {reason}"] if reason else [])

    def _begins_without_extras(self) -> bool:
        """Whether the second step depends on none of the extras, as no later one does."""
        steps = [mark.jacobian for mark in self.marks[1:]]
        if len(steps) < 2 or not all(isinstance(step, Tensor) for step in steps):
            return False
        widths = {name: state.shape[1] for name, state in self.marks[0].states.items()}
        every = [name in self.extras for name, width in widths.items() for _ in range(width)]
        columns = torch.tensor(every)
        reached = [
            bool(step[..., columns.to(step.device)].any())
            for step in steps
            if isinstance(step, Tensor) and step.shape[-1] == len(every)
        ]
        return len(reached) > 1 and not reached[0] and all(reached[1:])

    def parity(self) -> Parity:
        """There is nothing to hold against anything here."""
        return Parity("not applicable", None, self.words.kind)

    def why_no_gradient(self) -> str:
        """Why there is no gradient here, and what to do."""
        self.fill()
        return super().why_no_gradient()


def _nothing(part: StockPart) -> Arrivals:
    """Nothing that arrives from outside the loop, at any layer of a part."""
    layout, call = part.chain.layout, part.chain.calls[0]
    zeros = {
        name: state.new_zeros(layout.steps, layout.batch, state.shape[-1])
        for name, state in call.initial.items()
    }
    return [zeros] * part.layers
