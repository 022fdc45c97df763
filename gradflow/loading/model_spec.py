"""``--model 'pkg.mod:Net(10, 20)'``: build the user's own class and load a file's weights into it.

Arguments are Python literals; nothing in the text is evaluated. What runs is the import of the
named module, its class or function, and its ``load_state_dict``.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from gradflow.errors import FileError, InputError, UserCodeError, must_be, plain_name
from gradflow.loading.state_dicts import fold, is_recurrent, renamed
from gradflow.loading.words import article
from gradflow.process import current_folder_importable, printed_to_stderr, quiet

EXAMPLE = "write it like --model 'pkg.mod:Net(10, 20, hidden=5)'"
LOSS_EXAMPLE = "write it like --loss 'pkg.mod:my_loss' or --loss 'torch.nn:HuberLoss(delta=2.0)'"
EXAMPLES = {"--model": EXAMPLE, "--loss": LOSS_EXAMPLE}


@dataclass(frozen=True)
class Spec:
    """A parsed ``--model``."""

    module: str  # "pkg.mod" or "path/file.py"
    name: str  # "Net" or "Outer.Inner"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    called: bool = False  # whether parentheses were written


def parse_spec(text: str, option: str = "--model") -> Spec:
    """Read ``module:Name(literals)``; raises InputError for anything else.

    >>> parse_spec("pkg.mod:Net(10, hidden=5)").kwargs
    {'hidden': 5}
    """
    head, parenthesis, rest = text.strip().partition("(")
    module, colon, name = head.strip().rpartition(":")
    identifiers = name.strip().split(".")
    if not colon or not module or not all(part.isidentifier() for part in identifiers):
        raise InputError(must_be(option, "MODULE:NAME(ARGUMENTS)", repr(text), EXAMPLES[option]))
    if not parenthesis:
        return Spec(module.strip(), name.strip())
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("it is not one call")
        args = tuple(ast.literal_eval(argument) for argument in call.args)
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("** is not a literal")
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error
        raise InputError(
            f"the arguments in {option} must be Python literals (numbers, strings, True, None, "
            f"lists, dicts), got {('(' + rest)!r} ({reason}); {EXAMPLES[option]}, or name a function "
            f"of your own: {option} 'pkg.mod:name'"
        ) from error
    return Spec(module.strip(), name.strip(), args, kwargs, called=True)


@contextmanager
def _user_code(doing: str) -> Iterator[None]:
    """Quote whatever the user's code raises; keep what it prints off standard output."""
    try:
        with printed_to_stderr():
            yield
    except SystemExit as error:
        raise UserCodeError(
            f"{doing} ended the program (SystemExit: {error.code}); keep script code under "
            "if __name__ == '__main__':"
        ) from error
    except Exception as error:  # the user's code may raise anything; it is quoted
        raise UserCodeError(f"{doing} raised {type(error).__name__}: {error}") from error


def build(text: str) -> nn.Module:
    """Import and construct what ``--model`` names.

    Raises InputError for a wrong name, UserCodeError when the user's code raises.
    """
    spec = parse_spec(text)
    with _imported(spec, "--model") as target:
        if isinstance(target, nn.Module):
            if spec.called:
                raise InputError(
                    f"{spec.name} of {spec.module} is a model already, not a class; "
                    f"leave out the parentheses: --model '{spec.module}:{spec.name}'"
                )
            return copy.deepcopy(target)
        if not callable(target):
            raise InputError(
                must_be(f"{spec.name} of {spec.module}", "a class or function", target, EXAMPLE)
            )
        with _user_code(f"building {text}"):
            model = target(*spec.args, **spec.kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{text} must build a torch.nn.Module, got {article(type(model).__name__)}; "
            "name the class, or a function that returns the model"
        )
    return model


def source_of(text: str, option: str = "--model") -> Path | None:
    """The file of the module that a specification names; None where it has none, or is not found.

    Args:
        text: as typed after the option.
        option: "--model" or "--loss".

    >>> source_of("gradflow.demo:AddingModel('LSTM')").name
    'demo.py'
    """
    spec = parse_spec(text, option)
    if spec.module.endswith(".py"):
        return Path(spec.module)
    with current_folder_importable():
        try:
            found = importlib.util.find_spec(spec.module)
        except (ImportError, ValueError, AttributeError):
            return None
    return None if found is None or found.origin is None else Path(found.origin)


def build_loss(text: str) -> Callable[..., Tensor]:
    """Import the loss that ``--loss`` names: a function of (output, target), or a class of it.

    A class is constructed, with the arguments written in parentheses or with none. Raises
    InputError for a wrong name, UserCodeError when the user's code raises.

    >>> build_loss("torch.nn:HuberLoss(delta=2.0)").delta
    2.0
    """
    spec = parse_spec(text, "--loss")
    with _imported(spec, "--loss") as target:
        if isinstance(target, type) or spec.called:
            if not callable(target):
                raise InputError(
                    f"{spec.name} of {spec.module} cannot be called; leave out the parentheses"
                )
            with _user_code(f"building {text}"):
                target = target(*spec.args, **spec.kwargs)
    if not callable(target):
        kind = article(type(target).__name__)
        raise InputError(
            must_be(text, "a function that takes (output, target)", kind, LOSS_EXAMPLE)
        )
    return target


@contextmanager
def _imported(spec: Spec, option: str) -> Iterator[object]:
    """What a specification names, while the current folder is importable."""
    is_file = spec.module.endswith(".py")
    folders = (str(Path(spec.module).resolve().parent),) if is_file else ()
    with current_folder_importable(*folders):
        read = _import_file if is_file else _import_module
        yield _look_up(read(spec.module, option), spec, option)


