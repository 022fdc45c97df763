"""Wide steps: step Jacobians that are never written out, as tapes of products.

A step of more units than `gradflow.hooks.tapped.WIDEST` has too many entries to be worth one
backward for each. When its states come back, the operations of one backward of the step are written
down (`gradflow.hooks.tape`), with copies of what they read. From then on the step travels with its
mark as a map that pulls and pushes vectors: nothing holds the user's graph, and what an optimizer
does to the weights later changes nothing.

Letters: B sequences, n of them chosen, m vectors, S the width of all states side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradflow.errors import RecordingError
from gradflow.hooks.dense import Place, Step, complete, ways_within
from gradflow.hooks.graph import Between, NotReadable
from gradflow.hooks.loops.links import probe_of
from gradflow.hooks.tape import Constants, Tape
from gradflow.limits import (
    WIDE_BYTES,
    WIDE_CALL_SECONDS,
    WIDE_PASS_SECONDS,
    WIDE_ROUNDING,
    WIDE_SPEED,
    WIDE_WRITING,
)
from gradflow.process import autocast
from gradflow.recording.source import Operator

MOVED = (
    "a batch that shrinks, grows or is reordered while its states are too wide to be written out, of "
    "which that is not followed; ask for all their entries with gradflow.record(model, jacobians=True)"
)


class Moved(NotReadable):
    """The sequences of a wide state are others than those before."""


Push = Callable[[Tensor], Tensor]  # of every row of (B, m, S)


class WideStep:
    """One step of all B sequences, in the place of a dense (B, S, S) matrix A; this one is 0."""

    batch = 0  # B; 0 where any number of sequences will do
    seconds = 0.0  # predicted, of one vector of every sequence
    bytes = 0  # of what is kept to push
    dtype: torch.dtype | None = None  # in which it computes; None: in that of the block

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S), in the block's dtype."""
        return torch.zeros_like(block)

    def pusher(self) -> Push:
        """What gives A of every row of (B, m, S), in the block's dtype.

        Raises:
            RecordingError: an operation of the step has no second derivative.
        """
        return torch.zeros_like


class TapedStep(WideStep):
    """A step whose operations were written down."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.batch, self.dtype = len(tape.like), tape.like.dtype
        self.seconds = tape.work / WIDE_SPEED + tape.numbers * WIDE_PASS_SECONDS
        self.bytes = tape.numbers * tape.like.element_size()

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S)."""
        return self.tape.pull(block.to(self.dtype)).to(block.dtype)

    def pusher(self) -> Push:
        """A of every row, by the gradient of what is pulled."""
        graph = transposed(self.tape)
        return lambda block: self.tape.push(block.to(self.dtype), graph).to(block.dtype)


class TurnedStep(WideStep):
    """A[order][:, order] of another step: the states in another order."""

    def __init__(self, step: WideStep, order: Tensor) -> None:
        self.step, self.order, self.back = step, order, order.argsort()
        self.batch, self.dtype = step.batch, step.dtype
        self.seconds, self.bytes = step.seconds, step.bytes

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S)."""
        return self.step.pull(block[..., self.back])[..., self.order]

    def pusher(self) -> Push:
        """A of every row."""
        push = self.step.pusher()
        return lambda block: push(block[..., self.back])[..., self.order]


class MaskedStep(WideStep):
    """A step that is 0 for some sequences."""

    def __init__(self, step: WideStep, dead: Tensor) -> None:
        self.step, self.dead = step, dead.view(-1, 1, 1)
        self.batch, self.dtype = len(dead), step.dtype
        self.seconds, self.bytes = step.seconds, step.bytes

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S)."""
        return self.step.pull(block).masked_fill(self.dead, 0.0)

    def pusher(self) -> Push:
        """A of every row."""
        push = self.step.pusher()
        return lambda block: push(block).masked_fill(self.dead, 0.0)


