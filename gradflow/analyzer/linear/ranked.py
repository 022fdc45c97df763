"""Rank-one corrections: products on the key axis of each head, which all value columns share.

Letters: T steps, B sequences, G heads, d_k keys, d_v value columns, P_g the (d_k, d_k) product of head
g. P of the whole state is P_g for each head and column, so ‖P‖₂ = max_g ‖P_g‖₂ and ‖P‖_F² =
d_v Σ_g ‖P_g‖_F². Heads are taken as sequences of their own, so all that goes through a `LinearSteps` of
one head of one column goes through them.
"""

from __future__ import annotations

from torch import Tensor

from gradflow.analyzer.windows import Norms, Window, log_norms
from gradflow.cells.linear import LinearSteps
from gradflow.errors import RecordingError


def on_key_axis(steps: LinearSteps) -> LinearSteps:
    """The same on one value column, (T, B·G, 1, d_k, 1): sequence b's head g is b·G + g.

    Raises:
        RecordingError: it is complex.
    """
    if steps.left is None or steps.right is None or steps.decay.is_complex():
        raise RecordingError("products of complex rank-one steps are not taken")
    heads, keys, _ = steps.shape
    length, batch = steps.length, steps.batch
    decay = steps.decay.expand(length, batch, heads, *steps.decay.shape[3:])
    vectors = (
        vector.reshape(length, batch * heads, 1, keys) for vector in (steps.left, steps.right)
    )
    left, right = vectors
    return LinearSteps(
        shape=(1, keys, 1),
        decay=decay.reshape(length, batch * heads, 1, -1, 1),
        left=left,
        right=right,
    )


def head_norms(keys: LinearSteps, windows: list[Window], heads: int) -> tuple[Tensor, Tensor]:
    """ln ‖P_g‖₂ and ln ‖P_g‖_F of every window of a sequence and every head, (N, G) each."""
    each = [
        Window(window.sequence * heads + head, window.first, window.last, window.part)
        for window in windows
        for head in range(heads)
    ]
    norms: Norms = log_norms(keys, each)
    shape = len(windows), heads
    return norms.spectral.reshape(shape), norms.frobenius.reshape(shape)


def erasing(steps: LinearSteps) -> Tensor:
    """|1 + Σ_i left_i right_i/decay_i| of every step, sequence and head, (T, B, G).

    It is |det A|/|det diag(decay)|, for a delta rule |1 − β ‖k‖²|: 0 where a step erases a direction.
    NaN where a decay is exactly 0.
    """
    if steps.left is None or steps.right is None:
        raise RecordingError("there is no rank-one part")
    product = steps.left * steps.right / steps.decay[..., 0]
    return (1 + product.sum(-1)).abs()
