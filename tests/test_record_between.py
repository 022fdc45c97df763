"""What happens to a state between two calls, however long: the product of A_t against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import RecordingError
from gradflow.hooks import graph

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, STEPS, INPUTS, HIDDEN = 3, 5, 2, 4


class Own(nn.Module):
    """A cell of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(INPUTS + HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.map(torch.cat([x, h], dim=1)))


class Between(nn.Module):
    """A loop whose state goes through a residual network between two calls: h + g(h), no ODE needed."""

    def __init__(self, cell: nn.Module, deep: int, residual: bool) -> None:
        super().__init__()
        self.cell, self.residual = cell, residual
        self.weights = nn.ParameterList(
            torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(deep)
        )

    def between(self, h: Tensor) -> Tensor:
        out = h
        for weight in self.weights:
            out = torch.tanh(out @ weight + 0.1)
        return h + out if self.residual else out

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        for t, x_t in enumerate(x):
            h = self.cell(x_t, self.between(h) if t else h)
            h = first if t == 0 and first is not None else h
        return h


CELLS = {"stock": lambda: nn.GRUCell(INPUTS, HIDDEN), "own": Own}


WAYS = [("stock", deep, True) for deep in (2, 12, 300)] + [("own", deep, True) for deep in (2, 12)]


@pytest.mark.parametrize(("cell", "deep", "residual"), [*WAYS, ("stock", 12, False)])
def test_a_long_way_between_two_calls_is_read_whole(cell: str, deep: int, residual: bool) -> None:
    torch.manual_seed(0)
    model, x = (
        Between(CELLS[cell](), deep, residual).double(),
        torch.randn(STEPS, BATCH, INPUTS).double(),
    )
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    matrices = step_jacobians(recording["cell"])
    first = recording["cell"].h[0]
    for b in range(BATCH):
        product = torch.linalg.multi_dot(list(matrices[1:, b].flip(0)))
        exact = torch.autograd.functional.jacobian(
            lambda row, b=b: model(x, torch.cat([first[:b], row[None], first[b + 1 :]]))[b],
            first[b],
        )
        torch.testing.assert_close(product, exact, rtol=1e-9, atol=1e-12 * float(exact.abs().max()))
        assert not torch.allclose(product * (1 + 1e-6), exact, rtol=1e-9, atol=0)


def test_more_than_is_looked_at_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "BETWEEN_NODES", 500)
    torch.manual_seed(0)
    model, x = (
        Between(nn.GRUCell(INPUTS, HIDDEN), 300, True).double(),
        torch.randn(STEPS, BATCH, INPUTS).double(),
    )
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    with pytest.raises(RecordingError, match="more than 500 operations"):
        step_jacobians(recording["cell"])


