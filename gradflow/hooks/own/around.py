"""States that go around a cell of the user's own: zoneout, a mask that keeps the state of a padded step.

Letters: r_n what call n returns, e_n the states that enter it, e_{n+1} = f(r_n, e_n). Where f depends
on e_n, the returned states alone do not compose; those that enter do, and step n leads from e_n to
e_{n+1} = K_n J_n + R_n with J_n = ∂r_n/∂e_n, K_n = ∂f/∂r_n and R_n = ∂f/∂e_n, all (B, S, S).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.hooks.dense import Incomplete, Place, Step, unit_rows
from gradflow.hooks.graph import Between, NotReadable
from gradflow.hooks.loops.links import close_to
from gradflow.hooks.tapped import Mark, TapSource


@dataclass(eq=False)
class Around:
    """What is known of the last two calls of a loop over a cell."""

    entered: Place | None  # e_n; None where the arguments do not give the states one by one
    returned: Place  # r_n
    entered_before: Place | None = None  # e_{n−1}
    returned_before: Place | None = None  # r_{n−1}
    values: Tensor | None = None  # of e_n, (B, S)
    mixed: bool = False  # from some call on the states that compose are those that enter

    def next(self, entered: Place | None, values: Tensor | None, returned: Place) -> Around:
        """After one more call."""
        return Around(entered, returned, self.entered, self.returned, values, self.mixed)

    def goes_around(self, entering: Place | None) -> bool:
        """Whether states that enter a call hold some of those that entered the call before."""
        if self.entered is None or entering is None or not entering.edges:
            return False
        if set(entering.edges.values()) <= set(self.returned.edges.values()):
            return False
        ends = self.returned.nodes | self.entered.nodes
        between = Between(list(entering.edges.values()), ends)
        return bool(between.reached & (self.entered.nodes - self.returned.nodes))

    def read(self, source: TapSource, entering: Place, now: Place, mark: Mark) -> None:
        """Put J_n on the new mark, and lead the step before to the states that now enter.

        Raises:
            NotReadable: an operation is not to be read, or more is carried than the states.
        """
        assert self.entered is not None
        last = source.marks[-1]
        if not self.mixed:
            self._turn(source)
        keep, around = _link(entering, self.returned, self.entered)
        mark.cut = ~((keep != 0) | (around != 0)).flatten(1).any(1)
        step = Step.find(entering, now, self.returned.nodes, self.returned.since)
        if step is None or not isinstance(last.jacobian, Tensor):
            raise NotReadable("a step that does not depend on the states that enter it")
        led = keep @ last.jacobian + around
        last.jacobian = torch.where(mark.cut.view(-1, 1, 1), last.jacobian, led)
        mark.jacobian = step.jacobian().masked_fill(mark.cut.view(-1, 1, 1), 0.0)
        self.mixed = source.mixed = True

    def _turn(self, source: TapSource) -> None:
        """From the returned states to those that enter, at the call before."""
        if self.returned_before is None:
            return
        assert self.entered is not None
        keep, around = _link(self.entered, self.returned_before, self.entered_before)
        first = source.marks[-2]
        if self.entered_before is not None and not self.entered_before.edges:
            around = self._hidden(keep, source)
        before = self.returned_before
        step = Step.find(self.entered, self.returned, before.nodes, before.since)
        if step is None or not isinstance(first.jacobian, Tensor):
            raise NotReadable("a step that does not depend on the states that enter it")
        first.jacobian = keep @ first.jacobian + around
        source.marks[-1].jacobian = step.jacobian()

    def _hidden(self, keep: Tensor, source: TapSource) -> Tensor:
        """R of a link over a constant e_1, which no graph holds: 1 − K, if the values agree."""
        share = keep.diagonal(dim1=1, dim2=2)
        returned = torch.cat(list(source.marks[-2].states.values()), dim=1)
        constant = torch.cat([source.initial[name] for name in source.marks[-2].states], dim=1)
        fits = self.values is not None and close_to(
            self.values, share * returned + (1 - share) * constant, returned.abs() + constant.abs()
        )
        if not fits or bool((keep != torch.diag_embed(share)).any()):
            raise NotReadable("a mixture with a constant start that the graph does not hold")
        return torch.diag_embed(1 - share)


def _link(entering: Place, returned: Place, entered: Place | None) -> tuple[Tensor, Tensor]:
    """K and R of the states that enter a call, by those the call before returned and was given."""
    places = (
        {"returned": returned} if entered is None else {"returned": returned, "entered": entered}
    )
    edges, shapes, rows = {}, {}, {}
    for which, place in places.items():
        for name, part in place.parts.items():
            key = f"{which} {name}"
            shapes[key], rows[key] = place.shapes[name], place.like[:, part].to(place.dtypes[name])
            if name in place.edges:
                edges[key] = place.edges[name]
    both = Place.at(edges, shapes, rows)
    between = Between(list(entering.edges.values()), both.nodes)
    found = []
    for name in entering.parts:
        block, beside = unit_rows(entering, both, between, name)
        if any(bool((grad != 0).any()) for grad in beside):
            raise Incomplete("a state that depends on another result of what made those before it")
        found.append(block)
    whole = torch.cat(found, dim=1)
    size = whole.shape[1]
    return whole[:, :, :size], whole[:, :, size:] if entered is not None else whole.new_zeros(())
