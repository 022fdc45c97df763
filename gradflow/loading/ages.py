"""Whole models pickled by an older torch: which layers lack what this torch needs, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from gradflow.loading.words import RESAVE, analyze_command, article

_RECURRENT_NEEDS = ("_flat_weights", "_flat_weights_names", "_all_weights")


def lacking(module: nn.Module) -> list[str]:
    """Attributes that this torch's own classes read and that a module does not have.

    >>> rnn = nn.LSTM(3, 5)
    >>> del rnn.batch_first
    >>> lacking(rnn), lacking(nn.LSTM(3, 5))
    (['batch_first'], [])
    """
    stock = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    needed = [name for kind in stock for name in vars(kind).get("__constants__", ())]
    needed += _RECURRENT_NEEDS if isinstance(module, nn.RNNBase) else ()
    return [name for name in dict.fromkeys(needed) if not hasattr(module, name)]


def aged_layers(model: nn.Module) -> dict[str, list[str]]:
    """Every stock layer that cannot run as it is: "LSTM 'rnn'" → what it lacks."""
    found = {}
    for name, module in model.named_modules():
        lacks = lacking(module)
        if lacks:
            found[f"{type(module).__name__} {name!r}" if name else type(module).__name__] = lacks
    return found


def about_age(path: Path, model: nn.Module, aged: dict[str, list[str]], member: str | None) -> str:
    """The sentence for a model whose layers are too old to run, with the next command."""
    layer, lacks = next(iter(aged.items()))
    more = f" (and {len(aged) - 1} more like it)" if len(aged) > 1 else ""
    kind = type(model)
    stock = kind.__module__.startswith("torch.")
    example = "pkg.mod:Net(...)" if stock else f"{kind.__module__}:{kind.__qualname__}(...)"
    options = f"--member {member} " if member else ""
    command = analyze_command(path, f"{options}--model '{example}' --trust")
    said = (
        f"{path} was pickled by an older torch than the {torch.__version__} here: "
        f"{article(layer)} in it{more} lacks {', '.join(lacks)} and cannot run; "
        f"load its weights into a fresh model, with the class's arguments: {command}"
    )
    if member is None:
        said += f", or take the weights alone: {_take_weights(path)}"
    return said


def _take_weights(path: Path) -> str:
    quoted = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
    return (
        'python -c "import torch; from torch import nn; '
        "nn.RNNBase.__setstate__ = nn.Module.__setstate__; "
        f"torch.save(torch.load('{quoted}', map_location='cpu', weights_only=False).state_dict(), "
        "'weights.pt')\", then: gradflow analyze weights.pt"
    )


def is_of_age(error: BaseException) -> bool:
    """Whether opening a pickle failed because a part of torch has changed since it was written."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").startswith("torch.")
    text = str(error)
    return isinstance(error, AttributeError) and (
        isinstance(error.obj, nn.Module) or "on <module 'torch" in text
    )


def about_opening(path: Path, error: BaseException) -> str:
    """The sentence for a pickle that names what this torch no longer has."""
    return (
        f"{path} was pickled by an older torch than the {torch.__version__} here, which opens it "
        f"no more ({type(error).__name__}: {error}); with the torch that wrote it, {RESAVE}"
    )


@contextmanager
def older_layers_open() -> Iterator[None]:
    """Let recurrent layers of an older torch be unpickled as they are, without what they lack."""
    held = nn.RNNBase.__setstate__
    nn.RNNBase.__setstate__ = nn.Module.__setstate__  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.RNNBase.__setstate__ = held  # type: ignore[method-assign]
