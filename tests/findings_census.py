"""Healthy and sick models of every kind, as data, and how often findings get them right.

    python tests/findings_census.py [SEEDS]

A healthy model must be stable over its span without a finding; a sick one must get the findings it
is `expected` to have and none but those it `may` have besides.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradflow
from gradflow.analysis import Analysis, Finding
from gradflow.errors import GradflowWarning

STEPS, SEQUENCES, INPUTS, HIDDEN = 40, 6, 2, 16
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Visit:
    """One model with its input, as it was run."""

    model: nn.Module
    x: Tensor
    analysis: Analysis

    @property
    def names(self) -> set[str]:
        return {finding.name for finding in self.findings}

    @property
    def findings(self) -> list[Finding]:
        return self.analysis.findings


@dataclass(frozen=True)
class Patient:
    """A model whose state of health is known; `visit` makes it from a seed and analyzes it."""

    name: str
    visit: Callable[[], Visit]
    expected: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name

    @property
    def healthy(self) -> bool:
        return not self.expected

    def seen(self, seed: int) -> Visit:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradflowWarning)
            return self.visit()

    def complaint(self, visit: Visit) -> str:
        """What the findings get wrong, "" if nothing."""
        wrong = []
        if missed := self.expected - visit.names:
            wrong.append(f"missed {', '.join(sorted(missed))}")
        if extra := visit.names - self.expected - self.may:
            wrong.append(f"found {', '.join(sorted(extra))}")
        verdicts = {layer.verdict for layer in visit.analysis.values()}
        if self.healthy and verdicts != {"stable"}:
            wrong.append(f"verdict {', '.join(sorted(verdicts))}")
        return "; ".join(wrong)


# ------------------------------------------------------------------------------- making models


class Scan(nn.Module):
    """A linear recurrence with given decays (T, ...), with keys a delta rule; its states are marked."""

    def __init__(self, decay: Tensor, keys: Tensor | None = None) -> None:
        super().__init__()
        self.decay, self.keys = decay, keys
        self.write = nn.Parameter(torch.randn(SEQUENCES, *decay.shape))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h, states = torch.zeros_like(self.write[:, 0]), []
        for t, a in enumerate(self.decay):
            h = a * h
            if self.keys is not None:
                k = self.keys[:, t].unsqueeze(-1)
                h = h - k * (k * h).sum(-2, keepdim=True)
            h = h + x[t].mean() * self.write[:, t]
            states.append(h)
        decay = self.decay.expand(SEQUENCES, *self.decay.shape)
        marked = gradflow.scan(torch.stack(states, 1), decay=decay, keys=self.keys, time=1)
        return (marked.movedim(1, 0),)


def decays(*values: float) -> Tensor:
    """The same decays at every step, (T, entries)."""
    return torch.tensor(values).expand(STEPS, -1)


def erasing() -> Visit:
    """Two heads of three keys and two values; β = 1, of unit keys."""
    keys = nn.functional.normalize(torch.randn(SEQUENCES, STEPS, 2, 3), dim=-1)
    return run(Scan(torch.full((STEPS, 2, 1, 1), 0.8), keys))


def last(output: Tensor) -> Tensor:
    return output[-1].sum()


def every(output: Tensor) -> Tensor:
    return output.square().mean()


def run(module: nn.Module, x: Tensor | None = None, loss: Loss | None = last) -> Visit:
    """One forward and backward pass of a fused module, analyzed."""
    x = noise() if x is None else x
    with gradflow.record(module) as recording:
        output = module(x)[0]
        if loss is not None:
            loss(output).backward()
    return Visit(module, x, gradflow.analyze(recording))


def noise(scale: float = 1.0, steps: int = STEPS) -> Tensor:
    return scale * torch.randn(steps, SEQUENCES, INPUTS)


def rnn(fill: Callable[[Tensor], object], kind: str = "tanh", bias: bool = False) -> nn.RNN:
    """A vanilla RNN whose recurrent weights `fill` sets in place."""
    module = nn.RNN(INPUTS, HIDDEN, nonlinearity=kind, bias=bias)
    with torch.no_grad():
        fill(module.weight_hh_l0)
    return module


def orthogonal(gain: float = 1.0) -> Callable[[Tensor], object]:
    return lambda weight: nn.init.orthogonal_(weight, gain)


def keeping(module: nn.RNNBase | nn.RNNCellBase, bias: float = 6.0) -> nn.Module:
    """Second gate block, f of an LSTM or z of a GRU, biased; recurrent weights small."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("bias_ih"):
                hidden = len(weight) // (4 if "LSTM" in type(module).__name__ else 3)
                weight[hidden : 2 * hidden] = bias
            if name.startswith("weight_hh"):
                weight *= 0.3
    return module


