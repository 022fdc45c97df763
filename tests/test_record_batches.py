"""Batches that shrink, grow or are reordered between calls: one loop is one track.

The oracle is the same weights over the same sequences as one packed call, or autograd on the loop.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import compare
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS, HIDDEN, LENGTHS = 3, 4, [9, 7, 7, 4, 2]
State = tuple[Tensor, ...]
# the alive sequences of the step before -> the places of those that stay, in their new order
Keep = Callable[[list[int], list[int]], Tensor]


def first_ones(alive: list[int], now: list[int]) -> Tensor:
    return torch.arange(len(now))


def reordered(alive: list[int], now: list[int]) -> Tensor:
    return torch.tensor([alive.index(b) for b in reversed(now)])


def by_mask(alive: list[int], now: list[int]) -> Tensor:
    return torch.tensor([b in now for b in alive])


def joined(state: Tensor, chosen: Tensor) -> Tensor:
    """The kept rows one by one, put together again."""
    return torch.cat([state[int(place) : int(place) + 1] for place in chosen])


WAYS = {
    "sliced": (first_ones, lambda s, at: s[: len(at)]),
    "index_select": (reordered, lambda s, at: s.index_select(0, at)),
    "index": (reordered, lambda s, at: s[at]),
    "boolean": (by_mask, lambda s, at: s[at]),
    "cat": (reordered, joined),
}
CELLS = {
    "LSTM": (nn.LSTMCell, nn.LSTM, {}),
    "GRU": (nn.GRUCell, nn.GRU, {}),
    "tanh": (nn.RNNCell, nn.RNN, {}),
    "relu": (nn.RNNCell, nn.RNN, {"nonlinearity": "relu"}),
}


def whole_of(cell: nn.Module, kind: str) -> nn.RNNBase:
    _, fused, options = CELLS[kind]
    module = fused(INPUTS, HIDDEN, dtype=torch.float64, **options)
    for name, weight in cell.named_parameters():
        getattr(module, f"{name}_l0").data.copy_(weight.data)
    return module


def weights_of_loss() -> Tensor:
    return torch.randn(9, 5, HIDDEN, dtype=torch.float64)


def shrinking(step: Callable[[Tensor, State | None], State], x: Tensor, way: str) -> list[Tensor]:
    """(b, H) of every step, in the order of the sequences at the start: LENGTHS real steps each."""
    keep, take = WAYS[way]
    order, state, found = list(range(5)), None, []
    for t in range(max(LENGTHS)):
        now = [b for b in order if LENGTHS[b] > t]
        if state is not None:
            at = keep(order, now)
            state = tuple(take(part, at) for part in state)
            now = now[::-1] if keep is reordered else now
        state = step(x[t, now], state)
        order = now
        out = torch.zeros(5, HIDDEN, dtype=x.dtype)
        found.append(out.index_copy(0, torch.tensor(now), state[0]))
    return found


def as_cell(cell: nn.Module) -> Callable[[Tensor, State | None], State]:
    def step(x: Tensor, state: State | None) -> State:
        given = state if state is None or len(state) == 2 else state[0]
        found = cell(x, given)
        return found if isinstance(found, tuple) else (found,)

    return step


def as_fused(module: nn.RNNBase) -> Callable[[Tensor, State | None], State]:
    def step(x: Tensor, state: State | None) -> State:
        parts = None if state is None else tuple(part.unsqueeze(0) for part in state)
        given = parts if parts is None or len(parts) == 2 else parts[0]
        _, found = module(x.unsqueeze(0), given)
        return tuple(s[0] for s in (found if isinstance(found, tuple) else (found,)))

    return step


def packed(module: nn.RNNBase, x: Tensor, reads: Tensor) -> Track:
    with gradflow.record(module) as recording:
        output = pad_packed_sequence(module(pack_padded_sequence(x, torch.tensor(LENGTHS)))[0])[0]
        (output * reads).sum().backward()
    return recording["l0"]


def check_equal(mine: Track, theirs: Track) -> None:
    """All that is known of a track, but for NaN on padding."""
    assert mine.lengths.tolist() == theirs.lengths.tolist()
    assert torch.equal(mine.mask, theirs.mask)
    assert not mine.cuts.any()
    close = functools.partial(compare.assert_steps_close, mask=theirs.mask)
    for name, state in theirs.states.items():
        close(mine.states[name], state, what=name)
        close(mine.grads[name], theirs.grads[name], what=f"total of {name}")
        close(mine.last_grads[name], theirs.last_grads[name], what=f"last of {name}")
        close(mine.partial_grads[name], theirs.partial_grads[name], what=f"partial of {name}")
    close(mine.grad_h_direct, theirs.grad_h_direct, what="direct", bound=1e-9)
    close(step_jacobians(mine), step_jacobians(theirs), what="A")
    assert torch.equal(mine.reached, theirs.reached)


@pytest.mark.parametrize("fused", [False, True], ids=["cell", "fused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CELLS)
def test_a_shrinking_batch_is_that_of_the_packed_layer(kind: str, way: str, fused: bool) -> None:
    torch.manual_seed(0)
    make, _, options = CELLS[kind]
    cell = make(INPUTS, HIDDEN, dtype=torch.float64, **options)
    module, x, reads = whole_of(cell, kind), torch.randn(9, 5, INPUTS).double(), weights_of_loss()
    theirs = packed(whole_of(cell, kind), x, reads)
    model = module if fused else cell
    with gradflow.record(model) as recording:
        found = shrinking((as_fused if fused else as_cell)(model), x, way)
        (torch.stack(found) * reads).sum().backward()
    (mine,) = recording.values()
    check_equal(mine, theirs)
    assert mine.parity.status == "passed"
    lags = [track.contributions() for track in (mine, theirs)]
    for one, other in zip(lags[0].by_lag(), lags[1].by_lag(), strict=True):
        compare.assert_whole_close(one["weight_hh"].matrix(), other["weight_hh"].matrix())
    some = [track.loss_steps([3, 6], [3, 0]) for track in (mine, theirs)]
    for one, other in zip(some[0].grads["h"], some[1].grads["h"], strict=True):
        compare.assert_steps_close(one, other, theirs.mask[:, [3, 0]])


# ------------------------------------------------------------------- a packed call that is gone on with


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda s: s,
    "where": lambda s: torch.where(torch.zeros(1, 3, 1, dtype=torch.bool), torch.zeros_like(s), s),
    "mul": lambda s: s * torch.ones(1, 3, 1, dtype=s.dtype),
    "reordered": lambda s: s[:, [2, 0, 1]],
    "fewer": lambda s: s[:, [2, 1]],
}


@pytest.mark.parametrize("lengths", [[6, 4, 2], [4, 6, 2], [5, 5, 5]], ids=str)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("kind", "layers"), [("LSTM", 1), ("GRU", 2), ("tanh", 1)])
def test_a_packed_call_and_the_next_are_one_loop(
    kind: str, layers: int, between: str, lengths: list[int]
) -> None:
    """As one packed call over each sequence's own steps, one after the other."""
    torch.manual_seed(0)
    module = CELLS[kind][1](INPUTS, HIDDEN, layers, dtype=torch.float64)
    x, y = torch.randn(6, 3, INPUTS).double(), torch.randn(4, 3, INPUTS).double()
    reads = torch.randn(10, 3, HIDDEN).double()
    order = BETWEEN[between](torch.arange(3.0).view(1, 3, 1)).flatten().long().tolist()
    totals = [n + 4 * (b in order) for b, n in enumerate(lengths)]
    with gradflow.record(module) as recording:
        first = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        one, state = module(first)
        parts = state if isinstance(state, tuple) else (state,)
        parts = tuple(BETWEEN[between](part) for part in parts)
        two, _ = module(y[:, : len(order)], parts if len(parts) == 2 else parts[0])
        loss = (pad_packed_sequence(one, total_length=6)[0] * reads[:6]).sum()
        (loss + (two * reads[6:, : len(order)]).sum()).backward()
    data, weights = torch.zeros(10, 3, INPUTS).double(), torch.zeros(10, 3, HIDDEN).double()
    for b, n in enumerate(lengths):
        data[:n, b], weights[:n, b] = x[:n, b], reads[:n, b]
    for place, b in enumerate(order):
        n = lengths[b]
        data[n : n + 4, b], weights[n : n + 4, b] = y[:, place], reads[6:, place]
    with gradflow.record(module) as whole:
        packed_all = pack_padded_sequence(data, torch.tensor(totals), enforce_sorted=False)
        output = pad_packed_sequence(module(packed_all)[0])[0]
        (output * weights[: len(output)]).sum().backward()
    assert len(recording) == layers
    for mine, theirs in zip(recording.values(), whole.values(), strict=True):
        check_equal(mine, theirs)
        assert mine.parity.status == "passed"


