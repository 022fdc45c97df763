"""Cells of the user's own, found by the fact that what they return comes back as their argument.

A module is a cell if one of the tensors that it returned is an argument of its next call, directly or
after no more than `comeback` allows. Such calls are the steps of a loop: the tensors that come back
are its states, marked where the cell returns them, and read as those of `gradflow.tap` are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.hooks import forwards
from gradflow.hooks.again import Given, first_jacobian
from gradflow.hooks.around import Around
from gradflow.hooks.comeback import Output, came_back, handed_on
from gradflow.hooks.dense import Incomplete, Place
from gradflow.hooks.graph import NotReadable, edge_of
from gradflow.hooks.leaves import Path, arguments, leaves, named
from gradflow.hooks.marks import End, Marks, Owner
from gradflow.hooks.returned import LARGEST, key_of, likely_states, possible_states, row_of
from gradflow.hooks.tapped import Mark, TapSource
from gradflow.hooks.unseen import NO_NUMBERS, TRANSFORMED, has_no_numbers, why_not_read
from gradflow.recording import GATES, Track

# loops over one module that may be gone on with at the same moment: always the last 4, and all that
# were called in the last 64 calls
OPEN, WINDOW = 4, 64
DOUBTFUL = 16  # steps of a loop through a module's input, until it is no longer doubted
STOCK = ":"  # before a module's path: torch's own recurrent functions with its weights


class CellOwner(Owner, Protocol):
    """The recorder, as far as cells of the user's own need it."""

    def drop_tracks(self, tracks: list[Track]) -> None: ...


@dataclass(eq=False)
class _First:
    """A call that goes on with nothing known: perhaps the first step of a loop."""

    source: TapSource  # of one mark, its states by their paths
    outputs: dict[Path, Output]
    made_by: dict[Path, set[str]]  # inner modules whose results the outputs are
    handles: list[RemovableHandle]
    place: Place  # of those that may be states by their shapes
    given: Given | None  # None where it would keep much alive
    given_at: set[Path]  # where it was given tensors
    size: int  # entries that it keeps alive
    called: int  # which call of the module it was


@dataclass(eq=False)
class _Loop:
    """A loop over a cell, at its last call."""

    end: End
    states: dict[str, Path]  # state name -> where among what the cell returns
    entry: dict[str, Path]  # where they are among the arguments
    around: Around
    outputs: dict[Path, Output]
    given_at: set[Path]  # where the first of its calls was given tensors
    size: int
    called: int  # the last call of the module that was one of its steps
    # calls that each may yet begin a loop of its own, while the state seems to come in as the input
    doubts: list[_First] = field(default_factory=list)


@dataclass(eq=False)
class _Cell:
    """One module that may be a cell."""

    module: nn.Module
    owner: str  # its path in the model, "" for the model itself
    parameters: list[str]  # of its forward
    ignored: bool = False  # what it returns are states of another track
    calls: int = 0
    ends: list[_First | _Loop] = field(default_factory=list)
    tracks: list[Track] = field(default_factory=list)
    inputs: set[Path] = field(default_factory=set)  # arguments in which no state comes back

    @property
    def path(self) -> str:
        """The name of its tracks."""
        return self.owner or "cell"


@dataclass(eq=False)
class _Call:
    """A call under way."""

    cell: _Cell
    given: Given
    origin: _First | _Loop | None
    came: dict[Path, Path]
    inner: dict[str, list[Tensor]] = field(default_factory=dict)  # last results inside, by path


