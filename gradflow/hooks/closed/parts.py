"""The parts of a closed loop: chains of calls of stock layers, and loops whose states are marked.

A part has steps; each is a `Seen`, with the nodes of what went into it and of what came out of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradflow.cells import CELLS
from gradflow.hooks.call import Call
from gradflow.hooks.closed.standing import View, before_last, view_in_place, views_of_call
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import LEAF, Edge
from gradflow.hooks.loops.links import End
from gradflow.hooks.loops.loop import Loop
from gradflow.hooks.loops.stitch import Chain
from gradflow.hooks.tapped import Mark, TapSource
from gradflow.recording import Track
from gradflow.recording.track import unnumbered


@dataclass(frozen=True)
class PartLayer:
    """One layer of a part, as a piece of the joint state."""

    part: StockPart | MarkedPart
    layer: int
    names: dict[str, str]  # of its states -> their names in the joint state
    track: str  # the name of its own track


@dataclass(eq=False)
class StockPart:
    """Calls of a stock layer or cell."""

    chain: Chain
    loop: Loop = field(init=False)
    outputs: bool = False  # whether outputs within its calls go on to the next, as a state

    def __post_init__(self) -> None:
        self.loop = Loop(self.chain)

    @property
    def path(self) -> str:
        """Of the module that holds the weights."""
        return self.chain.calls[0].owner

    @property
    def tracks(self) -> list[Track]:
        """One for each layer that is picked."""
        return self.chain.tracks

    @property
    def count(self) -> int:
        """Calls so far."""
        return len(self.chain.calls)

    @property
    def sizes(self) -> list[int]:
        """Steps of every call."""
        return self.chain.sizes

    @property
    def even(self) -> bool:
        """Whether the batch stays as it is."""
        return self.chain.layout.even

    @property
    def packed(self) -> bool:
        """Whether sequences have lengths of their own within some call."""
        layout = self.chain.layout
        return any(call.batch_sizes is not None for call in self.chain.calls) or (
            not layout.even and any(bool((p.lengths != p.extent).any()) for p in layout.parts)
        )

    @property
    def read_at_ends(self) -> bool:
        """Whether all that reaches its calls comes to their last steps."""
        return not self.outputs and all(
            size == 1
            or "output" not in call.grads
            or not before_last(call, call.grads["output"]).any()
            for call, size in zip(self.chain.calls, self.sizes, strict=True)
        )

    @property
    def lengths(self) -> Tensor | None:
        """(B,) the user's own."""
        return self.chain.lengths

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        return self.chain.calls[0].layers

    @property
    def tasks(self) -> set[int]:
        """The backwards that reached a call."""
        return set().union(*(call.graph_tasks for call in self.chain.calls))

    @property
    def lost(self) -> str:
        """Why what the backwards brought is no total, if it is none."""
        return self.chain.lost

    @property
    def batched(self) -> bool:
        """Whether a backward of several outputs at once reached it."""
        return self.chain.batched

    @property
    def holder(self) -> Any:
        """What holds the `ClosedLoop` that it is a part of, if any, as `closed`."""
        return self.chain

    def leave_unread(self, why: str) -> None:
        """Whether more than its states goes around was not looked at."""
        self.chain.unread = self.chain.unread or why

    def states(self, layer: int) -> list[str]:
        """As the cell names them; of the top layer the outputs before the last, where they go on."""
        more = ["output"] if self.outputs and layer == self.layers - 1 else []
        return [*CELLS[self.chain.calls[0].cell].states, *more]

    def track_name(self, layer: int) -> str:
        """The name of the track of one layer, also where it is not picked."""
        for track in self.tracks:
            if getattr(track.source, "layer", 0) == layer:
                return track.name
        if self.chain.calls[0].single:
            return self.path or "cell"
        return f"{self.path}.l{layer}" if self.path else f"l{layer}"

    def arrived(self, step: int, layer: int, state: str) -> Tensor | None:
        """What reached a state of one call, (B, width), as the graph has it."""
        call = self.chain.calls[step]
        found = call.grads.get(state)
        if state == "output":
            return None if found is None else before_last(call, found)
        total = None if found is None else found[layer]
        if state != "h":
            return total
        output = call.grads.get("output")
        if output is not None and layer == call.layers - 1:
            last = output.select(1 if call.batch_first and not call.single else 0, -1)
            total = last if total is None else total + last
        return total


