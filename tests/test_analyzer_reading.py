"""What the loss reads: told from exact zeros, said before any cause, and mended by the line it gives.

Oracle: the parameter gradients of torch, and the loss's own indices.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from seam import Reading, readings
from torch import Tensor, nn

import gradflow
from gradflow.analysis import Analysis, Finding
from gradflow.analyzer import analyze
from gradflow.recording import Recording, padding_of

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SEQUENCES, INPUTS, HIDDEN = 20, 6, 3, 8
LENGTHS = torch.tensor([5, 20, 7, 3, 11, 7])
READINGS = {
    "unread",
    "reads-one-sequence",
    "reads-past-packed",
    "reads-first-step",
    "reads-after-end",
}


def recorded(
    module: nn.Module, x: Tensor, loss: Callable[..., Tensor], lengths: Tensor | None = None
) -> Recording:
    with gradflow.record(module, lengths=lengths) as recording:
        loss(*module(x)).backward()
    return recording


def data(*, batch_first: bool = False, padded: float | None = None) -> Tensor:
    x = torch.randn(STEPS, SEQUENCES, INPUTS)
    if padded is not None:
        for sequence, length in enumerate(LENGTHS):
            x[length:, sequence] = padded
    return x.transpose(0, 1).contiguous() if batch_first else x


def reads(analysis: Analysis, name: str) -> str:
    found = [f.name for f in analysis[name].findings if f.name in READINGS]
    assert len(found) <= 1
    return found[0] if found else ""


def first(analysis: Analysis, name: str) -> Finding:
    """The finding on what the loss reads, which stands before all others."""
    (finding,) = [f for f in analysis[name].findings if f.name in READINGS]
    assert analysis[name].findings[0] is finding
    assert analysis.findings[0].name in READINGS
    return finding


# --------------------------------------------------------------------------------- the first step


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_output_of_a_reverse_direction_is_its_first_step(
    kind: type[nn.RNNBase], layers: int, batch_first: bool
) -> None:
    module = kind(INPUTS, HIDDEN, layers, bidirectional=True, batch_first=batch_first)
    x = data(batch_first=batch_first)
    analysis = analyze(
        recorded(module, x, lambda out, _: (out[:, -1] if batch_first else out[-1]).square().sum())
    )
    top = f"l{layers - 1}_reverse"
    assert module.get_parameter(f"weight_hh_{top}").grad.abs().max() == 0  # type: ignore[union-attr]
    assert {name for name in analysis.layers if reads(analysis, name)} == {top}
    finding = first(analysis, top)
    assert "∂L/∂W_hh is exactly 0" in finding.message
    assert "is not trained" in analysis[top].sentence
    assert "first step only" in analysis[top].title
    # the line that mends it, as printed
    names = {"model": module, "x": x, "torch": torch}
    module.zero_grad()
    with gradflow.record(module) as recording:
        exec(finding.code, names)  # noqa: S102
        names["last"].square().sum().backward()  # type: ignore[attr-defined]
    assert module.get_parameter(f"weight_hh_{top}").grad.abs().max() > 0  # type: ignore[union-attr]
    assert all(not reading.kind for reading in readings(recording).values())


def test_no_bias_is_advised_or_foretold_where_nothing_is_trained() -> None:
    module = nn.LSTM(INPUTS, HIDDEN, bidirectional=True)
    run = gradflow.diagnose(module, data(), loss=lambda out: out[0][-1].sum())
    reverse = run["l0_reverse"]
    assert reverse.verdict == "vanishing"  # the layer itself
    assert [f.name for f in reverse.findings] == ["reads-first-step", "vanishing"]
    assert "bias" not in " ".join(f.advice + f.code for f in reverse.findings)
    assert reverse.predictions == ()
    assert any("bias" in f.code for f in run["l0"].findings)
    assert run["l0"].predictions


def test_from_a_start_that_is_not_zero_the_weights_see_one_step() -> None:
    module, h0 = nn.RNN(INPUTS, HIDDEN), torch.randn(1, SEQUENCES, HIDDEN)
    with gradflow.record(module) as recording:
        module(data(), h0)[0][0].sum().backward()
    assert module.weight_hh_l0.grad.abs().max() > 0
    finding = first(analyze(recording), "l0")
    assert "see this one step alone" in finding.message


def test_a_loop_over_cells_that_reads_its_first_state() -> None:
    cell = nn.GRUCell(INPUTS, HIDDEN)
    with gradflow.record(cell) as recording:
        h, outputs = None, []
        for x_t in data():
            h = cell(x_t, h)
            outputs.append(h)
        outputs[0].sum().backward()
    finding = first(analyze(recording), "cell")
    assert finding.name == "reads-first-step"
    assert cell.weight_hh.grad.abs().max() == 0
    assert finding.code.startswith("last = outputs[-1]")


# ---------------------------------------------------------------------------- past a sequence's end


@pytest.mark.parametrize("told", [True, False], ids=["lengths", "seen"])
@pytest.mark.parametrize("padding", [0.0, 0.37])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_loss_behind_the_padding(told: bool, padding: float, batch_first: bool) -> None:
    module = nn.LSTM(INPUTS, HIDDEN, 2, batch_first=batch_first)
    x = data(batch_first=batch_first, padded=padding)
    recording = recorded(
        module,
        x,
        lambda out, _: (out[:, -1] if batch_first else out[-1]).sum(),
        LENGTHS if told else None,
    )
    found = readings(recording)
    assert found["l1"].kind == "after end"
    assert found["l1"].sequences == (0, 2, 3, 4, 5)
    assert found["l1"].padding == int((STEPS - LENGTHS).median())
    assert found["l0"].kind == ""  # what the layer above passes down comes to real steps, too
    assert found["l0"].amiss
    analysis = analyze(recording)
    finding = first(analysis, "l1")
    assert f"{int((STEPS - LENGTHS).median())} steps of padding" in finding.message
    assert "bias" not in " ".join(
        f.advice + f.code for layer in analysis.values() for f in layer.findings if f is not finding
    )
    names = {"output": module(x)[0], "lengths": LENGTHS, "torch": torch}
    exec(finding.code, names)  # noqa: S102
    real = names["output"] if batch_first else names["output"].transpose(0, 1)  # type: ignore[attr-defined]
    assert torch.equal(
        names["last"], torch.stack([h[n - 1] for h, n in zip(real, LENGTHS, strict=True)])
    )  # type: ignore[arg-type]


def test_two_directions_behind_the_padding() -> None:
    module = nn.GRU(INPUTS, HIDDEN, bidirectional=True)
    x = data(padded=0.0)
    for lengths in (None, LENGTHS):
        recording = recorded(module, x, lambda out, _: out[-1].sum(), lengths)
        found = {name: reading.kind for name, reading in readings(recording).items()}
        assert found == {"l0": "after end", "l0_reverse": "first step"}
    # at its own end, but not packed: the reverse direction comes to it through the padding
    every = torch.arange(SEQUENCES)
    recorded_at_ends = recorded(module, x, lambda out, _: out[LENGTHS - 1, every].sum(), LENGTHS)
    found = readings(recorded_at_ends)
    assert (found["l0"].kind, found["l0_reverse"].kind) == ("", "first step")
    assert not found["l0_reverse"].still


def test_a_layer_that_reads_a_padded_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.upper = nn.GRU(INPUTS, HIDDEN), nn.GRU(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.upper(self.lower(x)[0])

    found = readings(recorded(Net(), data(padded=0.0), lambda out, _: out[-1].sum()))
    assert found["upper.l0"].kind == "after end"


def test_a_loop_over_cells_behind_the_padding() -> None:
    cell = nn.LSTMCell(INPUTS, HIDDEN)
    for lengths in (None, LENGTHS):
        with gradflow.record(cell, lengths=lengths) as recording:
            state = None
            for x_t in data(padded=0.0):
                state = cell(x_t, state)
            state[0].sum().backward()  # type: ignore[index]
        assert readings(recording)["cell"].kind == "after end"


# ------------------------------------------------------------------- padding that the model shows itself


class OwnCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(INPUTS + HIDDEN, HIDDEN)

    def forward(self, x_t: Tensor, h: Tensor) -> Tensor:
        return self.step(torch.cat([x_t, h], -1)).tanh()


class Looped(nn.Module):
    """A loop of some kind: over a cell, by hand, with a tap, or closed."""

    def __init__(
        self, cell: nn.Module | None, *, tapped: bool = False, closed: bool = False
    ) -> None:
        super().__init__()
        self.cell, self.tapped = cell, tapped
        self.back = nn.Linear(HIDDEN, INPUTS) if closed else None
        if cell is None:
            self.inner = nn.Linear(INPUTS, HIDDEN)
            self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, outputs = x.new_zeros(x.shape[1], HIDDEN), []
        for x_t in x:
            x_t = x_t if self.back is None else x_t + self.back(h)
            by_hand = self.cell is None
            h = (self.inner(x_t) + h @ self.weight).tanh() if by_hand else self.cell(x_t, h)
            h = gradflow.tap(h=h) if self.tapped else h
            outputs.append(h)
        return torch.stack(outputs), h


class Stack(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.lower, self.between, self.upper = (
            nn.GRU(INPUTS, HIDDEN),
            between,
            nn.GRU(HIDDEN, HIDDEN),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.upper(self.between(self.lower(x)[0]))


class Tagger(nn.Module):
    """Token ids, or rows, (B, T), to the last output of a layer."""

    def __init__(
        self,
        layer: nn.Module,
        before: nn.Module | None = None,
        *,
        padding: int | None = 0,
        backwards: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, INPUTS, padding_idx=padding)
        self.before, self.layer, self.backwards = before or nn.Identity(), layer, backwards

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        x = x if x.is_floating_point() else self.embedding(x)
        x = self.before(x)
        x = x.flip(1) if self.backwards else x
        return self.layer(x.transpose(0, 1))[0][-1]


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "cells": lambda: Looped(nn.GRUCell(INPUTS, HIDDEN)),
    "own cell": lambda: Looped(OwnCell()),
    "tap": lambda: Looped(None, tapped=True),
    "by hand": lambda: Looped(None),
    "closed": lambda: Looped(nn.GRUCell(INPUTS, HIDDEN), closed=True),
}
LAYERS = {"fused": lambda: nn.GRU(INPUTS, HIDDEN), **LOOPS}
BETWEEN: dict[str, Callable[[int], nn.Module]] = {
    "nothing": lambda width: nn.Identity(),
    "dropout": lambda width: nn.Dropout(0.4),
    "norm": nn.LayerNorm,
    "linear": lambda width: nn.Linear(width, width),
    "linear, dropout": lambda width: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2)),
}


def tokens(lengths: Tensor) -> Tensor:
    """(B, T) of which no two neighbours are alike, zeros after the end."""
    steps = torch.arange(STEPS)
    return (1 + (7 * torch.arange(len(lengths))[:, None] + steps) % 29) * (steps < lengths[:, None])


def read_of(module: nn.Module, *given: Tensor, lengths: Tensor | None = None) -> Reading:
    with gradflow.record(module, lengths=lengths) as recording:
        module(*given).sum().backward()
    found = readings(recording)
    return found[list(found)[-1]]


@pytest.mark.parametrize("padding", [0, None], ids=["padding_idx", "no padding_idx"])
@pytest.mark.parametrize("before", BETWEEN)
@pytest.mark.parametrize("layer", LAYERS)
def test_padding_of_tokens_is_seen(layer: str, before: str, padding: int | None) -> None:
    model = Tagger(LAYERS[layer](), BETWEEN[before](INPUTS), padding=padding)
    found = read_of(model, tokens(LENGTHS))
    assert found.kind == "after end"
    assert found.sequences == (0, 2, 3, 4, 5)
    assert found.padding == int((STEPS - LENGTHS).median())
    assert found.shown


@pytest.mark.parametrize("between", BETWEEN)
def test_padding_is_seen_through_what_lies_between_two_layers(between: str) -> None:
    model = Tagger(Stack(BETWEEN[between](HIDDEN)))
    with gradflow.record(model) as recording:
        model(data(batch_first=True, padded=0.0)).sum().backward()
    found = readings(recording)
    assert found["layer.upper.l0"].kind == "after end"
    assert found["layer.lower.l0"].amiss


@pytest.mark.parametrize("layer", LAYERS)
def test_padding_of_rows_is_seen(layer: str) -> None:
    assert read_of(Tagger(LAYERS[layer]()), data(batch_first=True, padded=0.0)).kind == "after end"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch", [1, 4])
def test_lengths_that_are_all_alike_are_padding_only_where_the_model_says_so(
    layer: str, batch: int
) -> None:
    ids, lengths = tokens(torch.full((batch,), 8)), torch.full((batch,), 8)
    sure = read_of(Tagger(LAYERS[layer]()), ids)
    assert (sure.kind, sure.padding) == ("after end", STEPS - 8)
    for said in (lengths, ids > 0, (ids == 0).float()):
        assert read_of(Tagger(LAYERS[layer](), padding=None), ids, said).kind == "after end"
    unsure = read_of(Tagger(LAYERS[layer](), padding=None), ids)
    assert (unsure.kind, unsure.perhaps) == ("", 8)
    whole = torch.full((batch,), STEPS)
    assert read_of(Tagger(LAYERS[layer](), padding=None), ids, lengths=whole) == Reading(
        sequences=tuple(range(batch))
    )


def test_tokens_that_end_alike_by_chance_are_no_padding() -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        ids = torch.randint(30, (STEPS, 32, 1))
        assert padding_of(ids) is None
    stuck = torch.randn(STEPS, 32, 2)
    stuck[10:, 7] = 0.5  # one sensor of many
    assert padding_of(stuck) is None


def test_what_may_be_padding_is_said_as_such_and_keeps_its_remedies() -> None:
    x = data()
    x[8:] = 0.0
    analysis = analyze(recorded(nn.LSTM(INPUTS, HIDDEN), x, lambda out, _: out[-1].sum()))
    (said,) = [words for words in analysis.warnings if "if these steps are padding" in words]
    assert "from step 9 on" in said
    assert "read step 8 instead" in said
    assert reads(analysis, "l0") == ""
    assert any("bias" in finding.code for finding in analysis["l0"].findings)
    mean = analyze(recorded(nn.LSTM(INPUTS, HIDDEN), x, lambda out, _: out.sum()))
    assert not any("padding" in words for words in mean.warnings)


@pytest.mark.parametrize("before", BETWEEN)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_loop_from_the_end_to_the_start_ends_with_real_steps(layer: str, before: str) -> None:
    for padding in (0, None):
        model = Tagger(LAYERS[layer](), BETWEEN[before](INPUTS), padding=padding, backwards=True)
        assert read_of(model, tokens(LENGTHS)).kind == ""


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.zero_(),  # autonomous
        lambda x: x[5:].zero_(),  # a delay, the same for all
        lambda x: x.mul_((torch.rand(STEPS, SEQUENCES, 1) < 0.1).float()),  # rare pulses
        lambda x: x,
    ],
    ids=["constant", "delay", "pulses", "plain"],
)
def test_no_padding_is_seen_where_there_is_none(make: Callable[[Tensor], object]) -> None:
    x = data()
    make(x)
    recording = recorded(nn.RNN(INPUTS, HIDDEN), x, lambda out, _: out[-1].sum())
    assert not readings(recording)["l0"].kind


def test_packed_or_gathered_or_averaged_batches_are_read_rightly() -> None:
    every = torch.arange(SEQUENCES)
    weights = (torch.arange(STEPS)[:, None] < LENGTHS)[..., None]
    module, x = nn.LSTM(INPUTS, HIDDEN), data(padded=0.0)
    packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    for given, loss in (
        (packed, lambda out, state: state[0].sum()),
        (x, lambda out, state: out[LENGTHS - 1, every].sum()),
        (x, lambda out, state: (out * weights).sum()),
        (x, lambda out, state: out.mean()),
    ):
        assert readings(recorded(module, given, loss))["l0"].kind == ""


def test_rows_that_packing_left_empty() -> None:
    module = nn.GRU(INPUTS, HIDDEN)
    packed = nn.utils.rnn.pack_padded_sequence(data(), LENGTHS, enforce_sorted=False)
    recording = recorded(
        module, packed, lambda out, _: nn.utils.rnn.pad_packed_sequence(out)[0][-1].sum()
    )
    finding = first(analyze(recording), "l0")
    assert finding.name == "reads-past-packed"
    assert "only 1 of 6 sequences get" in finding.message


class Settling(nn.Module):
    """Layers whose inputs come to rest: made by other recurrent layers, or by themselves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lower, self.upper = nn.LSTMCell(INPUTS, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)
        self.first, self.second = nn.GRU(INPUTS, HIDDEN), nn.GRU(HIDDEN, HIDDEN)
        self.between, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        h, zero = torch.randn(len(x), HIDDEN), x.new_zeros(60, len(x), INPUTS)
        if self.kind == "fused":
            return self.second(self.between(self.first(zero, h[None])[0]))[0][-1]
        if self.kind == "squared":  # by an operation that is not followed from step to step
            return self.second(self.first(zero, h[None])[0].softmax(-1))[0][-1]
        c = up = torch.zeros_like(h)
        for _ in range(60):
            h, c = self.lower(x, (h, c))
            up = self.upper(h, up)
            x = self.out(up) if self.kind == "closed" else torch.zeros_like(x)
        return up