class OwnCells:
    """The modules of one model that may be cells, and the loops over those that are."""

    def __init__(self, owner: CellOwner, model: nn.Module, paths: dict[int, str]) -> None:
        self.owner = owner
        self.marks = Marks(owner)
        self.modules = [m for m in model.modules() if _may_be(m)]
        self._cells = {id(m): _Cell(m, paths[id(m)], _parameters(m)) for m in self.modules}
        self._under_way: list[_Call] = []
        self.seen = False  # also where no track was wanted
        self.unseen: dict[str, str] = {}  # modules whose calls could not be read -> why
        self.model_unseen: dict[str, str] = {}  # the same of the model itself
        self._like_cells: list[_Cell] = []

    # -- what the recorder calls -------------------------------------------------------------

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module is called; gives what `left` wants back."""
        cell = self._cells.get(id(module))
        if cell is None or cell.ignored or torch._C._current_graph_task_id() != -1:
            return None  # during a backward: a checkpoint's second run
        if _is_transformed():
            self._leave(cell, TRANSFORMED)
            return None
        if any(call.cell is cell for call in self._under_way):
            return None
        named_arguments = arguments(cell.parameters, args, kwargs)
        if any(has_no_numbers(tensor) for tensor in leaves(named_arguments).values()):
            self._leave(cell, NO_NUMBERS)
            return None
        given = Given.of(args, kwargs, named_arguments)
        call = _Call(cell, given, None, {})
        cell.calls += 1
        call.origin, call.came = self._origin(cell, given)
        self._under_way.append(call)
        return call

    def _origin(self, cell: _Cell, given: Given) -> tuple[_First | _Loop | None, dict[Path, Path]]:
        """The loop, or else the earlier call, that a call goes on with, and what came back where."""
        known = [(end.outputs, end.given_at) for end in cell.ends]
        came = list(zip(cell.ends, came_back(given.tensors, known, cell.inputs), strict=True))[::-1]
        for end, found in came:
            if isinstance(end, _Loop) and set(found.values()) & set(end.entry.values()):
                return end, found
        for end, found in came:
            if not found or not isinstance(end, _First):
                continue
            doubted = next((d for d in cell.ends if isinstance(d, _Loop) and end in d.doubts), None)
            if doubted is not None and not _was_the_input(doubted, given, found):
                continue
            if doubted is not None:
                self._take_back(cell, doubted)
                return self._origin(cell, given)
            return end, found
        return None, {}

    def _take_back(self, cell: _Cell, loop: _Loop) -> None:
        """One layer calls the module after the other: what comes in as the input is no state."""
        cell.inputs |= set(loop.entry.values())
        cell.ends.remove(loop)
        cell.tracks.remove(loop.end.track)
        self.owner.drop_tracks([loop.end.track])

    def _leave(self, cell: _Cell, reason: str) -> None:
        """Say why a module is not read; of the model itself only where nothing inside is named."""
        named_so = f"{cell.path} ({type(cell.module).__name__})"
        if cell.owner:
            self.unseen[named_so] = reason
        else:
            self.model_unseen[named_so] = reason

    def left(self, call: _Call, result: Any) -> None:
        """The call is over; result is None where it raised."""
        self._under_way.remove(call)
        if result is None or call.cell.ignored:
            return
        returned = leaves(result)
        self._tell_outer(call.cell.path, list(returned.values()))
        cell, origin = call.cell, call.origin
        if isinstance(origin, _Loop) and self._goes_on(origin, call.given, returned):
            _move_to_end(cell, origin)
            self._doubt(cell, origin, call, returned)
            return
        first = self._first(call, returned)
        if isinstance(origin, _First):
            loop = self._second(call, origin, returned)
            if cell.ignored:
                return
            if loop is not None:
                doubtful = _may_be_the_input(loop, origin)
                if doubtful:
                    loop.doubts = [one for one in (origin, first) if one is not None]
                    cell.ends += [] if first is None else [first]
                else:
                    cell.ends.remove(origin)
                    for handle in origin.handles:
                        handle.remove()
                    _let_go(first)
                cell.ends.append(loop)
                return
        if first is not None:
            cell.ends.append(first)
        while len(cell.ends) > OPEN and _is_over(cell):
            _let_go(cell.ends.pop(0))

    def _doubt(self, cell: _Cell, loop: _Loop, call: _Call, returned: dict[Path, Tensor]) -> None:
        """Each call of a doubtful loop may begin another one, up to as many as there are layers."""
        if not loop.doubts:
            return
        first = self._first(call, returned) if len(loop.doubts) < DOUBTFUL else None
        if first is not None:
            loop.doubts.append(first)
            cell.ends.insert(-1, first)
            return
        for doubt in loop.doubts:
            _let_go(doubt)
        cell.ends = [end for end in cell.ends if end not in loop.doubts]
        loop.doubts = []

    def saw_stock(self, owner: str, results: tuple[Tensor, ...]) -> None:
        """A recurrent function of torch's own ran, perhaps inside some of the modules."""
        self._tell_outer(STOCK + owner, list(results))

    def close(self) -> None:
        """Let go of the user's tensors and graph."""
        for cell in self._cells.values():
            for end in cell.ends:
                _let_go(end)
            nodes = [n for end in cell.ends if isinstance(end, _Loop) for n in end.end.older]
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
            if not cell.tracks
        }

    def _tell_outer(self, path: str, results: list[Tensor]) -> None:
        for call in self._under_way:
            call.inner[path] = results

    # -- the steps of a loop -----------------------------------------------------------------

    def _first(self, call: _Call, returned: dict[Path, Tensor]) -> _First | None:
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
        outputs = {p: Output(edge_of(t), row_of(t), t.shape) for p, t in tensors.items()}
        rows = {key_of(path): out.row for path, out in outputs.items()}
        edges = {key_of(path): out.edge for path, out in outputs.items() if out.edge is not None}
        place = likely_states(outputs, given.values())
        mark = Marks.new(place, rows)
        source = TapSource(self.owner.scale, cell=_cell_name(call.cell.module), marks=[mark])
        self._note_likeness(call, outputs)
        size = sum(t.numel() for t in given.values())
        if len(place.parts) > 1 and self.marks.wanted(place):
            Marks.read_within(
                source, place, mark
            )  # a backward may free the graph before it is known
        return _First(
            source=source,
            outputs=outputs,
            made_by={p: handed_on(outputs[p].edge, t, call.inner) for p, t in tensors.items()},
            handles=source.listen(mark, edges),
            place=place,
            given=call.given if size <= LARGEST else None,
            given_at=set(given),
            size=min(size, LARGEST) + sum(t.numel() for t in tensors.values()),
            called=call.cell.calls,
        )

    def _note_likeness(self, call: _Call, outputs: dict[Path, Output]) -> None:
        """Whether a tensor was returned that has the shape of an argument other than the first."""
        later = [tensor.shape for tensor in call.given.tensors.values()][1:]
        if any(out.shape in later for out in outputs.values()):
            self._like_cells.append(call.cell)

    def _second(self, call: _Call, first: _First, returned: dict[Path, Tensor]) -> _Loop | None:
        """The second step: by now the states are known, and whether they are this module's own."""
        came = {path: where for path, where in call.came.items() if path in returned}
        shapes = {path: first.outputs[path].shape for path in came}
        came = {path: w for path, w in came.items() if returned[path].shape == shapes[path]}
        came = _of_one_batch(came, first)
        if not came:
            return None
        cell = call.cell
        if self._hands_on(first, came):
            cell.ignored = True
            for end in cell.ends:
                _let_go(end)
            return None
        order = sorted(came, key=lambda path: list(call.given.tensors).index(came[path]))
        places = [came[path] for path in order]
        names = named(places if len(set(places)) == len(places) else order)
        states = dict(zip(names, order, strict=True))
        self.seen = True
        if not self.owner.wants_track(cell.path):
            cell.ignored = True
            return None
        self._hide_inner(call)
        loop = self._begin(cell, first, states, dict(zip(names, places, strict=True)))
        return loop if self._goes_on(loop, call.given, returned) else None

    def _hands_on(self, first: _First, came: dict[Path, Path]) -> bool:
        """Whether all the states are those of tracks inside this module."""
        known = {cell.path for cell in self._cells.values() if cell.tracks and not _is_plain(cell)}
        return all(
            any(maker in known or maker.startswith(STOCK) for maker in first.made_by[path])
            for path in came
        )

    def _hide_inner(self, call: _Call) -> None:
        """Of nested cells the outer one is kept: it carries all that those inside it do."""
        for cell in self._cells.values():
            if cell.path in call.inner:
                cell.ignored = True
                self.owner.drop_tracks(cell.tracks)
                cell.tracks.clear()

    def _begin(
        self, cell: _Cell, first: _First, states: dict[str, Path], entry: dict[str, Path]
    ) -> _Loop:
        source, guess = TapSource(self.owner.scale, cell=first.source.cell), first.source.marks[0]
        source.graph_tasks, source.second_order = (
            set(first.source.graph_tasks),
            first.source.second_order,
        )
        outputs = {name: first.outputs[path] for name, path in states.items()}
        rows = {name: out.row for name, out in outputs.items()}
        edges = {name: out.edge for name, out in outputs.items() if out.edge is not None}
        place = Place.at(edges, {name: out.shape for name, out in outputs.items()}, rows)
        mark = Marks.new(place, rows)
        mark.grad_enabled = guess.grad_enabled
        mark.differentiable = guess.differentiable
        if guess.within_known and set(first.place.parts) == {key_of(p) for p in states.values()}:
            mark.within_known, mark.within = True, guess.within
            if guess.within is not None:
                parts = [first.place.parts[key_of(path)] for path in states.values()]
                order = torch.cat([torch.arange(part.start, part.stop) for part in parts])
                mark.within = guess.within[:, order][:, :, order]
        mark.grads = {
            name: guess.grads[key_of(path)]
            for name, path in states.items()
            if key_of(path) in guess.grads
        }
        mark.unknown = guess.unknown
        source.marks = [mark]
        self._look_back(cell.module, source, first, entry, states, place, mark)
        end = self.marks.begin(cell.path, source, {}, place)
        end.track.owner = cell.owner
        cell.tracks.append(end.track)
        self.marks.settle(end, {}, place, mark)
        entered, values = _entering(first.given, entry, rows)
        around = Around(entered, place, values=values)
        return _Loop(
            end=end,
            states=states,
            entry=entry,
            around=around,
            outputs=first.outputs,
            given_at=first.given_at,
            size=sum(row.numel() for row in rows.values()),
            called=cell.calls,
        )

    def _look_back(
        self,
        module: nn.Module,
        source: TapSource,
        first: _First,
        entry: dict[str, Path],
        states: dict[str, Path],
        place: Place,
        mark: Mark,
    ) -> None:
        """The initial states, and how the first step depends on them."""
        given = first.given
        try:
            if given is None or len(set(entry.values())) < len(entry):
                raise NotReadable("arguments that do not give the initial states one by one")
            initial = {name: row_of(given.still(path)) for name, path in entry.items()}
            if any(row.shape != mark.states[name].shape for name, row in initial.items()):
                raise NotReadable("arguments that hold more or less than the initial states")
            source.initial = initial
            if self.marks.wanted(place) and mark.differentiable:
                mark.jacobian = first_jacobian(module, given, entry, states, mark.states)
        except NotReadable as error:
            source.remarks.append(
                "how its first step depends on the initial states is not known, and the identity "
                f"stands for it: {error}"
            )

    def _goes_on(self, loop: _Loop, given: Given, returned: dict[Path, Tensor]) -> bool:
        """One more step, if the module returned the states as it did before."""
        tensors = {name: returned.get(path) for name, path in loop.states.items()}
        known = loop.end.source.marks[-1].states
        states = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if len(states) < len(tensors):
            return False
        rows = {name: row_of(tensor) for name, tensor in states.items()}
        if any(rows[name].shape != known[name].shape for name in rows):
            return False
        place = Place.of(states, rows)
        mark = Marks.new(place, rows)
        entering, values = _entering(given, loop.entry, rows)
        mixed = loop.around.mixed or loop.around.goes_around(entering)
        if mixed and entering is not None and entering.edges and self.marks.wanted(place):
            self._goes_around(loop, entering, place, mark)
        elif not self.marks.by_graph(loop.end, place, mark):
            self.marks.without_graph(loop.end, place, mark)
        loop.around = loop.around.next(entering, values, place)
        Marks.extend(loop.end, mark)
        self.marks.settle(loop.end, {}, place, mark)
        loop.outputs = {
            path: Output(edge_of(states[name]), rows[name], states[name].shape)
            for name, path in loop.states.items()
        }
        return True

    @staticmethod
    def _goes_around(loop: _Loop, entering: Place, place: Place, mark: Mark) -> None:
        source = loop.end.source
        try:
            loop.around.read(source, entering, place, mark)
        except Incomplete as error:
            mark.unknown = f"{error}, so {source.words.more}"
        except NotReadable as error:
            mark.unknown = f"{error} between two calls"