class Skipping(nn.Module):
    """A loop that starts from the mean of its last two states: a skip connection in time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.cell = getattr(nn, kind)(INPUTS, HIDDEN)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "GRU":
            return self.cell(x[None], h[None])[1][0], c
        return self.cell(x, (h, c)) if self.kind == "LSTMCell" else (self.cell(x, h), c)

    def run(self, x: Tensor, h: Tensor, g: Tensor, c: Tensor) -> Tensor:
        for x_t in x:
            (new, c), g = self.step(x_t, (h + g) / 2, c), h
            h = new
        return h


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "GRU"])
def test_a_state_that_skips_a_call_is_part_of_the_joint_state(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Skipping(kind).double(), torch.randn(7, BATCH, INPUTS).double()
    zero = x.new_zeros(BATCH, HIDDEN)
    with gradflow.record(model) as recording:
        model.run(x, zero, zero, zero).sum().backward()
    (name,) = (track.name for track in recording.values() if track.name.startswith("cell"))
    assert "depend on more of its past than the states before" in recording[name].notes[0]
    matrices = step_jacobians(recording["loop"])

    def states(steps: int) -> tuple[Tensor, Tensor, Tensor]:
        h = g = c = zero
        for x_t in x[:steps]:
            (new, c), g = model.step(x_t, (h + g) / 2, c), h
            h = new
        return h.detach(), g.detach(), c.detach()

    h, g, c = states(3)
    product = torch.linalg.multi_dot(list(matrices[3:, 0].flip(0)))
    exact = torch.autograd.functional.jacobian(
        lambda row: model.run(x[3:], torch.cat([row[None], h[1:]]), g, c)[0], h[0]
    )
    torch.testing.assert_close(product[:HIDDEN, :HIDDEN], exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("calls", [2, 3])
def test_the_mean_of_several_calls_that_goes_on(calls: int) -> None:
    """Pondering: of two calls one enters and one is returned; of three there is more than a state."""
    torch.manual_seed(0)
    cell, x = nn.GRUCell(INPUTS, HIDDEN).double(), torch.randn(6, BATCH, INPUTS).double()

    def run(h: Tensor, begin: int) -> Tensor:
        for x_t in x[begin:]:
            every = []
            for _ in range(calls):
                h = cell(x_t, h)
                every.append(h)
            h = torch.stack(every).mean(0)
        return h

    with gradflow.record(cell) as recording:
        run(x.new_zeros(BATCH, HIDDEN), 0).sum().backward()
    if calls == 3:
        with pytest.raises(RecordingError, match="depend on more of its past than"):
            step_jacobians(recording["cell"])
        return
    product = torch.eye(HIDDEN, dtype=torch.float64)
    for t in range(2, 2 * 5):  # the states that enter the calls compose: up to the last step
        product = step_jacobians(recording["cell"])[t, 0] @ product
    h = [x.new_zeros(BATCH, HIDDEN)]
    for x_t in x[:1]:
        one = cell(x_t, h[-1])
        h.append(((one + cell(x_t, one)) / 2).detach())
    last = x[:5]

    def until_last(row: Tensor) -> Tensor:
        state = torch.cat([row[None], h[-1][1:]])
        for x_t in last[1:]:
            one = cell(x_t, state)
            state = (one + cell(x_t, one)) / 2
        return state[0]

    exact = torch.autograd.functional.jacobian(until_last, h[-1][0])
    torch.testing.assert_close(product, exact, rtol=1e-9, atol=1e-14)


class Buffered(nn.Module):
    """A decoder whose states and outputs lie in tensors made before, or in variables."""

    def __init__(self, fed_back: bool) -> None:
        super().__init__()
        self.cell, self.out, self.fed_back = nn.GRUCell(2, 3), nn.Linear(3, 2), fed_back
        self.double()

    def forward(self, x: Tensor, written: bool) -> Tensor:
        hs, ys = x.new_zeros(len(x) + 1, x.shape[1], 3), x.new_zeros(len(x) + 1, x.shape[1], 2)
        h, y = hs[0], ys[0]
        for t, x_t in enumerate(x):
            if written:
                h, y = hs[t].clone(), 1 * ys[t]
            h = self.cell(x_t + y if self.fed_back else x_t, h)
            y = self.out(h)
            if written:
                hs[t + 1], ys[t + 1] = h, y
        return h.sum()


@pytest.mark.parametrize("fed_back", [False, True])
def test_a_buffer_that_steps_are_written_into_is_no_state(fed_back: bool) -> None:
    """Only the row that was written last goes on; the others, which nobody reads again, are kept."""
    torch.manual_seed(0)
    model, x = Buffered(fed_back), torch.randn(8, 4, 2).double()
    found = []
    for written in (False, True):
        with gradflow.record(model) as recording:
            model(x, written).backward()
        assert list(recording.tracks) == ["cell"]
        found.append(gradflow.analyzer.step_jacobians(recording["cell"])[1:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_a_buffer_of_which_older_rows_are_read_gets_no_verdict() -> None:
    cell = nn.GRUCell(3, 3).double()
    ys = torch.zeros(9, 4, 3).double()
    h = ys[0].clone()
    with gradflow.record(cell) as recording:
        for t in range(8):
            h = cell(ys[max(t - 2, 0) : t + 1].mean(0), h)
            ys[t + 1] = h
        h.sum().backward()
    layer = gradflow.analyze(recording)["cell"]
    assert layer.verdict == "inconclusive" and "more goes around it" in layer.sentence


# ---------------------------------------------------------------- sequences that are held over a call


class Held(nn.Module):
    """Chunks of five steps; a mask says whose state goes on and whose is held as it was before."""

    def __init__(self, kind: str, layers: int) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(INPUTS, HIDDEN, layers)

    def forward(self, x: Tensor, masks: Tensor, state: list[Tensor]) -> list[Tensor]:
        """x (chunks, T, B, I), masks (chunks, B); the states after the last call, which no mask holds."""
        for number, chunk in enumerate(x):
            given = tuple(state) if len(state) > 1 else state[0]
            _, found = self.rnn(chunk, given)
            found = list(found) if len(state) > 1 else [found]
            if number < len(x) - 1:
                keep = masks[number].view(1, -1, 1)
                found = [keep * new + (1 - keep) * old
                         for new, old in zip(found, state, strict=True)]  # fmt: skip
            state = found
        return state


def held_over_calls(kind: str, masks: Tensor, layers: int = 1) -> tuple[gradflow.Recording, Tensor]:
    """A recording, and the product of all A_t by autograd, (B, S, S); of one layer."""
    torch.manual_seed(3)
    model = Held(kind, layers).double()
    x = torch.randn(len(masks) + 1, STEPS, BATCH, INPUTS).double()
    parts = 1 + (kind == "LSTM")
    flat = torch.randn(parts, layers, BATCH, HIDDEN).double().requires_grad_()

    def ran(start: Tensor) -> Tensor:
        return torch.cat(model(x, masks, list(start)), 2)

    with gradflow.record(model) as recording:
        ran(flat).pow(2).sum().backward()
    every = torch.autograd.functional.jacobian(ran, flat)[0]  # (B, S, parts, layers, B, H)
    own = torch.stack([every[b, :, :, 0, b].flatten(1) for b in range(BATCH)])
    return recording, own


MASKS = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1.0]]).double()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_sequence_that_is_held_over_a_call_keeps_its_gradient(kind: str) -> None:
    recording, product = held_over_calls(kind, MASKS)
    found = step_jacobians(recording["rnn.l0"])
    whole = torch.eye(found.shape[-1]).double().expand(BATCH, -1, -1)
    for step in found:
        whole = step @ whole
    largest = product.abs().flatten(1).amax(1)
    assert ((whole - product).abs().flatten(1).amax(1) <= 1e-10 * largest).all()
    assert (largest > 1e-9).all()  # without the identity of the steps held it is off by decades
    eye = torch.eye(found.shape[-1]).double()
    assert all(torch.equal(found[t, 0], eye) for t in range(5, 10))
    assert gradflow.analyze(recording)["rnn.l0"].labels[:1] != ("no gains",)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_mixture_over_a_call_of_several_steps_is_analyzed_without_gains(kind: str) -> None:
    recording, _ = held_over_calls(kind, MASKS * 0.5 + 0.2, layers=2)
    with pytest.raises(RecordingError, match="mixed with that of several steps ago"):
        step_jacobians(recording["rnn.l0"])
    layer = gradflow.analyze(recording)["rnn.l0"]
    assert layer.labels[0] == "no gains" and "several steps ago" in layer.sentence


# ------------------------------------------------------------------ a bank of cells, chosen by index


class Bank(nn.Module):
    """One state that goes through one of several cells of one's own at every step."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.cells = order, nn.ModuleDict({name: Own() for name in sorted(set(order))})

    def forward(self, x: Tensor, h: Tensor) -> list[Tensor]:
        states = []
        for name, x_t in zip(self.order, x, strict=True):
            h = self.cells[name](x_t, h)
            states.append(h)
        return states


