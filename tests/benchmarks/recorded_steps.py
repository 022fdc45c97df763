"""What recording costs: one training step with it, against the plain step and a loop of cells.

The recorded step is forward, loss, backward and optimizer step inside `gradflow.record`, and then
every track's ∂L/∂h_t and ∂L/∂c_t are read. The loop is what people write to see the same numbers:
`nn.LSTMCell` step by step with `retain_grad` on every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

import gradflow
from benchmarks.rows import Row, ratio_row
from benchmarks.timing import in_pairs

MODULES = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
CELLS = {"RNN": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell}


@dataclass(frozen=True)
class Case:
    """One shape of a recurrent model."""

    cell: str = "LSTM"
    hidden: int = 128
    steps: int = 100
    batch: int = 16
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    inputs: int = 32


BASE = Case()
CASES = [
    *[replace(BASE, cell=cell) for cell in MODULES],
    *[replace(BASE, hidden=hidden) for hidden in (32, 64, 256, 512)],
    *[replace(BASE, steps=steps) for steps in (50, 200, 1000)],
    *[replace(BASE, cell=cell, layers=3) for cell in MODULES],
    replace(BASE, bidirectional=True),
    replace(BASE, packed=True),
    replace(BASE, layers=3, bidirectional=True, packed=True),
]
QUICK = [Case(cell=cell, hidden=8, steps=6, batch=2) for cell in MODULES] + [
    Case(hidden=8, steps=6, batch=2, layers=2, bidirectional=True, packed=True)
]


class Step:
    """A training step on fixed data, plain or recorded."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = MODULES[case.cell](
            case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional
        )
        self.head = nn.Linear(case.hidden * (1 + case.bidirectional), 1)
        parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4)
        self.data = torch.randn(case.steps, case.batch, case.inputs)
        lengths = torch.linspace(case.steps, max(1, case.steps // 2), case.batch).long()
        self.given: object = self.data
        if case.packed:
            self.given = nn.utils.rnn.pack_padded_sequence(self.data, lengths)

    def plain(self) -> None:
        """Forward, a loss at every step, backward, optimizer step."""
        self.optimizer.zero_grad()
        output, _ = self.model(self.given)
        flat = output.data if self.case.packed else output
        self.head(flat).square().mean().backward()
        self.optimizer.step()

    def recorded(self, exact: bool = True) -> None:
        """The same inside a recording, and its totals read."""
        with gradflow.record(self.model, exact=exact) as recording:
            self.plain()
        for track in recording.tracks.values():
            read(track.grads)

    def loop(self) -> None:
        """The same model, one layer, as a loop over a cell that keeps every state's gradient."""
        cell = self.cell
        h = torch.zeros(self.case.batch, self.case.hidden)
        state: Tensor | tuple[Tensor, Tensor] = (h, h) if self.case.cell == "LSTM" else h
        kept: list[Tensor] = []
        outputs = []
        for x in self.data:
            state = cell(x, state)
            states = state if isinstance(state, tuple) else (state,)
            for tensor in states:
                tensor.retain_grad()
            kept += states
            outputs.append(states[0])
        self.loop_optimizer.zero_grad()
        self.head(torch.stack(outputs)).square().mean().backward()
        self.loop_optimizer.step()
        assert all(tensor.grad is not None for tensor in kept[:-1])

    @property
    def cell(self) -> nn.Module:
        """The one-layer model's cell, with the same weights."""
        if not hasattr(self, "_cell"):
            self._cell = CELLS[self.case.cell](self.case.inputs, self.case.hidden)
            for name, weight in self._cell.named_parameters():
                weight.data.copy_(getattr(self.model, f"{name}_l0").detach())
            parameters = [*self._cell.parameters(), *self.head.parameters()]
            self.loop_optimizer = torch.optim.SGD(parameters, lr=1e-4)
        return self._cell


def read(grads: dict[str, Tensor]) -> None:
    """Touch the gradients, so that whatever is lazy has happened."""
    for grad in grads.values():
        assert grad.shape[0] > 0


def measure(*, quick: bool = False) -> Iterator[Row]:
    """Every case against the plain step, one-layer ones against the loop too."""
    for case in QUICK if quick else CASES:
        step = Step(case)
        pairs = 2 if quick else (31 if case.steps * case.hidden * case.layers <= 40_000 else 11)
        shape = asdict(case)
        ratio = in_pairs(step.recorded, step.plain, pairs=pairs)
        yield ratio_row("recording", "recorded step against the plain step", ratio, shape, most=2.5)
        if case.layers > 1:
            ratio = in_pairs(lambda: step.recorded(exact=False), step.plain, pairs=pairs)  # noqa: B023
            what = "step recorded with exact=False against the plain step"
            yield ratio_row("recording", what, ratio, shape)
        if case.layers == 1 and not case.bidirectional and not case.packed:
            ratio = in_pairs(step.loop, step.recorded, pairs=max(2, pairs // 3))
            what = "loop over cells with retain_grad against the recorded step"
            yield ratio_row("recording", what, ratio, shape)
