"""What a `Track` of a linear recurrence reads its numbers from: A_t, B_t and C_t of its calls.

Letters: T steps of all calls, B sequences, S the numbers of one state, A_t the state map, g what
reaches a state not through the next, δ_t = g_t + A_{t+1}ᵀ δ_{t+1} the total. Processing order, but
for what a track is given, which is in input time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradflow.cells.linear import LinearSteps, side_by_side
from gradflow.errors import RecordingError
from gradflow.hooks.heard_gradients import HeardGradients, difference
from gradflow.hooks.linear.scanned import Scanned
from gradflow.hooks.parity import BOUNDS
from gradflow.limits import PARITY_FLOAT32
from gradflow.recording.source import Backward, Forward, Operator, Parity

KIND = (
    "a linear recurrence: its states are made from what its function was given, and how its weights "
    "make that is not looked at"
)


@dataclass(eq=False)
class Stretch:
    """The steps of one call, with copies of what is needed of its tensors."""

    call: Scanned  # without what was live
    cut: Tensor  # (B,) true where nothing of the call before arrives at its first step
    grad_enabled: bool  # whether it ran with gradients
    differentiable: bool  # whether what it returned needs a gradient
    known_states: Tensor | None = None  # (T, B, *shape), where they were seen
    returned: Tensor | None = None  # y, to hold against what the steps make
    # y was read from the very tensor that is the last state: the gradient there holds what comes
    # through y too
    final_holds_output: bool = False
    grads: dict[str, Tensor] = field(default_factory=dict)  # "output", "final", "states"
    _made: LinearSteps | None = field(default=None, repr=False)
    _states: Tensor | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the steps as they were made, and gradients at their states."""
        made = replace(self.made, read=None, read_back=None)
        grads = {"states": self.direct()} if self.grads else {}
        call = replace(self.call, states_back=None, final_back=None)
        call = replace(call, make=None)  # type: ignore[arg-type]  # it has made them
        return vars(self) | {"_made": made, "grads": grads, "returned": None, "call": call}

    @property
    def made(self) -> LinearSteps:
        """A_t, B_t, C_t, made once.

        Raises:
            RecordingError: they do not give what the function returned.
        """
        if self._made is None:
            with torch.no_grad():
                made = self.call.make()
                self._states = made.states() if self.known_states is None else self.known_states
                self._check(made, self._states)
            self._made = made
        return self._made

    def _check(self, made: LinearSteps, states: Tensor) -> None:
        call = self.call
        here, said = (made.length, made.batch, made.shape), (call.steps, call.batch, call.shape)
        if here != said:
            raise RecordingError(f"its steps are of T, B and state {here}, though it ran on {said}")
        if self.returned is None or made.read is None:
            return
        again, before = made.read(states), self.returned
        if again.shape != before.shape:
            raise RecordingError(
                f"run again it gives {tuple(again.shape)} where it returned {tuple(before.shape)}"
            )
        again = again.to(before.dtype)
        size = before.abs().nan_to_num(0.0).amax()
        off = (again - before).abs().nan_to_num(0.0).amax()
        kinds = [before.dtype, call.precision or before.dtype]
        bound = max(BOUNDS.get(kind, PARITY_FLOAT32) for kind in kinds)
        if not bool(off <= bound * size):
            share = float(off / size) if float(size) else float("inf")
            raise RecordingError(
                f"run again from what it was given it differs by {share:.1g} of its largest output "
                "from what it returned: an argument does what is not known"
            )

    @property
    def states(self) -> Tensor:
        """(T, B, *shape)."""
        self.made  # noqa: B018  makes and checks them
        assert self._states is not None
        return self._states

    def direct(self) -> Tensor:
        """g (T, B, *shape): what reached the states, through what was returned of them."""
        made, states, call = self.made, self.states, self.call
        found = torch.zeros(states.shape, dtype=states.dtype, device=states.device)
        if "output" in self.grads:
            found = found + made.direct(states, self.grads["output"]).reshape(found.shape)
        if "states" in self.grads:
            grad = self.grads["states"]
            grad = grad if call.states_back is None else call.states_back(grad)
            found = found + grad.reshape(found.shape)
        if "final" in self.grads:
            grad = self.grads["final"]
            grad = grad if call.final_back is None else call.final_back(grad)
            grad = grad.reshape(found.shape[1:])
            found[-1] = grad if self.final_holds_output else found[-1] + grad
        return found


