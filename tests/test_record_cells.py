"""Loops over nn.LSTMCell, nn.GRUCell and nn.RNNCell, against autograd on the user's own graph."""

# ruff: noqa: PT031, SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import compare
import loops
import pytest
import torch
from loops import CELLS, Run, State
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.errors import GradflowWarning, InputError, RecordingError
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 7, 3
every_cell = pytest.mark.parametrize("kind", CELLS)


def data(steps: int = STEPS, batch: int = BATCH, width: int = loops.INPUTS) -> Tensor:
    return torch.randn(steps, batch, width, dtype=torch.float64)


def check_totals(track: Track, found: Run) -> None:
    """States and total gradients at every step."""
    mask = torch.ones(len(found.returned), track.batch, dtype=torch.bool)
    assert torch.equal(track.mask, mask)
    assert track.lengths.tolist() == [len(found.returned)] * track.batch
    for place, name in enumerate(track.states):
        compare.assert_steps_close(track.states[name], found.values(place), mask, what=name)
        total = found.grad("returned", place)
        compare.assert_steps_close(track.grads[name], total, mask, what=f"grad_{name}")


def check_direct(track: Track, found: Run) -> None:
    direct = found.grad("read", 0)
    compare.assert_steps_close(track.grad_h_direct, direct, track.mask, what="grad_h_direct")


def check_last(track: Track, found: Run) -> None:
    reached = torch.zeros(track.mask.shape, dtype=torch.bool)
    for place in range(len(track.states)):
        reached |= (found.grad("read", place) != 0).any(2)
    steps = torch.where(reached, torch.arange(track.steps)[:, None], -1).amax(0)
    assert track.last_grads is not None
    for place, name in enumerate(track.states):
        want = found.last(steps, place)
        compare.assert_steps_close(track.last_grads[name], want, track.mask, what=f"last {name}")


def check_weights(track: Track, module: nn.Module, suffix: str = "") -> None:
    """Parameter gradients rebuilt from what was recorded."""
    assert track.parity.status == "passed", track.parity
    before = torch.cat([track.h0[None], track.h[:-1]])
    pairs = {"weight_ih": (track.delta, track.inputs), "weight_hh": (track.delta_hh, before)}
    for name, (delta, vectors) in pairs.items():
        rebuilt = torch.einsum("tbg,tbi->gi", delta, vectors)
        compare.assert_whole_close(rebuilt, getattr(module, name + suffix).grad, what=name)


def check_operator(track: Track, dense: list[Tensor]) -> None:
    """push and pull at every step, for all sequences and for chosen ones."""
    want = torch.stack(dense)
    for chosen in (None, torch.tensor([track.batch - 1, 0])):
        operator = track.operator(torch.float64, chosen)
        picked = want if chosen is None else want[:, chosen]
        size, batch = picked.shape[-1], picked.shape[1]
        assert (operator.length, operator.batch, operator.size) == (len(dense), batch, size)
        eye = torch.eye(size, dtype=torch.float64).expand(batch, size, size)
        pushed = torch.stack([operator.push(t, eye).transpose(1, 2) for t in range(len(dense))])
        pulled = torch.stack([operator.pull(t, eye) for t in range(len(dense))])
        mask = torch.ones(len(dense), batch, dtype=torch.bool)
        compare.assert_steps_close(pushed, picked, mask, what="push")
        compare.assert_steps_close(pulled, picked, mask, what="pull")


def zeros_like_state(state: State) -> State:
    return tuple(torch.zeros_like(s) for s in state)


def dense_steps(cell: nn.Module, x: Tensor, found: Run) -> list[Tensor]:
    """∂(returned)/∂(what the call began with) at every step."""
    dense = []
    for t, began in enumerate(found.began):
        start = zeros_like_state(found.returned[0]) if began is None else began
        dense.append(loops.dense_step(cell, x[t], start))
    return dense


# ------------------------------------------------------------------------------ the plain loop


