"""Trainers of Lightning and transformers, a few steps on the CPU: what the callbacks measure of them."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradflow

LENGTH, WIDTH = 12, 5
# the trainers' own, not ours
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning"),
    pytest.mark.filterwarnings("error::gradflow.GradflowWarning"),
]


class Net(nn.Module):
    """One recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,) from x of shape (B, T, 3)."""
        answer: Tensor = self.head(self.rnn(x)[0][:, -1]).squeeze(1)
        return answer


def batches(count: int = 6, size: int = 4) -> tuple[Tensor, Tensor]:
    """So many batches of sequences and targets."""
    seeded = torch.Generator().manual_seed(0)
    return (
        torch.randn(count * size, LENGTH, 3, generator=seeded),
        torch.randn(count * size, generator=seeded),
    )


def by_hand(
    steps: int, accumulate: int, clip: float, half: torch.dtype | None
) -> dict[str, list[float]]:
    """The same training in a plain loop: loss and norm of the gradient of each update, before clipping."""
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = (part.split(4) for part in batches())
    found: dict[str, list[float]] = {"loss": [], "grad_norm_all": [], "after": []}
    place = 0
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                loss = nn.functional.mse_loss(model(x[place]), y[place]) / accumulate
            loss.backward()
            total += loss.item()
            place += 1
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found["loss"].append(total)
        found["grad_norm_all"].append(float(torch.stack([g.norm() for g in grads]).norm()))
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        found["after"].append(float(torch.stack([g.norm() for g in grads]).norm()))
        optimizer.step()
    return found


def hold(
    history: gradflow.History,
    steps: int,
    accumulate: int,
    clip: float,
    half: torch.dtype | None = None,
) -> None:
    """What was measured is what the plain loop gives; in half precision nearly."""
    known = by_hand(steps, accumulate, clip, half)
    data, more = history.data, 1.0 if half is None else 100.0
    assert history.steps.tolist() == list(range(1, steps + 1))
    np.testing.assert_allclose(data["loss"], known["loss"], rtol=1e-5 * more)
    np.testing.assert_allclose(data["grad_norm_all"], known["grad_norm_all"], rtol=1e-4 * more)
    np.testing.assert_allclose(data["grad_norm_all_clipped"], known["after"], rtol=1e-4 * more)
    acted = [
        a < (1 - 1e-3) * b for a, b in zip(known["after"], known["grad_norm_all"], strict=True)
    ]
    assert data["clipped"].values.tolist() == [float(one) for one in acted]
    assert (data["forwards"] >= accumulate).all()
    assert (data["verdict"].values != "").all()


# ------------------------------------------------------------------------------------ Lightning


def module(name: str, *, calls_itself: bool, manual: bool = False) -> Any:
    """A LightningModule around the net, which is called through forward or as a part of it."""
    package = pytest.importorskip(name)

    class Module(package.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = Net()
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = nn.functional.mse_loss(self(x) if calls_itself else self.net(x), y)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=0.2)
                optimizer.step()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def trainer(name: str, folder: Path, **options: Any) -> Any:
    """A Trainer on the CPU, quiet."""
    package = importlib.import_module(name)
    usual: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
        "default_root_dir": str(folder), "log_every_n_steps": 1, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return package.Trainer(**(usual | options))


def loader() -> DataLoader[Any]:
    """Batches in order."""
    return DataLoader(TensorDataset(*batches()), batch_size=4)


LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


@pytest.mark.parametrize("name", LIGHTNING)
@pytest.mark.parametrize("calls_itself", [True, False], ids=["forward", "a part"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(name: str, calls_itself: bool, accumulate: int, tmp_path: Path) -> None:
    pytest.importorskip(name)
    from gradflow.integrations.lightning import GradientFlowMonitor

    made = module(name, calls_itself=calls_itself)
    monitor = GradientFlowMonitor(tmp_path / "run", budget=None)
    runner = trainer(
        name,
        tmp_path,
        callbacks=[monitor],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.2,
        val_check_interval=3,
    )
    runner.fit(made, loader(), loader())
    history = gradflow.load(tmp_path / "run")
    assert isinstance(history, gradflow.History)
    assert history.layers == ("net.rnn.l0",)
    assert history.ended
    hold(history, 6 // accumulate, accumulate, 0.2)


@pytest.mark.parametrize("name", LIGHTNING)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "scaled"])
def test_lightning_in_mixed_precision(
    name: str, accumulate: int, half: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip(name)
    from gradflow.integrations.lightning import GradientFlowMonitor

    monitor = GradientFlowMonitor(tmp_path / "run", budget=None)
    asked: dict[str, Any] = {"precision": "bf16-mixed"}
    if half is torch.float16:  # on a CPU Lightning has no scaler of its own
        plugins = importlib.import_module(f"{name}.plugins")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        asked = {"plugins": [plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    trainer(
        name,
        tmp_path,
        callbacks=[monitor],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.2,
        **asked,
    ).fit(module(name, calls_itself=True), loader())
    history = gradflow.load(tmp_path / "run")
    assert isinstance(history, gradflow.History)
    hold(history, 6 // accumulate, accumulate, 0.2, half)
    assert (history.data["scale"] == (1024.0 if half is torch.float16 else 1.0)).all()
    plain = monitor_levels(name, accumulate, tmp_path)
    np.testing.assert_allclose(history["net.rnn.l0"]["level"], plain, atol=0.05)  # of decades


def monitor_levels(name: str, accumulate: int, folder: Path) -> Any:
    """log10 of ∂L/∂h at the loss step of the same training in single precision."""
    from gradflow.integrations.lightning import GradientFlowMonitor

    asked: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.2}
    monitor = GradientFlowMonitor(folder / "plain", budget=None)
    trainer(name, folder, callbacks=[monitor], **asked).fit(
        module(name, calls_itself=True), loader()
    )
    assert monitor.watch is not None
    return monitor.watch.history["net.rnn.l0"]["level"]


def test_lightning_with_manual_optimization(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from gradflow.integrations.lightning import GradientFlowMonitor

    made = module("lightning.pytorch", calls_itself=True, manual=True)
    monitor = GradientFlowMonitor(tmp_path / "run", budget=None)
    trainer("lightning.pytorch", tmp_path, callbacks=[monitor]).fit(made, loader())
    history = gradflow.load(tmp_path / "run")
    assert isinstance(history, gradflow.History)
    hold(history, 6, 1, 0.2)


def test_lightning_trains_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from gradflow.integrations.lightning import GradientFlowMonitor

    weights = []
    for callbacks in ([], [GradientFlowMonitor(tmp_path / "run", budget=None)]):
        made = module("lightning.pytorch", calls_itself=True)
        trainer("lightning.pytorch", tmp_path, callbacks=callbacks, max_epochs=3).fit(
            made, loader()
        )
        weights.append([parameter.detach().clone() for parameter in made.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from gradflow.integrations.lightning import GradientFlowMonitor

    made = module("lightning.pytorch", calls_itself=True)
    first = trainer("lightning.pytorch", tmp_path, callbacks=[GradientFlowMonitor(budget=None)])
    first.fit(made, loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(
        "lightning.pytorch", tmp_path, callbacks=[GradientFlowMonitor(budget=None)], max_epochs=2
    )
    again.fit(made, loader(), ckpt_path=str(tmp_path / "a.ckpt"))
    history = gradflow.load(tmp_path / "gradflow")
    assert isinstance(history, gradflow.History)
    assert history.steps.tolist() == list(range(1, 13))


def test_lightning_loggers_get_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradflow.integrations.lightning import GradientFlowMonitor

    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    runner = trainer(
        "lightning.pytorch",
        tmp_path,
        logger=[board, table],
        callbacks=[GradientFlowMonitor(budget=None)],
    )
    runner.fit(module("lightning.pytorch", calls_itself=True), loader())
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [one.step for one in events.Scalars("gradflow/net.rnn.l0/rate")] == list(range(1, 7))
    assert "gradflow/net.rnn.l0/rate" in Path(table.log_dir, "metrics.csv").read_text()
    assert (Path(board.log_dir) / "gradflow" / "history.jsonl").is_file()


# --------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["single", "bf16"])
def test_transformers(half: torch.dtype | None, accumulate: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradflow.integrations.transformers import GradflowCallback

    class Loss(Net):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": nn.functional.mse_loss(super().forward(x), labels)}

    torch.manual_seed(1)
    model = Loss()
    x, y = batches()
    rows = [{"x": one, "labels": target} for one, target in zip(x, y, strict=True)]
    asked = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6 // accumulate,
        gradient_accumulation_steps=accumulate, max_grad_norm=0.2, report_to=["tensorboard"],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", bf16=half is not None,
    )  # fmt: skip
    runner = transformers.Trainer(
        model=model,
        args=asked,
        train_dataset=rows,
        callbacks=[GradflowCallback(budget=None)],
    )
    runner._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    runner.train()
    history = gradflow.load(tmp_path / "gradflow")
    assert isinstance(history, gradflow.History)
    assert history.layers == ("rnn.l0",)
    assert history.ended
    hold(history, 6 // accumulate, accumulate, 0.2, half)
    assert (history.data["scale"] == 1).all()
    events = EventAccumulator(str(tmp_path / "runs" / "gradflow"))
    events.Reload()
    steps = [one.step for one in events.Scalars("gradflow/rnn.l0/rate")]
    assert steps == list(range(1, 6 // accumulate + 1))


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_the_examples_run(name: str) -> None:
    pytest.importorskip(name)
    made = importlib.import_module(f"gradflow.integrations.{name}")
    done = doctest.testmod(made)
    assert done.attempted > 0
    assert done.failed == 0
