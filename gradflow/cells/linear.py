"""A linear recurrence: S_t = A_t S_{t−1} + B_t, where A_t and B_t do not depend on the state.

Letters: T steps in processing order, B sequences, S the numbers of one state, (...) the state's own
shape: (heads, d_k, d_v), (channels, N) or (channels,). g is a gradient at the states. The axes of
time and batch come first, and time index 0 is the first step processed.

A_t is diag(decay_t), or diag(decay_t) + left_t right_tᵀ on the key axis of each head, which all
value columns share. Nothing here is squared in S: the state map is never written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSteps:
    """All steps of one linear recurrence, S_t = A_t S_{t−1} + B_t and y_t = C_t(S_t).

    ``decay`` has as many axes as (T, B, *shape), and 1 on each axis of the state whose entries share
    one number: (T, B, heads, 1, 1) is a scalar per head, (T, B, heads, d_k, 1) a decay of every key.
    With ``left`` and ``right``, A_t = diag(decay) + left rightᵀ on the key axis of (heads, d_k, d_v),
    so the delta rule e^g (I − β k kᵀ) has decay e^g, left −e^g β k, right k; (I − β k kᵀ) diag(a) has
    decay a, left −β k, right a ⊙ k; RWKV-7's diag(w) + a bᵀ has decay w, left a, right b.

    >>> import torch
    >>> steps = LinearSteps(shape=(4, 8, 8), decay=torch.full((100, 2, 4, 1, 1), 0.5))
    >>> steps.decay.shape          # one number a head and step
    torch.Size([100, 2, 4, 1, 1])
    """

    shape: tuple[int, ...]  # of one state: (heads, d_k, d_v), (channels, N), (channels,)
    decay: Tensor  # (T, B, *shape), 1 wide where shared; real or complex
    left: Tensor | None = None  # (T, B, heads, d_k); with `right` the rank-one part
    right: Tensor | None = None  # (T, B, heads, d_k)
    write: tuple[Tensor, ...] = ()  # factors whose broadcast product is B_t; empty: not known
    initial: Tensor | None = None  # (B, *shape); None: zeros
    # y of all steps, in the layout of what the model's function returned, from the states
    # (T, B, *shape), as differentiable torch code; None: the states themselves are what is read
    read: Callable[[Tensor], Tensor] | None = None
    # its transposed map where it is linear in the states: ∂L/∂y -> (T, B, *shape); None: by autograd
    read_back: Callable[[Tensor], Tensor] | None = None