def _entering(
    given: Given | None, entry: dict[str, Path], rows: dict[str, Tensor]
) -> tuple[Place | None, Tensor | None]:
    """Where the states that enter a call sit, if they are given one by one, and their values."""
    if given is None or len(set(entry.values())) < len(entry):
        return None, None
    tensors = {name: given.tensors[path] for name, path in entry.items() if path in given.tensors}
    values = {name: row_of(tensor) for name, tensor in tensors.items()}
    if any(name not in values or values[name].shape != row.shape for name, row in rows.items()):
        return None, None
    return Place.of(tensors, values), torch.cat(list(values.values()), dim=1)


# ------------------------------------------------------------------------------------ the modules


def _may_be(module: nn.Module) -> bool:
    """Whether a module may be a cell: it has weights, and a forward that is not torch's own."""
    return forwards.holder(module) is not None and next(module.parameters(), None) is not None


def _is_plain(cell: _Cell) -> bool:
    """Whether it is a container of torch's own: what it is called in is rather the cell."""
    return type(cell.module) is nn.Sequential


def _cell_name(module: nn.Module) -> str:
    """The class name; with its module where it is that of one of torch's own cells."""
    kind = type(module)
    taken = {*GATES, "tap", "RNN"}
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in taken else kind.__name__


def _parameters(module: nn.Module) -> list[str]:
    try:
        found: Callable[..., Any] = module.forward
        given = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _is_transformed() -> bool:
    """Whether this is a trace, or inside a transform of torch.func."""
    tracing = bool(torch.jit.is_tracing())
    return tracing or torch._C._functorch.peek_interpreter_stack() is not None


