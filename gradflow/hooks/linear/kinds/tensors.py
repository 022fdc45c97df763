"""What the mappings of all kinds share: layouts and precision."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least, as models keep their states: half precision is widened, float64 stays."""
    return tensor if tensor.dtype in (torch.float64, torch.complex128) else tensor.float()


def time_first(tensor: Tensor) -> Tensor:
    """(B, T, ...) as (T, B, ...)."""
    return tensor.transpose(0, 1)


def time_last(tensor: Tensor) -> Tensor:
    """(B, D, T) as (T, B, D)."""
    return tensor.permute(2, 0, 1)


def time_third(tensor: Tensor) -> Tensor:
    """(B, H, T, ...) as (T, B, H, ...)."""
    return tensor.movedim(2, 0)


def swapped(tensor: Tensor) -> Tensor:
    """A state (B, H, d_v, d_k) as (B, H, d_k, d_v), and the other way round."""
    return tensor.transpose(-1, -2)


def repeated(tensor: Tensor, heads: int, axis: int) -> Tensor:
    """Groups of heads that share keys, each repeated for every head of its group."""
    if tensor.shape[axis] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[axis], dim=axis)
