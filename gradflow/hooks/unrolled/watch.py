"""Before a backward runs: which recurrences its graph holds, and which of them are in no track."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import takewhile
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.hooks.ancestry import clean
from gradflow.hooks.graph import Edge, edge_of
from gradflow.hooks.unrolled import sources
from gradflow.hooks.unrolled.chains import Recurrence, chains, recurrences
from gradflow.hooks.unrolled.order import TooLarge, Unrolled
from gradflow.recording import Unseen

FRAMES = 24  # how far up the code that called backward is looked for


class Watch:
    """What one recording knows of the graphs that backwards went through."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {clean(name): module for name, module in model.named_modules()}
        self.names = {
            id(parameter): clean(name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.states: set[int] = set()  # numbers of nodes that made states of some track
        self.given: dict[int, list[Edge]] = {}  # what recurrent functions of torch's were given
        self.unseen: dict[tuple[str, ...], Unseen] = {}

    def saw_stock(self, given: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """A recurrent function of torch's own ran: its inside is stepped over."""
        edges = [edge for tensor in given if (edge := edge_of(tensor)) is not None]
        for result in results:
            if result.grad_fn is not None:
                number = result.grad_fn._sequence_nr()
                self.given[number] = edges
                self.states.add(number)

    def marked(self, edges: Iterable[Edge]) -> None:
        """These are states of a track."""
        self.states.update(node._sequence_nr() for node, _ in edges)

    def before_backward(self, roots: Iterable[Any]) -> None:
        """Look at the graph of a backward that is about to run."""
        nodes = [node for root in roots if (node := _node_of(root)) is not None]
        try:
            graph = Unrolled(nodes, self.given)
        except TooLarge:
            return
        weights = {
            place: id(node.variable)
            for place, node in enumerate(graph.nodes)
            if graph.is_leaf(place) and hasattr(node, "variable")
        }
        weights = {place: key for place, key in weights.items() if key in self.names}
        states = {p for p, number in enumerate(graph.numbers) if number in self.states}
        for found in recurrences(graph, chains(graph, weights, states)):
            self._note(found, [self.names[weights[chain.weight]] for chain in found.chains])

    def close(self) -> None:
        """Let go of the user's graph."""
        self.given.clear()

    # -- words -------------------------------------------------------------------------------

    def _note(self, found: Recurrence, names: list[str]) -> None:
        key = tuple(sorted(names))
        known = self.unseen.get(key)
        if known is not None and known.steps >= found.steps:
            return
        path, loop = self.place_of(names)
        self.unseen[key] = Unseen(
            module=path or type(self.model).__name__,
            weights=tuple(names),
            steps=found.steps,
            line=loop.where if loop is not None else "",
            insert=sources.insertion(loop),
        )

    def place_of(self, names: list[str]) -> tuple[str, sources.Found | None]:
        """The path of the module whose code loops over these weights, and the loop, if it is found."""
        holders = [name.split(".")[:-1] for name in names]
        levels = zip(*holders, strict=False)
        common = [n[0] for n in takewhile(lambda level: len(set(level)) == 1, levels)]
        for depth in range(len(common), -1, -1):
            path = ".".join(common[:depth])
            module = self.modules.get(path)
            if module is None or type(module).__module__.startswith(sources.STOCK):
                continue
            attributes = {name.split(".")[depth] for name in names}
            loop = sources.find(module, attributes, _frames() if not depth else ())
            if loop is not None:
                return path, loop
        return ".".join(common), None


def _node_of(root: Any) -> Any:
    if isinstance(root, Tensor):
        return root.grad_fn
    return getattr(root, "node", None)


def _frames() -> list[FrameType]:
    """The code that called backward, innermost first, without torch's and gradflow's."""
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < FRAMES:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("torch.", "gradflow.")):
            found.append(frame)
        frame = frame.f_back
    return found


def within_a_backward() -> bool:
    """Whether a backward is running: a checkpoint's own, for one."""
    return torch._C._current_graph_task_id() != -1
