"""What a `Track` of a hand-written loop reads its numbers from: the states that `tap` marked.

Letters: T steps, B sequences, S the width of all states side by side, A the step Jacobian, M what
one state of a step passes to another of the same step, g the total gradients of the graph, a those
of independent states: a = (I − Mᵀ) g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import RecordingError
from gradflow.hooks.axes import Axis, as_rows, usual_axis
from gradflow.hooks.dense import Dense
from gradflow.hooks.heard_gradients import HeardGradients, difference
from gradflow.hooks.loops.layout import Layout
from gradflow.hooks.wide import Wide, WideStep, pulled
from gradflow.limits import DIFFERENCE_ROUNDING
from gradflow.recording.source import Backward, Forward, Operator, Parity

TAP = "tap"  # the cell of a loop that is tapped


@dataclass(eq=False)
class Mark:
    """One tap: copies of the states, and what could be read of the step that led to them."""

    states: dict[str, Tensor]  # (B, width)
    grad_enabled: bool
    differentiable: bool
    cut: Tensor  # (B,)
    # (B, S, S), or a map where that is too wide; None at the first mark and where it is not known
    jacobian: Tensor | WideStep | None = None
    within: Tensor | WideStep | None = None  # M, (B, S, S) or a map; None: zero
    within_known: bool = False
    unknown: str = ""  # why there is no Jacobian
    grads: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)  # of the states' own tensors
    rows: Tensor | None = None  # (B,) the sequence of the mark before that each is; see `Link`
    cut_kind: int = 0  # what its cuts are, a place in CUT_KINDS


@dataclass(frozen=True)
class Words:
    """The words for a loop in sentences: one that marks its states, or one over a cell of the user's own."""

    step: str
    steps: str
    states: str
    more: str  # what a loop does that carries more than its known states, and what to do
    kind: str


TAPPED = Words(
    step="tap",
    steps="taps",
    states="marked states",
    more="the loop carries more than its marked states; mark every state that it carries, where it "
    "enters the next step",
    kind="a hand-written loop: its states were marked with tap, its weights were not seen",
)
CALLED = Words(
    step="call",
    steps="calls",
    states="states",
    more="the loop carries more than this cell's states: something else that came from an earlier "
    "step goes into it, such as a memory that starts later, attention over past steps, or an output "
    "fed back through another layer; mark all that it carries with h, c = gradflow.tap(h=h, c=c) "
    "inside the loop, once per step",
    kind="a cell of your own: how it uses its weights is not known",
)

UNROLLED = Words(
    step="step",
    steps="steps",
    states="states",
    more="the loop carries more than its states; mark every state that it carries with "
    "h, c = gradflow.tap(h=h, c=c) inside the loop, once per step",
    kind="a loop written by hand: how it uses its weights is not known",
)


