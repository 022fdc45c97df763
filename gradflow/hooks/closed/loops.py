"""A closed loop: its parts, and which of its calls make one step.

A step of the loop goes from one call of the part that is called least often to its next; the joint
state at its end is what every part returned last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import RecordingError
from gradflow.hooks.closed.joint_source import JointSource
from gradflow.hooks.closed.parts import PartLayer, Seen
from gradflow.hooks.loops.layout import Part
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.tapped import Mark
from gradflow.hooks.wide import GivenStep, ThroughStep, WideStep
from gradflow.recording import Backward, Operator, ThinOperator, Track

State = dict[int, Seen]  # id of a part -> its last step


@dataclass(eq=False)
class ClosedLoop:
    """What is known of one closed loop."""

    parts: list[Any]  # StockPart or MarkedPart
    source: JointSource
    # id of a part and place of a step whose input descends from the loop
    depending: set[tuple[int, int]] = field(default_factory=set)
    own: bool = False  # the state is that of one layer, which is judged under its own name
    track: Track | None = None  # of the joint state of several
    unknown: str = ""  # why there is no joint state
    # of the state of one layer: call -> A, cut
    read: dict[int, tuple[Tensor | WideStep, Tensor]] = field(default_factory=dict)
    anchor: Any = None
    ended: State = field(default_factory=dict)  # the joint state at the end of what was read
    slots: list[tuple[tuple[int, ...], object]] | None = None  # shape, dtype of what else crosses
    begun: bool = False

    @property
    def holder(self) -> str:
        """The path of the module that holds all its layers; "" for the model itself."""
        paths = [part.path.split(".")[:-1] for part in self.parts]
        levels = zip(*paths, strict=False)
        return ".".join(names[0] for names in takewhile(lambda n: len(set(n)) == 1, levels))

    def how(self) -> str:
        """How much of it is closed, in words."""
        owners = dict.fromkeys(part.path or "the model" for part in self.parts)
        over = f"the loop over {' and '.join(owners)} is closed"
        if len(self.parts) > 1:
            return f"{over}: each depends on what the others returned"
        if not self.depending and self.source.one_system:
            return f"{over}: each of its sequences depends on others"
        if not self.depending:
            return f"{over}: its steps depend on more of its past than the states before"
        return (
            f"{over} (at {len(self.depending)} of {self.parts[0].count} calls its input depends on its "
            "own earlier states)"
        )

    # -- what the tracks of its layers read ----------------------------------------------------

    def direct(self, part: LoopSource) -> Tensor | None:
        """(T, B, P): what reaches h of a layer not through the next step of the loop."""
        source = self._joint(part)
        return None if source is None else source.direct_of(self._names(part)["h"])

    def last(self, part: LoopSource) -> Backward | None:
        """Total gradients of the last loss step alone."""
        source = self._joint(part)
        found = None if source is None else source.last()
        return None if found is None else self._of(part, found)

    def reached(self, part: LoopSource) -> Tensor | None:
        """(T, B): where the loss reaches the loop's states."""
        source = self._joint(part)
        return None if source is None else source.reached()

    def loss_steps(
        self, part: LoopSource, sequences: Tensor, steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps."""
        source = self._joint(part)
        found = None if source is None else source.loss_steps(sequences, steps, dtype)
        return None if found is None else self._of(part, found)

    def operator(self, part: LoopSource, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Step Jacobians of the whole step, where the state is that of one layer.

        Raises:
            RecordingError: the joint state is another track's, or is not known.
        """
        source = self._joint(part)
        if not self.own or source is None or self.why():
            raise self.refuse(self._member(part).track, stock=True)
        found = source.operator(dtype, sequences)
        if part.loop.why_no_operator():
            return found
        device = part.calls[0].h0.device
        alone = part.loop.operator(part.layer, dtype, sequences.to(device))
        kind = OwnThin if isinstance(found, ThinOperator) else OwnOperator
        return kind(found, alone, found.length, found.batch, found.size, found.dtype)

    def _member(self, part: LoopSource) -> PartLayer:
        return self.source.member_of(part.loop.chain, part.layer)

    def _names(self, part: LoopSource) -> dict[str, str]:
        return self._member(part).names

    def _of(self, part: LoopSource, found: Backward) -> Backward:
        names = self._names(part)
        return Backward({s: found.grads[name] for s, name in names.items()}, None, None, None)

    def _joint(self, part: LoopSource) -> JointSource | None:
        """The joint state, if its steps and sequences are those of the layer."""
        if self.unknown or self.source.one_system:
            return None
        if self.own:
            with torch.no_grad():
                self._mark_own(part)
            return self.source
        fits = len(self.source.marks) == sum(part.loop.chain.sizes)
        return self.source if fits and self.source.layout.is_that_of(part.loop.layout) else None

    def _mark_own(self, part: LoopSource) -> None:
        """One mark per call: as read from the graph, in closed form where the input is given."""
        source, chain = self.source, self.parts[0].chain
        if len(source.marks) == len(chain.calls) or not chain.calls:
            return
        member = source.members[0]
        source.marks, source.ends, source.lengths = [], [], chain.lengths
        source.layout = chain.layout
        closed_form = None
        wide = any(isinstance(step, WideStep) for step, _ in self.read.values())
        reason = part.loop.why_no_operator()
        if not reason:
            every = torch.arange(chain.batch, device=chain.calls[0].h0.device)
            closed_form = part.loop.operator(part.layer, torch.float64, every)
        for place, (call, link) in enumerate(zip(chain.calls, chain.links, strict=True)):
            jacobian, cut = self.read.get(place, (None, None))
            if cut is None:
                none = torch.zeros(call.h0.shape[1], dtype=torch.bool, device=call.h0.device)
                cut = none if link is None else link.cut
            mark = Mark(
                states={name: call.returned[state][0] for state, name in member.names.items()},
                grad_enabled=call.grad_enabled,
                differentiable=call.differentiable,
                cut=cut,
                jacobian=jacobian,
                within=_within(part, place, wide=wide) if call.totals else None,
            )
            if jacobian is None and place:
                if closed_form is None:
                    mark.unknown = reason
                elif wide:
                    mark.jacobian = GivenStep(closed_form, place)
                else:
                    mark.jacobian = _written_out(closed_form, chain.layout.parts[place], cut.device)
            source.marks.append(mark)
            source.ends.append({self.parts[0]: place})

    def refuse(self, name: str, *, stock: bool = False) -> RecordingError:
        """Why a track of the loop has no step Jacobians, or none of its own."""
        alone = f"; recording[{name!r}].alone has those of the layer with its inputs held fixed"
        return RecordingError(f"{name}: {self.instead()}{alone if stock else ''}")

    def instead(self) -> str:
        """What to say in place of the step Jacobians of one of its parts."""
        reason = self.why()
        if reason:
            return f"{self.how()}, and {reason}"
        assert self.track is not None
        return (
            f"it is a part of {self.track.name}, a closed loop that is judged as one; read "
            f"recording[{self.track.name!r}]"
        )

    def why(self) -> str:
        """Why the step Jacobians of the whole are not known, a clause, or nothing."""
        return self.unknown or self.source.why_no_operator()

    def note(self, name: str) -> str:
        """What a reader of one of its tracks should know."""
        reason = self.why()
        if reason:
            return f"no gains or verdict of {name}: {self.how()}, and {reason}; totals are exact all the same"
        if self.own:
            return f"{self.how()}: gains and verdict are those of the whole step"
        assert self.track is not None
        return (
            f"{name} is a part of {self.track.name} ({self.how()}): gains and verdict are those of "
            "its joint state"
        )


def _within(part: LoopSource, place: int, *, wide: bool) -> Tensor | WideStep:
    """M of a cell whose h is made of its c, and moves with it, (B, S, S) or a map."""
    through = part.loop.once(
        "through",
        lambda: part.loop.per_call([g.replay.steps(0, 0).made_of()["c"] for g in part.loop.groups]),
    )[place][0]
    width = through.shape[1]
    if wide:
        return ThroughStep(through)
    found = through.new_zeros(len(through), 2 * width, 2 * width)
    found[:, :width, width:] = torch.diag_embed(through)
    return found


def _written_out(steps: Operator, part: Part, device: torch.device) -> Tensor:
    """A, (b, S, S), of one call of one step."""
    eye = torch.eye(steps.size, dtype=steps.dtype, device=device).expand(steps.batch, -1, -1)
    found = eye.new_zeros(len(part.sequences), steps.size, steps.size)
    for t in part.starts.unique().tolist():
        here = (part.starts == t).to(device)
        found[here] = steps.push(t, eye)[part.sequences.to(device)[here]].mT
    return found


@dataclass(frozen=True)
class OwnOperator:
    """The closed loop of one layer: dense step Jacobians, but for the first step, from s_0 to s_1."""

    loop: Operator
    alone: Operator  # of the first step
    length: int  # T
    batch: int  # B
    size: int  # S
    dtype: torch.dtype  # of its blocks

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        return (self.loop if t else self.alone).push(t, block)

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        return (self.loop if t else self.alone).pull(t, block)


@dataclass(frozen=True)
class OwnThin(OwnOperator):
    """The same of a wide layer, through which few vectors at a time can be sent."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of one vector of every sequence through one step."""
        assert isinstance(self.loop, ThinOperator)
        return self.loop.seconds


def states_of(calls: Sequence[Seen], loop: ClosedLoop) -> list[State]:
    """The joint states of a loop, from its calls in the order in which they were made."""
    if loop.anchor is None:
        order = list(dict.fromkeys(seen.part for seen in calls))
        count = {id(part): sum(seen.part is part for seen in calls) for part in order}
        loop.anchor = min(order, key=lambda part: count[id(part)])
    found: list[State] = []
    current: State = dict(loop.ended)
    begun = bool(loop.ended)
    for seen in calls:
        if seen.part is loop.anchor:
            if begun and len(current) == len(loop.parts):
                found.append(dict(current))
            begun = True
        current[id(seen.part)] = seen
    if begun and len(current) == len(loop.parts):
        found.append(current)
    return found