def _import_module(name: str, option: str) -> ModuleType:
    try:
        known = name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        known = "." in name  # a parent package fails: let the import below say why
    if not known:
        raise InputError(
            f"there is no module {name!r} in the current folder or among the installed packages; "
            f"start gradflow where it can be imported, or give its file: {option} '{name}.py:…'"
        )
    with _user_code(f"importing {name}"):
        return importlib.import_module(name)


def _import_file(name: str, option: str) -> ModuleType:
    path, example = Path(name), EXAMPLES[option]
    if not path.is_file():
        raise InputError(f"there is no file {path} for {option}; check the path, and {example}")
    # An installed module of the same name is left alone.
    known = path.stem if path.stem not in sys.modules else f"{path.stem}_from_file"
    spec = importlib.util.spec_from_file_location(known, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as Python; {example}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up by name
    try:
        with _user_code(f"importing {path}"):
            spec.loader.exec_module(module)
    except UserCodeError:
        del sys.modules[known]
        raise
    return module


def _look_up(module: ModuleType, spec: Spec, option: str) -> object:
    target: object = module
    for part in spec.name.split("."):
        if not hasattr(target, part):
            own = [
                (name, value)
                for name, value in vars(module).items()
                if getattr(value, "__module__", "") == module.__name__
            ]
            names = [n for n, v in own if isinstance(v, type) and issubclass(v, nn.Module)]
            if option == "--loss":
                names = [name for name, value in own if callable(value)]
            what = "nn.Module" if option == "--model" else "function"
            known = f"it defines {', '.join(names[:5])}" if names else f"it defines no {what}"
            raise InputError(f"{spec.module} has no {spec.name}; {known}; {EXAMPLES[option]}")
        target = getattr(target, part)
    return target


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], text: str) -> tuple[str, ...]:
    """Load a file's tensors into the model, strictly, dropping a prefix where that makes them fit.

    Returns notes on what was dropped. Raises FileError listing keys that are missing, unexpected
    or of another shape; UserCodeError when the model's own loading raises.
    """
    with _user_code(f"asking {text} for its state_dict"):
        state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    own_name = {plain_name(key): key for key in state}  # as names of a file are read
    wanted = {plain_name(key): value for key, value in state.items()}
    fitting: tuple[str, dict[str, Tensor]] | None = None
    closest: tuple[int, dict[str, Tensor]] | None = None
    for note, variant in _variants(tensors):
        wrong = len(set(wanted) ^ set(variant))
        if wrong == 0:
            fitting = (note, variant)
            break
        if closest is None or wrong < closest[0]:
            closest = (wrong, variant)
    if fitting is None:
        raise FileError(_mismatch(text, wanted, closest[1] if closest else {}))
    note, chosen = fitting
    if any(_shape(wanted[key]) not in (None, tuple(chosen[key].shape)) for key in wanted):
        raise FileError(_mismatch(text, wanted, chosen))
    notes = [note] if note else []
    dtypes = {value.dtype for value in chosen.values() if value.is_floating_point()}
    own = {value.dtype for value in wanted.values() if value.is_floating_point()}
    if len(dtypes) == 1 and own != dtypes:
        dtype = dtypes.pop()
        model.to(dtype)
        notes.append(f"the model runs in the file's {str(dtype).removeprefix('torch.')}")
    with _user_code(f"loading the weights into {text}"), quiet():
        model.load_state_dict({own_name[k]: v for k, v in chosen.items()}, strict=True)
    return tuple(notes)


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    lazy = isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    return None if lazy else tuple(tensor.shape)


def _variants(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same weights under fewer and fewer prefixes, nearest to the file first."""
    yield "", dict(tensors)
    plain = renamed(tensors)
    yield "", plain
    heads = dict.fromkeys(key.partition(".")[0] for key in plain if "." in key)
    for _ in range(3):  # "model.net." and the like
        parts: dict[str, dict[str, Tensor]] = {head: {} for head in heads}
        for key, value in plain.items():
            head, dot, inner = key.partition(".")
            if dot:
                parts[head][inner] = value
        recurrent = sum(map(is_recurrent, plain))
        for head, part in parts.items():
            left = len(plain) - len(part)
            if recurrent > sum(is_recurrent(f"{head}.{key}") for key in part) or left > len(part):
                continue  # only a loss or metric may be left out, never a part of the model
            others = f", {left} other tensors (a loss or metric) were left out" if left else ""
            yield f"the prefix {head!r} was dropped{others}", renamed(part)
        if len(heads) != 1 or not plain:
            break
        (head,) = heads
        plain = {key.removeprefix(f"{head}."): value for key, value in plain.items()}
        heads = dict.fromkeys(key.partition(".")[0] for key in plain if "." in key)
    try:
        yield "weight-norm was folded into the weights", fold(renamed(tensors))
    except FileError:
        return  # a parametrisation that only its class can undo, and the class did not fit


def _mismatch(text: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    shapes = [
        f"{key} {tuple(given[key].shape)} in the file, {_shape(wanted[key])} in the model"
        for key in wanted
        if key in given and _shape(wanted[key]) not in (None, tuple(given[key].shape))
    ]
    parts = [
        f"{label}: {_few(keys)}"
        for label, keys in (
            ("missing from the file", missing),
            ("not in the model", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    return (
        f"the weights do not fit {text}: {'; '.join(parts)}; give the arguments the model was "
        "trained with"
    )


def _few(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
