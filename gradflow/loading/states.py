"""Find the state_dict in whatever a file held, and bring its keys into plain form.

A key is ``module.path.weight_hh_l0``. Wrappers (`module.`, `_orig_mod.`) are dropped, weight-norm
is folded into the weight it stands for. Pure functions on mappings of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradflow.errors import FileError
from gradflow.loading.shells import Shell
from gradflow.loading.words import article

PREFERRED = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network"),
    *("module", "weights", "params", "parameters"),
)
_NOT_WEIGHTS = re.compile(r"optim|sched|callback|loops|scaler|rng|hyper|config|args", re.I)
_RECURRENT = re.compile(
    r"(^|\.)(parametrizations\.)?weight_hh(_l\d+)?(_reverse)?(_g|_v|_orig|_raw|\.original\d?)?\Z"
)
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Found:
    """The part of a file's contents that matters: tensors by key, or a module."""

    kind: str  # "a state_dict", "a training checkpoint", ...
    tensors: dict[str, Tensor]
    module: nn.Module | Shell | None
    notes: tuple[str, ...]


def is_recurrent(key: str) -> bool:
    """Whether a key names a recurrent weight, also one split by weight-norm.

    >>> is_recurrent("rnn.weight_hh_l0_reverse"), is_recurrent("fc.weight")
    (True, False)
    """
    return _RECURRENT.search(key) is not None


def locate(value: object, kind: str) -> Found:
    """Find the state_dict or module in what a file held; raises ValueError naming what it is."""
    if isinstance(value, nn.Module):
        return Found("a pickle of a whole model", {}, value, ())
    if isinstance(value, Shell) and value.is_module:
        return Found("a pickle of torch modules", {}, value, ())
    if not isinstance(value, Mapping):
        raise ValueError(name_of(value))
    lightning = any(str(key).startswith("pytorch-lightning") for key in value)
    wrapped = "a Lightning checkpoint" if lightning else "a training checkpoint"
    direct = _tensors(value)
    if any(map(is_recurrent, direct)):
        plain = "a safetensors file" if kind == "safetensors" else "a state_dict"
        return Found(plain, direct, None, _left_out(value, direct))
    choices = dict(_candidates(value))
    modules = dict(_modules(value))
    chosen, notes = _choose(choices)
    if modules and not any(map(is_recurrent, chosen)):
        name = min(modules, key=_rank)
        what = "a pickle of a whole model" if isinstance(modules[name], nn.Module) else ""
        note = f"of the checkpoint, {name!r} was read"
        return Found(what or "a pickle of torch modules", {}, modules[name], (note,))
    # A lone counter beside the real weights is no state_dict; the larger part is.
    if direct and not any(map(is_recurrent, chosen)) and _size(direct) >= _size(chosen):
        plain = "a safetensors file" if kind == "safetensors" else "a state_dict"
        return Found(plain, direct, None, _left_out(value, direct))
    if not chosen:
        raise ValueError(name_of(value))
    return Found(wrapped, chosen, None, notes)


def name_of(value: object) -> str:
    """Name an object that is not weights, in words."""
    if isinstance(value, Tensor):
        return f"a single tensor of shape {tuple(value.shape)}"
    if isinstance(value, Shell):
        return f"an object of the class {value.path}"
    if isinstance(value, Mapping):
        keys = ", ".join(str(key)[:40] for key in list(value)[:5])
        return f"a mapping without tensors (keys: {keys})" if keys else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"{article(type(value).__name__)} of {len(value)} items"
    return f"an object of type {type(value).__name__}"


def _tensors(value: Mapping[object, object]) -> dict[str, Tensor]:
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _left_out(value: Mapping[object, object], taken: Mapping[str, Tensor]) -> tuple[str, ...]:
    other = [str(key)[:60] for key in value if key not in taken]
    if not other:
        return ()
    shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
    return (f"entries that are no tensors were left out: {shown}",)


def _candidates(
    value: Mapping[object, object], path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, Mapping) or _NOT_WEIGHTS.search(key):
            continue
        name = f"{path}.{key}" if path else key
        tensors = _tensors(item)
        if tensors:
            yield name, tensors
        if depth < 3:
            yield from _candidates(item, name, depth + 1)


def _modules(value: Mapping[object, object]) -> Iterator[tuple[str, nn.Module | Shell]]:
    for key, item in value.items():
        module = isinstance(item, nn.Module) or (isinstance(item, Shell) and item.is_module)
        if isinstance(key, str) and module and not _is_loss(item):
            assert isinstance(item, nn.Module | Shell)
            yield key, item


def _is_loss(item: object) -> bool:
    path = item.path if isinstance(item, Shell) else type(item).__module__
    return "modules.loss" in path


def _rank(name: str) -> tuple[int, int]:
    last = name.rpartition(".")[2]
    known = PREFERRED.index(last) if last in PREFERRED else len(PREFERRED)
    return known, name.count(".")


def _choose(choices: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    recurrent = {n: c for n, c in choices.items() if any(map(is_recurrent, c))}
    pool = recurrent or dict(choices)
    if not pool:
        return {}, ()
    best = min(pool, key=_rank)
    if len(pool) == 1 or _rank(best)[0] < len(PREFERRED):
        notes = [f"the weights were found under {best!r}"]
        others = [name for name in recurrent if name != best]
        if others:
            notes.append(f"recurrent weights under {', '.join(others[:4])} were not read")
        return pool[best], tuple(notes)
    merged = {f"{name}.{key}": value for name, part in pool.items() for key, value in part.items()}
    return merged, (f"the weights under {', '.join(map(repr, list(pool)[:4]))} were read together",)


def drop_wrappers(keys: list[str]) -> dict[str, str]:
    """Map every key to its name without `_orig_mod.` anywhere and `module.` in front of all.

    >>> drop_wrappers(["module._orig_mod.rnn.weight_hh_l0"])
    {'module._orig_mod.rnn.weight_hh_l0': 'rnn.weight_hh_l0'}
    """
    names = {key: _WRAPPERS.sub("", key) for key in keys}
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
        raw = re.fullmatch(r"(.*?)(module\.)?(weight_hh_l\d+(?:_reverse)?)_raw", key, re.DOTALL)
        if raw is not None:
            inner = f"{raw[1]}module."
            home = inner if any(name.startswith(inner) for name in found) else raw[1]
            found[f"{home}{raw[3]}"] = found.pop(key)
            notes.append(f"{key} was read as {home}{raw[3]} before weight-drop")
    for key in found:
        _refuse_parametrised(key)
    return found


def _norm_names(key: str) -> tuple[str, str, str] | None:
    """The keys of g, of v and of the weight, if this key is a weight-norm's g."""
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
    if not is_recurrent(key):
        return
    what = "spectral norm" if key.endswith("_orig") else "a parametrisation"
    if key.endswith(("_orig", "_g", "_v")) or "parametrizations." in key:
        raise FileError(
            f"{key} belongs to {what}, whose weight cannot be computed exactly from the file "
            "alone; give the class that has it: --model 'pkg.mod:Net(...)'"
        )
