"""The command line as a user meets it: every file kind, every refusal, exit codes, whole folders."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradflow
from gradflow import cli, workflow
from gradflow.conditions import parse_conditions
from gradflow.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {
    "report.html", "summary.json", "layers.csv", "steps.csv", "lags.csv", "units.csv",
    "findings.csv", "run.nc", "figures",
}  # fmt: skip
NET = """
import torch
from torch import nn

def first_half(output, target):
    return (output - target).abs()[: len(output) // 2].sum()

THREE = 3

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.rnn = nn.GRU(8, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(self.words(x))[0]

class Net(nn.Module):
    def __init__(self, inputs=10, hidden=20, fail=False):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, 1)
        self.fail = fail

    def forward(self, x):
        if self.fail == "exit":
            raise SystemExit(9)
        if self.fail == "print":
            print("noise")
        elif self.fail:
            raise RuntimeError("the tensors do not fit")
        out, _ = self.rnn(x)
        return self.head(out[:, -1, :])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a user's module in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_net.py").write_text(NET)
    return tmp_path


def stacked() -> nn.Module:
    """The stacked classifier of many a tutorial."""
    model = nn.Module()
    model.rnn = nn.LSTM(10, 20, 2, batch_first=True)
    model.head = nn.Linear(20, 1)
    return model


def run(*arguments: str) -> int:
    """The exit code of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def save_state_dict(path: Path) -> None:
    torch.save(stacked().state_dict(), path)


def save_checkpoint(path: Path) -> None:
    model = stacked()
    optimizer = torch.optim.Adam(model.parameters())
    torch.save(
        {"epoch": 3, "model_state_dict": model.state_dict(), "optimizer": optimizer.state_dict()},
        path,
    )


def save_lightning(path: Path) -> None:
    weights = {f"model.{key}": value for key, value in stacked().state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.4.0", "state_dict": weights, "epoch": 1}, path)


def save_safetensors(path: Path) -> None:
    save_file(stacked().state_dict(), path)


def save_pickle(path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(10, 10), nn.LSTM(10, 20, 2, batch_first=True)), path)


def save_compiled(path: Path) -> None:
    weights = {f"module._orig_mod.{key}": value for key, value in stacked().state_dict().items()}
    torch.save(weights, path)


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "state_dict": ("model.pt", save_state_dict),
    "checkpoint": ("checkpoint.pth", save_checkpoint),
    "lightning": ("last.ckpt", save_lightning),
    "safetensors": ("model.safetensors", save_safetensors),
    "pickle": ("module.pt", save_pickle),
    "prefixes": ("wrapped.pt", save_compiled),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_kind_is_analyzed_from_its_weights(
    kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, save = KINDS[kind]
    save(here / name)
    draws = kind in ("state_dict", "pickle")  # a page takes longer than all else
    assert run("analyze", name, "--seq-len", "20", *([] if draws else ["--no-report"])) == 0
    out = capsys.readouterr().out
    assert "l0" in out and "l1" in out
    if draws:
        folder = here / "reports" / Path(name).stem
        assert {path.name for path in folder.iterdir()} == FILES
        last = out.strip().splitlines()[-2:]
        assert last[0] == f"page: reports/{Path(name).stem}/report.html"
        assert last[1].startswith("next: gradflow ")
        page = (folder / "report.html").read_text()
        assert "torch.save" in page and "--input batch.pt" in page
    assert run("inspect", name) == 0
    assert "LSTM(10 → 20, 2 layers)" in capsys.readouterr().out


def save_batch(here: Path, name: str) -> None:
    x, y = torch.randn(5, 7, 10), torch.randn(5, 1)
    if name.endswith(".npz"):
        np.savez(here / name, input=x.numpy(), target=y.numpy())
    elif name.endswith(".safetensors"):
        save_file({"input": x, "target": y}, here / name)
    else:
        torch.save((x, y) if "pair" in name else {"input": x, "target": y}, here / name)


@pytest.mark.parametrize("batch", ["batch.pt", "pair.pt", "batch.npz", "batch.safetensors"])
def test_a_users_class_on_a_users_batch(batch: str, here: Path) -> None:
    save_state_dict(here / "model.pt")
    save_batch(here, batch)
    arguments = ("analyze", "model.pt", "--model", "user_net:Net(10, 20)", "--input", batch)
    assert run(*arguments, "--loss", "mse", "-o", "out", "-q") == 0
    summary = json.loads((here / "out/summary.json").read_text())
    assert [layer["name"] for layer in summary["layers"]] == ["rnn.l0", "rnn.l1"]
    assert {layer["parity"]["status"] for layer in summary["layers"]} == {"passed"}
    assert summary["provenance"]["loss"] == "mean squared error of output"


def test_json_is_one_object_and_nothing_else(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(here / "model.pt")
    assert run("analyze", "model.pt", "--json", "--seq-len", "20") == 0
    out = capsys.readouterr().out
    summary = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert summary == json.loads((here / "reports/model/summary.json").read_text())
    numbers = {path.name for path in (here / "reports/model").iterdir()}
    assert {"run.nc", "layers.csv"} < numbers and not {"report.html", "figures"} & numbers
    assert run("analyze", "model.pt", "-q", "--figures", "--seq-len", "20", "-o", "drawn") == 0
    assert {"report.html", "figures"} <= {path.name for path in (here / "drawn").iterdir()}


def test_the_same_input_gives_the_same_bytes(here: Path) -> None:
    save_state_dict(here / "model.pt")
    for folder in ("one", "two"):
        assert run("analyze", "model.pt", "--seq-len", "20", "-o", folder) == 0
    for file in sorted((here / "one").rglob("*")):
        if file.is_file():
            twin = here / "two" / file.relative_to(here / "one")
            assert file.read_bytes() == twin.read_bytes(), file


def test_reports_are_numbered_and_not_overwritten(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.RNN(2, 3).state_dict(), here / "model.pt")
    assert run("analyze", "model.pt", "--seq-len", "12", "-q") == 0
    assert run("analyze", "model.pt", "--seq-len", "12") == 0
    assert (here / "reports/model-2/report.html").exists()
    capsys.readouterr()
    assert run("analyze", "model.pt", "--seq-len", "12", "-o", "reports/model") == 2
    assert "--force" in capsys.readouterr().err
    assert (
        run("analyze", "model.pt", "--seq-len", "12", "-o", "reports/model", "--force", "-q") == 0
    )


@pytest.mark.parametrize(
    ("condition", "code"), [("vanishing", 1), ("exploding", 0), ("horizon<99", 1)]
)
def test_fail_on(condition: str, code: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.RNN(4, 16).state_dict(), here / "rnn.pt")
    assert run("analyze", "rnn.pt", "--no-report", "--fail-on", condition) == code
    said = capsys.readouterr().err
    assert (condition in said) == bool(code)
    assert (", it is " in said) == (condition == "horizon<99")


def test_fail_on_does_not_believe_a_rate_that_has_not_settled(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 8)
    with torch.no_grad():
        lstm.bias_ih_l0[8:16] = torch.arange(1.0, 9.0).log()  # time scales of 1 to 8 steps
    torch.save(lstm.state_dict(), here / "lstm.pt")
    assert run("analyze", "lstm.pt", "--seq-len", "8", "--json", "--fail-on", "rate<0") == 0
    said = capsys.readouterr()
    (layer,) = json.loads(said.out)["layers"]
    assert "not settled" in layer["labels"] and layer["rate"]["value"] < 0
    assert "l0: rate<0 is not tested: a rate per step has not settled" in said.err
    settled = gradflow.diagnose(nn.RNN(4, 8), torch.randn(60, 8, 4))
    (condition,) = parse_conditions("rate<0")
    assert (
        condition.open_in(settled.values()) == [] and len(condition.held_by(settled.values())) == 1
    )


@pytest.mark.parametrize(
    "condition", ["vanish", "horizon", "horizon<many", "horizon<1.2.3", "", "vanishing,,"]
)
def test_a_condition_that_is_none_is_refused_at_once(
    condition: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("analyze", "missing.pt", "--fail-on", condition) == 2
    said = capsys.readouterr().err
    assert "--fail-on must" in said and "write for example '" in said


def test_report_and_compare_of_saved_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, cell in (("rnn", nn.RNN), ("gru", nn.GRU)):
        torch.save(cell(4, 8).state_dict(), here / f"{name}.pt")
        assert run("analyze", f"{name}.pt", "--seq-len", "30", "-q") == 0
    assert run("report", "reports/rnn", "-o", "again") == 0
    assert (here / "again/summary.json").read_text() == (
        here / "reports/rnn/summary.json"
    ).read_text()
    assert run("report", "reports/rnn/run.nc", "-o", "from-file") == 0
    capsys.readouterr()
    assert run("compare", "reports/rnn", "reports/gru") == 0
    out = capsys.readouterr().out
    assert "rnn " in out and "gru " in out and "rnn → gru: vanishing in both" in out
    assert (here / "reports/comparison/changes.csv").read_text().startswith("layer,before,after")
    assert (here / "reports/comparison/comparison.png").stat().st_size > 10_000
    assert (here / "reports/comparison/comparison.html").read_text().startswith("<!DOCTYPE html>")
    assert run("compare", "reports/rnn", "reports/gru", "--json", "-o", "told") == 0
    assert json.loads(capsys.readouterr().out)["changes"][0]["before"] == "rnn"
    assert run("compare", "reports/rnn") == 2
    assert {path.name for path in (here / "told").iterdir()} == {
        "comparison.json", "comparison.csv", "changes.csv"
    }  # fmt: skip
    assert run("compare", "reports/rnn", "reports/gru", "--by", "seed") == 2
    assert "--by names what runs of a sweep differ in, got no sweep" in capsys.readouterr().err
    assert run("compare", "reports/rnn", "reports/gru", "--seq-len", "9") == 2
    assert "for model files, got --seq-len 9 with saved runs only" in capsys.readouterr().err


def damaged_runs(here: Path) -> dict[str, str]:
    """What is given to `gradflow report` -> a word the refusal must hold."""
    torch.save(nn.RNN(2, 3).state_dict(), here / "rnn.pt")
    assert run("analyze", "rnn.pt", "--seq-len", "12", "--batch", "2", "-q") == 0
    whole = here / "reports/rnn/run.nc"
    (here / "cut.nc").write_bytes(whole.read_bytes()[:9000])
    (here / "empty.nc").touch()
    for name in ("newer", "no-schema", "no-gains"):
        shutil.copy(whole, here / f"{name}.nc")
        with h5py.File(here / f"{name}.nc", "r+") as file:
            header = json.loads(file.attrs["gradflow"])
            if name == "newer":  # with a field of a layer that is not known yet
                header["schema"] += 1
                layer = json.loads(file["layer0"].attrs["gradflow"])
                file["layer0"].attrs["gradflow"] = json.dumps({**layer, "mood": "good"})
            elif name == "no-schema":
                del header["schema"]
            else:
                del file["layer0"]["log_gain"]
            file.attrs["gradflow"] = json.dumps(header)
    return {
        "cut.nc": "damaged", "empty.nc": "empty (0 bytes)", "no-schema.nc": "damaged",
        "no-gains.nc": "damaged", "newer.nc": "saved by a newer gradflow", "gone": "no run at gone",
        "rnn.pt": "gradflow analyze rnn.pt", "reports": "such as reports/rnn",
        "reports/rn": "such as reports/rnn",
    }  # fmt: skip


def test_what_is_no_run_is_refused_in_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = damaged_runs(here)
    capsys.readouterr()
    for name, word in runs.items():
        assert run("report", name, "-o", "again") == 2, name
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and error.count("\n") == 1, error
        assert word in error and name in error and "; " in error, error
    assert not (here / "again").exists()


# ------------------------------------------------------------------------------------- bad input


def bad_files(here: Path) -> dict[str, str]:
    """File name -> a word the refusal must hold."""
    (here / "empty.pt").write_bytes(b"")
    (here / "notes.pt").write_text("these are only notes\n")
    (here / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    np.save(here / "array.npy", np.zeros(3))
    torch.save(stacked().state_dict(), here / "whole.pt")
    (here / "cut.pt").write_bytes((here / "whole.pt").read_bytes()[:3000])
    torch.save(nn.Linear(3, 3).state_dict(), here / "linear.pt")
    torch.save({"loss": [1.0, 2.0]}, here / "losses.pt")
    (here / "folder.pt").mkdir()
    return {
        "empty.pt": "empty", "notes.pt": "text", "picture.png": "", "array.npy": "array",
        "cut.pt": "", "linear.pt": "recurrent", "losses.pt": "", "folder.pt": "folder",
        "missing.pt": "missing.pt",
    }  # fmt: skip


def test_files_that_are_no_models_are_refused_in_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, word in bad_files(here).items():
        assert run("analyze", name) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("Error: ") and error.count("\n") == 1, error
        assert "Traceback" not in error
        assert word in error and name in error, error
    assert not (here / "reports").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "user_net:Nope(1)"], ["Nope", "Net"]),
        (["--model", "no_such_module:Net()"], ["no_such_module"]),
        (["--model", "user_net:Net(10, 21)"], ["rnn.weight_hh_l0"]),
        (["--model", "user_net:Net(print(1))"], ["literal"]),
        (["--input", "batch.pt"], ["--model"]),
        (
            ["--model", "user_net:Net(10, 20, True)", "--input", "batch.pt"],
            ["the tensors do not fit"],
        ),
        (["--model", "user_net:Net(10, 20, 'exit')", "--input", "batch.pt"], ["ended the program"]),
        (["--model", "user_net:Net()", "--input", "gone.pt"], ["gone.pt"]),
        (
            ["--model", "user_net:Net()", "--input", "wide.npy"],
            ["raised", "11", "shape (5, 7, 11)"],
        ),
        (["--model", "user_net:Net()", "--input", "model.pt"], ["holds the weights of a model"]),
        (["--model", "user_net:Net()", "--input", "cut.pt"], ["damaged zip archive", "cut short"]),
        (["--model", "user_net:Net()", "--input", "empty.pt"], ["is empty (0 bytes)"]),
        (
            ["--model", "user_net:Net()", "--input", "folder"],
            ["no batch matches 'folder'"],
        ),
        (["--labels", "gone.txt"], ["cannot read labels from gone.txt (No such file"]),
        (["--model", "user_net:Net()", "--input", "batch.pt", "--loss", "huber"], ["huber", "mse"]),
        (["--model", "user_net:Net()", "--input", "batch.pt", "--output", "logits"], ["logits"]),
        (["--loss", "mse"], ["--input"]),
        (["--loss", "user_net:first_half"], ["--loss needs a batch"]),
        (
            ["--model", "user_net:Net()", "--input", "batch.pt", "--loss", "user_net:gone"],
            ["user_net has no gone", "first_half", "--loss"],
        ),
        (
            ["--model", "user_net:Net()", "--input", "batch.pt", "--loss", "user_net:THREE"],
            ["user_net:THREE must be a function", "got an int"],
        ),
        (
            ["--model", "user_net:Net()", "--input", "batch.pt", "--loss", "torch.nn:CTCLoss"],
            ["the loss raised", "check --target and --loss"],
        ),
        (
            ["--model", "user_net:Net()", "--input", "batch.pt", "--seq-len", "9"],
            ["--seq-len is the size of a probe and has no effect with --input"],
        ),
        (
            ["--model", "user_net:Net()", "--input", "batch.pt", "--batch", "9"],
            ["--batch is the size of a probe"],
        ),
        (["--eval"], ["--eval needs a batch"]),
        (["--span", "0"], ["span"]),
        (["--no-report", "-o", "out"], ["--no-report writes nothing, but -o was given"]),
        (["--no-report", "--force"], ["--no-report writes nothing, but --force was given"]),
        (["--no-report", "--figures"], ["--no-report writes nothing, but --figures was given"]),
        (["--json", "-q"], ["got --json and -q; give one of them"]),
        (["--seq-len", "0"], ["--seq-len", "at least 1"]),
        (["--batch", "-3"], ["--batch"]),
        (["--seed", "-1"], ["--seed must be a whole number of at least 0"]),
        (["--seed", "9" * 30, "--model", "user_net:Net()", "--input", "batch.pt"], ["below 2**63"]),
        (["-o", "user_net.py/report"], ["user_net.py"]),
        (["-o", "long" * 100], ["cannot write"]),
        (["-o", "batch.pt/a/b"], ["batch.pt is a file"]),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    arguments: list[str], words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(here / "model.pt")
    save_batch(here, "batch.pt")
    np.save(here / "wide.npy", np.zeros((5, 7, 11), dtype=np.float32))
    (here / "cut.pt").write_bytes((here / "model.pt").read_bytes()[:3000])
    (here / "empty.pt").touch()
    (here / "folder").mkdir()
    assert run("analyze", "model.pt", *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") == 1, error
    for word in words:
        assert word in error, error
    assert not (here / "reports").exists()


def test_a_loss_of_ones_own_reads_output_and_target(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(here / "model.pt")
    save_batch(here, "batch.pt")
    batch = ("analyze", "model.pt", "--model", "user_net:Net()", "--input", "batch.pt", "--json")
    for spec, name in {
        "user_net:first_half": "first_half",
        "torch.nn:HuberLoss(delta=0.5)": "HuberLoss",
        "user_net.py:first_half": "first_half",
    }.items():
        assert run(*batch, "--no-report", "--loss", spec) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["provenance"]["loss"] == f"{name} of output", spec


def test_the_model_runs_in_the_mode_that_is_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "modes.py").write_text(
        "from user_net import *\n"
        "class Told(Net):\n"
        "    def forward(self, x):\n"
        "        import sys; print(self.training, file=sys.stderr)\n"
        "        return super().forward(x)\n"
    )
    save_state_dict(here / "model.pt")
    save_batch(here, "batch.pt")
    batch = ("analyze", "model.pt", "--model", "modes:Told()", "--input", "batch.pt", "--json")
    for options, training in ((), False), (("--eval",), False), (("--train",), True):
        assert run(*batch, "--no-report", *options) == 0
        out, error = capsys.readouterr()
        assert str(training) in error and str(not training) not in error
        mode = json.loads(out)["provenance"]["mode"]
        assert mode == ("training" if training else "evaluation")


def test_span_is_the_distance_of_the_verdict_and_no_report_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(here / "model.pt")
    assert run("analyze", "model.pt", "--span", "7", "--no-report", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert [layer["span"] for layer in summary["layers"]] == [7, 7]
    assert run("analyze", "model.pt", "--seq-len", "12", "--no-report") == 0
    assert "page:" not in capsys.readouterr().out
    assert not (here / "reports").exists()


def test_tokens_without_an_embedding_are_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"words": nn.Embedding(50, 8), "rnn": nn.GRU(8, 4)}
    torch.save(nn.ModuleDict(parts).state_dict(), here / "words.pt")
    torch.save({"input": torch.tensor([[3, 98, 7]])}, here / "batch.pt")
    assert run("analyze", "words.pt", "--model", "user_net:Words()", "--input", "batch.pt") == 2
    said = "its tokens are 3 to 98, and the embedding words knows 0 to 49"
    assert said in capsys.readouterr().err


def test_a_batch_or_quantized_weights_given_as_the_model_are_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_batch(here, "batch.pt")
    assert run("analyze", "batch.pt") == 2
    said = capsys.readouterr().err
    assert "a batch and no model" in said and "gradflow analyze WEIGHTS" in said
    packed = {"0._all_weight_values.0.param": 1, "fc.scale": torch.ones(())}
    torch.save(packed, here / "small.pt")
    assert run("analyze", "small.pt") == 2
    assert "quantized weights" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["1", "2", "3", "9"])
def test_very_short_sequences(steps: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_state_dict(here / "model.pt")
    drawn = steps in ("1", "3")  # a page takes longer than all else
    assert run("analyze", "model.pt", "--seq-len", steps, *([] if drawn else ["--no-report"])) == 0
    if steps == "1":
        assert "T = 1" in capsys.readouterr().out


def test_probes_that_disagree_name_the_command_for_this_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rnn = nn.RNN(6, 24)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2.2)
        rnn.weight_ih_l0.mul_(6)
        rnn.bias_ih_l0.zero_()
        rnn.bias_hh_l0.zero_()
    torch.save(rnn.state_dict(), here / "open.pt")
    assert run("analyze", "open.pt", "--seq-len", "40", "--json") == 0
    (finding, *_) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["name"] == "depends-on-input"
    assert (
        finding["code"] == "gradflow analyze open.pt --model 'pkg.mod:Net(10, 20)' --input batch.pt"
    )


def test_one_sequence(here: Path) -> None:
    save_state_dict(here / "model.pt")
    assert run("analyze", "model.pt", "--seq-len", "20", "--batch", "1") == 0


def test_weights_that_are_not_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stacked()
    with torch.no_grad():
        model.rnn.weight_hh_l0[3, 2] = float("nan")
    torch.save(model.state_dict(), here / "model.pt")
    assert run("analyze", "model.pt", "--seq-len", "20") == 0
    words = " ".join(capsys.readouterr().out.split())
    # the place is that of Python, to be looked up
    assert "weight_hh holds one entry that is not finite (weight_hh[3, 2] is NaN)" in words
    for condition in ("horizon<5", "vanishing"):
        few = ("--seq-len", "20", "--no-report")
        assert run("analyze", "model.pt", *few, "--fail-on", condition) == 1
        assert "its states are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["analyze", "report"])
def test_an_interrupt_leaves_nothing_behind(
    when: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gradflow import reporter

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    torch.save(nn.RNN(2, 3).state_dict(), here / "model.pt")
    target = workflow if when == "analyze" else reporter.files
    monkeypatch.setattr(target, "analyze" if when == "analyze" else "page", interrupted)
    assert run("analyze", "model.pt", "--seq-len", "12") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (here / "reports").exists()


def test_an_interrupt_that_a_library_turned_into_an_error_is_one(here: Path) -> None:
    save_state_dict(here / "model.pt")
    code = """
import os, signal
from gradflow import cli, workflow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
def broken(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("Invalid affine transformation matrix")
workflow.analyze = broken
cli.main(["analyze", "model.pt"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing was written\n")


def test_a_command_called_from_python_leaves_the_handlers_of_signals_as_they_were() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert run("--version") == 0
    assert [signal.getsignal(number) for number in numbers] == before
    with ThreadPoolExecutor() as pool:
        assert pool.submit(run, "--version").result() == 0


def test_a_job_that_is_told_to_end_leaves_nothing_behind(here: Path) -> None:
    torch.save(nn.RNN(2, 3).state_dict(), here / "model.pt")
    code = """
import os, signal
from gradflow import cli, reporter
reporter.files.page = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
cli.main(["analyze", "model.pt", "--seq-len", "9", "--batch", "2"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (143, "")
    assert not (here / "reports").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(here / "model.pt")
    monkeypatch.setattr("os.access", lambda _, mode: not mode & os.W_OK)
    monkeypatch.setattr(workflow, "analyze_file", lambda *_, **__: pytest.fail("too late"))
    assert run("analyze", "model.pt", "-o", "out") == 2
    assert "is read-only for you; give another folder" in capsys.readouterr().err


def test_a_fault_of_our_own_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    save_state_dict(here / "model.pt")
    monkeypatch.setattr(workflow, "analyze", broken)
    assert run("analyze", "model.pt") == 3
    error = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in error
    assert "fault of gradflow" in error


def test_help_shows_an_example_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.gradflow.commands:
        assert run(name, "--help") == 0
        assert f"gradflow {name}" in capsys.readouterr().out.split("Options:")[0].partition("\n")[2]


def test_a_gain_that_outlives_the_measurement_is_not_called_never(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.LSTM(3, 8).state_dict(), here / "lstm.pt")
    assert run("analyze", "lstm.pt", "--seq-len", "12", "--fail-on", "horizon<50") == 1
    assert "> 11" in capsys.readouterr().out
    horizon = json.loads((here / "reports/lstm/summary.json").read_text())["layers"][0]["horizon"]
    assert horizon == {"value": None, "never": False, "searched": 11}
    assert (
        run("analyze", "lstm.pt", "--seq-len", "12", "--no-report", "--fail-on", "horizon<9") == 0
    )


def test_lines_to_paste_are_python_whatever_the_layers_are_called(here: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GRU(4, 8)))
    torch.save(model.state_dict(), here / "model.pt")
    assert run("analyze", "model.pt", "--seq-len", "40", "-q") == 0
    findings = json.loads((here / "reports/model/summary.json").read_text())["findings"]
    assert findings
    for finding in findings:
        exec(finding["code"], {"model": model, "torch": torch, "nn": nn})  # noqa: S102


def test_the_line_to_paste_for_a_cell_names_the_cells_own_parameters(here: Path) -> None:
    torch.save({f"cell1.{k}": v for k, v in nn.LSTMCell(4, 8).state_dict().items()}, here / "m.pt")
    assert run("analyze", "m.pt", "--seq-len", "40", "-q") == 0
    summary = json.loads((here / "reports/m/summary.json").read_text())
    assert summary["layers"][0]["name"] == "cell1"
    assert "model.cell1.bias_ih.data" in summary["findings"][0]["code"]


def test_json_stays_pure_when_the_model_prints(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state_dict(here / "model.pt")
    save_batch(here, "batch.pt")
    spec = "user_net:Net(10, 20, 'print')"
    assert run("analyze", "model.pt", "--model", spec, "--input", "batch.pt", "--json") == 0
    caught = capsys.readouterr()
    assert json.loads(caught.out)["title"] == "Net"
    assert "noise" in caught.err


def test_a_closed_pipe_is_no_failure(here: Path) -> None:
    save_state_dict(here / "model.pt")
    command = (
        f"{sys.executable} -m gradflow analyze model.pt --no-report | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=here, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "code"), [("model.pt", 0), ("gone.pt", 2)])
def test_closed_streams_change_no_exit_code(name: str, code: int, here: Path) -> None:
    save_state_dict(here / "model.pt")
    command = f"{sys.executable} -m gradflow inspect {name} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=here, check=False).returncode == code


def test_compare_leaves_an_existing_folder_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.GRU(4, 8).state_dict(), here / "gru.pt")
    assert run("analyze", "gru.pt", "--seq-len", "12", "-q") == 0
    both = ("compare", "reports/gru", "reports/gru", "-o", "both")
    assert run(*both) == 0
    # refused before anything is read or analyzed
    assert run("compare", "missing.pt", "gone.pt", "-o", "both") == 2
    assert "give another folder" in capsys.readouterr().err
    assert run(*both, "--force") == 0
    assert {path.name for path in (here / "both").iterdir()} == {
        "comparison.png",
        "comparison.csv",
        "comparison.html",
        "comparison.json",
        "changes.csv",
    }


def test_a_member_is_picked_in_every_command_that_reads_model_files(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.pt", "b.pt"):
        held = {"net": [nn.Linear(2, 2), nn.GRU(3, 4)], "lm": nn.LSTM(2, 3), "loss": nn.MSELoss()}
        torch.save(held, here / name)
    few = ("--seq-len", "8", "--batch", "2")
    assert run("analyze", "a.pt", *few, "-q") == 0
    out = capsys.readouterr().out
    assert "lm.l0" in out and "net.1.l0" in out
    assert run("inspect", "a.pt", "--member", "net.1") == 0
    assert "next: gradflow analyze a.pt --member net.1" in capsys.readouterr().out
    assert run("compare", "a.pt", "b.pt", "--member", "lm", *few) == 0
    out = capsys.readouterr().out
    assert "l0" in out and "analyze b.pt --member lm --seq-len 8" in out and "net" not in out
    assert run("analyze", "a.pt", "--member", "critic") == 2
    said = capsys.readouterr().err
    assert "got 'critic'; it holds 'lm', an LSTM with LSTM(2 → 3); 'net.1', a GRU" in said
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no name can be other than UTF-8")
def test_a_name_that_is_not_utf8_is_refused_or_swept(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.LSTM(3, 4).state_dict(), here / "b.pt")
    odd = os.fsdecode(b"a\xff.pt")
    (here / odd).write_bytes((here / "b.pt").read_bytes())
    for command in (["analyze", odd], ["compare", odd, "b.pt"], ["inspect", odd]):
        assert run(*command) == 2
        said = f"a name that is not UTF-8, {odd!r}; rename the file"
        assert capsys.readouterr().err == f"Error: {said}\n"
    assert run("sweep", "*.pt", "-o", "swept", "--jobs", "1", "-q") == 0
    asked = json.loads((here / "swept/shards/1-of-1.json").read_text())
    assert [one["name"] for one in asked["entries"]] == [odd, "b.pt"]


def test_what_will_take_seconds_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing begins before a line on the terminal would, and says nothing until it is done."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress() as progress:
        progress("drawing the report", 0.5, at_once=True)
    assert "drawing the report" in terminal.getvalue()
