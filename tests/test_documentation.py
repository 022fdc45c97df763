"""Every command and every public name is documented, and every example is one that runs or parses."""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import histories
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import gradflow
from gradflow import analysis, errors
from gradflow.cli import _code
from gradflow.cli import gradflow as group
from gradflow.conditions import parse_conditions
from gradflow.reporter import KINDS

README = (Path(__file__).parent.parent / "README.md").read_text()
TYPES = (
    gradflow.Recording,
    gradflow.Track,
    gradflow.Analysis,
    gradflow.LayerAnalysis,
    gradflow.Finding,
    gradflow.Prediction,
)
NAMES = [name for name in gradflow.__all__ if not name.startswith("__") and name != "analyzer"]
FUNCTIONS = {
    f.__name__: f
    for f in (
        *(getattr(gradflow, name) for name in NAMES),
        *(getattr(gradflow.analyzer, name) for name in gradflow.analyzer.__all__),
    )
    if inspect.isfunction(f)
}
CLASSES = {
    name: getattr(gradflow, name) for name in NAMES if inspect.isclass(getattr(gradflow, name))
}


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield f"{kind.__name__}.{name}", value


MEMBERS = {name: value for kind in TYPES for name, value in members(kind)}
METHODS = {name: value for name, value in MEMBERS.items() if inspect.isfunction(value)}
PROPERTIES = {name: value.fget for name, value in MEMBERS.items() if isinstance(value, property)}


def sections(doc: str) -> dict[str, str]:
    """Heading -> text of a docstring's sections; "" is what stands before them."""
    parts = re.split(r"^(Args|Returns|Raises):\n", inspect.cleandoc(doc), flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(doc: str, heading: str) -> list[str]:
    """Names with a line of their own under a heading."""
    return re.findall(r"^ {4}(\w+):", sections(doc).get(heading, ""), re.M)


def lacks(function: Callable[..., Any]) -> list[str]:
    """What the docstring of a public function leaves out."""
    doc = inspect.getdoc(function) or ""
    if not doc:
        return ["a docstring"]
    signature = inspect.signature(function)
    found = [
        f"an argument {name}"
        for name in signature.parameters
        if name not in ("self", *entries(doc, "Args"))
    ]
    unknown = set(entries(doc, "Args")) - set(signature.parameters)
    found += [f"an argument that is there instead of {name}" for name in sorted(unknown)]
    if signature.return_annotation != "None" and "Returns" not in sections(doc):
        found.append("Returns")
    if not doctest.DocTestParser().get_examples(doc):
        found.append("an example")
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_give_and_raise_with_an_example(name: str) -> None:
    assert lacks(FUNCTIONS[name]) == []
    assert "Raises" in sections(inspect.getdoc(FUNCTIONS[name]) or "")


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_take_and_give_with_an_example(name: str) -> None:
    assert lacks(METHODS[name]) == []


def test_what_is_lacking_would_be_seen() -> None:
    def bare(x: int, y: int) -> int:
        """Add.

        Args:
            x: one.
            z: other.
        """
        return x + y

    assert lacks(bare) == [
        "an argument y",
        "an argument that is there instead of z",
        "Returns",
        "an example",
    ]


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_are_documented_and_arrays_with_their_shape(name: str) -> None:
    doc = inspect.getdoc(PROPERTIES[name]) or ""
    assert doc
    if "Tensor" in str(inspect.signature(PROPERTIES[name]).return_annotation):
        assert re.search(r"\([A-Z](·\w)?, ?[\w·, ]+\)", doc), "a shape like (T, B, H)"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_an_example(name: str) -> None:
    doc = CLASSES[name].__doc__ or ""
    assert doc
    assert doctest.DocTestParser().get_examples(doc)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if hasattr(kind, "__dataclass_fields__")])
def test_every_field_says_what_it_is(kind: type) -> None:
    lines = inspect.getsource(kind).splitlines()
    for name in (field.name for field in fields(kind) if not field.name.startswith("_")):
        (line,) = [text for text in lines if text.startswith(f"    {name}: ")]
        assert "  # " in line, f"{kind.__name__}.{name}"


