"""`gradflow watch`: the view of a run that trains, and the lines that go into a pipe."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import histories
import numpy as np
import pytest
from rich.console import Console
from seam import FALL_LINES, course, grid, lines, paint, sparkline, view

from gradflow.cli import _code
from gradflow.cli import gradflow as group
from gradflow.history import History, LayerProbe, Note, Probe, Writer, lag_grid
from gradflow.reporter import Followed, follow


def console(width: int = 80, height: int = 24, *, terminal: bool = True, **more: object) -> Console:
    """A console of a size that keeps what is printed."""
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=terminal, **more  # type: ignore[arg-type]
    )  # fmt: skip


def printed(one: Console) -> list[str]:
    """The lines that a console got."""
    assert isinstance(one.file, io.StringIO)
    return one.file.getvalue().splitlines()


def shown(history: History, one: Console) -> list[str]:
    """The lines of the view of a run."""
    one.print(view([Followed("a", history)], one))
    return printed(one)


PLAIN: dict[str, object] = {"no_color": True, "color_system": None}


def test_a_line_per_layer_and_its_waterfall() -> None:
    found = shown(histories.history(60), console(90, 30, **PLAIN))
    assert (
        found[0] == "a: Net, update 5,901, loss 0.11, clipping acted, ended"
        or "running" in found[0]
    )
    assert found[1].startswith("rnn.l0  vanishing  rate −0.20 ± 0.01  horizon 36  halves in 3.5")
    assert found[2].startswith(" loss " + "█" * 60)
    assert len(found) == 3 + 2 * (1 + max(FALL_LINES))
    assert found[-2].strip() == "█ as at the loss ▓>0.1 ▒>0.01 ░>0.001, blank gone, ^ grown"
    assert found[-1].strip() == "across: the last probes; down: steps back; bars: reach"


@pytest.mark.parametrize("size", [(80, 24), (60, 14), (40, 9), (200, 60), (30, 5)])
def test_the_view_fits_the_window(size: tuple[int, int]) -> None:
    one = console(*size, **PLAIN)
    found = shown(histories.history(60), one)
    assert len(found) <= size[1]
    assert max(map(len, found)) <= size[0]


def test_a_narrow_line_leaves_out_whole_words() -> None:
    found = shown(histories.history(60), console(56, 24, **PLAIN))
    assert found[1].split("  ")[:3] == ["rnn.l0", "vanishing", "horizon 36"]


def test_what_does_not_fit_is_counted() -> None:
    lags = lag_grid(50)
    layers = {
        f"l{n}": LayerProbe({}, lags=lags, profile=-lags / 9, direct=-lags / 9) for n in range(30)
    }
    found = shown(History.of("Net", [Probe(1, {}, layers)]), console(80, 12, **PLAIN))
    assert any("more layers: make the window higher" in line for line in found)
    assert len(found) <= 12


def test_colours_are_those_of_the_pictures() -> None:
    found = histories.history(20)
    one = console(80, 24, color_system="truecolor")
    one.print(view([Followed("a", found)], one))
    text = "\n".join(printed(one))
    values, bad, _ = grid(course(found, "rnn.l0"), 16, 60)
    red, green, blue = paint(values, bad)[15, 0]
    assert f"48;2;{red};{green};{blue}" in text


def test_rows_are_the_measured_lags() -> None:
    one = course(histories.history(9), "rnn.l0")
    values, _, lags = grid(one, 16, 60)
    assert lags[0] == 0
    assert lags[-1] == one.lag[-1]
    for row, lag in zip(values, lags, strict=True):
        np.testing.assert_array_equal(row, one.profile[:, list(one.lag).index(lag)])


def test_the_sparkline_rises_with_the_reach() -> None:
    one = course(histories.history(60), "rnn.l0")
    bars = sparkline(one, console(), 60)
    assert bars[0] == "▂"
    assert "█" in bars
    assert bars[-1] == "▃"


def test_where_only_ascii_can_be_written() -> None:
    one = console(80, 24, **PLAIN)
    buffer = io.BytesIO()
    one.file = io.TextIOWrapper(buffer, encoding="ascii")
    one.print(view([Followed("a", histories.history(20))], one))
    one.file.flush()
    text = buffer.getvalue().decode("ascii")
    assert "rate -0.2" in text


def test_several_runs_stand_side_by_side_where_there_is_room() -> None:
    runs = [Followed("a", histories.history(20)), Followed("b", histories.history(9))]
    wide = console(150, 30, **PLAIN)
    wide.print(view(runs, wide))
    assert printed(wide)[0].startswith("a: Net")
    assert "b: Net" in printed(wide)[0]
    narrow = console(80, 60, **PLAIN)
    narrow.print(view(runs, narrow))
    assert "b: Net" not in printed(narrow)[0]


def test_nothing_yet_is_said(tmp_path: Path) -> None:
    Writer(tmp_path, title="Net")
    found = shown(History.read(tmp_path), console(**PLAIN))
    assert found[0] == "a: Net, waiting"
    assert found[1].startswith("no probe yet")


# ----------------------------------------------------------------------------------- following


def writing(folder: Path, count: int) -> Callable[[float], None]:
    """Writes the next probe whenever somebody waits for it, and closes behind the last."""
    writer, rest = Writer(folder, title="Net"), histories.probes(count)

    def wait(_: float) -> None:
        if rest:
            writer.probe(rest.pop(0), histories.CELLS)
        else:
            writer.close()

    return wait


def test_a_pipe_gets_a_line_for_each_probe_as_it_comes(tmp_path: Path) -> None:
    wait = writing(tmp_path, 5)
    one = console(400, terminal=False)
    follow([Followed("a", History.read(tmp_path))], one, wait=wait)
    steps = [line.split("  ")[0] for line in printed(one)]
    assert steps == [f"update {1 + 100 * n}" for n in range(5)]


def test_the_view_is_drawn_until_the_end(tmp_path: Path) -> None:
    wait = writing(tmp_path, 3)
    one = console(80, 24, **PLAIN)
    follow([Followed("a", History.read(tmp_path))], one, wait=wait)
    assert any("update 201" in line and "ended" in line for line in printed(one))


def test_another_history_in_the_same_place_is_shown_from_its_start(tmp_path: Path) -> None:
    histories.write(tmp_path, 4)
    history = History.read(tmp_path)
    one = console(400, terminal=False)
    calls = []

    def wait(_: float) -> None:
        calls.append(1)
        assert len(calls) < 3
        writer = Writer(tmp_path, force=True, title="Net")
        writer.probe(histories.probes(1)[0], histories.CELLS)
        writer.close()

    history.refresh()
    writer = Writer(tmp_path, resume=True, title="Net")  # so that it has not ended
    history.refresh()
    writer.note(Note(1, "resumed", "goes on"))
    writer.close()
    follow([Followed("a", history)], one, wait=wait)
    assert printed(one)[0].startswith("update 1")


def test_lines_name_what_broke() -> None:
    found = histories.history(60)
    text = "\n".join(lines(Followed("a", found), 0, several=True))
    assert text.startswith("a  update 1  loss")
    assert text.count("NaN or Inf") == int(found.data["nonfinite"].sum())


def test_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = _code(lambda: group.main(["watch", str(tmp_path / "none")], standalone_mode=False))
    assert code == 2
    assert "give the folder of a run that gradflow.watch writes" in capsys.readouterr().err
    assert _code(lambda: group.main(["watch"], standalone_mode=False)) == 2
    assert "watch needs a run, got none" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path, title="Net")
    writer.probe(histories.probes(1)[0], histories.CELLS)
    with subprocess.Popen(
        [sys.executable, "-m", "gradflow", "watch", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        # what a shell starts in the background ignores it, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline().startswith("update 1")
        running.send_signal(signal.SIGINT)
        try:
            assert running.wait(60) == 130
        finally:
            running.kill()
        assert running.stderr.read() == ""
