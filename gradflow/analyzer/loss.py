"""What rests on the gradient of the loss: profiles, memory of units, norms.

Letters: T timesteps, B sequences, U units of the widest state, j steps back from the loss step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.timeline import bad_gradient, bad_state, cuts_before, in_processing_order
from gradflow.limits import CARRIED_DECADES, GONE_DECADES
from gradflow.recording.track import Track

GRADIENTS = ("total", "direct", "last")


@dataclass(frozen=True)
class Profile:
    """|∂L/∂s_t| of the last loss step, aligned at it; log10 of the layer's own level there.

    Where that step cannot be told from the others it is the whole loss's, aligned at the last step
    that it reaches; with a loss at many steps it need not fade.
    """

    log10_grad: np.ndarray  # (state, unit, back); −inf exact zeros, NaN undefined
    unit_order: np.ndarray  # (state, unit) longest memory first, −1 past a state's width
    memory_steps: np.ndarray  # (state, unit) steps until gone, inf if never
    whole: bool  # whether it is the whole loss's; then no unit's memory is known


def gradient_note(track: Track) -> str:
    """Why there is no gradient of the loss here, "" if there is one."""
    if not track.has_gradient:
        return str(track.why_no_gradient)
    bad = bad_gradient(track)
    state = bad_state(track) if bad is not None else None
    if bad is not None and state is not None and state.sequence == bad.sequence:
        return f"the states are {state.value} from {state.where} on, and so is the gradient"
    if bad is not None:
        return f"the gradient is {bad.value} from {bad.where} on: look at the loss first"
    if track.parity.status == "failed":
        return (
            "the parameter gradients rebuilt from the recorded ones do not match those of the "
            f"backward ({track.parity.reason}); what rests on the loss is withheld"
        )
    shown = track.last_grads or track.grads
    if not any(bool(((g != 0) & ~g.isnan()).any()) for g in shown.values()):
        return "the gradient that reached this layer is zero everywhere"
    return ""


def arrives_elsewhere(seen: Profile) -> str:
    """Why a profile would mislead, "" if it would not.

    Below another layer, a gradient may come in at every step, and chiefly far from the loss step in
    this layer's own order: in a reverse layer under a forward one whose last step the loss reads.
    """
    if seen.whole:
        return ""
    for state in seen.log10_grad:
        level = rms_over_units(state)
        if np.isfinite(level).any() and np.nanmax(level[np.isfinite(level)]) > -GONE_DECADES:
            return (
                "the layer above passes the gradient down at other steps than the one the loss reads; "
                "counted from that step, this layer's profile would mislead"
            )
    return ""


def profile(track: Track, withheld: bool) -> Profile:
    """Align the last loss step's gradient of every sequence at that step, rms over sequences.

    log10 of sqrt(mean_b g²) / level, the level being the rms over units and sequences at the loss
    step. Steps before a cut and past a sequence's ends are no part of the mean. Of a layer without
    step Jacobians only the whole loss's gradient is known, and taken.
    """
    widths = {state: int(value.shape[-1]) for state, value in track.states.items()}
    unit_count = max(widths.values())
    grads = None if withheld else track.last_grads
    whole = grads is None and not withheld and track.has_gradient
    if whole:
        grads = track.grads
    logs = np.full((len(widths), unit_count, track.steps), np.nan)
    if grads is not None:
        index, valid = back_index(track, grads)
        for place, (state, width) in enumerate(widths.items()):
            ordered = in_processing_order(track, grads[state]).double()
            logs[place, :width] = _aligned(ordered, index, valid)
    memory = np.array([[_memory(unit) for unit in state] for state in logs])
    order = np.array([_order(logs[i], memory[i], w) for i, w in enumerate(widths.values())])
    return Profile(logs, order, np.full_like(memory, math.nan) if whole else memory, whole)


def back_index(track: Track, grads: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(T, B): which processed step lies j back from the loss step, and whether it counts."""
    reached = torch.zeros(track.steps, track.batch, dtype=torch.bool)
    for value in grads.values():
        ordered = in_processing_order(track, value)
        # an infinite gradient reached the step just as well; padding is NaN and masked below
        reached |= (ordered != 0).any(-1)
    places = torch.arange(track.steps)[:, None]
    reached &= places < track.lengths.cpu()
    loss_step = torch.where(reached, places, torch.full_like(places, -1)).amax(0)  # (B,)
    index = loss_step - places
    inside = (index >= 0) & (loss_step >= 0)
    index = index.clamp_min(0)
    segments = cuts_before(track)
    columns = torch.arange(track.batch)
    same = segments[index, columns] == segments[loss_step.clamp_min(0), columns]
    return index, inside & same