# ------------------------------------------------------------------- a padded call that is gone on with


def _padded_and_packed(
    module: nn.RNNBase, given: bool, detached: bool = False
) -> tuple[gradflow.Recording, gradflow.Recording]:
    """Three calls; the state of every sequence's last real step goes on, not that of the padding."""
    x, y, z = (torch.randn(n, 3, INPUTS).double() for n in (6, 4, 5))
    reads = [torch.randn(n, 3, HIDDEN).double() for n in (6, 4, 5)]
    every = [[4, 6, 2], [4, 1, 3], [5, 5, 2] if given else [5, 5, 5]]
    some = iter(every)
    with gradflow.record(module, lengths=(lambda _: next(some)) if given else None) as mine:
        state, loss = None, 0.0
        for data, read, lengths in zip((x, y, z), reads, every, strict=True):
            data = data.transpose(0, 1) if module.batch_first else data
            output, _ = module(data, state)
            output = output.transpose(0, 1) if module.batch_first else output
            real = (torch.arange(len(output)).unsqueeze(1) < torch.tensor(lengths)).unsqueeze(2)
            loss = loss + (output * read * real).sum()
            state = output[torch.tensor(lengths) - 1, torch.arange(3)].unsqueeze(0)
            state = state.detach() if detached else state
        loss.backward()
    module.zero_grad()
    with gradflow.record(module) as theirs:
        state, loss = None, 0.0
        for data, read, lengths in zip((x, y, z), reads, every, strict=True):
            data = data.transpose(0, 1) if module.batch_first else data
            packed_data = pack_padded_sequence(
                data, torch.tensor(lengths), module.batch_first, enforce_sorted=False
            )
            output, state = module(packed_data, state)
            state = state.detach() if detached else state
            output = pad_packed_sequence(output)[0]
            loss = loss + (output * read[: len(output)]).sum()
        loss.backward()
    return mine, theirs


