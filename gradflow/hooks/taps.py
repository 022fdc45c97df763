"""`tap`: a loop without a cell module marks its states, and they become a track."""

from __future__ import annotations

import functools
import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import InputError, must_be
from gradflow.hooks import patch
from gradflow.hooks.by_value import is_among
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import Between, saved_by, saved_tensors_are_hooked
from gradflow.hooks.guard import WRAPPED, Point, guarded, is_wrapped, why_hidden
from gradflow.hooks.marks import LastMark, MarkOwner, Marks
from gradflow.hooks.own.returned import leaves
from gradflow.hooks.tapped import Mark, TapSource

ADVICE = "call it as h, c = gradflow.tap(h=h, c=c) inside the loop, once per step"


def tap(name: str = "loop", /, **states: Any) -> Any:
    """Mark the states of a hand-written loop, once per step; they are returned as they are.

    Outside a recording nothing happens. Inside one, the taps of one name form the track `name`:
    s_t = (h_t, c_t, ...) in tap order, totals ∂L/∂h_t, ∂L/∂c_t as autograd has them, and step
    Jacobians A_t = ∂s_t/∂s_{t−1} of all marked states as independent arguments, read from the graph
    at the tap; beyond 64 units as products, see ``jacobians`` of `gradflow.record`. Every state that
    the loop carries must be marked, where it enters the next step. A_t of the first tap is the
    identity, as nothing is seen before it. A loop whose first states come from no earlier tap is a
    track of its own, ``name@2``; every open recording of the thread sees the tap.

    Args:
        name: of the track.
        states: tensors (B, width), or (width,) without a batch, by the names they shall have; lists,
            tuples and dicts of such tensors, whose states are named after their places: ``h_0``.

    Returns:
        What was given, or a tuple of it in the order given.

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
    if patch.is_observed():
        _tell(name, states)
    return _untold(name, **states)


def _untold(name: str = "loop", /, **states: Any) -> Any:
    """The same without a recording, and for torch.compile, whose graphs stay what they are."""
    values = tuple(states.values())
    if not values:
        raise InputError(must_be("the states of tap", "at least one tensor", "none", ADVICE))
    return values[0] if len(values) == 1 else values


patch.traced_as(_untold, tap)


@patch.untraced
def _tell(name: str, states: dict[str, Any]) -> None:
    # a checkpoint that computes again: the tensors of its first run are those already marked
    if torch._C._current_graph_task_id() != -1:
        return
    for observer in patch.observers_here():
        missed = functools.partial(observer.missed_tap, name)
        guarded(Point.TAP, missed, _show, observer, name, states)


def _one_by_one(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors that were given, those in containers by key and place."""
    states: dict[str, Any] = {}
    for key, value in given.items():
        for path, tensor in (leaves(value) or {(): value}).items():
            name = "_".join([key, *(str(part) for part in path)])
            while name in states or (path and name in given):
                name += "_"
            states[name] = tensor
    return states


def _show(observer: patch.Observer, name: str, given: dict[str, Any]) -> None:
    hidden, states = why_hidden(), _one_by_one(given)
    if any(isinstance(state, Tensor) and is_wrapped(state) for state in states.values()):
        hidden = hidden or WRAPPED
    if hidden:
        observer.did_not_see(name, hidden)
    elif states:
        observer.saw_tap(name, states, _rows(name, states), callers_frame(tap.__code__))


def callers_frame(code: CodeType) -> FrameType:
    """The frame that called the function of this code; torch.compile may have put its own between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame.f_back or frame


def place_of(frame: FrameType) -> tuple[object, ...]:
    """Where a mark stands: the line, and the module whose code it is in."""
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return code.co_filename, frame.f_lineno, id(owner) if isinstance(owner, nn.Module) else None


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


class Taps:
    """The loops that are being tapped, by name and by the module whose code taps."""

    def __init__(self, owner: MarkOwner) -> None:
        self.owner = owner
        self.marks = Marks(owner)
        self.seen = False  # also where no track was wanted
        self._ends: dict[tuple[str, object], LastMark] = {}

    def saw(
        self, name: str, states: dict[str, Tensor], rows: dict[str, Tensor], frame: FrameType
    ) -> None:
        """One tap: the next step of an open loop, or the first of a new one."""
        self.seen = True
        if not self.owner.wants_track(name):
            return
        place = Place.of(states, rows)
        mark = Marks.new(place, rows)
        key = name, place_of(frame)[2]
        # a loop may go on in another module's code; what taps once a call may be layers of one class
        others = [e for (n, _), e in self._ends.items() if n == name and len(e.source.marks) > 1]
        end = self._ends.get(key) or (others[-1] if others else None)
        if end is not None and self._goes_on(end, states, place, mark, frame):
            Marks.extend(end, mark)
        else:
            source = TapSource(self.owner.scale, name, marks=[mark])
            end = self.marks.begin(name, source, states, place)
            end.track.code = place_of(frame)
        self._ends[key] = end
        self.marks.settle(end, states, place, mark)
        # where a state is outside the graph, only the place of the loop tells that it goes on
        end.frames = (frame, frame.f_back)

    def close(self) -> None:
        """Release the user's tensors, graph and frames."""
        self._ends.clear()

    def _goes_on(
        self, end: LastMark, states: dict[str, Tensor], place: Place, mark: Mark, frame: FrameType
    ) -> bool:
        """Whether these states come from those of the last tap; if so, how is put on the mark."""
        if end.place.parts != place.parts:
            return False
        if self.marks.by_graph(end, place, mark):
            return True
        if len(end.place.like) != len(place.like):
            return False
        if not _by_value(end, states, place, mark, frame):
            return False
        self.marks.without_graph(end, place, mark)
        return True


# -------------------------------------------------------------------- without a path in the graph


def _by_value(
    end: LastMark, states: dict[str, Tensor], place: Place, mark: Mark, frame: FrameType
) -> bool:
    """Whether the loop goes on although no path leads back: by storage, values, or its place."""
    before = end.source.marks[-1].states
    if place.edges and end.place.edges:
        given = [*states.values(), *_saved(place, end.place.since)]
        return is_among(given, end.states, before)
    if torch.is_grad_enabled() and end.place.edges:
        first = end.source.marks[0].states
        fresh = all(not bool(row.any()) for row in mark.states.values())
        if fresh or all(torch.equal(first[name], row) for name, row in mark.states.items()):
            return False  # from the start again
    if place.edges and is_among(_saved(place, end.number), end.states, before):
        return True
    if is_among(states.values(), end.states, before):
        return True
    known, above = end.frames
    assert known is not None
    by_a_helper = frame.f_back is not None and frame.f_back is above
    return frame is known or (by_a_helper and frame.f_code is known.f_code)


def _saved(place: Place, since: int) -> list[Tensor]:
    """What the operations since then kept for their backward: a detached state is among it."""
    if saved_tensors_are_hooked():
        return []
    nodes = Between(list(place.edges.values()), set(), since).seen
    return [tensor for node in nodes for tensor in saved_by(node)]
