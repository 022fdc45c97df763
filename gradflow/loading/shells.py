"""Pickled torch.nn modules without their code: inert shells, then fresh modules built from them.

`gradflow.loading.pickled` puts an inert `Shell` in the place of every class that the file names. A
shell stores what the file put into the object and has no behaviour, so neither a ``forward`` in
``__dict__`` nor a hook nor a ``__setstate__`` can run. Stock modules are then built anew from plain
attributes and tensors. A file that names Python's own functions (``os.system``, ``eval``) is refused.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.cells import CELLS, kinds
from gradflow.errors import FileError
from gradflow.limits import SHELL_DEPTH, SHELL_MODULES, WINDOW
from gradflow.loading.file_kinds import READ_ERRORS
from gradflow.process import quiet

# Plain data that settings carry; everything else of Python's own library stays refused.
_PLAIN_DATA = {
    "argparse.Namespace", "collections.defaultdict", "collections.deque", "datetime.date",
    "datetime.datetime", "datetime.timedelta", "decimal.Decimal", "fractions.Fraction",
    "functools.partial", "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath",
    "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "types.SimpleNamespace", "uuid.UUID",
    *(f"builtins.{kind.__name__}" for kind in (bool, bytearray, bytes, complex, dict, float)),
    *(f"builtins.{kind.__name__}" for kind in (frozenset, int, list, object, range, set)),
    *(f"builtins.{kind.__name__}" for kind in (slice, str, tuple)),
}  # fmt: skip
_TORCH_OWN = {"collections.OrderedDict", "collections.Counter", "_codecs.encode"}
MAPPINGS = ("dict", "cfgnode", "munch", "box", "dotmap")  # ends of names of dict subclasses


class Shell:
    """What a pickle held under a class's name: its arguments and state, and no behaviour."""

    path = ""  # "torch.nn.modules.rnn.LSTM"

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None

    @property
    def attributes(self) -> dict[str, Any]:
        """What the file put into the object's ``__dict__``."""
        state = self.state if isinstance(self.state, dict) else {}
        return {key: value for key, value in state.items() if isinstance(key, str)}

    def group(self, name: str) -> dict[Any, Any]:
        """One of the object's dicts, such as ``_modules``; empty where the file has no such dict."""
        found = self.attributes.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def is_module(self) -> bool:
        """Whether it was an nn.Module, by what every module carries."""
        return all(isinstance(self.attributes.get(k), dict) for k in ("_modules", "_parameters"))


def is_forbidden(name: str) -> bool:
    """Whether a pickled name is Python's own code (``os.system``, ``eval``) and not plain data."""
    if name in _PLAIN_DATA or name in _TORCH_OWN:
        return False
    root = name.partition(".")[0]
    return root in sys.stdlib_module_names and root != "__main__"


@functools.lru_cache(maxsize=4096)
def stand_in(name: str) -> Callable[..., Any]:
    """What stands for a class that a pickle names: an empty container, or a class of shells."""
    last = name.rpartition(".")[2].lower()
    if last.endswith(MAPPINGS) and name not in _STOCK:
        return OrderedDict
    return type("Shell", (Shell,), {"path": name})


def _walk(shell: Shell) -> Iterator[tuple[str, Shell]]:
    """Every module of a pickled module with its prefix; bounded, for a file may claim anything."""
    waiting = [("", shell)]
    for _ in range(SHELL_MODULES):
        if not waiting:
            return
        prefix, current = waiting.pop()
        yield prefix, current
        children = [
            (f"{prefix}{name}.", child)
            for name, child in current.group("_modules").items()
            if isinstance(child, Shell)
        ]
        waiting += reversed(children)
        if prefix.count(".") > SHELL_DEPTH:
            break
    raise FileError(
        f"this file nests more than {SHELL_DEPTH} modules in one another or holds more than "
        f"{SHELL_MODULES}; where the model is, run "
        "torch.save(model.state_dict(), 'weights.pt')"
    )


def tensors_of(shell: Shell) -> dict[str, Tensor]:
    """The state_dict of a pickled module, read from its shell."""
    found: dict[str, Tensor] = {}
    for prefix, module in _walk(shell):
        skipped = module.attributes.get("_non_persistent_buffers_set")
        for group in ("_parameters", "_buffers"):
            for name, value in module.group(group).items():
                hidden = isinstance(skipped, set) and name in skipped
                if isinstance(value, Tensor) and not hidden:
                    found[f"{prefix}{name}"] = value
    return found


def foreign_classes(shell: Shell) -> list[str]:
    """Classes in a pickled module that are not stock modules gradflow can build anew."""
    return list(dict.fromkeys(m.path for _, m in _walk(shell) if m.path not in _STOCK))


