"""A track of some of a track's sequences, for what is too dear to be measured of all.

Letters: T steps, B sequences of the track, m of them chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradflow.recording.source import Backward, Contributions, Forward, Operator, Parity, Source
from gradflow.recording.track import Track


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
        source=ChosenSource(track.source, index),
        _cache={},
    )


@dataclass(frozen=True, eq=False)
class ChosenSource:
    """What is read of another source, of some sequences."""

    inner: Source  # of all sequences
    index: Tensor  # (m,) which

    @property
    def version(self) -> int:
        """How many backwards came."""
        return self.inner.version

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

    def changed(
        self, *, forget_bias: float, scale_hh: float, scale_ih: float
    ) -> tuple[Source, dict[str, Tensor]]:
        """The calls again with changed weights."""
        source, weights = self.inner.changed(
            forget_bias=forget_bias, scale_hh=scale_hh, scale_ih=scale_ih
        )
        return ChosenSource(source, self.index), weights

    def alone(self) -> Source | None:
        """The layer with its inputs held fixed."""
        source = self.inner.alone()
        return None if source is None else ChosenSource(source, self.index)

    def unread(self) -> bool:
        """Whether a backward ran that did not come to it."""
        return self.inner.unread()

    def trains_recurrence(self) -> bool | None:
        """Whether something is brought to W_hh, by any sequence."""
        return self.inner.trains_recurrence()

    def parity(self) -> Parity:
        """Of the whole batch: parameter gradients are sums over it."""
        return self.inner.parity()

    def why_no_gradient(self) -> str:
        """Why there is none."""
        return self.inner.why_no_gradient()