@every_cell
@pytest.mark.parametrize("steps", [None, [STEPS - 1], [3], [0, 4]], ids=str)
def test_every_number_of_a_plain_loop(kind: str, steps: list[int] | None) -> None:
    cell, x = loops.cell_of(kind), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x)
        loops.loss_of(found, steps).backward(retain_graph=True)
    assert list(recording.tracks) == ["cell"]
    track = recording["cell"]
    assert (track.cell, track.backwards, track.reverse) == (kind, 1, False)
    assert torch.equal(track.inputs, x)
    assert not track.cuts.any()
    check_totals(track, found)
    check_direct(track, found)
    check_last(track, found)
    check_weights(track, cell)
    check_operator(track, dense_steps(cell, x, found))


def test_a_loss_that_reads_the_cell_state() -> None:
    cell, x = loops.cell_of("LSTM"), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x)
        loops.loss_of(found, [2, 5], with_c=True).backward(retain_graph=True)
    track = recording["cell"]
    check_totals(track, found)
    check_direct(track, found)
    check_last(track, found)
    check_weights(track, cell)


@every_cell
def test_no_bias_and_a_given_initial_state(kind: str) -> None:
    cell, x = loops.cell_of(kind, bias=False), data()
    count = 2 if kind == "LSTM" else 1
    start = tuple(
        torch.randn(BATCH, loops.HIDDEN, dtype=torch.float64).requires_grad_() for _ in range(count)
    )
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, start=start)
        loops.loss_of(found).backward(retain_graph=True)
    track = recording["cell"]
    assert torch.equal(track.h0, start[0].detach())
    assert set(track.weights) == {"weight_ih", "weight_hh"}
    check_totals(track, found)
    check_direct(track, found)
    check_weights(track, cell)


@every_cell
def test_unbatched(kind: str) -> None:
    cell, x = loops.cell_of(kind), data(batch=1)
    with gradflow.record(cell) as recording:
        state, kept = None, []
        for x_t in x:
            state = cell(x_t[0], state)
            kept.append(state[0] if kind == "LSTM" else state)
            kept[-1].retain_grad()
        torch.stack(kept).pow(2).sum().backward()
    track = recording["cell"]
    assert (track.steps, track.batch) == (STEPS, 1)
    assert not track.cuts.any()
    total = torch.stack([h.grad for h in kept])[:, None]
    compare.assert_steps_close(track.grad_h, total, track.mask, what="grad_h")
    assert track.parity.status == "passed"


@every_cell
def test_gates_are_those_of_pytorchs_equations(kind: str) -> None:
    cell, x = loops.cell_of(kind), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x)
        loops.loss_of(found).backward()
    track = recording["cell"]
    before = torch.cat([track.h0[None], track.h[:-1]])
    a = F.linear(x, cell.weight_ih, cell.bias_ih).detach()
    u = F.linear(before, cell.weight_hh, cell.bias_hh).detach()
    if kind == "LSTM":
        i, f, g, o = (a + u).chunk(4, 2)
        want = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    elif kind == "GRU":
        (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, 2), u.chunk(3, 2)
        r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
        want = {"r": r, "z": z, "n": (a_n + r * u_n).tanh()}
    else:
        want = {}
    assert set(track.gates) == set(want)
    for name, gate in want.items():
        compare.assert_steps_close(track.gates[name], gate, track.mask, what=name)


