"""A linear recurrence: S_t = A_t S_{t−1} + B_t, where A_t and B_t do not depend on the state.

Letters: T steps in processing order, B sequences, S the numbers of one state, (...) the state's own
shape: (heads, d_k, d_v), (channels, N) or (channels,). g is a gradient at the states, δ a total one.
The axes of time and batch come first, and time index 0 is the first step processed.

A_t is diag(decay_t), or diag(decay_t) + left_t right_tᵀ on the key axis of each head, which all
value columns share. Nothing here is squared in S: the state map is never written out. Gradients of
complex states are as torch has them, ∂L/∂Re + i ∂L/∂Im, so that transposed maps are conjugate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.errors import InputError, must_be

HEAD_AXES = 3  # of a state (heads, d_k, d_v)


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSteps:
    """All steps of one linear recurrence, S_t = A_t S_{t−1} + B_t and y_t = C_t(S_t).

    ``decay`` has as many axes as (T, B, *shape), and 1 on each axis of the state whose entries share
    one number: (T, B, heads, 1, 1) is a scalar per head, (T, B, heads, d_k, 1) a decay of every key.
    With ``left`` and ``right``, A_t = diag(decay) + left rightᵀ on the key axis of (heads, d_k, d_v),
    so the delta rule e^g (I − β k kᵀ) has decay e^g, left −e^g β k, right k; (I − β k kᵀ) diag(a) has
    decay a, left −β k, right a ⊙ k; RWKV-7's diag(w) + a bᵀ has decay w, left a, right b.

    It is an `Operator`: rows of a block are states flattened to S numbers.

    >>> import torch
    >>> steps = LinearSteps(shape=(1,), decay=torch.full((3, 1, 1), 0.5), write=(torch.ones(3, 1, 1),))
    >>> steps.states().flatten().tolist()
    [1.0, 1.5, 1.75]
    >>> steps.totals(torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)).flatten().tolist()
    [0.25, 0.5, 1.0]
    """

    shape: tuple[int, ...]  # of one state: (heads, d_k, d_v), (channels, N), (channels,)
    decay: Tensor  # (T, B, *shape), 1 wide where shared; real or complex
    left: Tensor | None = None  # (T, B, heads, d_k); with `right` the rank-one part
    right: Tensor | None = None  # (T, B, heads, d_k)
    write: tuple[Tensor, ...] = ()  # factors whose broadcast product is B_t; empty: not known
    initial: Tensor | None = None  # (B, *shape); None: zeros
    # y of all steps, in the layout of what the model's function returned, from the states
    # (T, B, *shape), as differentiable torch code; None: the states themselves are what is read
    read: Callable[[Tensor], Tensor] | None = None
    # its transposed map where it is linear in the states: ∂L/∂y -> (T, B, *shape); None: by autograd
    read_back: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        wide = tuple(self.decay.shape)
        state = wide[2:]
        fits = len(state) == len(self.shape) and all(
            n in (1, full) for n, full in zip(state, self.shape, strict=True)
        )
        if len(wide) < 3 or not fits or 0 in wide:
            expected = f"of shape (T, B, {', '.join(map(str, self.shape))}), or 1 where shared"
            raise InputError(must_be("decay", expected, wide, "give it an axis for every axis"))
        if (self.left is None) != (self.right is None):
            raise InputError("left and right must be given together: A = diag(decay) + left rightᵀ")
        for name, vector in (("left", self.left), ("right", self.right)):
            if vector is None:
                continue
            wanted = (*wide[:2], *self.shape[:2])
            if len(self.shape) != HEAD_AXES or tuple(vector.shape) != wanted:
                raise InputError(
                    must_be(
                        name,
                        f"of shape (T, B, heads, d_k) = {wanted} beside a state (heads, d_k, d_v)",
                        tuple(vector.shape),
                        "give one vector on the key axis of every head and step",
                    )
                )
            if state[2] != 1:
                raise InputError(
                    must_be(
                        f"decay beside {name}",
                        "shared by all value columns, (T, B, ·, ·, 1)",
                        wide,
                        "a rank-one part acts on the key axis alone",
                    )
                )

    # ---------------------------------------------------------------------- as an operator

    @property
    def length(self) -> int:
        """T."""
        return int(self.decay.shape[0])

    @property
    def batch(self) -> int:
        """B."""
        return int(self.decay.shape[1])

    @property
    def size(self) -> int:
        """S, the numbers of one state."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that products are computed in."""
        return self.decay.dtype

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        return self._through(t, block, self.left, self.right, conjugate=False)

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u, conjugate where states are complex."""
        return self._through(t, block, self.right, self.left, conjugate=True)

    def _through(
        self, t: int, block: Tensor, into: Tensor | None, along: Tensor | None, *, conjugate: bool
    ) -> Tensor:
        rows = block.unflatten(-1, self.shape)  # (B, m, *shape)
        factor = self.decay[t].conj() if conjugate else self.decay[t]
        moved = factor.unsqueeze(1) * rows
        if into is not None and along is not None:
            into, along = into[t, :, None, :, :, None], along[t, :, None, :, :, None]
            if conjugate:
                into, along = into.conj(), along.conj()
            moved = moved + into * (along * rows).sum(-2, keepdim=True)
        return moved.flatten(2)

    # -------------------------------------------------------------------------- the scans

    def states(self) -> Tensor:
        """S_1 … S_T from the writes and the initial state, (T, B, *shape)."""
        if not self.write:
            raise InputError("the states of a recurrence are known only with what it writes, B_t")
        dtype = self.decay.dtype
        for factor in self.write:
            dtype = torch.promote_types(dtype, factor.dtype)
        found = self.decay.new_empty(self.length, self.batch, self.size, dtype=dtype)
        state = found.new_zeros(self.batch, 1, self.size)
        if self.initial is not None:
            state = self.initial.to(dtype).reshape(self.batch, 1, self.size)
        for t in range(self.length):
            written = math.prod((factor[t] for factor in self.write[1:]), start=self.write[0][t])
            state = self.push(t, state) + written.expand(self.batch, *self.shape).reshape(
                self.batch, 1, self.size
            )
            found[t] = state[:, 0]
        return found.unflatten(-1, self.shape)

    def totals(self, direct: Tensor) -> Tensor:
        """δ_t = g_t + A_{t+1}ᵀ δ_{t+1} of all steps, from direct gradients g (T, B, *shape)."""
        return self.totals_of(direct.flatten(2).unsqueeze(2)).squeeze(2).unflatten(-1, self.shape)

    def totals_of(self, direct: Tensor) -> Tensor:
        """The same of n gradients at once, (T, B, n, S)."""
        dtype = torch.promote_types(direct.dtype, self.dtype)
        found = torch.empty(direct.shape, dtype=dtype, device=direct.device)
        later: Tensor | None = None
        for t in reversed(range(self.length)):
            later = direct[t].to(dtype) if later is None else direct[t] + self.pull(t + 1, later)
            found[t] = later
        return found

    def direct(self, states: Tensor, grad: Tensor) -> Tensor:
        """g_t = C_tᵀ(∂L/∂y_t), (T, B, *shape), from ∂L/∂y in the layout of y."""
        if self.read_back is not None:
            return self.read_back(grad)
        if self.read is None:
            return grad.reshape(self.length, self.batch, *self.shape)
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.read(leaf), leaf, grad)
        return found

    # ------------------------------------------------------------------------ other views

    def to(self, dtype: torch.dtype) -> LinearSteps:
        """What A_t is made of in another precision, complex where it was; writes and reads go."""
        wide = dtype.to_complex()
        return self._each(lambda array: array.to(wide if array.is_complex() else dtype))

    def of(self, sequences: Tensor) -> LinearSteps:
        """A_t of some sequences."""
        return self._each(lambda array: array[:, sequences.to(array.device)])

    def part(self, rows: Tensor) -> LinearSteps:
        """A_t of some heads, or channels, (n,) places on the first axis of a state: none enters another."""
        shape = (len(rows), *self.shape[1:])
        return self._each(lambda array: array if array.shape[2] == 1 else array[:, :, rows], shape)

    def masked(self, kept: Tensor) -> LinearSteps:
        """The same with A_t = 0 where `kept` (T, B) is false: past an end, at a cut."""

        def made(array: Tensor) -> Tensor:
            there = kept.to(array.device).view(*kept.shape, *[1] * (array.dim() - 2))
            return array.masked_fill(~there, 0.0)

        return self._each(made)

    def taken(self, index: Tensor) -> LinearSteps:
        """The steps in another order: A of sequence b at step t is that of step index[t, b]."""
        columns = torch.arange(self.batch)
        return self._each(lambda array: array[index.to(array.device), columns.to(array.device)])

    def _each(
        self, made: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None
    ) -> LinearSteps:
        return LinearSteps(
            shape=shape or self.shape,
            decay=made(self.decay),
            left=None if self.left is None else made(self.left),
            right=None if self.right is None else made(self.right),
        )

    @property
    def modulus(self) -> Tensor:
        """|decay|, (T, B, *shape) or 1 wide where shared."""
        return self.decay.abs()


def side_by_side(parts: Sequence[LinearSteps], *, time: bool) -> LinearSteps:
    """One recurrence whose steps are those of some, one after the other in time, or beside it.

    Args:
        parts: of one shape. Beside each other they are of one length.
        time: whether to put the steps one after the other; else the sequences side by side.
    """
    first, axis = parts[0], 0 if time else 1
    if len(parts) == 1:
        return first

    def joined(arrays: list[Tensor]) -> Tensor:
        widest = torch.broadcast_shapes(*(array.shape[2:] for array in arrays))
        return torch.cat([array.expand(*array.shape[:2], *widest) for array in arrays], axis)

    ranked = any(part.left is not None for part in parts)
    vectors: dict[str, Tensor | None] = {"left": None, "right": None}
    for name in vectors if ranked else ():
        each = [getattr(part, name) for part in parts]
        none = (first.decay.new_zeros(part.length, part.batch, *part.shape[:2]) for part in parts)
        vectors[name] = joined([z if v is None else v for v, z in zip(each, none, strict=True)])
    decay = joined([part.decay for part in parts])
    return LinearSteps(shape=first.shape, decay=decay, left=vectors["left"], right=vectors["right"])
