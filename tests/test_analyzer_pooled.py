"""Runs of one layer from starts of their own are one layer of as many sequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import compare
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import GradflowWarning
from gradflow.recording import pooled

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS, HIDDEN, LENGTHS = 3, 4, (12, 9, 12, 7)


class Linear(nn.Module):
    """The cell of the char-RNN tutorial: no nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(INPUTS + HIDDEN, HIDDEN, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.f(torch.cat([x, h], 1))


class Curved(Linear):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(super().forward(x, h))


def over(cell: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[1], HIDDEN).double()
    for x_t in x:
        h = cell(x_t, h)
    return h


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "fused": (lambda: nn.LSTM(INPUTS, HIDDEN).double(), lambda m, x: m(x)[0][-1]),
    "bidirectional": (
        lambda: nn.GRU(INPUTS, HIDDEN, bidirectional=True).double(),
        lambda m, x: m(x)[0].mean(0),
    ),
    "cell": (lambda: nn.GRUCell(INPUTS, HIDDEN).double(), over),
    "own": (Curved, over),
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_are_one_track_of_as_many_sequences(kind: str) -> None:
    """The numbers are those of each run, padded at its end."""
    torch.manual_seed(0)
    make, forward = RUNS[kind]
    model, xs = make(), [torch.randn(n, 1, INPUTS).double() for n in LENGTHS]
    with gradflow.record(model) as recording:
        for x in xs:
            forward(model, x).pow(2).sum().backward()
    names = dict.fromkeys(track.name.partition("@")[0] for track in recording.values())
    one, said = pooled(recording)
    assert list(one.tracks) == list(names)
    assert all("ran 4 times" in sentence and "pool=False" in sentence for sentence in said)
    for name in names:
        runs = [track for track in recording.values() if track.name.partition("@")[0] == name]
        track = one[name]
        assert track.lengths.tolist() == list(LENGTHS)
        for get in (
            lambda t: t.h,
            lambda t: t.grad_h,
            lambda t: t.grad_h_direct,
            lambda t: t.grad_h_last,
            lambda t: step_jacobians(t).flatten(2),
            lambda t: t.loss_steps([3]).grads["h"][0],
        ):
            whole = get(track)
            for b, run in enumerate(runs):
                compare.assert_whole_close(whole[: run.steps, b : b + 1], get(run))
                assert bool(torch.isnan(whole[run.steps :, b]).all())
        assert track.parity.status == runs[0].parity.status
    analysis = gradflow.analyze(recording)
    assert list(analysis.layers) == list(names)
    assert analysis[next(iter(names))].sequences == 4
    assert any("ran 4 times" in sentence for sentence in analysis.warnings)
    assert len(gradflow.analyze(recording, pool=False).layers) == 4 * len(names)


@pytest.mark.parametrize("own", [False, True], ids=["cell", "own"])
def test_the_verdict_is_that_of_the_batch(own: bool) -> None:
    torch.manual_seed(0)
    cell = Curved() if own else nn.GRUCell(INPUTS, HIDDEN).double()
    xs = [torch.randn(n, 1, INPUTS).double() for n in (20, 20, 20)]
    with gradflow.record(cell) as apart:
        for x in xs:
            over(cell, x).sum().backward()
    with gradflow.record(cell) as together:
        over(cell, pad_sequence([x[:, 0] for x in xs])).sum().backward()
    mine, theirs = (gradflow.analyze(recording)["cell"] for recording in (apart, together))
    assert mine.verdict == theirs.verdict
    assert mine.rate.value == pytest.approx(theirs.rate.value, rel=1e-9)
    assert mine.rate.low == pytest.approx(theirs.rate.low, rel=1e-9)


@pytest.mark.parametrize("own", [False, True], ids=["cell", "own"])
def test_runs_of_other_weights_stay_apart(own: bool) -> None:
    torch.manual_seed(0)
    cell = Curved() if own else nn.GRUCell(INPUTS, HIDDEN).double()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    with gradflow.record(cell) as recording:
        for _ in range(2):
            over(cell, torch.randn(8, 2, INPUTS).double()).pow(2).sum().backward()
            optimizer.step()
    analysis = gradflow.analyze(recording)
    assert list(analysis.layers) == ["cell", "cell@2"]
    assert any("weights were not the same" in sentence for sentence in analysis.warnings)


@pytest.mark.parametrize(("kind", "found"), [(Linear, True), (Curved, False)])
def test_a_recurrence_without_a_nonlinearity_is_named(kind: type[Linear], found: bool) -> None:
    torch.manual_seed(0)
    cell = kind()
    with gradflow.record(cell) as recording:
        for _ in range(3):
            over(cell, torch.randn(30, 1, INPUTS).double()).sum().backward()
    layer = gradflow.analyze(recording)["cell"]
    assert layer.verdict == "vanishing"
    named = [finding for finding in layer.findings if finding.name == "linear-recurrence"]
    assert len(named) == found
    if found:
        matrix = cell.f.weight.detach()[:, INPUTS:]
        radius = torch.linalg.eigvals(matrix).abs().max().log()
        assert named[0].value == pytest.approx(float(radius), rel=1e-9)


class Scaled(nn.Module):
    """h ← s h by hand, whose exponent is ln s; with a tap, or left to be found."""

    def __init__(self, scale: float, tapped: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(scale * torch.eye(2, dtype=torch.float64))
        self.tapped = tapped

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(20):
            h = h @ self.w
            if self.tapped:
                h = gradflow.tap(h=h)
        return h


@pytest.mark.parametrize("tapped", [False, True])
def test_loops_of_different_weights_are_not_pooled(tapped: bool) -> None:
    """Two directions by hand have one name but for the @, and are two layers."""
    model = nn.ModuleList([Scaled(0.5, tapped), Scaled(2.0, tapped)])
    x = torch.ones(3, 2).double()
    with gradflow.record(model) as recording:
        (model[0](x) + model[1](x)).sum().backward()
    analysis = gradflow.analyze(recording)
    gains = [analysis[name].gain.value for name in analysis.layers]
    assert gains == pytest.approx([-19 * torch.log(torch.tensor(2.0)).item()] * 1 + [-gains[0]])
    assert not any("pooled" in said or "not the same" in said for said in analysis.warnings)


def fused_upon(rnn: nn.Module, x: Tensor, depth: int) -> Tensor:
    for _ in range(depth):
        x = rnn(torch.tanh(x))[0]
    return x[-1]


def cells_upon(cell: nn.Module, x: Tensor, depth: int) -> Tensor:
    for _ in range(depth):
        h, xs = torch.zeros(x.shape[1], HIDDEN).double(), list(x)
        x = torch.stack([h := cell(x_t, h) for x_t in xs])
    return x[-1]


def of_sentences(rnn: nn.Module, x: Tensor, depth: int) -> Tensor:
    for _ in range(depth - 1):
        x = torch.stack([rnn(x * scale)[1][0] for scale in (0.5, 1.0, 2.0)])
    return rnn(x)[1][0]


class Square(Curved):
    """As wide as its input, so that it can run on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2 * HIDDEN, HIDDEN, dtype=torch.float64)


UPON = {
    "fused": (lambda: nn.GRU(HIDDEN, HIDDEN), fused_upon, [3, 3]),
    "bidirectional": (
        lambda: nn.LSTM(HIDDEN, HIDDEN, proj_size=2, bidirectional=True),
        fused_upon,
        [3, 3, 3, 3],
    ),
    "cell": (lambda: nn.GRUCell(HIDDEN, HIDDEN), cells_upon, [3, 3]),
    "own": (Square, cells_upon, [3, 3]),
    "of sentences": (lambda: nn.GRU(HIDDEN, HIDDEN), of_sentences, [9, 3]),
}


@pytest.mark.parametrize("kind", UPON)
def test_runs_on_what_came_of_a_run_are_no_more_sequences(kind: str) -> None:
    """A layer applied to its own output is as many layers; three batches of it are pooled per depth."""
    torch.manual_seed(0)
    make, forward, sequences = UPON[kind]
    model = make().double()
    with gradflow.record(model) as recording:
        for _ in range(3):
            forward(model, torch.randn(8, 1, HIDDEN).double(), 2).pow(2).sum().backward()
    layers = gradflow.analyze(recording)
    assert [layer.sequences for layer in layers.values()] == sequences
    told = [note for note in layers.warnings if "2 runs one upon the other" in note]
    assert len(told) == 1
    assert not any("the loss reaches" in note for note in layers.warnings)


def runs_of(
    reads: Callable[[list[Tensor]], Tensor], lengths: tuple[int, ...], batch: int
) -> object:
    module = nn.GRU(INPUTS, HIDDEN).double()
    with warnings.catch_warnings(), gradflow.record(module) as recording:
        warnings.simplefilter("ignore", GradflowWarning)  # some runs are not read
        reads([module(torch.randn(n, batch, INPUTS).double())[0] for n in lengths]).backward()
    return gradflow.analyze(recording)["l0"]


WHOLE, LAST = (lambda run: run.sum()), (lambda run: run[-1].sum())


@pytest.mark.parametrize("lengths", [(6, 6, 6, 6), (7, 6, 6, 9)], ids=str)
@pytest.mark.parametrize("read", [WHOLE, LAST], ids=["every step", "last step"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_loss_of_one_run_is_no_mistake_of_axes_or_padding(
    place: int, read: Callable[[Tensor], Tensor], lengths: tuple[int, ...]
) -> None:
    """Runs are calls of their own: batch and time cannot have changed places between them."""
    layer = runs_of(lambda outs: read(outs[place]), lengths, 1)
    (found,) = [f for f in layer.findings if f.name.startswith("reads")]
    assert found.name == "reads-few-sequences"
    assert found.message == "only 1 of its 4 runs gets a gradient"
    assert found.where == f"run {place + 1} of 4"
    words = " ".join([layer.sentence, *(f.advice + f.code + f.message for f in layer.findings)])
    for wrong in ("changed places", "batch_first", "padding", "first mend", "packed", "B ="):
        assert wrong not in words


def test_one_sequence_of_every_run_is_counted_over_all_runs() -> None:
    layer = runs_of(lambda outs: sum(out[:, 0].sum() for out in outs), (6, 6), 3)
    (found,) = [f for f in layer.findings if f.name.startswith("reads")]
    assert found.message == "only 2 of 6 sequences of its 2 runs get a gradient"


def test_what_all_runs_have_amiss_is_said_of_the_pooled_layer() -> None:
    layer = runs_of(lambda outs: sum(out[0].sum() for out in outs), (6, 9, 7), 1)
    (found,) = [f for f in layer.findings if f.name.startswith("reads")]
    assert (found.name, found.where) == ("reads-first-step", "step 1 of up to 9")


@pytest.mark.parametrize(
    ("lengths", "words"), [((5, 8), "at most 8 steps only"), ((8, 8), "8 steps only")]
)
def test_short_runs_are_said_to_be_at_most_so_long(lengths: tuple[int, ...], words: str) -> None:
    module = nn.GRU(INPUTS, HIDDEN).double()
    with gradflow.record(module) as recording:
        for n in lengths:
            module(torch.randn(n, 1, INPUTS).double())[0].sum().backward()
    (note,) = [n for n in gradflow.analyze(recording).warnings if "steps only" in n]
    assert note.startswith(f"l0 ran for {words}")