@every_cell
def test_functions_called_without_a_module(kind: str) -> None:
    """``torch.lstm_cell`` with a model's own weights."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = loops.cell_of(kind)

        def forward(self, x: Tensor, state: object) -> object:
            inner = self.inner
            name = {"LSTM": "lstm", "GRU": "gru"}.get(kind, kind.lower())
            weights = (inner.weight_ih, inner.weight_hh, inner.bias_ih, inner.bias_hh)
            if state is None:
                zeros = torch.zeros(x.shape[0], loops.HIDDEN, dtype=x.dtype)
                state = (zeros, zeros) if kind == "LSTM" else zeros
            return getattr(torch, f"{name}_cell")(x, state, *weights)

    model, x = Own(), data()
    with gradflow.record(model) as recording:
        found = loops.run(model, x)
        loops.loss_of(found).backward(retain_graph=True)
    assert list(recording.tracks) == ["inner"]
    check_totals(recording["inner"], found)
    check_direct(recording["inner"], found)


# --------------------------------------------------------------------------- several cells, loops


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm1 = nn.LSTMCell(3, 4, dtype=torch.float64)
        self.gru2 = nn.GRUCell(4, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        first, second, kept = None, None, []
        for x_t in x:
            first = self.lstm1(x_t, first)
            second = self.gru2(first[0], second)
            kept.append((*first, second))
        return kept


def test_stacked_cells_in_one_loop() -> None:
    model, x = Stacked(), data()
    with gradflow.record(model) as recording:
        kept = model(x)
        for tensor in [t for row in kept for t in row]:
            tensor.retain_grad()
        (kept[-1][2] ** 2).sum().backward()
    assert list(recording.tracks) == ["lstm1", "gru2"]
    h, c, upper = (torch.stack([row[i].grad for row in kept]) for i in range(3))
    lower, track = recording["lstm1"], recording["gru2"]
    compare.assert_steps_close(lower.grad_h, h, lower.mask, what="lstm1 h")
    compare.assert_steps_close(lower.grad_c, c, lower.mask, what="lstm1 c")
    compare.assert_steps_close(track.grad_h, upper, track.mask, what="gru2 h")
    assert [t.parity.status for t in recording.values()] == ["passed", "passed"]
    assert track.grad_h_direct[:-1].count_nonzero() == 0  # exact, not rounding
    from_above = track.delta @ model.gru2.weight_ih.detach()
    compare.assert_steps_close(lower.grad_h_direct, from_above, lower.mask, what="from above")


def test_a_shared_encoder_of_stacked_cells() -> None:
    """Siamese: two loops over the same cells in one forward are told apart, and share their parity."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Stacked()
            self.judge = nn.GRU(5, 2, dtype=torch.float64)

        def forward(self, x: Tensor, y: Tensor) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
            return [self.encoder(x), self.encoder(y)]

    model = Siamese()
    with gradflow.record(model) as recording:
        pair = model(data(), data(5))
        for tensor in [t for kept in pair for row in kept for t in row]:
            tensor.retain_grad()
        ends = torch.stack([kept[-1][2] for kept in pair])
        model.judge(ends)[0].pow(2).sum().backward()
    names = ["encoder.lstm1", "encoder.gru2", "encoder.lstm1@2", "encoder.gru2@2", "judge.l0"]
    assert list(recording.tracks) == names
    for kept, end in zip(pair, ("", "@2"), strict=True):
        for place, name in enumerate(("lstm1", "lstm1", "gru2")):
            track = recording[f"encoder.{name}{end}"]
            total = torch.stack([row[place].grad for row in kept])
            found = track.grads["c" if place == 1 else "h"]
            compare.assert_steps_close(found, total, track.mask, what=track.name)
    assert [track.parity.status for track in recording.values()] == ["passed"] * 5


def test_two_loops_one_after_the_other_and_interleaved() -> None:
    cell, x = loops.cell_of("GRU"), data()
    with gradflow.record(cell) as recording:
        one = loops.run(cell, x)
        two = loops.run(cell, x[:4] * 2)
        (loops.loss_of(one) + loops.loss_of(two)).backward(retain_graph=True)
    assert [(t.name, t.steps) for t in recording.values()] == [("cell", 7), ("cell@2", 4)]
    for track, found in zip(recording.values(), (one, two), strict=True):
        check_totals(track, found)
        check_direct(track, found)
        assert track.parity.status == "passed"
    with gradflow.record(cell) as recording:
        a, b, kept_a, kept_b = None, None, [], []
        for x_t in x:
            a, b = cell(x_t, a), cell(-x_t, b)
            kept_a.append(a)
            kept_b.append(b)
        (a * b).sum().backward()
    assert [(t.name, t.steps) for t in recording.values()] == [("cell", 7), ("cell@2", 7)]
    assert torch.equal(recording["cell"].h, torch.stack(kept_a).detach())
    assert torch.equal(recording["cell@2"].h, torch.stack(kept_b).detach())


