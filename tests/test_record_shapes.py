"""Cells of one's own and tapped loops: states of any shape, out of one tensor, and shrinking batches.

The oracle is autograd on the user's own graph: totals, and the product of all A_t over the loop.
"""

from __future__ import annotations

from collections.abc import Callable

import compare
import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, INPUTS, HIDDEN = 6, 3, 4


class Own(nn.Module):
    def __init__(self, inputs: int = INPUTS) -> None:
        super().__init__()
        self.f = nn.Linear(inputs + HIDDEN, HIDDEN, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.f(torch.cat([x, h], -1)))


def product_of(track: Track, b: int) -> Tensor:
    """∂s_T/∂s_0 of one sequence."""
    matrices = step_jacobians(track)[: int(track.lengths[b]), b]
    found = torch.eye(matrices.shape[-1]).double()
    for matrix in matrices:
        found = matrix @ found
    return found


def autograd_of(last: Tensor, start: Tensor) -> Tensor:
    """∂last/∂start, both flat, without a batch."""
    rows = [torch.autograd.grad(u, start, retain_graph=True)[0].flatten() for u in last.flatten()]
    return torch.stack(rows)


# -------------------------------------------------------------------------------- which axis is the batch


class Stacked(nn.Module):
    """Two layers; the state (2, B, H)."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.fs = nn.ModuleList(
            nn.Linear(inputs + HIDDEN, HIDDEN, dtype=torch.float64)
            for inputs in (INPUTS, INPUTS if beside else HIDDEN)
        )
        self.beside = beside

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tanh(self.fs[0](torch.cat([x, h[0]], -1)))
        below = x if self.beside else first
        second = torch.tanh(self.fs[1](torch.cat([below, h[1]], -1)))
        return second, torch.stack([first, second])


class Heads(nn.Module):
    """A state (B, heads, d) whose heads see one another if they are told to."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.f = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.i = nn.Linear(INPUTS, HIDDEN, dtype=torch.float64)
        self.together = together

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        other = h.flip(1) if self.together else h
        return torch.tanh(self.f(other) + self.i(x).unsqueeze(1))


class Images(nn.Module):
    """A state (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(3, 2, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.f(torch.cat([x, h], 1)))


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], int | None]] = {
    "stacked (2, 5, H)": (lambda: Stacked(beside=False), (5, INPUTS), (2, 5, HIDDEN), 1),
    "stacked (2, 2, H)": (lambda: Stacked(beside=False), (2, INPUTS), (2, 2, HIDDEN), 1),
    "stacked (2, 1, H)": (lambda: Stacked(beside=False), (1, INPUTS), (2, 1, HIDDEN), 1),
    "stacked (2, H)": (lambda: Stacked(beside=False), (INPUTS,), (2, HIDDEN), None),
    "beside (2, 5, H)": (lambda: Stacked(beside=True), (5, INPUTS), (2, 5, HIDDEN), 1),
    "beside (2, 2, H)": (lambda: Stacked(beside=True), (2, INPUTS), (2, 2, HIDDEN), 1),
    "heads (5, 2, d)": (lambda: Heads(together=True), (5, INPUTS), (5, 2, HIDDEN), 0),
    "heads (2, 2, d)": (lambda: Heads(together=True), (2, INPUTS), (2, 2, HIDDEN), 0),
    "heads apart (2, 2, d)": (lambda: Heads(together=False), (2, INPUTS), (2, 2, HIDDEN), 0),
    "heads (1, 2, d)": (lambda: Heads(together=True), (1, INPUTS), (1, 2, HIDDEN), 0),
    "images": (Images, (2, 1, 3, 3), (2, 2, 3, 3), 0),
    "no batch": (Own, (INPUTS,), (HIDDEN,), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_batch_is_the_axis_that_the_input_shares(name: str) -> None:
    make, inputs, shape, axis = SHAPES[name]
    torch.manual_seed(0)
    cell, x = make(), torch.randn(STEPS, *inputs).double()
    start, kept = torch.randn(shape).double().requires_grad_(), []
    with gradflow.record(cell) as recording:
        h, loss = start, torch.zeros(())
        for x_t in x:
            found = cell(x_t, h)
            h = found[1] if isinstance(found, tuple) else found
            h.retain_grad()
            kept.append(h)
            loss = loss + h.pow(2).sum()
        loss.backward(retain_graph=True)
    (track,) = recording.values()
    batch = 1 if axis is None else shape[axis]
    assert (track.batch, track.hidden) == (batch, start.numel() // batch)
    assert not track.notes
    for b in range(batch):
        ones = [h if axis is None else h.select(axis, b) for h in kept]
        grads = [h.grad if axis is None else h.grad.select(axis, b) for h in kept]
        compare.assert_whole_close(track.h[:, b], torch.stack(ones).flatten(1))
        compare.assert_whole_close(track.grad_h[:, b], torch.stack(grads).flatten(1))
        whole = torch.stack(
            [
                g.flatten() if axis is None else g.select(axis, b).flatten()
                for u in ones[-1].flatten()
                for g in torch.autograd.grad(u, start, retain_graph=True)
            ]
        )
        compare.assert_whole_close(product_of(track, b), whole)


# ----------------------------------------------------------------------- states that come out of one tensor


class Two(nn.Module):
    """Two cells, one above the other, whose states lie in one tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = Own(), Own(HIDDEN), how

    def forward(self, x: Tensor) -> Tensor:
        if "buffer" in self.how:
            return self.in_a_buffer(x)
        state = x.new_zeros(2, x.shape[1], HIDDEN)
        for x_t in x:
            p, q = TAKEN[self.how](state)
            p = self.a(x_t, p)
            q = self.b(p, q)
            state = torch.cat([p, q], 1) if self.how == "cat" else torch.stack([p, q])
        return q

    def in_a_buffer(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x) + 1, 2, x.shape[1], HIDDEN)
        if self.how == "a buffer each":
            above = h[:, 1].clone()
        for t, x_t in enumerate(x):
            h[t + 1, 0] = self.a(x_t, h[t, 0])
            if self.how == "a buffer each":
                above[t + 1] = self.b(h[t + 1, 0], above[t])
            else:
                h[t + 1, 1] = self.b(h[t + 1, 0], h[t, 1])
        return above[-1] if self.how == "a buffer each" else h[-1, 1]