def chrono(span: int) -> nn.LSTM:
    module = nn.LSTM(INPUTS, HIDDEN)
    with torch.no_grad():
        module.bias_hh_l0.zero_()
        module.bias_ih_l0[HIDDEN : 2 * HIDDEN].uniform_(span / 2, 2 * span).log_()
        module.bias_ih_l0[:HIDDEN] = -module.bias_ih_l0[HIDDEN : 2 * HIDDEN]
        module.weight_hh_l0 *= 0.3
        module.weight_ih_l0 *= 0.3
    return module


class Loop(nn.Module):
    """A hand-written linear loop h' = A h + B x that marks its states."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.read = nn.Linear(INPUTS, len(matrix))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = torch.zeros(x.shape[1], len(self.matrix))
        outputs = []
        for x_t in x:
            h = gradflow.tap(h=h @ self.matrix.T + self.read(x_t))
            outputs.append(h)
        return (torch.stack(outputs),)


class CellLoop(nn.Module):
    """A loop over a cell, its state detached every `window` steps."""

    def __init__(self, cell: nn.Module, window: int = 10**6) -> None:
        super().__init__()
        self.cell, self.window = cell, window

    def forward(self, x: Tensor) -> tuple[Tensor]:
        state, outputs = None, []
        for t, x_t in enumerate(x):
            if state is not None and t % self.window == 0:
                state = (
                    tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
                )
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return (torch.stack(outputs),)


class CoupledCell(nn.Module):
    """A cell of the user's own: h' = f ⊙ h + (1 − f) ⊙ tanh, its forget gate biased."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.both = nn.Linear(INPUTS + HIDDEN, 2 * HIDDEN)
        with torch.no_grad():
            self.both.weight *= 0.3
            self.both.bias[:HIDDEN] = bias

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        h = x.new_zeros(len(x), HIDDEN) if state is None else state
        forget, new = self.both(torch.cat([x, h], 1)).chunk(2, 1)
        return forget.sigmoid() * h + (1 - forget.sigmoid()) * new.tanh()


def trained(module: nn.RNNBase) -> nn.RNNBase:
    """Taught in a second to remember the sign of its first input over all steps."""
    head = nn.Linear(module.hidden_size, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=2e-2)
    for _ in range(30):
        x = noise()
        target = (x[0, :, :1] > 0).float()
        optimizer.zero_grad()
        output = head(module(x)[0][-1])
        nn.functional.binary_cross_entropy_with_logits(output, target).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return module


def packed() -> Visit:
    lengths = torch.tensor([40, 38, 40, 36, 40, 39])
    x = nn.utils.rnn.pack_padded_sequence(noise(), lengths, enforce_sorted=False)
    module = keeping(nn.LSTM(INPUTS, HIDDEN))
    with gradflow.record(module) as recording:
        module(x)[1][0].sum().backward()
    return Visit(module, noise(), gradflow.analyze(recording))


def zero_padded() -> Tensor:
    x = noise()
    for sequence, length in enumerate([12, 40, 9, 23, 40, 17]):
        x[length:, sequence] = 0.0
    return x


def packed_and_read_at_the_end() -> Visit:
    lengths = torch.tensor([40, 38, 40, 36, 40, 39])
    x = nn.utils.rnn.pack_padded_sequence(noise(), lengths, enforce_sorted=False)
    module = keeping(nn.LSTM(INPUTS, HIDDEN))
    with gradflow.record(module) as recording:
        nn.utils.rnn.pad_packed_sequence(module(x)[0])[0][-1].sum().backward()
    return Visit(module, noise(), gradflow.analyze(recording))


