"""`scan`: all states of a parallel scan of the user's own are marked at once, and become a track."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradflow.cells.linear import HEAD_AXES, LinearSteps
from gradflow.errors import InputError, must_be
from gradflow.hooks import patch
from gradflow.hooks.graph import Between, NotReadable, is_another, kind_of, ones_at
from gradflow.hooks.guard import WRAPPED, Point, guarded, is_wrapped, why_hidden
from gradflow.hooks.linear.scanned import Scanned, Unread
from gradflow.hooks.taps import callers_frame, place_of

USAGE = "call it as h = gradflow.scan(h, decay=a) after the scan, h (batch, time, ...)"
STACKED = ("StackBackward", "CumsumBackward", "LogcumsumexpBackward", "CumprodBackward")


def scan(
    h: Tensor,
    *,
    decay: Tensor | float,
    keys: Tensor | None = None,
    beta: Tensor | float | None = None,
    time: int | None = None,
    name: str = "scan",
    initial: Tensor | None = None,
) -> Tensor:
    """Mark the states of all steps of a linear recurrence, h_t = a_t ⊙ h_{t−1} + b_t; returns h.

    Outside a recording nothing happens. Inside one, the states form the track `name`: totals
    δ_t = ∂L/∂h_t (directly) + a_{t+1} ⊙ δ_{t+1}, where autograd on a parallel scan has the direct
    part alone, and gains ∏ a. With `keys` and `beta`, the state is (heads, d_k, d_v) and a step is
    h_t = (I − β_t k_t k_tᵀ) diag(a_t) h_{t−1} + b_t on its key axis, the (gated) delta rule.
    What h holds must be read by the model from what this returns, or from h itself.

    Args:
        h: states of all steps, (B, T, ...), real or complex.
        decay: a_t, the factor of h_{t−1} in h_t, not its logarithm: a number, or a tensor of as many
            axes as h, 1 wide where entries share it; of fewer axes it broadcasts as torch does, or,
            where only that fits, from the front: (B, T, heads).
        keys: k_t, (B, T, heads, d_k).
        beta: β_t, (B, T, heads), or a number.
        time: which axis of h is time. By default the one along which h was stacked or summed up, if
            the graph tells, else axis 1, and axis 0 of an h with two axes, which has no batch.
        name: of the track.
        initial: the state before the first step, h without its axis of time, where it is not zero. Where
            it is the last state of the scan marked here before, detached or not, both are one track.

    Returns:
        h itself, the same tensor.

    Raises:
        InputError: in a recording, what does not fit, or a decay that looks like a logarithm.

    >>> import torch, gradflow
    >>> x = torch.ones(1, 3, 1, requires_grad=True)
    >>> a = 0.5 ** torch.arange(3.0)
    >>> with gradflow.record(torch.nn.Identity()) as recording:
    ...     h = torch.cumsum(x / a[:, None], 1) * a[:, None]     # h_t = 0.5 h_{t−1} + x_t
    ...     gradflow.scan(h, decay=0.5, time=1)[:, -1].sum().backward()
    >>> recording["scan"].grad_h.flatten().tolist()
    [0.25, 0.5, 1.0]
    """
    if patch.is_observed():
        _tell(name, h, decay, keys, beta, time, initial)
    return h


def _untold(h: Tensor, **given: Any) -> Tensor:
    """The same without a recording, and for torch.compile, whose graphs stay what they are."""
    return h


patch.traced_as(_untold, scan)


@patch.untraced
def _tell(name: str, *given: Any) -> None:
    # a checkpoint that computes again: the tensor of its first run is the one already marked
    if torch._C._current_graph_task_id() != -1:
        return
    for observer in patch.observers_here():
        missed = functools.partial(observer.missed_scan, name)
        guarded(Point.SCAN, missed, _show, observer, name, *given)


def _show(observer: patch.Observer, name: str, *given: Any) -> None:
    hidden = why_hidden()
    if any(is_wrapped(one) for one in given if isinstance(one, Tensor)):
        hidden = hidden or WRAPPED
    if hidden:
        observer.did_not_see(name, hidden)
    else:
        try:
            marked = scanned(name, *given)
        except Unread as why:
            observer.missed_scan(name, str(why))
            return
        observer.saw_scan(marked, place_of(callers_frame(scan.__code__)))


# ------------------------------------------------------------------------------ what was marked


def scanned(
    name: str,
    h: Tensor,
    decay: Tensor | float,
    keys: Tensor | None,
    beta: Tensor | float | None,
    time: int | None,
    initial: Tensor | None,
) -> Scanned:
    """What was marked, after a look at whether it fits."""
    if not isinstance(name, str) or not name:
        raise _wrong("the name given to scan", "a string", repr(name), USAGE)
    if not isinstance(h, Tensor):
        raise _wrong("h of scan", "a tensor", h, USAGE)
    if h.dim() < 2 or not h.numel() or not (h.is_floating_point() or h.is_complex()):
        kind = f"{h.dtype} of shape {tuple(h.shape)}"
        raise _wrong("h of scan", "of numbers and of shape (B, T, ...)", kind, USAGE)
    axis = _time_axis(h, time)
    factor = _axes_of(_decay(decay, h), h, axis)
    shape = tuple(_axes_of(h, h, axis).shape[2:])
    vectors = _vectors(h, keys, beta, axis, factor) if keys is not None else None
    begun = None if initial is None else _first(initial, h, axis)
    if keys is None and beta is not None:
        raise InputError(
            "beta of scan is the strength of keys; give keys=, (B, T, heads, d_k), too"
        )

    def make() -> LinearSteps:
        strong, along = vectors or (None, None)
        left = right = None
        if strong is not None and along is not None:
            left, right = -strong * along, factor.squeeze(-1) * along
        return LinearSteps(shape=shape, decay=factor, left=left, right=right, initial=begun)

    _check_stacked(h, axis, make)
    return Scanned(
        name=name,
        cell="scan",
        steps=int(h.shape[axis]),
        batch=factor.shape[1],
        shape=shape,
        make=make,
        states=h,
        initial=initial,
        states_back=lambda grad: _axes_of(grad, grad, axis),
    )


def _check_stacked(h: Tensor, axis: int, make: Callable[[], LinearSteps]) -> None:
    """Where h was stacked from the states of a loop, autograd tells how each depends on the one before."""
    if h.grad_fn is None or kind_of(h.grad_fn) != "Stack" or _time_axis(h, None) != axis:
        return
    pieces, made = h.grad_fn.next_functions, make()
    for t in {len(pieces) // 2, len(pieces) - 1} - {0}:
        now, before = pieces[t], pieces[t - 1]
        if now[0] is None or before[0] is None:
            continue
        try:
            found = Between([now], {before[0]}).pull([(now, ones_at(now))]).get(before)
        except NotReadable:
            return
        if found is not None:
            expected = made.pull(t, ones_at(now).reshape(made.batch, 1, -1))
            if is_another(found.reshape(expected.shape), expected):
                raise Unread(
                    "h_t was not made as decay · h_{t−1} + what does not depend on h: autograd gives "
                    "another derivative of one by the other; give the decay that made it or, where an "
                    "earlier state goes into what is added, leave scan out: a loop by hand is read by itself"
                )


def _wrong(what: str, expected: str, got: object, advice: str) -> InputError:
    kind = got if isinstance(got, str) else type(got).__name__
    return InputError(
        must_be(what, expected, tuple(got.shape) if isinstance(got, Tensor) else kind, advice)
    )


def _time_axis(h: Tensor, time: int | None) -> int:
    """Given, or told from the graph, or as is usual."""
    if time is not None:
        if isinstance(time, bool) or not isinstance(time, int) or not -h.dim() <= time < h.dim():
            expected = f"an axis of h, which has {h.dim()}"
            raise _wrong("time of scan", expected, repr(time), "name the axis of steps")
        return time % h.dim()
    node = h.grad_fn
    if node is not None and node.name().rstrip("0123456789") in STACKED:
        found = getattr(node, "_saved_dim", None)
        if isinstance(found, int):
            axis = found - 2**64 if found >= 2**63 else found  # torch keeps it without a sign
            return axis % h.dim()
    return 1 if h.dim() > 2 else 0


def _first(initial: Tensor, h: Tensor, axis: int) -> Tensor:
    """A copy (B, *shape)."""
    wanted = (*h.shape[:axis], *h.shape[axis + 1 :])
    if not isinstance(initial, Tensor) or initial.shape != wanted:
        advice = "give h of the step before the first, h[:, -1] of the chunk before"
        raise _wrong("initial of scan", f"of shape {wanted}", initial, advice)
    return (initial.unsqueeze(0) if h.dim() == 2 else initial).detach().clone()


def _decay(decay: Tensor | float, h: Tensor) -> Tensor:
    """A copy with as many axes as h, 1 wide where shared."""
    advice = f"give a_t with an axis, or a 1, for every axis of h, {tuple(h.shape)}"
    if isinstance(decay, int | float) and not isinstance(decay, bool):
        decay = torch.tensor(float(decay), device=h.device)
    if not isinstance(decay, Tensor) or not (decay.is_floating_point() or decay.is_complex()):
        kind = str(decay.dtype if isinstance(decay, Tensor) else type(decay).__name__)
        raise _wrong("decay of scan", "a number or a tensor of numbers", kind, advice)
    if decay.is_complex() and not h.is_complex():
        raise _wrong("decay of scan", "real beside a real h", str(decay.dtype), advice)
    kept = h.dtype if h.is_complex() else torch.promote_types(h.dtype, torch.float32)
    factor = decay.detach().to(h.device, kept)
    front = factor.shape + (1,) * (h.dim() - factor.dim())
    back = (1,) * (h.dim() - factor.dim()) + factor.shape
    fits = [
        shape
        for shape in dict.fromkeys((back, front))
        if len(shape) == h.dim() and all(a in (1, n) for a, n in zip(shape, h.shape, strict=True))
    ]
    if not fits or (len(fits) > 1 and factor.dim() > 1):
        both = "which fits from the front and from the back" if fits else "which does not fit"
        kind = f"{tuple(decay.shape)}, {both}"
        raise _wrong("decay of scan", f"broadcastable to h, {tuple(h.shape)}", kind, advice)
    low, high = (0.0, 0.0) if factor.is_complex() else map(float, factor.aminmax())
    if high <= 0 and low < -1:
        kind = f"numbers from {low:.3g} to {high:.3g}, as logarithms are"
        advice = "give a_t itself: decay=log_decay.exp()"
        raise _wrong("decay of scan", "the factor a_t of the state before", kind, advice)
    return factor.reshape(fits[0]).clone()


def _axes_of(array: Tensor, h: Tensor, axis: int) -> Tensor:
    """(T, B, ...) from the axes that h has; T and B written out, the state's 1 wide where shared."""
    moved, like = array.movedim(axis, 0), h.movedim(axis, 0)
    if h.dim() == 2:
        moved, like = moved.unsqueeze(1), like.unsqueeze(1)
    return moved.expand(*like.shape[:2], *moved.shape[2:])