@dataclass(eq=False)
class MarkedPart:
    """A loop over a cell of the user's own, or one that marks its states."""

    source: TapSource
    track: Track
    outputs = False  # see `StockPart`
    read_at_ends = True

    @property
    def path(self) -> str:
        """Of the cell; of a tapped loop its name."""
        return unnumbered(self.track.name)

    @property
    def tracks(self) -> list[Track]:
        """Its own."""
        return [self.track]

    @property
    def count(self) -> int:
        """Marks so far."""
        return len(self.source.marks)

    @property
    def sizes(self) -> list[int]:
        """One step for each mark."""
        return [1] * self.count

    @property
    def even(self) -> bool:
        """Whether the batch stays as it is."""
        return self.source.layout.even

    @property
    def packed(self) -> bool:
        """Marks are not."""
        return False

    @property
    def lengths(self) -> Tensor | None:
        """(B,) the user's own."""
        return self.source.lengths

    @property
    def layers(self) -> int:
        """One."""
        return 1

    @property
    def tasks(self) -> set[int]:
        """The backwards that reached it."""
        return self.source.graph_tasks

    @property
    def lost(self) -> str:
        """Why what the backwards brought is no total, if it is none."""
        return self.source.lost

    @property
    def batched(self) -> bool:
        """Whether a backward of several outputs at once reached it."""
        return self.source.batched

    @property
    def holder(self) -> Any:
        """See `StockPart`."""
        return self.source

    def leave_unread(self, why: str) -> None:
        """Whether more than its states goes around was not looked at."""
        mark = self.source.marks[-1]
        mark.unknown = mark.unknown or why

    def states(self, layer: int) -> list[str]:
        """As they are marked."""
        return self.source.names

    def track_name(self, layer: int) -> str:
        """The name of its track."""
        return self.track.name

    def arrived(self, step: int, layer: int, state: str) -> Tensor | None:
        """What reached a state of one mark, (B, width)."""
        return self.source.marks[step].grads.get(state)


@dataclass(eq=False)
class Seen:
    """One step of a part, with the nodes of what it was given and returned."""

    part: StockPart | MarkedPart
    place: int  # of the step in its part
    edges: dict[Edge, str]  # of what it returned -> output, or the name of a state
    starts: list[Any]  # nodes of its initial states; of a mark, of all that it was made from
    inputs: list[Any]  # nodes of its input
    number: int  # of its newest node; 0 without a graph
    since: int  # of its oldest
    call: Call | None = None
    mark: tuple[Place, Mark] | None = None
    # of a call: state name -> where its initial value sat
    entry: dict[str, Edge] = field(default_factory=dict)

    @staticmethod
    def of_call(part: StockPart, end: End, data: Tensor) -> Seen:
        """The last call of a chain."""
        return Seen(
            part,
            part.count - 1,
            end.edges,
            [edge[0] for edge in end.entry.values() if edge is not None],
            [] if data.grad_fn is None else [data.grad_fn],
            *_numbers(end.edges),
            call=end.call,
            entry={name: edge for name, edge in end.entry.items() if edge is not None},
        )

    @staticmethod
    def of_mark(part: MarkedPart, place: Place, mark: Mark) -> Seen:
        """The last mark of a loop."""
        edges = {edge: name for name, edge in place.edges.items()}
        below = [child for node, _ in edges for child, _ in node.next_functions if child]
        return Seen(part, part.count - 1, edges, below, [], *_numbers(edges), mark=(place, mark))

    @property
    def nodes(self) -> set[Any]:
        """The nodes of what it returned."""
        return {node for node, _ in self.edges}

    @property
    def batch(self) -> int:
        """B."""
        if self.call is not None:
            return int(self.call.h0.shape[1])
        assert self.mark is not None
        return len(self.mark[1].cut)

    def views(self, members: list[PartLayer]) -> dict[Edge, list[View]]:
        """Where its states lie in what it returned."""
        if self.call is not None:
            return views_of_call(self.call, self.edges, [member.names for member in members])
        assert self.mark is not None
        place, names = self.mark[0], members[0].names
        return {
            edge: [view_in_place(place, state, names[state])] for edge, state in self.edges.items()
        }

    def rows(self, members: list[PartLayer]) -> dict[str, Tensor]:
        """Joint name -> its value, (B, width)."""
        found = {}
        for member in members:
            for state, name in member.names.items():
                if self.call is not None:
                    known = self.call.returned[state]
                    is_output = state == "output"
                    found[name] = (
                        before_last(self.call, known) if is_output else known[member.layer]
                    )
                else:
                    assert self.mark is not None
                    found[name] = self.mark[1].states[state]
        return found


def _numbers(edges: dict[Edge, str]) -> tuple[int, int]:
    numbers = [node._sequence_nr() for node, _ in edges]
    if not numbers or max(numbers) >= LEAF:
        return 0, 0
    return max(numbers), min(numbers)