def always_on() -> Visit:
    """An identity ReLU RNN whose units never reach 0; with signed input every unit dies early."""
    module = rnn(nn.init.eye_, "relu")
    with torch.no_grad():
        module.weight_ih_l0.abs_()
    return run(module, noise(0.1).abs())


# ----------------------------------------------------------------------------- breaking models


def with_idle_units() -> Visit:
    module = rnn(lambda weight: weight.copy_(0.7 * torch.eye(HIDDEN)), "relu", bias=True)
    with torch.no_grad():
        module.bias_ih_l0[:] = 1.0
        module.bias_ih_l0[3:] = -50.0
    return run(module)


def dead_relu() -> Visit:
    module = rnn(orthogonal(), "relu", bias=True)
    with torch.no_grad():
        module.bias_ih_l0 -= 50
    return run(module)


def broken_weight() -> Visit:
    module = nn.LSTM(INPUTS, HIDDEN)
    with torch.no_grad():
        module.weight_hh_l0[3, 2] = torch.nan
    return run(module)


def broken_input() -> Visit:
    x = noise()
    x[7, 2] = torch.inf
    x[8, 2] = torch.nan
    return run(nn.GRU(INPUTS, HIDDEN), x)


def broken_loss() -> Visit:
    module = rnn(orthogonal())
    x = noise(1e-3)
    x[0] = 0.0  # so that h_1 = 0, where a square root has no slope
    return run(module, x, lambda output: output[0].square().sum().sqrt() + output[-1].sum())


def non_normal(weight: Tensor) -> None:
    weight.copy_(0.5 * torch.eye(HIDDEN) + 1.3 * torch.diag(torch.ones(HIDDEN - 1), 1))


def one_direction(weight: Tensor) -> None:
    direction = nn.functional.normalize(torch.randn(HIDDEN), dim=0)
    weight.copy_(1.3 * torch.outer(direction, direction) + 0.05 * torch.randn(HIDDEN, HIDDEN))


def walled() -> Visit:
    """Forget gates wide open but at two steps, whose input shuts them."""
    module = keeping(nn.LSTM(INPUTS, HIDDEN))
    x = noise()
    x[..., 0] = 0.0
    x[[20, 31], :, 0] = 1.0
    with torch.no_grad():
        module.weight_ih_l0[HIDDEN : 2 * HIDDEN, 0] = -15.0
    return run(module, x)


def silent_layer() -> Visit:
    module = keeping(nn.LSTM(INPUTS, HIDDEN, num_layers=2))
    with torch.no_grad():
        module.weight_ih_l1 *= 1e-5
    return run(module)


def drowned_cells() -> Visit:
    module = nn.LSTM(INPUTS, 32)
    nn.init.normal_(module.weight_hh_l0, std=1.5)
    return run(module, noise(0.1))


def shut_gates() -> Visit:
    module = keeping(nn.LSTM(INPUTS, HIDDEN), -2.0)
    with torch.no_grad():
        module.bias_ih_l0[:HIDDEN] = -8.0
    return run(module)


def chaotic() -> Visit:
    module = nn.RNN(INPUTS, 64, bias=False)
    nn.init.normal_(module.weight_hh_l0, std=3 / 8)
    return run(module, noise(0.1))


# ----------------------------------------------------------------------------------- the census

