"""What shows a training: its sentences, pictures, page, files and comparison, on made-up histories."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import histories
import numpy as np
import pytest
from click.testing import CliRunner
from seam import DOTS_ACROSS, clipping_began, course, edges, prepare, sentence, shared_by, stretches
from test_reporter_figures import overlapping

import gradflow
from gradflow.analysis import load as load_analysis
from gradflow.cli import _code
from gradflow.cli import gradflow as group
from gradflow.errors import InputError
from gradflow.history import History, LayerProbe, Probe, lag_grid
from gradflow.limits import PAGE_BYTES, VERDICTS
from gradflow.reporter import HISTORY_KINDS, plot_histories

STEPS = 100  # of the sequences


def probe(
    step: int,
    verdict: str = "vanishing",
    horizon: float = 10.0,
    *,
    clipped: float = 0.0,
    **more: float,
) -> Probe:
    """One probe of the layer `l0` whose gradient falls to 10⁻³ at its horizon."""
    lags = lag_grid(STEPS)
    fall = 3 / horizon if math.isfinite(horizon) and horizon > 0 else 0.0
    values = {"horizon": horizon, "searched": 99.0, "span": 100.0, "rate": -0.1, **more}
    falling = more.pop("profile", -fall) * lags
    one = LayerProbe(values, verdict, lags=lags, profile=falling, direct=falling)
    return Probe(step, {"clipped": clipped}, {"l0": one})


def story(*probes: Probe) -> str:
    """The sentence on a training of these probes."""
    return sentence(course(History.of("Net", probes), "l0"))


def series(*parts: tuple[int, str, float, float]) -> list[Probe]:
    """So many probes each of a verdict, a horizon and whether clipping acted, a hundred updates apart."""
    rows = [part[1:] for part in parts for _ in range(part[0])]
    return [
        probe(100 * (number + 1), verdict, horizon, clipped=clipped)
        for number, (verdict, horizon, clipped) in enumerate(rows)
    ]


STORIES = {
    "one": (
        [probe(100)],
        "l0 reached 10 steps; vanishing throughout.",
    ),
    "the same all along": (
        series((8, "vanishing", 12.0, 0.0)),
        "l0 reached 12 steps at first and at the end; vanishing throughout.",
    ),
    "learns": (
        series((5, "vanishing", 5.0, 0.0), (5, "stable", math.inf, 0.0)),
        "l0 learned to reach all 99 steps by update 600; vanishing up to update 500, stable since update "
        "600.",
    ),
    "learns, and dies after clipping": (
        series(
            (5, "vanishing", 5.0, 0.0),
            (4, "stable", 84.0, 0.0),
            (1, "stable", 84.0, 1.0),
            (6, "vanishing", 9.0, 1.0),
        ),
        "l0 learned to reach 84 steps by update 600 and reached 9 steps at the end; vanishing up to update "
        "500, stable from 600 to 1,000, vanishing again since update 1,100, 100 updates after clipping began "
        "to act at every probe.",
    ),
    "clipping long before": (
        series((3, "stable", 84.0, 0.0), (9, "stable", 84.0, 1.0), (6, "vanishing", 9.0, 1.0)),
        "l0 reached 84 steps at best, 9 steps at the end; stable up to update 1,200, vanishing since update "
        "1,300.",
    ),
    "inconclusive on the way": (
        series((4, "vanishing", 9.0, 0.0), (4, "inconclusive", 9.0, 0.0), (4, "stable", 9.0, 0.0)),
        "l0 reached 9 steps at first and at the end; vanishing up to update 400, stable since update 900.",
    ),
    "inconclusive between the same": (
        series((4, "stable", 9.0, 0.0), (4, "inconclusive", 9.0, 0.0), (4, "stable", 9.0, 0.0)),
        "l0 reached 9 steps at first and at the end; stable up to update 400, inconclusive from 500 to 800, "
        "stable again since update 900.",
    ),
    "two probes are no change": (
        series((5, "stable", 9.0, 0.0), (2, "vanishing", 9.0, 0.0), (5, "stable", 9.0, 0.0)),
        "l0 reached 9 steps at first and at the end; stable at 10 of 12 probes.",
    ),
    "another verdict at both ends": (
        series(
            (1, "vanishing", 9.0, 0.0), (5, "stable", 9.0, 0.0), (1, "inconclusive", 9.0, 0.0),
            (3, "vanishing", 9.0, 0.0),
        ),
        "l0 reached 9 steps at first and at the end; stable from update 200 to 600, vanishing since update "
        "800.",
    ),
    "another verdict at the last probe": (
        series((8, "stable", 9.0, 0.0), (1, "exploding", 9.0, 0.0)),
        "l0 reached 9 steps at first and at the end; stable at 8 of 9 probes, exploding at the last probe.",
    ),
    "lost and won again": (
        series((5, "vanishing", 44.0, 0.0), (5, "vanishing", 3.0, 0.0), (5, "vanishing", 42.0, 0.0)),
        "l0 reached 44 steps at first, 42 steps at the end, only 3 steps at update 600; vanishing "
        "throughout.",
    ),
    "not finite, and not measured from there on": (
        [probe(100), *(probe(n, "inconclusive", math.nan, searched=0.0, rate=math.nan, nonfinite=1.0,
                             profile=math.nan) for n in (200, 300))],
        "l0 reached 10 steps at first; vanishing up to update 100, inconclusive since update 200; NaN or "
        "Inf first seen at update 200, at 2 probes.",
    ),
    "not finite": (
        [probe(100), probe(200, nonfinite=1.0, nonfinite_at=17.0), probe(300)],
        "l0 reached 10 steps at first and at the end; vanishing throughout; NaN or Inf first seen at update "
        "200, time step 17.",
    ),
    "beyond what was searched": (
        [probe(100, "vanishing", math.nan, searched=40.0)],
        "l0 reached at least 40 steps; vanishing throughout.",
    ),
    "mostly another verdict than at first": (
        [probe(100 * n, word) for n, word in enumerate(
            ["exploding", "stable", "stable", "inconclusive", "stable", "stable"], start=1)],
        "l0 reached 10 steps at first and at the end; stable at 4 of 6 probes.",
    ),
    "no verdict that lasts": (
        [probe(100 * n, word) for n, word in enumerate(
            ["exploding", "stable", "dead", "stable", "inconclusive", "dead"], start=1)],
        "l0 reached 10 steps at first and at the end; changing: stable at 2, dead at 2, exploding at 1, "
        "inconclusive at 1 of 6 probes.",
    ),
    "probes without a verdict are no stretch": (
        series((6, "exploding", 9.0, 0.0), (4, "", 9.0, 0.0), (1, "dead", 9.0, 0.0),
               (1, "stable", 9.0, 0.0)),
        "l0 reached 9 steps at first and at the end; exploding at 6 of 8 probes, stable at the last probe.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STORIES)
def test_what_happened_is_told_in_a_sentence(name: str) -> None:
    probes, said = STORIES[name]
    assert story(*probes) == said


def made_up(random: np.random.Generator) -> list[Probe]:
    """Some stretches of verdicts, some of them disturbed, with probes that gave none."""
    words, rows = random.choice([*VERDICTS, ""], 3), []
    for _ in range(random.integers(1, 6)):
        word, disturbed = random.choice(words), random.random() < 0.4
        far = random.choice([3.0, 9.0, 20.0, 84.0, math.inf, math.nan])
        clipped = float(random.integers(2))
        for _ in range(random.integers(1, 9)):
            now = random.choice(words) if disturbed and random.random() < 0.5 else word
            rows.append((1, str(now), far + random.integers(2), clipped))
    return series(*rows)


def untrue(found: Any, said: str) -> Iterator[str]:
    """What a sentence says of verdicts and is not so, by counting in the probes themselves."""
    verdict, place = found.verdict, {f"{int(n):,}": k for k, n in enumerate(found.step)}
    known, number, end = verdict[verdict != ""], r"([\d,]*\d)", -1
    last = re.search(r", (\w+) at the last probe", said)
    if last and known[-1] != last[1]:
        yield last[0]
    for whole in re.finditer(r"; (\w+) throughout", said):
        if set(known) != {whole[1]}:
            yield whole[0]
    for some in re.finditer(r"; (\w+) at (\d+) of (\d+) probes", said):
        count = int((known == some[1]).sum())
        if (count, len(known)) != (int(some[2]), int(some[3])) or 2 * count < len(known):
            yield some[0]
    for each in re.finditer(r"((?:\w+ at \d+, )+\w+ at \d+) of (\d+) probes", said):
        if sum(int(n) for n in re.findall(r" at (\d+)", each[1])) != int(each[2]):
            yield each[0]
    when = (
        rf"(?:(from) (?:update )?{number} to {number}|(up to|at|(?:again )?since) update {number})"
    )
    for told in re.finditer(rf"(\w+) {when}(?: \(but for (\d+) of (\d+) probes\))?", said):
        word, how = told[1], told[2] or told[5]
        if word in ("by", "seen", "step", "steps"):
            continue
        first = place[told[3] or told[6]]
        stop = place[told[4]] if told[4] else first if how in ("up to", "at") else len(verdict) - 1
        first = 0 if how == "up to" else first
        here = verdict[first : stop + 1][verdict[first : stop + 1] != ""]
        others = int((here != word).sum())
        listed = others - (last is not None and told[5] in ("since", "again since"))
        if (
            first <= end
            or len(here) == 0
            or (
                word != "changing"
                and (
                    here[0] != word
                    or 2 * others > len(here)
                    or (told[7] and (int(told[7]), int(told[8])) != (listed, len(here)))
                    or (not told[7] and listed)
                )
            )
        ):
            yield told[0]
        end = stop


REACHED = re.compile(
    r"l0 (?:learned to reach|reached) (?:all |at least )?(?P<far>\d+) steps?"
    r"(?P<when> by update [\d,]*\d| at best| at first)?"
    r"(?P<same> and at the end)?"
    r"(?:(?:,| and reached) (?:all |at least )?(?P<end>\d+) steps? at the end)?"
    r"(?:, only (?:at least )?(?P<low>\d+) steps? at update (?P<at>[\d,]*\d))?[;.]"
)


def unreached(found: Any, said: str) -> Iterator[str]:
    """The same of how far it reached: each number is that of a probe at the place it is told of."""
    steps, told = np.fmin(found.reach, 99), REACHED.match(said)
    assert told is not None, said

    def near(update: str) -> np.ndarray:
        at = int(update.replace(",", "")) // 100 - 1
        return np.asarray(steps[max(0, at - 1) : at + 2])

    when = told["when"] or " at first"
    around = {" at best": steps, " at first": steps[:2]}.get(when)
    if int(told["far"]) not in (
        near(when.removeprefix(" by update ")) if around is None else around
    ):
        yield told[0]
    if told["low"] and int(told["low"]) not in near(told["at"]):
        yield told[0]
    end = told["far"] if told["same"] else told["end"]
    if end and int(end) not in steps[-2:]:
        yield told[0]


@pytest.mark.parametrize("seed", range(100))
def test_the_sentence_on_any_training_is_what_its_probes_say(seed: int) -> None:
    found = course(History.of("Net", made_up(np.random.default_rng(seed))), "l0")
    said = sentence(found)
    assert [*untrue(found, said), *unreached(found, said)] == [], (said, found.verdict.tolist())


def test_a_sentence_that_is_not_so_is_seen() -> None:
    found = course(History.of("Net", series((5, "stable", 9, 0), (5, "dead", 3, 0))), "l0")
    for wrong in (
        "l0 reached 3 steps at first; stable up to update 500",
        "l0 reached 9 steps; stable up to update 600, dead since update 700",
        "l0 reached 9 steps; dead throughout",
        "l0 reached 9 steps; stable at 6 of 10 probes",
        "l0 reached 9 steps; stable up to update 500 (but for 1 of 5 probes), dead since update 600",
    ):
        assert [*untrue(found, wrong), *unreached(found, wrong)] != [], wrong


def test_without_gains_the_reach_is_that_of_the_gradient() -> None:
    lags = lag_grid(STEPS)
    layers = [
        LayerProbe({}, lags=lags, profile=-slope * lags, direct=-slope * lags)
        for slope in (0.5, 0.5)
    ]
    found = History.of("Net", [Probe(n + 1, {}, {"l0": one}) for n, one in enumerate(layers)])
    said = sentence(course(found, "l0"))
    assert said == "l0: the gradient of the last loss step reached 7 steps at first and at the end."


def test_a_layer_that_was_never_measured_says_so() -> None:
    found = History.of("Net", [Probe(1, {}, {"l0": LayerProbe({})})])
    assert sentence(course(found, "l0")) == "l0 was not measured in 1 probe."
    chart = plot_histories([found])
    assert any("not measured" in text.get_text() for ax in chart.axes for text in ax.texts)


def test_a_verdict_that_lasts_is_a_stretch() -> None:
    words = np.array(["stable"] * 2 + ["vanishing"] * 5 + ["stable"] + ["vanishing"] * 3)
    assert [(run.verdict, run.start, run.stop) for run in stretches(words)] == [
        ("vanishing", 0, 11)
    ]


def test_clipping_begins_where_it_did_not_act_before() -> None:
    found = course(History.of("Net", series((4, "stable", 9, 0.0), (4, "stable", 9, 1.0))), "l0")
    assert clipping_began(found).tolist() == [4]
    always = course(History.of("Net", series((8, "stable", 9, 1.0))), "l0")
    assert clipping_began(always).tolist() == []


def test_probes_written_twice_count_once_in_order() -> None:
    again = History.of(
        "Net", [probe(100), probe(200), probe(300), probe(200, "stable"), probe(400)]
    )
    found = course(again, "l0")
    assert found.step.tolist() == [100, 200, 300, 400]
    assert found.verdict.tolist() == ["vanishing", "stable", "vanishing", "vanishing"]


# ------------------------------------------------------------------------------------- the pictures


def test_the_waterfall_holds_the_profile() -> None:
    found = histories.history(40)
    one = course(found, "rnn.l0")
    chart = prepare(one, shared_by([one]))
    middle = (np.arange(DOTS_ACROSS) + 0.5) / DOTS_ACROSS
    across = chart.shared.steps[0] + middle * (chart.shared.steps[1] - chart.shared.steps[0])
    for place, step in enumerate(one.step):
        column = np.abs(across - step).argmin()
        shown = chart.values[:, column]
        assert set(shown[~np.isnan(shown)]) <= set(one.profile[place]), step
        assert shown[0] == one.profile[place, 0]
        assert shown[-1] == one.profile[place, -1]
    assert chart.pool == 1


def test_many_probes_are_shown_by_their_median() -> None:
    found = histories.history(2000)
    one = course(found, "rnn.l0")
    chart = prepare(one, shared_by([one]))
    assert chart.pool == 3
    assert "median of 3 probes" in chart.reading
    assert chart.values[:, 0].tolist()[-1] == np.sort(one.profile[:3, -1])[1]


def test_a_shorter_run_is_drawn_on_the_scale_of_the_longer() -> None:
    runs = [histories.history(20, length=100), histories.history(40, length=300)]
    shown = [course(run, "rnn.l0", name) for run, name in zip(runs, "ab", strict=True)]
    shared = shared_by(shown)
    assert shared.steps == (edges(shown[1].step)[0], edges(shown[1].step)[-1])
    short, long = (prepare(one, shared) for one in shown)
    assert np.isnan(short.values[:, -1]).all()
    assert np.isnan(short.values[-1]).all()
    assert not np.isnan(long.values).any()


def test_nan_is_magenta() -> None:
    lags = lag_grid(STEPS)
    lost = np.full(len(lags), np.nan)
    broken = LayerProbe({"nonfinite": 1.0}, lags=lags, profile=lost, direct=lost)
    found = History.of("Net", [probe(100), Probe(200, {}, {"l0": broken}), probe(300)])
    one = course(found, "l0")
    chart = prepare(one, shared_by([one]))
    assert chart.bad[:, DOTS_ACROSS // 2].all()
    assert not chart.bad[:, 0].any()


@pytest.mark.parametrize("kind", HISTORY_KINDS)
def test_no_words_overlap(kind: str) -> None:
    assert overlapping(plot_histories([histories.history(30), histories.history(12)], kind)) == []


@pytest.mark.parametrize("kind", HISTORY_KINDS)
def test_one_probe_can_be_drawn(kind: str) -> None:
    assert overlapping(plot_histories([histories.history(1)], kind)) == []


def test_titles_are_what_happened() -> None:
    figure = gradflow.plot(histories.history(60), layer="rnn.l0")
    words = " ".join(text.get_text() for text in figure.texts)
    assert "rnn.l0: learned to reach all 99 steps by update 3,201" in words


def test_axes_of_the_readers_own_get_one_layer() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    assert gradflow.plot(histories.history(9), "rates", layer="rnn.l1", ax=ax) is figure
    assert ax.lines
    # strips of verdicts are not drawn there, and their colours not named
    waterfall = Figure(layout="constrained").add_subplot()
    gradflow.plot(histories.history(40), layer="rnn.l0", ax=waterfall)
    (bar,) = (one for one in waterfall.figure.axes if one is not waterfall)
    assert not bar.get_ylabel()
    with pytest.raises(InputError, match="ax must be given for one layer, got 2"):
        gradflow.plot(histories.history(9), ax=ax)


def test_what_cannot_be_drawn_is_said() -> None:
    found = histories.history(5)
    kinds = ", ".join(HISTORY_KINDS)
    with pytest.raises(
        InputError, match=f"kind of a history must be one of {kinds}, got 'gain-map'"
    ):
        gradflow.plot(found, "gain-map")
    with pytest.raises(
        InputError,
        match="must be a history with a layer that was measured, got none; wait for the first probe",
    ):
        gradflow.plot(History.of("Net", []))
    with pytest.raises(InputError, match=r"layer must be one of rnn\.l0, rnn\.l1, got 'x'"):
        gradflow.plot(found, layer="x")
    with pytest.raises(InputError, match="must be histories only, got a str as well"):
        gradflow.plot([found, "x"])  # type: ignore[list-item]


# --------------------------------------------------------------------------------- page and files


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    histories.write(folder / "run", 30)
    gradflow.report(gradflow.load(folder / "run"), folder / "report")
    return folder / "report"


def test_the_page_reads_offline_and_is_small(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert len(page.encode()) <= PAGE_BYTES
    assert page.count("<script>") == 1  # that of the page; the others are data
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    found = histories.history(30)
    for layer in found.layers:
        assert escape(sentence(course(found, layer))) in page
    first, *_ = re.findall(r'alt="(\w+):', page)
    assert first == "waterfall"


def test_the_files_are_those_that_were_asked_for(report: Path, tmp_path: Path) -> None:
    names = {path.name for path in report.iterdir()}
    tables = {f"{kind}.csv" for kind in ("layers", "steps", "lags", "gates", "notes")}
    assert names == {"report.html", "summary.json", "figures", *tables}
    some = gradflow.report(histories.history(4), tmp_path / "some", formats=["json"])
    assert list(some) == ["summary.json"]
    with pytest.raises(InputError, match="formats of a history must be one or more of html, json"):
        gradflow.report(histories.history(4), tmp_path / "other", formats=["docx"])
    assert not (tmp_path / "other").exists()


def test_the_summary_is_strict_json(report: Path) -> None:
    made = json.loads((report / "summary.json").read_text(), parse_constant=pytest.fail)
    assert made["kind"] == "history"
    assert made["probes"] == 30
    assert made["verdicts"]["rnn.l0"] == "vanishing"
    assert made["layers"][0]["horizon"]["never"] is False


def test_names_are_escaped(tmp_path: Path) -> None:
    one = probe(100).layers["l0"]
    found = History.of("<b>Net</b>", [Probe(100, {}, {"<i>a</i>": one})])
    gradflow.report(found, tmp_path / "r", formats=["html"])
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<b>" not in page
    assert "<i>" not in page


def test_of_many_layers_the_worst_have_pictures(tmp_path: Path) -> None:
    one = probe(100).layers["l0"]
    layers = {f"l{n}": replace(one, verdict="stable" if n < 9 else "dead") for n in range(10)}
    found = History.of("Net", [Probe(100, {}, layers)])
    gradflow.report(found, tmp_path / "r", formats=["html", "png"])
    names = {path.name.split("-")[0] for path in (tmp_path / "r" / "figures").iterdir()}
    assert names == {"l0", "l1", "l2", "l3", "l4", "l9", "waterfall.png"}
    assert "of the 6 worst layers" in (tmp_path / "r" / "report.html").read_text()


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="the run must be a history with a layer that was measured, got none"
    ):
        gradflow.report(History.of("Net", []), tmp_path / "r")
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------ the command line


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of a command."""
    printed = []

    def call() -> None:
        done = CliRunner().invoke(
            group, list(arguments), catch_exceptions=False, standalone_mode=False
        )
        printed.append(done.stdout)
        if done.exception:
            raise done.exception

    code = _code(call)
    return code, "".join(printed)