TAKEN: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "index": lambda s: (s[0], s[1]),
    "unbind": lambda s: s.unbind(0),
    "split": lambda s: tuple(part[0] for part in s.split(1)),
    "chunk": lambda s: tuple(part.squeeze(0) for part in s.chunk(2)),
    "iterate": tuple,
    "select": lambda s: (s.select(0, 0), s.narrow(0, 1, 1).squeeze(0)),
    "cat": lambda s: (s[0], s[1]) if s.dim() == 3 else (s[:, :HIDDEN], s[:, HIDDEN:]),
}


@pytest.mark.parametrize("how", [*TAKEN, "a buffer", "a buffer each"])
def test_states_out_of_one_tensor_are_told_apart(how: str) -> None:
    """The same numbers however they are indexed."""
    torch.manual_seed(0)
    model, x = Two(how), torch.randn(STEPS, 3, INPUTS).double()
    with gradflow.record(model) as recording:
        model(x).pow(2).sum().backward()
    with gradflow.record(model) as plain:
        p = q = torch.zeros(3, HIDDEN).double()
        for x_t in x:
            p = model.a(x_t, p)
            q = model.b(p, q)
        q.pow(2).sum().backward()
    assert len(plain) == 2
    for mine, theirs in zip(recording.values(), plain.values(), strict=True):
        assert mine.has_direct
        assert not mine.notes
        for name in ("grad_h", "grad_h_direct", "grad_h_last"):
            compare.assert_steps_close(getattr(mine, name), getattr(theirs, name), mine.mask)
        compare.assert_jacobians_close(step_jacobians(mine), step_jacobians(theirs), mine.mask)


# --------------------------------------------------------------------------------------- a batch that shrinks

LENGTHS = [6, 5, 5, 2]


def shrink(
    step: Callable[[Tensor, Tensor], Tensor], x: Tensor, h: Tensor, how: str
) -> tuple[list[Tensor], list[list[int]], dict[int, Tensor]]:
    """h of every step, which sequences they are, and the last h of each sequence."""
    kept, orders, ends, order = [], [], {}, list(range(len(LENGTHS)))
    for t in range(STEPS):
        now = [b for b in order if LENGTHS[b] > t]
        if how == "index" and t:
            now = now[::-1]
        at = torch.tensor([order.index(b) for b in now])
        if how == "index":
            h = h[at]
        elif how == "boolean":
            h = h[torch.tensor([b in now for b in order])]
        else:
            h = h[: len(now)]
        h = step(x[t, now], h)
        h.retain_grad()
        kept.append(h)
        orders.append(now)
        ends |= {b: h[place] for place, b in enumerate(now) if LENGTHS[b] == t + 1}
        order = now
    return kept, orders, ends


