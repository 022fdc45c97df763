"""Recurrent modules from their weights: what kind, which sizes, and a fresh module to run.

Letters: G gates (1 for a cell without any), H hidden units, I inputs, P width of h (H, or proj_size).
``weight_ih_l0`` is (G·H, I), ``weight_hh_l0`` (G·H, P), ``weight_hr_l0`` (P, H).
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradflow.cells import CELLS, kinds
from gradflow.errors import FileError, printable
from gradflow.loading.words import article

_WEIGHT = re.compile(
    r"(?P<part>weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)"
    r"(?:_l(?P<layer>\d+)(?P<reverse>_reverse)?)?"
)
_KIND_OF_BLOCKS = {
    spec.blocks: kind for kind, spec in sorted(kinds().items(), key=lambda k: -k[1].blocks)
}
_EMBEDS = re.compile(r"emb|wte|lookup|token|vocab|word|char", re.I)
_NOT_EMBEDS = re.compile(r"fc|linear|head|out|proj|dec|class|norm|attn|conv|key|query|value", re.I)
GIVE_MODEL = "give the class that uses it: --model 'pkg.mod:Net(...)'"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a recurrent module."""

    kind: str  # what people call its cell
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0  # width of h after a projection, 0 without one
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every weight's name and shape."""
        gates = kinds()[self.kind].blocks * self.hidden_size
        width = self.proj_size or self.hidden_size
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.layers):
            inputs = self.input_size if layer == 0 else width * len(directions)
            for direction in directions:
                end = f"_l{layer}{direction}"
                yield f"weight_ih{end}", (gates, inputs)
                yield f"weight_hh{end}", (gates, width)
                if self.bias:
                    yield f"bias_ih{end}", (gates,)
                    yield f"bias_hh{end}", (gates,)
                if self.proj_size:
                    yield f"weight_hr{end}", (width, self.hidden_size)


