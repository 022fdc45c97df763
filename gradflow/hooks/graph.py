"""The piece of the user's graph between two calls, pulled through without running a hook.

A few nodes lie between the state a call returned and the one the next call starts from: a mask, a
dropout, a slice. ``torch.autograd.grad`` would run the user's own hooks on them during the forward
pass; here the nodes are called by themselves, which changes nothing. What they keep for their backward
is read as far as no hook runs: under a checkpoint, or other hooks on saved tensors, unpacking one runs
the code of those hooks, and such tensors are not touched.
"""

from __future__ import annotations

import contextlib
import dis
import heapq
import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradflow.hooks.guard import briefly
from gradflow.limits import (
    BETWEEN_NODES,
    LINK_DEPTH,
    LINK_NODES,
    PARITY_FLOAT32,
    PARITY_HALF,
    STEP_NODES,
)
from gradflow.process import autocast

_RAW_NAMES: dict[type, tuple[str, ...]] = {}  # see `raw_names`


def raw_names(node: Any) -> tuple[str, ...]:
    """The attributes in which a node keeps what its derivative needs."""
    kind = type(node)
    if kind not in _RAW_NAMES:
        _RAW_NAMES[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved"))
    return _RAW_NAMES[kind]


def is_hooked(node: Any) -> bool:
    """Whether reading what a node keeps would run the code of a hook."""
    for name in raw_names(node):
        try:
            kept = getattr(node, name)
        except RuntimeError:  # freed
            continue
        if any(map(_has_hook, kept if isinstance(kept, list | tuple) else (kept,))):
            return True
    return False


def _has_hook(one: Any) -> bool:
    try:
        return one.unpack_hook is not None
    except RuntimeError:  # freed, or nothing was saved
        return False


def runs_code(node: Any) -> bool:
    """Whether calling a node would: also what it keeps anew meets the hooks that are set now."""
    return is_hooked(node) or (bool(raw_names(node)) and saved_tensors_are_hooked())


def saved_tensors_are_hooked() -> bool:
    """Whether packing or unpacking a saved tensor now would run the code of a hook."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def saved_by(node: Any) -> list[Tensor]:
    """The tensors that a node keeps, none where reading them would run code.

    A torch.autograd.Function of the user's own keeps what it likes, under another name: nothing is
    read of it.
    """
    if is_hooked(node):
        return []
    found: list[Tensor] = []
    for name in raw_names(node):
        try:
            value = getattr(node, name.removeprefix("_raw"), None)
        except RuntimeError:  # freed, or changed in place since
            continue
        values = value if isinstance(value, list | tuple) else (value,)
        found += [one for one in values if isinstance(one, Tensor)]
    return found


Edge = tuple[Any, int]  # a node of the graph and which of its outputs
LEAF = 2**63  # numbers of nodes from here on are those of leaves, which no operation made

# operations that treat every entry by itself, and tensors of one shape
_ELEMENTWISE = (
    "Abs Add Addcdiv Addcmul Atan Clamp ClampMax ClampMin Cos Cosh Div Elu Erf Exp Expm1 Fmax Fmin "
    "FusedDropout Gelu Hardshrink Hardsigmoid Hardswish Hardtanh IndexCopy IndexFill IndexPut "
    "LeakyRelu Lerp Log Log1P LogSigmoid Logit MaskedFill MaskedScatter Maximum Minimum Mish Mul "
    "NanToNum NativeDropout Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Sinh SliceScatter "
    "SelectScatter Softplus Softshrink Softsign Sqrt Sub Tan Tanh Threshold Where"
)
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# operations that only move entries: what they make of zeros tells which entries lead where
_MOVES = (
    "Alias AsStrided Cat Chunk Clone Contiguous Copy CopySlices Detach Diagonal Expand Flatten "
    "Gather Index IndexSelect Narrow Permute Repeat ReshapeAlias Reshape Select Slice Split "
    "SplitWithSizes Squeeze Stack Swapaxes T Take ToCopy Transpose Unbind Unflatten UnsafeSplit "
    "UnsafeView Unsqueeze View"
)
MOVES = frozenset(_MOVES.split())
_KINDS: dict[type, str] = {}  # see `kind_of`
OPENED = ELEMENTWISE | {"CopySlices"}  # what may put zeros in the place of a state
PLACES = MOVES | {"IndexPut", "IndexCopy", "SliceScatter", "SelectScatter", "DiagonalScatter"}


PLACE_FOR_HOOKS = "BackwardHookFunctionBackward"  # of a module, which changes nothing by itself
_Planned = tuple[Any, list[Edge], list[tuple[int, Edge]]]  # see `Between._planned`


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Inside, operations are in the dtypes of what they are given."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return autocast(device, enabled=False)


class NotReadable(Exception):
    """The nodes between two states cannot be called by themselves."""


def edge_of(tensor: Tensor) -> Edge | None:
    """Where a tensor sits in the graph; None outside any."""
    if not tensor.requires_grad:
        return None
    try:
        edge = torch.autograd.graph.get_gradient_edge(tensor)
    except AssertionError:  # a view made within an autograd.Function, a checkpoint for one
        return None
    return edge.node, edge.output_nr


class Between:
    """All paths from some edges back to the nodes of others; the others' nodes are not passed.

    Given `since`, the walk has no limit in depth but passes no node older than that number: nodes
    are numbered as they are made, and what lies on a path is younger than where the path ends.
    Without it a few nodes are looked at; where they are not all, the walk is made again down to the
    oldest end, for a sum over some of the paths is no derivative of anything.
    """

    def __init__(self, roots: list[Edge], ends: set[Any], since: int | None = None) -> None:
        self.ends = ends
        self.since = since
        self.whole = True  # whether every path has been walked
        children = self._collect([node for node, _ in roots])
        if not self.whole and ends:
            self.since, self.whole = min(node._sequence_nr() for node in ends), True
            children = self._collect([node for node, _ in roots], BETWEEN_NODES)
        self.children = children
        self.seen = children.keys()
        self.on_path = self._leading_to_ends()
        self.order = self._sorted(roots, children, self.on_path)
        self.reached = {node for node in self.order if node in ends}
        self._plan: list[_Planned] | None = None
        self._callable: set[Any] = set()  # nodes that may be called by themselves
        self._tensors: dict[Edge, tuple[tuple[int, ...], torch.dtype]] = {}  # see `_kept`

    def touched(self, roots: list[Edge]) -> set[Any]:
        """The nodes that the roots depend on, if what only moves entries is followed entry by entry.

        A state taken out of a stack of several leads to that one alone, not to its neighbours.
        """
        return {node for node, _ in descended(roots, lambda node: not self.children.get(node))}

    def _collect(self, roots: list[Any], most: int | None = None) -> dict[Any, list[Any]]:
        children: dict[Any, list[Any]] = {}
        queue = deque((node, 0) for node in roots)
        limit = most or (LINK_NODES if self.since is None else STEP_NODES)
        while queue:
            node, depth = queue.popleft()
            if node in children:
                continue
            if len(children) >= limit:
                if limit == STEP_NODES:
                    raise NotReadable(f"more than {STEP_NODES} operations")
                self.whole = False
                break
            older = self.since is not None and node._sequence_nr() < self.since
            far = self.since is None and depth >= LINK_DEPTH
            self.whole &= not far or node in self.ends
            stop = node in self.ends or older or far
            children[node] = [] if stop else [n for n, _ in node.next_functions if n is not None]
            queue.extend((child, depth + 1) for child in children[node])
        return children

    def parents(self) -> dict[Any, list[Any]]:
        """Of every node on a path those that it was used by."""
        found: dict[Any, list[Any]] = {}
        for node, below in self.children.items():
            for child in below:
                found.setdefault(child, []).append(node)
        return found

    def _leading_to_ends(self) -> set[Any]:
        parents = self.parents()
        found = {node for node in self.children if node in self.ends}
        stack = list(found)
        while stack:
            for parent in parents.get(stack.pop(), []):
                if parent not in found:
                    found.add(parent)
                    stack.append(parent)
        return found

    @staticmethod
    def _sorted(roots: list[Edge], children: dict[Any, list[Any]], wanted: set[Any]) -> list[Any]:
        """The wanted nodes, every node after all that lead to it."""
        below = {n: [c for c in children[n] if c in wanted] for n in wanted}
        waiting = dict.fromkeys(wanted, 0)
        for node in wanted:
            for child in below[node]:
                waiting[child] += 1
        ready = [node for node, count in waiting.items() if not count]
        order = []
        while ready:
            node = ready.pop()
            order.append(node)
            for child in below[node]:
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
        return order

    def pull(
        self,
        seeds: list[tuple[Edge, Tensor]],
        *,
        differentiable: bool = False,
        opened: bool = False,
    ) -> dict[Edge, Tensor]:
        """The vector-Jacobian product: what the seeds at the roots bring to the ends' edges.

        With `differentiable`, by operations that have a derivative where torch has the choice. With
        `opened`, elementwise operations on tensors of one shape pass on what they get: a mask, a gate
        or an activation whose derivative is zero then hides no path.

        Raises:
            NotReadable: a node is the user's own, its saved tensors are gone or hooked, or there
                are too many of them.
        """
        if not self.whole:
            raise NotReadable(f"more than {BETWEEN_NODES} operations")
        arrived: dict[Edge, Tensor] = {}
        for edge, seed in seeds:
            if edge[0] in self.on_path:
                arrived[edge] = arrived[edge] + seed if edge in arrived else seed
        hooked = saved_tensors_are_hooked()
        with torch.set_grad_enabled(differentiable and not hooked):
            for node, edges, below in self._planned():
                given = [arrived.get(edge) for edge in edges]
                if all(grad is None for grad in given):
                    continue
                if hooked or node not in self._callable:
                    check(node)
                    self._callable.add(node)
                passed = run(node, given)
                if opened and kind_of(node) in OPENED:
                    passed = as_opened(node, given, passed)
                for place, edge in below:
                    grad = passed[place] if place < len(passed) else None
                    if grad is not None:
                        if edge not in self._tensors:
                            self._tensors[edge] = _kept(edge)
                        grad = _shaped(grad, *self._tensors[edge])
                        arrived[edge] = arrived[edge] + grad if edge in arrived else grad
        return {edge: grad for edge, grad in arrived.items() if edge[0] in self.ends}

    def _planned(self) -> list[_Planned]:
        """Every node on the way but the ends, its outputs, and where what it makes of gradients goes."""
        if self._plan is None:
            self._plan = []
            for node in (node for node in self.order if node not in self.ends):
                edges = [(node, place) for place in range(outputs(node))]
                below = [
                    (place, edge)
                    for place, edge in enumerate(node.next_functions)
                    if edge[0] in self.on_path
                ]
                self._plan.append((node, edges, below))
        return self._plan


def descended(
    roots: Iterable[Edge], is_end: Callable[[Any], bool]
) -> Iterator[tuple[Any, dict[int, Tensor]]]:
    """The nodes that some edges descend from, the youngest first, and which entries of their outputs.

    Ends are not passed.

    What only moves entries is followed entry by entry, as in `Between.touched`: a row of a buffer that
    is written in place leads to what was written there, not to the other rows.
    """
    entries: dict[Any, dict[int, Tensor]] = {}
    waiting: list[tuple[int, int, Any]] = []

    def reach(edge: Edge, entry: Tensor) -> None:
        node, place = edge
        if node not in entries:
            entries[node] = {}
            heapq.heappush(waiting, (-node._sequence_nr(), id(node), node))
        known = entries[node].get(place)
        entries[node][place] = entry if known is None else known + entry

    for edge in roots:
        reach(edge, ones_at(edge))
    while waiting:
        node = heapq.heappop(waiting)[2]
        given = entries[node]
        yield node, given
        if is_end(node):
            continue
        passed = _entries(node, [given.get(place) for place in range(outputs(node))])
        for place, edge in enumerate(node.next_functions):
            entry = None if edge[0] is None else ones_at(edge) if passed is None else passed[place]
            if entry is not None and bool(entry.any()):
                reach(edge, entry)


def kind_of(node: Any) -> str:
    """The operation a node is of: "Mul" for MulBackward0."""
    kind = type(node)
    if kind not in _KINDS:
        known = kind.__name__.rstrip("0123456789").removesuffix("Backward")
        # a Function of the user's own may have any name
        _KINDS[kind] = f"{known} of one's own" if issubclass(kind, BackwardCFunction) else known
    return _KINDS[kind]


def ones_at(edge: Edge) -> Tensor:
    """Ones in the shape of the tensor at an edge."""
    known = edge[0]._input_metadata[edge[1]]
    return torch.ones(tuple(known.shape), dtype=known.dtype, device=known.device)


def is_another(found: Tensor, expected: Tensor) -> bool:
    """Whether a derivative by the graph is not the one that is expected."""
    half = found.dtype in (torch.float16, torch.bfloat16)
    largest = float(torch.maximum(found.abs().amax(), expected.abs().amax()))
    bound = (PARITY_HALF if half else PARITY_FLOAT32) * largest
    return bool(((found - expected).abs() > bound).any())


def _entries(node: Any, given: list[Tensor | None]) -> list[Tensor | None] | None:
    """Which entries of its inputs (not 0) the given entries of its outputs are; None: all of them."""
    if kind_of(node) not in PLACES:
        return None
    try:
        with torch.no_grad():
            found = called(node, [None if g is None else (g != 0).to(g.dtype) for g in given])
    except NotReadable:
        return None
    return [
        None if grad is None or edge[0] is None else fitted(grad, edge)
        for edge, grad in zip(node.next_functions, found, strict=False)
    ]


def _kept(edge: Edge) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of the tensor that sits at an edge."""
    known = edge[0]._input_metadata[edge[1]]
    return tuple(known.shape), known.dtype


def fitted(grad: Tensor, edge: Edge) -> Tensor:
    """What torch's engine does on the way: a gradient is given the shape and dtype of its tensor."""
    return _shaped(grad, *_kept(edge))


def _shaped(grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    grad = grad if grad.shape == shape else grad.sum_to_size(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)


def as_opened(
    node: Any, given: list[Tensor | None], passed: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What an operation would pass on if it multiplied its inputs by one; others as they are."""
    first = next(grad for grad in given if grad is not None)
    return tuple(
        first if edge[0] is not None and _shape(edge) == first.shape else grad
        for edge, grad in zip(node.next_functions, passed, strict=False)
    )


def _shape(edge: Edge) -> tuple[int, ...]:
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def outputs(node: Any) -> int:
    """How many outputs a node has."""
    return len(node._input_metadata)


def called(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What one node makes of the gradients at its outputs."""
    check(node)
    return run(node, grads)


def check(node: Any) -> None:
    """See that a node can be called by itself.

    Raises:
        NotReadable: it is the user's own, or calling it would run somebody's code.
    """
    name = type(node).__name__
    if name == PLACE_FOR_HOOKS:
        return
    if name == "CheckpointFunctionBackward":
        raise NotReadable("what a checkpoint recomputes")
    if isinstance(node, BackwardCFunction):
        reason = _why_not_alone(type(node), node._forward_cls)  # type: ignore[attr-defined]
        if reason:
            raise NotReadable(reason)
    if name == "CppFunction":  # called before the engine does, it can break later
        raise NotReadable(_foreign(node.name()))
    if runs_code(node):
        raise NotReadable("what a checkpoint recomputes, or hooks on saved tensors keep")


def run(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What a node that can be called makes of the gradients at its outputs."""
    if type(node).__name__ == PLACE_FOR_HOOKS:
        return tuple(grads)
    own = isinstance(node, BackwardCFunction)
    try:
        found = _run_own(node, grads) if own else node(*grads)
    except RuntimeError as error:  # freed by a backward, or a node that only the engine can run
        raise NotReadable(
            f"{type(node).__name__}, which could not be read ({briefly(error)})"
        ) from error
    return found if isinstance(found, tuple) else (found,)


def _foreign(name: str) -> str:
    """A node of which Python knows nothing but that it is there."""
    if "jit" in name or "DifferentiableGraph" in name:
        return "a function of torch.jit.script (its derivative runs in torch's own backward only)"
    return f"an operation written in C++ ({name.split('::')[-1]})"


# ------------------------------------------------------ Functions written in Python, by their backward


OWN = "an autograd.Function written in Python"
_refused = WeakKeyDictionary[type, str]()  # kinds of nodes -> why they are not run, "" if they are
_unchanging = WeakSet[type]()  # those that were seen to change nothing
alone: set[int] = set()  # threads in which such a backward runs by itself


def _why_not_alone(kind: type, function: Any) -> str:
    """Why the backward of a Function cannot be run once more, "" if it can."""
    talks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if function.__module__.startswith("torch.distributed.tensor"):
        return "a step whose weights are shared out among processes (tensor parallelism)"
    if talks or function.__module__.startswith("torch."):
        return f"{OWN}, which may talk to other processes" if talks else OWN
    if kind not in _refused:
        vjp = function.vjp is not torch.autograd.Function.vjp
        given = inspect.unwrap(function.vjp if vjp else function.backward)
        code = getattr(given, "__code__", None)
        names = {one.opname for one in dis.get_instructions(code)} if code else {"STORE_ATTR"}
        changes = names & {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
        _refused[kind] = f"{OWN} whose backward changes what it keeps" if changes else ""
    return _refused[kind]


class _Unchanging(TorchDispatchMode):
    """Within it nothing is drawn, and nothing is written to that was made before."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.held: dict[int, Any] = {id(t): t for t in map(_bare, given)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to leave this method alone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotReadable(f"{OWN} whose backward draws random numbers")
        written = [
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        ]
        given = [*itertools.compress(args, written), (kwargs or {}).get("out")]
        if any(isinstance(t, Tensor) and id(t) not in self.held for t in tree_leaves(given)):
            raise NotReadable(f"{OWN} whose backward changes a tensor in place")
        found = func(*args, **(kwargs or {}))
        self.held.update((id(t), t) for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


def _bare(tensor: Any) -> Any:
    """The tensor that a batched one (of vmap) stands for."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _run_own(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What the backward of a Function written in Python makes of the gradients at its outputs."""
    given = [
        torch.zeros_like(ones_at((node, place))) if grad is None else grad.clone()
        for place, grad in enumerate(grads)
    ]
    alone.add(threading.get_ident())
    try:
        known = type(node) in _unchanging
        with contextlib.nullcontext() if known else _Unchanging(given):
            found = node.apply(*given)
    except NotReadable as error:
        _refused[type(node)] = str(error)
        raise
    finally:
        alone.discard(threading.get_ident())
    _unchanging.add(type(node))
    # there is one for every argument, but edges are of tensors alone
    every = zip(
        found if isinstance(found, tuple) else (found,), node.needs_input_grad, strict=False
    )
    needed = [grad for grad, needs in every if needs]
    if len(needed) != sum(child is not None for child, _ in node.next_functions):
        raise NotReadable(OWN)
    return tuple(None if child is None else needed.pop(0) for child, _ in node.next_functions)


def refuse_alone(accumulate: bool) -> None:
    """A backward begins: a Function that runs by itself must not add to anybody's gradients."""
    if accumulate and threading.get_ident() in alone:
        raise NotReadable(f"{OWN} whose backward adds to the gradients of weights")