class LedStep(WideStep):
    """K A + R: a step A and what then becomes of its states, into which those before it go as well.

    The tape pulls u to (Kᵀ u, Rᵀ u) side by side, or to Kᵀ u alone; then R is diagonal, or 0. For the
    sequences that are cut it is A itself.
    """

    def __init__(self, step: WideStep, tape: Tape, rest: Tensor | None, cut: Tensor) -> None:
        self.step, self.tape, self.rest, self.cut = step, tape, rest, cut.view(-1, 1, 1)
        self.batch, self.dtype = len(tape.like), tape.like.dtype
        self.seconds = step.seconds + tape.work / WIDE_SPEED + tape.numbers * WIDE_PASS_SECONDS
        self.bytes = step.bytes + tape.numbers * tape.like.element_size()

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ Kᵀ + Rᵀ of every row of (B, m, S)."""
        size = block.shape[2]
        found = self.tape.pull(block.to(self.dtype)).to(block.dtype)
        kept = torch.where(self.cut, block, found[..., :size])
        return self.step.pull(kept) + self._rest(block, found[..., size:])

    def _rest(self, block: Tensor, beside: Tensor) -> Tensor:
        if self.rest is not None:
            beside = block * self.rest.unsqueeze(1).to(block.dtype)
        return beside.masked_fill(self.cut, 0.0) if beside.shape[2] else torch.zeros_like(block)

    def pusher(self) -> Push:
        """K A + R of every row."""
        first, graph = self.step.pusher(), transposed(self.tape)

        def push(block: Tensor) -> Tensor:
            moved = first(block)
            both = torch.cat([moved, block], 2) if self.tape.width > block.shape[2] else moved
            found = self.tape.push(both.to(self.dtype), graph).to(block.dtype)
            if self.rest is not None:
                found = found + block * self.rest.unsqueeze(1).to(block.dtype)
            return torch.where(self.cut, moved, found)

        return push


class GivenStep(WideStep):
    """A step of a wide loop that is known in another way: step t of an operator over all sequences."""

    def __init__(self, operator: Operator, t: int) -> None:
        self.operator, self.t = operator, t
        self.batch, self.dtype = operator.batch, operator.dtype
        self.seconds = operator.batch * operator.size**2 / WIDE_SPEED

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S)."""
        return self.operator.pull(self.t, block.to(self.dtype)).to(block.dtype)

    def pusher(self) -> Push:
        """A of every row."""
        return lambda block: self.operator.push(self.t, block.to(self.dtype)).to(block.dtype)


class ThroughStep(WideStep):
    """M where the first of two states of one width is a factor (B, S/2) of each unit of the second."""

    def __init__(self, through: Tensor) -> None:
        self.through, self.batch = through, len(through)

    def pull(self, block: Tensor) -> Tensor:
        """Mᵀ of every row of (B, m, S)."""
        first, _ = block.chunk(2, dim=2)
        moved = first * self.through.unsqueeze(1).to(block.dtype)
        return torch.cat([torch.zeros_like(first), moved], dim=2)


def wide_step(step: Step, constants: Constants, number: int) -> TapedStep:
    """The tape of a step that was found in the user's graph; its number in the loop is given.

    Whether sequences mix is asked of some at every step, of others at the next; the first ones ask for all.

    Raises:
        NotReadable: an operation is not to be read, too much would be kept, sequences mix, or are
            in another order than before.
        Incomplete: the new states depend on more than the states before.
    """
    tape = tape_of(step.now, step.before, step.between, constants, differentiable=True)
    if mixes(tape, number):
        step.find_rows()
        raise Moved(MOVED)
    return TapedStep(tape)