@dataclass(eq=False)
class LinearSource(HeardGradients):
    """All calls of one linear recurrence, one after the other."""

    cell: str  # what people call it
    name: str = ""  # of the track
    lengths: Tensor | None = None  # (B,) real steps; None: all
    told: bool = False  # whether the user has given them
    reverse: bool = False  # processed from the last input step to the first
    stretches: list[Stretch] = field(default_factory=list)  # the calls in their order
    remarks: list[str] = field(default_factory=list)  # what a reader should know
    closed: bool = False  # whether what it takes in depends on its own earlier states
    _read: dict[str, tuple[object, object]] = field(default_factory=dict, repr=False)

    def kept(self) -> list[Stretch]:
        return self.stretches

    def _needs_none(self) -> str:
        return (
            "what it returned needs no gradient: it is detached, or its weights are frozen; call "
            "requires_grad_() on them"
        )

    # -- the source of a track ---------------------------------------------------------------

    @property
    def real(self) -> Tensor | None:
        """(B,) the real steps of every sequence; None where all are T."""
        return self.lengths

    @property
    def steps(self) -> int:
        """T."""
        return sum(stretch.call.steps for stretch in self.stretches)

    @property
    def batch(self) -> int:
        """B."""
        return self.stretches[0].call.batch

    def _once(self, what: str, make: Callable[[], object]) -> object:
        """Made once for every set of calls and backwards."""
        stamp = (len(self.stretches), self.version)
        known = self._read.get(what)
        if known is None or known[0] != stamp:
            try:
                known = (stamp, make())
            except RecordingError as error:
                said = str(error)
                named = said if said.startswith(f"{self.name}: ") else f"{self.name}: {said}"
                raise RecordingError(named) from error
            self._read[what] = known
        return known[1]

    def _joined(self) -> LinearSteps:
        """A_t of all steps; 0 where a call starts cut off from the one before."""

        def make() -> LinearSteps:
            parts = []
            for place, stretch in enumerate(self.stretches):
                part = stretch.made
                if place and bool(stretch.cut.any()):
                    kept = torch.ones(part.length, part.batch, dtype=torch.bool)
                    kept[0] = ~stretch.cut.cpu()
                    part = part.masked(kept)
                parts.append(part)
            return side_by_side(parts, time=True)

        found = self._once("steps", make)
        assert isinstance(found, LinearSteps)
        return found

    def _directs(self) -> Tensor:
        """g of all steps, (T, B, S): what comes back from a later call is no part of it."""

        def make() -> Tensor:
            every = [stretch.direct().flatten(2) for stretch in self.stretches]
            for place in range(len(every) - 1):
                after = self.stretches[place + 1]
                if bool(after.cut.all()):
                    continue
                made = after.made
                total = made.totals(after.direct())[0].flatten(1).unsqueeze(1)
                came = made.pull(0, total)[:, 0]
                came = came.masked_fill(after.cut.to(came.device).unsqueeze(1), 0.0)
                left, size = every[place][-1], every[place][-1].abs() + came.abs()
                every[place][-1] = difference(left, came, size)
            return torch.cat(every)

        found = self._once("direct", make)
        assert isinstance(found, Tensor)
        return found

    def _totals(self) -> Tensor:
        """δ of all steps, (T, B, S): of each call from what reached what it returned."""

        def make() -> Tensor:
            each = [one.made.totals(one.direct()).flatten(2) for one in self.stretches]
            return torch.cat(each)

        found = self._once("totals", make)
        assert isinstance(found, Tensor)
        return found

    def _in_input_time(self, array: Tensor, sequences: Tensor | None = None) -> Tensor:
        """(T, B, ·) or (n, T, m, ·) from processing order, NaN past a sequence's end."""
        array = array.flip(-3) if self.reverse else array
        return self._trimmed(array, sequences)

    def forward(self) -> Forward:
        """States, the first of them where it was seen, and |decay| as a gate."""
        size = self._joined().modulus  # makes and checks all calls
        states = torch.cat([stretch.states.flatten(2) for stretch in self.stretches])
        first = self.stretches[0].made
        leading = first.shape[:-1]  # axes that are shared are written out, but for the last
        decay = size.expand(*size.shape[:2], *leading, size.shape[-1]).flatten(2)
        initial = {}
        start = first.initial
        if first.write or start is not None:
            if start is None:
                start = states.new_zeros(self.batch, *first.shape)
            initial = {"h": start.flatten(1)}
        return Forward(
            states={"h": self._in_input_time(states)},
            initial=initial,
            gates={"decay": self._in_input_time(decay)},
            inputs=None,
        )

    def backward(self) -> Backward | None:
        """Total gradients; None without a backward."""
        if not self._has_gradient():
            return None
        with torch.no_grad():
            total, direct = self._totals(), self._directs()
        return Backward({"h": self._in_input_time(total)}, self._in_input_time(direct), None, None)

    def partial(self) -> dict[str, Tensor] | None:
        """There is one state, so its state-partial gradients are the totals."""
        found = self.backward()
        return None if found is None else found.grads

    def reached(self) -> Tensor | None:
        """(T, B): where the loss reaches what was returned of the states."""
        if not self._has_gradient():
            return None
        with torch.no_grad():
            found = (self._directs() != 0).any(2)
        return found.flip(0) if self.reverse else found

    def _alone(
        self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None
    ) -> Backward | None:
        if not self._has_gradient():
            return None
        direct = self._directs()
        columns, places = sequences.to(direct.device), chosen.to(direct.device).T
        processed = len(direct) - 1 - places if self.reverse else places
        kind = direct.dtype
        steps = self._joined().of(columns)
        if dtype is not None:
            kind, steps = dtype.to_complex() if direct.is_complex() else dtype, steps.to(dtype)
        at = processed.masked_fill(places < 0, 0)
        rows = direct[at, columns.unsqueeze(1)].masked_fill((places < 0).unsqueeze(2), 0.0)
        alone = direct.new_zeros(len(direct), *at.shape, direct.shape[2], dtype=kind)
        each = [torch.arange(size, device=at.device) for size in at.shape]
        alone[at, each[0].unsqueeze(1), each[1]] = rows.to(kind)
        rows = steps.totals_of(alone).permute(2, 0, 1, 3)  # (n, T, m, S)
        return Backward({"h": self._in_input_time(rows, columns)}, None, None, None)

    def _real(self, sequences: Tensor) -> Tensor | None:
        """(T, m): which processed steps are real; None where all are."""
        if self.lengths is None:
            return None
        lengths = self.lengths.cpu()[sequences.cpu()]
        time = torch.arange(self.steps).unsqueeze(1)
        return (self.steps - 1 - time if self.reverse else time) < lengths

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """A_t in processing order, from each sequence's first real step on; 0 past its last.

        Raises:
            RecordingError: its calls cannot be run again, a step map holds NaN or Inf, or it is closed.
        """
        if self.closed:
            raise RecordingError(
                f"{self.name}: what it takes in depends on its own earlier states (its output fed "
                "back), so its decays alone are not its step Jacobians"
            )
        found = self._joined().of(sequences).to(dtype)
        if not bool(torch.isfinite(found.decay).all()):
            raise RecordingError(f"{self.name}: its decay holds NaN or Inf")
        real = self._real(sequences)
        if real is None:
            return found
        found = found.masked(real)
        if not self.reverse:
            return found
        skip = self.steps - self.lengths.cpu()[sequences.cpu()]  # type: ignore[union-attr]
        index = (torch.arange(self.steps).unsqueeze(1) + skip).clamp(max=self.steps - 1)
        inside = torch.arange(self.steps).unsqueeze(1) + skip < self.steps
        return found.taken(index).masked(inside)

    def parity(self) -> Parity:
        """There is nothing to hold against anything: its weights were not seen."""
        return Parity("not applicable", None, KIND)

    def notes(self) -> list[str]:
        """What a reader should know about the track."""
        return [*self._batched_note(), *self.remarks]
