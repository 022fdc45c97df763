"""A pretend accelerator: a torch device written in Python whose numbers lie in the memory of the CPU.

Shapes, strides and views are torch's own. Every operation comes through one function, which runs it
on the CPU, counts it, and refuses tensors of two devices as a GPU would. Fused LSTM and GRU steps,
which torch has for GPUs alone, are written out here.

    with pretend_accelerator.counted() as counts:
        model.to("pretend")(x.to("pretend"))
    counts.calls, counts.synchronisations
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
META: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
CPU: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten


@dataclass
class Counts:
    """What was asked of the accelerator."""

    calls: int = 0  # kernels
    synchronisations: int = 0  # times the host waited for a number
    by_name: dict[str, int] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """One call."""
        self.calls += 1
        self.by_name[name] = self.by_name.get(name, 0) + 1


_counting: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Count the kernel calls and the waits of the host in a block."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def is_ours(value: Any) -> bool:
    """Whether a value is a tensor on the pretend accelerator."""
    return isinstance(value, Tensor) and value.device.type == NAME


def twin(tensor: Tensor) -> Tensor:
    """The CPU tensor over the same numbers."""
    storage: Any = tensor.untyped_storage()
    bare = torch.empty(0, dtype=tensor.dtype)
    found = bare.set_(storage.numbers, tensor.storage_offset(), tensor.shape, tensor.stride())
    found = found.conj() if tensor.is_conj() else found
    return torch._neg_view(found) if tensor.is_neg() else found


def on_device(values: Tensor) -> Tensor:
    """A tensor of the pretend accelerator over the numbers of one of the CPU."""
    values = values.resolve_conj().resolve_neg()
    numbers = values.untyped_storage()
    storage: Any = torch._C._construct_storage_from_data_pointer(
        numbers.data_ptr(), torch.device(NAME, 0), numbers.nbytes()
    )
    storage.numbers = numbers  # keeps them
    return _lie_in(torch._C._acc.create_empty_tensor([0], values.dtype), storage, values)


def _lie_in(tensor: Tensor, storage: Any, like: Tensor) -> Tensor:
    """Give a tensor another memory."""
    where = like.storage_offset(), list(like.shape), list(like.stride())
    return aten.set_.source_Storage_storage_offset.redispatch(CPU, tensor, storage, *where)


def _seen_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Another view of a tensor's memory."""
    where = list(like.shape), list(like.stride()), like.storage_offset()
    return aten.as_strided.default.redispatch(META, tensor, *where)


WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
}


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation: on the twins, in place where it is in place."""
    name = op._schema.name
    flat, form = tree_flatten((list(args), kwargs))
    _refuse_mixed(name, flat)
    if not op.is_view and not name.startswith("aten::empty"):
        _count(name, waits=name in WAITS)
    twins = [twin(v) if is_ours(v) else _on_cpu(v) for v in flat]
    cpu_args, cpu_kwargs = tree_unflatten(twins, form)
    for place, (given, wanted) in enumerate(zip(cpu_args, op._schema.arguments, strict=False)):
        if isinstance(given, int | float | complex) and str(wanted.type) == "Tensor":
            cpu_args[place] = torch.tensor(given)  # a number, which torch hands on bare
    results = op(*cpu_args, **cpu_kwargs)
    pairs = [(ours, theirs) for ours, theirs in zip(flat, twins, strict=True) if is_ours(ours)]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:  # out= of another shape
            _lie_in(ours, on_device(theirs).untyped_storage(), theirs)

    def back(result: Tensor) -> Tensor:
        for ours, theirs in pairs:
            if theirs is result:
                return ours
        for ours, theirs in pairs:
            if theirs.untyped_storage()._cdata == result.untyped_storage()._cdata:
                return _seen_as(ours, result)
        return on_device(result)

    return tree_map_only(Tensor, back, results)


def _count(name: str, *, waits: bool = False) -> None:
    for counts in _counting:
        counts.add(name)
        counts.synchronisations += waits


def _refuse_mixed(name: str, flat: list[Any]) -> None:
    tensors = [v for v in flat if isinstance(v, Tensor)]
    if name in {"aten::index", "aten::_index_put_impl_"}:  # indices may lie on the CPU
        tensors = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if any(is_ours(v) for v in tensors) and any(v.dim() for v in tensors if not is_ours(v)):
        raise RuntimeError(
            f"{name}: expected all tensors to be on one device, found {NAME} and cpu"
        )


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between devices, and on one."""
    _count("aten::_copy_from", waits=is_ours(source) and not is_ours(target))
    both = [twin(t) if is_ours(t) else t for t in (source, target)]
    both[1].copy_(both[0])
    return target


