"""Cells of the user's own, found by the fact that what they return comes back as their argument.

A module is a cell if one of the tensors that it returned is an argument of its next call, directly or
after no more than `comeback` allows. Such calls are the steps of a loop: the tensors that come back
are its states, marked where the cell returns them, and read as those of `gradflow.tap` are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradflow.hooks.axes import Axis, alike, batch_axes, from_rows, is_stretched
from gradflow.hooks.guard import (
    NO_NUMBERS,
    WRAPPED,
    has_no_numbers,
    is_wrapped,
    why_hidden,
    why_not_read,
)
from gradflow.hooks.marks import MarkOwner, Marks
from gradflow.hooks.own.candidates import (
    Candidate,
    CellLoop,
    First,
    Given,
    UnderWay,
    axis_by_run,
    cell_name,
    is_over,
    is_plain,
    let_go,
    may_be,
    may_be_the_input,
    move_to_end,
    of_one_batch,
    parameters_of,
    was_the_input,
)
from gradflow.hooks.own.own_steps import OwnSteps
from gradflow.hooks.own.returned import (
    Output,
    Path,
    arguments,
    came_back,
    handed_on,
    key_of,
    leaves,
    likely_states,
    named,
    possible_states,
    row_of,
)
from gradflow.hooks.tape import Constants
from gradflow.hooks.tapped import TapSource
from gradflow.hooks.unrolled import sources
from gradflow.limits import DOUBTFUL, OPEN_CANDIDATES, PERHAPS, STATE_ENTRIES
from gradflow.recording.track import Track

STOCK = ":"  # before a module's path: torch's own recurrent functions with its weights


class CellOwner(MarkOwner, Protocol):
    """The recorder, as far as cells of the user's own need it."""

    def drop_tracks(self, tracks: list[Track]) -> None: ...


