"""Wide steps: push and pull through the recorded step, never written out.

Oracle: the dense step Jacobians of the very same loop, recorded with ``jacobians=True``; small cells
are forced the wide way by lowering the width from which it is taken. All in float64.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from compare import assert_steps_close, assert_whole_close
from own_cells import BATCH, CELLS, INPUTS
from seam import Wide, cells
from torch import Tensor, nn
from wide_cells import WIDE, Convolutional, convolved

import gradflow
from gradflow.errors import RecordingError
from gradflow.hooks import marks, tape, wide
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
STEPS = 7
States = dict[str, Tensor]
Between = Callable[[int, States], States]


@pytest.fixture
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "JACOBIAN_WIDEST", 0)
    monkeypatch.setattr(wide, "WIDE_WRITING", -1.0)


def nothing(_: int, states: States) -> States:
    return states


def detached(t: int, states: States) -> States:
    return {n: s.detach() for n, s in states.items()} if t == 3 else states


def dropped(t: int, states: States) -> States:
    generator = torch.Generator().manual_seed(t)
    first, *rest = states
    keep = torch.rand(states[first].shape, generator=generator, dtype=F64) > 0.3
    return {first: states[first] * keep / 0.7} | {name: states[name] for name in rest}


def done(t: int, states: States) -> States:
    alive = torch.ones(BATCH, 1, dtype=F64)
    alive[t % BATCH] = float(t != 4)
    return {name: state * alive for name, state in states.items()}


def recorded(kind: str, between: Between, reads: tuple[int, ...], **options: object) -> Track:
    torch.manual_seed(0)
    case = CELLS[kind]
    module = case.make().double()
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=F64)
    state = {name: torch.randn_like(s) * 0.3 for name, s in case.initial().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    with gradflow.record(module, **options) as recording:  # type: ignore[arg-type]
        loss = torch.zeros((), dtype=F64)
        for t, x_t in enumerate(x):
            result = case.take(case.call(module, x_t, state))
            state = {name: result[name] for name in case.names}
            if t in reads:
                loss = loss + sum((s**3 + s).sum() for s in state.values())
            state = between(t, state)
        loss.backward()
        optimizer.step()  # what a wide step keeps are copies
        x.zero_()
    return recording["cell"]


def assert_operators_agree(mine: Track, theirs: Track, sequences: list[int]) -> None:
    chosen = torch.tensor(sequences)
    thin, dense = (track.operator(sequences=chosen) for track in (mine, theirs))
    assert isinstance(thin, Wide) and not isinstance(dense, Wide)
    assert (thin.length, thin.batch, thin.size) == (dense.length, dense.batch, dense.size)
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(len(chosen), 3, thin.size, generator=generator, dtype=F64)
    for t in range(thin.length):
        assert_whole_close(thin.push(t, block), dense.push(t, block), bound=1e-12)
        assert_whole_close(thin.pull(t, block), dense.pull(t, block), bound=1e-12)
        assert_whole_close(thin.push(t, block[:, :1]), dense.push(t, block[:, :1]), bound=1e-12)


@pytest.mark.parametrize("between", [nothing, detached, dropped, done], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.usefixtures("_narrow")
def test_products_are_those_of_the_dense_steps(kind: str, between: Between) -> None:
    if kind == "leading axis" and between is done:
        pytest.skip("its batch is the second axis")
    mine, theirs = (
        recorded(kind, between, (2, STEPS - 1), jacobians=wanted) for wanted in (None, True)
    )
    assert torch.equal(mine.cuts, theirs.cuts)
    assert_operators_agree(mine, theirs, [0, 1])
    assert_operators_agree(mine, theirs, [1])


@pytest.mark.parametrize("between", [nothing, detached, dropped], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "kind", ["from scratch", "peephole", "layer norm", "three states", "leaky"]
)
@pytest.mark.parametrize("reads", [(2, STEPS - 1), (STEPS - 1,), (1,)], ids=str)
@pytest.mark.usefixtures("_narrow")
def test_gradients_that_need_the_steps(kind: str, between: Between, reads: tuple[int, ...]) -> None:
    mine, theirs = (recorded(kind, between, reads, jacobians=wanted) for wanted in (None, True))
    assert mine.reached is not None and theirs.reached is not None
    assert torch.equal(mine.reached, theirs.reached)
    steps = [reads[0], STEPS - 1]
    pairs = [
        (mine.partial_grads, theirs.partial_grads),
        (mine.last_grads, theirs.last_grads),
        (mine.loss_steps(steps, [1]).grads, theirs.loss_steps(steps, [1]).grads),  # type: ignore[union-attr]
    ]
    for ours, known in pairs:
        assert ours is not None and known is not None
        for name in known:
            torch.testing.assert_close(ours[name], known[name], rtol=1e-10, atol=1e-14)
    if "h" in mine.states:
        assert_steps_close(mine.grad_h_direct, theirs.grad_h_direct, mine.mask)


@pytest.mark.usefixtures("_narrow")
def test_lengths_cut_the_products() -> None:
    mine, theirs = (
        recorded("from scratch", nothing, (1,), jacobians=wanted, lengths=[7, 3])
        for wanted in (None, True)
    )
    assert_operators_agree(mine, theirs, [0, 1])


@pytest.mark.parametrize("make", WIDE, ids=lambda f: f.__name__)
def test_wide_cells_are_read_by_default(
    make: Callable[[bool | None], Track], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "WIDE_WRITING", -1.0)
    mine, theirs = make(None), make(True)
    assert mine.operator().size > marks.JACOBIAN_WIDEST
    assert_operators_agree(mine, theirs, list(range(mine.batch)))
    assert mine.last_grads is not None and theirs.last_grads is not None
    for name, grad in theirs.last_grads.items():
        torch.testing.assert_close(mine.last_grads[name], grad, rtol=1e-10, atol=1e-14)


def test_a_wide_step_that_mixes_sequences_is_refused() -> None:
    norm, weight = nn.BatchNorm1d(70), torch.randn(70, 70, requires_grad=True)
    with gradflow.record(norm) as recording:
        h = torch.randn(5, 70)
        for _ in range(4):
            h = gradflow.tap(h=torch.tanh(norm(h @ weight)))
        h.sum().backward()
    with pytest.raises(RecordingError, match="mixes the sequences of a batch"):
        recording["loop"].operator()


@pytest.mark.parametrize("pair", [(0, 1), (2, 5), (6, 7)], ids=str)
def test_any_two_sequences_that_mix_are_noticed(pair: tuple[int, int]) -> None:
    weight, (first, second) = torch.randn(70, 70, requires_grad=True), pair
    with gradflow.record(nn.Module()) as recording:
        h = torch.randn(8, 70)
        for _ in range(3):
            new = torch.tanh(h @ weight)
            mixed = new[first] + 0.1 * new[second]
            h = gradflow.tap(h=torch.cat([new[:first], mixed.unsqueeze(0), new[first + 1 :]]))
        h.sum().backward()
    with pytest.raises(RecordingError, match="mixes the sequences of a batch"):
        recording["loop"].operator()


def test_too_many_activations_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "MOST_KEPT", 2**14)
    track = convolved(None)
    assert track.has_gradient
    with pytest.raises(RecordingError, match="record fewer sequences or fewer steps"):
        track.operator()


def test_never_without_being_wanted() -> None:
    with pytest.raises(RecordingError, match="jacobians=False"):
        convolved(False).operator()


class Token:
    """Something that can be referred to weakly."""


@pytest.mark.filterwarnings("ignore:cell. no backward ran")
def test_a_wide_step_holds_no_part_of_the_users_graph() -> None:
    cell = Convolutional(2)
    with gradflow.record(cell) as recording:
        state = (torch.zeros(1, 2, 5, 5),) * 2
        for _ in range(3):
            state = cell(torch.randn(1, 1, 5, 5), state)
        token = Token()
        seen = weakref.ref(token)
        assert state[0].grad_fn is not None
        state[0].grad_fn.metadata["token"] = token  # lives as long as the node
    recording["cell"].operator()
    del state, token
    gc.collect()
    assert seen() is None


def test_a_wide_step_is_the_same_after_the_weights_have_changed() -> None:
    track = convolved(None)
    before = track.operator().pull(2, torch.ones(3, 1, 100, dtype=F64))
    again = track.operator().pull(2, torch.ones(3, 1, 100, dtype=F64))
    assert torch.equal(before, again)


def zoned_out(kind: str, jacobians: bool | None, *, padded: bool, start: bool) -> Track:
    """Between two calls the state is mixed with the one before, or kept on padding."""
    torch.manual_seed(0)
    case = CELLS[kind]
    module = case.make().double()
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=F64)
    state = {name: torch.randn_like(s) * 0.3 for name, s in case.initial().items()}
    if start:
        state = {name: s.requires_grad_() for name, s in state.items()}
    with gradflow.record(module, jacobians=jacobians) as recording:
        for t, x_t in enumerate(x):
            result = case.take(case.call(module, x_t, state))
            alive = torch.tensor([[t < 4], [True]]).double() if padded else torch.tensor(0.7)
            state = {n: alive * result[n] + (1 - alive) * state[n] for n in case.names}
        sum(s.pow(3).sum() for s in state.values()).backward()  # type: ignore[union-attr]
    return recording["cell"]


@pytest.mark.parametrize("start", [False, True], ids=["constant start", "start with gradient"])
@pytest.mark.parametrize("padded", [False, True], ids=["zoneout", "padded"])
@pytest.mark.parametrize("kind", ["from scratch", "leaky", "three states"])
@pytest.mark.usefixtures("_narrow")
def test_states_that_go_around_the_calls(kind: str, padded: bool, start: bool) -> None:
    mine, theirs = (zoned_out(kind, wanted, padded=padded, start=start) for wanted in (None, True))
    assert torch.equal(mine.cuts, theirs.cuts) and mine.notes == theirs.notes
    assert_operators_agree(mine, theirs, [0, 1])
    assert_operators_agree(mine, theirs, [1])


# ------------------------------------------------------------------------------------- operations


def _operations() -> dict[str, Callable[[Tensor], Tensor]]:
    """Steps of (B, 64) whose backward has no derivative, is batched wrongly, or is out of the common."""
    torch.manual_seed(0)
    group, conv = nn.GroupNorm(2, 4).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0).double()
    line, twice = nn.Linear(64, 64).double(), nn.Bilinear(64, 64, 64).double()

    def image(h: Tensor) -> Tensor:
        return h.view(-1, 4, 4, 4)

    def assigned(h: Tensor) -> Tensor:
        new = torch.zeros_like(h)
        new[:, :32] = line(h)[:, :32].tanh()
        new[:, 32:] = h[:, :32] * 0.5
        return new

    def warped(h: Tensor) -> Tensor:
        flow = torch.tanh(conv(image(h))[:, :2]).permute(0, 2, 3, 1)
        return nn.functional.grid_sample(image(h), flow, align_corners=False).flatten(1)

    return {
        "group norm": lambda h: torch.tanh(group(conv(image(h)))).flatten(1),
        "silu": lambda h: nn.functional.silu(line(h)),
        "fused attention": lambda h: attention(h.view(-1, 16, 4)).flatten(1),
        "bilinear": lambda h: torch.tanh(twice(h, h) / 4),
        "assigned in place": assigned,
        "warped": warped,
        "dropout": lambda h: nn.functional.dropout(line(h), 0.3).tanh(),
        "Fourier": lambda h: torch.fft.irfft(torch.fft.rfft(line(h)) * 0.9, n=64),
    }


OPERATIONS = _operations()


def stepped(step: Callable[[Tensor], Tensor], jacobians: bool | None, batch: int = 3) -> Track:
    torch.manual_seed(1)
    with gradflow.record(nn.Module(), jacobians=jacobians) as recording:
        h = (torch.randn(batch, 64, dtype=F64) / 2).requires_grad_()
        for _ in range(3):
            h = gradflow.tap(h=step(h))
        h.pow(2).sum().backward()
    return recording["loop"]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("_narrow")
def test_operations_of_all_kinds(name: str) -> None:
    mine, theirs = (stepped(OPERATIONS[name], wanted) for wanted in (None, True))
    assert_operators_agree(mine, theirs, [0, 1, 2])


def distances(h: Tensor) -> Tensor:
    """Of 16 points: torch batches its backward wrongly, and gives it no derivative."""
    points = h.view(-1, 16, 4)
    return torch.cdist(points, points + 1)[:, :, :4].flatten(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_torch_batches_wrongly_is_taken_one_by_one(batch: int) -> None:
    dense = stepped(distances, True, batch).operator()
    torch.manual_seed(1)
    first = (torch.randn(batch, 64, dtype=F64) / 2).requires_grad_()
    second = distances(first).detach()
    for b in range(batch):
        exact = torch.autograd.functional.jacobian(lambda row: distances(row)[0], second[b : b + 1])
        block = torch.eye(64, dtype=F64).expand(batch, -1, -1)
        found = dense.pull(1, block)[b]
        assert_whole_close(found, exact[:, 0], bound=1e-12)


@pytest.mark.usefixtures("_narrow")
def test_what_cannot_be_pushed_through_is_said() -> None:
    operator = stepped(distances, None).operator()
    with pytest.raises(RecordingError, match=r"cannot be pushed through its step .*jacobians=True"):
        operator.push(1, torch.ones(3, 1, 64, dtype=F64))


def test_little_is_kept_of_a_call_that_may_stay_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cells, "PERHAPS", 0)
    monkeypatch.setattr(wide, "WIDE_WRITING", -1.0)
    mine, theirs = convolved(None), convolved(True)
    assert_operators_agree(mine, theirs, [0, 1, 2])
    partial, known = mine.partial_grads, theirs.partial_grads
    assert partial is not None and known is not None
    for name, grad in known.items():
        torch.testing.assert_close(partial[name], grad, rtol=1e-10, atol=1e-14)