def _vectors(
    h: Tensor, keys: Tensor, beta: Tensor | float | None, axis: int, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """β (T, B, heads, 1) and k (T, B, heads, d_k), copies."""
    advice = "the state of a delta rule is (heads, d_k, d_v): h (B, T, heads, d_k, d_v)"
    if h.dim() != HEAD_AXES + 2 or axis > 1:
        raise _wrong("h of scan with keys", "(B, T, heads, d_k, d_v)", h, advice)
    if not isinstance(keys, Tensor) or keys.shape != h.shape[:4]:
        raise _wrong("keys of scan", f"of shape {tuple(h.shape[:4])}", keys, advice)
    if factor.shape[-1] != 1:
        words = "shared by all value columns, 1 wide on the last axis"
        raise _wrong("decay of scan with keys", words, factor, advice)
    if beta is None or isinstance(beta, int | float):
        beta = torch.full((1, 1, 1), 1.0 if beta is None else float(beta), device=h.device)
    if not isinstance(beta, Tensor):
        raise _wrong("beta of scan", "a number or a tensor", beta, advice)
    strong = beta.detach()
    while strong.dim() > 3 and strong.shape[-1] == 1:
        strong = strong.squeeze(-1)
    wanted = tuple(h.shape[:3])
    if strong.dim() != 3 or any(b not in (1, n) for b, n in zip(strong.shape, wanted, strict=True)):
        raise _wrong("beta of scan", f"of shape {wanted}", beta, advice)
    wide = strong.expand(wanted).unsqueeze(-1).movedim(axis, 0).to(factor.dtype)
    return wide.clone(), keys.detach().movedim(axis, 0).to(factor.dtype).clone()
