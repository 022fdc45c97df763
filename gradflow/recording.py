"""What was seen: a `Recording` holds one `Track` per recurrent layer and direction.

Letters, here and everywhere in gradflow: T timesteps, B sequences, I input features, H hidden units,
P the width of h (H, or ``proj_size``), S the width of the full carried state, G gates.
Time is the first axis. Index 0 is the first step. Track arrays are in input-time order with the
sequences in the user's order; steps past a sequence's length hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from html import escape
from typing import Protocol

import torch
from torch import Tensor

from gradflow.errors import RecordingError, must_be


class Operator(Protocol):
    """The step Jacobians A_t of a batch of sequences, in processing order, as linear operators.

    Rows of a block are vectors, so pushing a block V of shape (B, m, S) gives V A_tᵀ.
    """

    @property
    def length(self) -> int: ...  # T
    @property
    def batch(self) -> int: ...  # B
    @property
    def size(self) -> int: ...  # S
    @property
    def dtype(self) -> torch.dtype: ...

    def push(self, t: int, block: Tensor) -> Tensor:
        """Map every row v of block (B, m, S) to A_t v."""
        ...

    def pull(self, t: int, block: Tensor) -> Tensor:
        """Map every row u of block (B, m, S) to A_tᵀ u."""
        ...


@dataclass(frozen=True)
class Forward:
    """What a replay of the forward pass yields; every array (T, B, ·), input-time order."""

    states: dict[str, Tensor]  # state name -> (T, B, P or H)
    initial: dict[str, Tensor]  # state name -> (B, P or H); empty where they were not seen
    gates: dict[str, Tensor]  # gate name -> (T, B, H)
    inputs: Tensor | None  # (T, B, I); None where they were not seen


@dataclass(frozen=True)
class Backward:
    """What a replay of the backward pass yields; every array (T, B, ·), input-time order."""

    grads: dict[str, Tensor]  # state name -> total gradient
    direct: Tensor | None  # (T, B, P): what reaches h_t not through this layer's own recurrence
    delta: Tensor | None  # (T, B, G*H): gradient at the input side of the pre-activations
    delta_hh: Tensor | None  # (T, B, G*H): the same at the recurrent side


@dataclass(frozen=True)
class Outer:
    """A sum of R outer products, Σ_r δ_r v_rᵀ: a gradient of a weight as what it is made from."""

    delta: Tensor  # (R, G*H)
    vectors: Tensor  # (R, P or I)

    def matrix(self) -> Tensor:
        """The sum itself, (G·H, P or I)."""
        return self.delta.T @ self.vectors


@dataclass(frozen=True)
class Contributions:
    """∂L/∂W_hh and ∂L/∂W_ih of a layer, taken apart by distance from the loss step; float64."""

    work: int  # multiplications that one loss step of one sequence takes at one lag
    total: Callable[[], dict[str, Outer]]  # weight name -> ∂L/∂W, all lags together
    by_lag: Callable[[], Iterator[dict[str, Outer]]]  # C_0, C_1, … until nothing is left


@dataclass(frozen=True)
class Parity:
    """Parameter gradients rebuilt from δ_t, held against those of this very backward."""

    status: str  # "passed", "failed" or "not applicable"
    error: float | None  # largest difference relative to the largest entry
    reason: str


class Source(Protocol):
    """Where a track's numbers come from; the hooks hand one over for each track."""

    def forward(self) -> Forward: ...
    def backward(self) -> Backward | None: ...
    def last(self) -> Backward | None: ...
    def reached(self) -> Tensor | None: ...
    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None: ...
    def contributions(self, sequences: Tensor) -> Contributions | None: ...
    def partial(self) -> dict[str, Tensor] | None: ...
    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator: ...
    def parity(self) -> Parity: ...
    def why_no_gradient(self) -> str: ...
    @property
    def version(self) -> int: ...


