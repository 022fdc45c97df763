"""What shows a sweep: groups of runs, with the seed as the unit, in pictures, page, tables and comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats
from test_reporter_figures import overlapping

import gradflow
from gradflow import cli
from gradflow.errors import InputError
from gradflow.history import History, LayerProbe, Note, Probe, Source, Writer, lag_grid
from gradflow.limits import PAGE_BYTES
from gradflow.reporter import course, courses, groups_of, history_summary, render_history, rows_of
from gradflow.trainings import group_differences

RATES = {"lstm": (-0.05, -0.07, -0.06, -0.10), "rnn": (-0.4, -0.3, -0.5, -0.35)}
STEPS = (0, 50, 100)
LENGTH = 60


def rows(layers: tuple[str, ...] = ("l0",)) -> list[Probe]:
    """Two cells × four seeds × three steps; gains that fall exponentially; the last file is broken."""
    found = []
    for cell, rates in RATES.items():
        for seed, rate in enumerate(rates):
            for step in STEPS:
                slow = rate * (1.5 - step / 200)
                horizon = float(np.ceil(np.log(1e-3) / slow))
                values = {
                    "rate": slow, "rate_low": slow - 0.01, "rate_high": slow + 0.01, "rate_settled": 1.0,
                    "horizon": horizon if horizon < LENGTH else np.nan, "searched": LENGTH - 1.0,
                    "span": float(LENGTH), "gain": slow * LENGTH, "gain_steps": LENGTH - 1.0,
                }  # fmt: skip
                lags = lag_grid(LENGTH)
                one = LayerProbe(values, "vanishing", lags=lags, profile=slow * lags / np.log(10),
                                 direct=np.where(lags == 0, 0.0, -np.inf))  # fmt: skip
                source = Source(
                    f"{cell}/seed={seed}/{step}.pt", f"{cell}/seed={seed}", "digits of the name"
                )
                found.append(
                    Probe(step, {"loss": 1 / (1 + step)}, dict.fromkeys(layers, one), source=source)
                )
    broken = Source("rnn/seed=3/150.pt", "rnn/seed=3", "digits of the name", "150.pt is damaged")
    note = Note(150, "failed", "150.pt is damaged")
    return [*found, Probe(150, {}, {}, notes=(note,), source=broken)]


@pytest.fixture
def history() -> History:
    return History.of("Net", rows(), {"l0": "LSTM"})


def test_groups_are_runs_that_differ_in_the_label_only(history: History) -> None:
    found = groups_of(courses([history]))
    assert [(one.name, [run.run for run in one.runs]) for one in found] == [
        (cell, [f"{cell}/seed={seed}" for seed in range(4)]) for cell in RATES
    ]
    every = groups_of(courses([history]), "run")
    assert [(one.name, one.by, len(one.runs)) for one in every] == [("", "run", 8)]
    with pytest.raises(
        InputError, match=r"by must be a label of the runs lstm/seed=0, .*got 'width'"
    ):
        groups_of(courses([history]), "width")
    with pytest.raises(InputError, match="by must be a word such as 'seed'"):
        groups_of(courses([history]), "a b")


@pytest.mark.parametrize(
    ("run", "name"),
    [("seed=3", ""), ("lstm/seed-3", "lstm"), ("lstm_seed3_big", "lstm/big"), ("width=8/seed/1", "width=8"),
     ("seed3/width=8", "width=8"), ("a-seed_12", "a")],
)  # fmt: skip
def test_names_of_groups(run: str, name: str) -> None:
    one = History.of("Net", [Probe(1, {}, rows()[0].layers, source=Source("a.pt", run))])
    (group,) = groups_of(courses([one]))
    assert (group.name.replace("_", "/"), group.by) == (name, "seed")


def test_a_row_has_the_mean_over_seeds_at_the_last_checkpoint(history: History) -> None:
    first, second = rows_of(history)
    assert (first.group.name, second.group.name) == (
        "rnn",
        "lstm",
    )  # which reaches least comes first
    assert first.verdict_words == "vanishing 4 of 4" and first.rates.tolist() == list(RATES["rnn"])
    known = stats.t.interval(0.95, 3, np.mean(RATES["rnn"]), stats.sem(RATES["rnn"]))
    assert (first.rate.low, first.rate.high) == pytest.approx(known, rel=1e-9)
    reaches = [min(np.ceil(np.log(1e-3) / rate), LENGTH - 1) for rate in RATES["lstm"]]
    assert second.reach.value == pytest.approx(stats.gmean(reaches), rel=1e-12)
    # the sequences of one seed have no say in the interval, and a broken file hides none before it
    assert first.numbers["runs"] == 4 and course(history.runs["rnn/seed=3"], "l0").step[-1] == 150


def test_the_difference_of_two_groups_is_welchs_over_seeds(history: History) -> None:
    (found,) = group_differences(rows_of(history))
    test = stats.ttest_ind(RATES["lstm"], RATES["rnn"], equal_var=False)
    low, high = test.confidence_interval(1 - 0.05 / 2)  # of two intervals, Bonferroni
    assert (found.rate_low, found.rate_high) == pytest.approx((low, high), rel=1e-6)
    assert found.larger and "more than seeds differ by chance" in found.sentence
    assert "95 % interval over seeds for all 2 at once" in found.sentence
    alone = [probe for probe in rows() if probe.source and "seed=0" in probe.source.run]
    (one,) = group_differences(rows_of(History.of("Net", alone)))
    assert one.larger is None and np.isnan(one.rate_low)
    assert one.sentence.endswith("without an interval: it takes two seeds or more in each")


def test_the_picture_of_groups(history: History) -> None:
    figure = gradflow.plot(history, kind="groups", by="seed")
    assert isinstance(figure, Figure)
    rate, reach = figure.axes[:2]
    thick = [line for line in rate.lines if line.get_linewidth() > 1]
    means = np.array(RATES["lstm"]).mean() * (1.5 - np.array(STEPS) / 200)
    assert thick[0].get_label() == "lstm (4 seeds)"
    assert np.allclose(np.asarray(thick[0].get_ydata()), means)
    thin = [line for line in rate.lines if 0.5 < line.get_linewidth() < 0.7]
    assert len(thin) == 8
    band = rate.collections[0].get_paths()[0].vertices
    known = stats.t.interval(0.95, 3, np.mean(RATES["lstm"]), stats.sem(RATES["lstm"]))
    ends = band[band[:, 0] == 100][:, 1]
    assert (ends.min(), ends.max()) == pytest.approx(known, rel=1e-6)
    assert reach.get_ylim()[1] > np.log10(LENGTH)
    said = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "steps reached at training step 100 (means of 4 seeds): lstm 59, rnn 19" in said
    ends = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in reach.collections])
    assert ends.min() >= 0 and ends.max() <= np.log10(LENGTH)  # of an interval too
    assert overlapping(figure) == []
    two = History.of("Net", rows(("l0", "l1")))
    assert len(gradflow.plot(two, kind="groups").axes) == 4
    assert len(gradflow.plot(two, kind="groups", layer="l1").axes) == 2
    assert len(gradflow.plot(two.runs["rnn/seed=1"], kind="waterfall").axes) >= 2


def test_report_page_tables_and_terminal(history: History, tmp_path: Path) -> None:
    files = gradflow.report(history, tmp_path / "report")
    page = files["report.html"].read_text()
    assert len(page.encode()) <= PAGE_BYTES
    assert "25 checkpoints of 8 runs, training steps 0 to 150" in page
    assert "1 checkpoint could not be measured" in page and "150.pt is damaged" in page
    table = page[page.index("Groups, the one that reaches least first") :]
    assert table.index("rnn (4 seeds)") < table.index("lstm (4 seeds)")
    assert "Intervals are over the seeds of a group: a seed is the unit, not a sequence." in page
    assert "training is not over" not in page
    rows_written = (tmp_path / "report/groups.csv").read_text().splitlines()
    assert rows_written[0].startswith("group,layer,by,runs,verdicts,rate,rate_low,rate_high,reach")
    steps = (tmp_path / "report/steps.csv").read_text().splitlines()
    assert {"run", "checkpoint", "failed"} <= set(steps[0].split(","))
    summary = json.loads((tmp_path / "report/summary.json").read_text())
    assert [row["group"] for row in summary["groups"]] == ["rnn", "lstm"]
    assert summary["layers"][0]["run"] == "lstm/seed=0"
    console = Console(width=100, record=True)
    render_history(history, console)
    said = console.export_text()
    assert "lstm (4 seeds)" in said and "vanishing 4 of 4" in said
    assert "3 more with -v, and on the page." in said


def test_the_interval_of_a_rate_says_what_it_is_over() -> None:
    for batches, unit in ((1.0, "sequences"), (3.0, "batches")):
        probes = [
            replace(one, layers={name: replace(layer, values=layer.values | {"batches": batches})
                                 for name, layer in one.layers.items()})
            for one in rows()
        ]  # fmt: skip
        figure = gradflow.plot(History.of("Net", probes).runs["lstm/seed=0"], kind="rates")
        said = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
        assert f"its 95 % interval over {unit}:" in said


def test_a_broken_last_file_leaves_the_numbers_before_it(history: History) -> None:
    """The summary is of the last checkpoint that was measured, and says which."""
    (of_broken,) = [one for one in history_summary(history)["layers"] if one["run"] == "rnn/seed=3"]
    assert (of_broken["step"], of_broken["rate"]["value"]) == (100, -0.35)
    assert of_broken["horizon"] == {"value": 20.0, "never": False}
    first, *lines = repr(history).splitlines()
    assert first.endswith("25 checkpoints of 8 runs, training steps 0 to 150") and len(lines) == 8
    said = "rnn/seed=3 l0 LSTM vanishing, rate -0.35 nats per step, horizon 20 steps"
    assert " ".join(lines[-1].split()) == said


@pytest.mark.parametrize(
    ("counts", "extent", "when"),
    [
        ("epoch", ", epochs 0 to 150", "epoch 150"),
        ("update", ", updates 0 to 150", "update 150"),
        ("", ", training steps 0 to 150", "training step 150"),
        ("checkpoint", "", "checkpoint 150"),
    ],
)
def test_a_step_is_called_what_its_checkpoint_says(counts: str, extent: str, when: str) -> None:
    probes = [
        replace(one, source=replace(one.source, counts=counts)) for one in rows() if one.source
    ]
    found = History.of("Net", probes, {"l0": "LSTM"})
    console = Console(width=200, record=True)
    render_history(found, console, verbose=True)
    words = console.export_text()
    assert (
        f"Net, 25 checkpoints of 8 runs{extent}\n" in words
        and f"\n{when}: 150.pt is damaged" in words
    )
    assert ("update" in words) == (counts == "update")
    figure = gradflow.plot(found.runs["lstm/seed=0"])
    words = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "A column is one checkpoint of the training" in words and "probe" not in words
    mixed = [*probes[:3], *rows()[3:]]
    assert History.of("Net", mixed).counted_in in ("training step", found.counted_in)


def test_compare_takes_one_sweep_or_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cells in (("both", RATES), ("one", {"rnn": ()})):
        writer = Writer(tmp_path / name, title="Net", swept=True, batches=[f"{name}.pt"])
        for probe in rows():
            if probe.source is not None and probe.source.run.split("/")[0] in cells:
                writer.probe(probe, {"l0": "LSTM"})
        writer.close()

    def compare(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", *arguments])
        return int(stop.value.code or 0)

    both, one = str(tmp_path / "both"), str(tmp_path / "one")
    assert compare(both, "-o", str(tmp_path / "a")) == 0
    assert "more than seeds differ by chance" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "comparison.html", "comparison.json", "comparison.png", "comparison.csv", "changes.csv"
    }  # fmt: skip
    page = (tmp_path / "a/comparison.html").read_text()
    assert "steps reached [95 %]" in page and "intervals are over seeds" in page
    assert "rate_low" not in page and "lstm (4 seeds), rnn (4 seeds)" in page
    assert compare(both, one, "-o", str(tmp_path / "b")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "both/lstm (4 seeds)" in said
    assert "both was measured on both.pt, one on one.pt: the input decides the rate" in said
    assert compare(one, "-o", str(tmp_path / "c")) == 2
    assert "there is one group of runs, rnn (4 seeds)" in capsys.readouterr().err


def test_the_terminal_says_what_was_said_of_the_whole() -> None:
    """Where training steps are from, and what the intervals are over, without being asked for more."""
    said = (Note(0, "sweep", "training steps are from: x"), Note(0, "warning", "over 4 batches"))
    first, *rest = rows()
    console = Console(width=100, record=True)
    render_history(History.of("Net", [replace(first, notes=said), *rest]), console)
    words = console.export_text()
    assert "sweep: training steps are from: x\nwarning: over 4 batches\n" in words
