"""A linear map kept as the operations that computed it, so that it can be run again at any time.

Nodes of the user's graph, called one by one, compute u ↦ Jᵀ u. The operations below autograd are
written down as they run, with copies of every constant that they read: weights, activations,
masks. What is written down holds no part of the user's graph, so a backward that frees it and an
optimizer that changes the weights leave it as it was. Run on u that needs a gradient, it gives J v
as the gradient of ⟨Jᵀ u, v⟩ with respect to u.

Letters: B sequences, m vectors, N entries of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from gradflow.hooks.graph import NotReadable
from gradflow.limits import MOST_KEPT, TAPE_BYTES, TAPE_ROUNDING
from gradflow.process import autocast, quiet

# operations that hand on the very numbers; as themselves they would cut the gradient
SAME_VALUES = ("aten.detach.default", "aten.alias.default")
MATRIX = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # the two factors


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the fused attention of the CPU does backward, by operations that have a derivative."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.mT * scale
    if attn_mask is not None:
        logits = logits + attn_mask
    if is_causal:
        above = torch.ones_like(logits, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(above, -torch.inf)
    share = torch.softmax(logits, dim=-1)
    moved = grad @ value.mT
    moved = share * (moved - (moved * share).sum(-1, keepdim=True)) * scale
    return moved @ key, moved.mT @ query, share.mT @ grad


# operations without a derivative -> the same by operations that have one
REPLACED = {"aten._scaled_dot_product_flash_attention_for_cpu_backward.default": attention_backward}


class TooMuch(NotReadable):
    """What a wide step reads is too much to keep."""


class Constants:
    """Copies of the tensors that tapes read, each kept once."""

    def __init__(self, most: int | None = None) -> None:
        self.most = MOST_KEPT if most is None else most  # bytes
        self.bytes = 0
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the numbers as they are now; the same one where they were copied before.

        Raises:
            NotReadable: there are too many of them.
        """
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        known = self._known.get(key)
        if known is not None and torch.equal(known, tensor):
            return known
        self.bytes += tensor.numel() * tensor.element_size()
        if self.bytes > self.most:
            raise TooMuch(
                f"wide steps whose weights and activations take more than {self.most >> 30} GiB to "
                "keep; record fewer sequences or fewer steps"
            )
        self._known[key] = tensor.detach().clone()
        return self._known[key]


@dataclass(frozen=True)
class _Slot:
    """A value that depends on u, by its number."""

    number: int


@dataclass(frozen=True)
class _Operation:
    """One operation: its arguments flattened, slots among them, and the slots of its results."""

    run: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    results: list[int | None]  # of the flattened results; None where one is no tensor
    mutates: bool

    def reads(self) -> set[int]:
        """The slots it reads."""
        return {leaf.number for leaf in self.leaves if isinstance(leaf, _Slot)}


