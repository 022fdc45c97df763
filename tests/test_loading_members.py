"""Files that hold several things: which member is read, `--member`, and layers of an older torch."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from seam import _STOCK, lacking
from test_loading_refusals import _with_valid_checksums
from torch import nn

from gradflow.errors import FileError, InputError, UserCodeError
from gradflow.loading import describe, open_model
from gradflow.workflow import FileRequest, analyze_file

SOURCE = """
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)

class Decoder(nn.Module):
    def __init__(self, hidden=12):
        super().__init__()
        self.cell = nn.LSTMCell(6, hidden)
        self.out = nn.Linear(hidden, 20)
    def forward(self, x):
        h = c = x.new_zeros(len(x), self.cell.hidden_size)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
"""
CODE = "code_of_members"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's module, importable from the current folder."""
    (tmp_path / f"{CODE}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(CODE)
    sys.modules.pop(CODE, None)


def saved(value: object, name: str = "file.pt", **options: object) -> Path:
    torch.save(value, name, **options)
    return Path(name)


def layers(path: Path, **options: object) -> dict[str, str]:
    return {layer.name: str(layer) for layer in open_model(path, **options).recurrent}


def lm() -> nn.Module:
    return nn.Sequential(nn.LSTM(4, 8, 2), nn.Identity())


def sgd() -> torch.optim.Optimizer:
    rnn = nn.GRU(2, 3)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1, momentum=0.9)
    rnn(torch.ones(2, 1, 2))[0].sum().backward()
    optimizer.step()
    return optimizer


LSTM, GRU = nn.LSTM(4, 8).state_dict(), nn.GRU(8, 8).state_dict()
# What a file holds; the layers read without --trust; what must be said of it.
FILES: dict[str, tuple[Callable[[], object], dict[str, str], str]] = {
    "model, loss, optimizer": (
        lambda: [lm(), nn.CrossEntropyLoss(), sgd()],
        {"0": "LSTM(4 → 8, 2 layers)"},
        "'0', a Sequential with LSTM.4 → 8, 2 layers. was read",
    ),
    "model, none": (lambda: (nn.GRUCell(2, 3), None), {"": "GRUCell(2 → 3)"}, "'0', a GRUCell"),
    "state_dicts": (
        lambda: [LSTM, GRU],
        {"0": "LSTM(4 → 8)", "1": "GRU(8 → 8)"},
        "'0', '1' were read side by side; --member 0 takes one alone",
    ),
    "state_dict, optimizer's": (lambda: [LSTM, sgd().state_dict()], {"": "LSTM(4 → 8)"}, "'0'"),
    "one of two": (
        lambda: {"epoch": 1, "encoder": nn.Linear(2, 2).state_dict(), "decoder": GRU},
        {"": "GRU(8 → 8)"},
        "under 'decoder'; the others have no recurrent weights .'encoder', a state_dict",
    ),
    "modules in a dict": (
        lambda: {"models": {"enc": nn.LSTM(4, 8), "dec": nn.GRUCell(2, 3)}, "opt": sgd()},
        {"models.enc": "LSTM(4 → 8)", "models.dec": "GRUCell(2 → 3)"},
        "'models.enc', 'models.dec' were read side by side",
    ),
    "a module and weights": (
        lambda: (nn.LSTM(4, 8), {"weights": GRU}),
        {"": "GRU(8 → 8)"},
        "under '0' were not read; --member 0 reads it",
    ),
    "a usual name first": (
        lambda: {"model": lm(), "ema": lm()},
        {"0": "LSTM(4 → 8, 2 layers)"},
        "under 'ema' were not read; --member ema reads it",
    ),
    "numbers as keys": (lambda: {0: LSTM, 1: torch.ones(3)}, {"": "LSTM(4 → 8)"}, "'0'"),
    "settings around it": (
        lambda: argparse.Namespace(net=nn.GRU(8, 8), rate=0.1),
        {"": "GRU(8 → 8)"},
        "'net', a GRU",
    ),
    "a state_dict and one more in it": (
        lambda: {**LSTM, "target": GRU},
        {"": "LSTM(4 → 8)"},
        "under 'target' were not read",
    ),
}


