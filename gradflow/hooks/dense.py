"""Dense step Jacobians of a hand-written loop, read from the user's own graph.

Letters: B sequences, S the width of all states side by side. The states of one step are independent
arguments: a path from one step's states ends at the first state of the step before that it meets,
so ∂s_t/∂c_{t−1} does not hold what goes through h_{t−1}. That is the state Jacobian, which composes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradflow.hooks.axes import Axis, as_rows, from_rows, usual_axis
from gradflow.hooks.graph import (
    LEAF,
    MOVES,
    OPENED,
    Between,
    Edge,
    NotReadable,
    as_opened,
    called,
    edge_of,
    fitted,
    kind_of,
    ones_at,
    outputs,
    without_autocast,
)
from gradflow.hooks.loops import rows as rows_of
from gradflow.hooks.loops.links import close_to, probe_of
from gradflow.hooks.loops.rows import picked
from gradflow.limits import DENSE_UNITS
from gradflow.process import quiet

# operations that multiply a state by zero, or put a zero in its place
MASKS = ("Mul", "Where", "MaskedFill", "MaskedScatter", "IndexPut", "IndexFill", "CopySlices")
# operations that add, or only move entries
SUMS = ("Add", "Sub", "View", "Reshape", "Unsafe", "Alias", "Clone", "Unsqueeze", "Squeeze", "Expand",
         "Slice", "Select", "Split", "Unbind", "Cat", "Stack", "Transpose", "Permute",
         "ToCopy", "AsStrided")  # fmt: skip


class Incomplete(NotReadable):
    """The loop carries more from step to step than its known states."""


class Mixed(NotReadable):
    """One sequence's next state depends on another sequence's state."""


def complete(result: Tensor, beside: list[Tensor]) -> Tensor:
    """The result; Incomplete where a gradient came to other results of the nodes that made the states."""
    if any(bool((grad != 0).any()) for grad in beside):
        raise Incomplete("a state that depends on another result of what made those before it")
    return result


@dataclass(eq=False)
class Place:
    """Where the states of one step sit in the graph, and how they lie side by side."""

    edges: dict[str, Edge]  # of those that need a gradient
    parts: dict[str, slice]  # state name -> its columns of (B, S)
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    axes: dict[str, Axis]  # which of a state's axes is the batch
    like: Tensor  # (B, S) zeros in the dtype that holds all of them

    @staticmethod
    def of(
        states: dict[str, Tensor], rows: dict[str, Tensor], axes: dict[str, Axis] | None = None
    ) -> Place:
        """The place of some states, given as the user's own tensors and as copies (B, width)."""
        return Place.at(
            {name: edge for name, state in states.items() if (edge := edge_of(state))},
            {name: state.shape for name, state in states.items()},
            rows,
            axes,
        )

    @staticmethod
    def at(
        edges: dict[str, Edge],
        shapes: dict[str, torch.Size],
        rows: dict[str, Tensor],
        axes: dict[str, Axis] | None = None,
    ) -> Place:
        """The same, given where the states sit and how they were shaped."""
        dtype = rows[next(iter(rows))].dtype
        for row in rows.values():
            dtype = torch.promote_types(dtype, row.dtype)
        parts, start = {}, 0
        for name, row in rows.items():
            parts[name] = slice(start, start + row.shape[1])
            start += row.shape[1]
        first = next(iter(rows.values()))
        return Place(
            edges=edges,
            parts=parts,
            shapes=shapes,
            dtypes={name: row.dtype for name, row in rows.items()},
            axes=axes or {name: usual_axis(shape) for name, shape in shapes.items()},
            like=torch.zeros(len(first), start, dtype=dtype, device=first.device),
        )

    @property
    def nodes(self) -> set[Any]:
        """The nodes of the states."""
        return {node for node, _ in self.edges.values()}

    @property
    def since(self) -> int:
        """The number of the oldest of its nodes; 0 where one is a leaf, which has no number."""
        numbers = [node._sequence_nr() for node in self.nodes]
        return 0 if not numbers or max(numbers) >= LEAF else min(numbers)

    @property
    def twice(self) -> bool:
        """Whether two of its states are one and the same tensor of the graph."""
        return len(set(self.edges.values())) < len(self.edges)

    def axis_of(self, name: str, shape: torch.Size) -> Axis:
        """The batch axis of a tensor of this shape that is, or becomes, the named state."""
        return self.axes[name] if len(shape) == len(self.shapes[name]) else usual_axis(shape)

    def apart_from(self, name: str) -> Place | None:
        """The other states, those of the same node left out; None where there is none."""
        node = self.edges[name][0]
        others = {n: e for n, e in self.edges.items() if n != name and e[0] is not node}
        return replace(self, edges=others) if others else None

    def seeds(self, seed: Tensor, names: list[str]) -> list[tuple[Edge, Tensor]]:
        """Columns of a seed (B, S) at the edges of the named states."""
        return [
            (
                self.edges[name],
                from_rows(
                    seed[:, self.parts[name]].to(self.dtypes[name]),
                    self.shapes[name],
                    self.axes[name],
                ),
            )
            for name in names
            if name in self.edges
        ]

    def gathered(self, found: dict[Edge, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(B, S) of the gradients at its edges, and the gradients at other results of the same nodes."""
        columns = []
        for name, part in self.parts.items():
            zero = self.like[:, part]
            grad = found.get(self.edges[name]) if name in self.edges else None
            rows = zero if grad is None else as_rows(grad, self.axes[name])
            columns.append(rows.to(zero.dtype))
        known = set(self.edges.values())
        return torch.cat(columns, dim=1), [g for edge, g in found.items() if edge not in known]


@dataclass(eq=False)
class Step:
    """The way from one step's states back to those of the step before."""

    before: Place
    now: Place
    between: Between
    # (B,) the sequence before that each is, −1 a new one; None: the same
    rows: Tensor | None = None

    @staticmethod
    def find(before: Place, now: Place, older: set[Any], since: int) -> Step | None:
        """The step, or None where no path leads back.

        older are the nodes of the states two steps back and more, since is the number of the oldest
        of those two steps back.

        Raises:
            Incomplete: the new states depend on more of the past than on the states before.
        """
        if not before.edges or not now.edges:
            return None
        roots = list(now.edges.values())
        between = Between(roots, before.nodes, min(since, before.since))
        if not between.reached:
            return None
        farther = (between.seen & older) - before.nodes
        if farther and farther & between.touched(roots):
            raise Incomplete("a state that depends on more of the past than the states before it")
        return Step(before, now, between)

    def pull(self, seed: Tensor, *, opened: bool = False) -> Tensor:
        """The vector-Jacobian product of a seed (B, S); opened as in `Between.pull`."""
        with without_autocast(self.now.like.device.type):
            seeds = self.now.seeds(seed, list(self.now.parts))
            found = self.between.pull(seeds, opened=opened)
        return complete(*self.before.gathered(found))

    def jacobian(self) -> Tensor:
        """∂s_t/∂s_{t−1}, (B, S, S), one product per unit with all sequences at once.

        Raises:
            NotReadable: an operation is not to be read, or sequences are mixed (batch
                normalisation), so that no sequence has a Jacobian of its own.
        """
        moved = len(self.now.like) != len(self.before.like)
        if moved:
            self.find_rows()
        found = self._rows(together=True)
        if not moved and self._is(found):
            self._find_begun(found)
            return found
        if not moved:  # torch batches some operations wrongly, `cdist` for one
            found = self._rows(together=False)
            if len(found) == 1 or self._is(found):
                return found
            self.find_rows()
        found = picked(found, self.rows, 0)
        if self.rows is None or not self._is(found):
            raise self.mixed()
        return found

    def _rows(self, *, together: bool) -> Tensor:
        rows = [
            complete(*unit_rows(self.now, self.before, self.between, name, together=together))
            for name in self.now.parts
        ]
        widest = torch.promote_types(self.before.like.dtype, self.now.like.dtype)
        return torch.cat(rows, dim=1).to(widest)

    def _is(self, found: Tensor) -> bool:
        """Whether a product shows that this is the Jacobian; what is not finite tells nothing."""
        if not bool(torch.stack(found.aminmax()).isfinite().all()):
            return True
        probe = probe_of(self.now.like).to(found.dtype)
        again = (probe.unsqueeze(1) @ found).squeeze(1)
        size = (probe.abs().unsqueeze(1) @ found.abs()).squeeze(1)
        return close_to(picked(self.pull(probe), self.rows, 0).to(self._coarsest()), again, size)

    def find_rows(self) -> None:
        """Which of the sequences before each one is; None stays where all are where they were.

        Raises:
            NotReadable: sequences are mixed or repeated.
        """
        probe = probe_of(self.now.like)
        count, before = len(probe), len(self.before.like)

        def pull(chosen: Tensor, *, opened: bool = False) -> Tensor:
            return self.pull(probe * chosen.to(probe.dtype).unsqueeze(1), opened=opened)

        found = rows_of.found(pull, count, probe.device)
        if found is None:
            raise self.mixed()
        unmoved = bool(((found == torch.arange(count, device=found.device)) | (found < 0)).all())
        self.rows = None if unmoved and count == before else found

    def _find_begun(self, found: Tensor) -> None:
        """Sequences that begin in the place of others: nothing of these was taken, not even masked."""
        nothing = ~found.flatten(1).any(1)
        if bool(nothing.any()):
            every = torch.arange(len(nothing), device=nothing.device)
            begun = nothing & ~self._left() & ~self._left(opened=True)
            self.rows = torch.where(begun, -1, every) if bool(begun.any()) else None

    def mixed(self) -> Mixed:
        """What to say of a step whose sequences depend on one another."""
        return Mixed(f"{self._what_mixes()}, so that no sequence has a Jacobian of its own")

    def _what_mixes(self) -> str:
        """Batch normalisation where the graph has it, else what can be seen of it."""
        if any("BatchNorm" in type(node).__name__ for node in self.between.order):
            return "batch normalisation in training, which mixes the sequences of a batch"
        return (
            "an operation that mixes the sequences of a batch (messages between the nodes of a "
            "graph, statistics over the batch, a view that folds one axis into another)"
        )

    def _coarsest(self) -> torch.dtype:
        """The least exact dtype on the way: under autocast it is not that of the states."""
        dtypes = {self.now.like.dtype, self.before.like.dtype}
        for node in self.between.order:
            dtypes |= {m.dtype for m in node._input_metadata if m.dtype.is_floating_point}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    # -- cuts --------------------------------------------------------------------------------

    def cut(self, flows: Tensor) -> Tensor:
        """(B,) where the state was multiplied by zero on its way into the step or out of it.

        flows (B,) is true where anything gets through. Exact zeros of the step itself are no cut:
        a gate that shuts, units that are all dead.
        """
        if self.rows is not None:
            flows = flows | (self.rows < 0)  # begins here
        if bool(flows.all()):
            return ~flows
        left = picked(self._left(), self.rows, 0)
        return ~flows & (~left | self._shut(self._exits()))

    def _left(self, *, opened: bool = False) -> Tensor:
        """(B before,) whether anything of a sequence's states gets to an operation of the step.

        What only moves entries or masks them is no such operation, unless its result is a summand of
        the new state: that is a gate. With `opened`, masks hide nothing, as in `Between.pull`.
        """
        first, before = self._first_operations()
        arrived: dict[Edge, Tensor] = {}

        def reach(edge: Edge, grad: Tensor | None) -> None:
            if edge[0] in before and grad is not None:
                grad = fitted(grad, edge)
                arrived[edge] = arrived[edge] + grad if edge in arrived else grad

        for node in self.between.order:
            if node in first:
                for edge in node.next_functions:
                    reach(edge, None if edge[0] not in before else ones_at(edge))
            elif node in before and node not in self.between.ends:
                given = [arrived.get((node, place)) for place in range(outputs(node))]
                if any(grad is not None for grad in given):
                    with torch.no_grad():
                        passed = called(node, given)
                    if opened and kind_of(node) in OPENED:
                        passed = as_opened(node, given, passed)
                    for edge, grad in zip(node.next_functions, passed, strict=False):
                        reach(edge, grad)
        found = {edge: grad for edge, grad in arrived.items() if edge[0] in self.between.ends}
        return (self.before.gathered(found)[0] != 0).any(1)

    def _first_operations(self) -> tuple[set[Any], set[Any]]:
        """The first operations on the states before, and what lies between these and them."""
        parents, summed = self.between.parents(), self._summed()
        first: set[Any] = set()
        before = {node for node in self.between.ends if node in self.between.on_path}
        stack = list(before)
        while stack:
            for node in parents.get(stack.pop(), []):
                if node in first or node in before:
                    continue
                above = parents.get(node, [])
                moves = kind_of(node) in MOVES
                gate = not moves and all(n in summed and _is(n, SUMS) for n in above)
                if node in self.now.nodes or gate or not (moves or _is(node, MASKS)):
                    first.add(node)
                else:
                    before.add(node)
                    stack.append(node)
        return first, before

    def _summed(self) -> set[Any]:
        """What the new states are sums of."""
        found: set[Any] = set()
        stack = [node for node in self.now.nodes if node in self.between.on_path]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if _is(node, SUMS) and node not in self.between.ends:
                stack += [n for n, _ in node.next_functions if n in self.between.on_path]
        return found

    def _exits(self) -> list[Any]:
        """The last operations that made the new states, [] where one of them is also the first."""
        nodes = [node for node in self.now.nodes if node in self.between.on_path]
        ends = self.between.ends
        if any(child in ends for node in nodes for child, _ in node.next_functions):
            return []
        return nodes

    def _shut(self, doors: list[Any]) -> Tensor:
        """(B,) where every one of these operations passes on exact zeros only."""
        batch, device = len(self.now.like), self.now.like.device
        shut = torch.full((batch,), bool(doors), device=device)
        for node in doors:
            if not _is(node, MASKS):
                return torch.zeros_like(shut)
            ones: list[Tensor | None] = [
                torch.ones(tuple(m.shape), dtype=m.dtype, device=m.device)
                for m in node._input_metadata[: outputs(node)]
            ]
            with torch.no_grad():
                grads = called(node, ones)
            for (child, _), grad in zip(node.next_functions, grads, strict=False):
                if child not in self.between.on_path or grad is None:
                    continue
                one = batch == 1
                if not one and (not grad.dim() or grad.shape[0] != batch):
                    return torch.zeros_like(shut)
                shut &= (grad.reshape(batch, -1) == 0).all(1)
        return shut


def _is(node: Any, names: tuple[str, ...]) -> bool:
    return type(node).__name__.startswith(names)


def within(place: Place) -> Tensor | None:
    """∂(a state)/∂(another state of the same step), (B, S, S); None where none is made from another.

    A path ends at the first other state that it meets, so (I − Mᵀ) turns gradients of the graph,
    where h_t moves with c_t, into those of independent states.
    """
    blocks = [
        (place.parts[name], _block(place, made, between, name))
        for name, made, between in ways_within(place)
    ]
    if not blocks:
        return None
    result = place.like.unsqueeze(1).expand(-1, place.like.shape[1], -1).clone()
    for part, block in blocks:
        result[:, part] = block
    return result


def ways_within(place: Place) -> Iterator[tuple[str, Place, Between]]:
    """Every state that is made from others of its step: its name, the others, and the way to them."""
    for name, root in place.edges.items():
        made = place.apart_from(name)
        if made is not None:
            between = Between([root], made.nodes, made.since)
            if between.reached:
                yield name, made, between


def _block(place: Place, made: Place, between: Between, name: str) -> Tensor:
    """(B, width, S): one state by the others; two products where it is elementwise."""
    part, device = place.parts[name], place.like.device.type
    width = part.stop - part.start

    def pull(seed: Tensor) -> Tensor:
        with without_autocast(device):
            return made.gathered(between.pull(place.seeds(seed, [name])))[0]

    probe, ones = probe_of(place.like), pull(torch.ones_like(place.like))
    probed = pull(probe)
    result = place.like.unsqueeze(1).expand(-1, width, -1).clone()
    elementwise = True
    for other in made.edges:
        columns = place.parts[other]
        mine, theirs = ones[:, columns], probed[:, columns]
        if mine.shape[1] != width or not close_to(theirs, probe[:, part] * mine, mine):
            elementwise = elementwise and not bool(theirs.any())
            continue
        result[:, :, columns] = torch.diag_embed(mine)
    return result if elementwise else unit_rows(place, made, between, name)[0]


def unit_rows(
    now: Place, before: Place, between: Between, name: str, *, together: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """The vector-Jacobian products of every unit of one state, (B, width, S), and what came beside.

    All units go at once where they may and every operation on the way can be batched, else one by one.
    """
    part, batch = now.parts[name], len(now.like)
    seeds = torch.eye(now.like.shape[1], dtype=now.like.dtype, device=now.like.device)[part]
    seeds = seeds.unsqueeze(1).expand(-1, batch, -1)

    def one(seed: Tensor) -> tuple[Tensor, list[Tensor]]:
        return before.gathered(between.pull(now.seeds(seed, [name])))

    with without_autocast(now.like.device.type):
        try:
            if not together:
                raise NotReadable("one by one")
            with quiet():
                # torch says that an operation is batched by a loop: no slower than one by one
                chunk = None if len(seeds) <= DENSE_UNITS else DENSE_UNITS
                rows, beside = torch.vmap(one, chunk_size=chunk)(seeds)
        except (NotReadable, RuntimeError):
            each = [one(seed) for seed in seeds]
            rows = torch.stack([row for row, _ in each])
            beside = [grad for _, grads in each for grad in grads]
    return rows.transpose(0, 1), beside


@dataclass(frozen=True)
class Dense:
    """An `Operator` over dense matrices, one (B, S, S) per step, converted as they are used."""

    matrices: list[Tensor]
    dtype: torch.dtype

    @property
    def length(self) -> int:
        """T."""
        return len(self.matrices)

    @property
    def batch(self) -> int:
        """B."""
        return int(self.matrices[0].shape[0])

    @property
    def size(self) -> int:
        """S."""
        return int(self.matrices[0].shape[1])

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        return block @ self.matrices[t].to(self.dtype).mT

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        return block @ self.matrices[t].to(self.dtype)
