"""A folder of a report is whole or absent whatever happens, and the sentence says which."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import folders
import pytest
import synthetic

import gradflow
from gradflow.errors import FileError
from gradflow.reporter import free_folder, report, whole_folder
from gradflow.writing import whole_file

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


def killed(work: Callable[[], object]) -> None:
    """Do it in a process of its own that is killed by the work itself."""
    assert folders.outcome(*folders.forked(work)) == ""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(place: Path) -> None:
    with whole_folder(place, force=True) as new:
        (new / "summary.json").write_text("half")
        die()


def half_saved(place: Path) -> None:
    with whole_file(place) as file:
        file.write("half")
        file.flush()
        die()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_killed_processes_left_goes_with_the_next_that_writes_there(tmp_path: Path) -> None:
    theirs = {".gradflow-part-mine", ".gradflow-part-0123456789abcdef.txt"}
    for name in theirs:
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "other") as living:
        killed(lambda: half_written(tmp_path / "run"))
        killed(lambda: half_saved(tmp_path / "run.nc"))
        assert len(names_in(tmp_path)) == len(theirs) + 3, "nothing was left behind"
        report(synthetic.carrying(), tmp_path / "run", formats=folders.FORMATS)
        assert names_in(tmp_path) == {*theirs, living.name, "run"}
        killed(lambda: half_saved(tmp_path / "run.nc"))
        synthetic.carrying().save(tmp_path / "run.nc")
        assert names_in(tmp_path) == {*theirs, living.name, "run", "run.nc"}
        (living / "summary.json").write_text("{}")
    assert names_in(tmp_path) == {*theirs, "other", "run", "run.nc"}
    assert names_in(tmp_path / "other") == {"summary.json"}


def test_what_a_killed_save_left_in_a_report_is_not_strange_to_it(tmp_path: Path) -> None:
    place = tmp_path / "run"
    report(synthetic.vanishing(), place, formats=folders.FORMATS)
    killed(lambda: half_saved(place / "run.nc"))
    report(synthetic.carrying(), place, formats=folders.FORMATS, force=True)
    assert folders.whole(place) == "lstm.l0"


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that cannot let two names change places at once."""

    def none(_: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", none)


def replaced_and_killed_between(place: Path) -> None:
    renamed = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == place:
            die()
        return renamed(self, target)

    Path.rename = rename  # type: ignore[method-assign]
    report(synthetic.carrying(), place, formats=folders.FORMATS, force=True)


@pytest.mark.parametrize("look", ["load", "report", "free"])
def test_what_was_set_aside_is_put_back_by_the_next_that_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    without_exchange(monkeypatch)
    place = tmp_path / "run"
    report(synthetic.vanishing(), place, formats=folders.FORMATS)
    killed(lambda: replaced_and_killed_between(place))
    assert not place.exists()
    if look == "load":
        assert list(gradflow.load(place)) == ["rnn.l0"]
    elif look == "report":
        with pytest.raises(FileError, match="exists and is left alone"):
            report(synthetic.carrying(), place, formats=folders.FORMATS)
    else:
        assert free_folder(place) == tmp_path / "run-2"
    assert folders.whole(place) == "rnn.l0"
    report(synthetic.carrying(), place, formats=folders.FORMATS, force=True)
    assert folders.whole(place) == "lstm.l0"
    assert names_in(tmp_path) == {"run"}


@pytest.mark.parametrize("exchange", [True, False])
def test_at_no_moment_is_there_no_folder_while_one_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    place, seen = tmp_path / "run", []
    renamed = Path.rename

    def rename(self: Path, target: Path) -> Path:
        made = renamed(self, target)
        seen.append(place.exists())
        return made

    if not exchange:
        without_exchange(monkeypatch)
    with whole_folder(place) as new:
        (new / "summary.json").write_text("old")
    monkeypatch.setattr(Path, "rename", rename)
    with whole_folder(place, force=True) as new:
        (new / "summary.json").write_text("new")
    assert (place / "summary.json").read_text() == "new"
    assert names_in(tmp_path) == {"run"}
    assert (False in seen) != exchange  # between two renames it is absent: so that this can fail


@pytest.mark.parametrize("save", [False, True])
def test_a_folder_that_is_read_only(save: bool) -> None:
    def write(place: Path) -> None:
        if os.geteuid() == 0:  # who may write anywhere
            os.setuid(65534)
        if save:
            synthetic.vanishing().save(place)
        report(synthetic.vanishing(), place, formats=folders.FORMATS)

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        said = folders.outcome(*folders.forked(lambda: write(Path(name, "run"))))
        Path(name).chmod(0o755)
        assert names_in(Path(name)) == set()
    words = "Permission denied; nothing was written" if save else f"{name} is read-only for you"
    assert words in said


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
