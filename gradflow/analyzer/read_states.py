"""The part of a layer's state that the loss reads: the rest has no vote in gains, rates and verdicts.

A counter, accumulated attention or a clock is carried from step to step with gain 1 for ever. Where
every ∂L/∂s_t of it is exactly 0 and nothing of it flows into what the loss reads, no gradient is
carried by it, and the gains that matter are those of the remaining block of A_t.

Letters: T timesteps, B sequences, S the state's width, R of its entries read, U unread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradflow.analyzer.jacobians import operator_of, state_size, transposed_step
from gradflow.cells.linear import HEAD_AXES, LinearSteps
from gradflow.errors import RecordingError
from gradflow.limits import ENTRIES_WIDEST, SEED
from gradflow.recording.source import Backward, Forward, OfStates, Operator, ThinOperator
from gradflow.recording.track import Track


@dataclass(frozen=True)
class ReadPart:
    """A layer without what the loss never reads, for pictures and for gains."""

    shown: Track  # without whole states that are never read
    judged: Track  # also without single entries of the others
    unread: str = ""  # what is left out, in words

    @property
    def words(self) -> str:
        """A sentence on what is left out."""
        return (
            f"{self.shown.name} carries {self.unread} from step to step, but the loss never reads "
            "it: it has no vote in gains, rate and verdict"
        )


def read_part(track: Track) -> ReadPart:
    """Leave out what the loss never reads; everything stays where no backward came, or all is read.

    Left out is the largest set U of entries with ∂L/∂s_t exactly 0 at every step of every sequence
    from which nothing flows into the others, ∂s_t[R]/∂s_{t−1}[U] = 0 at every step; of a linear
    recurrence whole heads, or channels, none of which enters another. Torch's own cells are left as
    they are: an exact zero there is a fault of the layer, not of the state.

    Args:
        track: one layer in one direction.

    >>> import torch, gradflow
    >>> with gradflow.record(torch.nn.Linear(1, 1)) as recording:
    ...     h, n = torch.ones(2, 1, requires_grad=True), torch.zeros(2, 1)
    ...     for _ in range(9):
    ...         h, n = gradflow.tap(h=0.5 * h, n=n + 0.1 * h)
    ...     h.sum().backward()
    >>> part = read_part(recording["loop"])
    >>> list(part.judged.states), part.unread
    (['h'], 'n')
    """
    everything = ReadPart(track, track)
    if track.spec is not None or not track.has_gradient:
        return everything
    try:
        read = _read_rows(track) if track.state_shape else _read_entries(track)
    except RecordingError:  # its step Jacobians are not known: nor are its gains
        return everything
    if read is None or all(bool(kept.all()) for kept in read.values()):
        return everything
    whole = {name: torch.full_like(kept, bool(kept.any())) for name, kept in read.items()}
    shown = _without(track, whole)
    some = {name: kept for name, kept in read.items() if bool(kept.any())}
    judged = shown if all(bool(kept.all()) for kept in some.values()) else _without(track, read)
    return ReadPart(shown, judged, _words(read, track.state_shape))


def _without(track: Track, read: dict[str, Tensor]) -> Track:
    if all(bool(kept.all()) for kept in read.values()):
        return track
    source, shape = PartSource(track.source, read, track.state_shape), track.state_shape
    if shape:
        shape = (len(source.rows()), *shape[1:])
    return replace(track, source=source, state_shape=shape, notes=track.notes, _cache={})


def _words(read: dict[str, Tensor], shape: tuple[int, ...]) -> str:
    """What is never read: whole states by name; heads, channels or entries by number."""
    found = []
    one, several = ("channel", "channels") if shape else ("entry", "entries")
    if len(shape) == HEAD_AXES:
        one, several = "head", "heads"
    for name, kept in read.items():
        if not bool(kept.any()):
            found.append(name)
        elif not bool(kept.all()):
            rows = ~kept.reshape(shape[0], -1)[:, 0] if shape else ~kept
            places = rows.nonzero().flatten().tolist()
            listed = ", ".join(str(place + 1) for place in places[:5])
            listed += ", …" if len(places) > 5 else ""
            found.append(f"{one if len(places) == 1 else several} {listed} of {name}")
    return " and ".join(found)


# ------------------------------------------------------------------------------ which entries are read


def _read_entries(track: Track) -> dict[str, Tensor] | None:
    """State name -> (width,) true where read; None where all are, or none is."""
    reached = torch.cat([_reached(track.grads[name]) for name in track.states])
    if bool(reached.all()) or not bool(reached.any()):
        return None
    owner = torch.cat(
        [torch.full((value.shape[-1],), i) for i, value in enumerate(track.states.values())]
    )
    if not _flows(track, ~reached, reached):
        read = reached
    elif state_size(track) <= ENTRIES_WIDEST:
        read = _closed(_entries_that_flow(track), reached)
    else:
        read = _closed_by_state(track, owner, reached)
    widths = [int(value.shape[-1]) for value in track.states.values()]
    return dict(zip(track.states, read.split(widths), strict=True))


def _read_rows(track: Track) -> dict[str, Tensor] | None:
    """The same of a linear recurrence: every entry of a head, or channel, of which any is reached."""
    ((name, grad),) = track.grads.items()
    rows = _reached(grad).reshape(track.state_shape[0], -1)
    read = rows.any(1, keepdim=True).expand_as(rows).flatten()
    operator = track.operator(sequences=torch.tensor([0])) if not bool(read.all()) else None
    return {name: read} if bool(read.any()) and isinstance(operator, LinearSteps) else None


def _reached(grad: Tensor) -> Tensor:
    """(width,): whether any step of any sequence has a gradient; NaN where there is padding."""
    found = torch.zeros(grad.shape[-1], dtype=torch.bool)
    for step in grad.detach().flip(0):  # the last ones reach most, mostly all
        found |= (step.nan_to_num(nan=0.0) != 0).any(0).cpu()
        if bool(found.all()):
            break
    return found


def _flows(track: Track, source: Tensor, target: Tensor) -> bool:
    """Whether anything of the source entries (S,) enters the target entries at any step.

    A random vector through each step tells: it is sent to exactly 0 only by a block of zeros.
    """
    operator = operator_of(track)
    generator = torch.Generator().manual_seed(SEED)
    probe = torch.rand(operator.size, generator=generator, dtype=operator.dtype) + 0.5
    block = (probe * source).expand(operator.batch, 1, -1)
    lengths = track.lengths.cpu()
    for t in range(operator.length):
        arrived = operator.push(t, block)[lengths > t, 0]
        if bool((arrived[:, target] != 0).any()):
            return True
    return False


def _entries_that_flow(track: Track) -> Tensor:
    """(S, S): whether entry j (column) enters entry i (row) at any step of any sequence."""
    operator, lengths = operator_of(track), track.lengths.cpu()
    found = torch.zeros(operator.size, operator.size, dtype=torch.bool)
    for t in range(operator.length):
        found |= (transposed_step(operator, t)[lengths > t] != 0).any(0).mT
    return found


def _closed(flows: Tensor, read: Tensor) -> Tensor:
    """All entries from which something comes into those that are read."""
    while True:
        more = read | flows[read].any(0)
        if torch.equal(more, read):
            return read
        read = more


def _closed_by_state(track: Track, owner: Tensor, reached: Tensor) -> Tensor:
    """The same for whole states of a wide layer: an unread state that flows into a read one is read."""
    count = int(owner.max()) + 1
    read = torch.stack([reached[owner == place].any() for place in range(count)])
    while not bool(read.all()):
        more = [
            place
            for place in (~read).nonzero().flatten().tolist()
            if _flows(track, owner == place, read[owner])
        ]
        if not more:
            break
        read[more] = True
    return read[owner]


# ------------------------------------------------------------------------------- a track of a part


@dataclass(frozen=True)
class PartOperator:
    """A_t restricted to some entries of the state, into which no other entry flows."""

    inner: Operator
    kept: Tensor  # (R,) their places

    @property
    def length(self) -> int:
        """T."""
        return self.inner.length

    @property
    def batch(self) -> int:
        """B."""
        return self.inner.batch

    @property
    def size(self) -> int:
        """R."""
        return len(self.kept)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its blocks."""
        return self.inner.dtype

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, R) to A_t v, of the kept entries."""
        return self._picked(self.inner.push(t, self._filled(block)))

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, R) to A_tᵀ u, of the kept entries."""
        return self._picked(self.inner.pull(t, self._filled(block)))

    def _filled(self, block: Tensor) -> Tensor:
        every = block.new_zeros(*block.shape[:2], self.inner.size)
        return every.index_copy(2, self.kept.to(block.device), block)

    def _picked(self, block: Tensor) -> Tensor:
        return block.index_select(2, self.kept.to(block.device))


