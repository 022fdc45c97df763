"""What `open_model` understands, held against the modules that wrote the files."""

from __future__ import annotations

import argparse
import copy
import textwrap
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from seam import non_finite
from torch import nn

from gradflow.errors import FileError, InputError, UserCodeError
from gradflow.loading import describe, open_model, probes, save_snippet

MODULES = {
    "lstm": lambda: nn.LSTM(3, 5),
    "lstm-deep": lambda: nn.LSTM(3, 5, num_layers=3, bidirectional=True),
    "lstm-projected": lambda: nn.LSTM(3, 5, num_layers=2, proj_size=2, bidirectional=True),
    "lstm-no-bias": lambda: nn.LSTM(3, 5, bias=False),
    "gru": lambda: nn.GRU(4, 6, num_layers=2),
    "gru-bidirectional": lambda: nn.GRU(4, 6, bidirectional=True),
    "rnn": lambda: nn.RNN(2, 7),
    "one-unit": lambda: nn.LSTM(1, 1),
    "double": lambda: nn.GRU(4, 6).double(),
    "bfloat16": lambda: nn.LSTM(3, 5).bfloat16(),
}


def saved(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def assert_same_function(actual: nn.Module, expected: nn.Module) -> None:
    """Both give the same output, bit for bit, on one random batch."""
    expected = expected.eval()
    size = expected.input_size
    dtype = next(expected.parameters()).dtype
    inputs = torch.randn(4, 2, size, dtype=dtype)
    torch.testing.assert_close(actual(inputs)[0], expected(inputs)[0], rtol=0, atol=0)


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError):
        assert_same_function(nn.LSTM(3, 5), nn.LSTM(3, 5))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("prefix", ["", "encoder.rnn."])
def test_a_state_dict_becomes_the_module(tmp_path: Path, make, prefix: str) -> None:
    original = make()
    state = {f"{prefix}{key}": value for key, value in original.state_dict().items()}
    opened = open_model(saved(tmp_path / "weights.pt", state))
    (found,) = opened.recurrent
    assert (opened.kind, opened.model, opened.title) == ("a state_dict", None, "weights")
    assert found.name == prefix.rstrip(".")
    assert found.kind == type(original).__name__
    assert (found.input_size, found.hidden_size) == (original.input_size, original.hidden_size)
    assert (found.layers, found.bidirectional) == (original.num_layers, original.bidirectional)
    assert (found.proj_size, found.bias) == (original.proj_size, original.bias)
    assert bool(found.doubts) == (found.kind == "RNN")
    assert not found.module.training
    assert_same_function(found.module, original)


def test_the_older_format_holds_weights_and_modules(tmp_path: Path) -> None:
    original = nn.LSTM(3, 5)
    old = {"_use_new_zipfile_serialization": False}
    opened = open_model(saved(tmp_path / "w.pt", original.state_dict(), **old))
    assert_same_function(opened.recurrent[0].module, original)
    path = saved(tmp_path / "m.pt", original, **old)
    assert_same_function(open_model(path).model, original)
    assert_same_function(open_model(path, trust=True).model, original)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_pickled_stock_module_is_rebuilt(tmp_path: Path, make) -> None:
    original = make()
    opened = open_model(saved(tmp_path / "model.pt", original))
    assert opened.kind == "a pickle of torch modules"
    assert opened.title == type(original).__name__
    assert type(opened.model) is type(original)
    assert not opened.recurrent[0].doubts
    assert_same_function(opened.model, original)
    assert_same_function(opened.recurrent[0].module, original)


CELLS = {"LSTM": nn.LSTMCell(3, 5), "GRU": nn.GRUCell(3, 5), "RNN": nn.RNNCell(3, 5)}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_cell_becomes_one_layer(tmp_path: Path, kind: str, pickled: bool) -> None:
    cell = copy.deepcopy(CELLS[kind]).double()  # rounding is far below the tolerance
    value = cell if pickled else cell.state_dict()
    (found,) = open_model(saved(tmp_path / "cell.pt", value)).recurrent
    assert found.from_cell
    assert found.kind == kind
    inputs, state = torch.randn(4, 2, 3, dtype=torch.float64), None
    for step in inputs:
        state = cell(step, state)
    last = state[0] if kind == "LSTM" else state
    torch.testing.assert_close(found.module(inputs)[0][-1], last, rtol=1e-5, atol=0)