def test_report_draws_the_page_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    histories.write(Path("runs/a"), 12)
    code, printed = run("report", "runs/a")
    assert code == 0
    assert "page: reports/a/report.html" in printed
    assert "rnn.l0 learned to reach" in printed
    assert (tmp_path / "reports/a/report.html").is_file()
    code, printed = run("report", "runs/a", "--json", "-o", "other")
    assert json.loads(printed)["probes"] == 12
    assert run("report", "runs/a", "-o", "third", "--fail-on", "vanishing")[0] == 2


def test_compare_holds_trainings_against_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    histories.write(Path("runs/a"), 12)
    histories.write(Path("runs/b"), 20, seed=1)
    code, printed = run("compare", "runs/a", "runs/b")
    assert code == 0
    assert "rnn.l0, a → b:" in printed
    found = gradflow.compare({name: gradflow.load(f"runs/{name}") for name in "ab"})
    page = Path("reports/comparison/comparison.html").read_text()
    assert "rnn.l0, a → b:" in repr(found) and found.sentences[0] in page
    assert "horizon_low" not in page and '<td data-of="horizon steps">' in page
    code, printed = run("compare", "runs/a", "runs/b", "--json", "-o", "told")
    told = json.loads(printed)
    assert (code, set(told["runs"]), told["sentences"][0]) == (0, {"a", "b"}, found.sentences[0])
    assert told == json.loads(Path("told/comparison.json").read_text())
    with pytest.raises(gradflow.GradflowError, match="must be two runs or more, got 1"):
        gradflow.compare(gradflow.load("runs/a"))


def test_a_training_is_not_compared_with_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    histories.write(Path("runs/a"), 4)
    gradflow.diagnose(torch.nn.GRU(3, 4), torch.randn(9, 2, 3)).save("run.nc")
    assert len(load_analysis("run.nc")) == 1
    assert run("compare", "runs/a", "run.nc")[0] == 2
    assert not Path("reports").exists()


def test_comparing_names_what_is_in_one_only() -> None:
    from gradflow.trainings import alone, differences

    one = History.of("a", [probe(100)])
    other = History.of("b", [replace(probe(100), layers={"l1": probe(100).layers["l0"]})])
    assert alone({"a": one, "b": other}) == ["l0 is in a only", "l1 is in b only"]
    assert differences({"a": one, "b": other}) == []
