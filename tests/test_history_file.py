"""The file of a history: what is written comes back, and nothing that ends the writer harms it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import histories
import numpy as np
import pytest
import xarray as xr

import gradflow
from gradflow.errors import FileError, InputError
from gradflow.history import History, LayerProbe, Probe, Writer, lag_grid


def test_what_was_written_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    histories.write(tmp_path / "a", 12)
    back = gradflow.load(tmp_path / "a")
    assert isinstance(back, History)
    xr.testing.assert_identical(back.data, histories.history(12).data)
    probe = histories.probes(12)[5]
    layer = probe.layers["rnn.l0"]
    assert back["rnn.l0"]["rate"].sel(step=501).item() == layer.values["rate"]
    assert back["rnn.l0"]["verdict"].sel(step=501).item() == layer.verdict
    profile = back["rnn.l0"]["profile"].sel(step=501).values
    np.testing.assert_array_equal(profile, layer.profile.astype(np.float32))
    assert back.notes == histories.history(12).notes
    assert back.ended and not back.damaged and back.cells == histories.CELLS


def test_it_is_followed_while_it_is_written(tmp_path: Path) -> None:
    writer = Writer(tmp_path, title="Net")
    followed = History.read(tmp_path)
    assert len(followed) == 0 and "no probe yet" in repr(followed)
    for number, probe in enumerate(histories.probes(5), start=1):
        writer.probe(probe, histories.CELLS)
        assert followed.refresh() == 1
        assert len(followed.data["step"]) == number
        assert not followed.ended
    assert followed.refresh() == 0
    writer.close()
    followed.refresh()
    assert followed.ended


def test_a_layer_a_gate_or_a_lag_may_come_later(tmp_path: Path) -> None:
    first, second = histories.probes(2, length=20), histories.probes(2, length=60)
    alone = replace(first[0], layers={"rnn.l0": first[0].layers["rnn.l0"]})
    history = History.of("Net", [alone, second[1]], histories.CELLS)
    assert history.layers == ("rnn.l0", "rnn.l1")
    assert history.data["lag"].values.tolist() == lag_grid(60).tolist()
    assert math.isnan(history.data["rate"].sel(step=1, layer="rnn.l1"))
    assert history.data["verdict"].sel(step=1, layer="rnn.l1") == ""
    profile = history["rnn.l0"]["profile"].sel(step=1)
    assert np.isfinite(profile.sel(lag=18)) and np.isnan(profile.sel(lag=25))


@pytest.mark.parametrize("lost", [1, 7, 400, 1500])
def test_a_line_that_was_cut_off_costs_one_probe(tmp_path: Path, lost: int) -> None:
    writer = Writer(tmp_path, title="Net")
    probes = [replace(probe, notes=()) for probe in histories.probes(4)]
    for probe in probes[:3]:
        writer.probe(probe, histories.CELLS)
    file = tmp_path / "history.jsonl"
    file.write_bytes(file.read_bytes()[:-lost])
    writer.close()  # never reached by a kill; here it lets the lock go
    file.write_bytes(file.read_bytes().removesuffix(b'{"kind": "end"}\n'))
    assert History.read(tmp_path).steps.tolist() == [1, 101]
    again = Writer(tmp_path, resume=True, title="Net")
    whole = lost == 1  # only the end of its line was missing
    assert again.last_step == (201 if whole else 101)
    again.probe(replace(probes[3], step=301), histories.CELLS)
    again.close()
    found = History.read(tmp_path)
    assert found.steps.tolist() == ([1, 101, 201, 301] if whole else [1, 101, 301])
    assert found.damaged == (0 if whole else 1) and found.ended


def test_bytes_that_are_no_line_are_passed_over(tmp_path: Path) -> None:
    histories.write(tmp_path, 2)
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b"\0" * 300 + b"\n" + b'{"kind": "probe", "step": 7, "numbers": "AAAA"}\n[1]\n')
    found = History.read(tmp_path)
    assert found.steps.tolist() == [1, 101] and found.damaged == 3


def test_nothing_is_written_over_without_being_asked(tmp_path: Path) -> None:
    histories.write(tmp_path / "a", 3)
    with pytest.raises(
        FileError, match=r"holds probes of steps 1 to 201; give another folder, res"
    ):
        Writer(tmp_path / "a", title="Net")
    with pytest.raises(InputError, match="resume and force must be not both true, got both"):
        Writer(tmp_path / "a", resume=True, force=True, title="Net")
    followed = History.read(tmp_path / "a")
    Writer(tmp_path / "a", force=True, title="Other").close()
    followed.refresh()
    assert followed.title == "Other" and len(followed) == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.pt").write_text("kept")
    Writer(tmp_path / "b", title="Net").close()
    assert (tmp_path / "b" / "model.pt").read_text() == "kept"


def test_two_writers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    first = Writer(tmp_path, title="Net")
    with pytest.raises(FileError, match="is being written by another run"):
        Writer(tmp_path, title="Net", resume=True)
    first.close()


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("no json\n")
    with pytest.raises(FileError, match="is not the history of a run"):
        History.read(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"kind": "header", "schema": 99}\n')
    with pytest.raises(FileError, match="was written with schema 99, this gradflow reads 1"):
        History.read(tmp_path)
    with pytest.raises(FileError, match=r"cannot read .*none"):
        History.read(tmp_path / "none")


def test_frames_are_tidy() -> None:
    history = histories.history(4)
    assert len(history.frame()) == 8
    assert set(history.frame("gates")["gate"]) == {"i", "f", "g", "o", "r", "z", "n"}
    assert len(history.frame("gates")) == 4 * 7
    assert len(history.frame("lags")) == 4 * 2 * len(lag_grid(100))
    assert history.frame("steps")["learning_rate"].iloc[0] == 1e-3
    with pytest.raises(InputError, match="kind must be one of layers, steps, lags, gates, notes"):
        history.frame("units")
    with pytest.raises(InputError, match=r"layer must be one of rnn\.l0, rnn\.l1, got 'x'"):
        history["x"]


def test_a_history_is_asked_by_the_names_of_its_layers() -> None:
    history = histories.history(4)
    assert list(history) == list(history.keys()) == ["rnn.l0", "rnn.l1"]
    assert "rnn.l0" in history and "x" not in history and 0 not in history
    assert [name for name, data in history.items() if data["rate"].size == len(history)] == list(
        history
    )
    with pytest.raises(InputError, match=r"layer must be one of rnn\.l0, rnn\.l1, got 'rnn'"):
        history["rnn"]


def test_numbers_keep_what_is_infinite_and_what_is_not_known() -> None:
    values = {"rate": -math.inf, "horizon": math.inf}
    history = History.of("Net", [Probe(1, {}, {"l0": LayerProbe(values)})])
    assert history["l0"]["rate"].item() == -math.inf
    assert history["l0"]["horizon"].item() == math.inf
    assert math.isnan(history["l0"]["gain"].item()) and history["l0"]["verdict"].item() == ""


@pytest.mark.parametrize("steps", [1, 2, 17, 18, 100, 4000, 10**6])
def test_the_grid_of_lags_is_small_and_begins_at_the_loss(steps: int) -> None:
    grid = lag_grid(steps)
    assert grid[0] == 0 and grid[-1] < steps and len(grid) <= 64
    assert (np.diff(grid) > 0).all()