@dataclass
class Rebuilder:
    """Builds fresh stock modules from shells; ``notes`` says what the file held and was dropped."""

    fold: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # undoes weight_norm
    notes: list[str] = field(default_factory=list)
    _known: dict[int, nn.Module | None] = field(default_factory=dict)

    def build(self, shell: Shell, name: str = "") -> nn.Module:
        """Build a module of the same stock class with the same attributes and tensors."""
        if id(shell) in self._known:
            known = self._known[id(shell)]
            if known is None:
                raise FileError(f"the module {name or 'at the top'} of this file contains itself")
            return known  # one module used in two places stays one module
        self._known[id(shell)] = None
        self._note_dropped(shell, name)
        kind = _STOCK[shell.path]
        if kind in _CONTAINERS:
            module: nn.Module = kind()
            for key, child in shell.group("_modules").items():
                if not isinstance(key, str) or not getattr(child, "is_module", False):
                    raise FileError(f"the container {name or kind.__name__} holds no modules")
                if not key or "." in key or hasattr(module, key):
                    raise FileError(f"{key!r} in this file is no name for a module; save it again")
                module.add_module(key, self.build(child, f"{name}.{key}" if name else key))
        else:
            module = self._build_leaf(kind, shell, name or kind.__name__)
        self._known[id(shell)] = module
        return module.eval()

    def _build_leaf(self, kind: type[nn.Module], shell: Shell, name: str) -> nn.Module:
        own = {k: v for k, v in tensors_of(shell).items() if "." not in k}
        tensors = {key: value.detach().clone() for key, value in self.fold(own).items()}
        _check_layers(shell, tensors, name)
        try:
            # On the meta device a huge size in the file costs nothing; real tensors follow.
            with torch.device("meta"), quiet():  # torch warns of sizes that are 0
                module = kind(**_arguments(kind, shell))
            module.load_state_dict(tensors, strict=True, assign=True)
        except READ_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise FileError(
                f"the {kind.__name__} {name!r} in this file does not fit its own weights "
                f"({reason}); save it again, or give --model 'pkg.mod:Net(...)'"
            ) from error
        return module

    def _note_dropped(self, shell: Shell, name: str) -> None:
        place = name or "the module"
        attributes = shell.attributes
        dropped = [key for key in ("forward", "__call__", "_call_impl") if key in attributes]
        hooks = [key for key in attributes if key.endswith("_hooks") and shell.group(key)]
        if dropped:
            self.notes.append(f"{place} carried its own {dropped[0]} in the file: dropped")
        if hooks:
            self.notes.append(f"{place} carried hooks in the file ({', '.join(hooks)}): dropped")


def _check_layers(shell: Shell, tensors: Mapping[str, Tensor], name: str) -> None:
    layers = shell.attributes.get("num_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= max(1, len(tensors)):
        raise FileError(
            f"{name} in this file claims {layers!r} layers with {len(tensors)} tensors; "
            "save it again"
        )


def _arguments(kind: type[nn.Module], shell: Shell) -> dict[str, object]:
    attributes = shell.attributes
    parameters = shell.group("_parameters")
    arguments: dict[str, object] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in ("self", "args", "kwargs", "device", "dtype") or name.startswith("_"):
            continue
        if name in parameters:
            arguments[name] = parameters[name] is not None
        elif name in attributes and _is_plain(attributes[name]):
            arguments[name] = attributes[name]
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            raise ValueError(f"it does not say its {name}")
    # by these, which no weight bears out, a layer puts out more than it is given
    windows = ("padding", "output_padding", "output_size", "stride", "dilation", "kernel_size",
               "size")  # fmt: skip
    for name in windows:
        sizes = arguments.get(name)
        for size in sizes if isinstance(sizes, tuple | list) else (sizes,):
            if isinstance(size, int) and abs(size) > WINDOW:
                raise ValueError(f"its {name} is {size}, and no layer has more than {WINDOW}")
    return _recurrent_arguments(kind, attributes) if issubclass(kind, nn.RNNBase) else arguments


def _recurrent_arguments(kind: type[nn.Module], attributes: Mapping[str, Any]) -> dict[str, object]:
    # Torch's recurrent layers take *args, so their signature does not name their arguments.
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    arguments = {n: attributes[n] for n in (*names, "bidirectional") if n in attributes}
    first, *_ = (spec for spec in CELLS.values() if spec.layer is kind)
    if "weight_hr" in first.weights:
        arguments["proj_size"] = attributes.get("proj_size", 0)
    spec = CELLS.get(str(attributes.get("mode")))
    for option, value in first.options.items():
        known = None if spec is None else spec.options.get(option)
        arguments[option] = known or attributes.get(option, value)
    if not all(_is_plain(value) for value in arguments.values()):
        raise ValueError("its sizes are not plain numbers")
    return arguments


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return len(value) < 100 and all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


_CONTAINERS: tuple[type[nn.Module], ...] = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# fmt: off
_STOCK: dict[str, type[nn.Module]] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (
    *(torchs for spec in kinds().values() for torchs in (spec.layer, spec.cell) if torchs is not None),
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Linear, nn.Bilinear, nn.Embedding,
    nn.EmbeddingBag,
    nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.LocalResponseNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU,
    nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus,
    nn.Softsign, nn.Threshold, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)}
# fmt: on
