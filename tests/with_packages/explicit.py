"""Explicit loops, from the equations of the papers: S_t = A_t S_{t−1} + B_t, every S_t a graph tensor.

They share no code with gradflow, and none with the packages. Letters: T steps, B sequences, D channels,
N numbers a channel, H heads, d_k and d_v sizes of keys and values. A state is (B, D, N), (B, D) or
(B, H, d_k, d_v); what is returned is y in the layout of the function, and the states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def run(decays: list[Tensor], writes: list[Tensor], first: Tensor | None = None) -> list[Tensor]:
    """S_t = a_t ⊙ S_{t−1} + b_t."""
    state = torch.zeros_like(writes[0]) if first is None else first
    states = []
    for decay, write in zip(decays, writes, strict=True):
        state = (decay * state + write).requires_grad_()
        states.append(state)
    return states


def mamba(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """u, dt, z (B, D, T), a (D, N), b, c (B, N, T), d, bias (D,)."""
    delta = F.softplus(dt + bias[:, None])
    steps = range(u.shape[2])
    states = run(
        [torch.exp(delta[:, :, t, None] * a) for t in steps],
        [(delta[:, :, t] * u[:, :, t])[:, :, None] * b[:, None, :, t] for t in steps],
    )
    y = [(s * c[:, None, :, t]).sum(-1) + d * u[:, :, t] for t, s in enumerate(states)]
    return torch.stack(y, 2) * F.silu(z), states


def mamba2(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    first: Tensor,
    *,
    limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, list[Tensor]]:
    """u (B, T, H, P), dt (B, T, H), a, d, bias (H,), b, c (B, T, G, N), first (B, H, P, N)."""
    heads = u.shape[2]
    delta = F.softplus(dt + bias).clamp(*limit)
    b, c = (x.repeat_interleave(heads // x.shape[2], 2) for x in (b, c))
    steps = range(u.shape[1])
    states = run(
        [torch.exp(delta[:, t] * a)[..., None, None] for t in steps],
        [torch.einsum("bhn,bhp,bh->bhnp", b[:, t], u[:, t], delta[:, t]) for t in steps],
        first.transpose(2, 3),
    )
    y = [
        torch.einsum("bhnp,bhn->bhp", s, c[:, t]) + d[:, None] * u[:, t]
        for t, s in enumerate(states)
    ]
    return torch.stack(y, 1), states


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor | None, *, normed: bool
) -> tuple[Tensor, list[Tensor]]:
    """q, k (B, T, Hk, d_k), v (B, T, H, d_v), g (B, T, H) or (B, T, H, d_k), beta (B, T, H).

    A is written out, e^g (I − β k kᵀ) or (I − β k kᵀ) diag(e^g), as a d_k × d_k matrix a head.
    """
    batch, steps, heads, d_v = v.shape
    if normed:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    d_k = k.shape[-1]
    state = v.new_zeros(batch, heads, d_k, d_v) if first is None else first
    states, y = [], []
    for t in range(steps):
        outer = torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        erase = torch.eye(d_k, dtype=v.dtype) - beta[:, t, :, None, None] * outer
        decay = g[:, t].exp()
        a = erase * (decay[..., None, :] if decay.dim() == 3 else decay[..., None, None])
        write = torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], v[:, t])
        state = (a @ state + write).requires_grad_()
        states.append(state)
        y.append(torch.einsum("bhij,bhi->bhj", state, q[:, t]) * d_k**-0.5)
    return torch.stack(y, 1), states


def rg_lru(gate: Tensor, x: Tensor, reset: Tensor, first: Tensor) -> tuple[Tensor, list[Tensor]]:
    """gate, x (B, T, D), reset (B, T, 1) true where a document begins, first (B, D)."""
    steps = range(x.shape[1])
    states = run([gate[:, t] * ~reset[:, t] for t in steps], [x[:, t] for t in steps], first)
    return torch.stack(states, 1), states


def min_gru(log_keep: Tensor, log_write: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Both (B, T, D), logarithms of a_t and b_t."""
    steps = range(log_keep.shape[1])
    states = run([log_keep[:, t].exp() for t in steps], [log_write[:, t].exp() for t in steps])
    return torch.stack(states, 1), states


def rwkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """w, u (D,), k, v (B, T, D); a state (B, D, 2) is numerator and denominator."""
    steps = range(k.shape[1])
    pairs = torch.stack([v, torch.ones_like(v)], -1)
    writes = [k[:, t].exp()[..., None] * pairs[:, t] for t in steps]
    states = run([torch.exp(-torch.exp(w))[:, None] for _ in steps], writes)
    before = [torch.zeros_like(states[0]), *states[:-1]]
    sums = [s + (u + k[:, t]).exp()[..., None] * pairs[:, t] for t, s in enumerate(before)]
    return torch.stack([s[..., 0] / s[..., 1] for s in sums], 1), states


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, list[Tensor]]:
    """q, k, v (B, H, T, d), i, f (B, H, T, 1); a state is C (d, d) with n (d, 1) beside it."""
    d_k = k.shape[-1]
    steps = range(k.shape[2])
    k = k * d_k**-0.5
    beside = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    states = run(
        [torch.sigmoid(f[:, :, t])[..., None] for t in steps],
        [
            i[:, :, t].exp()[..., None] * torch.einsum("bhi,bhj->bhij", k[:, :, t], beside[:, :, t])
            for t in steps
        ],
    )
    m = torch.full_like(i[:, :, 0], -torch.inf)
    y = []
    for t, state in enumerate(states):
        m = torch.maximum(F.logsigmoid(f[:, :, t]) + m, i[:, :, t])
        sums = torch.einsum("bhij,bhi->bhj", state, q[:, :, t])
        below = torch.maximum(sums[..., -1:].abs(), torch.ones_like(m)) + eps * m.exp()
        y.append(sums[..., :-1] / below)
    return torch.stack(y, 2), states
