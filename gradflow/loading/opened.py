"""Open a model file: the whole model where the file or ``--model`` gives one, else its weights."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from gradflow.errors import FileError
from gradflow.loading import spec as specs
from gradflow.loading.files import read
from gradflow.loading.kinds import READ_ERRORS
from gradflow.loading.recurrent import RecurrentModule, from_model, from_tensors
from gradflow.loading.shells import Rebuilder, Shell, foreign_classes, tensors_of
from gradflow.loading.states import Found, fold, is_recurrent, locate, name_of, renamed
from gradflow.loading.words import RESAVE, analyze_command, printable, reason

BATCH_KEYS = ("input", "target", "lengths")  # of a file given to --input


@dataclass(frozen=True)
class Opened:
    """A model file, opened: a model to run, or recurrent modules to probe."""

    path: Path
    kind: str  # "a state_dict", "a Lightning checkpoint", ...
    title: str  # the class's name, or the file's
    model: nn.Module | None  # the whole model, in eval mode; None from weights alone
    recurrent: tuple[RecurrentModule, ...]
    notes: tuple[str, ...] = ()  # sentences: what was assumed or dropped
    trusted: bool = False
    spec: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)


def open_model(
    path: str | os.PathLike[str], spec: str | None = None, trust: bool = False
) -> Opened:
    """Open a model file and build what can run of it.

    Reads a state_dict, a training checkpoint, a Lightning checkpoint, safetensors and a pickle of
    stock torch.nn modules, which is rebuilt from its tensors so that nothing in it runs. ``spec``
    names the user's class, ``"pkg.mod:Net(10, 20)"``, and the weights are loaded into it.
    ``trust`` opens any pickle and may run code from the file.

    Raises FileError where the file is anything else, InputError for a malformed ``spec``,
    UserCodeError when the user's own code raises.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(torch.nn.LSTM(3, 5).state_dict(), f"{folder}/weights.pt")
    ...     print(open_model(f"{folder}/weights.pt").recurrent[0])
    LSTM(3 → 5)
    """
    opened = open_any(path, spec, trust)
    # A user's class may hold cells of its own, which only a run shows; a stock pickle may not.
    if not opened.recurrent and (opened.model is None or (spec is None and not trust)):
        raise FileError(no_recurrence(opened))
    return opened


def no_recurrence(opened: Opened) -> str:
    """The sentence for a file without recurrent weights."""
    if "input" in opened.shapes and set(opened.shapes) <= set(BATCH_KEYS):
        return printable(
            f"{opened.path} holds {' and '.join(opened.shapes)}, a batch and no model; give it with "
            f"the file of weights: gradflow analyze WEIGHTS --model 'pkg.mod:Net(10, 20)' "
            f"--input {shlex.quote(str(opened.path))}"
        )
    shown = [f"{key} {shape}" for key, shape in list(opened.shapes.items())[:4]]
    more = f" and {len(opened.shapes) - 4} more" if len(opened.shapes) > 4 else ""
    holds = f"{len(opened.shapes)} tensors, none a weight_hh ({', '.join(shown)}{more})"
    command = analyze_command(opened.path, "--model 'pkg.mod:Net(...)' --input batch.pt")
    return printable(
        f"{opened.path} is {opened.kind} without recurrent weights: {holds if shown else 'empty'}; "
        f"if the recurrence is in your own code, type: {command}"
    )


def open_any(path: str | os.PathLike[str], spec: str | None, trust: bool) -> Opened:
    """Like `open_model`, but a file without recurrent weights is described, not refused."""
    path = Path(path)
    if spec is not None:
        specs.parse_spec(spec)  # a typing mistake is said before a large file is read
    try:
        opened = _open(path, spec, trust)
    except FileError as error:
        # Every refusal names its file and is one line, whatever the keys in the file are.
        named = str(path) in str(error)
        raise FileError(printable(error if named else f"{path}: {error}")) from error
    return replace(opened, notes=tuple(map(printable, opened.notes)))


def _open(path: Path, spec: str | None, trust: bool) -> Opened:
    contents = read(path, trust)
    _refuse_quantized(path, contents.value)
    try:
        found = locate(contents.value, contents.kind)
    except ValueError as error:
        raise FileError(_not_weights(path, contents.value, str(error), trust)) from error
    except READ_ERRORS as error:
        raise FileError(
            f"{path} holds objects that contradict themselves{reason(error)}; {RESAVE}"
        ) from error
    tensors = _checked(path, _all_tensors(found))
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if spec is not None:
        model = specs.build(spec)
        notes = specs.load_into(model, tensors, spec)
        return Opened(
            path=path,
            kind=found.kind,
            title=type(model).__name__,
            model=model.eval(),
            recurrent=from_model(model),
            notes=(*found.notes, *notes),
            trusted=trust,
            spec=spec,
            shapes=shapes,
        )
    if found.module is not None:
        return _open_module(path, found, shapes, trust)
    notes_of_fold: list[str] = []
    plain = fold(renamed(tensors), notes_of_fold)
    recurrent = from_tensors(plain)
    return Opened(
        path=path,
        kind=found.kind,
        title=path.stem,
        model=None,
        recurrent=recurrent,
        notes=(*found.notes, *notes_of_fold),
        trusted=trust,
        shapes=shapes,
    )


def _refuse_quantized(path: Path, value: object) -> None:
    """torch.ao.quantization packs the weights of a layer into one object that nothing here can read."""
    packed = ("_packed_params", "_all_weight_values")
    keys = [str(key) for key in value] if isinstance(value, Mapping) else []
    if any(part in key for key in keys for part in packed):
        raise FileError(
            f"{path} holds quantized weights, packed for inference, through which no gradient flows; "
            f"take the model as it was before it was quantized: {RESAVE}"
        )


def _all_tensors(found: Found) -> dict[str, Tensor]:
    if isinstance(found.module, Shell):
        return tensors_of(found.module)
    if isinstance(found.module, nn.Module):
        return {k: v for k, v in found.module.state_dict().items() if isinstance(v, Tensor)}
    return found.tensors


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    meta = [key for key, value in tensors.items() if value.device.type == "meta"]
    if meta:
        raise FileError(
            f"{path} holds shapes without numbers (meta tensors, such as {meta[0]}); "
            f"materialise the model before saving it: {RESAVE}"
        )
    return tensors


def _open_module(
    path: Path, found: Found, shapes: Mapping[str, tuple[int, ...]], trust: bool
) -> Opened:
    notes = list(found.notes)
    if isinstance(found.module, Shell):
        foreign = foreign_classes(found.module)
        if foreign:
            raise FileError(_foreign(path, foreign, any(map(is_recurrent, shapes))))
        rebuilder = Rebuilder(fold=lambda part: fold(part, notes))
        model: nn.Module = rebuilder.build(found.module)
        notes += rebuilder.notes
    else:
        assert found.module is not None
        model = found.module.eval()
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    title = path.stem if isinstance(model, containers) else type(model).__name__
    return Opened(
        path=path,
        kind=found.kind,
        title=title,
        # A list or dict of modules has no forward: its recurrent modules are probed one by one.
        model=None if type(model) in (nn.ModuleList, nn.ModuleDict) else model,
        recurrent=from_model(model),
        notes=tuple(notes),
        trusted=trust,
        shapes=shapes,
    )


def _foreign(path: Path, classes: list[str], recurrent: bool) -> str:
    first = classes[0]
    module, _, name = first.rpartition(".")
    stock = module.startswith("torch.")
    where = "pkg.mod" if stock or module == "__main__" else module
    example = f"{where}:{'Net' if stock else name}(...)"
    shown = ", ".join(classes[:3]) + (f" and {len(classes) - 3} more" if len(classes) > 3 else "")
    command = analyze_command(
        path, f'--model "{example}"' if "'" in example else f"--model '{example}'"
    )
    holds = "with recurrent layers in it" if recurrent else "without stock recurrent layers"
    return (
        f"{path} is a pickle of the class {shown} {holds}, and a class's code is not opened from a "
        f"file; type, with its arguments: {command}, or, only if you trust the file's author: "
        f"{analyze_command(path, '--trust')}"
    )


def _not_weights(path: Path, value: object, name: str, trust: bool) -> str:
    if isinstance(value, Tensor) or (isinstance(value, list | tuple) and value):
        return (
            f"{path} holds {name}, which looks like data, not a model; give it as the batch: "
            f"gradflow analyze MODEL --input {path}"
        )
    if isinstance(value, Shell) and not trust:
        return (
            f"{path} holds {name_of(value)}, whose code is not opened from a file; {RESAVE}, or, "
            f"only if you trust the file's author: {analyze_command(path, '--trust')}"
        )
    return f"{path} holds {name}, no weights; {RESAVE}"
