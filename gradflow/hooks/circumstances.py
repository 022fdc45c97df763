"""Circumstances: what around a recording shapes its numbers, in sentences for the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from gradflow.distributed import world
from gradflow.hooks import mistakes
from gradflow.hooks.ancestry import clean
from gradflow.hooks.guard import TRANSFORMED, WRAPPED
from gradflow.hooks.patch import something_is_compiled


def perhaps_scaled(scale: float) -> str:
    """What to know where a GradScaler was in use that `record` was not told of."""
    return (
        "the gradients are perhaps scaled: a GradScaler multiplied a loss inside the block (by "
        f"{scale:g} when it ended) and record() was not given it; pass scaler=scaler to have its scale "
        "divided out"
    )


def per_rank(model: nn.Module, gathered: int) -> list[str]:
    """What to know where several processes train one model, and so many of them are taken together."""
    rank, size = world()
    if gathered > 1:
        return [
            f"gradients are those of the mean of the losses of all {gathered} ranks, and sequences those "
            "of all of them, in the order of their ranks"
        ]
    wrapped = any(
        isinstance(m, nn.parallel.DistributedDataParallel) for m in nn.Module.modules(model)
    )
    if size == 1 and not wrapped:
        return []
    return [
        f"per-rank gradients: these are of rank {rank} of {size} on its own part of the batch, before "
        "they are averaged over the ranks"
    ]


def without_dropout(model: nn.Module) -> list[str]:
    """What to know where dropout, which training has, was off."""
    rates = [getattr(m, name, 0) for m in nn.Module.modules(model) for name in ("p", "dropout")]
    # the same names mean other things in other modules: only a share is a rate
    if model.training or not any(isinstance(rate, float) and 0 < rate < 1 for rate in rates):
        return []
    return [
        "the model ran in evaluation mode, so its dropout was off: gradients in training differ; call "
        "model.train(), or give --train, to measure those"
    ]


def unseen_cells(model: nn.Module, seen: Collection[str]) -> tuple[list[str], list[str]]:
    """The cells, in words, that were not seen where torch.compile was used: in a compiled part, others.

    seen are the paths of the modules that were. The others were not called, or ran in the graph of a
    compiled function that nothing on the model tells of.
    """
    inside: list[str] = []
    others: list[str] = []
    if not something_is_compiled():
        return inside, others
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNCellBase) or clean(name) in seen:
            continue
        within = any(not part or name == part or name.startswith(f"{part}.") for part in compiled)
        (inside if within else others).append(f"{clean(name) or 'cell'} ({type(module).__name__})")
    return inside, others


def left_out(unseen: Mapping[str, str]) -> list[str]:
    """What to know where some calls of the model, beside those that were, could not be read."""
    said = {words: [n for n in unseen if unseen[n] == words] for words in (TRANSFORMED, WRAPPED)}
    return [
        f"some calls are left out: {mistakes.listed(names)} {words}"
        for words, names in said.items()
        if names
    ]


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def not_seen(cells: list[str]) -> str:
    """What to know about cells that ran, if at all, inside a compiled graph."""
    return (
        f"cell loops inside a compiled graph are not seen: {mistakes.listed(cells)} is in a part compiled "
        "with torch.compile; record the uncompiled model"
    )


def perhaps_not_seen(cells: list[str]) -> str:
    """What to know about cells of which no call was seen."""
    return (
        f"{mistakes.listed(cells)} was not called, or ran inside a graph of torch.compile, where nothing "
        "is seen"
    )


def beside_attention(model: nn.Module, recurrent: Collection[str]) -> list[str]:
    """What to know where layers of attention carry gradient between steps beside these recurrences.

    recurrent are the paths of the modules that run them; what is around one is no layer of attention.
    """
    if not recurrent:
        return []
    paths = {
        clean(name): module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
    }
    whole = {path for path in paths for part in (*recurrent, *paths) if _is_below(part, path)}
    found = [
        f"{path} ({type(module).__name__})"
        for path, module in paths.items()
        if path not in recurrent and path not in whole
    ]
    if not found:
        return []
    count = f"{len(found)} layers" if len(found) > 1 else "1 layer"
    carries, is_ = ("carry", "are") if len(found) > 1 else ("carries", "is")
    return [
        f"gradient also flows from step to step through attention: {count} of it, "
        f"{mistakes.listed(found)}, {carries} gradient past these recurrences and {is_} not in the picture"
    ]


def _is_below(path: str, other: str) -> bool:
    """Whether a module is part of another one."""
    return path != other and (not other or path.startswith(f"{other}."))