@pytest.mark.parametrize("given", [True, False], ids=["lengths", "plain"])
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "tanh"])
def test_a_padded_call_that_goes_on_from_its_real_steps_is_the_packed_one(
    kind: str, batch_first: bool, detached: bool, given: bool
) -> None:
    torch.manual_seed(0)
    module = CELLS[kind][1](INPUTS, HIDDEN, batch_first=batch_first, dtype=torch.float64)
    one, other = _padded_and_packed(module, given, detached)
    (mine,), (theirs,) = one.values(), other.values()
    assert mine.lengths.tolist() == [13, 12, 7] if given else [13, 12, 10]
    assert torch.equal(mine.cuts, theirs.cuts)
    mine.cuts = theirs.cuts = torch.zeros_like(theirs.cuts)  # `check_equal` wants none
    check_equal(mine, theirs)
    assert mine.parity.status == "passed"
    found, wanted = (gradflow.analyze(recording)["l0"] for recording in (one, other))
    assert found.verdict == wanted.verdict
    assert found.rate.value == pytest.approx(wanted.rate.value, rel=1e-9, abs=0)
    if not detached:
        changes = [gradflow.what_if(recording, scale_hh=0.9) for recording in (one, other)]
        numbers = [torch.tensor(f.select_dtypes("number").to_numpy(float)) for f in changes]
        assert torch.allclose(*numbers, rtol=1e-9, atol=0, equal_nan=True)


