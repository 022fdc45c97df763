"""Before a backward runs: which recurrences its graph holds, and which of them are in no track."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable
from itertools import takewhile
from types import FrameType
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.ancestry import class_of, clean
from gradflow.hooks.graph import Edge, edge_of
from gradflow.hooks.guard import foreign_code, has_no_numbers
from gradflow.hooks.marks import MarkOwner, Marks, newest
from gradflow.hooks.own.candidates import cell_name
from gradflow.hooks.patch import something_is_compiled
from gradflow.hooks.tapped import TapSource
from gradflow.hooks.unrolled import sources
from gradflow.hooks.unrolled.chains import Recurrence, chains, recurrences, uses_of
from gradflow.hooks.unrolled.loop_states import LoopStates, NoRows, NoState, steps_of
from gradflow.hooks.unrolled.pieces import Piece
from gradflow.hooks.unrolled.sliced import loops_without_weight
from gradflow.hooks.unrolled.takeup import checked, take_up, with_rows
from gradflow.hooks.unrolled.values import Values
from gradflow.hooks.unrolled.weights import (
    computed_chains,
    frozen,
    frozen_chains,
    given_back,
    in_attributes,
    origin,
    when_whole,
)
from gradflow.hooks.unrolled.whole_graph import FAR, TooLarge, Unrolled, earliest, latest
from gradflow.limits import CALLER_FRAMES, HELD_ENTRIES, HELD_LOCALS, OPEN_PIECES
from gradflow.recording import Unseen

NOT_THEIRS = ("torch.nn.modules.module", "gradflow.", "torch._dynamo", "functools")
FUSED = ("MkldnnRnnLayer", "CudnnRnn", "MiopenRnn")


class WatchOwner(MarkOwner, Protocol):
    """The recorder, as far as loops written by hand need it."""

    def drop_sources(self, sources: list[TapSource]) -> None: ...
    def drop_cell(self, module: nn.Module) -> None: ...
    def in_closed_loop(self) -> bool: ...
    def is_told(self, weights: Collection[str]) -> bool: ...


class Watch:
    """What one recording knows of the graphs that backwards went through."""

    def __init__(self, owner: WatchOwner, model: nn.Module) -> None:
        self.owner = owner
        self.marks = Marks(owner)
        self.model = model
        self.modules = {clean(name): module for name, module in model.named_modules()}
        self.names = {
            id(parameter): clean(name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        # numbers of nodes that made states of some track -> its source, None for torch's own
        self.states: dict[int, TapSource | None] = {}
        self.scanned: set[int] = set()  # numbers of nodes that made all states of a track at once
        self.taken: set[int] = set()  # the same of loops that were taken up here
        self.taken_before: frozenset[int] = frozenset()  # those of earlier backwards
        self.walked: set[int] = set()  # numbers of nodes of earlier backwards
        # from and to which number backwards made nodes of their own, with create_graph=True
        self.differentiated: list[tuple[int, int]] = []
        self._since = -1
        self.given: dict[int, list[Edge]] = {}  # what recurrent functions of torch's were given
        self.fused: dict[str, nn.Module] = {}  # layers whose fused functions ran unseen, by path
        self.held = Held()
        self.pieces: dict[tuple[str, ...], list[Piece]] = {}  # names of weights -> loops over them
        self.unseen: dict[tuple[str, ...], Unseen] = {}
        self.whole: dict[int, Tensor] = {}  # weights of FSDP2 while a forward runs, by id

    def listen(self, failed: Callable[[str], object]) -> list[RemovableHandle]:
        """Learn the names of weights that stand in for the model's parameters; gives the hooks."""

        def note(name: str, weight: Tensor) -> None:
            self.whole[id(weight)] = weight
            self.names[id(weight)] = clean(name)

        return [] if something_is_compiled() else when_whole(self.modules, failed, note)

    def saw_stock(self, given: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """A recurrent function of torch's own ran: its inside is stepped over."""
        edges = [edge for tensor in given if (edge := edge_of(tensor)) is not None]
        for result in results:
            if result.grad_fn is not None:
                number = result.grad_fn._sequence_nr()
                self.given[number] = edges
                self.states[number] = None

    def marked(self, edges: Iterable[Edge], source: TapSource) -> None:
        """These are states of a track."""
        self.states.update((node._sequence_nr(), source) for node, _ in edges)

    def before_backward(self, roots: Iterable[Any], create_graph: bool) -> None:
        """Look at the graph of a backward that is about to run."""
        self._since = newest() if create_graph else -1
        self.taken_before = frozenset(self.taken)
        nodes = [node for root in roots if (node := _node_of(root)) is not None]
        try:
            graph = Unrolled(nodes, self.given)
        except TooLarge:
            return
        if self._is_second_order(graph):
            return
        weights = self._weights(graph)
        if any(has_no_numbers(graph.nodes[place].variable) for place in weights):
            return
        self._note_fused(graph, weights)
        numbers = set(graph.numbers)
        marked = self.states.keys() & numbers
        states = {p for p, n in enumerate(graph.numbers) if n in marked and self._is_state(n)}
        uses = uses_of(graph, weights)
        known = chains(graph, uses, states)
        known += computed_chains(graph, known, weights, states)
        for name, chain in frozen_chains(graph, frozen(self.modules), states):
            weights[chain.weight] = name
            known.append(chain)
        for found in recurrences(graph, known):
            if is_empty(graph, found) or self._is_around_stock(graph, found):
                continue
            own = [weights[chain.weight] for chain in found.chains if chain.weight in weights]
            names = list(dict.fromkeys(own))
            if names:
                self._found(graph, found, names)
                continue
            names = origin(graph, found.chains[0].weight, weights)
            if names:
                self._found(graph, found, names, computed=True)
        taken = states.union(*(chain.depth for chain in known))
        scanned = {place for place, number in enumerate(graph.numbers) if number in self.scanned}
        for tensor, found in loops_without_weight(graph, uses, taken, scanned):
            if not self._is_around_stock(graph, found):
                self._found(graph, found, origin(graph, tensor, weights), computed=True)
        here = {id(s): s for n in self.states.keys() & numbers if (s := self.states[n]) is not None}
        self.owner.drop_sources([s for s in here.values() if s.part_of_a_step])
        self.walked |= numbers
        self.held.clear()

    def after_backward(self) -> None:
        """That backward is over: what it made of nodes are gradients."""
        if self._since >= 0:
            self.differentiated.append((self._since, newest()))
            self._since = -1

    def _weights(self, graph: Unrolled) -> dict[int, str]:
        """The places of the model's own leaves, and their names."""
        leaves = {
            place: node.variable
            for place, node in enumerate(graph.nodes)
            if graph.is_leaf(place) and hasattr(node, "variable")
        }
        names = self.names
        if any(id(t) not in names and not isinstance(t, nn.Parameter) for t in leaves.values()):
            names = names | in_attributes(self.modules)
        return {place: names[id(t)] for place, t in leaves.items() if id(t) in names}

    def _note_fused(self, graph: Unrolled, weights: dict[int, str]) -> None:
        """Fused functions that ran unseen: what was seen is stepped over, and shows no weights."""
        for place, inputs in enumerate(graph.inputs):
            if len(inputs) < 2 or graph.kind(place) not in FUSED:  # two weights at least
                continue
            mine = [weights[child] for child, _ in inputs if child in weights]
            if mine:
                path = mine[0].rpartition(".")[0]
                if isinstance(self.modules[path], nn.RNNBase):
                    self.fused[path] = self.modules[path]

    def _is_second_order(self, graph: Unrolled) -> bool:
        """Whether a gradient is part of what is differentiated: such a graph holds every use twice."""
        return bool(self.differentiated) and any(
            start <= number < end for number in graph.numbers for start, end in self.differentiated
        )

    def _is_state(self, number: int) -> bool:
        source = self.states[number]
        return source is None or not source.part_of_a_step

    def close(self) -> None:
        """Release the user's graph."""
        self.given.clear()
        self.held.clear()
        self.pieces.clear()
        self.whole.clear()

    # -- one recurrence ----------------------------------------------------------------------

    def _found(
        self, graph: Unrolled, found: Recurrence, names: list[str], *, computed: bool = False
    ) -> None:
        """Take a loop up, or note that it is in no track and why."""
        if self.owner.is_told(names):
            return
        path, loop = self.place_of(names)
        self._drop_parts(graph, found)
        try:
            steps, rows = self._states(graph, found, names)
        except NoState as error:
            form = sources.FLAT if isinstance(error, NoRows) else sources.PLAIN
            if not (loop and loop.carried):
                holders = self.modules if computed else sorted(self._holders(names))
                keeping = [self.modules[holder] for holder in holders]
                loop = sources.keeping(keeping, getattr(error, "shape", ())) or loop
            self._note(found, [] if computed else names, path, loop, (str(error), form))
            return
        whose = self._cell_of(names, path) if something_is_compiled() else path
        name = whose or "loop"
        if self.owner.wants_track(name):
            code = tuple(sorted(names))
            open_ones = self.pieces.get(code, ()) if steps.begins else ()
            before = next((p for p in open_ones if p.goes_on(steps.edges[0])), None)
            known = self._called(steps) or _names(loop, len(steps.edges[0]))
            known = known if before is None else list(before.end.place.parts)
            cell = cell_name(self.modules[whose])
            numbers = {n._sequence_nr() for edges in steps.edges for n, _ in edges}
            self.taken |= numbers
            if before is not None:  # no cell, then: a whole piece ran at every call of it
                self.owner.drop_cell(self.modules[path])
            end = take_up(
                self.marks, name, cell, steps, known, rows, None if before is None else before.end
            )
            end.track.code = code
            end.track.notes += [f"{end.track.name}: {note}" for note in steps.notes]
            now = Piece(end, steps.edges[-1], rows[-1]) if steps.ends else None
            self._ended(code, before, now)

    def _ended(self, code: tuple[str, ...], before: Piece | None, now: Piece | None) -> None:
        """Remember how far a loop has come, instead of how far it had."""
        known = [piece for piece in self.pieces.get(code, []) if piece is not before]
        self.pieces[code] = ([] if now is None else [now]) + known[: OPEN_PIECES - 1]

    def _is_around_stock(self, graph: Unrolled, found: Recurrence) -> bool:
        """Whether calls of other tracks are part of it: a closed loop, which is told as one."""
        if not self.owner.in_closed_loop():
            return False
        marks = {place: 0 for chain in found.chains for place in chain.depth}
        since, until = earliest(graph, marks), latest(graph, marks)
        return any(
            since[place] < FAR and until[place] >= 0 and self._is_in_closed_loop(number)
            for place, number in enumerate(graph.numbers)
            if number in self.states
        )

    def _is_in_closed_loop(self, number: int) -> bool:
        source = self.states[number]
        return source is None or source.closed is not None

    def _drop_parts(self, graph: Unrolled, found: Recurrence) -> None:
        """Forget the loops over modules that are only part of a step of this one."""
        ends = [chain.numbers(graph) for chain in found.chains]
        first, last = min(start for start, _ in ends), max(end for _, end in ends)
        numbers = (n for n in graph.numbers if first <= n <= last and n in self.states)
        sources = {id(s): s for n in numbers if (s := self.states[n]) is not None}
        self.owner.drop_sources([s for s in sources.values() if s.part_of_a_step])

    def _states(
        self, graph: Unrolled, found: Recurrence, names: list[str]
    ) -> tuple[LoopStates, list[list[Tensor]]]:
        foreign = foreign_code([self.modules[path] for path in self._holders(names)])
        if foreign:
            raise NoState(foreign)
        uses = {place for chain in found.chains for place in chain.depth}
        numbers = [graph.numbers[place] for place in uses]
        if given_back(graph, min(numbers), max(numbers)):
            raise NoState(
                "fully_shard gave its weights back after its forward, and its steps are read right "
                "before the backward; with reshard_after_forward=False it keeps them"
            )
        if any(number in self.walked for number in numbers):
            raise NoState("an earlier backward went through it that was not recorded")
        taken = {p: 0 for p, number in enumerate(graph.numbers) if number in self.taken_before}
        if any(since < FAR for place, since in enumerate(earliest(graph, taken)) if place in uses):
            raise NoState("a backward ran in the middle of it")
        steps = steps_of(graph, found)
        steps = checked(graph, steps)
        return with_rows(Values(graph, self.held.tensors), steps)

    def _called(self, steps: LoopStates) -> list[str]:
        """What the user's variables of the states were called in a middle step, if all are known."""
        edges = steps.edges[len(steps.edges) // 2]
        names = [self.held.names.get(edge, "") for edge in edges]
        return names if all(names) and len(set(names)) == len(names) else []

    # -- words -------------------------------------------------------------------------------

    def _note(
        self,
        found: Recurrence,
        names: list[str],
        path: str,
        loop: sources.SourceLoop | None,
        reason: tuple[str, tuple[str, str]],
    ) -> None:
        key = (path, *sorted(names))
        known = self.unseen.get(key)
        if known is not None and known.steps >= found.steps:
            return
        self.unseen[key] = self._said(names, path, loop, found.steps, *reason)

    def unseen_loop(
        self, names: list[str], module: str, steps: int, reason: str, form: tuple[str, str]
    ) -> Unseen:
        """The same of a layer that is called so often, each time on what came of the call before."""
        _, loop = self.place_of(names)
        return self._said(names, module, loop, steps, reason, form)

    def _said(
        self,
        names: list[str],
        module: str,
        loop: sources.SourceLoop | None,
        steps: int,
        reason: str,
        form: tuple[str, str],
    ) -> Unseen:
        return Unseen(
            module=module or type(self.model).__name__,
            weights=tuple(names),
            steps=steps,
            line=loop.where if loop is not None else "",
            insert=sources.insertion(loop, form),
            reason=reason,
        )

    def place_of(self, names: list[str]) -> tuple[str, sources.SourceLoop | None]:
        """The path of the module whose code loops over these weights, and the loop, if it is found."""
        common = _common(names)
        paths = [".".join(common[:depth]) for depth in range(len(common), -1, -1)]
        users = [path for path in paths if self._is_users(path)]
        used = {path: {_below(name, path) for name in names} for path in users}
        for find in (
            functools.partial(sources.in_class, led="forward"),
            functools.partial(sources.in_functions, frames=_frames()),
            sources.in_class,
        ):
            for path in users:
                if loop := find(self.modules[path], used[path]):
                    return path, loop
        while common and not self._is_users(".".join(common)):
            common = common[:-1]
        return ".".join(common), None

    def _cell_of(self, names: list[str], path: str) -> str:
        """The outermost module of the user's inside the one that loops that holds all these weights.

        Where no cells are looked for it is the cell; the module that loops if there is none.
        """
        common = _common(names)
        below = range(path.count(".") + 2 if path else 1, len(common) + 1)
        inner = (".".join(common[:depth]) for depth in below)
        return next((one for one in inner if self._is_users(one)), path)

    def _holders(self, names: list[str]) -> set[str]:
        """The paths of the modules that hold these weights, and of all that hold those."""
        parts = [name.split(".")[:-1] for name in names]
        paths = {".".join(some[:n]) for some in parts for n in range(len(some) + 1)}
        return {path for path in paths if path in self.modules}

    def _is_users(self, path: str) -> bool:
        module = self.modules.get(path)
        return module is not None and not class_of(module).__module__.startswith(sources.TORCH_CODE)


def _common(names: list[str]) -> list[str]:
    """The path, in parts, of the module that holds all these weights."""
    levels = zip(*[name.split(".")[:-1] for name in names], strict=False)
    return [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]


def _below(name: str, path: str) -> str:
    """The attribute of the module at a path that a weight is, or that holds it."""
    return name.removeprefix(f"{path}." if path else "").split(".")[0]


def _names(loop: sources.SourceLoop | None, count: int) -> list[str]:
    """Names of states in the order in which they are made."""
    if loop is not None and len(loop.carried) == count and (loop.certain or count == 1):
        names = [name.rpartition(".")[2] for name in loop.carried]
        if all(name.isidentifier() for name in names) and len(set(names)) == count:
            return names
    return ["h"] if count == 1 else [f"s{i}" for i in range(count)]


def is_empty(graph: Unrolled, found: Recurrence) -> bool:
    """Whether it ran on no sequences at all."""
    return any(
        0 in tuple(known.shape)
        for place in list(found.chains[0].depth)[:1]
        for known in graph.nodes[place]._input_metadata
    )


def _node_of(root: Any) -> Any:
    if isinstance(root, Tensor):
        return root.grad_fn
    return getattr(root, "node", None)


def _frames() -> list[FrameType]:
    """The code that called backward, innermost first, without torch's and gradflow's."""
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < CALLER_FRAMES:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("torch.", "gradflow.")):
            found.append(frame)
        frame = frame.f_back
    return found


class Held:
    """What the user's modules were given and returned, and the callers' local variables, by their edges."""

    def __init__(self) -> None:
        self.tensors: dict[Edge, Tensor] = {}
        self.names: dict[Edge, str] = {}
        self._size = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep these, those that need a gradient."""
        for tensor in tensors:
            node = tensor.grad_fn
            if node is None or tensor.is_inference():
                continue
            edge = (node, tensor.output_nr)
            if edge not in self.tensors and self._size < HELD_ENTRIES:
                self._size += tensor.numel()
                self.tensors[edge] = tensor.detach()

    def hold_locals(self) -> None:
        """Keep the variables of the code that calls the module whose call is being told of."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if not str(frame.f_globals.get("__name__", "")).startswith(NOT_THEIRS):
                break
            frame = frame.f_back
        if frame is None or frame.f_code.co_name == "<module>":
            return
        for name, value in list(frame.f_locals.items())[:HELD_LOCALS]:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                self.hold((value,))
                self.names[value.grad_fn, value.output_nr] = name

    def clear(self) -> None:
        """Release all of them."""
        self.tensors.clear()
        self.names.clear()
        self._size = 0
