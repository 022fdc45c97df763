"""Phantom inputs: totals of all steps from the fused kernel's own backward, for `record(exact=False)`.

A layer runs on [x_t, e_t] with weights [W_ih, C] and e_t = 0, so every value is as without e. The gradient
at e_t is then Cᵀ δ_t, and C (see `CellSpec.phantom`) is chosen so that it is what step t hands back to
h_{t−1}. A stack runs layer by layer, with torch's dropout in between, so that every h_t is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradflow.cells import CELLS

Layer = tuple[Tensor, Tensor, Tensor]  # x, [x, e] and the output


class _Beside(torch.autograd.Function):
    """[x, 0]; its result needs a gradient where anything does that the call is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, *_others: Tensor) -> Tensor:
        ctx.width = x.shape[-1]
        return torch.cat([x, x.new_zeros(*x.shape[:-1], width)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0][..., : ctx.width], *[None] * (len(ctx.needs_input_grad) - 1))


def can_run(known: dict[str, Any]) -> bool:
    """Whether a call may run so, and gains by it: a stack, or any layer on an accelerator.

    It must be of plain tensors in float32 or float64, of several steps, with gradients; modes of
    torch's that look at every function would see other ones.
    """
    data, weights, sizes = known["data"], known["weights"], known["batch_sizes"]
    steps = len(sizes) if sizes is not None else data.shape[1 if known["batch_first"] else 0]
    plain = all(type(one) in (Tensor, torch.nn.Parameter) for one in (data, *weights))
    return (
        plain
        and (known["layers"] > 1 or data.device.type != "cpu")
        and torch.is_grad_enabled()
        and any(one.requires_grad for one in (data, *weights, *known["initial"]))
        and steps > 1
        and data.dtype == weights[0].dtype
        and data.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(data.device.type)
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
    )


def run(
    cell: str, function: Callable[..., Any], known: dict[str, Any], inner: list[Layer]
) -> tuple[Tensor, ...]:
    """What the call returns; its layers are added to `inner`."""
    spec, data, layers = CELLS[cell], known["data"], known["layers"]
    directions = 1 + known["bidirectional"]
    count = len(known["weights"]) // (layers * directions)
    starts = range(0, len(known["weights"]), count)
    each = [known["weights"][start : start + count] for start in starts]
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        columns = [spec.phantom(weights[1].detach()) for weights in each[rows]]
        width = columns[0].shape[1]
        joined = _Beside.apply(data, width * directions, *known["weights"], *known["initial"])
        flat: list[Tensor] = []
        for place, weights in enumerate(each[rows]):
            here = [torch.zeros_like(columns[place])] * directions
            here[place] = columns[place]
            flat += [torch.cat([weights[0], *here], dim=1), *weights[1:]]
        states = tuple(state[rows] for state in known["initial"])
        hidden = states if len(states) > 1 else states[0]
        tail = (flat, known["has_biases"], 1, 0.0, known["training"], known["bidirectional"])
        if known["batch_sizes"] is not None:
            output, *end = function(joined, known["batch_sizes"], hidden, *tail)
        else:
            output, *end = function(joined, hidden, *tail, known["batch_first"])
        inner.append((data, joined, output))
        ends.append(tuple(end))
        data = output
        if layer < layers - 1 and known["dropout"] and known["training"]:
            data = torch.dropout(output, known["dropout"], train=True)
    return (output, *(torch.cat(each_end) for each_end in zip(*ends, strict=True)))
