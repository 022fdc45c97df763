"""Several loops over one weight, and pieces of one loop, are told apart and joined as taps would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand_loops import INPUTS, H, Parts, Tap
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")
F64, T, B = torch.float64, 12, 3


def marked(tap: Tap, name: str, h: Tensor) -> Tensor:
    return tap(name, h=h) if tap else h


def run(m: Parts, x: Tensor, tap: Tap, name: str, h: Tensor | None = None) -> Tensor:
    h, ys = m.zeros(x) if h is None else h, []
    for u in x:
        h = marked(tap, name, torch.tanh(m.x(u) + m.h(h)))
        ys.append(h)
    return torch.stack(ys)


class Calls(Parts):
    """Called several times, each from zeros."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        return run(self, x, tap, "a")[-1] * run(self, 2 * x, tap, "b")[-1]


class Directions(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        there, back = run(self, x, tap, "a"), run(self, x.flip(0), tap, "b")
        return torch.cat([there, back.flip(0)], 2)


class SideBySide(Parts):
    """Two sequences in one loop over one weight."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h = g = self.zeros(x)
        for u in x:
            h = marked(tap, "a", torch.tanh(self.x(u) + self.h(h)))
            g = marked(tap, "b", torch.tanh(self.x(-u) + self.h(g)))
        return h * g


class Shared(Parts):
    """The second layer has the weights of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(H, H)

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        return run(self, run(self, torch.cat([x, x[..., :2]], 2), tap, "a"), tap, "b")


class Stacked(Parts):
    """Two layers in one loop, the upper on the lower."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h = g = self.zeros(x)
        for u in x:
            h = marked(tap, "a", torch.tanh(self.x(u) + self.h(h)))
            g = marked(tap, "b", torch.tanh(h @ self.W + self.hr(g)))
        return g


@pytest.mark.parametrize("make", [Calls, Directions, SideBySide, Shared, Stacked])
def test_loops_of_which_none_is_part_of_another_are_tracks_of_their_own(
    make: Callable[[], Parts],
) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(T, B, INPUTS, dtype=F64)
    found, tapped = recorded(model, x), recorded(model, x, gradflow.tap)
    assert list(found.tracks) == ["loop", "loop@2"] and not found.unseen
    assert [track.depth for track in found.values()] == ([1, 2] if make is Shared else [1, 1])
    for mine, theirs in zip(found.values(), tapped.values(), strict=True):
        (own,) = mine.states
        assert torch.equal(mine.states[own], theirs.states["h"])
        assert torch.equal(mine.grads[own], theirs.grads["h"])
        assert torch.equal(step_jacobians(mine), step_jacobians(theirs))


def recorded(model: nn.Module, *given: Any) -> Recording:
    with gradflow.record(model) as recording:
        (model(*given) ** 2).sum().backward()
    return recording


# --------------------------------------------------------------------------------- pieces of a loop


def plain(m: Parts, u: Tensor, s: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(m.x(u) + m.h(s[0]))]


def long_short(m: Parts, u: Tensor, s: list[Tensor]) -> list[Tensor]:
    i, f, g, o = m.g(torch.cat([u, s[1]], 1)).chunk(4, 1)
    c = torch.sigmoid(f) * s[0] + torch.sigmoid(i) * torch.tanh(g)
    return [c, torch.sigmoid(o) * torch.tanh(c)]


def gated(m: Parts, u: Tensor, s: list[Tensor]) -> list[Tensor]:
    r, z = torch.sigmoid(m.xr(u) + m.hr(s[0])), torch.sigmoid(m.xz(u) + m.hz(s[0]))
    return [(1 - z) * torch.tanh(m.x(u) + r * m.h(s[0])) + z * s[0]]


def rates(m: Parts, u: Tensor, s: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(m.x(u) + m.h(torch.tanh(s[0])))]


def pieces(step: Any, cuts: set[int], tap: Tap, *, backward: bool) -> Recording:
    """A loop that is cut off from its past before some steps, with a backward at each if so asked."""
    torch.manual_seed(1)
    m, x = Parts().double(), torch.randn(T, B, INPUTS, dtype=F64)
    states = [m.zeros(x) for _ in range(2 if step is long_short else 1)]
    with gradflow.record(m) as recording:
        loss = x.new_zeros(())
        for t, u in enumerate(x):
            if t in cuts:
                states = [s.detach() for s in states]
                if backward:
                    loss.backward()
                    loss = x.new_zeros(())
            states = step(m, u, states)
            if tap:
                tap(**{f"s{n}": s for n, s in enumerate(states)})
            loss = loss + (m.out(states[-1]) ** 2).sum()
        loss.backward()
    return recording


@pytest.mark.parametrize("backward", [False, True], ids=["one backward", "one per piece"])
@pytest.mark.parametrize("cuts", [{4, 8}, {5}], ids=["every four steps", "once"])
@pytest.mark.parametrize("step", [plain, long_short, gated, rates])
def test_pieces_of_a_truncated_loop_are_one_track_with_cuts(
    step: Any, cuts: set[int], backward: bool
) -> None:
    found = pieces(step, cuts, None, backward=backward)
    (mine,) = found.values()
    (theirs,) = pieces(step, cuts, gradflow.tap, backward=backward).values()
    assert not found.unseen
    assert {t for t in range(T) if bool(mine.cuts[t].all())} == cuts
    assert torch.equal(mine.cuts, theirs.cuts)
    for own, other in zip(mine.states, theirs.states, strict=True):
        assert torch.equal(mine.states[own], theirs.states[other])
        assert torch.equal(mine.grads[own], theirs.grads[other])
    assert torch.equal(step_jacobians(mine), step_jacobians(theirs))


class Chunks(Parts):
    """A layer that loops inside and is given its last state, cut off."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = run(self, x, None, "", h)
        return ys, ys[-1]


def test_a_layer_that_is_called_piece_by_piece_is_no_cell_of_few_steps() -> None:
    model, h = Chunks(), torch.zeros(B, H)
    with gradflow.record(model) as recording:
        for x in torch.randn(3, 4, B, INPUTS):
            ys, h = model(x, h.detach())
            (ys**2).sum().backward()
    (track,) = recording.values()
    assert (track.steps, track.cuts[:, 0].nonzero().flatten().tolist()) == (12, [4, 8])


# ------------------------------------------------------------------------------ what is no line


class Tree(Parts):
    """Two children make a parent, level by level."""

    def forward(self, x: Tensor) -> Tensor:
        nodes = [torch.tanh(self.x(u)) for u in x]
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=True)
            nodes = [torch.tanh(self.h(a) + self.hr(b)) for a, b in pairs]
        return nodes[0]


class Grown(Tree):
    """The same, the left half before the right one."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return torch.tanh(self.x(x[0]))
        half = len(x) // 2
        return torch.tanh(self.h(self(x[:half])) + self.h(self(x[half:])))


@pytest.mark.parametrize("make", [Tree, Grown])
def test_the_nodes_of_a_tree_are_no_steps(make: Callable[[], Parts]) -> None:
    torch.manual_seed(2)
    model = make()
    with pytest.warns(GradflowWarning, match="its uses are the nodes of a tree"):
        assert not list(recorded(model, torch.randn(16, B, INPUTS)).values())


class Odd(Parts):
    """One step is not like the others: several steps together are not taken for one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.zeros(x)
        for t, u in enumerate(x):
            h = torch.tanh(self.x(u) + self.h(h * self.sign if t == 6 else h))
        return h


def test_a_step_that_is_unlike_the_others_is_not_hidden_in_longer_steps() -> None:
    with pytest.warns(GradflowWarning, match="not every step does the same"):
        assert not list(recorded(Odd(), torch.randn(T, B, INPUTS)).values())