def tape_of(
    now: Place,
    before: Place,
    between: Between,
    constants: Constants,
    *,
    differentiable: bool = False,
) -> Tape:
    """One backward from some states to those before them, written down.

    With `differentiable`, by operations that have a derivative where torch has the choice.

    Raises:
        NotReadable: an operation is not to be read, or too much would be kept.
        Incomplete: the new states depend on more than the states before.
    """
    beside: list[Tensor] = []

    def linear(seed: Tensor) -> Tensor:
        seeds = now.seeds(seed, list(now.parts))
        row, more = before.gathered(between.pull(seeds, differentiable=differentiable))
        beside.extend(more)
        return row

    with autocast(now.like.device.type, enabled=False):
        tape = Tape.of(linear, probe_of(now.like), constants)
    complete(tape.like, beside)
    return tape


def mixes(tape: Tape, number: int) -> bool:
    """Whether sequences depend on one another: what is pulled back to one must come from that one.

    Two sequences have numbers that differ in some bit: those with the bit must bring nothing to those
    without, and the other way round.
    """
    batch, device = len(tape.like), tape.like.device
    every = torch.arange(batch, device=device)
    asked = [(bit, side) for bit in range((batch - 1).bit_length()) for side in (0, 1)]
    if number > 1 and asked:
        asked = [asked[number % len(asked)]]
    for bit, side in asked:
        chosen = (every >> bit & 1) == side
        seed = probe_of(tape.like).masked_fill(~chosen.unsqueeze(1), 0.0)
        there = tape.pull(seed.unsqueeze(1))[~chosen]
        if bool(((there != 0) & there.isfinite()).any()):
            return True
    return False


def wide_within(place: Place, constants: Constants) -> TapedStep | None:
    """M of `gradflow.hooks.dense.within`, ∂(a state)/∂(another state of the same step), as a tape.

    None where no state is made from another.
    """
    ways = list(ways_within(place))
    if not ways:
        return None

    def linear(seed: Tensor) -> Tensor:
        total = torch.zeros_like(place.like)
        for name, made, between in ways:
            total = total + made.gathered(between.pull(place.seeds(seed, [name])))[0]
        return total

    with autocast(place.like.device.type, enabled=False):
        return TapedStep(Tape.of(linear, probe_of(place.like), constants))


def pulled(
    step: WideStep, rows: Tensor, sequences: Tensor | None = None, *, absolute: bool = False
) -> Tensor:
    """Aᵀ rows, (n, S) or (n, m, S), of all sequences or of the chosen ones.

    With `absolute` the rows are sizes, and so is the result: not |A|ᵀ rows, which takes every entry
    of A, but the larger of two products with them, once with alternating signs.
    """
    block = rows if rows.dim() == 3 else rows.unsqueeze(1)
    count = block.shape[1]
    if absolute:
        signs = torch.ones(block.shape[2], dtype=block.dtype, device=block.device)
        signs[1::2] = -1
        block = torch.cat([block, block * signs], dim=1)
    found = _of_all(step.pull, step, block, sequences)
    if absolute:
        found = torch.maximum(found[:, :count].abs(), found[:, count:].abs())
    return found if rows.dim() == 3 else found.squeeze(1)


def _of_all(
    run: Callable[[Tensor], Tensor], step: WideStep, block: Tensor, sequences: Tensor | None
) -> Tensor:
    """A product with the chosen sequences alone: the others carry zeros."""
    if sequences is None or not step.batch:
        return run(block)
    whole = block.new_zeros(step.batch, *block.shape[1:])
    whole[sequences] = block
    return run(whole)[sequences]


