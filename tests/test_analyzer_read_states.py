"""Gains are of what the loss reads: a counter that nobody reads has no vote, whatever else does.

Oracle: products of Jacobians by autograd of the step with the unread state held fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from seam import read_part
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import analyze, step_jacobians
from gradflow.recording import Recording

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning"),
]
STEPS, SEQUENCES, INPUTS, HIDDEN, PLACES = 12, 3, 2, 6, 4


class Decoder(nn.Module):
    """A cell that attends, and carries what it attended to so far; the coverage may be read."""

    def __init__(self, *, reads_coverage: bool = False) -> None:
        super().__init__()
        self.reads_coverage = reads_coverage
        self.new = nn.Linear(INPUTS + 2 * HIDDEN, HIDDEN)
        self.query = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor, coverage: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        scores = (memory * self.query(h)[:, None]).sum(-1)
        if self.reads_coverage:
            scores = scores - coverage
        weights = scores.softmax(-1)
        context = (weights[..., None] * memory).sum(1)
        return self.new(torch.cat([x, context, h], -1)).tanh(), coverage + weights


def decoded(cell: Decoder, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Recording, Tensor]:
    cell.double()
    x = torch.randn(STEPS, SEQUENCES, INPUTS).double()
    memory = torch.randn(SEQUENCES, PLACES, HIDDEN).double()
    h, coverage = x.new_zeros(SEQUENCES, HIDDEN), x.new_zeros(SEQUENCES, PLACES)
    started, products = h[0], torch.eye(HIDDEN).double()
    with gradflow.record(cell) as recording:
        for x_t in x:
            h, coverage = cell(x_t, h, coverage, memory)
        loss(h, coverage).backward()
    for t, x_t in enumerate(x):  # the first sequence, its coverage held fixed

        def step(state: Tensor, x_t: Tensor = x_t) -> Tensor:
            nothing = coverage.new_zeros(1, PLACES)
            return cell(x_t[:1], state[None], nothing, memory[:1])[0][0]

        jacobian = torch.autograd.functional.jacobian(step, started)
        products = jacobian @ products if t else products
        started = step(started).detach()
    return recording, torch.linalg.matrix_norm(products, 2).log()


def test_coverage_that_nobody_reads_has_no_vote() -> None:
    recording, expected = decoded(Decoder(), lambda h, coverage: h.square().sum())
    assert recording["cell"].grads["coverage"].abs().max() == 0
    analysis = analyze(recording, sequences=[0])
    layer = analysis["cell"]
    whole = layer.data["log_gain"].sel(norm="spectral", source=0, target=STEPS - 1).item()
    assert whole == pytest.approx(float(expected), rel=1e-6)
    assert layer.size == HIDDEN
    assert layer.rate.high < 0  # that of the coverage is 0
    (note,) = [note for note in analysis.warnings if "coverage" in note]
    assert "no vote" in note
    assert analysis.warnings.count(note) == 1
    assert set(recording["cell"].states) == {"h", "coverage"}  # the recording keeps it


def test_coverage_that_the_cell_or_the_loss_reads_votes() -> None:
    for cell, loss in (
        (Decoder(reads_coverage=True), lambda h, coverage: h.square().sum()),
        (Decoder(), lambda h, coverage: h.sum() + 1e-9 * coverage.square().sum()),
    ):
        recording, _ = decoded(cell, loss)
        track = recording["cell"]
        assert read_part(track).judged is track
        assert analyze(recording)["cell"].size == HIDDEN + PLACES


def looped(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], at: int = STEPS) -> Recording:
    """A marked loop over (h, n), both 3 wide, whose loss reads h after so many steps."""
    weight = torch.full((), 0.5, requires_grad=True)
    h, n, read = torch.ones(2, 3) * weight, torch.zeros(2, 3) * weight, None
    with gradflow.record(nn.Linear(1, 1)) as recording:
        for t in range(STEPS):
            h, n = gradflow.tap(**dict(zip(("h", "n"), step(h, n), strict=True)))
            read = h if t + 1 == at else read
        assert read is not None
        read.square().sum().backward()
    return recording


@pytest.mark.parametrize(
    ("step", "unread"),
    [
        (lambda h, n: (0.5 * h, n + 1), "n"),  # a clock
        (lambda h, n: (0.5 * h, 2 * n + h), "n"),  # sums up, and blows up
        (lambda h, n: (0.5 * h, n), "n"),  # passed through
        (lambda h, n: (0.5 * h + 0.1 * n, n), ""),  # passed through, and used
        (lambda h, n: (0.5 * h + 0.0 * n, n), "n"),  # multiplied by zero
        (lambda h, n: (torch.cat([0.5 * h[:, :2], h[:, 2:]], 1), n + h), "n"),
    ],
    ids=["clock", "sum", "passed", "used", "times zero", "two rates"],
)
def test_what_flows_into_the_loss_votes(
    step: Callable[..., tuple[Tensor, Tensor]], unread: str
) -> None:
    part = read_part(looped(step)["loop"])
    assert part.unread == unread
    assert list(part.judged.states) == (["h"] if unread else ["h", "n"])
    jacobians = step_jacobians(part.judged)
    whole = step_jacobians(looped(step)["loop"])
    width = jacobians.shape[-1]
    assert torch.equal(jacobians, whole[..., :width, :width])


def test_a_state_that_is_read_later_than_the_loss_acts_votes() -> None:
    # the loss reads the first step only, so every later total is 0 by construction
    track = looped(lambda h, n: (0.5 * h + n, 0.9 * n), at=1)["loop"]
    assert track.grads["n"].abs().max() == 0
    assert read_part(track).judged is track


def test_single_entries_of_one_tensor() -> None:
    def step(h: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([0.5 * h[:, :2], h[:, 2:] + 1], 1), n

    weight = torch.full((), 0.5, requires_grad=True)
    h = torch.ones(2, 3) * weight
    with gradflow.record(nn.Linear(1, 1)) as recording:
        for _ in range(STEPS):
            h = gradflow.tap(h=step(h, h)[0])
        h[:, :2].square().sum().backward()
    track = recording["loop"]
    part = read_part(track)
    assert part.unread == "entry 3 of h"
    assert part.shown is track  # pictures count its units as they are
    layer = analyze(recording)["loop"]
    assert (layer.verdict, layer.size) == ("vanishing", 2)
    assert layer.half_life == pytest.approx(1.0)
    assert layer.data["memory_steps"].shape[1] == 3


def test_dead_units_are_a_fault_and_no_unread_state() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(INPUTS + HIDDEN, HIDDEN)
            nn.init.constant_(self.both.bias, -50.0)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.both(torch.cat([x, h], 1)).relu()

    cell, h = Cell(), torch.zeros(SEQUENCES, HIDDEN)
    with gradflow.record(cell) as recording:
        for x_t in torch.randn(STEPS, SEQUENCES, INPUTS):
            h = cell(x_t, h)
        h.sum().backward()
    assert read_part(recording["cell"]).unread == ""
    assert analyze(recording)["cell"].verdict == "dead"


def test_wide_states_are_told_apart_as_a_whole() -> None:
    weight = torch.full((), 0.9, requires_grad=True)
    h, n = torch.ones(2, 50) * weight, torch.zeros(2, 50) * weight
    with gradflow.record(nn.Linear(1, 1), jacobians=True) as recording:
        for _ in range(5):
            h, n, _ = gradflow.tap(h=0.9 * h.roll(1, 1), n=n + h, m=0.1 * h)
        h.sum().backward()
    part = read_part(recording["loop"])
    assert part.unread == "n and m"
    assert list(part.judged.states) == ["h"]


def test_without_a_backward_every_state_votes() -> None:
    with gradflow.record(nn.Linear(1, 1)) as recording:
        h, n = torch.ones(2, 3, requires_grad=True) * 1.0, torch.zeros(2, 3)
        for _ in range(STEPS):
            h, n = gradflow.tap(h=0.5 * h, n=n + h)
    assert read_part(recording["loop"]).unread == ""


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_torchs_own_layers_are_left_as_they_are(kind: type[nn.RNNBase]) -> None:
    module = kind(INPUTS, HIDDEN)
    with gradflow.record(module) as recording:
        module(torch.randn(STEPS, SEQUENCES, INPUTS))[0][-1, :, :2].sum().backward()
    track = recording["l0"]
    assert read_part(track).judged is track
