"""What the operations of the user's graph keep for their backward, as far as reading it runs no hook.

Under a checkpoint, or other hooks on saved tensors, unpacking one runs the code of those hooks: such
tensors are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_RAW_NAMES: dict[type, tuple[str, ...]] = {}  # see `raw_names`


def raw_names(node: Any) -> tuple[str, ...]:
    """The attributes in which a node keeps what its derivative needs."""
    kind = type(node)
    if kind not in _RAW_NAMES:
        _RAW_NAMES[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved"))
    return _RAW_NAMES[kind]


def is_hooked(node: Any) -> bool:
    """Whether reading what a node keeps would run the code of a hook."""
    for name in raw_names(node):
        try:
            kept = getattr(node, name)
        except RuntimeError:  # freed
            continue
        if any(map(_has_hook, kept if isinstance(kept, list | tuple) else (kept,))):
            return True
    return False


def _has_hook(one: Any) -> bool:
    try:
        return one.unpack_hook is not None
    except RuntimeError:  # freed, or nothing was saved
        return False


def runs_code(node: Any) -> bool:
    """Whether calling a node would: also what it keeps anew meets the hooks that are set now."""
    return is_hooked(node) or (bool(raw_names(node)) and saved_tensors_are_hooked())


def saved_tensors_are_hooked() -> bool:
    """Whether packing or unpacking a saved tensor now would run the code of a hook."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def saved_by(node: Any) -> list[Tensor]:
    """The tensors that a node keeps, none where reading them would run code.

    A torch.autograd.Function of the user's own keeps what it likes, under another name: nothing is
    read of it.
    """
    if is_hooked(node):
        return []
    found: list[Tensor] = []
    for name in raw_names(node):
        try:
            value = getattr(node, name.removeprefix("_raw"), None)
        except RuntimeError:  # freed, or changed in place since
            continue
        values = value if isinstance(value, list | tuple) else (value,)
        found += [one for one in values if isinstance(one, Tensor)]
    return found
