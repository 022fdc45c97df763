"""What a probe reads of a layer without a single product of Jacobians: gradients, gates, norms, NaN.

Letters: T timesteps, B sequences, k steps back from the loss step, K of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradflow.analyzer.activity import between
from gradflow.analyzer.loss import back_index
from gradflow.analyzer.timeline import Bad, bad_gradient, bad_state, in_processing_order
from gradflow.history import LayerProbe
from gradflow.limits import GATE_CLOSED, GATE_OPEN, SATURATED
from gradflow.recording.track import Track


def broken(track: Track) -> tuple[Bad, str] | None:
    """The first NaN or Inf of a layer's states, else of its gradients, and which of the two it is."""
    found = None if _all_finite(track, track.seen_states) else bad_state(track)
    if found is not None:
        return found, "state"
    if not track.has_gradient or _all_finite(track, track.grads):
        return None
    found = bad_gradient(track)
    return None if found is None else (found, "gradient")


def _all_finite(track: Track, tensors: dict[str, Tensor]) -> bool:
    """Whether every real entry is, looked at quickly."""
    if all(math.isfinite(float(values.sum())) for values in tensors.values()):
        return True
    real = track.mask[..., None]
    return all(bool(torch.isfinite(v).logical_or(~real).all()) for v in tensors.values())


@dataclass(frozen=True)
class Squares:
    """Squares of gradients at K steps back from the loss, over the square of the largest entry."""

    scale: float  # that entry; 1 where it is 0 or not finite
    sums: Tensor  # (K,) over sequences, of the mean over units
    counts: Tensor  # (K,) how many sequences have such a step


@dataclass(frozen=True)
class GateSums:
    """What the values of a gate add up to."""

    units: Tensor  # (H,) sums over real steps and sequences
    count: int  # of real steps of all sequences
    closed: int | None  # values below 0.05; None where a gate has no limits
    opened: int | None  # above 0.95


@dataclass(frozen=True)
class LayerSums:
    """What a pulse is made from: small sums, which processes that train together can add."""

    steps: int  # T of the longest sequence
    sequences: int
    cuts: int
    norms: Tensor  # (T, B) ‖s_t‖₂/√width of the main state, NaN at padding
    entries: int  # of the main state, real ones
    saturated: int | None  # of its tanh beyond ±0.95; None of what has no limits
    gates: dict[str, GateSums]
    main: Squares | None  # of the main state's gradient; None without a gradient
    total: Squares | None  # of the total ∂L/∂h; None where no direct part is known
    direct: Squares | None  # of the direct part


def layer_sums(track: Track, lags: np.ndarray) -> LayerSums:
    """What one process saw of a layer.

    Args:
        track: one layer in one direction.
        lags: (K,) steps back from the loss; those that it does not have count for nothing.
    """
    main = total = direct = None
    if track.has_gradient:
        grads = track.grads if _one_step_is_read(track) else track.last_grads or track.grads
        index, valid = back_index(track, grads)
        inside = torch.from_numpy(lags[lags < len(index)])
        index, valid = index[inside], valid[inside]
        main = _squares(track, grads[track.main_state], index, valid, len(lags))
        if track.has_direct:
            total = _squares(track, track.grad_h, index, valid, len(lags))
            direct = _squares(track, track.grad_h_direct, index, valid, len(lags))
    real = int(track.mask.sum())
    return LayerSums(
        steps=int(track.lengths.max()),
        sequences=track.batch,
        cuts=int(track.cuts.sum()),
        norms=_state_norms(track),
        entries=real * int(track.states[track.main_state].shape[-1]),
        saturated=_saturated(track),
        gates=_gates(track, real),
        main=main,
        total=total,
        direct=direct,
    )


def pulse_of(parts: Sequence[LayerSums], lags: np.ndarray) -> LayerProbe:
    """The pulse of a layer from what several processes saw of it, or one.

    Args:
        parts: of each.
        lags: (K,) as they were given to `layer_sums`.

    Returns:
        Its numbers, named and with units as in `gradflow.history.fields`; no rate and no verdict.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    >>> for weight in rnn.parameters():
    ...     _ = torch.nn.init.constant_(weight, 0.1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.ones(4, 2, 1))[0][-1].sum().backward()
    >>> lags = np.arange(4)
    >>> found = pulse_of([layer_sums(recording["l0"], lags)], lags)
    >>> found.profile.round(6).tolist(), found.direct.tolist()      # log10 of 0.1^k
    ([0.0, -1.0, -2.0, -3.0], [0.0, -inf, -inf, -inf])
    """
    main, total = (_log_means([getattr(part, n) for part in parts]) for n in ("main", "total"))
    direct = _log_means([part.direct for part in parts])
    nothing, levels = np.full(len(lags), math.nan), {}
    profile = along = nothing
    if main is not None:
        profile, levels["level"] = _over(main, main[0])
    if total is not None and direct is not None:
        along, levels["level_h"] = _over(direct, total[0])
    marks = [part.saturated for part in parts if part.saturated is not None]
    return LayerProbe(
        values={
            "steps": float(max(part.steps for part in parts)),
            "sequences": float(sum(part.sequences for part in parts)),
            "state_norm": _state_norm([part.norms for part in parts]),
            "saturated": _share(marks, sum(part.entries for part in parts)),
            "cuts": float(sum(part.cuts for part in parts)),
        }
        | levels,
        gates=_gate_numbers([part.gates for part in parts]),
        lags=lags,
        profile=profile,
        direct=along,
    )