def test_the_same_input_twice_is_not_one_loop() -> None:
    cell, x = loops.cell_of("LSTM"), data()
    with gradflow.record(cell) as recording:
        for _ in range(3):
            loops.loss_of(loops.run(cell, x)).backward()
    assert [t.name for t in recording.values()] == ["cell", "cell@2", "cell@3"]
    assert [t.backwards for t in recording.values()] == [1, 1, 1]
    assert [t.parity.status for t in recording.values()] == ["passed"] * 3


def test_a_state_of_zeros_that_came_back_is_a_link_and_fresh_zeros_are_none() -> None:
    cell, x = loops.cell_of("RNN_RELU", bias=False), torch.zeros(4, 2, 3, dtype=torch.float64)
    with gradflow.record(cell) as recording:
        h = None
        for x_t in x:
            h = cell(x_t, h)
        h.sum().backward()
    assert [t.steps for t in recording.values()] == [4]
    with pytest.warns(GradflowWarning, match="called once"), gradflow.record(cell) as recording:
        cell(x[0]).sum().backward()
        loops.run(cell, x[:2]).returned[-1][0].sum().backward()
    assert [t.steps for t in recording.values()] == [1, 2]


# ---------------------------------------------------------------------------- between two steps


def masked(t: int, state: State, _: State) -> State:
    """Done masks: the second sequence starts again at step 3, the third at 5."""
    mask = torch.ones(BATCH, 1, dtype=torch.float64)
    if t == 3:
        mask[1] = 0.0
    if t == 5:
        mask[2] = 0.0
    return tuple(s * mask for s in state)


def masked_by_where(t: int, state: State, _: State) -> State:
    done = torch.tensor([False, t == 3, t == 5]).unsqueeze(1)
    return tuple(torch.where(done, torch.zeros_like(s), s) for s in state)


def masked_in_place(t: int, state: State, _: State) -> State:
    kept = tuple(s.clone() for s in state)
    for s in kept:
        if t == 3:
            s[1] = 0.0
        if t == 5:
            s[torch.tensor([False, False, True])] = 0.0
    return kept


def scaled(t: int, state: State, _: State) -> State:
    return tuple(s * 0.9 + 0.1 for s in state)


def clamped(t: int, state: State, _: State) -> State:
    return (state[0].clamp(-0.2, 0.2), *state[1:])


def dropped(t: int, state: State, _: State) -> State:
    generator = torch.Generator().manual_seed(t)
    keep = torch.rand(state[0].shape, generator=generator, dtype=torch.float64) > 0.4
    return (state[0] * keep / 0.6, *state[1:])


def swapped(t: int, state: State, _: State) -> State:
    """Not elementwise: the units change places and mix, across h and c too."""
    h = state[0].flip(1) + 0.3 * state[-1]
    return (h, *(s.roll(1, dims=1) for s in state[1:]))


BETWEEN = [masked, masked_by_where, masked_in_place, scaled, clamped, dropped, swapped]


@every_cell
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_what_happens_between_two_steps_is_part_of_it(kind: str, between: loops.Between) -> None:
    cell, x = loops.cell_of(kind), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, between)
        loops.loss_of(found, [2, 6]).backward(retain_graph=True)
    assert list(recording.tracks) == ["cell"]
    track = recording["cell"]
    check_totals(track, found)
    check_direct(track, found)
    check_last(track, found)
    assert track.parity.status == "passed"
    dense, cuts = dense_steps(cell, x, found), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    for t in range(1, STEPS):
        link = loops.dense_map(lambda *s, t=t: between(t, s, s), found.returned[t - 1])
        dense[t] = dense[t] @ link
        cuts[t] = (link == 0).all((1, 2))
    check_operator(track, dense)
    assert torch.equal(track.cuts, cuts)
    if between in (masked, masked_by_where, masked_in_place):
        assert cuts.nonzero().tolist() == [[3, 1], [5, 2]]


