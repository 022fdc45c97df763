"""Open a model file: the whole model where the file or ``--model`` gives one, else its weights."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from gradflow.errors import FileError, InputError, one_sentence, printable
from gradflow.history.probe import TrainingStep
from gradflow.limits import MOST_LAYERS, SENTENCE_LETTERS, TRUSTED_LETTERS
from gradflow.loading import model_spec as specs
from gradflow.loading.ages import about_age, aged_layers, lacking
from gradflow.loading.contents import read
from gradflow.loading.file_kinds import READ_ERRORS
from gradflow.loading.found import Found, is_data, locate, merged
from gradflow.loading.members import Member, named_list, pick
from gradflow.loading.recurrent import RecurrentModule, from_model, from_tensors, recurrent_layers
from gradflow.loading.shells import Rebuilder, Shell
from gradflow.loading.state_dicts import fold, renamed, shapes_of
from gradflow.loading.training_step import step_in
from gradflow.loading.words import RESAVE, RESAVE_OR_TRUST, analyze_command, reason, some
from gradflow.process import many_objects

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
    member: str | None = None  # the part of the file that was asked for
    members: tuple[Member, ...] = ()  # those read, where the file holds several things
    others: tuple[Member, ...] = ()  # those not read
    said: tuple[str, ...] = ()  # sentences that a reader must see
    aged: str = ""  # why the model cannot run in this torch, or ""
    trained: TrainingStep | None = None  # how far its training was, where the file says so


def open_model(
    path: str | os.PathLike[str],
    spec: str | Callable[[], nn.Module] | None = None,
    trust: bool = False,
    member: str | None = None,
) -> Opened:
    """Open a model file and build what can run of it.

    Reads a state_dict, a training checkpoint, a Lightning checkpoint, safetensors and a pickle of
    stock torch.nn modules, which is rebuilt from its tensors so that nothing in it runs. ``spec``
    names the user's class, ``"pkg.mod:Net(10, 20)"``, or makes the model, and the weights are loaded
    into it.
    ``trust`` opens any pickle and may run code from the file. ``member`` picks one of several
    modules or state_dicts in a list, tuple or dict, by the keys or indices that lead to it:
    ``"decoder"``, ``"0"``, ``"models.encoder"``; else the one with recurrent weights is read, or,
    of several, that under a usual name such as ``"state_dict"``, or all side by side.

    Raises FileError where the file is anything else, InputError for a malformed ``spec`` and a
    ``member`` that is not there, UserCodeError when the user's own code raises.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(torch.nn.LSTM(3, 5).state_dict(), f"{folder}/weights.pt")
    ...     print(open_model(f"{folder}/weights.pt").recurrent[0])
    LSTM(3 → 5)
    """
    opened = open_any(path, spec, trust, member)
    # A user's class may hold cells of its own, which only a run shows; a stock pickle may not.
    if not opened.recurrent and (opened.model is None or (spec is None and not trust)):
        raise FileError(one_sentence(no_recurrence(opened), str(path)))
    return opened


def no_recurrence(opened: Opened) -> str:
    """The sentence for a file without recurrent weights."""
    if "input" in opened.shapes and set(opened.shapes) <= set(BATCH_KEYS):
        return printable(
            f"{opened.path} holds {' and '.join(opened.shapes)}, a batch and no model; give it with "
            f"the file of weights: gradflow analyze WEIGHTS --model 'pkg.mod:Net(10, 20)' "
            f"--input {shlex.quote(str(opened.path))}"
        )
    modules = [part for part in opened.members if part.module is not None]
    if len(modules) > 1:
        name = shlex.quote(modules[0].name)
        trust = " --trust" if opened.trusted else ""
        command = analyze_command(opened.path, f"--member {name}{trust} --input batch.pt")
        return printable(
            f"{opened.path} holds {len(modules)} modules, none with stock recurrent layers: "
            f"{named_list(modules)}; if the recurrence is in the code of one, pick it: {command}"
        )
    shown = [f"{key} {shape}" for key, shape in list(opened.shapes.items())[:4]]
    more = f" and {len(opened.shapes) - 4} more" if len(opened.shapes) > 4 else ""
    holds = f"{len(opened.shapes)} tensors, none a weight_hh ({', '.join(shown)}{more})"
    command = analyze_command(opened.path, "--model 'pkg.mod:Net(...)' --input batch.pt")
    return printable(
        f"{opened.path} is {opened.kind} without recurrent weights: {holds if shown else 'empty'}; "
        f"if the recurrence is in your own code, type: {command}"
    )


def check_layers(opened: Opened) -> None:
    """Raise InputError for more layers than are analyzed at once."""
    count = sum(one.layers * (1 + one.bidirectional) for one in opened.recurrent)
    if count > MOST_LAYERS:
        raise InputError(
            f"{opened.title} has {count:,} recurrent layers, more than the {MOST_LAYERS} that are analyzed "
            "at once; take fewer with --member, or record a training step of a part with gradflow.record"
        )


def no_model_to_run(opened: Opened, batch: Path | None) -> str:
    """The sentence for a batch that there is no model to run on."""
    given = f"--input {shlex.quote(str(batch))}"
    modules = [part for part in opened.members if part.module is not None]
    if len(opened.members) > 1 and modules:
        trust = " --trust" if opened.trusted else ""
        command = analyze_command(
            opened.path, f"--member {shlex.quote(modules[0].name)}{trust} {given}"
        )
        return (
            f"--input needs one model to run, but {opened.path} holds {named_list(modules)}; "
            f"pick one: {command}"
        )
    picked = "" if opened.member is None else f"--member {shlex.quote(opened.member)} "
    command = analyze_command(opened.path, f"{picked}--model 'pkg.mod:Net(10, 20)' {given}")
    return (
        f"--input needs a model to run, but {opened.path} is {opened.kind}, which holds weights "
        f"only; name your class too: {command}"
    )


def open_any(
    path: str | os.PathLike[str],
    spec: str | Callable[[], nn.Module] | None,
    trust: bool,
    member: str | None = None,
) -> Opened:
    """Like `open_model`, but a file without recurrent weights is described, not refused."""
    path = Path(path)
    if isinstance(spec, str):
        specs.parse_spec(spec)  # a typing mistake is said before a large file is read
    try:
        with many_objects():
            opened = _open(path, spec, trust, member)
    except (FileError, InputError) as error:
        # Every refusal names its file and is one line, whatever the keys in the file are.
        named = str(path) in str(error)
        said = error if named else f"{path}: {error}"
        most = TRUSTED_LETTERS if trust or spec else SENTENCE_LETTERS
        typed = (str(path), spec if isinstance(spec, str) else "", member or "")
        raise type(error)(one_sentence(said, *typed, most=most)) from error
    return replace(
        opened, notes=tuple(map(printable, opened.notes)), said=tuple(map(printable, opened.said))
    )


def _open(
    path: Path, spec: str | Callable[[], nn.Module] | None, trust: bool, member: str | None
) -> Opened:
    contents = read(path, trust)
    value = contents.value
    try:
        if member is not None:
            member, value = pick(value, member)
        _refuse_quantized(path, value)
        found = locate(value, contents.kind)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise FileError(_not_weights(path, value, str(error), trust, member)) from error
    except READ_ERRORS as error:
        raise FileError(
            f"{path} holds objects that contradict themselves{reason(error)}; {RESAVE}"
        ) from error
    tensors = found.tensors
    opened = Opened(
        path=path,
        kind=found.kind if member is None else f"a file whose member {member!r} is {found.kind}",
        title=path.stem,
        model=None,
        recurrent=(),
        notes=found.notes,
        trusted=trust,
        spec=spec if isinstance(spec, str) else None,
        shapes=shapes_of(tensors),
        member=member,
        members=found.members,
        others=found.others,
        said=found.said,
        trained=step_in(contents.value),
    )
    if spec is not None:
        return _into_class(opened, found, spec)
    if any(part.module is not None for part in found.members):
        return _open_modules(opened, found)
    notes: list[str] = []
    recurrent = from_tensors(fold(renamed(tensors), notes))
    return replace(opened, recurrent=recurrent, notes=(*found.notes, *notes))


def _into_class(opened: Opened, found: Found, made_by: str | Callable[[], nn.Module]) -> Opened:
    """Build the user's class and load into it the members whose weights fit."""
    model = specs.build(made_by) if isinstance(made_by, str) else made_by()
    spec = made_by if isinstance(made_by, str) else type(model).__name__
    every = [*found.members, *found.others]
    children = dict(model.named_children())
    parts = [part for part in every if part.name in children]
    ways: list[tuple[str, dict[str, Tensor]]] = [("", found.tensors)]
    ways += [("", merged(parts))] if len(parts) > 1 else []
    if len(every) > 1:
        ways += [(part.name, part.tensors) for part in every if [part] != list(found.members)]
    refused: FileError | None = None
    for name, tensors in ways:
        try:
            notes = specs.load_into(model, tensors, spec)
        except FileError as error:
            refused = refused or error
            continue
        said = (
            (f"the weights of the member {name!r} were loaded into {spec}",) if name else found.said
        )
        return replace(
            opened,
            title=type(model).__name__,
            model=model.eval(),
            recurrent=from_model(model),
            notes=(*(() if name else found.notes), *notes),
            said=said,
            shapes=shapes_of(tensors),
        )
    assert refused is not None
    if len(every) == 1:
        raise refused
    raise FileError(
        f"{refused}; the file holds several members, and none fits: {named_list(every)}; "
        f"--member NAME tries one alone"
    ) from refused


