"""`tap`: a loop without a cell module marks its states, and they become a track."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.errors import InputError, must_be
from gradflow.hooks import patch
from gradflow.hooks.dense import Incomplete, Place, Step, within
from gradflow.hooks.graph import Between, NotReadable, saved_tensors_are_hooked
from gradflow.hooks.links import probe_of
from gradflow.hooks.tapped import WIDEST, Mark, TapSource
from gradflow.recording import Track

ADVICE = "call it as h, c = gradflow.tap(h=h, c=c) inside the loop, once per step"


def tap(name: str = "loop", /, **states: Tensor) -> Any:
    """Mark the states of a hand-written loop, once per step; they are returned as they are.

    Outside a recording nothing happens. Inside one, the taps of one name form the track `name`:
    s_t = (h_t, c_t, ...) in tap order, totals ∂L/∂h_t, ∂L/∂c_t as autograd has them, and step
    Jacobians A_t = ∂s_t/∂s_{t−1} of all marked states as independent arguments, read from the graph
    at the tap; up to 64 units unasked, beyond with ``record(..., jacobians=True)``. Every state that
    the loop carries must be marked, where it enters the next step. A_t of the first tap is the
    identity, as nothing is seen before it. A loop whose first states come from no earlier tap is a
    track of its own, ``name@2``; every open recording of the thread sees the tap.

    Args:
        name: of the track.
        states: tensors (B, width), or (width,) without a batch, by the names they shall have.

    Returns:
        The tensor, or a tuple of the tensors in the order given.

    Raises:
        InputError: no state, a state that is no tensor, or, in a recording, other shapes.

    >>> import torch, gradflow
    >>> w = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(w.weight, 0.5)
    >>> with gradflow.record(w) as recording:
    ...     h = torch.ones(2, 1)
    ...     for _ in range(3):
    ...         h = gradflow.tap(h=w(h))
    ...     h.sum().backward()
    >>> recording["loop"].grad_h[:, 0, 0].tolist()   # 0.5 ** (T - t)
    [0.25, 0.5, 1.0]
    """
    values = tuple(states.values())
    if not values:
        raise InputError(must_be("the states of tap", "at least one tensor", "none", ADVICE))
    if patch.is_observed():
        _tell(name, states)
    return values[0] if len(values) == 1 else values


@patch.untraced
def _tell(name: str, states: dict[str, Tensor]) -> None:
    # a checkpoint that computes again: the tensors of its first run are those already marked
    if torch._C._current_graph_task_id() != -1:
        return
    observers = patch.observers_here()
    if not observers:
        return
    rows = _rows(name, states)
    for observer in observers:
        observer.saw_tap(name, states, rows, _callers_frame())


def _callers_frame() -> FrameType:
    """The frame that called `tap`; torch.compile may have put its own in between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not tap.__code__:
        frame = frame.f_back
    return frame.f_back or frame


