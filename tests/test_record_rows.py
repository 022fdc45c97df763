"""Rows that are swapped for new ones between two calls: who goes on with whom, and who is cut.

The oracle is the dependence in autograd's graph: a step of a track goes on, with the Jacobian that
autograd has, exactly where its state depends on that of the sequence's step before. Where it does
not, the track has a cut in the same place of the batch, or a sequence that begins.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import compare
import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, BATCH, STEPS = 3, 4, 6
States = tuple[Tensor, ...]
Plan = list[int | None]  # of every row the row before that it is, None a new one


class Own(nn.Module):
    def __init__(self, leak: float = 1.0) -> None:
        super().__init__()
        self.into, self.around = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.leak = leak

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        new = torch.tanh(self.into(x) + self.around(h))
        return new if self.leak == 1.0 else (1.0 - self.leak) * h + self.leak * new


def step_of(kind: str) -> tuple[nn.Module, Callable[[Tensor, States], States], int]:
    """A module, one step with it, and the number of its states."""
    torch.manual_seed(0)
    if kind == "LSTMCell":
        lstm = nn.LSTMCell(WIDTH, WIDTH).double()
        return lstm, lambda x, s: lstm(x, (s[0], s[1])), 2
    if kind == "GRUCell":
        gru = nn.GRUCell(WIDTH, WIDTH).double()
        return gru, lambda x, s: (gru(x, s[0]),), 1
    if kind == "fused":
        layer = nn.GRU(WIDTH, WIDTH).double()
        return layer, lambda x, s: (layer(x[None], s[0][None])[1][0],), 1
    cell = Own(0.5 if kind == "leaky" else 1.0).double()
    if kind == "tap":
        parts = nn.ModuleList([cell.into, cell.around])

        def tapped(x: Tensor, s: States) -> States:
            return (gradflow.tap(h=torch.tanh(cell.into(x) + cell.around(s[0]))),)

        return parts, tapped, 1
    return cell, lambda x, s: (cell(x, s[0]),), 1


def planned(kind: str, count: int, draw: random.Random) -> Plan:
    """Which of the rows stay, and where; never none of them."""
    stay = [b for b in range(count) if draw.random() < 0.7] or [0]
    if kind == "in place":
        return [b if b in stay else None for b in range(count)]
    if kind == "at the end":
        return stay + [None] * (count - len(stay))
    if kind == "in front":
        return [None] * (count - len(stay)) + stay
    draw.shuffle(stay)
    return [*stay, *[None] * draw.randint(0, 2)]


def by_cat(state: Tensor, plan: Plan, new: Tensor) -> Tensor:
    return torch.cat([new[None] if row is None else state[row : row + 1] for row in plan])


def by_index(state: Tensor, plan: Plan, new: Tensor) -> Tensor:
    some = next(row for row in plan if row is not None)
    taken = state[torch.tensor([some if row is None else row for row in plan])]
    taken[torch.tensor([row is None for row in plan])] = new
    return taken


def by_mask(state: Tensor, plan: Plan, new: Tensor) -> Tensor:
    some = next(row for row in plan if row is not None)
    taken = state.index_select(0, torch.tensor([some if row is None else row for row in plan]))
    keep = torch.tensor([[row is not None] for row in plan]).to(state.dtype)
    return taken * keep + new * (1.0 - keep)


def by_buffer(state: Tensor, plan: Plan, new: Tensor) -> Tensor:
    rows = torch.zeros(len(plan), WIDTH, dtype=state.dtype)
    for place, row in enumerate(plan):
        rows[place] = new if row is None else state[row]
    return rows


WAYS = {"cat": by_cat, "index": by_index, "mask": by_mask, "buffer": by_buffer}


def found_of(tracks: list[Track], steps: list[States]) -> dict[tuple[int, int], tuple]:
    """(call, row) -> its track, step and sequence, by its values."""
    found: dict[tuple[int, int], tuple] = {}
    for track in tracks:
        for b, length in enumerate(track.lengths.tolist()):
            for t in range(length):
                value = track.h[t, b]
                places = [
                    (call, row)
                    for call, states in enumerate(steps)
                    for row in range(len(states[0]))
                    if torch.equal(states[0][row], value)
                ]
                assert len(places) == 1
                found[places[0]] = track, t, b
    return found


def jacobian(new: States, row: int, old: States, origin: int) -> Tensor:
    """∂(a row's states)/∂(states that a row returned), h and c apart."""

    def rows(states: States, row: int, of: States, origin: int) -> Tensor:
        made = [
            torch.autograd.grad(s[row, unit], of, retain_graph=True, allow_unused=True)
            for s in states
            for unit in range(WIDTH)
        ]
        zero = torch.zeros(WIDTH).double()
        return torch.stack(
            [torch.cat([zero if g is None else g[origin] for g in grads]) for grads in made]
        )

    whole = rows(new, row, old, origin)
    if len(old) == 1:
        return whole
    through_h = whole[:, :WIDTH] @ rows(old[:1], origin, old[1:], origin)
    return torch.cat([whole[:, :WIDTH], whole[:, WIDTH:] - through_h], dim=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", ["in place", "at the end", "in front", "shuffled"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "fused", "own", "leaky", "tap"])
def test_a_row_goes_on_with_what_it_depends_on_and_else_begins_or_is_cut(
    kind: str, plan: str, way: str
) -> None:
    module, step, count = step_of(kind)
    draw = random.Random(3)
    new = [torch.randn(WIDTH).double().requires_grad_() for _ in range(count)]
    if plan in ("at the end", "shuffled"):
        new = [torch.zeros(WIDTH).double() for _ in range(count)]
    steps: list[States] = []
    plans: list[Plan] = []
    with gradflow.record(module) as recording:
        state, loss = tuple(value.expand(BATCH, -1) for value in new), 0.0
        for t in range(STEPS):
            plans.append(planned(plan, len(state[0]), draw) if t else [None] * BATCH)
            if t:
                state = tuple(WAYS[way](s, plans[t], n) for s, n in zip(state, new, strict=True))
            state = step(torch.randn(len(state[0]), WIDTH).double(), state)
            state[0].retain_grad()
            steps.append(state)
            loss = loss + (state[0] * torch.randn_like(state[0])).sum()
        loss.backward(retain_graph=True)
    found = found_of(list(recording.values()), steps)
    assert len(found) == sum(len(states[0]) for states in steps)
    assert any(row is None for each in plans[1:] for row in each)
    places = {place: key for key, place in found.items()}
    for (call, row), (track, t, b) in found.items():
        torch.testing.assert_close(track.grad_h[t, b], steps[call][0].grad[row], rtol=1e-9, atol=0)
        origin, before = plans[call][row], places.get((track, t - 1, b))
        if origin is None:
            assert t == 0
            continue
        assert before == (call - 1, origin)
        assert not track.cuts[t, b]
        theirs = jacobian(steps[call], row, steps[call - 1], origin)
        torch.testing.assert_close(
            step_jacobians(track)[t, b], theirs, rtol=1e-8, atol=1e-12 * float(theirs.abs().max())
        )


@pytest.mark.parametrize("kind", ["LSTMCell", "fused", "own", "leaky", "tap"])
def test_a_row_that_moved_and_was_masked_is_a_cut_of_its_own_sequence(kind: str) -> None:
    """Rows 3, 1, 0 go on, of which 1 is multiplied by zero: it is not a new sequence."""
    module, step, count = step_of(kind)
    order, keep = [3, 1, 0], torch.tensor([[1.0], [0.0], [1.0]]).double()
    with gradflow.record(module) as recording:
        state, loss = tuple(torch.zeros(BATCH, WIDTH).double() for _ in range(count)), 0.0
        for t in range(4):
            if t == 2:
                state = tuple(s[order] * keep for s in state)
            state = step(torch.randn(len(state[0]), WIDTH).double(), state)
            loss = loss + state[0].sum()
        loss.backward()
    (track,) = recording.values()
    assert track.lengths.tolist() == [4, 4, 2, 4]
    assert track.cuts.nonzero().tolist() == [[2, 1]]


def test_units_that_are_all_dead_while_the_batch_shrinks_are_no_new_sequence() -> None:
    """The relu of sequence 1 is 0 in all units at the step at which sequence 2 ends."""

    class Relu(Own):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.relu(self.into(x) + self.around(h))

    torch.manual_seed(0)
    cell = Relu().double()
    x = torch.rand(4, 3, WIDTH).double() + 3.0
    with torch.no_grad():
        cell.into.weight.copy_(torch.eye(WIDTH))
    x[2, 1] = -100.0
    with gradflow.record(cell) as recording:
        h, loss = torch.zeros(3, WIDTH).double(), 0.0
        for t in range(4):
            h = h[: 3 if t < 2 else 2]
            h = cell(x[t, : len(h)], h)
            loss = loss + h.sum()
        loss.backward()
    (track,) = recording.values()
    assert track.lengths.tolist() == [4, 4, 2]
    assert not track.cuts.any()


@pytest.mark.parametrize("way", ["cat", "where"])
@pytest.mark.parametrize("kind", ["GRUCell", "own", "tap"])
def test_buffers_that_swap_finished_sequences_are_not_called_dead(kind: str, way: str) -> None:
    module, step, _ = step_of(kind)
    with gradflow.record(module) as recording:
        h, loss = torch.zeros(BATCH, WIDTH).double(), 0.0
        for t in range(24):
            if t and t % 6 == 0 and way == "cat":
                h = torch.cat([h[: t // 6], torch.zeros(1, WIDTH).double(), h[t // 6 + 1 :]])
            elif t and t % 6 == 0:
                h = torch.where(torch.arange(BATCH)[:, None] == t // 6, 0.0, h)
            (h,) = step(torch.randn(BATCH, WIDTH).double(), (h,))
            loss = loss + h.sum()
        loss.backward()
    (layer,) = gradflow.analyze(recording).values()
    assert layer.verdict != "dead"
    track = recording[layer.name]
    cuts = [[6, 1], [12, 2], [18, 3]] if way == "where" else []
    assert track.cuts.nonzero().tolist() == cuts
    assert sorted(track.lengths.tolist()) == ([24] * 4 if cuts else [6, 6, 12, 12, 18, 18, 24])


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell"])
@pytest.mark.parametrize("way", ["index_copy", "in place"])
def test_nodes_that_rest_and_return_go_on_where_they_were(way: str, kind: str) -> None:
    """As in the memory of a temporal graph, or episodes of uneven pace: each call updates some nodes."""
    torch.manual_seed(0)
    cell, step, count = step_of(kind)
    start = [torch.randn(5, WIDTH).double().requires_grad_() for _ in range(count)]
    memory, made, steps = [s * 1.0 for s in start], {}, {n: [] for n in range(5)}
    with gradflow.record(cell) as recording:
        for t, nodes in enumerate([[0, 1, 2, 4], [0, 1, 3, 4], [0, 2, 3, 4], [3, 4], [4, 3, 2, 1]]):
            new = step(torch.randn(len(nodes), WIDTH).double(), tuple(m[nodes] for m in memory))
            for row, node in enumerate(nodes):
                made[tuple(new[0][row].tolist())] = t, node
                steps[node].append((new, row))
            for place, part in enumerate(new):
                if way == "index_copy":
                    memory[place] = memory[place].index_copy(0, torch.tensor(nodes), part)
                else:
                    memory[place] = memory[place].clone()
                    memory[place][nodes] = part
        for new, _ in {id(new): (new, 0) for each in steps.values() for new, _ in each}.values():
            [part.retain_grad() for part in new]
        sum(m.pow(2).sum() for m in memory).backward(retain_graph=True)
    (track,) = recording.values()
    assert not track.cuts.any()
    assert sorted(track.lengths.tolist()) == [3, 3, 3, 4, 5]
    for b, length in enumerate(track.lengths.tolist()):
        seen = [made[tuple(track.h[t, b].tolist())] for t in range(length)]
        (node,) = {node for _, node in seen}
        assert [t for t, _ in seen] == sorted(t for t, n in made.values() if n == node)
        product = torch.eye(WIDTH * count).double()
        for t, (new, row) in enumerate(steps[node]):
            compare.assert_whole_close(track.grad_h[t, b], new[0].grad[row])
            product = step_jacobians(track)[t, b] @ product
        new, row = steps[node][-1]
        compare.assert_whole_close(product, jacobian(new, row, tuple(start), node))
    (layer,) = gradflow.analyze(recording).values()
    assert "no gains" not in layer.labels