@dataclass(eq=False)
class TapSource(HeardGradients):
    """All marks of one loop."""

    name: str = "loop"  # of the track
    cell: str = TAP
    lengths: Tensor | None = None
    marks: list[Mark] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)
    mixed: bool = False  # some states go around the calls, see `around`
    remarks: list[str] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)  # state name -> (B, width), if seen
    closed: Any = None  # the `ClosedLoop` that it is a part of, if any
    _steps: tuple[tuple[int, int], list[Mark]] | None = field(default=None, repr=False)
    part_of_a_step: bool = False  # other terms are added to what the cell returns
    own_words: Words | None = None  # where they do not follow from the name of the cell
    _written: tuple[tuple[tuple[int, ...], int], list[Tensor]] | None = field(
        default=None, repr=False
    )
    _known_direct: tuple[int, list[Tensor]] | None = field(default=None, repr=False)

    @property
    def words(self) -> Words:
        """The words for its steps and states in sentences."""
        if self.own_words is not None:
            return self.own_words
        return TAPPED if self.cell == TAP else CALLED

    # -- gradients that come by --------------------------------------------------------------

    def kept(self) -> list[Mark]:
        return self.marks

    def _rows(self, one: Mark, name: str, grad: Tensor) -> Tensor:
        return as_rows(grad, one.axes.get(name, usual_axis(grad.shape)))

    def _needs_none(self) -> str:
        if self.words is TAPPED:
            return (
                "its marked states need no gradient; mark the states before any detach(), or call "
                "requires_grad_() on the weights"
            )
        return "its states need no gradient: its weights are frozen; call requires_grad_() on them"

    def _spoken(self) -> str:
        return self.words.states

    # -- the source of a track ---------------------------------------------------------------

    @property
    def steps(self) -> list[Mark]:
        """The marks, one for every step, each of all sequences; see `Layout`."""
        if self.layout.even:
            return self.marks
        known = self._steps
        if known is None or known[0] != (len(self.marks), self.version):
            known = (len(self.marks), self.version), aligned(self.marks, self.layout)
            self._steps = known
        return known[1]

    @property
    def real(self) -> Tensor | None:
        """(B,) the real steps of every sequence; None where all are T."""
        return self.layout.real(self.lengths) if self.layout.extents else self.lengths

    def shape(self) -> dict[str, Tensor]:
        """Of its track; see `Layout.shape`."""
        return self.layout.shape(self.lengths, self.marks[0].cut.device)

    @property
    def names(self) -> list[str]:
        """The states."""
        return list(self.marks[0].states)

    def forward(self) -> Forward:
        """States, and those before the first where they were seen; gates and inputs were not.

        Where some sequences began at a later call, those before the first are left out.
        """
        states = {
            name: self._trimmed(torch.stack([mark.states[name] for mark in self.steps]))
            for name in self.names
        }
        initial = self.initial if len(self.marks[0].cut) == len(self.steps[0].cut) else {}
        return Forward(states=states, initial=initial, gates={}, inputs=None)

    def backward(self) -> Backward | None:
        """Total gradients; None without a backward."""
        if not self._has_gradient():
            return None
        grads = {
            name: self._trimmed(torch.stack([_grad(mark, name) for mark in self.steps]))
            for name in self.names
        }
        direct = self.direct_of("h") if "h" in grads else None
        return Backward(grads=grads, direct=direct, delta=None, delta_hh=None)

    def direct_of(self, name: str) -> Tensor | None:
        """(T, B, width): what reaches a state not through the next step of the loop."""
        if not self._direct_is_known():
            return None
        with torch.no_grad():
            return self._split(self._direct_as_in_graph())[name]

    def _direct_as_in_graph(self) -> Tensor:
        """(T, B, S): the same of all states, each with what it gets from those made of it in its step."""
        each = zip(self.steps, self._direct(), strict=True)
        return torch.stack([_with_moving(mark, direct) for mark, direct in each])

    def partial(self) -> dict[str, Tensor] | None:
        """State-partial gradients; None without a backward, or without what leads between states.

        None also where a state goes around a call: the states that compose are then other ones.
        """
        if not self._has_gradient() or self.mixed:
            return None
        if len(self.names) > 1 and self.why_no_operator():
            return None
        with torch.no_grad():
            rows = []
            for mark in self.steps:
                total = self._total(mark)
                came = _pulled(mark.within, total)
                size = total.abs() + _pulled(mark.within, total, absolute=True)
                bound = DIFFERENCE_ROUNDING * torch.finfo(total.dtype).eps * size
                left = total - came
                rows.append(left.masked_fill(left.abs() <= bound, 0.0))
            return self._split(torch.stack(rows))

    def _direct_is_known(self) -> bool:
        return self._has_gradient() and not self.mixed and not self.why_no_operator()

    def reached(self) -> Tensor | None:
        """(T, B): where the loss reaches the marked states; None without step Jacobians."""
        if not self._direct_is_known():
            return None
        with torch.no_grad():
            return (torch.stack(self._direct()) != 0).any(2)

    def _alone(
        self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None
    ) -> Backward | None:
        if not self._direct_is_known():
            return None
        device = self.marks[0].cut.device
        sequences, chosen = sequences.to(device), chosen.to(device)
        rows = self._pulled_back(sequences, chosen.T, dtype).permute(2, 0, 1, 3)
        return Backward(self._split(rows, sequences, dtype), None, None, None)

    def _pulled_back(self, sequences: Tensor, chosen: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Gradients of what arrives at the chosen steps (m, n) alone, (T, m, n, S)."""
        direct = torch.stack(self._direct())
        whole = _is_all(sequences, direct.shape[1])
        direct = direct[:, sequences].to(dtype or direct.dtype).unsqueeze(2)
        carried = direct.new_zeros(*chosen.shape, direct.shape[3])
        rows = []
        for t in reversed(range(len(direct))):
            mark = self.steps[t]
            carried = carried + direct[t].masked_fill((chosen != t).unsqueeze(2), 0.0)
            rows.append(_with_moving(mark, carried, None if whole else sequences))
            carried = _pulled(mark.jacobian, carried, None if whole else sequences)
        return torch.stack(rows[::-1])

    def _split(
        self, rows: Tensor, sequences: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """State name -> (..., T, m, width) in its own dtype, or the given one, from (..., T, m, S)."""
        states = self.marks[0].states
        parts = {n: part.to(dtype or states[n].dtype) for n, part in self.parted(rows).items()}
        return {name: self._trimmed(part, sequences) for name, part in parts.items()}

    def parted(self, rows: Tensor) -> dict[str, Tensor]:
        """State name -> its columns of rows (..., S)."""
        widths = [state.shape[1] for state in self.marks[0].states.values()]
        return dict(zip(self.names, rows.split(widths, dim=-1), strict=True))

    def _direct(self) -> list[Tensor]:
        """(B, S) per step, see `_told_apart`; kept as long as no further backward comes."""
        if self._known_direct is None or self._known_direct[0] != self.version:
            self._known_direct = (self.version, self._told_apart())
        return self._known_direct[1]

    def _told_apart(self) -> list[Tensor]:
        """(B, S) per step: what reaches the independent states not through the next step.

        An entry no larger than 64 units of rounding of the largest term of its step, sequence and
        state counts as an exact 0: less than that the subtraction cannot tell.
        """
        widths = [state.shape[1] for state in self.marks[0].states.values()]
        later: tuple[Tensor, Tensor] | None = None  # a of the step after and the size of its terms
        found = []
        for place in reversed(range(len(self.steps))):
            mark = self.steps[place]
            total = self._total(mark)
            value = total - _pulled(mark.within, total)
            size = total.abs() + _pulled(mark.within, total, absolute=True)
            came, bound = torch.zeros_like(value), torch.zeros_like(value)
            if later is not None:
                following = self.steps[place + 1].jacobian
                came = _pulled(following, later[0])
                bound = _pulled(following, later[1], absolute=True)
            parts = [part.split(widths, dim=1) for part in (value, came, size + bound)]
            found.append(torch.cat([difference(*p) for p in zip(*parts, strict=True)], dim=1))
            later = (value, size)
        return found[::-1]

    def _total(self, mark: Mark) -> Tensor:
        """(B, S): the total gradients of one step, states side by side."""
        dtype = torch.float32
        for state in mark.states.values():
            dtype = torch.promote_types(dtype, state.dtype)
        return torch.cat([_grad(mark, name).to(dtype) for name in mark.states], dim=1)

    def why_no_operator(self) -> str:
        """Why the step Jacobians are not known, or nothing."""
        if self.closed is not None:
            return str(self.closed.instead())
        return next((mark.unknown for mark in self.marks if mark.unknown), "")

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Dense step Jacobians; index 0 is the identity where nothing before the first was seen.

        Raises:
            RecordingError: they were not taken, or could not be.
        """
        if self.closed is not None:
            raise self.closed.refuse(self.name)
        reason = self.why_no_operator()
        if reason:
            raise RecordingError(f"{self.name}: its step Jacobians are not known: {reason}")
        device = self.marks[0].cut.device
        chosen = sequences.to(device)
        batch = len(sequences) if _is_all(sequences, len(sequences)) else -1
        real = self.real
        first = self.marks[0]
        size = sum(state.shape[1] for state in first.states.values())
        if any(isinstance(mark.jacobian, WideStep) for mark in self.marks):
            lengths = None if self.lengths is None else self.lengths.to(device)[chosen]
            steps = [m.jacobian for m in self.marks if not isinstance(m.jacobian, Tensor)]
            assert len(steps) == len(self.marks)
            return self._wide(Wide(steps, dtype, chosen, size, lengths))
        eye = torch.eye(size, dtype=dtype, device=device).expand(len(chosen), -1, -1)
        matrices = []
        for t, mark in enumerate(self.steps):
            if mark.jacobian is None:
                matrices.append(eye)
                continue
            assert isinstance(mark.jacobian, Tensor)
            whole = batch == len(mark.cut)
            matrix = mark.jacobian if whole else mark.jacobian[chosen]
            if real is not None:
                padded = t >= real.to(device)[chosen]
                matrix = matrix.masked_fill(padded.view(-1, 1, 1), 0.0)
            matrices.append(matrix)
        return Dense(matrices, dtype)

    def _wide(self, operator: Wide) -> Operator:
        """Products, or the matrices themselves where all of them are cheap to write out."""
        if not operator.is_cheap:
            return operator
        which = tuple(operator.sequences.tolist())
        if self._written is None or self._written[0] != (which, len(self.marks)):
            self._written = ((which, len(self.marks)), operator.written())
        return Dense(self._written[1], operator.dtype)

    def parity(self) -> Parity:
        """There is nothing to hold against anything: the weights are the user's own affair."""
        return Parity("not applicable", None, self.words.kind)

    def notes(self) -> list[str]:
        """What a reader should know about the track."""
        return self._batched_note() + self._notes()

    def _notes(self) -> list[str]:
        if self.closed is not None:
            return [self.closed.note(self.name)]
        reason = self.why_no_operator()
        if reason and self.words is UNROLLED:
            return [
                *self.remarks,
                f"its step Jacobians and last loss step alone are not known: {reason}",
            ]
        if reason:
            return [f"its step Jacobians and last loss step alone are not known: {reason}"]
        if self.words is TAPPED and starts_constant(self):
            return [
                "the states of its first tap need no gradient, a constant start perhaps: how the "
                "second depends on them is not measured"
            ]
        if self.mixed:
            return [
                *self.remarks,
                "between two calls its state is mixed with the one before (zoneout, a mask): gains are "
                "those of the states that enter the calls, and the last loss step alone and the "
                "direct part are not told apart",
            ]
        return self.remarks


def aligned(marks: list[Mark], layout: Layout) -> list[Mark]:
    """One mark of all sequences for every step; zero where a sequence is at its end."""
    found = []
    for t in range(layout.steps):
        here = [
            (mark, part.starts == t, part.sequences[part.starts == t])
            for mark, part in zip(marks, layout.parts, strict=True)
            if bool((part.starts == t).any())
        ]
        found.append(_joined(here, layout.batch))
    return found


def _joined(here: list[tuple[Mark, Tensor, Tensor]], batch: int) -> Mark:
    """The chosen rows of some marks at the sequences that they are."""
    first = here[0][0]

    def put(parts: Sequence[Tensor | WideStep | None], identity: bool = False) -> Tensor | None:
        one = next((part for part in parts if isinstance(part, Tensor)), None)
        if one is None:  # or wide ones, of which such a batch is not known
            return None
        result = one.new_zeros(batch, *one.shape[1:])
        for part, (_, rows, sequences) in zip(parts, here, strict=True):
            at = sequences.to(one.device)
            if isinstance(part, Tensor):
                result[at] = part[rows.to(one.device)]
            elif identity:  # begins here, with nothing before it
                result[at] = torch.eye(one.shape[1], dtype=one.dtype, device=one.device)
        return result

    marks = [mark for mark, _, _ in here]
    states = {name: put([mark.states[name] for mark in marks]) for name in first.states}
    grads = {
        name: put([mark.grads.get(name, torch.zeros_like(mark.states[name])) for mark in marks])
        for name in first.states
        if any(name in mark.grads for mark in marks)
    }
    cut = put([mark.cut for mark in marks])
    assert cut is not None
    return Mark(
        states={name: state for name, state in states.items() if state is not None},
        grad_enabled=any(mark.grad_enabled for mark in marks),
        differentiable=any(mark.differentiable for mark in marks),
        cut=cut,
        jacobian=put([mark.jacobian for mark in marks], identity=True),
        within=put([mark.within for mark in marks]),
        within_known=all(mark.within_known for mark in marks),
        unknown=next((mark.unknown for mark in marks if mark.unknown), ""),
        grads={name: grad for name, grad in grads.items() if grad is not None},
    )


def starts_constant(source: TapSource) -> bool:
    """Whether the first marked states, but not the second, are outside the graph."""
    marks = source.marks
    return len(marks) > 1 and not marks[0].differentiable and marks[1].differentiable


def _grad(mark: Mark, name: str) -> Tensor:
    return mark.grads.get(name, torch.zeros_like(mark.states[name]))


def _pulled(
    matrix: Tensor | WideStep | None,
    rows: Tensor,
    sequences: Tensor | None = None,
    *,
    absolute: bool = False,
) -> Tensor:
    """Matrixᵀ rows, (B, S) or (B, n, S), of some sequences; zero where there is no matrix."""
    if matrix is None:
        return torch.zeros_like(rows)
    if isinstance(matrix, WideStep):
        return pulled(matrix, rows, sequences, absolute=absolute)
    matrix = (matrix if sequences is None else matrix[sequences]).to(rows.dtype)
    if absolute:
        matrix, rows = matrix.abs(), rows.abs()
    return rows @ matrix if rows.dim() == 3 else (rows.unsqueeze(1) @ matrix).squeeze(1)


def _with_moving(mark: Mark, rows: Tensor, sequences: Tensor | None = None) -> Tensor:
    """Gradients of the graph from those of independent states: g = (I − Mᵀ)⁻¹ a.

    No state is made from itself, so the series Σ (Mᵀ)ⁿ ends after as many terms as there are states.
    """
    total, term = rows, rows
    if mark.within is None:
        return total
    for _ in mark.states:
        term = _pulled(mark.within, term, sequences)
        total = total + term
    return total


def _is_all(chosen: Tensor, batch: int) -> bool:
    return len(chosen) == batch and bool(
        (chosen == torch.arange(batch, device=chosen.device)).all()
    )
