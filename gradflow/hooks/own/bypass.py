"""States that go around a cell of the user's own: zoneout, a mask that keeps the state of a padded step.

Letters: r_n what call n returns, e_n the states that enter it, e_{n+1} = f(r_n, e_n). Where f depends
on e_n, the returned states alone do not compose; those that enter do, and step n leads from e_n to
e_{n+1} = K_n J_n + R_n with J_n = ∂r_n/∂e_n, K_n = ∂f/∂r_n and R_n = ∂f/∂e_n, all (B, S, S).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.hooks.dense import Place, Step, complete, unit_rows
from gradflow.hooks.graph import Between, NotReadable, without_autocast
from gradflow.hooks.loops.links import close_to, probe_of
from gradflow.hooks.tape import Constants, Tape
from gradflow.hooks.tapped import Mark, TapSource
from gradflow.hooks.wide import LedStep, MaskedStep, WideStep, mixes, tape_of, wide_step

REORDERED = (
    "a step that mixes its sequences, or puts them in another order, beside a mixture (zoneout)"
)
HIDDEN_START = "a mixture with a constant start that the graph does not hold"


@dataclass(eq=False)
class Around:
    """What is known of the last two calls of a loop over a cell."""

    entered: Place | None  # e_n; None where the arguments do not give the states one by one
    returned: Place  # r_n
    entered_before: Place | None = None  # e_{n−1}
    returned_before: Place | None = None  # r_{n−1}
    values: Tensor | None = None  # of e_n, (B, S)
    mixed: bool = False  # from some call on the states that compose are those that enter
    constants: Constants | None = None  # of wide steps; None: matrices are written out

    def next(self, entered: Place | None, values: Tensor | None, returned: Place) -> Around:
        """After one more call."""
        before = self.entered, self.returned
        return Around(entered, returned, *before, values, self.mixed, self.constants)

    def goes_around(self, entering: Place | None) -> bool:
        """Whether states that enter a call hold some of those that entered the call before."""
        if self.entered is None or entering is None or not entering.edges:
            return False
        if set(entering.edges.values()) <= set(self.returned.edges.values()):
            return False
        ends = self.returned.nodes | self.entered.nodes
        roots = list(entering.edges.values())
        between = Between(roots, ends)
        beside = between.reached & (self.entered.nodes - self.returned.nodes)
        return bool(beside) and bool(beside & between.touched(roots))

    def read(self, source: TapSource, entering: Place, now: Place, mark: Mark) -> None:
        """Put J_n on the new mark, and lead the step before to the states that now enter.

        Raises:
            NotReadable: an operation is not to be read, or more is carried than the states.
        """
        assert self.entered is not None
        last = source.marks[-1]
        if not self.mixed:
            self._turn(source)
        link = self._link(entering, self.returned, self.entered)
        mark.cut = ~link.flows()
        step = self._step(entering, now, self.returned, len(source.marks))
        if step is None or last.jacobian is None:
            raise NotReadable("a step that does not depend on the states that enter it")
        last.jacobian = link.led(last.jacobian, mark.cut)
        mark.jacobian = masked(step, mark.cut)
        self.mixed = source.mixed = True

    def _turn(self, source: TapSource) -> None:
        """From the returned states to those that enter, at the call before."""
        if self.returned_before is None:
            return
        assert self.entered is not None
        link = self._link(self.entered, self.returned_before, self.entered_before)
        first = source.marks[-2]
        if self.entered_before is not None and not self.entered_before.edges:
            link.rest = self._hidden(link.share(), source)
        step = self._step(self.entered, self.returned, self.returned_before, 0)
        if step is None or first.jacobian is None:
            raise NotReadable("a step that does not depend on the states that enter it")
        first.jacobian = link.led(first.jacobian, torch.zeros_like(first.cut))
        source.marks[-1].jacobian = step

    def _step(
        self, before: Place, now: Place, older: Place, number: int
    ) -> Tensor | WideStep | None:
        """J of a call, by the states that enter it; None where no path leads back."""
        step = Step.find(before, now, older.nodes, older.since)
        if step is None:
            return None
        if self.constants is not None:
            return wide_step(step, self.constants, number)
        found = step.jacobian()
        if step.rows is not None:
            raise NotReadable("a cell that puts its sequences in another order")
        return found

    def _link(
        self, entering: Place, returned: Place, entered: Place | None
    ) -> DenseLink | WideLink:
        """K and R of the states that enter a call, by those the call before returned and was given."""
        both, between = between_calls(entering, returned, entered)
        if self.constants is None:
            return DenseLink.read(entering, both, between, entered is not None)
        return WideLink.read(entering, both, between, self.constants)

    def _hidden(self, share: Tensor | None, source: TapSource) -> Tensor:
        """R of a link over a constant e_1, which no graph holds: 1 − K, if the values agree.

        share is the diagonal of K (B, S), None where K has more than that.
        """
        if share is None:
            raise NotReadable(HIDDEN_START)
        returned = torch.cat(list(source.marks[-2].states.values()), dim=1)
        constant = torch.cat([source.initial[name] for name in source.marks[-2].states], dim=1)
        fits = self.values is not None and close_to(
            self.values, share * returned + (1 - share) * constant, returned.abs() + constant.abs()
        )
        if not fits:
            raise NotReadable(HIDDEN_START)
        return 1 - share


def masked(step: Tensor | WideStep, dead: Tensor) -> Tensor | WideStep:
    """A step that is 0 for some sequences."""
    if isinstance(step, WideStep):
        return MaskedStep(step, dead) if bool(dead.any()) else step
    return step.masked_fill(dead.view(-1, 1, 1), 0.0)


@dataclass
class DenseLink:
    """What becomes of states between two calls, written out: K and R, (B, S, S)."""

    keep: Tensor
    around: Tensor
    rest: Tensor | None = None  # (B, S) in the place of R: it is diagonal

    @staticmethod
    def read(entering: Place, both: Place, between: Between, entered: bool) -> DenseLink:
        """One product per unit."""
        found = []
        for name in entering.parts:
            block, beside = unit_rows(entering, both, between, name)
            found.append(complete(block, beside))
        whole = torch.cat(found, dim=1)
        size = whole.shape[1]
        probe = probe_of(entering.like)
        seeds = entering.seeds(probe, list(entering.parts))
        with without_autocast(entering.like.device.type):
            pulled = both.gathered(between.pull(seeds))[0]
        again, bound = (
            (v.unsqueeze(1).to(m.dtype) @ m).squeeze(1)
            for v, m in ((probe, whole), (probe.abs(), whole.abs()))
        )
        if bool(pulled.isfinite().all()) and not close_to(pulled.to(again.dtype), again, bound):
            raise NotReadable(REORDERED)
        return DenseLink(whole[:, :, :size], whole[:, :, size:] if entered else whole.new_zeros(()))

    def flows(self) -> Tensor:
        """(B,) whether anything comes through."""
        return ((self.keep != 0) | (self.around != 0)).flatten(1).any(1)

    def share(self) -> Tensor | None:
        """The diagonal of K, if K is nothing else."""
        share = self.keep.diagonal(dim1=1, dim2=2)
        return None if bool((self.keep != torch.diag_embed(share)).any()) else share

    def led(self, step: Tensor | WideStep, cut: Tensor) -> Tensor:
        """K A + R; A itself for the sequences that are cut."""
        assert isinstance(step, Tensor)
        around = self.around if self.rest is None else torch.diag_embed(self.rest)
        return torch.where(cut.view(-1, 1, 1), step, self.keep @ step + around)


@dataclass
class WideLink:
    """The same as products: u to (Kᵀ u, Rᵀ u) side by side, or to Kᵀ u alone."""

    tape: Tape
    rest: Tensor | None = None

    @staticmethod
    def read(entering: Place, both: Place, between: Between, constants: Constants) -> WideLink:
        """Write down one backward of what lies between the calls."""
        tape = tape_of(entering, both, between, constants)
        if mixes(tape, 0):
            raise NotReadable(REORDERED)
        return WideLink(tape)

    def flows(self) -> Tensor:
        """(B,) whether anything comes through."""
        return (self.tape.pull(probe_of(self.tape.like).unsqueeze(1)) != 0).flatten(1).any(1)

    def share(self) -> Tensor | None:
        """The diagonal of K, if K is nothing else, as far as a random vector tells."""
        probe, size = probe_of(self.tape.like), self.tape.like.shape[1]
        ones = self.tape.pull(torch.ones_like(probe).unsqueeze(1))[:, 0, :size]
        found = self.tape.pull(probe.unsqueeze(1))[:, 0, :size]
        return ones if close_to(found, probe * ones, ones) else None

    def led(self, step: Tensor | WideStep, cut: Tensor) -> WideStep:
        """K A + R; A itself for the sequences that are cut."""
        assert isinstance(step, WideStep)
        return LedStep(step, self.tape, self.rest, cut)


def between_calls(entering: Place, returned: Place, entered: Place | None) -> tuple[Place, Between]:
    """Where the states that a call returned and was given sit, and the way back to them."""
    places = (
        {"returned": returned} if entered is None else {"returned": returned, "entered": entered}
    )
    edges, shapes, rows, axes = {}, {}, {}, {}
    for which, place in places.items():
        for name, part in place.parts.items():
            key = f"{which} {name}"
            axes[key] = place.axes[name]
            shapes[key], rows[key] = place.shapes[name], place.like[:, part].to(place.dtypes[name])
            if name in place.edges:
                edges[key] = place.edges[name]
    both = Place.at(edges, shapes, rows, axes)
    return both, Between(list(entering.edges.values()), both.nodes)