class OwnCells:
    """The modules of one model that may be cells, and the loops over those that are."""

    def __init__(self, owner: CellOwner, model: nn.Module, paths: dict[int, str]) -> None:
        self.owner = owner
        self.marks = Marks(owner)
        self.steps = OwnSteps(self.marks)
        self.modules = [m for m in nn.Module.modules(model) if may_be(m)]
        self._cells = {id(m): Candidate(m, paths[id(m)], parameters_of(m)) for m in self.modules}
        self._under_way: list[UnderWay] = []
        self.seen = False  # also where no track was wanted
        self.unseen: dict[str, str] = {}  # modules whose calls could not be read -> why
        self.model_unseen: dict[str, str] = {}  # the same of the model itself
        self._like_cells: list[Candidate] = []

    # -- what the recorder calls -------------------------------------------------------------

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module is called; gives what `left` wants back."""
        cell = self._cells.get(id(module))
        if cell is None or cell.ignored or torch._C._current_graph_task_id() != -1:
            return None  # during a backward: a checkpoint's second run
        hidden = why_hidden()
        if hidden:
            self._leave(cell, hidden)
            return None
        if any(call.cell is cell for call in self._under_way):
            return None
        named_arguments = arguments(cell.parameters, args, kwargs)
        if any(has_no_numbers(tensor) for tensor in leaves(named_arguments).values()):
            self._leave(cell, NO_NUMBERS)
            return None
        if any(is_wrapped(tensor) for tensor in leaves(named_arguments).values()):
            self._leave(cell, WRAPPED)
            return None
        given = Given.of(args, kwargs, named_arguments)
        call = UnderWay(cell, given, None, {})
        cell.calls += 1
        call.origin, call.came = self._origin(cell, given)
        self._under_way.append(call)
        return call

    def begin_again(self) -> None:
        """The model is called: what is still under way was given up."""
        self._under_way.clear()

    def is_outermost(self, call: Any) -> bool:
        """Whether no other call that is followed is under way around this one."""
        return self._under_way[0] is call

    def _origin(
        self, cell: Candidate, given: Given
    ) -> tuple[First | CellLoop | None, dict[Path, Path]]:
        """The loop, or else the earlier call, that a call goes on with, and what came back where."""
        known = [(end.outputs, end.given_at) for end in cell.ends]
        came = list(zip(cell.ends, came_back(given.tensors, known, cell.inputs), strict=True))[::-1]
        for end, found in came:
            if isinstance(end, CellLoop) and set(found.values()) & set(end.entry.values()):
                return end, found
        for end, found in came:
            if not found or not isinstance(end, First):
                continue
            doubted = next(
                (d for d in cell.ends if isinstance(d, CellLoop) and end in d.doubts), None
            )
            if doubted is not None and not was_the_input(doubted, given, found):
                continue
            if doubted is not None:
                self._take_back(cell, doubted)
                return self._origin(cell, given)
            return end, found
        through = [end for end in cell.ends if isinstance(end, CellLoop) and end.leads_to(given)]
        return (through[0], {}) if len(through) == 1 else (None, {})

    def _take_back(self, cell: Candidate, loop: CellLoop) -> None:
        """One layer calls the module after the other: what comes in as the input is no state."""
        cell.inputs |= set(loop.entry.values())
        cell.ends.remove(loop)
        cell.tracks.remove(loop.end.track)
        self.owner.drop_tracks([loop.end.track])

    def _leave(self, cell: Candidate, reason: str) -> None:
        """Say why a module is not read; of the model itself only where nothing inside is named."""
        named_so = f"{cell.path} ({type(cell.module).__name__})"
        if cell.owner:
            self.unseen[named_so] = reason
        else:
            self.model_unseen[named_so] = reason

    def tracks_of(self, module: nn.Module) -> list[Track]:
        """The loops over this module."""
        cell = self._cells.get(id(module))
        return [] if cell is None else list(cell.tracks)

    def leave(self, module: nn.Module) -> None:
        """Something failed at a call of this module: it is not followed any more."""
        cell = self._cells.get(id(module))
        if cell is None:
            return
        cell.ignored = True
        self._under_way = [call for call in self._under_way if call.cell is not cell]
        cell.tracks.clear()

    def left(self, call: UnderWay, result: Any) -> None:
        """The call is over; result is None where it raised."""
        self._under_way.remove(call)
        if result is None or call.cell.ignored:
            return
        returned = leaves(result)
        self._tell_outer(call.cell.path, list(returned.values()))
        cell, origin = call.cell, call.origin
        if isinstance(origin, CellLoop) and self.steps.goes_on(origin, call.given, returned):
            move_to_end(cell, origin)
            self._doubt(cell, origin, call, returned)
            return
        first = self._first(call, returned)
        if isinstance(origin, First):
            loop = self._second(call, origin, returned)
            if cell.ignored:
                return
            if loop is not None:
                doubtful = may_be_the_input(loop, origin)
                if doubtful:
                    loop.doubts = [one for one in (origin, first) if one is not None]
                    cell.ends += [] if first is None else [first]
                else:
                    cell.ends.remove(origin)
                    for handle in origin.handles:
                        handle.remove()
                    let_go(first)
                cell.ends.append(loop)
                return
        if first is not None:
            cell.ends.append(first)
        while len(cell.ends) > OPEN_CANDIDATES and is_over(cell):
            let_go(cell.ends.pop(0))

    def _doubt(
        self, cell: Candidate, loop: CellLoop, call: UnderWay, returned: dict[Path, Tensor]
    ) -> None:
        """Each call of a doubtful loop may begin another one, up to as many as there are layers."""
        if not loop.doubts:
            return
        first = self._first(call, returned) if len(loop.doubts) < DOUBTFUL else None
        if first is not None:
            loop.doubts.append(first)
            cell.ends.insert(-1, first)
            return
        for doubt in loop.doubts:
            let_go(doubt)
        cell.ends = [end for end in cell.ends if end not in loop.doubts]
        loop.doubts = []

    def saw_stock(self, owner: str, results: tuple[Tensor, ...]) -> None:
        """A recurrent function of torch's own ran, perhaps inside some of the modules."""
        self._tell_outer(STOCK + owner, list(results))

    def close(self) -> None:
        """Release the user's tensors and graph."""
        for cell in self._cells.values():
            for end in cell.ends:
                let_go(end)
            nodes = [n for end in cell.ends if isinstance(end, CellLoop) for n in end.end.older]
            for end in cell.ends:
                vars(end).clear()
            cell.ends.clear()
            # newest first, one step at a time: freed as one long chain they overflow the stack
            nodes.sort(key=lambda node: int(node._sequence_nr()))
            while nodes:
                nodes.pop()
        self._under_way.clear()

    @property
    def without_state(self) -> dict[str, int]:
        """Modules that take and return what could be a state, none of which came back -> calls."""
        return {
            f"{cell.path} ({type(cell.module).__name__})": cell.calls
            for cell in dict.fromkeys(self._like_cells)
            if not cell.tracks and not _is_no_cell(cell.module)
        }

    def loops_inside(self) -> dict[str, str]:
        """Modules that ran, are in no track and loop in their own forward -> where, in the source."""
        found = {}
        for cell in self._cells.values():
            if cell.calls and not cell.tracks and not cell.ignored:
                loop = sources.inside(cell.module)
                if loop is not None:
                    found[f"{cell.path} ({type(cell.module).__name__})"] = loop.where
        return found

    def kept_inside(self) -> dict[str, str]:
        """Modules called again and again that keep something in an attribute -> that attribute."""
        return {
            f"{cell.path} ({type(cell.module).__name__})": names[0]
            for cell in self._cells.values()
            if cell.calls > 1 and not cell.tracks and (names := sources.kept(cell.module))
        }

    def ignore(self, sources: list[TapSource]) -> None:
        """The modules of these loops are no cells."""
        for cell in self._cells.values():
            if any(track.source in sources for track in cell.tracks):
                cell.ignored = True
                self.owner.drop_tracks(cell.tracks)
                cell.tracks.clear()

    def _tell_outer(self, path: str, results: list[Tensor]) -> None:
        for call in self._under_way:
            call.inner[path] = results

    # -- the steps of a loop -----------------------------------------------------------------

    def _first(self, call: UnderWay, returned: dict[Path, Tensor]) -> First | None:
        """A call that may be the first step of a loop, listened to before it is known."""
        given = call.given.tensors
        tensors = possible_states(
            returned, given.values(), call.given.unchanged(), open_end=call.given.leaves_out()
        )
        if not tensors:
            reason = why_not_read(given.values(), returned.values())
            if reason:
                self._leave(call.cell, reason)
            return None
        outputs = {}
        for path, tensor in tensors.items():
            axis = self._axes(call.given, tensor.shape)[0]
            outputs[path] = Output.of(tensor, row_of(tensor, axis), axis)
        call.given.keep_views()
        rows = {key_of(path): out.row for path, out in outputs.items()}
        edges = {key_of(path): out.edge for path, out in outputs.items() if out.edge is not None}
        place = likely_states(outputs, given.values())
        mark = Marks.new(place, rows)
        source = TapSource(self.owner.scale, cell=cell_name(call.cell.module), marks=[mark])
        self._note_likeness(call, outputs)
        size = sum(t.numel() for t in given.values())
        if len(place.parts) > 1 and self.marks.wanted:
            # a backward may free the graph before it is known
            self.marks.read_within(source, place, mark, Constants(PERHAPS))
        return First(
            source=source,
            outputs=outputs,
            made_by={p: handed_on(outputs[p].edge, t, call.inner) for p, t in tensors.items()},
            handles=source.listen(mark, edges),
            place=place,
            given=call.given if size <= STATE_ENTRIES else None,
            given_at=set(given),
            size=min(size, STATE_ENTRIES) + sum(t.numel() for t in tensors.values()),
            called=call.cell.calls,
        )

    def _note_likeness(self, call: UnderWay, outputs: dict[Path, Output]) -> None:
        """Whether a tensor was returned that has the shape of an argument other than the first."""
        later = [tensor.shape for tensor in call.given.tensors.values()][1:]
        if any(out.shape in later for out in outputs.values()):
            self._like_cells.append(call.cell)

    def _second(
        self, call: UnderWay, first: First, returned: dict[Path, Tensor]
    ) -> CellLoop | None:
        """The second step: by now the states are known, and whether they are this module's own."""
        came = {path: where for path, where in call.came.items() if path in returned}
        known = {path: first.outputs[path] for path in came}
        came = {
            path: where
            for path, where in came.items()
            if alike(returned[path].shape, known[path].shape, known[path].axis)
        }
        self._tell_axes(call.cell, first, came)
        came = of_one_batch(came, first)
        if not came:
            return None
        cell = call.cell
        if self._hands_on(first, came):
            cell.ignored = True
            for end in cell.ends:
                let_go(end)
            return None
        order = sorted(came, key=lambda path: list(call.given.tensors).index(came[path]))
        places = [came[path] for path in order]
        names = named(places if len(set(places)) == len(places) else order)
        states = dict(zip(names, order, strict=True))
        self.seen = True
        if not self.owner.wants_track(cell.path):
            cell.ignored = True
            return None
        loop = self.steps.begin(cell, first, states, dict(zip(names, places, strict=True)))
        if not self.steps.goes_on(loop, call.given, returned):
            cell.tracks.remove(loop.end.track)
            self.owner.drop_tracks([loop.end.track])
            return None
        self._hide_inner(call)
        return loop

    @staticmethod
    def _axes(given: Given, shape: torch.Size) -> list[Axis]:
        shapes = [t.shape for t in given.tensors.values()]
        others = [other for other in shapes if other != shape]
        if len(shape) > 1 and shapes[:1] == [shape]:  # the others may be a first state, no input
            others = [other for other in others if not is_stretched(other, shape)]
        return batch_axes(shape, others)

    def _tell_axes(self, cell: Candidate, first: First, came: dict[Path, Path]) -> None:
        """Where as many layers as sequences are in a state, a run on a copy tells which is which."""
        for path in came:
            out = first.outputs[path]
            axes = [] if first.given is None else self._axes(first.given, out.shape)
            if len(axes) < 2 or first.given is None:
                continue
            axis = axis_by_run(cell.module, first.given, path, axes)
            mark, key = first.source.marks[0], key_of(path)

            def turned(rows: Tensor, out: Output = out, axis: Axis = axis) -> Tensor:
                return row_of(from_rows(rows, out.shape, out.axis), axis)

            first.outputs[path] = replace(out, row=turned(out.row), axis=axis)
            if key in mark.grads:
                mark.grads[key] = turned(mark.grads[key])
            if axis != out.axis:
                mark.within_known = False

    def _hands_on(self, first: First, came: dict[Path, Path]) -> bool:
        """Whether all the states are those of tracks inside this module."""
        known = {cell.path for cell in self._cells.values() if cell.tracks and not is_plain(cell)}
        return all(
            any(maker in known or maker.startswith(STOCK) for maker in first.made_by[path])
            for path in came
        )

    def _hide_inner(self, call: UnderWay) -> None:
        """Of nested cells the outer one is kept: it carries all that those inside it do."""
        for cell in self._cells.values():
            if cell.path in call.inner:
                cell.ignored = True
                self.owner.drop_tracks(cell.tracks)
                cell.tracks.clear()


def _is_no_cell(module: nn.Module) -> bool:
    """Whether its name says that it is something else, whatever it takes and returns."""
    name = type(module).__name__.lower()
    return any(word in name for word in ("norm", "embed", "dropout", "attention"))