@dataclass(frozen=True)
class ThinPart(PartOperator):
    """The same of a state through which few vectors at a time can be sent."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of one vector of every sequence through one step."""
        assert isinstance(self.inner, ThinOperator)
        return self.inner.seconds


@dataclass(frozen=True, eq=False)
class PartSource(OfStates):
    """A source without what the loss never reads."""

    kept: dict[str, Tensor]  # state name -> (width,) true on what is kept
    shape: tuple[int, ...] = ()  # of the whole state of a linear recurrence

    def rows(self) -> Tensor:
        """(n,) places of the heads, or channels, that are kept of a linear recurrence."""
        (kept,) = self.kept.values()
        return kept.reshape(self.shape[0], -1)[:, 0].nonzero().flatten()

    def _of(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value[..., self.kept[name].to(value.device)]
            for name, value in values.items()
            if bool(self.kept[name].any())
        }

    def forward(self) -> Forward:
        """The states that are kept."""
        found = self.inner.forward()
        return replace(found, states=self._of(found.states), initial=self._of(found.initial))

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Their gradients of single loss steps."""
        return self._made(self.inner.loss_steps(sequences, loss_steps, dtype))

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """A_t of the entries that are kept."""
        found = self.inner.operator(dtype, sequences)
        if isinstance(found, LinearSteps):
            return found.part(self.rows().to(found.decay.device))
        kept = torch.cat([self.kept[name] for name in self.inner.forward().states])
        part = ThinPart if isinstance(found, ThinOperator) else PartOperator
        return part(found, kept.nonzero().flatten())