@pytest.mark.parametrize(
    ("order", "cell", "steps"),
    [
        ("aabbaabbaabb", "a", [0, 1, 4, 5, 8, 9]),
        ("aabbaabbaabb", "b", [2, 3, 6, 7, 10, 11]),
        ("abbabbabbabb", "b", [1, 2, 4, 5, 7, 8, 10, 11]),
        ("aaabcacba", "a", [0, 1, 2, 5, 8]),
        ("babcaacacbca", "a", [4, 5, 7, 11]),  # known as a state from where it came back at once
    ],
)
def test_a_cell_of_a_bank_goes_on_through_the_others(
    order: str, cell: str, steps: list[int]
) -> None:
    """It was cut in pieces of two steps, each of them stable, of a state that vanishes."""
    torch.manual_seed(0)
    model, x = Bank(order).double(), torch.randn(len(order), BATCH, INPUTS).double()
    with gradflow.record(model) as recording:
        states = model(x, torch.zeros(BATCH, HIDDEN).double())
        for state in states:
            state.retain_grad()
        states[-1].pow(2).sum().backward(retain_graph=True)
    assert f"cells.{cell}@2" not in recording
    track = recording[f"cells.{cell}"]
    torch.testing.assert_close(track.h, torch.stack([states[t] for t in steps]), rtol=0, atol=0)
    totals = torch.stack([states[t].grad for t in steps])
    torch.testing.assert_close(track.grad_h, totals, rtol=1e-12, atol=0)
    found = step_jacobians(track)
    for t, now in enumerate(steps[1:], start=1):
        for unit in range(HIDDEN):
            (row,) = torch.autograd.grad(
                states[now][:, unit].sum(), states[steps[t - 1]], retain_graph=True
            )
            torch.testing.assert_close(found[t, :, unit], row, rtol=1e-10, atol=0)