@every_cell
@pytest.mark.parametrize("how", ["detach", "data", "clone", "in place"])
def test_truncated_backpropagation(kind: str, how: str) -> None:
    """Detached every three steps: one track, cut there, nothing comes back."""

    def between(t: int, state: State, _: State) -> State:
        if t % 3:
            return state
        if how == "in place":
            return tuple(s.detach_() for s in state)
        ways = {
            "detach": lambda s: s.detach(),
            "data": lambda s: s.data,
            "clone": lambda s: s.detach().clone(),
        }
        return tuple(ways[how](s) for s in state)

    cell, x = loops.cell_of(kind), data()
    with gradflow.record(cell) as recording:
        if how == "in place":  # a detached tensor keeps no gradient: its copies tell
            plain = loops.run(cell, x, lambda t, s, _: s if t % 3 else tuple(p.detach() for p in s))
        found = loops.run(cell, x, between)
        loops.loss_of(found).backward(retain_graph=True)
        if how == "in place":
            loops.loss_of(plain).backward(retain_graph=True)
    track = list(recording.values())[-1]
    want = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    want[3] = want[6] = True
    assert torch.equal(track.cuts, want)
    oracle = plain if how == "in place" else found
    check_totals(track, oracle)
    check_direct(track, oracle)
    check_last(track, oracle)
    check_weights(track, cell) if len(recording) == 1 else None
    dense = dense_steps(cell, x, found)
    dense[3], dense[6] = torch.zeros_like(dense[3]), torch.zeros_like(dense[6])
    check_operator(track, dense)


@every_cell
def test_a_backward_per_chunk(kind: str) -> None:
    cell, x = loops.cell_of(kind), data(9)
    chunks, state = [], None
    with gradflow.record(cell) as recording:
        for number in range(3):
            found = loops.run(cell, x[3 * number : 3 * number + 3], start=state)
            loops.loss_of(found).backward(retain_graph=True)
            chunks.append(found)
            state = tuple(s.detach() for s in found.returned[-1])
    assert list(recording.tracks) == ["cell"]
    track = recording["cell"]
    assert track.backwards == 3
    together = Run(
        [s for c in chunks for s in c.returned],
        [s for c in chunks for s in c.began],
        [s for c in chunks for s in c.read],
    )
    check_totals(track, together)
    check_direct(track, together)
    check_weights(track, cell)
    assert track.cuts.all(1).nonzero().flatten().tolist() == [3, 6]


@every_cell
def test_zoneout_between_steps(kind: str) -> None:
    """Units that keep their old state go around the cell: the entering states compose."""
    torch.manual_seed(3)
    keep = (torch.rand(STEPS, BATCH, loops.HIDDEN) < 0.5).double() * 0.8

    def between(t: int, state: State, before: State) -> State:
        mixed = [(1 - keep[t]) * s + keep[t] * b for s, b in zip(state, before, strict=True)]
        return tuple(mixed)

    cell, x = loops.cell_of(kind), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, between)
        loops.loss_of(found).backward(retain_graph=True)
    track = recording["cell"]
    check_totals(track, found)
    check_direct(track, found)
    assert track.parity.status == "passed"
    operator = track.operator()
    eye = torch.eye(operator.size, dtype=torch.float64).expand(BATCH, -1, -1)
    for t in range(1, STEPS):  # step 0 began with constants
        began = found.began[t]

        def advance(*s: Tensor, t: int = t) -> State:
            returned = loops.as_state(cell(x[t], loops.as_argument(s)))
            return between(t + 1, returned, s) if t + 1 < STEPS else returned

        dense = loops.dense_map(advance, began)
        compare.assert_whole_close(operator.push(t, eye).transpose(1, 2), dense, what=f"step {t}")
        compare.assert_whole_close(operator.pull(t, eye), dense, what=f"step {t}")


