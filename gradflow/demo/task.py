"""The adding task, and the demo's rule of training.

The adding task (Hochreiter & Schmidhuber 1997): every step brings a number from [0, 1) and a marker;
two steps are marked, one in each half, and the target is the sum of their numbers. Whoever always
answers 1 has a mean squared error of 1/6.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gradflow.process import fitting_threads, random_numbers_kept
from gradflow.watching import watch

TASK_STEPS, TASK_UNITS, TRAIN_BATCH = 100, 32, 64
LEARNING_RATE, CLIP_NORM, TASK_SEED = 1e-2, 1.0, 0
RNN_TRAINING = 800
LSTM_TRAINING, SOLVED, WINDOW = 2500, 0.02, 50
BASELINE = 1 / 6
PROBED = {"RNN": 50, "LSTM": 25}  # updates between two probes

Progress = Callable[[str, float], None]


class AddingModel(nn.Module):
    """One recurrent layer, and a linear layer on its last step.

    >>> AddingModel("LSTM")(torch.zeros(64, 100, 2)).shape
    torch.Size([64])
    """

    def __init__(self, cell: Literal["RNN", "LSTM"], hidden: int = TASK_UNITS) -> None:
        super().__init__()
        kinds: dict[str, type[nn.RNN | nn.LSTM]] = {"RNN": nn.RNN, "LSTM": nn.LSTM}
        self.rnn = kinds[cell](2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The predicted sum of every sequence, (B,), from x of shape (B, T, 2)."""
        output, _ = self.rnn(x)
        answer: Tensor = self.head(output[:, -1]).squeeze(1)
        return answer


def adding_batch(
    batch: int = TRAIN_BATCH, steps: int = TASK_STEPS, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sequences (B, T, 2) of numbers and markers, and their targets (B,).

    >>> x, y = adding_batch(2, 10, generator=torch.Generator().manual_seed(0))
    >>> bool((x[..., 1].sum(1) == 2).all()), bool(torch.allclose((x[..., 0] * x[..., 1]).sum(1), y))
    (True, True)
    """
    numbers = torch.rand(batch, steps, generator=generator)
    markers = torch.zeros(batch, steps)
    half, rows = steps // 2, torch.arange(batch)
    markers[rows, torch.randint(half, (batch,), generator=generator)] = 1
    markers[rows, torch.randint(half, steps, (batch,), generator=generator)] = 1
    return torch.stack([numbers, markers], dim=2), (numbers * markers).sum(1)


@dataclass(frozen=True)
class Trained:
    """A trained model, and how its training went."""

    model: AddingModel
    updates: int
    error: float  # mean squared error over the last batches


def train(
    cell: Literal["RNN", "LSTM"],
    seed: int = TASK_SEED,
    progress: Progress | None = None,
    history: Path | None = None,
) -> Trained:
    """Train one model by the demo's rule; the global random state is left as found.

    With a folder for its ``history``, some updates are measured by `gradflow.watch`.
    """
    with random_numbers_kept():
        torch.default_generator.manual_seed(seed)
        model = AddingModel(cell)
    # matrices this small are slower on several threads, and rounding would depend on their number
    with fitting_threads(TASK_UNITS):
        batches = torch.Generator().manual_seed(seed)
        if history is None:
            return _train(cell, model, batches, progress)
        watching = watch(model, history, every=PROBED[cell], budget=None, on=_unsaid)
        try:
            return _train(cell, model, batches, progress)
        finally:
            watching.close()


def _unsaid(_: object) -> None:
    """The demo says itself what happened, at its end."""


def _train(
    cell: str, model: AddingModel, generator: torch.Generator, progress: Progress | None
) -> Trained:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    most = RNN_TRAINING if cell == "RNN" else LSTM_TRAINING
    errors: deque[float] = deque(maxlen=WINDOW)
    update = 0
    for update in range(1, most + 1):
        x, y = adding_batch(generator=generator)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        errors.append(loss.item())
        mean = math.fsum(errors) / len(errors)
        if progress is not None:
            progress(f"training the {cell}: error {mean:.4f}", update / most)
        if cell == "LSTM" and len(errors) == WINDOW and mean < SOLVED:
            break
    return Trained(model, update, mean)
