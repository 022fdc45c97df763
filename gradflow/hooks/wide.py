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
from gradflow.hooks.dense import Incomplete, Place, Step
from gradflow.hooks.graph import Between, NotReadable
from gradflow.hooks.loops.links import probe_of
from gradflow.hooks.tape import Constants, Tape
from gradflow.recording import Operator

MEMORY = 2**28  # bytes of graphs for pushing that are kept, and of matrices written out after all
WRITING = 2.0  # predicted seconds up to which matrices are written out after all
SPEED, CALL = 5e9, 2e-4  # multiplications a second, and seconds of one vector however small
AGREED = 64  # units of rounding of the terms, within which pushing and pulling must agree


@dataclass(eq=False)
class WideStep:
    """One step of all B sequences, or its transpose where the last states are turned in order.

    It stands where a dense (B, S, S) matrix would: `pull` maps rows u to Aᵀ u, `push` v to A v.
    """

    tape: Tape | None  # None: the matrix is 0
    order: Tensor | None = None  # (S,) a permutation: this is A[order][:, order] of the tape's A

    @property
    def batch(self) -> int:
        """B, 0 where any will do."""
        return 0 if self.tape is None else len(self.tape.like)

    def like(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the dtype in which it computes; of the given one where it is 0."""
        return torch.zeros(0, dtype=dtype) if self.tape is None else self.tape.like

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S), in the block's dtype."""
        if self.tape is None:
            return torch.zeros_like(block)
        found = self.tape.pull(self._into(block).to(self.tape.like.dtype))
        return self._out_of(found.to(block.dtype))

    def push(self, block: Tensor, graph: tuple[Tensor, Tensor] | None) -> Tensor:
        """A of every row of (B, m, S); graph is what `Tape.transposed` made of the tape."""
        if self.tape is None:
            return torch.zeros_like(block)
        found = self.tape.push(self._into(block).to(self.tape.like.dtype), graph)
        return self._out_of(found.to(block.dtype))

    def turned(self, order: Tensor) -> WideStep:
        """With the states in another order."""
        return WideStep(self.tape, order if self.order is None else self.order[order])

    def _into(self, block: Tensor) -> Tensor:
        if self.order is None:
            return block
        turned = torch.empty_like(block)
        turned[..., self.order] = block
        return turned

    def _out_of(self, block: Tensor) -> Tensor:
        return block if self.order is None else block[..., self.order]


@dataclass(eq=False)
class GivenStep(WideStep):
    """A step of a wide loop that is known in another way: step t of an operator over all sequences."""

    operator: Operator | None = None
    t: int = 0

    @property
    def batch(self) -> int:
        """B."""
        return 0 if self.operator is None else self.operator.batch

    def pull(self, block: Tensor) -> Tensor:
        """Aᵀ of every row of (B, m, S)."""
        assert self.operator is not None
        return self.operator.pull(self.t, block.to(self.operator.dtype)).to(block.dtype)

    def push(self, block: Tensor, graph: tuple[Tensor, Tensor] | None) -> Tensor:
        """A of every row of (B, m, S)."""
        assert self.operator is not None
        return self.operator.push(self.t, block.to(self.operator.dtype)).to(block.dtype)


@dataclass(eq=False)
class ThroughStep(WideStep):
    """M where the first of two states of one width is a factor of each unit of the second."""

    through: Tensor | None = None  # (B, S/2)

    @property
    def batch(self) -> int:
        """B."""
        return 0 if self.through is None else len(self.through)

    def pull(self, block: Tensor) -> Tensor:
        """Mᵀ of every row of (B, m, S)."""
        assert self.through is not None
        first, _ = block.chunk(2, dim=2)
        moved = first * self.through.unsqueeze(1).to(block.dtype)
        return torch.cat([torch.zeros_like(first), moved], dim=2)


def wide_step(step: Step, constants: Constants, number: int) -> WideStep:
    """The tape of a step that was found in the user's graph.

    Args:
        step: the way from one step's states back to those of the step before.
        constants: what all tapes of the recording share.
        number: of the step in its loop. Whether sequences mix is asked of some at every step, of
            others at the next; the first ones ask for all.

    Raises:
        NotReadable: an operation is not to be read, too much would be kept, or sequences mix.
        Incomplete: the new states depend on more than the states before.
    """
    beside: list[Tensor] = []

    def linear(seed: Tensor) -> Tensor:
        row, more = step.before.gathered(
            step.between.pull(step.now.seeds(seed, list(step.now.parts)))
        )
        beside.extend(more)
        return row

    with torch.autocast(step.now.like.device.type, enabled=False):
        tape = Tape.of(linear, probe_of(step.now.like), constants)
    if any(bool((grad != 0).any()) for grad in beside):
        raise Incomplete("a state that depends on another result of what made those before it")
    if _mixes(tape, number):
        raise step.mixed()
    return WideStep(tape)


def _mixes(tape: Tape, number: int) -> bool:
    """Whether sequences depend on one another: what is pulled back to one must come from that one.

    Two sequences have numbers that differ in some bit: those with the bit must bring nothing to those
    without, and the other way round.
    """
    batch, device = len(tape.like), tape.like.device
    bits = (batch - 1).bit_length()
    every = torch.arange(batch, device=device)
    asked = range(bits) if number <= 1 else [number % bits] if bits else []
    for bit in asked:
        for side in (0, 1):
            chosen = (every >> bit & 1) == side
            seed = probe_of(tape.like).masked_fill(~chosen.unsqueeze(1), 0.0)
            there = tape.pull(seed.unsqueeze(1))[~chosen]
            if bool(((there != 0) & there.isfinite()).any()):
                return True
    return False


def wide_within(place: Place, constants: Constants) -> WideStep | None:
    """M of `gradflow.hooks.dense.within`, ∂(a state)/∂(another state of the same step), as a tape.

    None where no state is made from another.
    """
    ways = []
    for name, root in place.edges.items():
        made = place.apart_from(name)
        if made is None:
            continue
        between = Between([root], made.nodes, made.since)
        if between.reached:
            ways.append((name, made, between))
    if not ways:
        return None

    def linear(seed: Tensor) -> Tensor:
        total = torch.zeros_like(place.like)
        for name, made, between in ways:
            total = total + made.gathered(between.pull(place.seeds(seed, [name])))[0]
        return total

    with torch.autocast(place.like.device.type, enabled=False):
        return WideStep(Tape.of(linear, probe_of(place.like), constants))


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
    _graphs: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict, repr=False)
    _whole: int = 0  # B

    def __post_init__(self) -> None:
        tapes = [step.tape for step in self.steps if step is not None and step.tape is not None]
        known = [step.batch for step in self.steps if step is not None]
        self._whole = max(known, default=0) or len(self.sequences)
        each = max((tape.numbers * tape.like.element_size() for tape in tapes), default=0)
        self._keeps = each * len(tapes) <= MEMORY

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
        every = [s.tape.work for s in self.steps if s is not None and s.tape is not None]
        return max(every, default=0.0) / SPEED + CALL

    @property
    def is_cheap(self) -> bool:
        """Whether the matrices of these sequences are better written out after all."""
        each = self.length * self.size
        numbers = each * self.size * len(self.sequences)
        return each * self.seconds <= WRITING and numbers * self._itemsize() <= MEMORY

    def _itemsize(self) -> int:
        return max((s.tape.like.element_size() for s in self.steps if s and s.tape), default=8)

    def written(self) -> list[Tensor]:
        """The matrices themselves, (n, S, S) each, in the dtype of the steps."""
        size, found = self.size, []
        for t, step in enumerate(self.steps):
            like = torch.zeros(0, dtype=self.dtype) if step is None else step.like(self.dtype)
            eye = torch.eye(size, dtype=like.dtype, device=self.sequences.device)
            found.append(self.pull(t, eye.expand(self.batch, -1, -1)).contiguous())
        return found

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        step = self.steps[t]
        if step is None:
            return self._real(t, block)

        def run(whole: Tensor) -> Tensor:
            return step.push(whole, self._graph(t, step))

        return self._real(t, _of_all(run, step, block, self._chosen()))

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

    def _graph(self, t: int, step: WideStep) -> tuple[Tensor, Tensor] | None:
        if t in self._graphs:
            return self._graphs[t]
        if step.tape is None:
            return None
        try:
            made = step.tape.transposed()
        except (NotReadable, RuntimeError) as error:  # an operation without a second derivative
            raise RecordingError(
                f"its step Jacobians are not known: vectors cannot be pushed through its step "
                f"({str(error).splitlines()[0]})"
            ) from error
        _hold_together(step.tape, made)
        if self._keeps:
            self._graphs[t] = made
        return made


def _hold_together(tape: Tape, graph: tuple[Tensor, Tensor] | None) -> None:
    """⟨u, A v⟩ = ⟨Aᵀ u, v⟩ of every sequence, or a sentence: an operation that is not linear in u."""
    if graph is None:
        return
    u = probe_of(tape.like)
    v = u.flip(1)
    there, back = tape.push(v.unsqueeze(1), graph)[:, 0], tape.pull(u.unsqueeze(1))[:, 0]
    eps = torch.finfo(tape.coarsest).eps * tape.like.shape[1] ** 0.5
    left, right = (u * there).sum(1), (back * v).sum(1)
    size = (u * there).abs().sum(1) + (back * v).abs().sum(1)
    apart = (left - right).abs() > AGREED * eps * size
    if bool((apart & size.isfinite()).any()):
        raise RecordingError(
            "its step Jacobians are not known: vectors pushed through its step and pulled through it "
            "do not agree, so an operation of it hides what it depends on"
        )