@pytest.mark.parametrize("kind", ["closed", "open", "fused", "squared"])
@pytest.mark.parametrize("seed", range(4))
def test_an_input_that_comes_to_rest_is_no_padding(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Settling(kind)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 0.5  # so that it comes to rest soon
    with gradflow.record(model) as recording:
        model(torch.randn(SEQUENCES, INPUTS)).square().sum().backward()
    found = readings(recording)
    assert {name: reading.kind for name, reading in found.items() if reading.kind} == {}
    # one input, and then exact zeros: of that alone it is said with an "if"
    assert kind == "open" or not any(reading.perhaps for reading in found.values())


@pytest.mark.parametrize("factor", [0.5, 0.1, 0.01])
def test_rows_that_come_to_rest_are_no_padding(factor: float) -> None:
    start, rest = torch.randn(SEQUENCES, INPUTS), torch.randn(INPUTS)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = torch.stack([rest + start * factor**t for t in range(60)]).to(dtype)
        assert padding_of(rows) is None
        jumps = rows.clone()
        for number in range(SEQUENCES):
            jumps[5 + number :, number] = -10 * rest.to(dtype)
        if dtype != torch.bfloat16:  # where a step of rounding is as large as what is told apart
            told = padding_of(jumps)
            assert told is not None and told.lengths.tolist() == [5 + n for n in range(SEQUENCES)]


# ----------------------------------------------------------------------------------- which sequences


@pytest.mark.parametrize("batch_first", [False, True])
def test_swapped_axes(batch_first: bool) -> None:
    module = nn.LSTM(INPUTS, HIDDEN, batch_first=batch_first)
    x = data()  # of any reading: the layer takes one axis for time
    recording = recorded(module, x, lambda out, _: (out[-1] if batch_first else out[:, -1]).sum())
    analysis = analyze(recording)
    finding = first(analysis, "l0")
    steps, batch = (SEQUENCES, STEPS) if batch_first else (STEPS, SEQUENCES)
    assert finding.name == "reads-one-sequence"
    assert f"T = {steps}, B = {batch}" in finding.message
    assert finding.code.startswith(f"model.batch_first = {not batch_first}")
    assert "bias" not in " ".join(f.advice + f.code for f in analysis["l0"].findings)


def test_a_loss_that_masks_some_sequences_keeps_its_remedies() -> None:
    recording = recorded(nn.LSTM(INPUTS, HIDDEN), data(), lambda out, _: out[-1, :2].sum())
    layer = analyze(recording)["l0"]
    assert layer.findings[0].name == "reads-few-sequences"
    assert any("bias" in finding.code for finding in layer.findings)
    assert layer.sentence.startswith("l0 vanishes")


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_a_layer_that_nobody_reads() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.GRU(INPUTS, HIDDEN), nn.LSTM(INPUTS, HIDDEN)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x)[0], self.other(x)[0]

    analysis = analyze(recorded(Net(), data(), lambda one, other: one[-1].sum()))
    assert reads(analysis, "one.l0") == ""
    finding = first(analysis, "other.l0")
    assert finding.name == "unread"
    assert analysis["other.l0"].sentence.startswith("other.l0 gets no gradient at all")
    zero = analyze(recorded(Net(), data(), lambda one, other: one[-1].sum() + 0 * other.sum()))
    assert "exactly 0" in first(zero, "other.l0").message


@pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
def test_without_a_backward_nothing_is_said_of_the_loss() -> None:
    module = nn.LSTM(INPUTS, HIDDEN, bidirectional=True)
    with gradflow.record(module) as recording:
        module(data())
    assert all(not reading.kind for reading in readings(recording).values())


# -------------------------------------------------------------------------------------- 0 divided by 0


def test_no_share_of_nothing_on_the_page(tmp_path: Path) -> None:
    module = nn.LSTM(INPUTS, HIDDEN, bidirectional=True)
    analysis = analyze(recorded(module, data(), lambda out, _: out[-1].sum()))
    gradflow.report(analysis, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    of_reverse = re.sub(r"<[^>]+>", " ", text[text.index("l0_reverse: ") :])
    assert "∂L/∂W_hh is exactly 0" in text
    assert "half of ∂L/∂W_hh comes from the loss step itself" not in of_reverse
    assert "nothing lies further back" not in of_reverse
    frame = gradflow.what_if(recorded(module, data(), lambda out, _: out[-1].sum()), truncate=5)
    (note,) = frame.loc[frame.layer == "l0_reverse", "note"]
    assert note == "∂L/∂W_hh is exactly 0: there is nothing to truncate"


ODD = {
    "sparse": lambda: torch.eye(6).to_sparse(),
    "meta": lambda: torch.empty(6, 6, device="meta"),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_argument_that_is_no_plain_tensor_is_passed_by(odd: Callable[[], Tensor]) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    model = Given()
    with gradflow.record(model) as recording:
        model(torch.randn(9, 2, 3), odd()).sum().backward()
    assert not recording.notes and "rnn.l0" in recording.tracks