@dataclass
class Wide:
    """An `Operator` over wide steps; a product with some sequences costs as much as with all."""

    steps: list[WideStep | None]  # None: the identity, where nothing before was seen
    dtype: torch.dtype
    sequences: Tensor  # (n,)
    size: int
    lengths: Tensor | None = None  # (n,) past which the matrices are 0
    _pushers: dict[int, Push] = field(default_factory=dict, repr=False)
    _whole: int = 0  # B

    def __post_init__(self) -> None:
        known = [step for step in self.steps if step is not None]
        self._whole = max((step.batch for step in known), default=0) or len(self.sequences)
        self._keeps = sum(step.bytes for step in known) <= WIDE_BYTES

    @property
    def length(self) -> int:
        """T."""
        return len(self.steps)

    @property
    def batch(self) -> int:
        """The sequences chosen."""
        return len(self.sequences)

    @property
    def seconds(self) -> float:
        """Predicted seconds of one vector of every sequence through one step."""
        return (
            max((s.seconds for s in self.steps if s is not None), default=0.0) + WIDE_CALL_SECONDS
        )

    @property
    def is_cheap(self) -> bool:
        """Whether the matrices of these sequences are better written out after all."""
        each = self.length * self.size
        numbers = each * self.size * len(self.sequences)
        return (
            each * self.seconds <= WIDE_WRITING and numbers * self._own_dtype.itemsize <= WIDE_BYTES
        )

    @property
    def _own_dtype(self) -> torch.dtype:
        every = [step.dtype for step in self.steps if step is not None and step.dtype is not None]
        return max(every, key=lambda dtype: dtype.itemsize, default=self.dtype)

    def written(self) -> list[Tensor]:
        """The matrices themselves, (n, S, S) each, in the dtype of the steps."""
        eye = torch.eye(self.size, dtype=self._own_dtype, device=self.sequences.device)
        whole = eye.expand(self.batch, -1, -1)
        return [self.pull(t, whole).contiguous() for t in range(self.length)]

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        step = self.steps[t]
        if step is None:
            return self._real(t, block)
        push = self._pushers.get(t) or step.pusher()
        if self._keeps:
            self._pushers[t] = push
        return self._real(t, _of_all(push, step, block, self._chosen()))

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        step = self.steps[t]
        if step is None:
            return self._real(t, block)
        return self._real(t, _of_all(step.pull, step, block, self._chosen()))

    def _chosen(self) -> Tensor | None:
        every = torch.arange(self._whole, device=self.sequences.device)
        whole = len(self.sequences) == self._whole and bool((self.sequences == every).all())
        return None if whole else self.sequences

    def _real(self, t: int, block: Tensor) -> Tensor:
        if self.lengths is None or t < int(self.lengths.min()):
            return block
        return block.masked_fill((t >= self.lengths).view(-1, 1, 1), 0.0)


def transposed(tape: Tape) -> tuple[Tensor, Tensor] | None:
    """A graph to push with, held against pulling.

    Raises:
        RecordingError: an operation has no second derivative, or the two do not agree.
    """
    try:
        made = tape.transposed()
        agree = _agree(tape, made)
    except (NotReadable, RuntimeError) as error:
        raise RecordingError(
            "its step Jacobians are not known: vectors cannot be pushed through its step "
            f"({str(error).splitlines()[0]}); have them written out with jacobians=True, or use "
            "another operation"
        ) from error
    if not agree:
        raise RecordingError(
            "its step Jacobians are not known: vectors pushed through its step and pulled through it "
            "do not agree, so an operation of it hides what it depends on"
        )
    return made


def _agree(tape: Tape, graph: tuple[Tensor, Tensor] | None) -> bool:
    """Whether ⟨u, A v⟩ = ⟨Aᵀ u, v⟩ of every sequence: not so where an operation is not linear in u."""
    if graph is None:
        return True
    u = probe_of(tape.like)
    v = probe_of(tape.like.new_zeros(len(u), tape.width)).flip(1)
    there, back = tape.push(v.unsqueeze(1), graph)[:, 0], tape.pull(u.unsqueeze(1))[:, 0]
    eps = torch.finfo(tape.coarsest).eps * tape.like.shape[1] ** 0.5
    left, right = (u * there).sum(1), (back * v).sum(1)
    size = (u * there).abs().sum(1) + (back * v).abs().sum(1)
    apart = (left - right).abs() > WIDE_ROUNDING * eps * size
    return not bool((apart & size.isfinite()).any())