class _Writing(TorchDispatchMode):
    """Writes down every operation that depends on u while it is entered."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.slots = {id(given): 0}
        self.shapes = {0: given.shape}
        self.dtypes = {given.dtype}
        self.held: list[Any] = [given]  # so that no id is given away twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to leave this method alone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        given = [self.slots.get(id(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves]
        if any(place is not None for place in given):
            self._write(func, leaves, spec, given, found)
        return found

    def _write(
        self, func: Any, leaves: list[Any], spec: TreeSpec, given: list[int | None], found: Any
    ) -> None:
        results = tree_leaves(found)
        if any(not isinstance(one, Tensor) and one is not None for one in results):
            raise NotReadable(f"{func}, which makes a number of a gradient")
        self.held += [leaves, results]
        if str(func) in SAME_VALUES:
            self.slots[id(found)] = self.slots[id(leaves[0])]
            return
        mutates = bool(func._schema.is_mutable)
        if mutates and given[0] is None:
            raise NotReadable(f"{func}, which writes a gradient into a tensor made before")
        places: list[int | None] = []
        for one in results:
            if one is None:
                places.append(None)
                continue
            slot = self.slots.setdefault(id(one), len(self.shapes))
            self.shapes[slot] = one.shape
            self.dtypes |= {one.dtype} if one.is_floating_point() else set()
            places.append(slot)
        kept = [
            leaf if place is None else _Slot(place)
            for leaf, place in zip(leaves, given, strict=True)
        ]
        run = REPLACED.get(str(func), func)
        self.operations.append(_Operation(run, kept, spec, places, mutates))


@dataclass(frozen=True)
class Tape:
    """u ↦ Jᵀ u for u of one shape (B, N), and its transpose."""

    operations: list[_Operation]
    result: int | None  # the slot of Jᵀ u; None where it does not depend on u: J is 0
    like: Tensor  # (B, N) zeros
    width: int  # N' of Jᵀ u
    work: float  # multiplications of one run
    numbers: int  # that all values of one run hold
    coarsest: torch.dtype  # the least exact on the way
    # which way -> whether torch sends several vectors through it as it does one
    batches: dict[str, bool] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(linear: Callable[[Tensor], Tensor], given: Tensor, constants: Constants) -> Tape:
        """Write down what a linear function of (B, N) does to one tensor.

        Raises:
            NotReadable: an operation is not to be run again, or its constants are too many.
        """
        writing = _Writing(given)
        with writing:
            found = linear(given)
        slot = writing.slots.get(id(found))
        kept = [] if slot is None else _needed(writing.operations, slot)
        copied = [
            replace(
                operation,
                leaves=[
                    constants.copy(leaf) if isinstance(leaf, Tensor) else leaf
                    for leaf in operation.leaves
                ],
            )
            for operation in kept
        ]
        return Tape(
            operations=copied,
            result=slot,
            like=torch.zeros_like(given),
            width=int(found.shape[1]),
            work=sum(_work(operation, writing.shapes) for operation in kept),
            numbers=sum(shape.numel() for shape in writing.shapes.values()),
            coarsest=max(writing.dtypes, key=lambda dtype: torch.finfo(dtype).eps),
        )

    def run(self, given: Tensor) -> Tensor:
        """Jᵀ u, (B, N')."""
        assert self.result is not None
        values: dict[int, Any] = {0: given}
        for operation in self.operations:
            leaves = [
                values[leaf.number] if isinstance(leaf, _Slot) else leaf
                for leaf in operation.leaves
            ]
            args, kwargs = tree_unflatten(leaves, operation.spec)
            found = tree_leaves(operation.run(*args, **kwargs))
            for place, one in zip(operation.results, found, strict=True):
                if place is not None:
                    values[place] = one
        made: Tensor = values[self.result]
        return made

    def pull(self, block: Tensor) -> Tensor:
        """Jᵀ of every vector of (B, m, N), (B, m, N')."""
        if self.result is None:
            return block.new_zeros(*block.shape[:2], self.width)
        with torch.no_grad(), autocast(block.device.type, enabled=False):
            return self._side_by_side("pull", self.run, block)

    def transposed(self) -> tuple[Tensor, Tensor] | None:
        """A graph of Jᵀ u over some u, for `push`; None where J is 0.

        Raises:
            NotReadable: an operation has no derivative.
        """
        if self.result is None:
            return None
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            autocast(self.like.device.type, enabled=False),
        ):
            given = self.like.clone().requires_grad_()
            found = self.run(given)
        return (given, found) if found.requires_grad else None

    def push(self, block: Tensor, graph: tuple[Tensor, Tensor] | None) -> Tensor:
        """J of every vector of (B, m, N'), given what `transposed` made."""
        if graph is None:
            return block.new_zeros(*block.shape[:2], self.like.shape[1])
        given, found = graph

        def one(vector: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(
                found, given, vector, retain_graph=True, materialize_grads=True
            )
            return pushed

        with autocast(block.device.type, enabled=False):
            return self._side_by_side("push", one, block)

    def _side_by_side(self, way: str, run: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        """Every vector of (B, m, N) through a map of (B, N): all at once where that is possible.

        Some operations cannot be batched, and `cdist` is batched wrongly: the first time one vector
        is sent by itself as well.
        """
        each = self.numbers * block.element_size()
        chunk = max(1, min(block.shape[1], TAPE_BYTES // max(1, each)))
        if chunk > 1 and self.batches.get(way, True):
            found = _together(run, block, chunk)
            if way not in self.batches:
                alone = run(block[:, -1])
                self.batches[way] = found is not None and self._same(found[:, -1], alone)
            if found is not None and self.batches[way]:
                return found
        return torch.stack([run(vector) for vector in block.unbind(1)], dim=1)

    def _same(self, mine: Tensor, theirs: Tensor) -> bool:
        """Equal up to rounding, sequence by sequence; NaN like NaN."""
        size = theirs.nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=1, keepdim=True)
        bound = TAPE_ROUNDING * torch.finfo(self.coarsest).eps * size
        unlike = (mine - theirs).abs() > bound
        return not bool((unlike | (mine.isnan() != theirs.isnan())).any())


def _together(run: Callable[[Tensor], Tensor], block: Tensor, chunk: int) -> Tensor | None:
    """All vectors at once; None where an operation cannot do that."""
    try:
        with quiet():
            # torch says that an operation is batched by a loop: no slower than one by one
            found: Tensor = torch.vmap(run, in_dims=1, out_dims=1, chunk_size=chunk)(block)
            return found
    except RuntimeError:
        return None


def _needed(operations: list[_Operation], result: int) -> list[_Operation]:
    """The operations that the result rests on; of several results only those are asked for."""
    wanted, kept = {result}, []
    for operation in reversed(operations):
        if not operation.mutates and not wanted & set(operation.results):
            continue
        kept.append(_masked(operation, wanted))
        wanted |= operation.reads()
    return kept[::-1]


def _masked(operation: _Operation, wanted: set[int]) -> _Operation:
    """Without the gradients of weights, which a backward of a layer makes beside that of its input."""
    schema = getattr(operation.run, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    if "output_mask" not in names:
        return operation
    args, kwargs = tree_unflatten(operation.leaves, operation.spec)
    masks = [place in wanted for place in operation.results]
    place = names.index("output_mask")
    if "output_mask" in kwargs:
        given, kwargs = list(kwargs["output_mask"]), dict(kwargs)
        kwargs["output_mask"] = [a and b for a, b in zip(given, masks, strict=True)]
    elif place < len(args):
        args = list(args)
        args[place] = [a and b for a, b in zip(args[place], masks, strict=True)]
    results = [one if one in wanted else None for one in operation.results]
    leaves, spec = tree_flatten((tuple(args), kwargs))
    return replace(operation, leaves=leaves, spec=spec, results=results)


def _work(operation: _Operation, shapes: dict[int, torch.Size]) -> float:
    """Multiplications: of matrix products and convolutions, else one for each number."""
    given = [
        shapes[leaf.number] if isinstance(leaf, _Slot) else leaf.shape
        for leaf in operation.leaves
        if isinstance(leaf, _Slot | Tensor)
    ]
    name = getattr(operation.run, "__name__", "").partition(".")[0]
    if name in MATRIX:
        first, second = (given[place] for place in MATRIX[name])
        return float(first.numel()) * second[-1]
    if name.startswith("convolution"):
        backward = name == "convolution_backward"
        weight = given[2 if backward else 1]
        made = given[0] if backward else shapes[operation.results[0] or 0]
        return float(made.numel()) * weight.numel() / weight[0]
    return float(max(shape.numel() for shape in given))