def test_only_the_way_through_h_is_cut() -> None:
    """h-detach: the path through c stays open, so this is no cut."""
    cell, x = loops.cell_of("LSTM"), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, lambda t, s, _: (s[0].detach(), s[1]))
        loops.loss_of(found, [6]).backward(retain_graph=True)
    track = recording["cell"]
    assert not track.cuts.any()
    check_totals(track, found)
    check_direct(track, found)
    check_last(track, found)
    dense = dense_steps(cell, x, found)
    for t in range(1, STEPS):
        dense[t] = dense[t].clone()
        dense[t][:, :, : loops.HIDDEN] = 0.0
    check_operator(track, dense)


def test_mixed_sequences_are_refused_in_words() -> None:
    """A beam search: totals are exact, step Jacobians of one sequence there are none."""
    cell, x = loops.cell_of("GRU"), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, lambda t, s, _: (s[0][torch.tensor([1, 0, 1])],))
        loops.loss_of(found).backward(retain_graph=True)
    track = recording["cell"]
    check_totals(track, found)
    with pytest.raises(RecordingError, match=r"sequences or layers are mixed.*carry the state"):
        track.operator()
    assert track.grad_h_last is None


def test_users_hooks_do_not_run_in_the_forward_pass() -> None:
    """The piece of graph between two steps is read without running anybody's hook."""
    cell, x, calls = loops.cell_of("GRU"), data(), []

    def between(t: int, state: State, _: State) -> State:
        masked = state[0] * 0.9
        masked.register_hook(lambda grad: calls.append(t))
        return (masked,)

    with gradflow.record(cell):
        found = loops.run(cell, x, between)
        assert calls == []
        loops.loss_of(found).backward()
    assert calls == [6, 5, 4, 3, 2, 1]


class OneKernel(torch.autograd.Function):
    """An LSTM cell that returns h and c from one node, as on a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> State:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, h, c, *weights)
        return PLAIN_CELL(x, (h, c), *weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> State:  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            returned = PLAIN_CELL(given[0], (given[1], given[2]), *given[3:])
            return torch.autograd.grad(returned, given, grads)


PLAIN_CELL = torch._VF.lstm_cell


@pytest.mark.parametrize("steps", [None, [STEPS - 1], [3]], ids=str)
@pytest.mark.parametrize("with_c", [False, True])
def test_a_kernel_that_returns_h_and_c_together(
    steps: list[int] | None, with_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches its c is not the total: the way through h = o ⊙ tanh c lies inside the kernel."""
    cell, x = loops.cell_of("LSTM"), data()
    with gradflow.record(cell) as plain:
        loops.loss_of(loops.run(cell, x), steps, with_c).backward()
    cell.zero_grad()
    together = lambda x, hx, *weights: OneKernel.apply(x, *hx, *weights)  # noqa: E731
    monkeypatch.setitem(vars(torch._VF), "lstm_cell", together)
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x)
        loops.loss_of(found, steps, with_c).backward()
    assert found.returned[0][0].grad_fn is found.returned[0][1].grad_fn
    track, want = recording["cell"], plain["cell"]
    assert (track.grad_c[0] - found.returned[0][1].grad).abs().max() > 0  # what a hook shows
    for name in ("grad_h", "grad_c", "grad_h_direct", "grad_h_last", "grad_c_last", "delta"):
        compare.assert_steps_close(getattr(track, name), getattr(want, name), track.mask, what=name)
    check_weights(track, cell)


# ------------------------------------------------------------------- no gradient, accumulation


@every_cell
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_a_loop_without_gradient_is_one_track(kind: str, mode: type) -> None:
    cell, x = loops.cell_of(kind), data()

    def acting(t: int, state: State, _: State) -> State:
        return masked(t, state, state)

    with pytest.warns(GradflowWarning, match=r"no_grad"):
        with gradflow.record(cell) as recording, mode():
            found = loops.run(cell, x, acting)
    (track,) = recording.values()
    assert track.steps == STEPS
    assert not track.has_gradient
    want = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    want[3, 1] = want[5, 2] = True  # started afresh there; elsewhere the state went on
    assert torch.equal(track.cuts, want)
    compare.assert_steps_close(track.h, found.values(0).clone(), track.mask)
    dense = dense_steps(cell, x, found)
    dense[3][1] = dense[5][2] = 0.0
    check_operator(track, dense)


