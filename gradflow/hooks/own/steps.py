"""Steps of a loop over a cell of the user's own: marked where the cell returns its states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.hooks.dense import Incomplete, Place, Step
from gradflow.hooks.graph import NotReadable, edge_of
from gradflow.hooks.marks import Marks
from gradflow.hooks.own.again import Given, first_step
from gradflow.hooks.own.around import Around
from gradflow.hooks.own.candidates import Candidate, CellLoop, First
from gradflow.hooks.own.comeback import Output
from gradflow.hooks.own.leaves import Path
from gradflow.hooks.own.returned import key_of, row_of
from gradflow.hooks.tapped import Mark, TapSource
from gradflow.hooks.wide import WideStep, wide_step


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
                mark.within = (
                    guess.within.turned(order)
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
        entered, values = entering_of(first.given, entry, rows)
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
            initial = {name: row_of(given.still(path)) for name, path in entry.items()}
            if any(row.shape != mark.states[name].shape for name, row in initial.items()):
                raise NotReadable("arguments that hold more or less than the initial states")
            source.initial = initial
            if self.marks.wanted and mark.differentiable:
                step = first_step(module, given, entry, states, mark.states)
                mark.jacobian = self._led_in(place, step)
        except NotReadable as error:
            source.remarks.append(
                "how its first step depends on the initial states is not known, and the identity "
                f"stands for it: {error}"
            )

    def _led_in(self, place: Place, step: Step | None) -> Tensor | WideStep:
        """∂s_1/∂s_0 of a step that was run again; 0 where no path leads back."""
        if self.marks.wide(place):
            return WideStep(None) if step is None else wide_step(step, self.marks.constants, 0)
        if step is None:
            size = place.like.shape[1]
            return place.like.new_zeros(len(place.like), size, size)
        return step.jacobian()

    def goes_on(self, loop: CellLoop, given: Given, returned: dict[Path, Tensor]) -> bool:
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
        entering, values = entering_of(given, loop.entry, rows)
        mixed = loop.around.mixed or loop.around.goes_around(entering)
        dense = self.marks.wanted and not self.marks.wide(place)
        if mixed and entering is not None and entering.edges and dense:
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
    def _goes_around(loop: CellLoop, entering: Place, place: Place, mark: Mark) -> None:
        source = loop.end.source
        try:
            loop.around.read(source, entering, place, mark)
        except Incomplete as error:
            mark.unknown = f"{error}, so {source.words.more}"
        except NotReadable as error:
            mark.unknown = f"{error} between two calls"


def entering_of(
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
