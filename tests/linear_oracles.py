"""Slow, obvious linear recurrences: one step after the other in float64, differentiated by autograd.

Each case makes the pieces of A_t at random, runs S_t = A_t S_{t−1} + B_t with A_t written out as
whole matrices where the state is small, and reads y_t = C_t(S_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from seam import LinearSteps
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One kind of A_t; the pieces are leaves of the graph."""

    name: str
    steps: Callable[[], LinearSteps]


def random(*shape: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def elementwise(t: int = 7, b: int = 3, h: int = 5) -> LinearSteps:
    """minGRU, RG-LRU, HGRN: a number of every channel."""
    return LinearSteps(
        shape=(h,),
        decay=random(t, b, h, low=0.3),
        write=(random(t, b, h, seed=1, low=-1.0),),
        initial=random(b, h, seed=2),
    )


def zeros() -> LinearSteps:
    """The same with exact zeros."""
    steps = elementwise()
    decay = steps.decay.clone()
    decay[3, 0], decay[4, 1, 2] = 0.0, 0.0
    return LinearSteps(shape=steps.shape, decay=decay, write=steps.write)


def mamba(t: int = 7, b: int = 2, c: int = 4, n: int = 3) -> LinearSteps:
    """exp(Δ_t A), and a write of factors."""
    delta = random(t, b, c, 1, seed=3, low=0.01, high=0.3)
    log = -(1.0 + torch.arange(n, dtype=torch.float64))
    return LinearSteps(
        shape=(c, n),
        decay=(delta * log).exp(),
        write=(delta, random(t, b, c, 1, seed=4), random(t, b, 1, n, seed=5)),
    )


def complex_decay(t: int = 7, b: int = 2, h: int = 4) -> LinearSteps:
    """LRU: λ = e^{−ν + iθ}, the same at every step."""
    rate, angle = random(h, seed=6, low=0.05, high=0.5), random(h, seed=7, high=3.0)
    decay = torch.exp(torch.complex(-rate, angle)).expand(t, b, h)
    read = torch.complex(random(h, seed=8), random(h, seed=9))
    return LinearSteps(
        shape=(h,),
        decay=decay,
        write=(torch.complex(random(t, b, h, seed=10), random(t, b, h, seed=11)),),
        read=lambda states: (read * states).sum(-1).real,
    )


def scalar_per_head(t: int = 7, b: int = 2) -> LinearSteps:
    """Mamba-2, RetNet, mLSTM: one number a head."""
    heads, d_k, d_v = 3, 4, 2
    keys, values = random(t, b, heads, d_k, 1, seed=12), random(t, b, heads, 1, d_v, seed=13)
    query = random(t, b, heads, d_k, 1, seed=14)
    return LinearSteps(
        shape=(heads, d_k, d_v),
        decay=random(t, b, heads, 1, 1, seed=15, low=0.5),
        write=(keys, values),
        read=lambda states: (query * states).sum(-2),
    )


def gated_delta(t: int = 7, b: int = 2) -> LinearSteps:
    """e^g (I − β k kᵀ), and a read-out divided by a number that the state makes (mLSTM's C/n)."""
    heads, d_k, d_v = 2, 4, 3
    keys = unit(random(t, b, heads, d_k, seed=16, low=-1.0))
    beta, decay = random(t, b, heads, 1, seed=17), random(t, b, heads, 1, seed=18, low=0.7)
    query = random(t, b, heads, d_k, 1, seed=19)

    def read(states: Tensor) -> Tensor:
        found = (query * states).sum(-2)
        return found / (1.0 + found.square().sum(-1, keepdim=True))

    return LinearSteps(
        shape=(heads, d_k, d_v),
        decay=decay.unsqueeze(-1),
        left=-decay * beta * keys,
        right=keys,
        write=(beta.unsqueeze(-1), keys.unsqueeze(-1), random(t, b, heads, 1, d_v, seed=20)),
        initial=random(b, heads, d_k, d_v, seed=21),
        read=read,
    )


def rwkv7(t: int = 7, b: int = 2) -> LinearSteps:
    """diag(w) + a bᵀ, general vectors."""
    heads, d_k, d_v = 2, 3, 2
    return LinearSteps(
        shape=(heads, d_k, d_v),
        decay=random(t, b, heads, d_k, 1, seed=22, low=0.6),
        left=random(t, b, heads, d_k, seed=23, low=-0.5, high=0.5),
        right=random(t, b, heads, d_k, seed=24, low=-0.5, high=0.5),
        write=(random(t, b, heads, d_k, d_v, seed=25),),
    )


CASES = [
    Case("elementwise", elementwise),
    Case("with exact zeros", zeros),
    Case("Mamba", mamba),
    Case("complex", complex_decay),
    Case("scalar per head", scalar_per_head),
    Case("gated delta rule", gated_delta),
    Case("RWKV-7", rwkv7),
]


def matrices(steps: LinearSteps) -> Tensor:
    """A_t written out, (T, B, S, S), from its definition: outer products and Kronecker blocks."""
    eye = torch.eye(steps.size, dtype=steps.dtype)
    wide = steps.decay.expand(steps.length, steps.batch, *steps.shape).flatten(2)
    found = torch.diag_embed(wide)
    if steps.left is None or steps.right is None:
        return found
    heads, _, d_v = steps.shape
    columns = torch.eye(d_v, dtype=steps.dtype)
    for t in range(steps.length):
        for b in range(steps.batch):
            blocks = [
                torch.kron(torch.outer(steps.left[t, b, h], steps.right[t, b, h]), columns)
                for h in range(heads)
            ]
            found[t, b] += torch.block_diag(*blocks)
    return found + 0 * eye


def unrolled(steps: LinearSteps) -> tuple[list[Tensor], Tensor]:
    """The states, each a tensor of the graph, and y."""
    every = matrices(steps)
    written = steps.write[0]
    for factor in steps.write[1:]:
        written = written * factor
    written = written.expand(steps.length, steps.batch, *steps.shape).flatten(2)
    state = torch.zeros(steps.batch, steps.size, dtype=written.dtype)
    if steps.initial is not None:
        state = steps.initial.flatten(1).to(written.dtype)
    state = state.clone().requires_grad_()
    states = []
    for t in range(steps.length):
        state = (every[t] @ state.unsqueeze(-1)).squeeze(-1) + written[t]
        state.retain_grad()
        states.append(state)
    stacked = torch.stack(states).unflatten(-1, steps.shape)
    return states, stacked if steps.read is None else steps.read(stacked)


def graded(y: Tensor, seed: int = 30) -> Tensor:
    """A loss that reads y at every step, with a curvature: its gradient depends on y."""
    weight = random(*y.shape, seed=seed, low=-1.0)
    real = torch.view_as_real(y).sum(-1) if y.is_complex() else y
    return (weight * (real + 0.3 * real.square())).sum()