def test_a_relu_rnn_keeps_its_relu_and_weights_alone_say_tanh(tmp_path: Path) -> None:
    original = nn.RNN(3, 5, nonlinearity="relu", num_layers=2, dropout=0.5, batch_first=True)
    whole = open_model(saved(tmp_path / "a.pt", original))
    module = whole.recurrent[0].module
    assert (module.nonlinearity, module.dropout, module.batch_first) == ("relu", 0.5, True)
    (bare,) = open_model(saved(tmp_path / "b.pt", original.state_dict())).recurrent
    assert bare.module.nonlinearity == "tanh"
    assert any("read as tanh" in sentence for sentence in bare.doubts)
    assert any("dropout" in sentence for sentence in bare.ambiguous)


def test_nested_stock_containers_run_as_before(tmp_path: Path) -> None:
    model = nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(11, 3, padding_idx=0),
            head=nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4, bias=False), nn.GELU()),
            norm=nn.BatchNorm1d(7),
            rnn=nn.GRU(4, 6, batch_first=True),
        )
    ).eval()
    opened = open_model(saved(tmp_path / "model.pt", model))
    tokens = torch.randint(11, (2, 7))
    torch.testing.assert_close(opened.model(tokens)[0], model(tokens)[0], rtol=0, atol=0)
    assert opened.recurrent[0].name == "rnn"
    assert opened.recurrent[0].embedding is None  # the GRU is 4 wide, the embedding 3


CHECKPOINTS = {
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {0: {"m": s}}}},
    "model": lambda s: {"model": s, "ema": s},
    "odd name": lambda s: {"my_weights": s, "loss": 0.5},
    "deep": lambda s: {"run": {"model_state_dict": s}},
    "data parallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "both": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "module": lambda s: {"model": nn.ModuleDict({"a": nn.LSTM(3, 5)})},
}


@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_checkpoint_is_searched(tmp_path: Path, wrap) -> None:
    opened = open_model(saved(tmp_path / "c.pt", wrap(nn.LSTM(3, 5).state_dict())))
    assert [str(found) for found in opened.recurrent] == ["LSTM(3 → 5)"]
    assert opened.recurrent[0].name in ("", "a")


def test_parts_of_a_checkpoint_are_read_together(tmp_path: Path) -> None:
    parts = {"encoder": nn.LSTM(3, 5).state_dict(), "decoder": nn.GRU(4, 6).state_dict()}
    opened = open_model(saved(tmp_path / "c.pt", {**parts, "epoch": 1}))
    assert {f.name: f.kind for f in opened.recurrent} == {"encoder": "LSTM", "decoder": "GRU"}


def test_a_lightning_checkpoint_with_settings_of_other_classes(tmp_path: Path) -> None:
    settings = argparse.Namespace(hidden=5, path=Path("x"))
    checkpoint = {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{k}": v for k, v in nn.LSTM(3, 5).state_dict().items()},
        "hyper_parameters": {"args": settings, "more": defaultdict(list, a=[1])},
        "optimizer_states": [],
    }
    opened = open_model(saved(tmp_path / "last.ckpt", checkpoint))
    assert opened.kind == "a Lightning checkpoint"
    assert opened.recurrent[0].name == "model"


def test_safetensors(tmp_path: Path) -> None:
    original = nn.GRU(3, 5)
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    opened = open_model(tmp_path / "w.safetensors")
    assert opened.kind == "a safetensors file"
    assert_same_function(opened.recurrent[0].module, original)


