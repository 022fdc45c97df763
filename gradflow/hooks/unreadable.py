"""Calls that run but cannot be read, and what to say of them where nothing else was recorded."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

NO_NUMBERS = (
    "ran on the meta device or on fake tensors, which hold no numbers; run it on real data inside "
    "the block"
)
NO_SEQUENCE = "was given an empty batch; give it at least one sequence"
TRANSFORMED = (
    "ran inside a transform of torch.func (vmap, grad, jacrev) or a trace, where nothing is seen; "
    "call the model plainly inside the block"
)
BATCHED = (
    "gradients of several outputs at once (is_grads_batched=True, or jacobian(vectorize=True)) came "
    "through it too; they are not counted"
)
COMPLEX = (
    "returns complex tensors, and only real states are read; carry real and imaginary part in one "
    "real tensor (torch.view_as_real) and mark it: h = gradflow.tap(h=h) inside the loop"
)
ONLY_BATCHED = (
    "only gradients of several outputs at once (is_grads_batched=True, or jacobian(vectorize=True)) "
    "came through it, which are not those of a loss; call loss.backward() inside the block"
)
WRAPPED = (
    "was given tensors of a class that computes with them in its own way (__torch_dispatch__), whose "
    "numbers are not read; run it on plain tensors inside the block"
)
QUANTIZED = "torch.ao.nn.quantized"
_KEY = torch._C._TorchDispatchModeKey
INFRA = (_KEY.FAKE, _KEY.PROXY, _KEY.FUNCTIONAL)  # modes in which a model is looked at, not run


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and nothing else."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor))


def why_hidden() -> str:
    """Why nothing that runs now may be read, or nothing: a trace, an export, a transform of torch.func."""
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return TRANSFORMED
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return TRANSFORMED
    if not is_looked_at():
        return ""
    only_fake = not any(torch._C._get_dispatch_mode(mode) for mode in INFRA if mode != _KEY.FAKE)
    return NO_NUMBERS if only_fake else TRANSFORMED


def is_looked_at() -> bool:
    """Whether torch takes the model down without running it: on fake tensors, or into a graph."""
    stack = torch._C._len_torch_dispatch_stack()
    return bool(stack) and any(torch._C._get_dispatch_mode(mode) for mode in INFRA)


def is_batched(tensor: object) -> bool:
    """Whether a tensor stands for a whole batch of gradients, one per output."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return isinstance(tensor, Tensor) and bool(legacy(tensor))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether only the tensor's own class knows its numbers."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def why_not_read(given: Iterable[Tensor], returned: Iterable[Tensor]) -> str:
    """Why what a call returned can be no state, or nothing."""
    tensors = list(returned)
    shapes = {tensor.shape for tensor in given if tensor.is_complex()}
    if any(tensor.is_complex() and tensor.shape in shapes for tensor in tensors):
        return COMPLEX
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return NO_SEQUENCE if floating and not any(t.numel() for t in floating) else ""


def foreign_code(modules: Collection[nn.Module]) -> str:
    """What to say of a model in which torch runs layers that are no Python modules any more."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return (
            "what torch.jit scripted or traced runs outside Python, where nothing is seen; record "
            "the model as it was before torch.jit.script or torch.jit.trace"
        )
    if any(type(module).__module__.startswith(QUANTIZED) for module in modules):
        return "quantized layers have no gradient; record the model as it was before quantization"
    return ""
