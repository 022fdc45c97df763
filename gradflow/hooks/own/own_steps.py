"""Steps of a loop over a cell of the user's own: marked where the cell returns its states.

What a module returns may be only a part of what makes the state. A recurrent weight, or the right-hand
side f of z + dt f(z), returns r_n, and other terms are added before it comes back as e_{n+1}: the
input's share, what the state keeps. Then the state is the sum, not r_n. A mask or zoneout that chooses
between r_n and e_n, entry by entry, keeps r_n a state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.hooks.axes import alike
from gradflow.hooks.by_value import moved_rows
from gradflow.hooks.dense import Incomplete, Place, Step
from gradflow.hooks.graph import Between, Edge, NotReadable, edge_of, kind_of
from gradflow.hooks.guard import note_hooks
from gradflow.hooks.marks import Marks
from gradflow.hooks.own.bypass import Around
from gradflow.hooks.own.candidates import Candidate, CellLoop, First, Given, first_step
from gradflow.hooks.own.returned import Output, Path, key_of, row_of
from gradflow.hooks.tapped import Mark, TapSource
from gradflow.hooks.unrolled.chains import PRODUCTS
from gradflow.hooks.wide import TurnedStep, WideStep, wide_step
from gradflow.limits import PART_CALLS, SHARES_ALIKE, TERM_OPERATIONS

SUMS = frozenset(("Add", "Sub", "Rsub", "Addcmul", "Lerp", "Where"))


def is_part(entering: Iterable[Edge], ends: set[Any], entered: Iterable[Edge]) -> bool:
    """Whether other terms are added to what was returned before it enters the next call.

    Args:
        entering: where the states that enter a call sit.
        ends: nodes of those that the call before returned.
        entered: where those sat that the call before was given.
    """
    roots, known = list(entering), set(entered)
    between = Between(roots, ends)
    if not between.reached:
        return False
    around = {node for node, _ in known} - ends
    mixed = False
    for node in between.order:
        if node in ends or kind_of(node) not in SUMS:
            continue
        for child, _ in node.next_functions:
            if child is None or child in between.on_path:
                continue
            if around and Between([(child, 0)], around).reached:
                mixed = True
            elif not _is_constant(child):
                return True
    return mixed and not _is_mixture(roots, ends | around)


def _is_constant(node: Any) -> bool:
    """Whether a term is made from weights alone, without a product with anything."""
    stack, seen = [node], 0
    while stack:
        node = stack.pop()
        seen += 1
        if kind_of(node) in PRODUCTS or seen > TERM_OPERATIONS:
            return False
        stack += [child for child, _ in node.next_functions if child is not None]
    return True


def _is_mixture(roots: list[Edge], ends: set[Any]) -> bool:
    """Whether the shares of what was returned and of what went around it add up to one."""
    seeds = []
    for node, output in roots:
        known = node._input_metadata[output]
        one = torch.ones(tuple(known.shape), dtype=known.dtype, device=known.device)
        seeds.append(((node, output), one))
    try:
        found = Between(roots, ends).pull(seeds)
    except NotReadable:
        return True
    grads = [grad.detach() for grad in found.values()]
    if len({grad.shape for grad in grads}) != 1:
        return True
    # of several states of one shape each adds up to one, so all of them to their number
    whole = torch.stack(grads).sum(0)
    return bool(((whole - len(roots)).abs() <= SHARES_ALIKE * len(roots)).all())


class OwnSteps:
    """Begins loops over cells and goes on with them."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def begin(
        self, cell: Candidate, first: First, states: dict[str, Path], entry: dict[str, Path]
    ) -> CellLoop:
        source, guess = (
            TapSource(self.marks.owner.scale, cell=first.source.cell),
            first.source.marks[0],
        )
        source.graph_tasks, source.lost = set(first.source.graph_tasks), first.source.lost
        outputs = {name: first.outputs[path] for name, path in states.items()}
        rows = {name: out.row for name, out in outputs.items()}
        edges = {name: out.edge for name, out in outputs.items() if out.edge is not None}
        shapes = {name: out.shape for name, out in outputs.items()}
        place = Place.at(edges, shapes, rows, {name: out.axis for name, out in outputs.items()})
        mark = Marks.new(place, rows)
        mark.grad_enabled = guess.grad_enabled
        mark.differentiable = guess.differentiable
        if guess.within_known and set(first.place.parts) == {key_of(p) for p in states.values()}:
            mark.within_known, mark.within = True, guess.within
            if guess.within is not None:
                parts = [first.place.parts[key_of(path)] for path in states.values()]
                order = torch.cat([torch.arange(part.start, part.stop) for part in parts])
                mark.within = (
                    TurnedStep(guess.within, order)
                    if isinstance(guess.within, WideStep)
                    else guess.within[:, order][:, :, order]
                )
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
        entered, values = entering_of(first.given, entry, place)
        around = Around(entered, place, values=values)
        return CellLoop(
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
        first: First,
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
            still = {name: given.still(path) for name, path in entry.items()}
            initial = {
                name: row_of(tensor, place.axis_of(name, tensor.shape))
                for name, tensor in still.items()
            }
            if any(row.shape != mark.states[name].shape for name, row in initial.items()):
                raise NotReadable("arguments that hold more or less than the initial states")
            source.initial = initial
            if self.marks.wanted and mark.differentiable:
                step = first_step(module, given, entry, states, place, mark.states)
                mark.jacobian = self._led_in(place, step)
        except NotReadable as error:
            source.remarks.append(
                "how its first step depends on the initial states is not known, and the identity "
                f"stands for it: {error}"
            )

    def _led_in(self, place: Place, step: Step | None) -> Tensor | WideStep:
        """∂s_1/∂s_0 of a step that was run again; 0 where no path leads back."""
        if self.marks.wide(place):
            return WideStep() if step is None else wide_step(step, self.marks.constants, 0)
        if step is None:
            size = place.like.shape[1]
            return place.like.new_zeros(len(place.like), size, size)
        found = step.jacobian()
        if step.rows is not None:
            raise NotReadable("a cell that puts its sequences in another order")
        return found

    def goes_on(self, loop: CellLoop, given: Given, returned: dict[Path, Tensor]) -> bool:
        """One more step, if the module returned the states as it did before."""
        tensors = {name: returned.get(path) for name, path in loop.states.items()}
        states = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if len(states) < len(tensors):
            return False
        axes, before = loop.end.place.axes, loop.end.place
        if any(not alike(states[n].shape, before.shapes[n], axes[n]) for n in states):
            return False
        rows = {name: row_of(tensor, axes[name]) for name, tensor in states.items()}
        if len({len(row) for row in rows.values()}) > 1:
            return False
        place = Place.of(states, rows, axes)
        mark = Marks.new(place, rows)
        entering, values = entering_of(given, loop.entry, place)
        self._look_between(loop, given)
        entered = [given.tensors[path] for path in loop.entry.values() if path in given.tensors]
        note_hooks(entered, [loop.end.track.notes])
        mixed = loop.around.mixed or loop.around.goes_around(entering)
        moved = len(place.like) != len(before.like)
        read = entering is not None and bool(entering.edges) and self.marks.wanted
        if mixed and not moved and read:
            loop.around.constants = self.marks.constants if self.marks.wide(place) else None
            self._goes_around(loop, entering, place, mark)
        elif not self.marks.by_graph(loop.end, place, mark):
            if moved and not self._by_values(loop, values, mark):
                return False
            self.marks.without_graph(loop.end, place, mark)
        elif mixed and mark.rows is not None:
            mark.unknown = (
                "the batch changes between two calls while a state is mixed with the one before "
                "(zoneout, a mask)"
            )
        loop.around = loop.around.next(entering, values, place)
        Marks.extend(loop.end, mark)
        self.marks.settle(loop.end, {}, place, mark)
        loop.outputs = {
            path: Output.of(states[name], rows[name], axes[name])
            for name, path in loop.states.items()
        }
        return True

    @staticmethod
    def _by_values(loop: CellLoop, values: Tensor | None, mark: Mark) -> bool:
        """Whether the values that entered tell which of the sequences before they are."""
        known = torch.cat(list(loop.end.source.marks[-1].states.values()), dim=1)
        found = None if values is None else moved_rows(values, known)
        if found is not None:
            mark.rows = found[0]
        return found is not None

    @staticmethod
    def _look_between(loop: CellLoop, given: Given) -> None:
        """See, at the first few calls, whether what was returned is only part of a step."""
        source = loop.end.source
        if source.part_of_a_step or len(source.marks) >= PART_CALLS:
            return
        tensors = (given.tensors.get(path) for path in dict.fromkeys(loop.entry.values()))
        entering = [edge for t in tensors if t is not None and (edge := edge_of(t)) is not None]
        if entering and loop.around.returned.edges:
            source.part_of_a_step = is_part(entering, loop.around.returned.nodes, loop.entering)
        loop.entering = entering

    @staticmethod
    def _goes_around(loop: CellLoop, entering: Place | None, place: Place, mark: Mark) -> None:
        source = loop.end.source
        assert entering is not None
        try:
            loop.around.read(source, entering, place, mark)
        except Incomplete as error:
            mark.unknown = f"{error}, so {source.words.more}"
        except NotReadable as error:
            mark.unknown = f"{error} between two calls"


def entering_of(
    given: Given | None, entry: dict[str, Path], place: Place
) -> tuple[Place | None, Tensor | None]:
    """Where the states that enter a call sit, if they are given one by one, and their values.

    place is that of the states that the call returns.
    """
    if given is None or len(set(entry.values())) < len(entry):
        return None, None
    tensors = {name: given.tensors[path] for name, path in entry.items() if path in given.tensors}
    axes = {name: place.axis_of(name, tensor.shape) for name, tensor in tensors.items()}
    values = {name: row_of(tensor, axes[name]) for name, tensor in tensors.items()}
    if any(
        name not in values or values[name].shape != place.like[:, part].shape
        for name, part in place.parts.items()
    ):
        return None, None
    return Place.of(tensors, values, axes), torch.cat(list(values.values()), dim=1)