def old_weight_norm(module: nn.Module, name: str, dim: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, yet in many files
        return nn.utils.weight_norm(module, name, dim=dim)


NORMS = {
    "old": lambda m: old_weight_norm(m, "weight_hh_l0", 0),
    "old dim 1": lambda m: old_weight_norm(m, "weight_hh_l0", 1),
    "old whole": lambda m: old_weight_norm(m, "weight_hh_l0", None),
    "new": lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"),
    "new on both": lambda m: nn.utils.parametrizations.weight_norm(
        nn.utils.parametrizations.weight_norm(m, "weight_hh_l0"), "weight_ih_l0"
    ),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_weight_norm_is_folded(tmp_path: Path, norm) -> None:
    original = norm(nn.LSTM(3, 5))
    for value in original.parameters():  # away from where g = ‖v‖
        value.data.mul_(1 + torch.rand_like(value))
    opened = open_model(saved(tmp_path / "w.pt", original.state_dict()))
    original(torch.zeros(1, 1, 3))  # the older kind computes its weight in a forward
    expected = original.weight_hh_l0
    actual = opened.recurrent[0].module.weight_hh_l0
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert "weight-normed" in " ".join(opened.notes)


def test_a_pickled_weight_normed_module_is_folded(tmp_path: Path) -> None:
    original = old_weight_norm(nn.LSTM(3, 5), "weight_hh_l0", 0)
    opened = open_model(saved(tmp_path / "w.pt", original))
    torch.testing.assert_close(opened.model.weight_hh_l0, original.weight_hh_l0, rtol=1e-6, atol=0)
    assert "hooks" in " ".join(opened.notes)


OPAQUE = {
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.LSTM(3, 5), "weight_hh_l0"),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.RNN(3, 5), "weight_hh_l0"),
}


@pytest.mark.parametrize("make", OPAQUE.values(), ids=OPAQUE.keys())
def test_other_parametrisations_ask_for_the_class(tmp_path: Path, make) -> None:
    with pytest.raises(FileError, match=r"cannot be computed exactly.*--model 'pkg.mod:Net"):
        open_model(saved(tmp_path / "w.pt", make().state_dict()))


def test_the_embedding_that_feeds_a_layer(tmp_path: Path) -> None:
    for name, width in (("embed", 3), ("encoder", 3), ("0", 3)):
        model = nn.ModuleDict({name: nn.Embedding(11, width), "rnn": nn.LSTM(3, 5)})
        model["decoder"] = nn.Linear(5, 11)
        (found,) = open_model(saved(tmp_path / "w.pt", model.state_dict())).recurrent
        assert found.embedding.shape == (11, 3)
        assert found.embedding_name == f"{name}.weight"
    other = nn.ModuleDict({"embed": nn.Embedding(11, 4), "rnn": nn.LSTM(3, 5)})
    assert open_model(saved(tmp_path / "w.pt", other.state_dict())).recurrent[0].embedding is None
    head = nn.ModuleDict({"rnn": nn.LSTM(5, 5), "fc": nn.Linear(5, 11, bias=False)})
    assert open_model(saved(tmp_path / "w.pt", head.state_dict())).recurrent[0].embedding is None


PATHS = {
    "a..b": ("a", "_", "b"),
    "forward": ("forward_",),
    "x": ("x",),
    "../../tmp/x": ("_", "_", "/", "_", "/tmp/x"),
    "a\nb.c": (r"a\nb", "c"),
    "\x1b[31m": (r"\x1b[31m",),
}


@pytest.mark.parametrize(("path", "parts"), PATHS.items())
def test_a_name_is_the_files_on_one_line_and_its_parts_can_nest(
    tmp_path: Path, path: str, parts: tuple[str, ...]
) -> None:
    state = {f"{path}.{key}": value for key, value in nn.GRU(3, 5).state_dict().items()}
    (found,) = open_model(saved(tmp_path / "w.pt", state)).recurrent
    assert found.name == path.replace("\n", r"\n").replace("\x1b", r"\x1b")
    assert found.path_parts == parts
    module: nn.Module = found.module
    for part in reversed(parts):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    assert ".".join(parts) in dict(module.named_modules())


def test_a_bare_module_has_no_path_parts(tmp_path: Path) -> None:
    opened = open_model(saved(tmp_path / "w.pt", nn.GRU(3, 5).state_dict()))
    assert (opened.recurrent[0].name, opened.recurrent[0].path_parts) == ("", ())


