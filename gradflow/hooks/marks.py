"""Marks: the states of one loop, step by step, and how each step came from the one before.

What `tap` marks and what a cell of the user's own returns go the same way: states are copied,
gradients that reach them are added up, the step Jacobian is read from the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.dense import Incomplete, Place, Step, within
from gradflow.hooks.graph import Edge, NotReadable
from gradflow.hooks.lengths import GivenLengths
from gradflow.hooks.loops.links import probe_of
from gradflow.hooks.loops.rows import picked
from gradflow.hooks.tape import Constants, TooMuch
from gradflow.hooks.tapped import Mark, TapSource
from gradflow.hooks.wide import MOVED, Moved, WideStep, wide_step, wide_within
from gradflow.limits import JACOBIAN_WIDEST
from gradflow.recording.track import CUT_KINDS, Track


class TrackOwner(Protocol):
    """The recorder, as far as a new track needs it."""

    training: bool

    def add_track(self, base: str, track: Track) -> None: ...


class MarkOwner(TrackOwner, Protocol):
    """The recorder, as far as marked loops need it."""

    handles: list[RemovableHandle]
    jacobians: bool | None
    lengths: GivenLengths

    def scale(self) -> float: ...
    def wants_track(self, name: str) -> bool: ...
    def saw_mark(self, source: TapSource, track: Track, place: Place, mark: Mark) -> None: ...
    def marked_at(self, edges: Iterable[Edge], source: TapSource) -> None: ...


@dataclass(eq=False)
class LastMark:
    """The last marked step of a loop, with live tensors: what the next one may have come from."""

    source: TapSource
    track: Track
    states: dict[str, Tensor]
    place: Place
    number: int  # of the graph nodes made so far
    since: int  # number of the oldest node of the step before
    older: set[Any] = field(default_factory=set)  # nodes of all steps before
    frames: tuple[FrameType | None, ...] = ()  # of a tap: the one that tapped, and its caller's


class Marks:
    """Makes, links and listens to the marks of loops."""

    def __init__(self, owner: MarkOwner) -> None:
        self.owner = owner
        self.constants = Constants()  # of wide steps

    @staticmethod
    def new(place: Place, rows: dict[str, Tensor]) -> Mark:
        """A mark of states that sit at this place."""
        return Mark(
            states=rows,
            grad_enabled=torch.is_grad_enabled(),
            differentiable=bool(place.edges),
            cut=torch.zeros(len(place.like), dtype=torch.bool, device=place.like.device),
            axes=place.axes,
        )

    def begin(
        self, name: str, source: TapSource, states: dict[str, Tensor], place: Place
    ) -> LastMark:
        """A loop whose first mark is the only one of the source."""
        source.lengths = self.owner.lengths.of_steps(len(place.like))
        track = begun(self.owner, name, source)
        return LastMark(source, track, states, place, newest(), 0)

    @staticmethod
    def extend(end: LastMark, mark: Mark) -> None:
        """One more step."""
        end.source.marks.append(mark)
        grown(end.source, end.track)

    def settle(self, end: LastMark, states: dict[str, Tensor], place: Place, mark: Mark) -> None:
        """What these states pass to one another, and from now on they are the end of the loop."""
        if self.wanted and not mark.unknown and not mark.within_known:
            self.read_within(end.source, place, mark)
        self.owner.handles += end.source.listen(mark, place.edges)
        self.owner.marked_at(place.edges.values(), end.source)
        end.since = end.place.since if end.place.edges else end.number
        end.older |= end.place.nodes
        if bool(mark.cut.all()):
            end.older.clear()
        end.states, end.place, end.number = states, place, newest()
        self.owner.saw_mark(end.source, end.track, place, mark)

    @property
    def wanted(self) -> bool:
        """Whether step Jacobians are taken at all."""
        return self.owner.jacobians is not False

    def wide(self, place: Place) -> bool:
        """Whether those of states of this width are kept as products, and not written out."""
        return self.owner.jacobians is None and place.like.shape[1] > JACOBIAN_WIDEST

    @staticmethod
    def _why_not() -> str:
        return "jacobians=False; leave it out, or ask for them with jacobians=True"

    def by_graph(self, end: LastMark, place: Place, mark: Mark) -> bool:
        """Whether a path leads from these states back to the last ones; it is put on the mark."""
        words = end.source.words
        try:
            return self._read(end, place, mark)
        except Incomplete as error:
            mark.unknown = f"{error}, so {words.more}"
        except (TooMuch, Moved) as error:
            mark.unknown = str(error)
        except NotReadable as error:
            mark.unknown = f"{error} between two {words.steps}"
        # of another batch it goes on only if it is known which sequences they are
        return mark.rows is not None or len(end.place.like) == len(place.like)

    def _read(self, end: LastMark, place: Place, mark: Mark) -> bool:
        step = Step.find(end.place, place, end.older, end.since)
        if step is None:
            return False
        mark.cut_kind = CUT_KINDS.index("masked or reset")
        if end.place.twice or place.twice:
            mark.unknown = "a tap that was given one tensor as two states; give each its own"
        elif self.wanted and not self.wide(place):
            try:
                mark.jacobian = step.jacobian()
            finally:
                mark.rows = step.rows
            mark.cut = step.cut(mark.jacobian.flatten(1).any(1))
        else:
            moved = len(place.like) != len(end.place.like)
            if moved:
                step.find_rows()
            mark.rows = step.rows
            pulled = picked(step.pull(probe_of(place.like)), step.rows, 0)
            mark.cut = step.cut((pulled != 0).any(1))
            if self.wanted and (moved or not end.source.layout.even):
                mark.unknown = MOVED
            elif self.wanted:
                mark.jacobian = wide_step(step, self.constants, len(end.source.marks))
            else:
                mark.unknown = self._why_not()
        return mark.rows is not None or len(place.like) == len(end.place.like)

    def without_graph(self, end: LastMark, place: Place, mark: Mark) -> None:
        """No path leads back: a detached state, or no graph at all."""
        if torch.is_grad_enabled() and (place.edges or end.place.edges):
            mark.cut = torch.ones_like(mark.cut)
            mark.cut_kind = CUT_KINDS.index("detached or reset")
            if not self.wanted:
                mark.unknown = self._why_not()
            elif self.wide(place):
                mark.jacobian = WideStep()
            else:
                size = place.like.shape[1]
                mark.jacobian = place.like.new_zeros(len(place.like), size, size)
            return
        mark.unknown = "states that need no gradient; run the loop with gradients enabled"

    def read_within(
        self, source: TapSource, place: Place, mark: Mark, constants: Constants | None = None
    ) -> None:
        """What these states pass to one another; constants are where copies of wide ones are kept.

        Where they are given and too few, it is left for later, when the loop is known.
        """
        try:
            if not place.twice and self.wide(place):
                mark.within = wide_within(place, constants or self.constants)
            elif not place.twice:
                mark.within = within(place)
            mark.within_known = True
        except TooMuch as error:
            mark.unknown = "" if constants is not None else str(error)
        except NotReadable as error:
            mark.unknown = f"{error} between two states of one {source.words.step}"


def begun(recorder: TrackOwner, base: str, source: TapSource, **more: Any) -> Track:
    """The new track of a loop that has its first mark, under a name of its own."""
    cut = source.marks[0].cut
    source.layout.join(len(cut))
    source.layout.note_cut(0, cut, source.marks[0].cut_kind)
    track = Track(
        name=base,
        cell=source.cell,
        reverse=False,
        lengths=torch.ones(len(cut), dtype=torch.long, device=cut.device),
        mask=torch.ones(1, len(cut), dtype=torch.bool, device=cut.device),
        cuts=cut.unsqueeze(0),
        weights={},
        source=source,
        training=recorder.training,
        **more,
    )
    recorder.add_track(base, track)
    source.name = track.name
    return track


def grown(source: TapSource, track: Track) -> None:
    """The track of a loop that has one more mark."""
    mark = source.marks[-1]
    source.layout.join(len(mark.cut), rows=mark.rows)
    source.layout.note_cut(len(source.layout.extents) - 1, mark.cut, mark.cut_kind)
    track.grow(source.shape)


def newest() -> int:
    """The number that the next node of the graph will have."""
    return int(torch._C._autograd._get_sequence_nr())