def _refuse_quantized(path: Path, value: object) -> None:
    """torch.ao.quantization packs the weights of a layer into one object that nothing here can read."""
    packed = ("_packed_params", "_all_weight_values")
    keys = [str(key) for key in value] if isinstance(value, Mapping) else []
    if any(part in key for key in keys for part in packed):
        raise FileError(
            f"{path} holds quantized weights, packed for inference, through which no gradient flows; "
            f"take the model as it was before it was quantized: {RESAVE}"
        )


def _open_modules(opened: Opened, found: Found) -> Opened:
    """Rebuild or take the modules of a file; several are probed side by side."""
    foreign = [part for part in found.members if part.foreign]
    if foreign:
        raise FileError(_foreign(opened.path, foreign, opened.member))
    notes, said, recurrent = list(opened.notes), list(found.said), []
    model: nn.Module | None = None
    aged = ""
    several = len(found.members) > 1
    for part in found.members:
        if part.module is None:
            layers = from_tensors(fold(renamed(part.tensors), notes))
        else:
            model = _built(part.module, notes)
            old = aged_layers(model)
            if old:
                aged = about_age(opened.path, model, old, (part.name if several else opened.member))
                if any(map(lacking, recurrent_layers(model))):
                    raise FileError(aged)
                said.append(aged)
            layers = from_model(model)
        recurrent += [_inside(part.name, layer) if several else layer for layer in layers]
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    title = opened.title if several or isinstance(model, containers) else type(model).__name__
    # A list or dict of modules has no forward: its recurrent modules are probed one by one.
    silent = several or type(model) in (nn.ModuleList, nn.ModuleDict)
    return replace(
        opened,
        title=title,
        model=None if silent else model,
        recurrent=tuple(recurrent),
        notes=tuple(notes),
        said=tuple(said),
        aged=aged,
    )