@pytest.mark.parametrize("normed", [False, True])
def test_keys_with_line_ends_are_read_and_shown_on_one_line(tmp_path: Path, normed: bool) -> None:
    rnn = nn.LSTM(3, 5, num_layers=2)
    if normed:
        nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")
    state = {f"a\nb.{key}": value for key, value in rnn.state_dict().items()}
    state |= {"emb\t.weight": torch.ones(4, 3), "fc\n.weight": torch.ones(2, 5)}
    path = saved(tmp_path / "w.pt", {**state, "note\n": "text"})
    (found,) = open_model(path).recurrent
    assert found.name == r"a\nb"
    text = describe(path).lines()
    assert all(line.isprintable() for line in text)
    assert any(r"  a\nb  LSTM(3 → 5, 2 layers)" in line for line in text)
    assert any(r"emb\t.weight (4, 3)" in line for line in text)
    assert all(
        line.isprintable() for line in (*found.doubts, *found.ambiguous, *open_model(path).notes)
    )
    assert probes(found, 2, 2)[0].name == r"uniform random tokens through emb\t.weight"


def test_refusals_of_keys_with_line_ends_are_one_line(tmp_path: Path) -> None:
    for state in (
        {"a\nb.weight": torch.ones(2, 2)},
        {"a\nb.weight_hh_l0": torch.ones(2, 2)},
        {"weight_hh_l0\n": torch.ones(2, 2)},
    ):
        with pytest.raises(FileError, match=r"\\n") as caught:
            open_model(saved(tmp_path / "w.pt", state))
        assert str(caught.value).isprintable()


def test_nan_in_weights_is_not_refused(tmp_path: Path) -> None:
    state = nn.LSTM(3, 5).state_dict()
    state["weight_hh_l0"].fill_(float("nan"))
    opened = open_model(saved(tmp_path / "w.pt", state))
    assert opened.recurrent[0].module.weight_hh_l0.isnan().all()


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"emb": nn.Embedding(4, 3), "rnn": nn.LSTM(3, 5), "cell": nn.GRUCell(3, 5)}
    )
    assert describe(saved(tmp_path / "w.pt", model.state_dict())).broken == ()
    state = model.state_dict()
    state["rnn.weight_hh_l0"][1, 2] = float("nan")
    state["rnn.bias_ih_l0"][3:5] = torch.tensor([float("nan"), float("-inf")])
    state["cell.weight_hh"][0, 0] = float("inf")
    state["emb.weight"][3, 1:] = float("inf")
    path = saved(tmp_path / "w.pt", state)
    by_name = {found.name: found.broken for found in open_model(path).recurrent}
    table = "emb.weight holds 2 infinite numbers (first at row 4, column 2, counted from 1)"
    cell = "weight_hh of cell holds 1 infinite number (first at row 1, column 1, counted from 1)"
    rnn = (
        "weight_hh_l0 of rnn holds 1 NaN (first at row 2, column 3, counted from 1)",
        "bias_ih_l0 of rnn holds 1 NaN and 1 infinite number (first at entry 4, counted from 1)",
    )
    assert by_name == {"rnn": (*rnn, table), "cell": (cell, table)}
    text = describe(path).lines()
    start = text.index("broken:")
    assert {line.strip() for line in text[start + 1 : start + 5]} == {*rnn, cell, table}
    bare = nn.LSTM(3, 5).bfloat16()
    bare.weight_ih_l0.data[0, 0] = float("nan")
    (found,) = open_model(saved(tmp_path / "b.pt", bare.state_dict())).recurrent
    assert found.broken == ("weight_ih_l0 holds 1 NaN (first at row 1, column 1, counted from 1)",)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float64"])
def test_every_type_of_weight_can_be_asked_whether_it_is_finite(kind: str) -> None:
    weight = torch.tensor([[1.0, torch.nan]]).to(getattr(torch, kind))
    assert non_finite("w", weight).startswith("w holds 1 NaN (first at row 1, column 2")
    assert non_finite("w", weight[:, :1]) == ""


@pytest.mark.parametrize("name", ["m", "m.pt", "m.bin", "m.ckpt", "m.safetensors", "m.SAFETENSORS"])
@pytest.mark.parametrize("form", ["torch", "legacy", "safetensors"])
def test_the_bytes_decide_not_the_suffix(tmp_path: Path, name: str, form: str) -> None:
    original, path = nn.LSTM(3, 5), tmp_path / "original"
    if form == "safetensors":
        save_file(original.state_dict(), path)
    else:
        saved(path, original.state_dict(), _use_new_zipfile_serialization=form == "torch")
    path.rename(tmp_path / name)
    for trust in (False, True):
        (found,) = open_model(tmp_path / name, trust=trust).recurrent
        assert_same_function(found.module, original)