HEALTHY = [
    Patient("orthogonal tanh RNN", lambda: run(rnn(orthogonal()), noise(1e-3))),
    Patient("orthogonal tanh RNN, larger input", lambda: run(rnn(orthogonal()), noise(0.03))),
    Patient("identity ReLU RNN, always on", always_on),
    Patient("LSTM, forget bias", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN)))),
    Patient("LSTM, forget gates at 1", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN), 100.0))),
    Patient("LSTM, half a decade lost", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN), 4.2))),
    Patient(
        "LSTM, a loss at every step", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN)), loss=every)
    ),
    Patient("LSTM, no backward", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN)), loss=None)),
    Patient("LSTM, chrono", lambda: run(chrono(STEPS))),
    Patient("LSTM, projection", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN, proj_size=5)))),
    Patient("LSTM, two layers", lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN, num_layers=2)))),
    Patient("LSTM, packed", packed),
    Patient("LSTM, trained", lambda: run(trained(keeping(nn.LSTM(INPUTS, HIDDEN), 5.0)))),
    Patient("LSTMCell in a loop", lambda: run(CellLoop(keeping(nn.LSTMCell(INPUTS, HIDDEN))))),
    Patient("GRU, update bias", lambda: run(keeping(nn.GRU(INPUTS, HIDDEN)))),
    Patient(
        "GRU, two directions",
        lambda: run(keeping(nn.GRU(INPUTS, HIDDEN, bidirectional=True)), loss=every),
    ),
    Patient("GRU, trained", lambda: run(trained(keeping(nn.GRU(INPUTS, HIDDEN), 5.0)))),
    Patient("GRUCell in a loop", lambda: run(CellLoop(keeping(nn.GRUCell(INPUTS, HIDDEN))))),
    Patient("coupled cell of one's own", lambda: run(CellLoop(CoupledCell(6.0)))),
    Patient("tapped sum", lambda: run(Loop(torch.eye(4)))),
    Patient("tapped rotation", lambda: run(Loop(nn.init.orthogonal_(torch.empty(4, 4))))),
]


def sick(name: str, visit: Callable[[], Visit], expected: str, may: str = "") -> Patient:
    return Patient(name, visit, frozenset(expected.split()), frozenset(may.split()))


