"""What gradflow cannot do inside the user's own step becomes a note, never an exception there."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import torch_is_as_found
from hostile import Everything, same, step
from seam import Point

import gradflow
from gradflow.errors import RecordingError
from gradflow.hooks import guard

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::gradflow.GradflowWarning"),
]

SCANS = ["scan0.3", "scan0.6", "scan0.9"]
LAYERS = ["rnn.l0", "rnn.l1", "stock", "cell", "loop", *SCANS]
HIT = {  # what is left out, or has no gradient, after a fault there
    Point.FUSED: {"rnn.l0", "rnn.l1"},
    Point.CELL: {"stock"},
    Point.TAP: {"loop"},
    Point.SCAN: set(SCANS),
    Point.ENTERED: {"cell"},
    Point.LEFT: {"cell"},
    Point.GRADIENT: set(LAYERS),
}


def failing(
    point: Point, *, late: bool, only: int | None = None
) -> tuple[Callable[..., Any], list[int]]:
    """Work that fails at every visit of a point, or at one, before or after it is done."""
    visits: list[int] = []
    do = guard._do

    def work(here: Point, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fails = here is point and only in (None, len(visits))
        if here is point:
            visits.append(len(visits))
        if fails and not late:
            raise RuntimeError("injected\nwith a traceback of many lines")
        result = do(here, work, *args, **kwargs)
        if fails:
            raise AssertionError("injected")
        return result

    return work, visits


CASES = [
    pytest.param(point, only, late, id=f"{point.name}-{only}-{'after' if late else 'before'}")
    for point in Point
    if point is not Point.PROBE  # which lies between two steps
    for only in (None, 1, 2)  # every visit, or one
    for late in (False, True)
    if (point, only, late) != (Point.CLOSING, None, False)  # nothing at all would be closed
]


@pytest.mark.parametrize(("point", "only", "late"), CASES)
def test_a_fault_at_any_point_is_a_note_and_changes_no_bit(
    point: Point, only: int | None, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Everything()
    plain, _ = step(model, recorded=False)
    work, visits = failing(point, late=late, only=only)
    monkeypatch.setattr(guard, "_do", work)
    found, recording = step(model)
    monkeypatch.undo()
    assert visits, "no step of the model comes by there: let it"
    assert same(plain, found) == []
    assert torch_is_as_found()
    if only is not None and len(visits) <= only:
        return
    said = " ".join([*recording.notes, recording.empty_reason, *_of_tracks(recording)])
    assert point.value in said
    assert "injected" in said
    assert "many lines" not in said
    for name in HIT.get(point, set()) if only is None else set():
        whole = name in recording.tracks and recording[name].has_gradient
        assert not whole, f"{name} is given as if nothing had happened"


def _of_tracks(recording: gradflow.Recording) -> list[str]:
    gone = [track.why_no_gradient for track in recording.values() if not track.has_gradient]
    return [
        *gone,
        *(n for t in recording.values() for n in t.notes),
        *(t.parity.reason for t in recording.values()),
    ]


def test_what_a_fault_did_not_touch_is_what_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Everything()
    _, whole = step(model)
    assert sorted(whole.tracks) == sorted(LAYERS)
    for point in (Point.FUSED, Point.CELL, Point.TAP, Point.LEFT):
        monkeypatch.setattr(guard, "_do", failing(point, late=False, only=2)[0])
        _, recording = step(model)
        monkeypatch.undo()
        rest = [name for name in LAYERS if name not in HIT[point]]
        for name in rest:
            assert torch.equal(recording[name].grad_h, whole[name].grad_h)
        for name in HIT[point] - ({"rnn.l0", "rnn.l1"} if point is Point.FUSED else set()):
            with pytest.raises(RecordingError):
                _ = recording[name]


def test_a_fault_would_be_seen_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "guarded", lambda _p, _f, work, *args, **kw: work(*args, **kw))
    monkeypatch.setattr("gradflow.hooks.call._add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(Everything())


# what runs in the user's step outside the guard: doors that decide nothing, and the guard itself
DOORS = {
    "hooks/patch.py": {
        "heard",
        "_told",
        "over",
        "observers_here",
        "is_observed",
        "run_backward",
        "scale",
        "watched",
    },
    "hooks/own/forwards.py": {"forward", "_told", "_entered", "_left", "_note"},
    "hooks/seen.py": {"before", "after", "point", "run", "__init__"},
    "hooks/taps.py": {"tap", "_tell", "_untold"},
    "hooks/linear/scan.py": {"scan", "_tell", "_untold"},
}


def outside_the_guard(model: Everything) -> set[tuple[str, str]]:
    """(file, function) of gradflow's own that the step runs with no guard around it."""
    found: set[tuple[str, str]] = set()
    root = str(Path(gradflow.__file__).parent)

    def look(frame: FrameType, event: str, _: object) -> None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if event != "call" or not file.startswith(root) or function.startswith("<"):
            return
        above = frame.f_back
        while above is not None and above.f_code is not guard._do.__code__:
            above = above.f_back
        if above is None:
            found.add((str(Path(file).relative_to(root)), function))

    with gradflow.record(model):
        sys.setprofile(look)
        try:
            output = model(torch.randn(5, 2, 3))
            torch.amp.GradScaler("cpu").scale(output.sum()).backward()
        finally:
            sys.setprofile(None)
    return found


def test_no_work_is_done_outside_the_guard() -> None:
    """Whatever gradflow does more in a user's step has to go through a point of the table above."""
    found = outside_the_guard(Everything())
    assert ("hooks/patch.py", "heard") in found
    assert [
        (file, name)
        for file, name in sorted(found)
        if file != "hooks/guard.py" and name not in DOORS.get(file, set())
    ] == []


def test_work_outside_the_guard_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gradflow.hooks.own.forwards.guarded", lambda _p, _f, work, *args: work(*args)
    )
    assert ("hooks/recorder.py", "entered") in outside_the_guard(Everything())


class Interrupt:
    """Ctrl-C at the n-th line of gradflow's own that is run."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(str(Path(gradflow.__file__).parent)):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def interrupted(model: Everything, at: int) -> int:
    """Run a step that is interrupted there; how many lines it ran."""
    interrupt = Interrupt(at)
    sys.settrace(interrupt)
    try:
        step(model)
    finally:
        sys.settrace(None)
    return interrupt.lines


def test_ctrl_c_anywhere_leaves_torch_as_found_and_is_what_the_user_sees() -> None:
    model = Everything()
    interrupted(model, -1)  # what is done once only
    lines = interrupted(model, -1)
    for at in random.Random(0).sample(range(1, lines), 15):
        with pytest.raises(KeyboardInterrupt):
            interrupted(model, at)
        assert torch_is_as_found()
        assert torch.is_grad_enabled()
    assert step(model)[1]["cell"].has_gradient
