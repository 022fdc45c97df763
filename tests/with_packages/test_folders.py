"""`gradflow analyze` on a folder of transformers: its own model, tokens, no code of the folder's."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from models import VOCABULARY, transformers_model

from gradflow import cli


def saved(folder: Path, name: str = "Mamba2") -> Path:
    transformers_model(name).save_pretrained(folder)  # type: ignore[operator]
    return folder


def run(*words: object) -> tuple[int, str]:
    """The exit code and all that was said."""
    said = io.StringIO()
    with (
        pytest.raises(SystemExit) as stop,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        cli.main([str(word) for word in words])
    assert isinstance(stop.value.code, int)
    return stop.value.code, said.getvalue()


def test_a_folder_is_analyzed_on_tokens(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (3, 20)))
    code, text = run(
        "analyze",
        folder,
        "--tokens",
        tmp_path / "ids.npy",
        "--json",
        "--figures",
        "-o",
        tmp_path / "run",
    )
    assert code == 0, text
    found = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    assert [layer["name"] for layer in found["layers"]] == [
        "backbone.layers.0.mixer",
        "backbone.layers.1.mixer",
    ]
    assert (tmp_path / "run" / "report.html").is_file()


def test_without_tokens_they_are_random(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny", "Qwen3Next")
    code, text = run("analyze", folder, "--seq-len", 12, "--batch", 2, "--no-report")
    assert code == 0, text
    assert "model.layers.2.linear_attn" in text
    assert "attention" in text


def test_code_of_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny")
    changed(folder, auto_map={"AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    code, text = run("analyze", folder, "--no-report")
    assert code == 2
    assert "brings code of its own for its model" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros((2, 5)), "whole numbers of shape (B, T)"),
        (np.full((2, 5), VOCABULARY), f"must be from 0 to {VOCABULARY - 1}"),
    ],
)
def test_what_are_no_tokens_is_refused(tmp_path: Path, ids: np.ndarray, words: str) -> None:
    folder = saved(tmp_path / "tiny")
    np.save(tmp_path / "ids.npy", ids)
    code, text = run("analyze", folder, "--tokens", tmp_path / "ids.npy", "--no-report")
    assert code == 2
    assert words in " ".join(text.split())


def changed(folder: Path, **settings: object) -> Path:
    """The folder with other settings."""
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 10**12}, "must be at most"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"vocab_size": 10**8}, "its weights hold"),
        ({"num_hidden_layers": 10**6}, "must be at most"),
        ({"hidden_size": "x"}, "cannot open"),
        ({"model_type": "none of theirs"}, "cannot open"),
        ({"num_heads": 3}, "cannot open"),
    ],
    ids=str,
)
def test_what_the_settings_ask_for_is_not_made(
    tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    code, text = run("analyze", changed(saved(tmp_path / "tiny"), **settings), "--no-report")
    said = " ".join(text.split())
    assert code == 2, text
    assert words in said and said[said.index("Error: ") :].isprintable()


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    code, text = run("analyze", tmp_path, "--no-report")
    assert code == 2
    assert "does not say its model_type" in " ".join(text.split())
