"""What `gradflow demo` does: train both models, save them, analyze the files, compare both trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from gradflow import reporter
from gradflow.analysis import Analysis
from gradflow.demo.task import BASELINE, TASK_STEPS, Progress, Trained, adding_batch, train
from gradflow.history import History
from gradflow.workflow import FileRequest, analyze_file

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
