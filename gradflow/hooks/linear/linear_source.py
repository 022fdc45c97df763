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
from gradflow.hooks.heard_gradients import HeardGradients
from gradflow.hooks.linear.scanned import Scanned
from gradflow.hooks.loops.loop import difference
from gradflow.hooks.parity import BOUNDS
from gradflow.hooks.replay import masked
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
    _read: dict[str, tuple[object, object]] = field(default_factory=dict, repr=False)

    def _kept(self) -> list[Stretch]:
        return self.stretches

    def _needs_none(self) -> str:
        return (
            "what it returned needs no gradient: it is detached, or its weights are frozen; call "
            "requires_grad_() on them"
        )

    # -- the source of a track ---------------------------------------------------------------

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
                every[place][-1] = _difference(left, came, size)
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

    def _in_input_time(self, array: Tensor) -> Tensor:
        """(T, B, ·) or (n, T, B, ·) from processing order, NaN past a sequence's end."""
        axis = array.dim() - 3
        if self.reverse:
            array = array.flip(axis)
        if self.lengths is None:
            return array
        time = torch.arange(array.shape[axis], device=array.device).unsqueeze(1)
        return masked(array, time < self.lengths.to(array.device), float("nan"))

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

    def last(self) -> Backward | None:
        """Total gradients of each sequence's last loss step alone, in processing order."""
        if not self._has_gradient():
            return None
        with torch.no_grad():
            direct = self._directs()
            arrives = (direct != 0).any(2)
            real = self._real(torch.arange(self.batch))
            if real is not None:
                arrives = arrives & real.to(arrives.device)
            time = torch.arange(len(arrives), device=arrives.device).unsqueeze(1)
            chosen = torch.where(arrives, time, -1).amax(0)
            alone = direct.masked_fill((time != chosen).unsqueeze(2), 0.0)
            rows = self._joined().totals_of(alone.unsqueeze(2)).squeeze(2)
        return Backward({"h": self._in_input_time(rows)}, None, None, None)

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps, (n, T, m, ·)."""
        if not self._has_gradient():
            return None
        with torch.no_grad():
            direct = self._directs()
            chosen = sequences.to(direct.device)
            places = loss_steps.to(direct.device)
            if self.reverse:
                places = len(direct) - 1 - places
            wide = dtype.to_complex() if direct.is_complex() else dtype
            alone = direct.new_zeros(
                len(direct), len(chosen), len(places), direct.shape[2], dtype=wide
            )
            for number, place in enumerate(places.tolist()):
                alone[place, :, number] = direct[place, chosen].to(wide)
            rows = self._joined().of(chosen).to(dtype).totals_of(alone)
            rows = rows.permute(2, 0, 1, 3)  # (n, T, m, S)
            if self.reverse:
                rows = rows.flip(1)
            if self.lengths is not None:
                time = torch.arange(len(direct), device=rows.device).unsqueeze(1)
                real = time < self.lengths.to(rows.device)[chosen]
                rows = rows.masked_fill(~real.unsqueeze(2), float("nan"))
        return Backward({"h": rows}, None, None, None)

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
            RecordingError: its calls cannot be run again, or a step map holds NaN or Inf.
        """
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


def _difference(total: Tensor, part: Tensor, size: Tensor) -> Tensor:
    """See `difference`, also of complex numbers."""
    if not total.is_complex():
        return difference(total, part, size)
    left = total - part
    real = difference(left.abs(), torch.zeros_like(size), size)
    return left.masked_fill(real == 0, 0.0)
