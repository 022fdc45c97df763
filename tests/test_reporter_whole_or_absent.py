"""A folder of a report is whole or absent whatever happens, and the sentence says which."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest
import synthetic

import gradflow
from gradflow.errors import FileError
from gradflow.reporter import free_folder, report

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def test_it_is_killed_at_twenty_moments(tmp_path: Path) -> None:
    found, took = [], folders.took(tmp_path / "timed")
    for number in range(20):
        place = tmp_path / f"run{number // 2}"
        found.append(folders.killed(place, took * number / 16, force=number % 2 == 1))
    assert "" in found, "none was killed before its end"
    assert set(found) <= {"", "rnn.l0", "lstm.l0"}


def test_a_mixed_folder_would_be_seen(tmp_path: Path) -> None:
    report(synthetic.vanishing(), tmp_path / "run", formats=folders.FORMATS)
    other = report(synthetic.carrying(), tmp_path / "other", formats=folders.FORMATS)
    other["layers.csv"].replace(tmp_path / "run" / "layers.csv")
    with pytest.raises(AssertionError):
        folders.whole(tmp_path / "run")
    (tmp_path / "run" / "lags.csv").unlink()
    with pytest.raises(AssertionError, match="mixed"):
        folders.whole(tmp_path / "run")


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_is_full(tmp_path: Path, there: bool) -> None:
    place = tmp_path / "run"
    if there:
        report(synthetic.vanishing(), place, formats=folders.FORMATS)
    sizes = report(synthetic.carrying(), tmp_path / "other", formats=folders.FORMATS).values()
    for most in sorted({path.stat().st_size // part for path in sizes for part in (1, 2)})[:-1]:
        said = folders.on_a_full_disk(place, most)
        state = (
            "what is there is whole, and none of it of this report"
            if there
            else "nothing was written"
        )
        assert said.startswith(f"cannot write the report to {place}: ") and state in said, said
        assert folders.whole(place) == ("rnn.l0" if there else "")
        assert {path.name for path in tmp_path.iterdir()} <= {"run", "other"}


@pytest.mark.parametrize("force", [False, True])
def test_two_processes_write_one_folder(tmp_path: Path, force: bool) -> None:
    for number in range(4):
        place = tmp_path / f"run{number}"
        found, said = folders.at_once(place, force=force)
        assert found, said
        assert "done" in said
        for words in said:
            assert (
                words == "done" or "exists and is left alone" in words or "what is there" in words
            )


@pytest.mark.parametrize("name", folders.NAMES)
def test_names_of_folders(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    report(synthetic.carrying(), place, formats=folders.FORMATS)
    assert folders.whole(place) == "lstm.l0"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert gradflow.load(place / "run.nc")["lstm.l0"].verdict


def test_too_long_a_name_and_no_place_to_write_are_said(tmp_path: Path) -> None:
    for place in (tmp_path / ("n" * 256), Path("/proc/gradflow-run")):
        with pytest.raises(FileError, match=r"cannot write .*nothing was written.*give another"):
            report(synthetic.vanishing(), place, formats=folders.FORMATS)
    taken = tmp_path / ("n" * 254)
    taken.mkdir()
    with pytest.raises(FileError, match="too long"):
        free_folder(taken)


def test_a_run_that_cannot_be_saved_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    place = tmp_path / "run.nc"
    synthetic.vanishing().save(place)
    with pytest.raises(FileError, match=r"nothing was written, give another place"):
        synthetic.vanishing().save(tmp_path / "none" / "run.nc")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileError, match=r"it is as it was, give another place"):
        synthetic.vanishing().save(tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"run.nc", "there"}