@pytest.mark.parametrize(("make", "expected", "said"), FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("trust", [False, True])
def test_the_recurrent_members_are_found_and_named(
    code, make: Callable[[], object], expected: dict[str, str], said: str, trust: bool
) -> None:
    path = saved(make())
    assert layers(path, trust=trust) == expected
    text = " ".join(describe(path, trust=trust).lines())
    assert re.search(said, text), text


PICKS = {
    "0": {"": "LSTM(4 → 8)"},
    "1": {"rnn": "GRU(8 → 8)"},
    "1.rnn": {"": "GRU(8 → 8)"},
    "2": {"net.rnn": "GRU(8 → 8)", "aux": "LSTM(4 → 8)"},
    "2.net": {"rnn": "GRU(8 → 8)"},
    "net": {"rnn": "GRU(8 → 8)"},
    "3.a": {"": "GRUCell(2 → 3)"},
    "a": {"": "GRUCell(2 → 3)"},
    "b.c": {"": "LSTM(4 → 8)"},
}


@pytest.mark.parametrize(("name", "expected"), PICKS.items())
@pytest.mark.parametrize("trust", [False, True])
def test_a_member_is_picked_by_the_keys_that_lead_to_it(code, name, expected, trust) -> None:
    flat = {f"net.rnn.{key}": value for key, value in GRU.items()}
    flat |= {f"module.aux.{key}": value for key, value in LSTM.items()}
    flat = {key.replace("net.", "module.net."): value for key, value in flat.items()}
    held = {"a": nn.GRUCell(2, 3), "b.c": LSTM, "none": None}
    path = saved([nn.LSTM(4, 8), nn.ModuleDict({"rnn": nn.GRU(8, 8)}), flat, held, 7])
    assert layers(path, member=name, trust=trust) == expected


REFUSED = {
    "critic": "--member must be .* got 'critic'; it holds '0', a GRU .*'1.a', a Linear",
    "2": "holds as its member '2' None, no weights",
    "": "got ''; it holds",
    "weight_hh_l0": "must be the name of one member, got 'weight_hh_l0', which 2 places have; .*'?0.w",
    "1.c": r"member '1.c' is a state_dict without recurrent weights: 1 tensors",
}


@pytest.mark.parametrize(("name", "match"), REFUSED.items())
def test_a_member_that_is_not_there_or_no_model(code, name: str, match: str) -> None:
    held = {"a": nn.Linear(2, 2), "b": {"weight_hh_l0": torch.ones(1)}, "c": {"w": torch.ones(1)}}
    path = saved([GRU, held, None])
    if name == "critic":
        path = saved([nn.GRU(8, 8), {"a": nn.Linear(2, 2)}])
    with pytest.raises((InputError, FileError), match=match) as caught:
        open_model(path, member=name)
    assert str(caught.value).startswith("file.pt") and "\n" not in str(caught.value)


def test_a_member_asked_of_a_file_that_holds_one_thing(code) -> None:
    with pytest.raises(InputError, match="holds one thing; leave it out"):
        open_model(saved(GRU), member="decoder")
    parts = {f"enc.{key}": value for key, value in GRU.items()}
    with pytest.raises(InputError, match=r"the one state_dict in the file, got 'dec'.*'enc'"):
        open_model(saved(parts), member="dec")


NO_DATA = {
    "loss and none": (lambda: [nn.CrossEntropyLoss(), None], r"a list of 2 items \(a CrossEnt"),
    "parameters": (lambda: list(nn.GRU(2, 3).parameters()), "a list of 4 items .a Parameter., no"),
    "linear": (lambda: [nn.Linear(2, 2), torch.ones(3)], "a list of 2 items without recurrent"),
}


@pytest.mark.parametrize(("make", "match"), NO_DATA.values(), ids=NO_DATA.keys())
def test_only_tensors_and_numbers_are_data(code, make, match: str) -> None:
    with pytest.raises(FileError, match=match) as caught:
        open_model(saved(make()))
    assert "data" not in str(caught.value)
    with pytest.raises(FileError, match="looks like data"):
        open_model(saved((torch.ones(3), [torch.ones(2), 3])))


def test_members_of_a_users_class(code) -> None:
    decoder = code.Decoder()
    best = {"epoch": 1, "encoder": code.Encoder(), "decoder": decoder, "decoder_opt": sgd()}
    path = saved(best, "BEST.pth.tar")
    with pytest.raises(FileError, match=rf"'decoder', a {CODE}.Decoder with LSTMCell") as caught:
        open_model(path)
    assert f"--member decoder --model '{CODE}:Decoder(...)'" in str(caught.value)
    assert "BEST.pth.tar --member decoder --trust" in str(caught.value)
    with pytest.raises(FileError, match=r"class code_of_members.Encoder without stock"):
        open_model(path, member="encoder")
    trusted = open_model(path, trust=True)
    assert (trusted.title, type(trusted.model)) == ("Decoder", code.Decoder)
    for options in ({}, {"member": "decoder"}, {"trust": True}):
        found = open_model(path, spec=f"{CODE}:Decoder()", **options)
        torch.testing.assert_close(found.model.state_dict(), decoder.state_dict(), rtol=0, atol=0)
    whole = open_model(path, spec=f"{CODE}:Both()")  # both members are its children
    assert [layer.name for layer in whole.recurrent] == ["decoder.cell"]
    assert (
        open_model(path, spec=f"{CODE}:Encoder()").said[0].startswith("the weights of the member")
    )
    with pytest.raises(FileError, match=r"do not fit.*of another shape.*none fits: 'decoder'"):
        open_model(path, spec=f"{CODE}:Decoder(13)")


def test_several_of_a_users_classes_ask_with_the_next_command(code) -> None:
    path = saved([code.Decoder(), code.Decoder(5)], "two.pt")
    with pytest.raises(FileError, match=r"2 members of classes .*'0'.*'1'.*--member 0 --model"):
        open_model(path)
    assert list(layers(path, trust=True)) == ["0.cell", "1.cell"]
    torch.save({"input": torch.ones(3, 5, 6)}, "batch.pt")
    batch = FileRequest(path, input=Path("batch.pt"), trust=True)
    with pytest.raises(InputError, match=r"--member 0 --trust --input batch\.pt"):
        analyze_file(batch)
    batch = FileRequest(path, input=Path("batch.pt"), trust=True, member="1")
    analysis = analyze_file(batch)
    assert [layer.name for layer in analysis.values()] == ["cell"]
    path = saved([code.Encoder(), code.Encoder()], "none.pt")
    with pytest.raises(FileError, match=r"2 modules, none with stock.*--member 0 --trust --input"):
        open_model(path, trust=True)


def test_the_next_commands_name_the_member(code) -> None:
    path = saved({"a": {"enc": LSTM, "dec": GRU}})
    text = describe(path, member="dec").lines()
    assert text[0] == "file.pt is a file whose member 'a.dec' is a state_dict."
    assert text[-1] == "next: gradflow analyze file.pt --member a.dec"
    analysis = analyze_file(FileRequest(path, member="dec", seq_len=4, batch=2))
    assert "--member a.dec --model" in analysis.provenance["snippet"].splitlines()[-1]
    both = analyze_file(FileRequest(path, seq_len=4, batch=2))
    assert [layer.name for layer in both.values()] == ["a.enc.l0", "a.dec.l0"]
    assert "were read side by side" in both.warnings[0]


def test_a_file_that_claims_very_many_members_is_answered_soon(code) -> None:
    held: object = {"w": torch.zeros(1)}
    for _ in range(3):
        held = {f"a{number}": held for number in range(300)}
    path = saved(held)
    start = time.monotonic()
    with pytest.raises(FileError, match="without recurrent weights"):
        open_model(path)
    assert time.monotonic() - start < 10
    loop: list[object] = [nn.GRU(8, 8)]
    loop.append(loop)
    assert layers(saved(loop), trust=True) == {"": "GRU(8 → 8)"}


# --- layers of an older torch ----------------------------------------------------------------------


def without(module: nn.Module, *names: str) -> nn.Module:
    for part in module.modules():
        for name in names:
            vars(part).pop(name, None)
    return module


AGED = {"batch_first": "batch_first", "_flat_weights": "_flat_weights"}


@pytest.mark.parametrize("name", AGED)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_layer_too_old_to_run_is_said_with_what_to_do(code, name: str, legacy: bool) -> None:
    model = code.Both()
    model.rnn = nn.LSTM(3, 5)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    path = saved(without(model, name), "old.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FileError, match=rf"older torch.*LSTM 'rnn' in it lacks {name} and") as e:
        open_model(path, trust=True)
    assert f"gradflow analyze old.pt --model '{CODE}:Both(...)' --trust" in str(e.value)
    line = str(e.value).split('python -c "')[1].split('"')[0]
    held = nn.RNNBase.__setstate__
    try:
        exec(line)  # noqa: S102 - the very line that the sentence tells people to type
    finally:
        nn.RNNBase.__setstate__ = held
    torch.testing.assert_close(torch.load("weights.pt"), weights, rtol=0, atol=0)
    assert set(layers(Path("weights.pt"))) == {"decoder.cell", "rnn"}
    (Path(CODE + "2.py")).write_text(
        SOURCE.replace("Encoder(), Decoder()", "Encoder(), Decoder(); self.rnn = nn.LSTM(3, 5)")
    )
    assert set(layers(path, spec=f"{CODE}2:Both()", trust=True)) == {"decoder.cell", "rnn"}
    assert nn.RNNBase.__setstate__ is held


def test_an_old_layer_beside_the_recurrent_ones_stops_only_a_run(code) -> None:
    path = saved([nn.Sequential(without(nn.GELU(), "approximate"), nn.GRU(8, 8)), code.Encoder()])
    assert "GELU '0' in it lacks approximate" in open_model(path, trust=True).aged
    torch.save({"input": torch.ones(3, 5, 8)}, "batch.pt")
    with pytest.raises(FileError, match="older torch"):
        analyze_file(FileRequest(path, input=Path("batch.pt"), trust=True))


def test_a_part_of_torch_that_is_gone_is_said_to_be_age(code) -> None:
    path = saved(nn.Sequential(nn.GRU(8, 8)))
    data = path.read_bytes().replace(b"torch.nn.modules.rnn\nGRU", b"torch.nn.backends.xx\nGRU")
    Path("gone.pt").write_bytes(_with_valid_checksums(data))
    with pytest.raises(UserCodeError, match=r"older torch.*No module named 'torch.nn.backends"):
        open_model(Path("gone.pt"), trust=True)


def test_stock_layers_of_this_torch_lack_nothing() -> None:
    made = [nn.GRU(2, 3), nn.LSTMCell(2, 3), nn.RNNCell(2, 3), nn.GELU(), nn.Upsample(3)]
    made += [nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2), nn.Conv2d(1, 1, 1)]
    made += [
        nn.Linear(2, 2),
        nn.Embedding(2, 2),
        nn.BatchNorm1d(2),
        nn.LayerNorm(2),
        nn.Bilinear(1, 1, 1),
    ]
    for kind in _STOCK.values():
        with contextlib.suppress(TypeError):
            made.append(kind())
    assert {type(module).__name__: lacking(module) for module in made if lacking(module)} == {}