@dataclass(eq=False)
class Track:
    """One recurrent layer in one direction, at every timestep of one call or loop of calls.

    >>> import torch, gradflow
    >>> lstm = torch.nn.LSTM(3, 5)
    >>> with gradflow.record(lstm) as recording:
    ...     lstm(torch.ones(7, 2, 3))[0][-1].sum().backward()
    >>> recording["l0"].grad_c.shape          # total, where a hook on the output shows only zeros
    torch.Size([7, 2, 5])
    """

    name: str  # "rnn.l0", "encoder.lstm.l1_reverse"; a cell: its module's own path
    cell: str  # "LSTM", "GRU", "RNN_TANH", "RNN_RELU"; a user's class name; "tap": marked states
    reverse: bool  # true: the past of a step is the larger t
    lengths: Tensor  # (B,) real steps of each sequence
    mask: Tensor  # (T, B) true on real steps
    cuts: Tensor  # (T, B) true where no previous state arrives
    weights: dict[str, Tensor]  # "weight_ih", "weight_hh", ... as used, copies; stock cells only
    source: Source = field(repr=False)
    training: bool = True
    batch_first: bool = False  # how the layer itself was given its input
    notes: list[str] = field(default_factory=list)  # what a reader should know about this track
    owner: str = ""  # path of its module in the model, "" for the model itself
    above: tuple[str, ...] = ()  # names of the tracks of the same stack that read this one
    _cache: dict[str, tuple[int, object]] = field(default_factory=dict, repr=False)

    def _read(self, what: str) -> object:
        version = self.source.version
        known = self._cache.get(what)
        if known is None or known[0] != version:
            known = (version, getattr(self.source, what)())
            self._cache[what] = known
        return known[1]

    def _forward(self) -> Forward:
        result = self._read("forward")
        assert isinstance(result, Forward)
        return result

    def _backward(self) -> Backward:
        result = self._read("backward")
        if result is None:
            raise RecordingError(f"{self.name} has no gradient: {self.source.why_no_gradient()}")
        assert isinstance(result, Backward)
        return result

    @property
    def backwards(self) -> int:
        """How many backward passes reached this layer; the gradients are their sum."""
        return self.source.version

    @property
    def has_gradient(self) -> bool:
        """Whether a backward reached this layer."""
        return self._read("backward") is not None

    @property
    def why_no_gradient(self) -> str:
        """A sentence that says why there is no gradient and what to do."""
        return self.source.why_no_gradient()

    @property
    def states(self) -> dict[str, Tensor]:
        """State name -> its value after every step, (T, B, width)."""
        return self._forward().states

    @property
    def initial(self) -> dict[str, Tensor]:
        """State name -> its value before the first processed step, (B, width)."""
        return self._forward().initial

    @property
    def inputs(self) -> Tensor:
        """What the layer read: x_t, or the layer below after its dropout, (T, B, I)."""
        return self._seen(self._forward().inputs, "inputs")

    @property
    def has_inputs(self) -> bool:
        """Whether what the layer read was seen: not where only the states of a loop are."""
        return self._forward().inputs is not None

    def _seen(self, value: Tensor | None, what: str) -> Tensor:
        if value is None:
            how = (
                "were marked with gradflow.tap" if self.cell == "tap" else "came back to your cell"
            )
            raise RecordingError(
                f"{self.name} has no {what}: its states {how}, and nothing but the states of such a "
                "loop is seen"
            )
        return value

    def _state(self, values: dict[str, Tensor], name: str) -> Tensor:
        if name not in values:
            known = ", ".join(self.states)
            raise RecordingError(
                f"{self.name} has no state named {name}; its states are {known}: read .states and "
                ".grads by these names"
            )
        return values[name]

    @property
    def gates(self) -> dict[str, Tensor]:
        """Gate name -> its activation, (T, B, H)."""
        return self._forward().gates

    @property
    def main_state(self) -> str:
        """The state that is shown where one is: c where there is one, else h, else the first."""
        names = list(self.states)
        return next((name for name in ("c", "h") if name in names), names[0])

    @property
    def h(self) -> Tensor:
        """h_t, (T, B, P)."""
        return self._state(self.states, "h")

    @property
    def c(self) -> Tensor | None:
        """c_t, (T, B, H); None for a cell without one."""
        return self.states.get("c")

    @property
    def h0(self) -> Tensor:
        """The state h before the first processed step, (B, P)."""
        return self._seen(self.initial.get("h"), "h0")

    @property
    def c0(self) -> Tensor | None:
        """The state c before the first processed step, (B, H)."""
        return self.initial.get("c")

    @property
    def grads(self) -> dict[str, Tensor]:
        """State name -> total ∂L/∂state_t, as autograd gives it on an unrolled graph, (T, B, width)."""
        return self._backward().grads

    @property
    def grad_h(self) -> Tensor:
        """Total ∂L/∂h_t, (T, B, P), summed over the backwards that reached the layer."""
        return self._state(self.grads, "h")

    @property
    def grad_c(self) -> Tensor | None:
        """Total ∂L/∂c_t, (T, B, H), through h_t = o_t ⊙ tanh c_t as well; None without a c."""
        return self.grads.get("c")

    @property
    def grad_h_direct(self) -> Tensor:
        """The part of ∂L/∂h_t that does not come through this layer's own recurrence, (T, B, P).

        Between two calls of a loop it is a difference: entries of at most 64 units of rounding of
        the terms of their step and sequence are exact zeros.
        """
        self._state(self.grads, "h")
        direct = self._backward().direct
        if direct is None:
            raise RecordingError(
                f"{self.name} has no direct part of the gradient: without step Jacobians it cannot "
                "be told from the total; see the notes of this track"
            )
        return direct

    @property
    def has_direct(self) -> bool:
        """Whether the direct part of ∂L/∂h_t is known."""
        return self.has_gradient and self._backward().direct is not None

    @property
    def partial_grads(self) -> dict[str, Tensor] | None:
        """State name -> state-partial ∂L/∂state_t, (T, B, width), or None where it cannot be told.

        The other states of the same step are held fixed: for an LSTM
        (∂L/∂h_t, ∂L/∂c_t − o_t ⊙ (1 − tanh² c_t) ⊙ W_hrᵀ ∂L/∂h_t). It is what the transposed step
        Jacobians act on.
        """
        result = self._read("partial")
        return result if isinstance(result, dict) else None

    @property
    def last_grads(self) -> dict[str, Tensor] | None:
        """State name -> total gradient of the last loss step alone, or None."""
        result = self._read("last")
        return result.grads if isinstance(result, Backward) else None

    @property
    def grad_h_last(self) -> Tensor | None:
        """∂L/∂h_t of the last loss step alone, (T, B, P), or None."""
        return None if self.last_grads is None else self._state(self.last_grads, "h")

    @property
    def grad_c_last(self) -> Tensor | None:
        """∂L/∂c_t of the last loss step alone, (T, B, H), or None."""
        return None if self.last_grads is None else self.last_grads.get("c")

    @property
    def reached(self) -> Tensor | None:
        """(T, B) true where the loss reaches what the module returned: its loss steps; or None.

        None wherever `grad_h_last` is None: without a gradient, without step Jacobians.
        """
        result = self._read("reached")
        return result if isinstance(result, Tensor) else None

    def loss_steps(
        self,
        steps: Sequence[int],
        sequences: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Backward | None:
        """∂L_t'/∂state_t of single loss steps t', computed in float64 whatever the model's dtype.

        L_t' is the part of the loss that reaches what the *module* returned at input step t': its
        output there, and h_n and c_n at the step whose state they are. Of the gradients that arrive
        only those are kept, and the whole stack is scanned again. Summed over every t' they give
        the total (Werbos 1990): Σ_t' ∂L_t'/∂h_t = ∂L/∂h_t.

        In a layer whose upper ones are bidirectional t' reaches steps on both its sides, elsewhere
        only itself and its past. What cannot be reached is an exact 0.

        Args:
            steps: n loss steps, indices in input time.
            sequences: m sequences, all by default.
            dtype: of the computation and of the result.

        Returns:
            grads, delta and delta_hh as of the track, (n, T, m, ·), NaN on padding; direct is None,
            so are both δ of a loop that was marked with `tap`. None where `grad_h_last` is.

        Raises:
            RecordingError: a step or a sequence that is not there.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
        >>> for weight in rnn.parameters():
        ...     _ = torch.nn.init.constant_(weight, 0.5)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.ones(3, 1, 1).double())[0].sum().backward()
        >>> recording["l0"].loss_steps([2, 1]).grads["h"][..., 0, 0].tolist()
        [[0.25, 0.5, 1.0], [0.5, 1.0, 0.0]]
        """
        chosen = self._places("loss step", steps, self.steps)
        columns = self._places("sequence", sequences, self.batch)
        return self.source.loss_steps(columns, chosen, dtype)

    def contributions(self, sequences: Sequence[int] | None = None) -> Contributions | None:
        """∂L/∂W_hh and ∂L/∂W_ih of the chosen sequences, taken apart by lag, in float64.

        C_k = Σ_b Σ_t' δʰ_{t'→t'−k} h_{t'−k−1}ᵀ, and with δ and x_{t'−k} for W_ih: the part that
        loss step t' brings to the weight through the step k before it in processing order. All C_k
        together are the gradient; the first k of them are what it would be if every loss step could
        look back k steps and no further. (Truncation in chunks does less: there a loss step
        may look back to the start of its chunk only; Williams & Peng 1990.)

        Returns:
            The total, C_0, C_1, … one after the other, weight name -> `Outer`, and their price.
            None without a gradient, for loops whose weights were not seen, where what happens
            between two calls is not known, and in layers below another bidirectional one: what they
            get from a loss step comes at every step, before it and after it, so there is no lag.

        Raises:
            RecordingError: a sequence that is not there.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
        >>> for weight in rnn.parameters():
        ...     _ = torch.nn.init.constant_(weight, 0.5)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.ones(3, 1, 1).double())[0][-1].sum().backward()
        >>> found = recording["l0"].contributions()
        >>> [part["weight_hh"].matrix().item() for part in found.by_lag()]      # h: 0, 0.5, 0.75
        [0.75, 0.25, 0.0]
        >>> found.total()["weight_hh"].matrix().item(), rnn.weight_hh_l0.grad.item()
        (1.0, 1.0)
        """
        return self.source.contributions(self._places("sequence", sequences, self.batch))

    def _places(self, what: str, chosen: Sequence[int] | None, count: int) -> Tensor:
        if chosen is None:
            return torch.arange(count)
        found = torch.as_tensor(chosen, dtype=torch.long)
        if found.dim() != 1 or bool((found < 0).any() | (found >= count).any()):
            raise RecordingError(
                must_be(
                    f"every {what}",
                    f"a whole number from 0 to {count - 1}",
                    found.tolist(),
                    "indices count from 0",
                )
            )
        return found

    @property
    def delta(self) -> Tensor:
        """Pre-activation gradients δ_t, (T, B, G·H): ∂L/∂W_ih = Σ_t δ_t x_tᵀ."""
        return self._seen(self._backward().delta, "δ (delta)")

    @property
    def delta_hh(self) -> Tensor:
        """δ_t on the recurrent side, (T, B, G·H): ∂L/∂W_hh = Σ_t δʰ_t h_{t−1}ᵀ (GRU: r ⊙ δ in n)."""
        return self._seen(self._backward().delta_hh, "δ (delta_hh)")

    @property
    def parity(self) -> Parity:
        """Whether parameter gradients rebuilt from δ_t equal those of the recorded backward."""
        result = self._read("parity")
        assert isinstance(result, Parity)
        return result

    def operator(
        self, dtype: torch.dtype = torch.float64, sequences: Tensor | None = None
    ) -> Operator:
        """The step Jacobians of the chosen sequences (all by default), in processing order."""
        if sequences is None:
            sequences = torch.arange(self.batch)
        return self.source.operator(dtype, sequences)

    @property
    def steps(self) -> int:
        """T, the number of steps of the longest sequence."""
        return int(self.mask.shape[0])

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return int(self.mask.shape[1])

    @property
    def hidden(self) -> int:
        """H, the number of hidden units; of a loop of the user's own the width of its main state."""
        if self.cell not in GATES:
            return int(self.states[self.main_state].shape[2])
        return int(self.weights["weight_hh"].shape[0]) // GATES[self.cell]

    def __repr__(self) -> str:
        return (
            f"Track({self.name}: {self.cell}, T={self.steps}, B={self.batch}, H={self.hidden}, "
            f"{self.backwards} backward{'' if self.backwards == 1 else 's'})"
        )


GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}  # blocks of weight_hh


