"""The demo: an RNN and an LSTM learn to add two numbers 100 steps apart; one of them can.

The adding task (Hochreiter & Schmidhuber 1997): every step brings a number from [0, 1) and a marker;
two steps are marked, one in each half, and the target is the sum of their numbers. Whoever always
answers 1 has a mean squared error of 1/6.

`run_demo` trains both models, saves them, analyzes the files and compares both trainings. What it calls
is imported there: whoever reads a model of the demo back loads no more than the model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from gradflow.process import fitting_threads, random_numbers_kept

if TYPE_CHECKING:
    from gradflow.analysis import Analysis
    from gradflow.history import History

TASK_STEPS, TASK_UNITS, TRAIN_BATCH = 100, 32, 64
LEARNING_RATE, CLIP_NORM, TASK_SEED = 1e-2, 1.0, 0
RNN_TRAINING = 500
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
        from gradflow.watching import watch

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


Cell = Literal["RNN", "LSTM"]
DEMO_CELLS: tuple[Cell, ...] = ("RNN", "LSTM")
FRESH = 12345  # seed of the batch that neither model was trained on
DEMO_FOLDER = Path("gradflow-demo")
YOUR_TURN = """\
torch.save(model.state_dict(), "model.pt")              # in your training code
torch.save({"input": x, "target": y}, "batch.pt")       # one batch
gradflow analyze model.pt --model 'your_code:Net(10, 20)' --input batch.pt
gradflow.watch(model, "runs/a")                         # before your loop; then: gradflow watch runs/a"""


def run_demo(progress: Progress) -> str:
    """Train, save, analyze and compare; return what to print. The folder appears whole or not."""
    from gradflow import reporter
    from gradflow.history import History

    folder = reporter.free_folder(DEMO_FOLDER)
    runs, trained = {}, {}
    with reporter.whole_folder(folder) as work:
        for number, cell in enumerate(DEMO_CELLS):

            def part(what: str, done: float, start: float = number / 2) -> None:
                progress(what, start + done / 2)

            trained[cell] = train(
                cell,
                progress=lambda what, done: part(what, 0.8 * done),
                history=work / cell.lower() / "training",
            )
            part(f"analyzing the {cell}", 0.85)
            runs[cell] = _analyze(cell, trained[cell], work / cell.lower())
        figure = reporter.plot(list(runs.values()))
        (work / "comparison.png").write_bytes(reporter.png(figure))
        histories = {cell: History.read(work / cell.lower() / "training") for cell in DEMO_CELLS}
        waterfall = reporter.plot_histories(list(histories.values()), names=[*histories])
        (work / "waterfall.png").write_bytes(reporter.png(waterfall))
    for run in runs.values():
        reporter.render(run)
        print()  # noqa: T201  the tables of a demo are its output
    return _words(folder, trained, histories)


def _analyze(cell: Cell, trained: Trained, folder: Path) -> Analysis:
    """Save a model and a fresh batch, and analyze the files as a user would by hand."""
    from gradflow import reporter
    from gradflow.workflow import FileRequest, analyze_file

    folder.mkdir(exist_ok=True)  # its training is there
    torch.save(trained.model.state_dict(), folder / "model.pt")
    x, y = adding_batch(generator=torch.Generator().manual_seed(FRESH))
    torch.save({"input": x, "target": y}, folder / "batch.pt")
    request = FileRequest(
        folder / "model.pt",
        spec=f"gradflow.demo:AddingModel('{cell}')",
        input=folder / "batch.pt",
        loss="mse",
    )
    run = analyze_file(request).titled(cell)
    reporter.report(run, folder / "report")
    return run


def _words(folder: Path, trained: dict[Cell, Trained], histories: dict[Cell, History]) -> str:
    from gradflow import reporter

    lines = [
        "",
        f"The adding task: add two numbers up to {TASK_STEPS} steps apart; guessing scores {BASELINE:.3f}.",
    ]
    for cell, result in trained.items():
        lines.append(
            f"  {cell:<5} error {result.error:.3f} after {result.updates} updates   "
            f"{folder / cell.lower() / 'report' / 'report.html'}"
        )
    lines += [
        f"  both on one scale: {folder / 'comparison.png'}",
        "",
        f"And while they were trained: {folder / 'waterfall.png'}",
        *(
            f"  {reporter.sentence(reporter.course(history, layer, cell))}"
            for cell, history in histories.items()
            for layer in history.layers
        ),
        "",
        "For a model of your own:",
        YOUR_TURN,
    ]
    return "\n".join(lines)
