"""A `Track`: one recurrent layer in one direction, at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradflow.cells.spec import CELLS, CellSpec
from gradflow.errors import RecordingError, must_be
from gradflow.recording.padding import Padding
from gradflow.recording.source import Backward, Contributions, Forward, Operator, Parity, Source

# what changes in a `Track` while its loop goes on
GROWING = ("lengths", "mask", "cuts", "cut_kinds")
# what a cut is, by the state that goes on behind it and by whether a path of the graph leads there;
# 0: not known. The values of states that a loop marks are not seen on their way into the next step
CUT_KINDS = ("", "detached", "masked with zeros", "reset to zeros", "reset to other values",
             "masked or reset", "detached or reset")  # fmt: skip


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
    source: Source = field(repr=False)  # where its numbers come from, when they are read
    cut_kinds: Tensor | None = None  # (T, B) of each cut, in CUT_KINDS; None: unknown
    foreign: frozenset[str] = frozenset()  # weights that were computed or given, no parameters
    training: bool = True  # whether its module was in training mode
    batch_first: bool = False  # how the layer itself was given its input
    notes: list[str] = field(default_factory=list)  # what a reader should know about this track
    owner: str = ""  # path of its module in the model, "" for the model itself
    above: tuple[str, ...] = ()  # names of the tracks of the same stack that read this one
    below: tuple[str, ...] = ()  # names of the tracks that its input is made of, step by step
    padding: Padding | None = None  # of the token ids that its input is made from, step by step
    reads_states: bool = False  # its input is made of recurrent states, which may come to rest
    turned: bool | None = False  # its first step may read another than the first; None: not asked
    inputs_unknown: str = ""  # that steps ran without a graph, and what that hides of their inputs
    unseen_states: tuple[str, ...] = ()  # states whose values were not seen, and stand as NaN
    loop: str = ""  # name of the track that holds the joint state of the closed loop it is part of
    afresh: int = 0  # calls of its layer in a row, each from a start of its own on what came before
    depth: int = 1  # runs of this layer one upon the other, each on what came of the one before
    runs: tuple[int, ...] = ()  # sequences of each run, where several are pooled as one layer
    stamp: tuple[object, ...] = ()  # of weights that were not seen: equal where they were the same
    state_shape: tuple[int, ...] = ()  # of a linear recurrence: (heads, d_k, d_v), (channels, N)
    code: tuple[object, ...] = ()  # tells loops of one name apart: weights, or the line of a tap
    _cache: dict[str, tuple[int, object]] = field(default_factory=dict, repr=False)
    # makes what is GROWING of a loop that goes on, when it is read
    _shape: Callable[[], dict[str, Tensor]] | None = field(default=None, init=False, repr=False)

    @property
    def spec(self) -> CellSpec | None:
        """What is known of its kind of cell in closed form; None for a loop of the user's own."""
        return CELLS.get(self.cell)

    def read_anew(self) -> None:
        """Forget what was read of the source, which has changed or may have.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.ones(3, 1, 1))[0].sum().backward()
        >>> track = recording["l0"]
        >>> before = track.parity
        >>> track.read_anew()
        >>> track.parity is before, track.parity == before
        (False, True)
        """
        self._cache.clear()
        if self._shape is not None:
            for name in GROWING:
                self.__dict__.pop(name, None)

    def grow(self, shape: Callable[[], dict[str, Tensor]]) -> None:
        """The loop went on: what is `GROWING` is made anew when it is next read.

        Args:
            shape: makes it, by name. What is done per step so does not grow with the steps.

        >>> import torch, gradflow
        >>> cell = torch.nn.RNNCell(1, 1)
        >>> with gradflow.record(cell) as recording:
        ...     cell(torch.ones(2, 1), cell(torch.ones(2, 1))).sum().backward()
        >>> track = recording["cell"]
        >>> mask = torch.ones(3, 2, dtype=torch.bool)
        >>> more = {"lengths": mask.sum(0), "mask": mask, "cuts": ~mask}
        >>> before = track.steps
        >>> track.grow(lambda: more)
        >>> before, track.steps
        (2, 3)
        """
        self._shape = shape
        self.read_anew()

    if not TYPE_CHECKING:  # for a type checker all attributes are there

        def __getattr__(self, name: str) -> Tensor:
            """What is `GROWING` and not made yet."""
            shape = self.__dict__.get("_shape")
            if name not in GROWING or shape is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.__dict__.update(dict.fromkeys(GROWING) | shape())
            return self.__dict__[name]

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
    def seen_states(self) -> dict[str, Tensor]:
        """`states`, (T, B, width) each, without those whose values were not seen.

        Unseen is what goes around a closed loop and was returned by no recurrent layer.
        """
        return {n: s for n, s in self.states.items() if n not in self.unseen_states}

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
            how = "came back to your cell, or were told from the graph of your loop"
            if self.cell == "tap":
                how = "were marked with gradflow.tap"
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
        """Gate name -> its activation, (T, B, H): i, f, g, o of an LSTM, r, z, n of a GRU, else none.

        PyTorch's z is the share of the old state that a GRU keeps.
        """
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
        """State name -> total gradient of the last loss step alone, (T, B, width), or None.

        None without a backward, and where the step's Jacobians are not known.
        """
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

    @property
    def arriving(self) -> Tensor | None:
        """(T, B) true where a gradient comes to this layer not through its own recurrence, or None.

        It is of this layer, where `reached` is of the whole module. Steps past a sequence's length
        are told as well: a loss may read them. None without a gradient, and where the direct part
        is not known.
        """
        result = self._read("arriving")
        return result if isinstance(result, Tensor) else None

    @property
    def trains_recurrence(self) -> bool | None:
        """Whether ∂L/∂W_hh = Σ δʰ_t h_{t−1}ᵀ has an entry that is not exactly 0.

        None without a gradient, and for cells whose weights were not seen.
        """
        result = self._read("trains_recurrence")
        return result if isinstance(result, bool) else None

    @property
    def unread(self) -> bool:
        """Whether a backward ran in the block and did not come to this layer, though it could have."""
        return self.source.unread()

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

        Args:
            sequences: m sequences, indices of the batch, all by default.

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
        """The step Jacobians A_t = ∂s_t/∂s_{t−1}, in processing order, never written out.

        Rows of a block are vectors: pushing a block V of shape (B, m, S) gives V A_tᵀ, pulling V A_t.
        The state is joint, (h, c) for an LSTM. `gradflow.analyzer.step_jacobians` writes them out.

        Args:
            dtype: of the computation and of the blocks.
            sequences: (m,) indices of the batch, all by default.

        Returns:
            An operator with ``push(t, block)``, ``pull(t, block)``, ``length`` T, ``batch`` m and
            ``size`` S.

        Raises:
            RecordingError: the Jacobians are not known, in words.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.zeros(4, 1, 1))[0].sum().backward()
        >>> operator = recording["l0"].operator()
        >>> operator.push(2, torch.ones(1, 1, 1, dtype=torch.float64)).item()   # h = 0: tanh' is 1
        0.5
        """
        if sequences is None:
            sequences = torch.arange(self.batch)
        return self.source.operator(dtype, sequences)

    @property
    def alone(self) -> Track | None:
        """Of a layer in a closed loop: the same layer with its inputs held fixed; else None.

        Where a layer's next input depends on its own earlier state, `operator` is that of the whole
        step, input included; ``track.alone.operator()`` is that of the layer's own equations,
        ∂s_t/∂s_{t−1} at fixed x_t, which is no step Jacobian of what the loss sees.

        >>> import torch, gradflow
        >>> cell = torch.nn.RNNCell(1, 1, bias=False)
        >>> for weight in cell.parameters():
        ...     _ = torch.nn.init.constant_(weight, 0.5)
        >>> with gradflow.record(cell) as recording:
        ...     h = x = torch.zeros(1, 1)
        ...     for _ in range(3):
        ...         x = h = cell(x, h)
        ...     h.sum().backward()
        >>> track = recording["cell"]
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> track.operator().push(2, one).item(), track.alone.operator().push(2, one).item()
        (1.0, 0.5)
        """
        source = self.source.alone()
        return None if source is None else replace(self, source=source, loop="", _cache={})

    def changed(self, **changes: float) -> Track:
        """The recorded calls run again with changed weights of this layer: no gradient, new gains.

        Args:
            changes: ``forget_bias``, added to the pre-activation of an LSTM's f, of a GRU's z;
                ``chrono``, the longest distance that the biases of these gates are set for;
                ``orthogonal``, the gain of an orthogonal W_hh in place of the recorded one;
                ``scale_hh``, what W_hh is multiplied by; ``scale_ih``, the same of W_ih, as if the
                layer read so much of its input.

        Returns:
            A track of the same layer with its new states, gates, weights and step Jacobians.

        Raises:
            RecordingError: it cannot be run again, in words.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
        >>> for weight in rnn.parameters():
        ...     _ = torch.nn.init.constant_(weight, 0.5)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.ones(3, 1, 1))[0].sum().backward()
        >>> recording["l0"].changed(scale_hh=2.0).h.flatten().tolist()
        [0.5, 1.0, 1.5]
        """
        source, weights = self.source.changed(**changes)
        return replace(self, source=source, weights=weights, _cache={})

    @property
    def first_step_seen(self) -> bool:
        """Whether how the first state came from the initial one is part of the step Jacobians.

        Not where nothing before the first state was seen, and not in a closed loop: its first input
        may have been made from the initial state, as every other input was from the state before.
        """
        return bool(self.initial) and self.source.alone() is None

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
        if self.spec is None:
            return int(self.states[self.main_state].shape[2])
        return int(self.weights["weight_ih"].shape[0]) // self.spec.blocks

    def __repr__(self) -> str:
        return (
            f"Track({self.name}: {self.cell}, T={self.steps}, B={self.batch}, H={self.hidden}, "
            f"{self.backwards} backward{'' if self.backwards == 1 else 's'})"
        )


def unnumbered(name: str) -> str:
    """A track's name without the number of its run.

    >>> unnumbered("rnn.l0@2")
    'rnn.l0'
    """
    return name.partition("@")[0]