# ------------------------------------------------------ fused steps, which only accelerators have


def _lstm_cell(
    x: Tensor, hidden: Tensor, cell: Tensor, bias_x: Tensor | None, bias_h: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gates = x + hidden if bias_x is None else x + hidden + bias_x + bias_h
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * cell + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    before: Tensor,
    after: Tensor,
    gates: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, 1)
    shown = after.tanh()
    to_h = torch.zeros_like(after) if grad_h is None else grad_h
    to_c = to_h * o * (1 - shown * shown)
    to_c = to_c if grad_c is None else to_c + grad_c
    grads = [
        to_c * g * i * (1 - i),
        to_c * before * f * (1 - f),
        to_c * i * (1 - g * g),
        to_h * shown * o * (1 - o),
    ]
    whole = torch.cat(grads, 1)
    return whole, to_c * f, whole.sum(0) if has_bias else whole.new_empty(0)


def _gru_cell(
    x: Tensor, hidden: Tensor, before: Tensor, bias_x: Tensor | None, bias_h: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x if bias_x is None else x + bias_x
    hidden = hidden if bias_h is None else hidden + bias_h
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), hidden.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (before - n) * z + n, torch.cat([r, z, n, before, hn], 1)


def _gru_cell_backward(
    grad: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r, z, n, before, hn = workspace.chunk(5, 1)
    to_n = grad * (1 - z) * (1 - n * n)
    to_r, to_z = to_n * hn * r * (1 - r), grad * (before - n) * z * (1 - z)
    from_x, from_h = torch.cat([to_r, to_z, to_n], 1), torch.cat([to_r, to_z, to_n * r], 1)
    nothing = grad.new_empty(0)
    biases = (from_x.sum(0), from_h.sum(0)) if has_bias else (nothing, nothing)
    return from_x, from_h, grad * z, *biases


FUSED = {
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
}


def _fused(name: str) -> Any:
    def run(*args: Any) -> tuple[Tensor, ...]:
        """One kernel, whatever it is made of here."""
        _refuse_mixed(name, list(args))
        _count(f"aten::{name}")
        args = (
            args + (None,) * (5 - len(args)) if not name.endswith(("_impl", "_backward")) else args
        )
        made = FUSED[name](*[twin(a) if is_ours(a) else a for a in args])
        return tuple(on_device(result) for result in made)

    return run


class _Module(_DummyBackendModule):
    """What torch asks of the module of a device."""

    def is_available(self) -> bool:
        """No: what looks for any accelerator (DataParallel, a sampler that pins) is to find none."""
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Of autocast."""
        return [torch.float16, torch.bfloat16]


_library: list[torch.library.Library] = []


def install() -> torch.device:
    """Register the device, once in a process."""
    if not _library:
        _setup_privateuseone_for_python_backend(NAME, _Module())
        fallback = torch.library.Library("_", "IMPL")
        fallback.fallback(_run, "PrivateUse1")
        ours = torch.library.Library("aten", "IMPL")
        ours.impl("_copy_from", _copy_from, "PrivateUse1")
        for name in FUSED:
            ours.impl(name, _fused(name), "PrivateUse1")
        _library.extend([fallback, ours])
    return torch.device(NAME)