def _rows(name: object, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies (B, width), after a look at what was given."""
    if not isinstance(name, str) or not name:
        raise InputError(must_be("the name given to tap", "a string", repr(name), ADVICE))
    for key, state in states.items():
        what = f"the state {key} of tap"
        if not isinstance(state, Tensor):
            raise InputError(must_be(what, "a tensor", type(state).__name__, ADVICE))
        if state.dim() > 2 or not state.is_floating_point() or not state.numel():
            kind = f"{state.dtype} of shape {tuple(state.shape)}"
            expected = "floating point of shape (B, width) or (width,)"
            raise InputError(must_be(what, expected, kind, "flatten(1) what is wider"))
    batches = {len(state) if state.dim() == 2 else None for state in states.values()}
    if len(batches) > 1:
        shapes = ", ".join(f"{key} {tuple(state.shape)}" for key, state in states.items())
        expected = "of one batch, all (B, width) or all (width,)"
        raise InputError(must_be("the states of tap", expected, shapes, "unsqueeze the odd one"))
    return {
        key: state.detach().reshape(len(state) if state.dim() == 2 else 1, -1).clone()
        for key, state in states.items()
    }


class Owner(Protocol):
    """The recorder, as far as taps need it."""

    handles: list[RemovableHandle]
    jacobians: bool | None
    training: bool

    def scale(self) -> float: ...
    def wants_track(self, name: str) -> bool: ...
    def lengths_of(self, batch: int) -> Tensor | None: ...
    def add_track(self, base: str, track: Track) -> None: ...


@dataclass(eq=False)
class _End:
    """The last tap of a loop, with live tensors: what the next one may have come from."""

    source: TapSource
    track: Track
    states: dict[str, Tensor]
    place: Place
    number: int  # of the graph nodes made so far
    since: int  # number of the oldest node of the tap before
    older: set[Any] = field(default_factory=set)  # nodes of all taps before
    frames: tuple[FrameType | None, ...] = ()  # the one that tapped, and its caller's


class Taps:
    """The loops that are being tapped, by name."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.sources: list[TapSource] = []
        self.seen = False  # also where no track was wanted
        self._ends: dict[str, _End] = {}

    def saw(
        self, name: str, states: dict[str, Tensor], rows: dict[str, Tensor], frame: FrameType
    ) -> None:
        """One tap: the next step of an open loop, or the first of a new one."""
        self.seen = True
        if not self.owner.wants_track(name):
            return
        place = Place.of(states, rows)
        mark = Mark(
            states=rows,
            grad_enabled=torch.is_grad_enabled(),
            differentiable=bool(place.edges),
            cut=torch.zeros(len(place.like), dtype=torch.bool, device=place.like.device),
        )
        end = self._ends.get(name)
        if end is not None and self._goes_on(end, states, place, mark, frame):
            self._extend(end, mark)
        else:
            end = self._begin(name, states, place, mark)
        if self._wanted(place) and not mark.unknown:
            self._read_within(place, mark)
        self.owner.handles += end.source.listen(mark, place)
        end.since = end.place.since if end.place.edges else end.number
        end.older |= end.place.nodes
        if bool(mark.cut.all()):
            end.older.clear()
        end.states, end.place, end.number = states, place, _newest()
        # where a state is outside the graph, only the place of the loop tells that it goes on
        end.frames = (frame, frame.f_back)

    def _begin(self, name: str, states: dict[str, Tensor], place: Place, mark: Mark) -> _End:
        batch, device = len(place.like), place.like.device
        lengths = self.owner.lengths_of(batch)
        source = TapSource(self.owner.scale, name, lengths, [mark])
        self.sources.append(source)
        track = Track(
            name=name,
            cell="tap",
            reverse=False,
            lengths=torch.ones(batch, dtype=torch.long, device=device),
            mask=torch.ones(1, batch, dtype=torch.bool, device=device),
            cuts=mark.cut.unsqueeze(0),
            weights={},
            source=source,
            training=self.owner.training,
        )
        self.owner.add_track(name, track)
        source.name = track.name
        self._ends[name] = _End(source, track, states, place, _newest(), 0)
        return self._ends[name]

    @staticmethod
    def _extend(end: _End, mark: Mark) -> None:
        source, track = end.source, end.track
        source.marks.append(mark)
        steps = len(source.marks)
        track.cuts = torch.cat([track.cuts, mark.cut.unsqueeze(0)])
        longest = torch.full_like(track.lengths, steps)
        lengths = source.lengths
        track.lengths = (
            longest if lengths is None else torch.minimum(longest, lengths.to(longest.device))
        )
        track.mask = torch.arange(steps, device=longest.device).unsqueeze(1) < track.lengths
        track._cache.clear()

    def close(self) -> None:
        """Let go of the user's tensors, graph and frames."""
        self._ends.clear()

    # -- one step ----------------------------------------------------------------------------

    def _wanted(self, place: Place) -> bool:
        if self.owner.jacobians is None:
            return place.like.shape[1] <= WIDEST
        return self.owner.jacobians

    def _why_not(self, place: Place) -> str:
        if self.owner.jacobians is None:
            return (
                f"a state {place.like.shape[1]} wide, and above {WIDEST} they are taken only on "
                "request; ask for them with gradflow.record(model, jacobians=True)"
            )
        return "jacobians=False; leave it out, or ask for them with jacobians=True"

    def _goes_on(
        self,
        end: _End,
        states: dict[str, Tensor],
        place: Place,
        mark: Mark,
        frame: FrameType,
    ) -> bool:
        """Whether these states come from those of the last tap; if so, how is put on the mark."""
        if end.place.parts != place.parts or len(end.place.like) != len(place.like):
            return False
        try:
            if self._by_graph(end, place, mark):
                return True
        except Incomplete as error:
            mark.unknown = str(error)
            return True
        except NotReadable as error:
            mark.unknown = f"{error} between two taps"
            return True
        if not _by_value(end, states, place, mark, frame):
            return False
        self._without_graph(end, place, mark)
        return True

    def _by_graph(self, end: _End, place: Place, mark: Mark) -> bool:
        step = Step.find(end.place, place, end.older, end.since)
        if step is None:
            return False
        if end.place.twice or place.twice:
            mark.unknown = "a tap that was given one tensor as two states; give each its own"
        elif self._wanted(place):
            mark.jacobian = step.jacobian()
            mark.cut = step.cut((mark.jacobian != 0).flatten(1).any(1))
        else:
            mark.unknown = self._why_not(place)
            mark.cut = step.cut((step.pull(probe_of(place.like)) != 0).any(1))
        return True

    def _without_graph(self, end: _End, place: Place, mark: Mark) -> None:
        """No path leads back: a detached state, or no graph at all."""
        if torch.is_grad_enabled() and (place.edges or end.place.edges):
            mark.cut = torch.ones_like(mark.cut)
            if self._wanted(place):
                size = place.like.shape[1]
                mark.jacobian = place.like.new_zeros(len(place.like), size, size)
            else:
                mark.unknown = self._why_not(place)
            return
        mark.unknown = "states that need no gradient; run the loop with gradients enabled"

    @staticmethod
    def _read_within(place: Place, mark: Mark) -> None:
        try:
            if not place.twice:
                mark.within = within(place)
        except NotReadable as error:
            mark.unknown = f"{error} between two states of one tap"


# -------------------------------------------------------------------- without a path in the graph


def _by_value(
    end: _End, states: dict[str, Tensor], place: Place, mark: Mark, frame: FrameType
) -> bool:
    """Whether the loop goes on although no path leads back: by storage, values, or its place."""
    before = end.source.marks[-1].states
    if place.edges and end.place.edges:
        since = end.place.since
        return _among([*states.values()], end, before) or _among(_saved(place, since), end, before)
    if torch.is_grad_enabled() and end.place.edges:
        first = end.source.marks[0].states
        fresh = all(not bool(row.any()) for row in mark.states.values())
        if fresh or all(torch.equal(first[name], row) for name, row in mark.states.items()):
            return False  # from the start again
    if place.edges and _among(_saved(place, end.number), end, before):
        return True
    if _among([*states.values()], end, before):
        return True
    known, above = end.frames
    assert known is not None
    by_a_helper = frame.f_back is not None and frame.f_back is above
    return frame is known or (by_a_helper and frame.f_code is known.f_code)


def _among(tensors: list[Tensor], end: _End, before: dict[str, Tensor]) -> bool:
    """Whether one of the tensors is a state of the last tap: by storage, or equal and not zero."""
    for tensor in tensors:
        for name, state in end.states.items():
            row = before[name]
            if tensor.layout != torch.strided or tensor.device != state.device:
                continue
            if tensor.numel() != state.numel():
                continue
            if tensor.untyped_storage().data_ptr() == state.untyped_storage().data_ptr():
                return True
            same = tensor.detach().reshape(row.shape).to(row.dtype) == row
            telling = bool((same & (row != 0)).any()) and tensor.shape == state.shape
            masked = same | (tensor.detach().reshape(row.shape) == 0)
            if telling and bool(masked.all()):
                return True
    return False


def _saved(place: Place, since: int) -> list[Tensor]:
    """What the operations since then kept for their backward: a detached state is among it."""
    if saved_tensors_are_hooked():
        return []
    found = []
    for node in Between(list(place.edges.values()), set(), since).seen:
        for name in dir(node):
            if not name.startswith("_saved_"):
                continue
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed, or changed in place since
                continue
            values = value if isinstance(value, (tuple, list)) else (value,)
            found += [v for v in values if isinstance(v, Tensor)]
    return found


def _newest() -> int:
    """The number that the next node of the graph will have, 0 where torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_sequence_nr", None)
    return int(tell()) if tell is not None else 0
