"""Modules that may be cells of the user's own, their calls, and the loops found over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.cells import CELLS
from gradflow.hooks.ancestry import class_of
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import Edge
from gradflow.hooks.marks import LastMark
from gradflow.hooks.own import forwards
from gradflow.hooks.own.bypass import Around
from gradflow.hooks.own.comeback import Output
from gradflow.hooks.own.copied_call import Given
from gradflow.hooks.own.nested import Path
from gradflow.hooks.tapped import TapSource
from gradflow.limits import CANDIDATE_CALLS, STATE_ENTRIES
from gradflow.recording import Track


@dataclass(eq=False)
class First:
    """A call that takes no known state: perhaps the first step of a loop."""

    source: TapSource  # of one mark, its states by their paths
    outputs: dict[Path, Output]
    made_by: dict[Path, set[str]]  # inner modules whose results the outputs are
    handles: list[RemovableHandle]
    place: Place  # of those that may be states by their shapes
    given: Given | None  # None where it would keep much alive
    given_at: set[Path]  # paths of the tensors among its arguments
    size: int  # entries that it keeps alive
    called: int  # which call of the module it was


@dataclass(eq=False)
class CellLoop:
    """A loop over a cell, at its last call."""

    end: LastMark
    states: dict[str, Path]  # state name -> where among what the cell returns
    entry: dict[str, Path]  # where they are among the arguments
    around: Around
    outputs: dict[Path, Output]
    given_at: set[Path]  # where the first of its calls was given tensors
    size: int
    called: int  # the last call of the module that was one of its steps
    entering: list[Edge] = field(default_factory=list)  # where the states of its last call came in
    # calls that each may yet begin a loop of its own, while the state seems to come in as the input
    doubts: list[First] = field(default_factory=list)


@dataclass(eq=False)
class Candidate:
    """One module that may be a cell."""

    module: nn.Module
    owner: str  # its path in the model, "" for the model itself
    parameters: list[str]  # of its forward
    ignored: bool = False  # what it returns are states of another track
    calls: int = 0
    ends: list[First | CellLoop] = field(default_factory=list)
    tracks: list[Track] = field(default_factory=list)
    inputs: set[Path] = field(default_factory=set)  # arguments in which no state comes back

    @property
    def path(self) -> str:
        """The name of its tracks."""
        return self.owner or "cell"


@dataclass(eq=False)
class UnderWay:
    """A call under way."""

    cell: Candidate
    given: Given
    origin: First | CellLoop | None
    came: dict[Path, Path]
    inner: dict[str, list[Tensor]] = field(default_factory=dict)  # last results inside, by path


# ------------------------------------------------------------------------------------ the modules


def may_be(module: nn.Module) -> bool:
    """Whether a module may be a cell: its forward is not torch's own, and it has weights or is given some.

    Without weights of its own (a hypernetwork or the module around it gives them) it takes a state
    beside them, so two arguments at least; an activation takes one.
    """
    if forwards.holder(module) is None:
        return False
    has_weights = next(nn.Module.parameters(module), None) is not None
    return has_weights or (type(module) is not nn.Sequential and len(parameters_of(module)) > 1)


def is_plain(cell: Candidate) -> bool:
    """Whether it is a container of torch's own: then the module that calls it is the cell, not it."""
    return type(cell.module) is nn.Sequential


def cell_name(module: nn.Module) -> str:
    """The class name; with its module where it is that of one of torch's own cells."""
    kind = class_of(module)
    taken = {*CELLS, *(spec.kind for spec in CELLS.values()), "tap"}
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in taken else kind.__name__


def parameters_of(module: nn.Module) -> list[str]:
    try:
        found: Callable[..., Any] = module.forward
        given = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


# ----------------------------------------------------------------------------------- the ends


def let_go(end: First | CellLoop | None) -> None:
    if isinstance(end, First):
        for handle in end.handles:
            handle.remove()


def move_to_end(cell: Candidate, loop: CellLoop) -> None:
    loop.called = cell.calls
    cell.ends.remove(loop)
    cell.ends.append(loop)


def is_over(cell: Candidate) -> bool:
    """Whether to give up waiting for a next step of the loop that has waited longest."""
    long_ago = cell.calls - cell.ends[0].called > CANDIDATE_CALLS
    return long_ago or sum(end.size for end in cell.ends) > STATE_ENTRIES


# -------------------------------------------------- one module as all layers, called step by step


def may_be_the_input(loop: CellLoop, first: First) -> bool:
    """Whether states that came in as the first argument may be the output of the layer below.

    It is so where one module serves as every layer of a stack; then it has another argument that could
    be its state.
    """
    if first.given is None:
        return False
    name = next(iter(first.given.named))
    shapes = {first.outputs[path].shape for path in loop.states.values()}
    others = [t for path, t in first.given.tensors.items() if path[0] != name]
    could_be = first.given.leaves_out() or any(t.shape in shapes for t in others)
    return could_be and {path[0] for path in loop.entry.values()} == {name}


def was_the_input(loop: CellLoop, given: Given, came: dict[Path, Path]) -> bool:
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


def of_one_batch(came: dict[Path, Path], first: First) -> dict[Path, Path]:
    """Those of the most common batch size, (B, ·) and (width,) apart."""
    sizes = [first.outputs[path].row.shape[0] for path in came]
    most = max(sizes, key=sizes.count, default=0)
    return {path: w for path, w in came.items() if first.outputs[path].row.shape[0] == most}