def _let_go(end: _First | _Loop | None) -> None:
    if isinstance(end, _First):
        for handle in end.handles:
            handle.remove()


def _move_to_end(cell: _Cell, loop: _Loop) -> None:
    loop.called = cell.calls
    cell.ends.remove(loop)
    cell.ends.append(loop)


def _is_over(cell: _Cell) -> bool:
    """Whether the end that was longest not gone on with is to be let go."""
    long_ago = cell.calls - cell.ends[0].called > WINDOW
    return long_ago or sum(end.size for end in cell.ends) > LARGEST


# -------------------------------------------------- one module as all layers, called step by step


def _may_be_the_input(loop: _Loop, first: _First) -> bool:
    """Whether states that came in as the first argument may be the output of the layer below.

    So it is where one module is all layers of a stack, each of which has another argument that
    could be its state.
    """
    if first.given is None:
        return False
    name = next(iter(first.given.named))
    shapes = {first.outputs[path].shape for path in loop.states.values()}
    others = [t for path, t in first.given.tensors.items() if path[0] != name]
    could_be = first.given.leaves_out() or any(t.shape in shapes for t in others)
    return could_be and {path[0] for path in loop.entry.values()} == {name}


def _was_the_input(loop: _Loop, given: Given, came: dict[Path, Path]) -> bool:
    """Whether a call that does not go on with a doubtful loop shows that it is none.

    A step of a layer came back in another argument, and the first is given something new. Were it a
    state, it would start here as it did before.
    """
    places = set(loop.entry.values())
    begin = loop.doubts[0].given
    if places & set(came.values()) or begin is None:
        return False
    return not all(
        place in given.tensors
        and given.tensors[place].shape == tensor.shape
        and torch.equal(given.tensors[place], tensor)
        for place in places
        if (tensor := begin.tensors.get(place)) is not None
    )


def _of_one_batch(came: dict[Path, Path], first: _First) -> dict[Path, Path]:
    """Those of the most common batch size, (B, ·) and (width,) apart."""
    sizes = [first.outputs[path].row.shape[0] for path in came]
    most = max(sizes, key=sizes.count, default=0)
    return {path: w for path, w in came.items() if first.outputs[path].row.shape[0] == most}