def _built(module: nn.Module | Shell, notes: list[str]) -> nn.Module:
    if isinstance(module, nn.Module):
        return module.eval()
    rebuilder = Rebuilder(fold=lambda part: fold(part, notes))
    model = rebuilder.build(module)
    notes += rebuilder.notes
    return model


def _inside(member: str, layer: RecurrentModule) -> RecurrentModule:
    return replace(layer, name=f"{member}.{layer.name}" if layer.name else member)


def _foreign(path: Path, parts: list[Member], asked: str | None) -> str:
    part, classes = parts[0], parts[0].foreign
    first = classes[0]
    module, _, name = first.rpartition(".")
    stock = module.startswith("torch.")
    where = "pkg.mod" if stock or module == "__main__" else module
    example = f"{where}:{'Net' if stock else name}(...)"
    shown = some(classes)
    member = asked or part.name
    picked = f"--member {shlex.quote(member)} " if member else ""
    command = analyze_command(
        path, picked + (f'--model "{example}"' if "'" in example else f"--model '{example}'")
    )
    holds = "with recurrent layers in it" if part.recurrent else "without stock recurrent layers"
    if part.name:
        count = "" if len(parts) == 1 else f"{len(parts)} members of classes that are not stock: "
        what = f"holds {count}{named_list(parts)}" if part.recurrent else (
            f"holds {part}, a pickle of the class {shown} {holds}"
        )  # fmt: skip
    else:
        what = f"is a pickle of the class {shown} {holds}"
    return (
        f"{path} {what}, and a class's code is not opened from a "
        f"file; type: {command}, or, only if you trust the file's author: "
        f"{analyze_command(path, f'{picked}--trust' if len(parts) == 1 else '--trust')}"
    )


def _not_weights(path: Path, value: object, name: str, trust: bool, member: str | None) -> str:
    held = f"as its member {member!r} {name}" if member else name
    if is_data(value):
        return (
            f"{path} holds {held}, which looks like data, not a model; give it as the batch: "
            f"gradflow analyze MODEL --input {shlex.quote(str(path))}"
        )
    if isinstance(value, Shell) and not trust:
        return (
            f"{path} holds {held}, whose code is not opened from a file; {RESAVE_OR_TRUST} "
            f"{analyze_command(path, '--trust')}"
        )
    return f"{path} holds {held}, no weights; {RESAVE}"
