"""Models compiled with torch.compile: fused layers run eagerly, are recorded, and change by no bit."""

# ruff: noqa: PT031, SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.errors import GradflowWarning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Net(nn.Module):
    """A recurrent stack between layers that torch.compile does compile."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 8)
        self.rnn = nn.LSTM(8, 6, 2, dropout=0.2)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.rnn(torch.tanh(self.before(x)))[0]))


def train(recorded: bool) -> tuple[list[float], Tensor, Tensor]:
    """Losses, final parameters and random state of a few steps of a compiled model."""
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters())
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = compiled(torch.randn(6, 4, 3)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for _ in range(4):
        if not recorded:
            step()
            continue
        with gradflow.record(compiled) as recording:
            step()
        assert list(recording.tracks) == ["rnn.l0", "rnn.l1"]
        assert [track.parity.status for track in recording.values()] == ["passed", "passed"]
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, parameters, torch.get_rng_state()


def test_a_compiled_model_is_recorded_and_not_disturbed() -> None:
    plain, seen = train(False), train(True)
    assert plain[0] == seen[0]
    assert torch.equal(plain[1], seen[1])
    assert torch.equal(plain[2], seen[2])


class Loop(nn.Module):
    """A loop over a cell, which torch.compile makes into one graph."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for x_t in x:
            state = self.cell(x_t, state)
        assert state is not None
        return state[0] if isinstance(state, tuple) else state


class Both(nn.Module):
    """A loop over a cell beside a fused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop(nn.LSTMCell(3, 4))
        self.rnn = nn.GRU(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][-1] + self.loop(x)


class Graphs:
    """A backend that counts what it is given to compile and how often it runs.

    Its results are 1 % off, as another order of operations would be by rounding: whoever leaves the
    graph is found out.
    """

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.made += 1

        def run(*inputs: Tensor) -> object:
            self.ran += 1
            return tuple(1.01 * result for result in graph(*inputs))

        return run


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch._dynamo's own imports
        import torch._dynamo

        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize(
    ("kind", "first"), [(nn.LSTMCell, "before"), (nn.GRUCell, "inside")], ids=["LSTM", "GRU"]
)
def test_a_compiled_loop_over_a_cell_stays_the_graph_it_is(
    kind: type[nn.RNNCellBase], first: str
) -> None:
    """Not seen, said in a sentence, and not a bit of it changed; fullgraph=True allows no break."""
    torch.manual_seed(1)
    model, x = Loop(kind(3, 4)), torch.randn(3, 2, 3)
    plain = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    plain(x).sum().backward()
    expected = (plain(x), gradients(plain))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "before":
        compiled(x)
    for _ in range(2):
        with pytest.warns(
            GradflowWarning, match=r"cell \(\w+Cell\) .*graph of torch.compile.*uncomp"
        ):
            with gradflow.record(compiled) as recording:
                output = compiled(x)
                output.sum().backward()
        assert len(recording) == 0
        assert torch.equal(output, expected[0])
        for a, b in zip(gradients(model), expected[1], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(compiled(x), expected[0])


def test_a_recording_costs_one_compilation_however_often_it_is_made() -> None:
    model, x, graphs = Loop(nn.GRUCell(3, 4)), torch.randn(3, 2, 3), Graphs()
    compiled = torch.compile(model, backend=graphs)
    outside = compiled(x)
    assert graphs.made == 1
    for _ in range(10):  # torch gives up after eight versions of one function
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradflowWarning)
            with gradflow.record(compiled):
                assert torch.equal(compiled(x), outside)
        assert torch.equal(compiled(x), outside)
    assert (graphs.made, graphs.ran) == (2, 21)


@pytest.mark.parametrize("how", ["model", "part", "module.compile()"])
def test_a_cell_in_a_compiled_part_is_named_beside_what_is_seen(how: str) -> None:
    model, x = Both(), torch.randn(3, 2, 3)
    run: nn.Module = model
    if how == "model":
        run = torch.compile(model, backend="aot_eager")
    elif how == "part":
        model.loop = torch.compile(model.loop, backend="aot_eager")
    else:
        model.loop.compile(backend="aot_eager")
    sentence = (
        r"cell loops inside a compiled graph are not seen: loop.cell \(LSTMCell\) is in a part "
        r"compiled with torch.compile; record the uncompiled model"
    )
    with pytest.warns(GradflowWarning, match=sentence):
        with gradflow.record(run) as recording:
            run(x).sum().backward()
    assert list(recording.tracks) == ["rnn.l0"]
    assert recording["rnn.l0"].parity.status == "passed"
    assert any("loop.cell (LSTMCell)" in note for note in recording.notes)
    if how == "model":  # as the sentence says
        with gradflow.record(model) as recording:
            model(x).sum().backward()
        assert list(recording.tracks) == ["rnn.l0", "loop.cell"]


def test_a_cell_in_a_compiled_function_is_noted() -> None:
    """Nothing on the model tells that it was compiled, so that it is a note and no warning."""
    model, x = Both(), torch.randn(2, 2, 3)

    @torch.compile(backend="aot_eager")
    def decode(x: Tensor) -> Tensor:
        return model.loop(x)

    with gradflow.record(model) as recording:
        (decode(x).sum() + model.rnn(x)[0].sum()).backward()
    assert list(recording.tracks) == ["rnn.l0"]
    assert recording.notes == [
        "loop.cell (LSTMCell) was not called, or ran inside a graph of torch.compile, where nothing is "
        "seen"
    ]


def test_what_torch_compile_learns_during_a_recording_is_true_after_it() -> None:
    """Its table of functions, made when first asked for, must hold torch's own, not the wrappers."""
    from torch._dynamo import trace_rules

    originals = [torch._VF.lstm_cell, torch.lstm_cell, torch.gru_cell, torch.rnn_tanh]
    trace_rules.clear_lru_cache()
    with warnings.catch_warnings(), gradflow.record(nn.LSTM(3, 4)):
        warnings.simplefilter("ignore", GradflowWarning)
        wrappers = [torch._VF.lstm_cell, torch.lstm_cell, torch.gru_cell, torch.rnn_tanh]
        known = trace_rules.get_torch_obj_rule_map()
        warnings.simplefilter("ignore")
    assert all(original in known for original in originals)
    assert not any(wrapper in known for wrapper in wrappers)


class Scan(nn.Module):
    """A linear recurrence by a cumulative sum, its states marked."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = gradflow.scan(torch.cumsum(self.w(x), 1), decay=1.0)
        return h[:, -1].sum()


def test_a_scan_in_a_compiled_graph_is_traced_as_nothing() -> None:
    model, x = Scan(), torch.randn(2, 5, 3)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    plain = compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradflow.GradflowWarning)
        with gradflow.record(model) as recording:
            found = compiled(x)
    assert torch.equal(plain, found)
    assert (graphs.made, graphs.ran) == (1, 2)
    assert len(recording) == 0


class OwnCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(7, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.cat([x, h], 1)))


class LoopOverOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = OwnCell()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 4)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


def test_a_cell_has_its_name_while_something_else_is_compiled() -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    with gradflow.record(nn.ModuleDict({"net": (net := LoopOverOwn())})) as recording:
        net(torch.randn(6, 2, 3)).sum().backward()
    assert {name: track.cell for name, track in recording.items()} == {"net.cell": "OwnCell"}
    torch._dynamo.reset()