OF_ERRORS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and kind.__module__ == "gradflow.errors"
]


@pytest.mark.parametrize("kind", OF_ERRORS)
def test_every_error_says_what_it_stands_for(kind: type) -> None:
    assert kind.__doc__
    assert issubclass(kind, errors.GradflowError | errors.GradflowWarning)


def test_every_error_that_a_docstring_names_is_one_of_ours() -> None:
    for name, function in (FUNCTIONS | METHODS).items():
        for raised in re.findall(
            r"^ {4}(\w+):", sections(inspect.getdoc(function) or "").get("Raises", ""), re.M
        ):
            assert hasattr(errors, raised), f"{name} raises {raised}"


def test_examples_run_with_the_tests(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("doctestmodules")
    assert {"gradflow", "README.md"} <= set(pytestconfig.getini("testpaths"))


# ---------------------------------------------------------------------------- the command line


def in_text(text: str) -> list[str]:
    """Lines that are a command to type; words after two spaces say what it does."""
    lines = re.findall(r"^\s*(gradflow [^\n]+)$", text, re.M)
    return [re.split(r" {2,}(?![^']*'$)", line)[0] for line in lines]


def in_readme() -> list[str]:
    """Commands of its sh blocks, and those in the text between backquotes."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    typed = [part for block in blocks for line in block.splitlines() for part in line.split(" && ")]
    quoted = re.findall(r"`(gradflow [^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    found = [line.removeprefix(".venv/bin/") for line in (*typed, *quoted)]
    return [line for line in found if line.startswith("gradflow ")]


def parse(line: str) -> click.Context:
    """Parse a command line as the shell and click would, without running it."""
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "gradflow"
    context = group.commands[name].make_context(name, arguments)
    parse_conditions(context.params.get("fail_on"))
    return context


@pytest.mark.parametrize("name", group.commands)
def test_every_command_shows_how_it_is_typed(name: str) -> None:
    shown = CliRunner().invoke(group, [name, "--help"]).output
    assert any(shlex.split(line)[1] == name for line in in_text(shown))
    command = group.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
        else:
            words = parameter.make_metavar(click.Context(command)).removesuffix("...")
            word = words.split()[0]
            assert word in command.help, f"{name} {word}"


HELP = "\n".join(command.help or "" for command in (group, *group.commands.values()))


@pytest.mark.parametrize("line", [*in_text(HELP), *in_readme()])
def test_every_command_line_that_is_shown_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "gradflow analyze",
        "gradflow analyze m.pt --los mse",
        "gradflow report r --fail-on 'horizon'",
    ],
)
def test_a_line_that_does_not_parse_would_be_seen(line: str) -> None:
    with pytest.raises((click.UsageError, errors.InputError)):
        parse(line)


def test_the_readme_shows_every_command_and_every_function() -> None:
    assert {parse(line).info_name for line in in_readme()} == set(group.commands)
    assert [name for name in FUNCTIONS if name in NAMES and f"gradflow.{name}" not in README] == []


def test_every_kind_of_picture_is_named_in_the_readme_and_where_a_wrong_one_is_asked_for() -> None:
    with pytest.raises(errors.InputError) as caught:
        gradflow.plot([], "overveiw")
    for kind in KINDS:
        assert f"`{kind}`" in README
        assert re.search(rf"\b{kind}\b", str(caught.value))


def test_scripts_that_the_readme_names_are_there() -> None:
    scripts = re.findall(r"python (\S+\.py)", README)
    assert scripts
    for script in scripts:
        assert (Path(__file__).parent.parent / script).is_file(), script


# ----------------------------------------------------------------------- the table of variables


def table(doc: str) -> dict[str, tuple[str, ...]]:
    """Variable -> its dimensions, of the table in the docstring of `gradflow.analysis`."""
    ruler = next(line for line in doc.splitlines() if line.startswith("=="))
    second, third = (match.start() + 1 for match in re.finditer(" =", ruler))
    rows: list[list[str]] = []
    for line in doc.split(ruler)[1].splitlines()[1:]:
        if line[:second].strip():
            rows.append(["", ""])
        rows[-1][0] += line[:second]
        rows[-1][1] += line[second:third].strip() + " "
    found: dict[str, tuple[str, ...]] = {}
    for names, dims in rows:
        first, *others = re.split(r", |/", names.strip())
        for name in (first, *others):
            whole = first.rpartition("_")[0] + name if name.startswith("_") else name
            found[whole] = tuple(re.findall(r"\w+", dims))
    return found


@pytest.fixture(scope="module")
def data() -> list[Any]:
    """What is measured of an LSTM and of an RNN."""
    torch.manual_seed(0)
    models = [nn.LSTM(2, 3), nn.RNN(2, 3)]
    return [gradflow.diagnose(model, torch.randn(12, 3, 2))["l0"].data for model in models]


def test_the_table_lists_the_variables_that_there_are(data: list[Any]) -> None:
    listed = table(analysis.__doc__ or "")
    assert listed.pop("log_rms_error") == listed["log_cell_path"]  # of wide layers only
    assert (listed.pop("file_gain"), listed.pop("file_rate")) == (
        ("file",),
        ("file",),
    )  # of several
    for found in data:
        assert {name: found[name].dims for name in found.data_vars} == listed


def test_a_row_is_read_with_all_its_names() -> None:
    listed = table(analysis.__doc__ or "")
    assert listed["gate_open"] == listed["gate_closed"] == ("gate", "step")
    assert listed["log_gain"] == ("norm", "sequence", "source", "target")
    assert listed["lag_high"] == ("lag",)


# ------------------------------------------------------------------------------ pasted examples


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES, *METHODS])
def test_an_example_runs_where_it_is_pasted(name: str) -> None:
    """A reader of `help` has nothing imported but what the example itself imports."""
    doc = inspect.getdoc((FUNCTIONS | CLASSES | METHODS)[name]) or ""
    assert name_errors(doc) == []


def name_errors(doc: str) -> list[str]:
    """Names that the examples of a docstring use without importing or making them."""
    examples = doctest.DocTestParser().get_examples(doc)
    known = set(vars(builtins))
    missing = []
    for example in examples:
        nodes = list(ast.walk(ast.parse(example.source)))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif isinstance(node, ast.arg | ast.FunctionDef | ast.ClassDef):
                known.add(node.arg if isinstance(node, ast.arg) else node.name)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                known.add(node.name)
        missing += [n.id for n in nodes if isinstance(n, ast.Name) and n.id not in known]
    return missing


def test_a_name_that_is_not_imported_would_be_seen() -> None:
    assert name_errors(">>> import torch\n>>> x = load(torch.ones(3))\n>>> x") == ["load"]


# ------------------------------------------------------------------------------- commands that run


@pytest.mark.slow
def test_the_examples_of_the_help_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder with the files that they name; the demo has a test of its own in .ci/run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_code.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, inputs, hidden):\n        super().__init__()\n"
        "        self.rnn = nn.RNN(inputs, hidden)\n\n"
        "    def forward(self, x):\n        return self.rnn(x)[0]\n"
    )
    for name in ("model", "rnn", "lstm", "before", "after"):
        torch.save({f"rnn.{k}": v for k, v in nn.RNN(10, 20).state_dict().items()}, f"{name}.pt")
    torch.save({"input": torch.randn(9, 3, 10), "target": torch.randn(9, 3, 20)}, "batch.pt")
    for seed in (0, 1):
        (tmp_path / "runs" / f"seed={seed}").mkdir(parents=True)
        shutil.copy("model.pt", tmp_path / "runs" / f"seed={seed}" / "step-7.pt")
    for name in ("a", "b"):
        histories.write(tmp_path / "runs" / name, 6)
    needed = [f"gradflow analyze {name}.pt --seq-len 12 -q" for name in ("rnn", "lstm")]
    shown = {line: None for command in group.commands.values() for line in in_text(command.help)}
    # the demo and a folder of transformers have tests of their own
    lines = [line for line in shown if line != "gradflow demo" and "--tokens" not in line]
    assert len(lines) >= len(group.commands)
    for line in sorted([*needed, *lines], key=lambda line: line not in needed):
        assert (
            _code(lambda line=line: group.main(shlex.split(line)[1:], standalone_mode=False)) == 0
        )