def _aligned(grads: Tensor, index: Tensor, valid: Tensor) -> np.ndarray:
    """(width, T) log10 rms over the valid sequences, over the level at the loss step."""
    gathered = grads[index, torch.arange(grads.shape[1])]  # (T, B, width)
    logs = torch.where(
        valid[..., None], 2 * gathered.abs().log(), torch.full_like(gathered, -math.inf)
    )
    count = valid.sum(1)[:, None].double()  # (T, 1)
    mean = torch.logsumexp(logs, dim=1) - count.log()  # ln of the mean square, no underflow
    mean = torch.where(count > 0, mean, torch.full_like(mean, math.nan))
    level = torch.logsumexp(mean[0], dim=0) - math.log(mean.shape[1])
    if not bool(torch.isfinite(level)):
        level = torch.tensor(math.nan)  # nothing, or nothing finite, at the loss step
    return ((mean - level) / (2 * math.log(10))).T.numpy()


def _memory(unit: np.ndarray) -> float:
    """First step back at which the unit is gone; inf if never, NaN if unknown."""
    known = ~np.isnan(unit)
    if not known.any():
        return math.nan
    gone = np.flatnonzero(known & (unit < GONE_DECADES))
    return float(gone[0]) if len(gone) else math.inf


def _order(logs: np.ndarray, memory: np.ndarray, width: int) -> np.ndarray:
    """Units by memory, then by mean log gradient; natural order where nothing is known."""
    mean = np.nan_to_num(np.maximum(logs[:width], -30.0), nan=0.0, posinf=30.0).mean(-1)
    steps = np.nan_to_num(memory[:width], nan=-1.0, posinf=float(logs.shape[-1] + 1))
    order = np.lexsort((np.arange(width), -mean, -steps))
    return np.concatenate([order, np.full(len(logs) - width, -1)])


def grad_norms(track: Track, withheld: bool) -> np.ndarray:
    """(kind, state, step): median over sequences of ‖∂L/∂s_t‖₂, input time, NaN where undefined."""
    states = list(track.states)
    result = np.full((len(GRADIENTS), len(states), track.steps), np.nan)
    if withheld or not track.has_gradient:
        return result
    kinds: dict[str, dict[str, Tensor]] = {
        "total": track.grads,
        "direct": {"h": track.grad_h_direct} if track.has_direct else {},
        "last": track.last_grads or {},
    }
    for i, kind in enumerate(GRADIENTS):
        for j, state in enumerate(states):
            if state in kinds[kind]:
                result[i, j] = median_norm(kinds[kind][state], track.mask)
    return result


def median_norm(values: Tensor, mask: Tensor) -> np.ndarray:
    """Median over real sequences of ‖v‖₂ of values (T, B, width), (T,)."""
    norms = torch.linalg.vector_norm(values.detach().cpu().double(), dim=-1).numpy()
    return masked_median(norms, mask.cpu().numpy())


def masked_median(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Median of every row (T, B) over the true entries of the mask; NaN where there are none."""
    # what does not count goes to the end, and the middle of the rest is looked up
    ordered = np.sort(np.where(mask, values, np.inf), axis=1)
    count = mask.sum(1)
    known = (count > 0) & ~(np.isnan(values) & mask).any(1)
    rows = np.flatnonzero(known)
    low, high = ordered[rows, (count[rows] - 1) // 2], ordered[rows, count[rows] // 2]
    result = np.full(len(values), np.nan)
    result[rows] = np.where(low == high, low, (low + high) / 2)
    return result


def steps_until_gone(log10_grad: np.ndarray) -> int | None:
    """First j ≥ 1 at which the rms over units of a profile (unit, back) is gone, else None."""
    level = rms_over_units(log10_grad)
    gone = np.flatnonzero(level[1:] < GONE_DECADES)  # NaN compares false
    return int(gone[0]) + 1 if len(gone) else None


def loss_reach(seen: Profile, state: int) -> float:
    """`steps_until_gone` of the last loss step's gradient; inf if never, NaN where it is not known."""
    level = seen.log10_grad[state]
    if seen.whole or arrives_elsewhere(seen) or not np.isfinite(level).any():
        return math.nan
    if np.isnan(level[:, 1:]).all():
        return math.nan  # the loss reads the first step alone, or a cut lies right before it
    gone = steps_until_gone(level)
    return math.inf if gone is None else float(gone)


def rms_over_units(log10_grad: np.ndarray) -> np.ndarray:
    """log10 of the rms over units of a profile (unit, back), (back,)."""
    known = log10_grad[~np.isnan(log10_grad).all(1)]
    if len(known) == 0:
        return np.full(log10_grad.shape[1], np.nan)
    square = torch.as_tensor(known * 2 * math.log(10))
    mean = torch.logsumexp(square, dim=0) - math.log(len(known))
    return (mean / (2 * math.log(10))).numpy()


def carriers(log10_grad: np.ndarray) -> tuple[int, int]:
    """How many units stay at a tenth of the level or above all the way back, and how many there are."""
    known = ~np.isnan(log10_grad)
    units = known.any(1)
    steady = units & np.where(known, log10_grad >= CARRIED_DECADES, True).all(1)
    return int(steady.sum()), int(units.sum())
