"""The folder: whole or not at all, never over something else."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from gradflow.analysis import FRAMES, OPTIONAL, load
from gradflow.errors import FileError, InputError
from gradflow.reporter import files, free_folder, report


def test_every_file_is_there(tmp_path: Path) -> None:
    analysis = synthetic.vanishing()
    paths = report(analysis, tmp_path / "run")
    assert set(paths) == {
        "report.html", "summary.json", "run.nc", *(f"{kind}.csv" for kind in FRAMES if kind not in OPTIONAL),
        "figures/overview.png", "figures/rnn.l0-gain-map.png", "figures/rnn.l0-lag-curve.png",
        "figures/rnn.l0-states.png", "figures/rnn.l0-total-vs-direct.png",
        "figures/rnn.l0-triangle.png", "figures/rnn.l0-lag-gradient.png",
        "figures/rnn.l0-rank.png", "figures/rnn.l0-lyapunov.png", "figures/rnn.l0-saturation.png",
    }  # fmt: skip
    assert all(path.stat().st_size for path in paths.values())
    assert json.loads(paths["summary.json"].read_text("utf-8"))["verdicts"] == {
        "rnn.l0": "vanishing"
    }
    assert load(tmp_path / "run")["rnn.l0"].rate == analysis["rnn.l0"].rate
    frame = pd.read_csv(paths["lags.csv"])
    assert frame["median"].iloc[10] == pytest.approx(-9.8, rel=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_formats_choose_files(tmp_path: Path) -> None:
    assert set(report(synthetic.vanishing(), tmp_path / "a", formats=["json"])) == {"summary.json"}
    assert set(report(synthetic.vanishing(), tmp_path / "b", formats="nc")) == {"run.nc"}


def test_figures_for_print(tmp_path: Path) -> None:
    analysis, kinds = synthetic.vanishing(), ("png", "pdf", "svg")
    made = [report(analysis, tmp_path / name, formats=kinds) for name in ("one", "two")]
    by_kind = {kind: {Path(name).stem for name in made[0] if name.endswith(kind)} for kind in kinds}
    assert by_kind["png"] == by_kind["pdf"] == by_kind["svg"] >= {"overview", "rnn.l0-gain-map"}
    svg = made[0]["figures/rnn.l0-lag-curve.svg"].read_text("utf-8")
    assert svg.startswith("<?xml") and "distance t′ − t in steps" in svg  # letters, not outlines
    assert made[0]["figures/overview.pdf"].read_bytes().startswith(b"%PDF")
    for name, path in made[0].items():
        assert path.read_bytes() == made[1][name].read_bytes(), name


@pytest.mark.parametrize(("formats", "got"), [(["jpg"], "jpg"), ([], "none"), (["png", 3], "3")])
def test_an_unknown_format_is_refused(tmp_path: Path, formats: list[str], got: str) -> None:
    with pytest.raises(InputError, match=rf"formats must be one or more of html, .* got {got}"):
        report(synthetic.vanishing(), tmp_path / "a", formats=formats)
    assert list(tmp_path.iterdir()) == []


def test_same_input_same_bytes(tmp_path: Path) -> None:
    kinds = ["html", "json", "csv", "png"]
    one = report(synthetic.carrying(), tmp_path / "one", formats=kinds)
    two = report(synthetic.carrying(), tmp_path / "two", formats=kinds)
    assert {name: path.read_bytes() for name, path in one.items()} == {
        name: path.read_bytes() for name, path in two.items()
    }


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report(synthetic.vanishing(), folder, formats=["json"])
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(
        FileError, match=r"run exists and is left alone; give another folder, or --force"
    ):
        report(synthetic.carrying(), folder)
    assert (folder / "summary.json").read_bytes() == before


def test_force_replaces_a_report_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report(synthetic.vanishing(), folder)
    paths = report(synthetic.carrying(), folder, formats=["json"], force=True)
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    assert "lstm.l0" in paths["summary.json"].read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("extra", ["thesis.tex", "run.nc.bak", ".git"])
def test_force_never_replaces_what_is_not_a_report(tmp_path: Path, extra: str) -> None:
    folder = tmp_path / "run"
    report(synthetic.vanishing(), folder, formats=["json"])
    (folder / extra).write_text("mine")
    with pytest.raises(FileError, match="does not look like a gradflow report"):
        report(synthetic.carrying(), folder, force=True)
    assert (folder / extra).read_text() == "mine"


def test_force_never_replaces_a_folder_that_only_has_figures(tmp_path: Path) -> None:
    (tmp_path / "mine" / "figures").mkdir(parents=True)
    with pytest.raises(FileError, match="does not look like a gradflow report"):
        report(synthetic.vanishing(), tmp_path / "mine", force=True)


def test_a_file_or_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="is a file, and a report needs a folder"):
        report(synthetic.vanishing(), tmp_path / "file", force=True)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(FileError, match="is a link and is left alone"):
        report(synthetic.vanishing(), tmp_path / "link", force=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError("no space left")])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_report_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, force: bool
) -> None:
    folder = tmp_path / "run"
    if force:
        report(synthetic.vanishing(), folder, formats=["json"])
    before = sorted(tmp_path.rglob("*"))

    def stop(*_: object) -> None:
        raise error

    monkeypatch.setitem(files._WRITERS, "nc", stop)
    with pytest.raises((KeyboardInterrupt, RuntimeError, FileError)):
        report(synthetic.vanishing(), folder, formats=["json", "nc"], force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=r"cannot write the report to .*; give another folder"):
        report(synthetic.vanishing(), tmp_path / "file" / "run")


def test_an_analysis_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the analysis must be one with layers, got none"):
        report(synthetic.analysis(), tmp_path / "run")


def test_free_folder_counts_on(tmp_path: Path) -> None:
    base = tmp_path / "model"
    assert free_folder(base) == base
    base.mkdir()
    assert free_folder(base) == tmp_path / "model-2"
    (tmp_path / "model-2").mkdir()
    assert free_folder(base) == tmp_path / "model-3"


def test_file_names_are_safe_and_unique() -> None:
    names = [
        "rnn.l0",
        "../../etc/passwd",
        "A",
        "a",
        "",
        "é",
        "</script><b>x",
        "overview",
        "x" * 300,
    ]
    safe = files.file_names(names)
    assert len({name.lower() for name in safe.values()}) == len(names)
    for name in safe.values():
        assert "/" not in name and not name.startswith(".") and 0 < len(name) <= 83
    assert safe["rnn.l0"] == "rnn.l0"


def test_a_layer_with_a_wild_name_stays_in_the_folder(tmp_path: Path) -> None:
    analysis = synthetic.analysis(synthetic.layer("../../../out"), synthetic.layer("</script><b>x"))
    paths = report(analysis, tmp_path / "run", formats=["png"])
    assert all(path.resolve().is_relative_to(tmp_path / "run") for path in paths.values())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_a_replacement_that_fails_gives_the_old_report_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = tmp_path / "run"
    report(synthetic.vanishing(), folder, formats=["json"])
    before = sorted(tmp_path.rglob("*"))
    rename = Path.rename

    def fail_to_land(self: Path, target: Path) -> Path:
        if target == folder and "-part-" in self.name:
            raise error
        return rename(self, target)

    def none(_: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", none)  # else the two change places at once
    monkeypatch.setattr(Path, "rename", fail_to_land)
    with pytest.raises((KeyboardInterrupt, FileError)):
        report(synthetic.carrying(), folder, formats=["json"], force=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert "rnn.l0" in (folder / "summary.json").read_text("utf-8")