def test_a_state_that_goes_on_through_padding_counts_it_as_steps() -> None:
    """The oracle is autograd on the loop: the product of A_t is the last state by the first."""
    torch.manual_seed(0)
    gru, x = nn.GRU(INPUTS, HIDDEN).double(), torch.randn(2, 6, 2, INPUTS).double()
    start = torch.randn(1, 2, HIDDEN).double().requires_grad_()
    lengths = torch.tensor([6, 4])
    with gradflow.record(gru, lengths=lengths) as recording:
        _, state = gru(x[0], start)
        output, _ = gru(x[1], state)
        last = output[lengths - 1, torch.arange(2)]
        last.sum().backward(retain_graph=True)
    (track,) = recording.values()
    assert track.lengths.tolist() == [12, 10]
    assert any("goes on through the padding" in note for note in track.notes)
    for b, steps in enumerate([12, 10]):
        rows = [torch.autograd.grad(u, start, retain_graph=True)[0][0, b] for u in last[b]]
        compare.assert_whole_close(product_of(track, b, steps), torch.stack(rows))
        compare.assert_whole_close(
            track.grad_h[0, b] @ step_jacobians(track)[0, b], start.grad[0, b]
        )


def test_an_output_beside_the_last_cell_state_is_refused_in_words() -> None:
    lstm, lengths = nn.LSTM(INPUTS, HIDDEN), torch.tensor([4, 2])
    with gradflow.record(lstm) as recording:
        output, (_, c) = lstm(torch.randn(4, 2, INPUTS))
        h = output[lengths - 1, torch.arange(2)].unsqueeze(0)
        lstm(torch.randn(3, 2, INPUTS), (h, c))[0].sum().backward()
    (track,) = recording.values()
    assert "an output of one step beside the last state of another" in " ".join(track.notes)


def test_a_sequence_that_joins_later_begins_at_the_first_step() -> None:
    torch.manual_seed(0)
    cell, x = nn.LSTMCell(INPUTS, HIDDEN).double(), torch.randn(6, 3, INPUTS).double()
    reads = torch.randn(6, 3, HIDDEN).double()
    start = torch.randn(2, HIDDEN).double()
    with gradflow.record(cell) as recording:
        state, loss = (start[:1], start[:1]), 0.0
        for t in range(6):
            if t == 2:
                state = tuple(torch.cat([s, start[1:]]) for s in state)
            state = cell(x[t, : len(state[0])], state)
            loss = loss + (state[0] * reads[t, : len(state[0])]).sum()
        loss.backward()
    (mine,) = recording.values()
    assert mine.lengths.tolist() == [6, 4]
    data = torch.stack([x[:, 0], torch.cat([x[2:, 1], x[:2, 1]])], 1)
    weights = torch.stack([reads[:, 0], torch.cat([reads[2:, 1], reads[:2, 1]])], 1)
    module = whole_of(cell, "LSTM")
    with gradflow.record(module) as whole:
        given = pack_padded_sequence(data, torch.tensor([6, 4]))
        output = module(given, (start[None], start[None]))[0]
        (pad_packed_sequence(output)[0] * weights).sum().backward()
    check_equal(mine, whole["l0"])
    assert torch.equal(mine.h0, start)