SHOWN = 12  # tracks of a repr that fits a screen


class Recording:
    """All tracks that were seen inside one ``with gradflow.record(model) as recording:`` block."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.notes: list[str] = []  # sentences for the report: settings that shape the numbers
        self.provenance: dict[str, object] = {}
        self._tracks: dict[str, Track] = {}
        self._empty_reason = "nothing ran inside the block yet"

    @property
    def tracks(self) -> Mapping[str, Track]:
        """Name -> `Track`, in the order in which the layers ran."""
        return dict(self._tracks)

    def __getitem__(self, name: str) -> Track:
        if name in self._tracks:
            return self._tracks[name]
        if not self._tracks:
            raise RecordingError(self._empty_reason)
        matches = [known for known in self._tracks if known.startswith(name)]
        if len(matches) == 1:
            return self._tracks[matches[0]]
        known = ", ".join(self._tracks)
        if matches:
            raise RecordingError(f"{name!r} fits several tracks; give one of {', '.join(matches)}")
        raise RecordingError(f"there is no track {name!r}; this recording has {known}")

    def __iter__(self) -> Iterator[Track]:
        return iter(self._tracks.values())

    def __len__(self) -> int:
        return len(self._tracks)

    def require_tracks(self) -> None:
        """Raise the sentence that says why there is nothing, if there is nothing."""
        if not self._tracks:
            raise RecordingError(self._empty_reason)

    def __repr__(self) -> str:
        if not self._tracks:
            return f"Recording of {self.model_name}: no tracks; {self._empty_reason}"
        width = max(len(name) for name in self._tracks)
        lines = [f"Recording of {self.model_name}: {len(self._tracks)} track(s)"]
        lines += [
            f"  {track.name:<{width}}  {track.cell:<8}  T={track.steps}  B={track.batch}  "
            f"H={track.hidden}  backwards={track.backwards}"
            for track in list(self._tracks.values())[:SHOWN]
        ]
        if len(self._tracks) > SHOWN:
            lines.append(f"  and {len(self._tracks) - SHOWN} more, see .tracks")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def matches_any(name: str, patterns: list[str]) -> bool:
    """Whether a track or module name is picked by one of the user's names or globs."""
    return any(
        fnmatchcase(name, pattern) or name == pattern or name.startswith(pattern + ".")
        for pattern in patterns
    )