def test_burn_in_without_gradient_is_cut_off() -> None:
    cell, x = loops.cell_of("LSTM"), data()
    with gradflow.record(cell) as recording:
        with torch.no_grad():
            first = loops.run(cell, x[:3])
        second = loops.run(cell, x[3:], start=first.returned[-1])
        loops.loss_of(second).backward(retain_graph=True)
    (track,) = recording.values()
    assert track.cuts.all(1).nonzero().flatten().tolist() == [3]
    assert track.grad_h[:3].count_nonzero() == 0
    want = second.grad("returned", 0)
    compare.assert_steps_close(track.grad_h[3:], want, track.mask[3:])


def test_create_graph_withholds_the_totals() -> None:
    cell, x = loops.cell_of("LSTM"), data().requires_grad_()
    with pytest.warns(GradflowWarning, match="create_graph"):
        with gradflow.record(cell) as recording:
            found = loops.run(cell, x)
            torch.autograd.grad(loops.loss_of(found), x, create_graph=True)
    with pytest.raises(RecordingError, match="create_graph"):
        _ = recording["cell"].grad_h


# ------------------------------------------------------------------------------------- the rest


def test_lengths_of_a_padded_batch() -> None:
    cell, x, lengths = loops.cell_of("GRU"), data(), [7, 2, 4]
    with gradflow.record(cell, lengths=lengths) as recording:
        found = loops.run(cell, x)
        picked = torch.stack([found.read[n - 1][0][b] for b, n in enumerate(lengths)])
        picked.pow(2).sum().backward(retain_graph=True)
    track = recording["cell"]
    assert track.lengths.tolist() == lengths
    assert torch.equal(track.mask, torch.arange(7)[:, None] < torch.tensor(lengths))
    compare.assert_steps_close(track.grad_h, found.grad("returned", 0), track.mask)
    compare.assert_steps_close(track.h, found.values(0), track.mask)
    want = found.last(torch.tensor(lengths) - 1, 0)
    compare.assert_steps_close(track.grad_h_last, want, track.mask)
    ones = torch.ones(BATCH, 1, 4, dtype=torch.float64)
    assert track.operator().push(5, ones)[1:].count_nonzero() == 0
    assert track.parity.status == "passed"
    with pytest.raises(InputError, match="lengths must be 3 whole numbers"):
        with gradflow.record(cell, lengths=[7, 2]):
            cell(x[0])


def test_a_mask_in_place_on_what_the_cell_returned() -> None:
    """The tensor the next call is given is the very one that was returned, but no longer its value."""
    cell, x = loops.cell_of("GRU"), data()
    mask = torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64)
    with gradflow.record(cell) as recording:
        h = None
        for t, x_t in enumerate(x):
            h = cell(x_t, h)
            if t == 3:
                h.mul_(mask)
        h.pow(2).sum().backward()
    with gradflow.record(cell) as want:
        h = None
        for t, x_t in enumerate(x):
            h = cell(x_t, h)
            if t == 3:
                h = h * mask
        h.pow(2).sum().backward()
    track, other = recording["cell"], want["cell"]
    compare.assert_steps_close(track.grad_h, other.grad_h, track.mask)
    compare.assert_steps_close(track.h, other.h, track.mask)
    assert track.cuts.nonzero().tolist() == [[4, 2]]
    assert track.parity.status == "passed"


