"""`to=` of gradflow.watch, with the real packages: what was written is read back with their own readers."""

from __future__ import annotations

import importlib
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradflow
from gradflow.integrations.writers import key_of, writer_for

histories = importlib.import_module("histories")

SCALARS = {
    "gradflow/rnn.l0/rate": -0.5,
    "gradflow/rnn.l0/rate_low": -0.6,
    "gradflow/rnn.l0/rate_high": -0.4,
    "gradflow/rnn.l0/horizon": 14.0,
    "gradflow/rnn.l0/half_life": math.inf,
    "gradflow/rnn.l0@2/nonfinite": 0.0,
}
SHOWN = {tag: value for tag, value in SCALARS.items() if math.isfinite(value)}
STEPS = (100, 200, 300)


def figure() -> Any:
    """A picture of a training."""
    return gradflow.plot(histories.history(5), layer="rnn.l0")


def write(target: Callable[..., object]) -> None:
    """Three probes, the second with a picture."""
    for step in STEPS:
        figures = {"gradflow/waterfall": figure} if step == 200 else {}
        target(step, {tag: value + step for tag, value in SCALARS.items()}, figures)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        write(writer_for(writer))
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(SHOWN)
    for tag, value in SHOWN.items():
        found = events.Scalars(tag)
        assert [one.step for one in found] == list(STEPS)
        np.testing.assert_allclose(
            [one.value for one in found], [value + n for n in STEPS], rtol=1e-6
        )
    (image,) = events.Images("gradflow/waterfall")
    assert (image.step, image.width) == (200, 924)
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    chart = layout.category[0].chart[0]
    assert chart.title == "rnn.l0"
    (series,) = chart.margin.series
    assert (series.value, series.lower, series.upper) == tuple(list(SHOWN)[:3])


def test_tensorboard_that_was_closed_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    target = writer_for(writer)
    writer.close()
    for late in (lambda: target(1, SCALARS, {}), lambda: writer_for(writer)):
        with pytest.raises(
            gradflow.GradflowError, match="to must be an open SummaryWriter, got one"
        ):
            late()
    assert len(list(tmp_path.iterdir())) == 1


def test_tensorboard_lays_out_a_new_layer_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        target = writer_for(writer)
        calls: list[Any] = []
        writer.add_custom_scalars = calls.append
        target(1, SCALARS, {})
        target(2, SCALARS, {})
        target(
            3,
            SCALARS | {f"gradflow/b/{name}": 0.0 for name in ("rate", "rate_low", "rate_high")},
            {},
        )
    assert [list(one["gradflow: rates"]) for one in calls] == [["rnn.l0"], ["rnn.l0", "b"]]
    pattern, _ = calls[1]["gradflow: layers"]["grad norm"][1]  # as TensorBoard looks for tags
    tags = [
        f"gradflow/{tag}"
        for tag in ("rnn.l0/grad_norm", "rnn.l0/grad_norm_clipped", "rnn_l0/grad_norm")
    ]
    assert [bool(re.match(pattern, tag)) for tag in tags] == [True, False, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow", "ignore:The ``noload``")
def test_mlflow_on_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/store.db")
    client = mlflow.MlflowClient()
    with pytest.raises(gradflow.GradflowError, match=r"call mlflow\.start_run\(\) first"):
        writer_for(client)
    with mlflow.start_run() as run:
        targets = [writer_for(x) for x in (client, run, mlflow, (client, run.info.run_id))]
        assert {target.run for target in targets} == {run.info.run_id}  # type: ignore[attr-defined]
        write(targets[0])
    for tag, value in SHOWN.items():
        found = client.get_metric_history(run.info.run_id, key_of(tag))
        assert [(one.step, one.value) for one in found] == [(n, value + n) for n in STEPS]
    kept = [item.path for item in client.list_artifacts(run.info.run_id, "gradflow")]
    assert kept == ["gradflow/waterfall-00000200.png"]


def records(file: Path) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of an offline run of W&B, from its own file."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            )
    return rows


@pytest.mark.parametrize("logs", ["never", "each step", "with its own steps"])
def test_wandb_offline(tmp_path: Path, logs: str) -> None:
    wandb = pytest.importorskip("wandb")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p")
    target = writer_for(run)
    for step in STEPS:
        figures = {"gradflow/waterfall": figure} if step == 200 else {}
        target(step, {tag: value + step for tag, value in SCALARS.items()}, figures)
        if logs == "each step":
            run.log({"loss": 1.0 / step})
        elif logs == "with its own steps":
            run.log({"loss": 1.0 / step}, step=step)
    target.close()  # type: ignore[attr-defined]
    run.finish()
    wandb.teardown()  # waits for the process that writes the file; without, its end may be missing
    rows = rows_of(tmp_path)
    mine = [row for row in rows if "gradflow/step" in row]
    assert [int(row["gradflow/step"]) for row in mine] == list(STEPS)
    for row, step in zip(mine, STEPS, strict=True):
        for tag, value in SHOWN.items():
            assert math.isclose(float(row[tag]), value + step)
    assert any(key.startswith("gradflow/waterfall") for key in mine[1])
    losses = [float(row["loss"]) for row in rows if "loss" in row]
    assert losses == ([] if logs == "never" else [1.0 / step for step in STEPS])
    if logs == "each step":
        assert len(rows) == len(STEPS)


def test_what_is_no_writer_is_refused() -> None:
    expected = r"to must be a callable \(step, scalars, figures\), a TensorBoard SummaryWriter"
    with pytest.raises(gradflow.GradflowError, match=expected):
        writer_for(3)


def test_trackio_on_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    with pytest.raises(gradflow.GradflowError, match=r"call trackio\.init\(\) first"):
        writer_for(trackio)
    run = trackio.init(project="gradflow", name="a", embed=False, auto_log_cpu=False)
    trackio.log({"loss": 1.0})
    assert writer_for(trackio).run is run  # type: ignore[attr-defined]
    write(writer_for(run))
    trackio.log({"loss": 2.0})
    trackio.finish()
    logs = storage.get_logs("gradflow", "a")
    for tag, value in SHOWN.items():
        found = [(one["step"], one[tag]) for one in logs if tag in one]
        assert found == [(n, value + n) for n in STEPS]
    assert [one["step"] for one in logs if "loss" in one] == [0, 1]  # the training's own count
    (image,) = [one["gradflow/waterfall"] for one in logs if "gradflow/waterfall" in one]
    assert image["_type"] == "trackio.image"
