"""Tracks of other sequences: some of a track's own, or several runs of one layer together.

What is too dear to be measured of all is measured of a few. And one sentence at a time, episode after
episode, a question and an answer through one encoder: each run is a track (``rnn.l0``, ``rnn.l0@2``).
With the same weights they are one layer, and more sequences say more of it than one.
Letters: T steps of the longest run, B sequences of all runs, m of a track's sequences chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F

from gradflow.cells.linear import LinearSteps, side_by_side
from gradflow.errors import RecordingError
from gradflow.recording.source import (
    Backward,
    Contributions,
    Forward,
    Operator,
    Outer,
    Parity,
    Source,
    ThinOperator,
    WrappedSource,
)
from gradflow.recording.track import Track, unnumbered
from gradflow.recording.tracks import Recording


def chosen(track: Track, sequences: Sequence[int]) -> Track:
    """The same layer with only some of its sequences, in that order.

    Args:
        track: one layer in one direction.
        sequences: m indices of the batch.

    Returns:
        A track of m sequences; its parity is that of the whole.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.randn(5, 4, 1))[0].sum().backward()
    >>> some = chosen(recording["l0"], [3, 1])
    >>> torch.equal(some.h, recording["l0"].h[:, [3, 1]]), some.batch
    (True, 2)
    """
    index = torch.as_tensor(sequences, dtype=torch.long)
    at = index.to(track.mask.device)
    return replace(
        track,
        lengths=track.lengths[index.to(track.lengths.device)],
        mask=track.mask[:, at],
        cuts=track.cuts[:, at],
        cut_kinds=None if track.cut_kinds is None else track.cut_kinds[:, at],
        source=ChosenSource(track.source, index),
        _cache={},
    )


@dataclass(frozen=True, eq=False)
class ChosenSource(WrappedSource):
    """What is read of another source, of some sequences."""

    index: Tensor  # (m,) which

    def _columns(self, array: Tensor) -> Tensor:
        return array[:, self.index.to(array.device)]

    def _marks(self, array: Tensor | None) -> Tensor | None:
        return None if array is None else self._columns(array)

    def forward(self) -> Forward:
        """States, gates and inputs."""
        found = self.inner.forward()
        return Forward(
            states={name: self._columns(state) for name, state in found.states.items()},
            initial={n: state[self.index.to(state.device)] for n, state in found.initial.items()},
            gates={name: self._columns(gate) for name, gate in found.gates.items()},
            inputs=self._marks(found.inputs),
        )

    def _of(self, found: Backward | None) -> Backward | None:
        if found is None:
            return None
        grads = {name: self._columns(grad) for name, grad in found.grads.items()}
        rest = map(self._marks, (found.direct, found.delta, found.delta_hh))
        return Backward(grads, *rest)

    def backward(self) -> Backward | None:
        """Total gradients."""
        return self._of(self.inner.backward())

    def last(self) -> Backward | None:
        """Total gradients of the last loss step alone."""
        return self._of(self.inner.last())

    def partial(self) -> dict[str, Tensor] | None:
        """State-partial gradients."""
        found = self.inner.partial()
        return None if found is None else {name: self._columns(g) for name, g in found.items()}

    def reached(self) -> Tensor | None:
        """Where the loss reaches what the module returned."""
        return self._marks(self.inner.reached())

    def arriving(self) -> Tensor | None:
        """Where a gradient comes to the layer not through its own recurrence."""
        return self._marks(self.inner.arriving())

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps."""
        return self.inner.loss_steps(self.index[sequences], loss_steps, dtype)

    def contributions(self, sequences: Tensor) -> Contributions | None:
        """∂L/∂W_hh and ∂L/∂W_ih by lag."""
        return self.inner.contributions(self.index[sequences])

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Step Jacobians."""
        return self.inner.operator(dtype, self.index[sequences])

    def changed(self, **changes: float) -> tuple[Source, dict[str, Tensor]]:
        """The calls again with changed weights."""
        source, weights = self.inner.changed(**changes)
        return ChosenSource(source, self.index), weights

    def alone(self) -> Source | None:
        """The layer with its inputs held fixed."""
        source = self.inner.alone()
        return None if source is None else ChosenSource(source, self.index)


SEVERITY = ("not applicable", "passed", "failed")


def pooled(recording: Recording) -> tuple[Recording, list[str]]:
    """The recording with all runs of one layer as one track, and a sentence on each such layer.

    Pooled are tracks of one name but for what follows an @, with the same cell, weights and states.
    The recording itself stays as it is.

    Args:
        recording: what ``gradflow.record`` saw.

    Returns:
        The recording itself where nothing is pooled.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 2)
    >>> with gradflow.record(rnn) as recording:
    ...     for steps in (5, 3):
    ...         rnn(torch.randn(steps, 1, 1))[0].sum().backward()
    >>> one, said = pooled(recording)
    >>> one["l0"].lengths.tolist(), len(recording), len(said)
    ([5, 3], 2, 1)
    """
    runs: dict[tuple[object, ...], list[list[Track]]] = {}
    bases = Counter(unnumbered(track.name) for track in recording.values())
    joint = {track.loop for track in recording.values()}
    for track in recording.values():
        alone = bases[unnumbered(track.name)] == 1 or track.name in joint
        kind = (track.name,) if alone else _kind(track)
        alike = runs.setdefault(kind, [])
        known = next((run for run in alike if _of_same_weights(run[0], track)), None)
        if known is None:
            alike.append([track])
        else:
            known.append(track)
    groups = [run for alike in runs.values() for run in alike]
    several = [run for run in groups if len(run) > 1]
    said = [_words(run) for run in several] + _applied_words(groups)
    said += [_changed_words(alike) for alike in runs.values() if len(alike) > 1]
    if not several:
        return recording, list(dict.fromkeys(filter(None, said)))
    made = Recording(recording.model_name)
    made.notes, made.provenance = list(recording.notes), dict(recording.provenance)
    made.unseen, made.empty_reason = recording.unseen, recording.empty_reason
    made.paddings, made.lengths_given = recording.paddings, recording.lengths_given
    for run in groups:
        made.add(as_one(run))
    return made, list(dict.fromkeys(filter(None, said)))


def of_all_processes(recording: Recording, parts: Sequence[Recording]) -> None:
    """Every track of a recording with the sequences of all processes, in the order of their ranks.

    Args:
        recording: that of one process, whose tracks are replaced.
        parts: those of all, this one among them.
    """
    names = dict.fromkeys(name for part in parts for name in part.tracks)
    for name in names:
        run = [part.tracks[name] for part in parts if name in part.tracks]
        unlike = [track for track in run if _shape(track) != _shape(run[0])]
        if unlike:
            if name in recording.tracks:
                recording.drop(recording.tracks[name])
            recording.notes.append(
                f"{name} is left out: it is {run[0].cell} of width {run[0].hidden} in one process, "
                f"{unlike[0].cell} of width {unlike[0].hidden} in another"
            )
        elif len(parts) > 1:
            recording.add(as_one(run))
            reason = f"it ran in {len(run)} of the {len(parts)} processes"
            recording.notes += [f"{name}: {reason}"] if len(run) < len(parts) else []


def _shape(track: Track) -> tuple[object, ...]:
    widths = tuple((name, state.shape[2]) for name, state in track.states.items())
    return track.cell, track.reverse, widths


def _kind(track: Track) -> tuple[object, ...]:
    if track.loop or track.alone is not None or not _is_known(track):
        return (track.name,)
    widths = tuple((name, state.shape[2]) for name, state in track.states.items())
    place = (unnumbered(track.name), track.cell, track.owner, track.reverse, track.code)
    # a run of one step is not joined to longer ones: it exercises no recurrence
    return *place, track.training, track.depth, track.steps < 2, widths


def _is_known(track: Track) -> bool:
    """Whether it has known step Jacobians, and weights that can be compared."""
    if not (track.weights or track.stamp):
        return False
    try:
        track.operator(sequences=torch.zeros(1, dtype=torch.long))
    except RecordingError:
        return False
    return True


def _of_same_weights(one: Track, other: Track) -> bool:
    mine, theirs = one.weights, other.weights
    return (
        one.stamp == other.stamp
        and set(mine) == set(theirs)
        and all(mine[n] is theirs[n] or torch.equal(mine[n], theirs[n]) for n in mine)
    )


def _words(run: list[Track]) -> str:
    sequences = sum(track.batch for track in run)
    return (
        f"{run[0].name} ran {len(run)} times from a start of its own: its runs are pooled as one layer "
        f"of {sequences} sequences; gradflow.analyze(recording, pool=False) keeps them apart"
    )


def _changed_words(alike: list[list[Track]]) -> str:
    name = unnumbered(alike[0][0].name)
    return (
        f"{name} ran several times, and its weights were not the same each time (an optimizer's step, "
        "weights computed anew): runs of different weights are layers of their own in this report"
    )


def _applied_words(groups: list[list[Track]]) -> list[str]:
    """On layers that ran on what came of their own runs: those are no more sequences."""
    deepest: dict[str, int] = {}
    for run in groups:
        base = unnumbered(run[0].name)
        deepest[base] = max(run[0].depth, deepest.get(base, 0))
    alike: dict[int, list[str]] = {}
    for name, depth in deepest.items():
        alike.setdefault(depth, []).append(name)
    return [
        f"{', '.join(names)}: {depth} runs one upon the other, each on what came of the one before; each of "
        "these is a layer of its own in this report, and no more sequences of one"
        for depth, names in alike.items()
        if depth > 1
    ]


def as_one(run: list[Track]) -> Track:
    """One track of the sequences of several; the track itself where there is one.

    Args:
        run: of the same layer, with the same weights.
    """
    if len(run) == 1:
        return run[0]
    first, steps = run[0], max(track.steps for track in run)
    device = first.mask.device

    def joined(arrays: list[Tensor]) -> Tensor:
        return torch.cat([_longer(array.to(device), steps, False) for array in arrays], dim=1)

    return replace(
        first,
        lengths=torch.cat([track.lengths.to(device) for track in run]),
        mask=joined([track.mask for track in run]),
        cuts=joined([track.cuts for track in run]),
        cut_kinds=joined([_kinds(track) for track in run]),
        notes=list(dict.fromkeys(note for track in run for note in track.notes)),
        source=PooledSource(run),
        runs=tuple(track.batch for track in run),
        _cache={},
    )


def _kinds(track: Track) -> Tensor:
    known = track.cut_kinds
    return torch.zeros_like(track.cuts, dtype=torch.int8) if known is None else known


def _longer(array: Tensor, steps: int, value: float) -> Tensor:
    """(T, B, ...) with `value` at the steps that this run does not have."""
    more = [0, 0] * (array.dim() - 1) + [0, steps - len(array)]
    return F.pad(array, more, value=value) if len(array) < steps else array


@dataclass(eq=False)
class PooledSource:
    """What the track of several runs reads its numbers from: theirs, side by side."""

    runs: list[Track]

    @property
    def version(self) -> int:
        """How many backwards reached the runs, each counted where it came."""
        return sum(track.source.version for track in self.runs)

    @property
    def _steps(self) -> int:
        return max(track.steps for track in self.runs)

    def _joined(self, arrays: list[Tensor], value: float = torch.nan) -> Tensor:
        """(T, B, ...) of all runs."""
        return torch.cat([_longer(array, self._steps, value) for array in arrays], dim=1)

    def _named(self, each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: self._joined([one[name] for one in each]) for name in each[0]}

    def forward(self) -> Forward:
        """States, gates and inputs."""
        each = [track.source.forward() for track in self.runs]
        inputs = [one.inputs for one in each if one.inputs is not None]
        names = set.intersection(*(set(one.initial) for one in each))
        return Forward(
            states=self._named([one.states for one in each]),
            initial={n: torch.cat([one.initial[n] for one in each]) for n in names},
            gates=self._named([one.gates for one in each]),
            inputs=self._joined(inputs) if len(inputs) == len(each) else None,
        )

    def backward(self) -> Backward | None:
        """Total gradients; zero in runs that no backward reached."""
        return self._gathered([track.source.backward() for track in self.runs])

    def last(self) -> Backward | None:
        """Total gradients of every sequence's last loss step alone."""
        known = [track.source.last() for track in self.runs]
        lost = [
            one is None and track.has_gradient for one, track in zip(known, self.runs, strict=True)
        ]
        return None if any(lost) else self._gathered(known)

    def _gathered(self, each: list[Backward | None]) -> Backward | None:
        some = [one for one in each if one is not None]
        if not some:
            return None

        def part(take: Callable[[Backward], Tensor | None]) -> Tensor | None:
            like = [take(one) for one in some]
            if any(array is None for array in like):
                return None
            width = like[0].shape[2]  # type: ignore[union-attr]
            arrays = []
            for track, one in zip(self.runs, each, strict=True):
                found = None if one is None else take(one)
                arrays.append(self._zeros(track, like[0], width) if found is None else found)
            return self._joined(arrays)

        grads = {}
        for name in some[0].grads:
            grad = part(lambda one, name=name: one.grads[name])  # type: ignore[misc]
            assert grad is not None
            grads[name] = grad
        return Backward(
            grads,
            part(lambda one: one.direct),
            part(lambda one: one.delta),
            part(lambda one: one.delta_hh),
        )

    @staticmethod
    def _zeros(track: Track, like: Tensor | None, width: int) -> Tensor:
        assert like is not None
        zero = like.new_zeros(track.steps, track.batch, width)
        return zero.masked_fill(~track.mask.unsqueeze(2), torch.nan)

    def reached(self) -> Tensor | None:
        """Where the loss reaches what the module returned."""
        return self._marks([track.source.reached() for track in self.runs])

    def arriving(self) -> Tensor | None:
        """Where a gradient comes to the layer not through its own recurrence."""
        return self._marks([track.source.arriving() for track in self.runs])

    def _marks(self, each: list[Tensor | None]) -> Tensor | None:
        for place, (track, found) in enumerate(zip(self.runs, each, strict=True)):
            if found is None and track.has_gradient:
                return None
            if found is None:
                each[place] = torch.zeros_like(track.mask)
        some = any(track.has_gradient for track in self.runs)
        return self._joined([one for one in each if one is not None], False) if some else None

    def unread(self) -> bool:
        """Whether no run is read though a backward ran."""
        return all(track.source.unread() for track in self.runs)

    def trains_recurrence(self) -> bool | None:
        """Whether some run brings something to W_hh."""
        known = [track.source.trains_recurrence() for track in self.runs]
        return None if all(one is None for one in known) else any(known)

    def _chosen(self, sequences: Tensor) -> Iterator[tuple[Track, Tensor, Tensor]]:
        """Every run that is asked for, its sequences, and the places (m,) at which they stand."""
        start = 0
        for track in self.runs:
            mine = (sequences >= start) & (sequences < start + track.batch)
            if bool(mine.any()):
                yield track, sequences[mine] - start, mine.nonzero().squeeze(1)
            start += track.batch

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps, (n, T, m, ·); nothing at steps a run does not have."""
        grads: dict[str, Tensor] = {}
        for track, mine, at in self._chosen(sequences):
            inside = (loss_steps < track.steps).nonzero().squeeze(1)
            asked = loss_steps[inside] if len(inside) else loss_steps[:1] * 0
            found = track.source.loss_steps(mine, asked, dtype)
            if found is None:
                return None
            for name, grad in found.grads.items():
                shape = len(loss_steps), self._steps, len(sequences), grad.shape[3]
                whole = grads.setdefault(name, grad.new_full(shape, torch.nan))
                padding = torch.isnan(grad[:1])
                rows = torch.zeros_like(grad[:1]).masked_fill(padding, torch.nan)
                rows = rows.repeat(len(loss_steps), 1, 1, 1)
                if len(inside):
                    rows[inside.to(grad.device)] = grad
                whole[:, : track.steps, at.to(grad.device)] = rows
        return Backward(grads, None, None, None)

    def contributions(self, sequences: Tensor) -> Contributions | None:
        """∂L/∂W_hh and ∂L/∂W_ih by lag, of all runs together."""
        found = [track.source.contributions(mine) for track, mine, _ in self._chosen(sequences)]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None

        def joined(each: list[dict[str, Outer]]) -> dict[str, Outer]:
            return {
                name: Outer(
                    torch.cat([one[name].delta for one in each]),
                    torch.cat([one[name].vectors for one in each]),
                )
                for name in each[0]
            }

        def by_lag() -> Iterator[dict[str, Outer]]:
            for each in zip_longest(*(one.by_lag() for one in known)):
                yield joined([one for one in each if one is not None])

        work = max(one.work for one in known)
        return Contributions(work, lambda: joined([one.total() for one in known]), by_lag)

    def partial(self) -> dict[str, Tensor] | None:
        """State-partial gradients; None without one of them."""
        each = [track.source.partial() for track in self.runs]
        known = [one for one in each if one is not None]
        return self._named(known) if len(known) == len(each) else None

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Step Jacobians of some sequences, zero past the end of a run."""
        parts = [
            (track.source.operator(dtype, mine), at) for track, mine, at in self._chosen(sequences)
        ]
        known = [one for one, _ in parts if isinstance(one, LinearSteps)]
        in_order = torch.equal(torch.cat([at for _, at in parts]), torch.arange(len(sequences)))
        if len(known) == len(parts) and in_order and {one.length for one in known} == {self._steps}:
            return side_by_side(known, time=False)
        made = Side if not any(isinstance(one, ThinOperator) for one, _ in parts) else ThinSide
        return made(parts, self._steps, len(sequences))

    def changed(self, **changes: float) -> tuple[PooledSource, dict[str, Tensor]]:
        """All runs again with changed weights."""
        runs = [track.changed(**changes) for track in self.runs]
        return PooledSource(runs), runs[0].weights

    def parity(self) -> Parity:
        """The worst of all runs: it sums over all of them in any case."""
        found = [track.parity for track in self.runs]
        return max(found, key=lambda one: (SEVERITY.index(one.status), one.error or 0.0))

    def why_no_gradient(self) -> str:
        """Why there is no gradient here, and what to do."""
        return self.runs[0].source.why_no_gradient()

    def alone(self) -> PooledSource | None:
        """The layer with its inputs held fixed, if it is part of a closed loop in all processes."""
        each = [track.alone for track in self.runs]
        known = [track for track in each if track is not None]
        return PooledSource(known) if len(known) == len(each) else None


@dataclass
class Side:
    """An `Operator` over others, each at its own places of the batch."""

    parts: list[tuple[Operator, Tensor]]
    length: int
    batch: int

    @property
    def size(self) -> int:
        """S."""
        return self.parts[0][0].size

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return self.parts[0][0].dtype

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        return self._each(t, block, lambda one, rows: one.push(t, rows))

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        return self._each(t, block, lambda one, rows: one.pull(t, rows))

    def _each(self, t: int, block: Tensor, product: Callable[[Operator, Tensor], Tensor]) -> Tensor:
        result = torch.zeros_like(block)
        for one, at in self.parts:
            if t < one.length:
                at = at.to(block.device)
                result[at] = product(one, block[at]).to(block.dtype)
        return result


@dataclass
class ThinSide(Side):
    """The same of wide states."""

    @property
    def seconds(self) -> float:
        """Predicted, of one vector of every sequence through one step."""
        return sum(getattr(one, "seconds", 0.0) for one, _ in self.parts)