FACTORS = "weights-contract activations-contract"
SICK = [
    sick("default RNN", lambda: run(nn.RNN(INPUTS, HIDDEN)), "vanishing", FACTORS),
    sick(
        "contracting RNN",
        lambda: run(rnn(orthogonal(0.5)), noise(0.1)),
        "vanishing weights-contract",
    ),
    sick(
        "saturated inputs",
        lambda: run(rnn(orthogonal()), noise(30.0)),
        "vanishing saturated-activations activations-contract",
    ),
    sick(
        "default LSTM",
        lambda: run(nn.LSTM(INPUTS, HIDDEN)),
        "vanishing forget-gates-leak",
    ),
    sick(
        "closed forget gates",
        lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN), -3.0)),
        "vanishing forget-gates-leak",
    ),
    sick("shut input gates", shut_gates, "vanishing forget-gates-leak saturated-gates"),
    sick("default GRU", lambda: run(nn.GRU(INPUTS, HIDDEN)), "vanishing update-gates-overwrite"),
    sick(
        "overwriting GRU",
        lambda: run(keeping(nn.GRU(INPUTS, HIDDEN), -3.0)),
        "vanishing update-gates-overwrite",
    ),
    sick(
        "default stack, two directions",
        lambda: run(nn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True), loss=every),
        "vanishing forget-gates-leak",
    ),
    sick(
        "last step of two directions",
        lambda: run(keeping(nn.GRU(INPUTS, HIDDEN, bidirectional=True))),
        "reads-first-step",
    ),
    sick(
        "padding before the last step",
        lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN)), zero_padded()),
        "reads-after-end",
    ),
    sick("packed, padding read", packed_and_read_at_the_end, "reads-past-packed"),
    sick(
        "time and batch swapped",
        lambda: run(keeping(nn.LSTM(INPUTS, HIDDEN)), loss=lambda output: output[:, -1].sum()),
        "reads-one-sequence",
    ),
    sick(
        "a loss over two sequences of six",
        lambda: run(keeping(nn.GRU(INPUTS, HIDDEN)), loss=lambda output: output[-1, 1:3].sum()),
        "reads-few-sequences",
    ),
    sick(
        "a loss times zero",
        lambda: run(keeping(nn.GRU(INPUTS, HIDDEN)), loss=lambda output: 0 * output.sum()),
        "unread",
    ),
    sick("two walls", walled, "vanishing walls"),
    sick(
        "expanding RNN",
        lambda: run(rnn(orthogonal(1.5)), noise(1e-12)),
        "exploding weights-expand",
    ),
    sick("chaotic RNN", chaotic, "exploding weights-expand"),
    sick(
        "LSTM drowned by h",  # near the edge of chaos: explodes, or grows and is open
        drowned_cells,
        "hidden-paths-drown-cell",
        "exploding transient-growth",
    ),
    sick(
        "one direction of many",
        lambda: run(rnn(one_direction), noise(1e-9)),
        "exploding weights-expand few-channels",
    ),
    sick(
        "non-normal RNN",
        lambda: run(rnn(non_normal), noise(1e-9, 120)),
        "vanishing transient-growth weights-contract",
    ),
    sick("dead ReLU", dead_relu, "dead"),
    sick("idle ReLU units", with_idle_units, "vanishing idle-units", FACTORS),
    sick(
        "cut every 13 steps",
        lambda: run(CellLoop(keeping(nn.LSTMCell(INPUTS, HIDDEN)), 13)),
        "cut",
    ),
    sick(
        "cut and contracting",
        lambda: run(CellLoop(nn.GRUCell(INPUTS, HIDDEN), 25)),
        "cut vanishing update-gates-overwrite",
    ),
    sick("lost between layers", silent_layer, "lost-between-layers"),
    sick(
        "lost in depth",
        lambda: run(nn.LSTM(INPUTS, HIDDEN, 7)),
        "vanishing forget-gates-leak lost-in-depth",
    ),
    sick("one step", lambda: run(nn.LSTM(INPUTS, HIDDEN), noise(steps=1)), "no-recurrence"),
    sick(
        "a cell called once",
        lambda: run(CellLoop(nn.GRUCell(INPUTS, HIDDEN)), noise(steps=1)),
        "no-recurrence",
    ),
    sick("NaN weight", broken_weight, "not-finite"),
    sick("infinite input", broken_input, "not-finite"),
    sick("NaN in the backward only", broken_loss, "not-finite"),
    sick(
        "beyond float32",
        lambda: run(rnn(orthogonal(0.1)), noise(0.1, 80)),
        "vanishing weights-contract",
    ),
    sick("forgetful cell of one's own", lambda: run(CellLoop(CoupledCell(-1.0))), "vanishing"),
    sick("decaying tap", lambda: run(Loop(0.5 * torch.eye(4))), "vanishing linear-recurrence"),
    sick("growing tap", lambda: run(Loop(1.4 * torch.eye(4))), "exploding linear-recurrence"),
    sick(
        "decays of nearly 0", lambda: run(Scan(decays(1e-5, 0.7, 0.8))), "vanishing forgets-at-once"
    ),
    sick(
        "decays of 1 beside one that grows",
        lambda: run(Scan(decays(0.99999, 0.99999, 0.99999, 1.1))),
        "exploding never-forgets",
    ),
    sick(
        "decays at a bound",
        lambda: run(Scan(torch.empty(STEPS, 8).uniform_(0.4, 0.8).clamp(min=0.5452))),
        "vanishing decay-at-bound",
    ),
    sick("a delta rule that overwrites", erasing, "vanishing erasing-heads"),
]
PATIENTS = [*HEALTHY, *SICK]


def main(seeds: int = 5) -> None:
    """Print how often the findings are right, patient by patient."""
    right = {True: 0, False: 0}
    print(f"{'patient':<34}{'right':>7}  findings of the first seed; what went wrong")
    for patient in PATIENTS:
        visits = [patient.seen(seed) for seed in range(seeds)]
        complaints = [patient.complaint(visit) for visit in visits]
        right[patient.healthy] += sum(not complaint for complaint in complaints)
        said = ", ".join(sorted(visits[0].names)) or "none"
        wrong = "".join(f"\n    seed {i}: {text}" for i, text in enumerate(complaints) if text)
        print(f"{patient.name:<34}{complaints.count(''):>3} / {seeds}  {said}{wrong}")
    for healthy, patients in ((True, HEALTHY), (False, SICK)):
        kind = "healthy models without a finding" if healthy else "sick models told rightly"
        print(f"{kind}: {right[healthy]} of {len(patients) * seeds}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(int(argument) for argument in sys.argv[1:]))