@dataclass(frozen=True, kw_only=True)
class RecurrentModule(Shape):
    """One recurrent module of a file, ready to run alone."""

    name: str  # module path as in the file, "" for a bare module
    weights: Mapping[str, Tensor] = field(repr=False)  # as in the file, weight_hh_l0 among them
    options: Mapping[str, object] = field(default_factory=dict)  # what else its class is made with
    from_cell: bool = False  # a cell of one step, run as a one-layer module
    embedding: Tensor | None = field(default=None, repr=False)  # (V, I)
    embedding_name: str = ""
    doubts: tuple[str, ...] = ()  # sentences: what the weights do not say and numbers rest on
    ambiguous: tuple[str, ...] = ()  # sentences: what else the weights do not say

    @functools.cached_property
    def module(self) -> nn.RNNBase:
        """A fresh module in eval mode with the weights; made when first asked for."""
        return _instantiate(self)

    @property
    def path_parts(self) -> tuple[str, ...]:
        r"""The parts of ``name`` that nested modules can be added under; () for a bare module.

        They are printable, non-empty, without dots and no attribute of a module. An empty part
        becomes ``_``, one that a module already has gets an underscore.

        >>> (found,) = from_tensors({f"a..b.{k}": v for k, v in nn.GRU(3, 5).state_dict().items()})
        >>> found.name, found.path_parts
        ('a..b', ('a', '_', 'b'))
        """
        taken = nn.Module()
        parts = [printable(part) for part in self.name.split(".")] if self.name else []
        return tuple(f"{part}_" if not part or hasattr(taken, part) else part for part in parts)

    @property
    def broken(self) -> tuple[str, ...]:
        """A sentence for each weight, and embedding, that holds NaN or infinite numbers."""
        if _all_finite(
            [*self.weights.values(), *([] if self.embedding is None else [self.embedding])]
        ):
            return ()
        suffix = "_l0" if self.from_cell else ""
        owner = f" of {printable(self.name)}" if self.name else ""
        said = [
            non_finite(name.removesuffix(suffix) + owner, weight)
            for name, weight in self.weights.items()
        ]
        if self.embedding is not None:
            said.append(non_finite(printable(self.embedding_name), self.embedding))
        return tuple(sentence for sentence in said if sentence)

    @property
    def width(self) -> int:
        """P·D, the width of the module's output: both directions side by side."""
        return (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        dtype = self.weights["weight_hh_l0"].dtype
        return torch.float32 if dtype.itemsize == 1 else dtype  # torch has no float8 kernels here

    @property
    def parameters(self) -> int:
        """How many numbers its weights hold."""
        return sum(weight.numel() for weight in self.weights.values())

    def __str__(self) -> str:
        facts = [f"{self.input_size} → {self.hidden_size}"]
        facts += [f"{self.layers} layers"] if self.layers > 1 else []
        facts += ["bidirectional"] if self.bidirectional else []
        facts += [f"projected to {self.proj_size}"] if self.proj_size else []
        facts += [] if self.bias else ["no bias"]
        cell = "Cell" if self.from_cell else ""
        return f"{self.kind}{cell}({', '.join(facts)})"


def _all_finite(weights: list[Tensor]) -> bool:
    """Whether they surely hold only finite numbers; of their kinds that torch adds up at once."""
    if len({weight.dtype for weight in weights}) > 1 or weights[0].dtype.itemsize == 1:
        return False
    largest = torch._foreach_norm([weight.detach() for weight in weights], math.inf)
    return bool(torch.isfinite(torch.stack(largest)).all())


def non_finite(label: str, weight: Tensor) -> str:
    """Say how many NaN and infinite numbers a weight holds, and where the first is; "" if none.

    >>> non_finite("weight_hh_l0", torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]]))
    'weight_hh_l0 holds 1 NaN and 1 infinite number (first at row 1, column 2, counted from 1)'
    """
    values = weight.detach()
    if values.dtype.itemsize == 1:
        values = values.float()  # torch cannot ask this of every float8
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return ""
    nans = int(torch.isnan(values).sum())
    others = int(bad.sum()) - nans
    counts = [f"{nans:,} NaN"] if nans else []
    counts += [f"{others:,} infinite number{'s' if others > 1 else ''}"] if others else []
    place = [index + 1 for index in bad.nonzero()[0].tolist()]
    where = f"row {place[0]}, column {place[1]}" if len(place) == 2 else f"entry {place[0]}"
    return f"{label} holds {' and '.join(counts)} (first at {where}, counted from 1)"


def from_tensors(tensors: Mapping[str, Tensor]) -> tuple[RecurrentModule, ...]:
    """Find every recurrent module in a plain state_dict and build it.

    Raises FileError where shapes contradict one another or are not dense floating point.

    >>> [str(found) for found in from_tensors(nn.GRU(3, 5).state_dict())]
    ['GRU(3 → 5)']
    """
    groups: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, last = key.rpartition(".")
        match = _weight(last)
        if match is not None:
            groups.setdefault((owner, match["layer"] is None), {})[last] = tensor
    embeddings = _Embeddings(tensors)
    return tuple(
        _build(path, from_cell, weights, embeddings)
        for (path, from_cell), weights in groups.items()
        if any(name.startswith("weight_hh") for name in weights)
    )


@functools.lru_cache(maxsize=4096)
def _weight(last: str) -> re.Match[str] | None:
    """What the last part of a key says, if it names a recurrent weight; there are few such names."""
    return _WEIGHT.fullmatch(last)


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The stock recurrent layers and cells of a model."""
    return [part for part in model.modules() if isinstance(part, nn.RNNBase | nn.RNNCellBase)]


def from_model(model: nn.Module) -> tuple[RecurrentModule, ...]:
    """Copy every stock recurrent module of a model, with its effective weights, out of it."""
    found = []
    embeddings = _Embeddings(dict(model.named_parameters()))
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            found.append(_copy_fused(name, module, embeddings))
        elif isinstance(module, nn.RNNCellBase):
            found.append(_copy_cell(name, module, embeddings))
    return tuple(found)


def _copy_fused(name: str, module: nn.RNNBase, embeddings: _Embeddings) -> RecurrentModule:
    names = [weight for layer in module._all_weights for weight in layer]
    weights = {weight: getattr(module, weight) for weight in names} | _hooked_weights(module)
    spec = CELLS[module.mode]
    shape = Shape(
        kind=spec.kind,
        input_size=module.input_size,
        hidden_size=module.hidden_size,
        proj_size=module.proj_size,
        layers=module.num_layers,
        bidirectional=module.bidirectional,
        bias=module.bias,
    )
    options: dict[str, object] = {"dropout": module.dropout, "batch_first": module.batch_first}
    options |= spec.options
    return _module(name, shape, weights, options, embeddings)


def _hooked_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of the older weight and spectral norm, whose attribute is stale until a forward."""
    weights = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            weights[hook.name] = hook.compute_weight(module)
        elif isinstance(hook, SpectralNorm):
            weights[hook.name] = hook.compute_weight(module, do_power_iteration=False)
    return weights


def _copy_cell(name: str, cell: nn.RNNCellBase, embeddings: _Embeddings) -> RecurrentModule:
    kind = _KIND_OF_BLOCKS.get(cell.weight_hh.shape[0] // cell.hidden_size, _KIND_OF_BLOCKS[1])
    hooked = _hooked_weights(cell)
    weights = {
        f"{part}_l0": hooked.get(part, getattr(cell, part))
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if getattr(cell, part, None) is not None
    }
    shape = Shape(
        kind=kind, input_size=cell.input_size, hidden_size=cell.hidden_size, bias=bool(cell.bias)
    )
    options = {option: getattr(cell, option) for option in kinds()[kind].options}
    return _module(name, shape, weights, options, embeddings, from_cell=True)


def _module(
    name: str,
    shape: Shape,
    weights: Mapping[str, Tensor],
    options: Mapping[str, object],
    embeddings: _Embeddings,
    *,
    from_cell: bool = False,
) -> RecurrentModule:
    """A module, with what most likely embeds its tokens."""
    embedding, key = embeddings.of(name, shape.input_size)
    return RecurrentModule(
        **vars(shape),
        name=name,
        weights={key: weight.detach() for key, weight in weights.items()},
        options=options,
        from_cell=from_cell,
        embedding=embedding,
        embedding_name=key,
    )


def _build(
    path: str, from_cell: bool, weights: Mapping[str, Tensor], embeddings: _Embeddings
) -> RecurrentModule:
    label = path or "the file"
    if from_cell:
        weights = {f"{name}_l0": tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        _check_tensor(f"{path}.{name}" if path else name, tensor)
    shape = _infer(label, weights)
    _check_shapes(label, shape, weights)
    found = _module(path, shape, weights, {}, embeddings, from_cell=from_cell)
    return replace(found, doubts=_doubts(found), ambiguous=_ambiguities(found, label))


def _check_tensor(key: str, tensor: Tensor) -> None:
    problem = ""
    if tensor.device.type == "meta":
        problem = "a shape without numbers (a meta tensor)"
    elif tensor.is_quantized:
        problem = "quantised"
    elif tensor.is_nested:
        problem = "nested (tensors of several shapes in one)"
    elif tensor.layout != torch.strided:
        problem = f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    elif not tensor.is_floating_point():
        problem = f"of type {str(tensor.dtype).removeprefix('torch.')}"
    elif tensor.numel() * tensor.element_size() > max(2**22, tensor.untyped_storage().nbytes()):
        problem = f"said to have shape {tuple(tensor.shape)}, more entries than the file holds"
    if problem:
        raise FileError(
            f"{key} must be a dense floating-point tensor, got one that is {problem}; "
            f"save the weights as float32, or {GIVE_MODEL}"
        )


def _infer(label: str, weights: Mapping[str, Tensor]) -> Shape:
    """Read kind and sizes off the first layer, and how many layers and directions there are."""
    first_hh, first_ih = weights.get("weight_hh_l0"), weights.get("weight_ih_l0")
    if first_hh is None or first_ih is None:
        missing = "weight_hh_l0" if first_hh is None else "weight_ih_l0"
        raise FileError(
            f"{label} has recurrent weights ({', '.join(sorted(weights)[:3])}) but no {missing}; "
            f"{GIVE_MODEL}"
        )
    projection = weights.get("weight_hr_l0")
    if (
        first_hh.ndim != 2
        or first_ih.ndim != 2
        or (projection is not None and projection.ndim != 2)
    ):
        raise FileError(
            f"weight_hh_l0 and weight_ih_l0 of {label} must be matrices, got shapes "
            f"{tuple(first_hh.shape)} and {tuple(first_ih.shape)}; {GIVE_MODEL}"
        )
    rows, columns = first_hh.shape
    hidden = int(columns if projection is None else projection.shape[1])
    gates, rest = divmod(int(rows), hidden) if hidden else (0, 1)
    kind = "" if rest else _KIND_OF_BLOCKS.get(gates, "")
    if not kind or (projection is not None and "weight_hr" not in kinds()[kind].weights):
        *most, last = map(str, _KIND_OF_BLOCKS)
        raise FileError(
            f"weight_hh_l0 of {label} must have {', '.join(most)} or {last} times as many rows as hidden "
            f"units ({', '.join(_KIND_OF_BLOCKS.values())}), got shape {tuple(first_hh.shape)}; {GIVE_MODEL}"
        )
    layers = 1 + max(int(_layer(name)) for name in weights)
    return Shape(
        kind=kind,
        input_size=int(first_ih.shape[1]),
        hidden_size=hidden,
        proj_size=0 if projection is None else int(projection.shape[0]),
        layers=min(layers, len(weights)),  # a claimed l999999 is found missing below
        bidirectional=any(name.endswith("_reverse") for name in weights),
        bias=any(name.startswith("bias") for name in weights),
    )


def _layer(name: str) -> str:
    match = _weight(name)
    return (match["layer"] or "0")[:9] if match else "0"


def _check_shapes(label: str, shape: Shape, weights: Mapping[str, Tensor]) -> None:
    expected = dict(shape.expected())
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    if missing or extra:
        what = (
            f"lacks {', '.join(missing[:4])}" if missing else f"also holds {', '.join(extra[:4])}"
        )
        raise FileError(
            f"{label} looks like {article(shape.kind)} with {shape.layers} layer(s) but {what}; "
            f"save the whole state_dict, or {GIVE_MODEL}"
        )
    for name, size in expected.items():
        if tuple(weights[name].shape) != size:
            raise FileError(
                f"{name} of {label} must have shape {size} beside the other weights of this "
                f"{shape.kind}, got {tuple(weights[name].shape)}; {GIVE_MODEL}"
            )
    if shape.input_size < 1:
        raise FileError(f"{label} must have at least one input feature, got 0; {GIVE_MODEL}")


def _instantiate(found: RecurrentModule) -> nn.RNNBase:
    arguments: dict[str, object] = {
        "input_size": found.input_size,
        "hidden_size": found.hidden_size,
        "num_layers": found.layers,
        "bias": found.bias,
        "bidirectional": found.bidirectional,
        "device": "meta",  # the real tensors are put in below
        **found.options,
    }
    if found.proj_size:
        arguments["proj_size"] = found.proj_size
    if found.layers == 1:
        arguments.pop("dropout", None)  # it has no effect there, and torch warns
    make: Callable[..., nn.RNNBase] | None = kinds()[found.kind].layer
    assert make is not None
    module = make(**arguments)
    copies = {
        name: weight.to(device="cpu", dtype=found.dtype).clone(
            memory_format=torch.contiguous_format
        )
        for name, weight in found.weights.items()
    }
    try:
        module.load_state_dict(copies, strict=True, assign=True)
    except RuntimeError as error:
        raise FileError(
            f"the {found.kind} {found.name or 'of the file'!r} does not fit its own weights "
            f"({' '.join(str(error).split())[:160]}); {GIVE_MODEL}"
        ) from error
    return module.requires_grad_(True).eval()


class _Embeddings:
    """The weights (V, I) of a file that may embed tokens; looked through once, for any number of modules."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._named: dict[int, str] = {}  # width -> the first one that is called an embedding
        # width -> places and keys of weights without a bias that cannot be an input map
        self._plain: dict[int, tuple[list[int], list[str]]] = {}
        self._starts: dict[str, int] = {}  # path of a module -> place of its first weight
        for place, (key, tensor) in enumerate(tensors.items()):
            self._take(place, key, tensor)

    def _take(self, place: int, key: str, tensor: Tensor) -> None:
        owner, _, last = key.rpartition(".")
        if _weight(last):
            self._starts.setdefault(owner, place)
        if last != "weight" or tensor.is_nested or tensor.ndim != 2 or not len(tensor):
            return
        if f"{owner}.bias" in self._tensors or not tensor.is_floating_point():
            return
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        width = tensor.shape[1]
        if _EMBEDS.search(key):
            self._named.setdefault(width, key)
        elif tensor.shape[0] != width and not _NOT_EMBEDS.search(owner):
            places, keys = self._plain.setdefault(width, ([], []))
            places.append(place)
            keys.append(key)

    def of(self, path: str, width: int) -> tuple[Tensor | None, str]:
        """The one that most likely embeds tokens for a module of so many inputs, and its key."""
        key = self._named.get(width, "")
        if not key:  # else the last one that stands before the module
            places, keys = self._plain.get(width, ([], []))
            before = bisect_left(places, self._starts.get(path, len(self._tensors)))
            key = keys[before - 1] if before else ""
        return (self._tensors[key].detach(), key) if key else (None, "")


def _doubts(found: RecurrentModule) -> tuple[str, ...]:
    said = []
    read = kinds()[found.kind]
    for option, value in read.options.items():
        every = [spec.options[option] for spec in CELLS.values() if spec.kind == read.kind]
        said.append(f"the weights do not say {' or '.join(every)}: read as {value}")
    return tuple(map(printable, said))


def _ambiguities(found: RecurrentModule, label: str) -> tuple[str, ...]:
    said = []
    if found.from_cell:
        said.append(f"{label} is a cell: run as one {found.kind} layer over all steps")
    elif found.layers > 1:
        said.append("the weights do not say whether there is dropout between layers: read as none")
    if not found.from_cell:
        said.append("the weights do not say batch_first: run with time first")
    if found.embedding is not None:
        said.append(
            f"{found.embedding_name} {tuple(found.embedding.shape)} is as wide as the input: read as the "
            "embedding of its tokens"
        )
    said.append("the weights do not say what feeds this layer, what reads it, or the loss")
    return tuple(map(printable, said))