# ----------------------------------------------------------------------------------- gradients


def _one_step_is_read(track: Track) -> bool:
    """Whether the whole loss is that of one step of each sequence, the last loss step alone."""
    reached = track.reached
    return reached is not None and int(reached.sum(0).max()) <= 1


def _squares(track: Track, grads: Tensor, index: Tensor, valid: Tensor, lags: int) -> Squares:
    ordered = in_processing_order(track, grads)
    gathered = ordered[index, torch.arange(ordered.shape[1])].double()  # (K, B, width)
    peak = torch.where(valid[..., None] & torch.isfinite(gathered), gathered.abs(), 0.0).amax()
    scale = float(peak) if 0 < float(peak) < math.inf else 1.0  # so that no square underflows
    squares = (gathered / scale).square().mean(-1)
    sums, counts = torch.zeros(lags, dtype=torch.float64), torch.zeros(lags, dtype=torch.float64)
    sums[: len(index)] = torch.where(valid, squares, 0.0).sum(1)
    counts[: len(index)] = valid.sum(1).double()
    return Squares(scale, sums, counts)


def _log_means(parts: Sequence[Squares | None]) -> np.ndarray | None:
    """(K,): log10 of the mean square over units and sequences; NaN without a step; None of nothing."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    scale = max(part.scale for part in known)
    sums = torch.stack([part.sums * (part.scale / scale) ** 2 for part in known]).sum(0)
    counts = torch.stack([part.counts for part in known]).sum(0)
    means = sums / torch.where(counts > 0, counts, math.nan)
    return (means.log10() + 2 * math.log10(scale)).numpy()


def _over(squares: np.ndarray, level: float) -> tuple[np.ndarray, float]:
    """log10 of the rms over that at the loss step, and that; NaN where nothing finite is there."""
    if not math.isfinite(level):
        return np.full(len(squares), math.nan), float(level) / 2
    return (squares - level) / 2, float(level) / 2


# ------------------------------------------------------------------------------ states and gates


def _state_norms(track: Track) -> Tensor:
    """(T, B): ‖s_t‖₂/√width of the main state, NaN at padding."""
    state = track.states[track.main_state].detach()
    norms = torch.linalg.vector_norm(state.float(), dim=-1).cpu().double() / math.sqrt(
        state.shape[-1]
    )
    return torch.where(track.mask.cpu(), norms, math.nan)


def _state_norm(parts: Sequence[Tensor]) -> float:
    """Median over sequences, mean over steps."""
    steps = max(map(len, parts))
    norms = [F.pad(part, (0, 0, 0, steps - len(part)), value=math.nan) for part in parts]
    return float(torch.cat(norms, 1).nanmedian(1).values.nanmean())


def _saturated(track: Track) -> int | None:
    """Entries of the main state's tanh beyond ±0.95; None of what has no limits."""
    limits = {} if track.spec is None else track.spec.limits
    if track.main_state not in limits:
        return None
    flat = limits[track.main_state](track.states, track.gates).detach().abs() > SATURATED
    return int(torch.count_nonzero(flat))


def _gates(track: Track, count: int) -> dict[str, GateSums]:
    found = {}
    unlimited, whole = between(track), bool(track.mask.all())
    for name, gate in track.gates.items():
        values = gate.detach()
        real = values if whole else torch.where(track.mask[..., None], values, 0.0)
        # padding is NaN, which no comparison marks
        marks = [values < GATE_CLOSED, values > GATE_OPEN] if name not in unlimited else []
        counts: list[int | None] = [int(torch.count_nonzero(one)) for one in marks]
        units = real.flatten(0, 1).sum(0).double().cpu()
        found[name] = GateSums(units, count, *(counts or [None, None]))
    return found


def _gate_numbers(parts: Sequence[dict[str, GateSums]]) -> dict[str, dict[str, float]]:
    """Means, smallest and largest means of a unit, shares closed and open, of every gate."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        each = [part[name] for part in parts if name in part]
        units = torch.stack([one.units for one in each]).sum(0) / sum(one.count for one in each)
        numbers = {
            "gate_mean": float(units.mean()),
            "gate_low": float(units.min()),
            "gate_high": float(units.max()),
        }
        entries = sum(one.count for one in each) * len(units)
        closed = [one.closed for one in each if one.closed is not None]
        opened = [one.opened for one in each if one.opened is not None]
        if closed and opened and math.isfinite(numbers["gate_mean"]):
            numbers["gate_closed"] = _share(closed, entries)
            numbers["gate_open"] = _share(opened, entries)
        found[name] = numbers
    return found


def _share(marks: Sequence[int], entries: int) -> float:
    return sum(marks) / entries if marks and entries else math.nan