def test_a_state_that_comes_from_elsewhere_begins_a_loop_of_its_own() -> None:
    """Only one sequence after the other: nothing leads from the first into the second."""
    torch.manual_seed(0)
    model, x = Bank("aaaa").double(), torch.randn(4, BATCH, INPUTS).double()
    start = torch.zeros(BATCH, HIDDEN).double().requires_grad_()
    with gradflow.record(model) as recording:
        total = sum(model(x, torch.tanh(start))[-1].pow(2).sum() for _ in range(2))
        total.backward()
    assert [track.steps for track in recording.values()] == [4, 4]


# ---------------------------------------------------------------------------------------- over a tree


class OverTree(nn.Module):
    """Every node's state is made from the sum of those of its children, or from zeros."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(INPUTS, HIDDEN)

    def forward(self, tree: tuple, x: Tensor) -> tuple[Tensor, ...]:
        place, *children = tree
        below = [self(child, x) for child in children]
        zero = (x.new_zeros(1, HIDDEN),) * (1 + isinstance(self.cell, nn.LSTMCell))
        given = tuple(sum(parts[1:], parts[0]) for parts in zip(*below, strict=True)) or zero
        found = self.cell(x[place : place + 1], given if len(given) > 1 else given[0])
        return found if len(given) > 1 else (found,)


LINE = (4, (3, (2, (1, (0,)))))
BRANCHED = (6, (5, (0,), (1,)), (4, (2,), (3,)))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_tree_of_one_branch_is_a_line_and_one_that_forks_is_said_to(
    kind: type[nn.Module], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    model, x = OverTree(kind).double(), torch.randn(7, INPUTS).double()
    tracks = []
    for tree in (LINE, BRANCHED):
        with gradflow.record(model) as recording:
            model(tree, x)[0].pow(2).sum().backward()
        tracks.append(list(recording.values()))
    ((line,), lines) = tracks
    assert line.steps == 5 and not line.notes
    with gradflow.record(model.cell) as recording:  # the same by a loop
        state = None
        for place in range(5):
            state = model.cell(x[place : place + 1], state)
        (state[0] if kind is nn.LSTMCell else state).pow(2).sum().backward()
    (chain,) = recording.values()
    torch.testing.assert_close(line.grad_h, chain.grad_h, rtol=1e-12, atol=0)
    torch.testing.assert_close(step_jacobians(line), step_jacobians(chain), rtol=1e-12, atol=0)
    assert sorted(track.steps for track in lines) == [1, 1, 2, 3]
    assert all("as over a tree" in note for track in lines for note in track.notes)
    assert all(track.notes for track in lines)
    assert not [w for w in recwarn if "afresh" in str(w.message)]


class OfTwo(nn.Module):
    """A cell of one's own that makes a state of two."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.tanh(self.left(first) + self.right(second))


def over_tree(cell: nn.Module, leaves: list[Tensor]) -> None:
    while len(leaves) > 1:
        leaves = [cell(*pair) for pair in zip(leaves[::2], leaves[1::2], strict=True)]
    leaves[0].square().sum().backward()


def as_two_layers(cell: nn.Module, leaves: list[Tensor]) -> None:
    """The upper layer reads the lower at every step: no tree."""
    low = high = torch.zeros_like(leaves[0])
    for x in leaves:
        low = cell(x, low)
        high = cell(low, high)
    high.square().sum().backward()


@pytest.mark.parametrize(
    ("run", "forked"), [(over_tree, True), (as_two_layers, False)], ids=["tree", "two layers"]
)
def test_lines_of_a_cell_of_ones_own_over_a_tree_are_said_to_be_lines(
    run: Callable[..., None], forked: bool
) -> None:
    torch.manual_seed(0)
    cell, leaves = OfTwo(), [torch.randn(BATCH, HIDDEN) for _ in range(16)]
    with gradflow.record(cell) as recording:
        run(cell, leaves)
    assert len(recording) > 1
    assert all(any("as over a tree" in note for note in t.notes) == forked for t in recording)