def product_of(track: Track, b: int, steps: int) -> Tensor:
    """From the initial state to the last one."""
    found = torch.eye(step_jacobians(track).shape[-1]).double()
    for matrix in step_jacobians(track)[:steps, b]:
        found = matrix @ found
    return found


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("how", ["mixed units", "zoneout", "zoneout by unit", "other weights"])
def test_what_lies_between_goes_with_the_sequences(kind: str, how: str) -> None:
    """The product of A_t against autograd over the loop, and totals, for each sequence."""
    torch.manual_seed(0)
    cell = CELLS[kind][0](INPUTS, HIDDEN).double()
    mixing = torch.randn(HIDDEN, HIDDEN).double()
    x, lengths = torch.randn(6, 3, INPUTS).double(), [6, 4, 3]
    start = tuple(
        torch.randn(3, HIDDEN).double().requires_grad_() for _ in range(1 + (kind == "LSTM"))
    )
    with gradflow.record(cell) as recording:
        state, kept, ends = start, [], {}
        for t in range(6):
            n = sum(length > t for length in lengths)
            state = tuple(s[:n] for s in state)
            if how == "other weights" and t == 3:
                cell.weight_hh = nn.Parameter(cell.weight_hh.detach() * 0.5)
            new = cell(x[t, :n], state if len(state) == 2 else state[0])
            new = new if isinstance(new, tuple) else (new,)
            for s in new:
                s.retain_grad()
            kept.append(new)
            if how == "mixed units":
                new = (new[0] @ mixing, *new[1:])
            elif how.startswith("zoneout"):
                share = torch.rand(n, 1 if how == "zoneout" else HIDDEN).double()
                new = tuple(share * a + (1 - share) * b for a, b in zip(new, state, strict=True))
            state = new
            ends |= {b: state[0][b] for b in range(n) if lengths[b] == t + 1}
        loss = sum(end.pow(2).sum() for end in ends.values())
        loss.backward(retain_graph=True)
    (track,) = recording.values()
    assert track.lengths.tolist() == lengths
    assert track.cuts.sum() == 0
    for t, states in enumerate(kept):
        n = len(states[0])
        compare.assert_whole_close(track.grad_h[t, :n], states[0].grad)
    if how == "other weights":
        assert "weights changed" in " ".join(track.notes)
    for b, n in enumerate(lengths):
        rows = []
        for part in kept[n - 1]:
            for unit in range(HIDDEN):
                grads = torch.autograd.grad(part[b, unit], start, retain_graph=True)
                rows.append(torch.cat([grad[b] for grad in grads]))
        compare.assert_whole_close(product_of(track, b, n), torch.stack(rows))


def test_rows_that_are_mixed_or_repeated_begin_anew_or_are_refused() -> None:
    cell = nn.GRUCell(INPUTS, HIDDEN).double()
    x = torch.randn(3, 4, INPUTS).double()
    for mix in (lambda h: h[:3] + h[1:4], lambda h: h[[0, 0, 1]]):
        with gradflow.record(cell) as recording:
            h = cell(x[1], cell(x[0]))
            cell(x[2, :3], cell(x[1, :3], mix(h))).sum().backward()
        assert [t.lengths.tolist() for t in recording.values()] == [[2] * 4, [2] * 3]
    with gradflow.record(cell) as recording:
        h = cell(x[0])
        cell(x[1], h[[0, 0, 1, 2]]).sum().backward()
    assert "sequences or layers are mixed" in recording["cell"].notes[0]


@pytest.mark.parametrize("how", ["detach", "no_grad", "clone"])
def test_detached_rows_are_known_by_their_values(how: str) -> None:
    torch.manual_seed(0)
    cell, x = nn.LSTMCell(INPUTS, HIDDEN).double(), torch.randn(4, 4, INPUTS).double()
    expected = pytest.warns(GradflowWarning) if how == "no_grad" else contextlib.nullcontext()
    with expected, torch.set_grad_enabled(how != "no_grad"), gradflow.record(cell) as recording:
        state, loss = None, torch.zeros(())
        for t, order in enumerate([[0, 1, 2, 3], [3, 1, 0, 2], [0, 2, 1], [2, 1]]):
            if state is not None:
                state = tuple(s.detach()[order] for s in state)
            state = cell(x[t, : len(order)], state)
            loss = loss + state[0].sum()
        if how != "no_grad":
            loss.backward()
    (track,) = recording.values()
    # sequence 2 is dropped third, then 3; at the end stand 1 and 0
    assert track.lengths.tolist() == [4, 4, 2, 3]
    assert bool(track.cuts[1:][track.mask[1:]].all()) is (how != "no_grad")