@pytest.mark.parametrize("how", ["slice", "index", "boolean"])
@pytest.mark.parametrize("marked", ["cell", "tap"])
def test_a_shrinking_batch_is_one_loop(marked: str, how: str) -> None:
    torch.manual_seed(0)
    cell, x = Own(), torch.randn(STEPS, 4, INPUTS).double()
    start = torch.randn(4, HIDDEN).double().requires_grad_()

    def step(x_t: Tensor, h: Tensor) -> Tensor:
        if marked == "cell":
            return cell(x_t, h)
        return gradflow.tap(h=torch.tanh(cell.f(torch.cat([x_t, h], 1))))

    with gradflow.record(cell) as recording:
        first = gradflow.tap(h=start) if marked == "tap" else start
        kept, orders, ends = shrink(step, x, first, how)
        loss = sum(end.pow(2).sum() for end in ends.values()) + kept[2].sum()
        loss.backward(retain_graph=True)
    (track,) = recording.values()
    more = int(marked == "tap")
    assert track.lengths.tolist() == [length + more for length in LENGTHS]
    assert not track.cuts.any()
    for t, (h, order) in enumerate(zip(kept, orders, strict=True)):
        compare.assert_whole_close(track.h[t + more, order], h)
        compare.assert_whole_close(track.grad_h[t + more, order], h.grad)
        assert bool(torch.isnan(track.grad_h[t + more]).any(1).sum() == 4 - len(order))
    for b, end in ends.items():
        whole = torch.stack([torch.autograd.grad(u, start, retain_graph=True)[0][b] for u in end])
        compare.assert_whole_close(product_of(track, b), whole)
    arrives = track.reached
    assert [arrives[:, b].nonzero().flatten().tolist() for b in range(4)] == [
        sorted({2 + more, LENGTHS[b] - 1 + more} - ({2 + more} if LENGTHS[b] < 3 else set()))
        for b in range(4)
    ]


def test_dropped_and_joined_episodes_of_a_cell() -> None:
    """A sequence that joins begins at index 0; what leads into its first step is not measured."""
    torch.manual_seed(0)
    cell, x = Own(), torch.randn(5, 3, INPUTS).double()
    with gradflow.record(cell) as recording:
        h = cell(x[0, :2], torch.zeros(2, HIDDEN).double())
        h = cell(x[1, :2], h)
        h = cell(x[2], torch.cat([h, torch.zeros(1, HIDDEN).double()]))
        h = cell(x[3, 1:], h[1:])
        h.sum().backward()
    (track,) = recording.values()
    assert track.lengths.tolist() == [3, 4, 2]
    assert bool((track.grad_h[track.mask] != 0).any())
    assert torch.equal(track.h[1, 2], h[1].detach())
    assert not track.cuts.any()


def test_detached_and_shrunk() -> None:
    torch.manual_seed(0)
    cell, x = Own(), torch.randn(4, 3, INPUTS).double()
    with gradflow.record(cell) as recording:
        h, loss = torch.zeros(3, HIDDEN).double(), torch.zeros(())
        for t, order in enumerate([[0, 1, 2], [2, 1, 0], [0, 1], [1]]):
            h = cell(x[t, : len(order)], h.detach()[order])
            loss = loss + h.sum()
        loss.backward()
    (track,) = recording.values()
    assert track.lengths.tolist() in ([2, 4, 3], [3, 4, 2])
    assert bool(track.cuts[1:][track.mask[1:]].all())


def zoneout(shape: tuple[int, ...], cell: nn.Module, order: list[int] | None) -> Track:
    x, h = torch.randn(STEPS, 3, INPUTS).double(), torch.randn(shape).double().requires_grad_()
    with gradflow.record(cell) as recording:
        for x_t in x:
            found = cell(x_t, h)
            new = found[1] if isinstance(found, tuple) else found
            h = 0.7 * new + 0.3 * h
            h = h if order is None else h[order]
        new.sum().backward()
    (track,) = recording.values()
    return track


def test_zoneout_of_a_batch_that_is_put_in_another_order_is_refused() -> None:
    torch.manual_seed(0)
    assert "another order" in zoneout((3, HIDDEN), Own(), [1, 2, 0]).notes[0]


def test_zoneout_of_layers_in_front() -> None:
    torch.manual_seed(0)
    track = zoneout((2, 3, HIDDEN), Stacked(beside=False), None)
    assert "another order" not in track.notes[0]
    jacobians = step_jacobians(track)
    assert jacobians.shape == (STEPS, 3, 2 * HIDDEN, 2 * HIDDEN)
    assert bool((jacobians[:-1, :, :HIDDEN, HIDDEN:] == 0).all())  # nothing goes down a layer
    assert bool((jacobians[:, :, HIDDEN:, :HIDDEN] != 0).all())
