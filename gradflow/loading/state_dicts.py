"""State_dicts: which keys are recurrent weights, and keys brought into plain form.

A key is ``module.path.weight_hh_l0``. Wrappers (`module.`, `_orig_mod.`) are dropped, weight-norm
is folded into the weight it stands for. Pure functions on mappings of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import FileError

NOT_WEIGHTS = re.compile(r"optim|sched|callback|loops|scaler|rng|hyper|config|args", re.I)
_RECURRENT = re.compile(
    r"(^|\.)(parametrizations\.)?weight_hh(_l\d+)?(_reverse)?(_g|_v|_orig|_raw|\.original\d?)?\Z"
)
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def is_recurrent(key: str) -> bool:
    """Whether a key names a recurrent weight, also one split by weight-norm.

    >>> is_recurrent("rnn.weight_hh_l0_reverse"), is_recurrent("fc.weight")
    (True, False)
    """
    return "weight_hh" in key and _RECURRENT.search(key) is not None


def tensors_in(value: Mapping[Any, object]) -> dict[str, Tensor]:
    """The tensors that stand in a mapping under a text as key.

    >>> list(tensors_in({"a": torch.ones(1), "epoch": 3, 0: torch.ones(1)}))
    ['a']
    """
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; () of a nested one, which has none."""
    return {key: () if t.is_nested else tuple(t.shape) for key, t in tensors.items()}


def drop_wrappers(keys: list[str]) -> dict[str, str]:
    """Map every key to its name without `_orig_mod.` anywhere and `module.` in front of all.

    >>> drop_wrappers(["module._orig_mod.rnn.weight_hh_l0"])
    {'module._orig_mod.rnn.weight_hh_l0': 'rnn.weight_hh_l0'}
    """
    names = {key: _WRAPPERS.sub("", key) if "_mod" in key else key for key in keys}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    return names if len(set(names.values())) == len(names) else {key: key for key in keys}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under keys without wrappers."""
    names = drop_wrappers(list(tensors))
    return {names[key]: value for key, value in tensors.items()}


def fold(tensors: Mapping[str, Tensor], notes: list[str] | None = None) -> dict[str, Tensor]:
    """Compute the weights that weight-norm stands for, w = g v / ‖v‖, and drop g and v.

    Knows ``weight_hh_l0_g`` and ``_v`` and ``parametrizations.weight_hh_l0.original0`` and
    ``original1``; the axis of the norm is read off the shape of g. Raises FileError where the
    weight cannot be computed from the file (spectral norm, orthogonal maps).

    >>> fold({"weight_hh_g": torch.ones(1, 1), "weight_hh_v": torch.tensor([[3.0]])})
    {'weight_hh': tensor([[1.]])}
    """
    found = dict(tensors)
    notes = [] if notes is None else notes
    for key in list(tensors):
        names = _norm_names(key)
        if names is not None and names[0] in found and names[1] in found:
            g, v = found.pop(names[0]), found.pop(names[1])
            found[names[2]], axis = _weight_norm(names[2], g, v)
            notes.append(f"{names[2]} is weight-normed, its norm read as over {axis}")
        raw = key.endswith("_raw") and re.fullmatch(
            r"(.*?)(module\.)?(weight_hh_l\d+(?:_reverse)?)_raw", key, re.DOTALL
        )
        if raw:
            inner = f"{raw[1]}module."
            home = inner if any(name.startswith(inner) for name in found) else raw[1]
            found[f"{home}{raw[3]}"] = found.pop(key)
            notes.append(f"{key} was read as {home}{raw[3]} before weight-drop")
    for key in found:
        _refuse_parametrised(key)
    return found


def _norm_names(key: str) -> tuple[str, str, str] | None:
    """The keys of g, of v and of the weight, if this key is a weight-norm's g."""
    if not key.endswith(("_g", ".original0")):  # most keys of most files
        return None
    old = re.fullmatch(
        r"((?:.*\.)?(?:weight|bias)_(?:ih|hh|hr)(?:_l\d+)?(?:_reverse)?)_g", key, re.DOTALL
    )
    if old is not None:
        return key, f"{old[1]}_v", old[1]
    new = re.fullmatch(
        r"(.*?)parametrizations\.((?:weight|bias)_(?:ih|hh|hr)(?:_l\d+)?(?:_reverse)?)\.original0",
        key,
        re.DOTALL,
    )
    if new is not None:
        return key, key.removesuffix("0") + "1", new[1] + new[2]
    return None


def _weight_norm(key: str, g: Tensor, v: Tensor) -> tuple[Tensor, str]:
    if g.numel() == 1 and g.ndim == 0:
        return g * v / v.norm(), "the whole weight"
    for axis in range(v.ndim):
        over = [other for other in range(v.ndim) if other != axis]
        expected = [n if i == axis else 1 for i, n in enumerate(v.shape)]
        if list(g.shape) == expected:
            # torch's own kernel, so that the weight is the one the model used, bit for bit
            return torch._weight_norm(v, g, axis), f"dim={axis}" if over else "dim=0"
    raise FileError(
        f"{key} is stored in two parts of shapes {tuple(g.shape)} and {tuple(v.shape)}, which is "
        "not weight-norm; give the class that has the parametrisation: --model 'pkg.mod:Net(...)'"
    )


def _refuse_parametrised(key: str) -> None:
    parts = key.endswith(("_orig", "_g", "_v")) or "parametrizations." in key
    if parts and is_recurrent(key):
        what = "spectral norm" if key.endswith("_orig") else "a parametrisation"
        raise FileError(
            f"{key} belongs to {what}, whose weight cannot be computed exactly from the file "
            "alone; give the class that has it: --model 'pkg.mod:Net(...)'"
        )