def test_the_worked_lstm_cell_of_the_lecture_notes() -> None:
    """Rows in the order (forget, input, output, cell) where PyTorch reads i, f, g, o."""
    rows = [[0, 100, 0, 10], [0, 100, 0, -10], [1, 0, 0, 0], [0, 0, 100, -10]]
    x = [[1, 0, 0, 1], [3, 1, 0, 1], [2, 0, 0, 1], [4, 1, 0, 1], [2, 0, 0, 1]]
    x += [[1, 0, 1, 1], [3, -1, 0, 1], [6, 1, 0, 1], [1, 0, 1, 1]]
    cell = nn.LSTMCell(4, 1, bias=False)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(rows, dtype=torch.float32))
        cell.weight_hh.zero_()
    with gradflow.record(cell) as recording:
        state, outputs = None, []
        for row in x:
            state = cell(torch.tensor([row], dtype=torch.float32), state)
            outputs.append(state[0])
        torch.cat(outputs).sum().backward()
    track = recording["cell"]
    assert [round(float(h)) for h in track.h] == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert float(track.h[5]) == pytest.approx(0.6420, abs=1e-4)
    assert float(track.gates["i"].min()) < 0.5 < float(track.gates["i"][0])  # the "forget" row
    assert float(track.gates["f"][0]) == pytest.approx(0.0, abs=1e-4)
    assert track.gates["f"].shape == (9, 1, 1)


def test_zoneout_and_changed_weights_are_noted() -> None:
    cell, x = loops.cell_of("GRU"), data(4)
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, lambda t, s, b: (0.5 * s[0] + 0.5 * b[0],))
        loops.loss_of(found).backward()
        with torch.no_grad():
            cell.weight_hh.mul_(2.0)
        start = (found.returned[-1][0].detach(),)
        loops.loss_of(loops.run(cell, x, start=start)).backward()
    (track,) = recording.values()
    assert any("zoneout" in note for note in track.notes)
    assert any("weights changed" in note for note in track.notes)
    assert track.grad_h_last is None


def test_layers_picks_cells_by_name() -> None:
    model, x = Stacked(), data()
    with gradflow.record(model, layers="gru*") as recording:
        model(x)[-1][2].sum().backward()
    assert list(recording.tracks) == ["gru2"]
    assert recording["gru2"].steps == STEPS


def test_a_cell_called_once() -> None:
    cell = loops.cell_of("LSTM")
    with pytest.warns(GradflowWarning, match=r"cell was called once, so no state came back.*loop"):
        with gradflow.record(cell) as recording:
            cell(data()[0])[0].sum().backward()
    assert recording["cell"].grad_h.shape == (1, BATCH, 4)


def test_a_cell_that_was_not_called() -> None:
    with pytest.warns(GradflowWarning, match=r"lstm1 \(LSTMCell\).*was not called"):
        with gradflow.record(Stacked()):
            pass


def test_many_fresh_starts_are_said_once() -> None:
    cell, x = loops.cell_of("GRU"), data(2)
    with pytest.warns(GradflowWarning) as said:
        with gradflow.record(cell):
            for _ in range(70):
                loops.run(cell, x).returned[-1][0].sum().backward()
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 1
    assert "cell started afresh 70 times" in texts[0]


def test_a_recording_can_be_read_while_the_loop_goes_on() -> None:
    cell, x = loops.cell_of("GRU"), data()
    with gradflow.record(cell) as recording:
        state = None
        for t, x_t in enumerate(x):
            state = cell(x_t, state)
            track = recording["cell"]
            assert track.h.shape == (t + 1, BATCH, 4)
            assert track.mask.shape == (t + 1, BATCH)
        state.sum().backward()
    assert track is recording["cell"]
    assert track.grad_h.shape == (STEPS, BATCH, 4)


def test_nothing_of_the_users_stays_alive() -> None:
    import gc
    import weakref

    cell, x = loops.cell_of("LSTM"), data()
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, masked)
        loss = loops.loss_of(found)
        loss.backward()
    references = [weakref.ref(t) for t in (cell, x, loss, found.returned[0][0])]
    del cell, x, loss, found
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert recording["cell"].grad_c.isfinite().all()
    track = weakref.ref(recording["cell"])
    del recording
    gc.collect()
    assert track() is None
