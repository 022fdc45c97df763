"""Modules that may be cells of the user's own, their calls, and the loops found over them.

Before the first step of a loop the states are constants mostly, and the user's graph does not hold
∂s_1/∂s_0. The first call is run again on a copy of the module, on detached, independent states and with
the random numbers and the autocast of that call, to see how it depends on its initial states; it counts
only if it gives the very bits that the call gave.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle

from gradflow.cells import CELLS
from gradflow.hooks import patch
from gradflow.hooks.ancestry import class_of
from gradflow.hooks.axes import Axis
from gradflow.hooks.dense import Place, Step
from gradflow.hooks.graph import Between, Edge, NotReadable, edge_of, saved_tensors_are_hooked
from gradflow.hooks.guard import Point, guarded
from gradflow.hooks.marks import LastMark
from gradflow.hooks.own.bypass import Around
from gradflow.hooks.own.forwards import holder
from gradflow.hooks.own.returned import Output, Path, leaves, replaced, row_of, version_of
from gradflow.hooks.tapped import TapSource
from gradflow.limits import CANDIDATE_CALLS, STATE_ENTRIES
from gradflow.process import autocast, random_numbers_kept
from gradflow.recording.track import Track

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERYWHERE = tuple(f"_global{name}" for name in HOOKS)  # the same, of all modules


@dataclass(eq=False)
class Given:
    """What a call was given, and in which circumstances."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]  # parameter or keyword -> argument
    tensors: dict[Path, Tensor]
    versions: dict[Path, int | None]
    rng: Tensor
    autocast: tuple[str, bool, torch.dtype]
    views: dict[Path, Tensor] = field(default_factory=dict)  # copies, see `keep_views`

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]) -> Given:
        """Note them as they are now."""
        tensors = leaves(named)
        device = next((tensor.device.type for tensor in tensors.values()), "cpu")
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return Given(
            args=args,
            kwargs=kwargs,
            named=named,
            tensors=tensors,
            versions={path: version_of(tensor) for path, tensor in tensors.items()},
            rng=torch.get_rng_state(),
            autocast=(device, enabled, dtype),
        )

    def unchanged(self) -> set[int]:
        """The ids of the tensors that are still what they were."""
        return {
            id(tensor)
            for path, tensor in self.tensors.items()
            if self.versions[path] == version_of(tensor)
        }

    def keep_views(self) -> None:
        """Copy what is a view: a buffer that later steps are written into counts as changed."""
        for path, tensor in self.tensors.items():
            if tensor._is_view() and self.versions[path] == version_of(tensor):
                self.views[path] = tensor.detach().clone()

    def leaves_out(self) -> bool:
        """Whether some argument is None: a state that the module makes itself, perhaps."""
        return any(value is None for value in self.named.values())

    def still(self, path: Path) -> Tensor:
        """The tensor that was given there, if it is still what it was."""
        tensor = self.tensors.get(path)
        if tensor is None:
            raise NotReadable("no initial state was given")
        if version_of(tensor) != self.versions[path] and path in self.views:
            return self.views[path]
        if version_of(tensor) != self.versions[path]:
            raise NotReadable("an argument was changed in place since")
        return tensor


def first_step(
    module: nn.Module,
    given: Given,
    entry: dict[str, Path],
    states: Mapping[str, Path],
    place: Place,
    rows: dict[str, Tensor],
) -> Step | None:
    """The way from the states that a first call returned back to those it was given, None where none leads.

    entry and states tell where each state was among the arguments and among what the call returned, rows
    (B, width) what it was; NotReadable where the module cannot be copied or does not repeat itself.
    """
    if saved_tensors_are_hooked() or _is_watched():
        raise NotReadable(
            "what hooks of yours, a checkpoint or a mode would take for a call of yours"
        )
    fresh = {path: given.still(path).detach() for path in given.tensors}
    initial = {name: fresh[path].clone().requires_grad_() for name, path in entry.items()}
    fresh.update({path: initial[name] for name, path in entry.items()})
    returned = leaves(_run(module, given, fresh))
    again = {name: returned[path] for name, path in states.items() if path in returned}
    if any(
        name not in again or not torch.equal(row_of(again[name], place.axes[name]), row)
        for name, row in rows.items()
    ):
        raise NotReadable("a module that, run again on a copy, gives other numbers")
    axes = {name: place.axis_of(name, tensor.shape) for name, tensor in initial.items()}
    initial_rows = {name: row_of(tensor, axes[name]) for name, tensor in initial.items()}
    before = Place.of(initial, initial_rows, axes)
    now = Place.of(again, rows, place.axes)
    return Step.find(before, now, set(), 0)