# --- --model ---------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn

print("imported")

class Net(nn.Module):
    def __init__(self, inputs, hidden=5, kinds=()):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 1)
    def forward(self, x):
        return self.fc(self.rnn(x)[0])

class Broken(nn.Module):
    def __init__(self):
        raise RuntimeError("no GPU here")

def build(): return Net(3)
def wrong(): return 5
made = Net(3)
class Box:
    class Inner(Net): pass
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    name = f"usernet_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return name


def net_state(inputs: int = 3, hidden: int = 5) -> dict[str, torch.Tensor]:
    rnn, fc = nn.LSTM(inputs, hidden), nn.Linear(hidden, 1)
    parts = (("rnn", rnn), ("fc", fc))
    return {f"{name}.{k}": v for name, part in parts for k, v in part.state_dict().items()}


SPECS = [
    "Net(3)",
    "Net(3, 5)",
    "Net(inputs=3, hidden=5, kinds=['a:b', (1, 2)])",
    "build",
    "build()",
]


@pytest.mark.parametrize("call", [*SPECS, "made", "Box.Inner(3)"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.net.", "module._orig_mod."])
def test_a_users_class_gets_the_weights(net: str, tmp_path: Path, call: str, prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in net_state().items()}
    opened = open_model(saved(tmp_path / "w.pt", state), spec=f"{net}:{call}")
    for key, value in opened.model.state_dict().items():
        torch.testing.assert_close(value, state[f"{prefix}{key}"], rtol=0, atol=0)
    assert not opened.model.training
    assert opened.recurrent[0].name == "rnn"


def test_a_file_can_be_named_and_sys_path_is_left_as_it_was(
    net: str, tmp_path: Path, capsys
) -> None:
    import sys

    before = list(sys.path)
    path = saved(tmp_path / "w.pt", net_state())
    opened = open_model(path, spec=f"{tmp_path}/{net}.py:Net(3)")
    assert opened.title == "Net"
    assert sys.path == before
    assert capsys.readouterr().out == ""  # standard output belongs to --json


def test_a_counter_beside_the_weights_is_not_taken_for_them(net: str, tmp_path: Path) -> None:
    state = net_state()
    hidden_names = {key.replace("rnn.", "core."): value for key, value in state.items()}
    path = saved(tmp_path / "w.pt", {"step": torch.tensor(7), "model": hidden_names})
    source = (tmp_path / f"{net}.py").read_text().replace("self.rnn", "self.core")
    (tmp_path / f"{net}.py").write_text(source)
    assert open_model(path, spec=f"{net}:Net(3)").recurrent[0].name == "core"
    linear = saved(tmp_path / "l.pt", {"step": torch.tensor(7), "model": {"w": torch.ones(9)}})
    with pytest.raises(FileError, match=r"a training checkpoint without .*1 tensors.*w \(9,\)"):
        open_model(linear)


def test_a_file_named_like_a_loaded_module_does_not_replace_it(tmp_path: Path) -> None:
    import json

    (tmp_path / "json.py").write_text(SOURCE)
    path = saved(tmp_path / "w.pt", net_state())
    assert open_model(path, spec=f"{tmp_path}/json.py:Net(3)").title == "Net"
    assert __import__("json") is json


def test_lightning_leaves_the_loss_out_and_keeps_double(net: str, tmp_path: Path) -> None:
    state = {f"model.{k}": v.double() for k, v in net_state().items()}
    state["criterion.weight"] = torch.ones(2)
    checkpoint = {"pytorch-lightning_version": "2", "state_dict": state}
    opened = open_model(saved(tmp_path / "w.ckpt", checkpoint), spec=f"{net}:Net(3)")
    assert opened.model.fc.weight.dtype == torch.float64
    assert "1 other tensors" in " ".join(opened.notes)


def test_a_pickle_of_a_users_class_loads_into_the_class_without_running(net, tmp_path, monkeypatch):
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(net)
    path = saved(tmp_path / "m.pt", module.Net(3))
    with pytest.raises(FileError, match=rf"class {net}.Net .*--model '{net}:Net\(...\)'.*--trust"):
        open_model(path)
    del sys.modules[net]
    assert open_model(path, spec=f"{net}:Net(3)").model is not None
    trusted = open_model(path, trust=True)
    assert trusted.trusted
    assert trusted.title == "Net"
    assert trusted.recurrent[0].module.batch_first


BAD_SPECS = {
    "no colon": ("Net(3)", InputError, "MODULE:NAME"),
    "code": ("{net}:Net(__import__('os').getcwd())", InputError, "Python literals"),
    "name": ("{net}:Net(x)", InputError, "Python literals"),
    "star": ("{net}:Net(*[1])", InputError, "Python literals"),
    "two stars": ("{net}:Net(**{{}})", InputError, "Python literals"),
    "tail": ("{net}:Net(3).eval()", InputError, "Python literals"),
    "open": ("{net}:Net(3", InputError, "Python literals"),
    "deep": ("{net}:Net(" + "[" * 5000, InputError, "Python literals"),
    "no module": ("nowhere_at_all:Net(3)", InputError, "no module 'nowhere_at_all'"),
    "no package": ("nowhere_at_all.sub:Net(3)", UserCodeError, "nowhere_at_all"),
    "no file": ("nowhere.py:Net(3)", InputError, "no file nowhere.py"),
    "no class": ("{net}:Nett(3)", InputError, "it defines Net, Broken"),
    "raises": ("{net}:Broken()", UserCodeError, "RuntimeError: no GPU here"),
    "arguments": ("{net}:Net()", UserCodeError, "TypeError"),
    "no model": ("{net}:wrong()", InputError, "must build a torch.nn.Module, got an int"),
    "instance called": ("{net}:made(3)", InputError, "is a model already"),
    "not callable": ("{net}:nn", InputError, "a class or function"),
    "shape": (
        "{net}:Net(3, 6)",
        FileError,
        r"of another shape: .*\(20, 3\) in the file, \(24, 3\)",
    ),
    "other": ("torch.nn:Linear(3, 2)", FileError, "missing from the file: weight, bias; not in"),
}


@pytest.mark.parametrize(("spec", "error", "match"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_a_bad_spec_is_said_in_words(net: str, tmp_path: Path, spec, error, match) -> None:
    path = saved(tmp_path / "w.pt", net_state())
    with pytest.raises(error, match=match):
        open_model(path, spec=spec.format(net=net))


SCRIPTS = {
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3.*__main__"),
    "syntax": ("def (", "SyntaxError"),
    "missing": ("import not_installed_anywhere", "ModuleNotFoundError"),
}


@pytest.mark.parametrize(("code", "match"), SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_module_that_fails_on_import_is_quoted(tmp_path, monkeypatch, code, match, request):
    monkeypatch.chdir(tmp_path)
    name = f"script_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    with pytest.raises(UserCodeError, match=match):
        open_model(saved(tmp_path / "w.pt", net_state()), spec=f"{name}:Net(3)")


# --- describe, save_snippet ---------------------------------------------------------------------


def test_describe_says_what_is_there_and_what_to_type(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 3), "rnn": nn.RNN(3, 5, num_layers=2)})
    model["fc"] = nn.Linear(5, 11)
    path = saved(tmp_path / "w.pt", model.state_dict())
    said = describe(path)
    assert said.others == {"embed": 33, "fc": 66}
    text = "\n".join(said.lines())
    for part in ("a state_dict", "rnn  RNN(3 → 5, 2 layers)  110 parameters, float32", "tanh"):
        assert part in text
    assert said.lines()[-1] == f"next: gradflow analyze {path}"


def test_describe_does_not_refuse_what_has_no_recurrence(tmp_path: Path) -> None:
    said = describe(saved(tmp_path / "w.pt", nn.Linear(3, 2).state_dict()))
    assert "without recurrent weights: 2 tensors" in said.problem
    assert said.next_command.endswith("--model 'pkg.mod:Net(...)' --input batch.pt")


def test_the_snippet_saves_a_batch_and_names_the_command(tmp_path: Path) -> None:
    path = saved(tmp_path / "my weights.pt", nn.LSTM(3, 5).state_dict())
    text = save_snippet(path, open_model(path))
    assert 'torch.save({"input": x, "target": y}, "batch.pt")' in text
    command = text.splitlines()[-1]
    assert command.endswith("weights.pt' --model 'pkg.mod:Net(10, 20)' --input batch.pt")