def axis_by_run(module: nn.Module, given: Given, path: Path, axes: list[Axis]) -> Axis:
    """Of several axes of one output that may be its batch, the one that an input shares.

    A copy of the module runs with inputs that need a gradient: the first entry along the batch
    depends on the first sequence of the input and on no other. Where that cannot be seen it is the
    first of the axes.
    """
    if saved_tensors_are_hooked() or _is_watched():
        return axes[0]
    try:
        fresh = {place: given.still(place).detach() for place in given.tensors}
        inputs = [
            fresh.setdefault(place, tensor).requires_grad_()
            for place, tensor in fresh.items()
            if tensor.is_floating_point() and tensor.dim() > 1
        ]
        output = leaves(_run(module, given, fresh)).get(path)
    except NotReadable:
        return axes[0]
    inputs = [] if output is None else [one for one in inputs if one.shape != output.shape]
    if output is None or not output.requires_grad or not inputs:
        return axes[0]
    for axis in axes:
        if axis is None:
            continue
        # an input of another length there (embeddings of nodes) has no row for each sequence
        told = [one for one in inputs if len(one) == output.shape[axis]]
        if not told:
            continue
        grads = torch.autograd.grad(
            output.select(axis, 0).sum(), told, retain_graph=True, allow_unused=True
        )
        rows = [(grad != 0).flatten(1).any(1) for grad in grads if grad is not None]
        if rows and all(bool(row[0]) and not bool(row[1:].any()) for row in rows):
            return axis
    return axes[0]


def _is_watched() -> bool:
    """Whether a global hook or an active mode would see a module that is run."""
    modes = [
        mode
        for mode in _get_current_function_mode_stack()
        if not isinstance(mode, DeviceContext)  # torch.set_default_device, with torch.device(...)
    ]
    return bool(modes or torch._C._len_torch_dispatch_stack()) or any(
        vars(nn.modules.module)[hooks] for hooks in EVERYWHERE
    )


def _run(module: nn.Module, given: Given, tensors: dict[Path, Tensor]) -> Any:
    """What a copy of the module returns for these tensors in place of those that were given."""
    why: list[str] = []
    result = guarded(Point.AGAIN, why.append, _run_copy, module, given, tensors)
    if why:
        raise NotReadable(f"a module that cannot be run on a copy: {why[0]}")
    return result


def _run_copy(module: nn.Module, given: Given, tensors: dict[Path, Tensor]) -> Any:
    devices = {t.device for t in given.tensors.values() if t.device.type == "cuda"}
    device, enabled, dtype = given.autocast
    named = replaced(given.named, tensors)
    args = [named[key] for key in list(named)[: len(given.args)]]
    kwargs = {key: named[key] for key in given.kwargs}
    copied = copy.deepcopy(module)
    if _shares(module, copied):
        raise TypeError("its copy shares parts with it")
    for part in nn.Module.modules(copied):
        for hooks in HOOKS:
            vars(part)[hooks].clear()
    with (
        patch.paused(),
        random_numbers_kept(list(devices)),
        torch.enable_grad(),
        autocast(device, dtype=dtype, enabled=enabled),
    ):
        torch.set_rng_state(given.rng)
        with torch._C._EnableTorchFunction():  # the default device, which `guarded` put off
            return copied.forward(*args, **kwargs)


def _shares(module: nn.Module, copied: nn.Module) -> bool:
    """Whether what a copy does can be seen in the module: in a part, a weight, a list or a dict."""
    mine = {id(part) for part in nn.Module.modules(module)}
    mine |= {id(value) for part in nn.Module.modules(module) for value in _kept_by(part)}
    theirs = list(nn.Module.modules(copied))
    return any(id(value) in mine for value in [*theirs, *(v for m in theirs for v in _kept_by(m))])


def _kept_by(module: nn.Module) -> list[Any]:
    """The tensors and containers that a module keeps, and what its functions have closed over."""
    held = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
    for function in [value for value in held if isinstance(value, FunctionType)]:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        held += [getattr(value, "__self__", value) for value in cells]  # a method is its module's
    kinds = nn.Module | Tensor | list | dict | set
    return [value for value in held if isinstance(value, kinds)]


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

    def leads_to(self, given: Given) -> bool:
        """Whether its last states enter a call where states do, through whatever other modules."""
        tensors = [given.tensors[path] for path in self.entry.values() if path in given.tensors]
        roots = [edge for tensor in tensors if (edge := edge_of(tensor)) is not None]
        ends = {out.edge[0] for out in self.outputs.values() if out.edge is not None}
        return bool(roots and ends and not self.doubts and Between(roots, ends).reached)


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
    if holder(module) is None:
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
