"""What a probe reads of a layer without a single product of Jacobians: gradients, gates, norms, NaN.

Letters: T timesteps, B sequences, k steps back from the loss step, K of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.activity import between
from gradflow.analyzer.finite import Bad, bad_gradient, bad_state
from gradflow.analyzer.loss import back_index
from gradflow.analyzer.order import in_processing_order
from gradflow.history import LayerProbe, lag_grid
from gradflow.limits import GATE_CLOSED, GATE_OPEN, SATURATED
from gradflow.recording import Track


def pulse(track: Track) -> LayerProbe:
    """Read a layer's gradient profile, gates, norms and what is not finite.

    Args:
        track: one layer in one direction.

    Returns:
        Its numbers, named and with units as in `gradflow.history.fields`; no rate and no verdict.

    Raises:
        RecordingError: not even its states are to be had.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    >>> for weight in rnn.parameters():
    ...     _ = torch.nn.init.constant_(weight, 0.1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.ones(4, 2, 1))[0][-1].sum().backward()
    >>> found = pulse(recording["l0"])
    >>> found.profile.round(6).tolist(), found.direct.tolist()      # log10 of 0.1^k
    ([0.0, -1.0, -2.0, -3.0], [0.0, -inf, -inf, -inf])
    """
    lags = lag_grid(int(track.lengths.max()))
    profile, direct, levels = _profiles(track, lags)
    return LayerProbe(
        values={
            "steps": float(track.lengths.max()),
            "sequences": float(track.batch),
            "state_norm": _state_norm(track),
            "saturated": _saturated(track),
            "cuts": float(track.cuts.sum()),
        }
        | levels,
        gates=_gates(track),
        lags=lags,
        profile=profile,
        direct=direct,
    )


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


# ----------------------------------------------------------------------------------- gradients


def _profiles(track: Track, lags: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The profile of the last loss step and of the direct part at these lags, and their levels."""
    nothing = np.full(len(lags), math.nan)
    if not track.has_gradient:
        return nothing, nothing, {}
    grads = track.grads if _one_step_is_read(track) else track.last_grads or track.grads
    index, valid = back_index(track, grads)
    index, valid = index[lags], valid[lags]
    main = _aligned(track, grads[track.main_state], index, valid)
    profile, level = _over(main, main[0])
    if not track.has_direct:
        return profile, nothing, {"level": level}
    total = _aligned(track, track.grad_h, index, valid)
    direct, level_h = _over(_aligned(track, track.grad_h_direct, index, valid), total[0])
    return profile, direct, {"level": level, "level_h": level_h}


def _one_step_is_read(track: Track) -> bool:
    """Whether the whole loss is that of one step of each sequence, the last loss step alone."""
    reached = track.reached
    return reached is not None and int(reached.sum(0).max()) <= 1


def _aligned(track: Track, grads: Tensor, index: Tensor, valid: Tensor) -> np.ndarray:
    """(K,): log10 of the mean square over units and sequences, k steps back; NaN without a step."""
    ordered = in_processing_order(track, grads)
    gathered = ordered[index, torch.arange(ordered.shape[1])].double()  # (K, B, width)
    peak = torch.where(valid[..., None] & torch.isfinite(gathered), gathered.abs(), 0.0).amax()
    scale = float(peak) if 0 < float(peak) < math.inf else 1.0  # so that no square underflows
    squares = (gathered / scale).square().mean(-1)
    total = torch.where(valid, squares, 0.0).sum(1) / torch.where(
        valid.any(1), valid.sum(1), math.nan
    )
    return (total.log10() + 2 * math.log10(scale)).numpy()


def _over(squares: np.ndarray, level: float) -> tuple[np.ndarray, float]:
    """log10 of the rms over that at the loss step, and that; NaN where nothing finite is there."""
    if not math.isfinite(level):
        return np.full(len(squares), math.nan), float(level) / 2
    return (squares - level) / 2, float(level) / 2


# ------------------------------------------------------------------------------ states and gates


def _state_norm(track: Track) -> float:
    """‖s_t‖₂/√width of the main state, median over sequences, mean over steps."""
    state = track.states[track.main_state].detach()
    norms = torch.linalg.vector_norm(state.float(), dim=-1).cpu().double() / math.sqrt(
        state.shape[-1]
    )
    norms = torch.where(track.mask.cpu(), norms, math.nan)
    return float(norms.nanmedian(1).values.nanmean())


def _saturated(track: Track) -> float:
    """Share of the main state's tanh beyond ±0.95; NaN for what has no limits."""
    limits = {} if track.spec is None else track.spec.limits
    if track.main_state not in limits:
        return math.nan
    flat = limits[track.main_state](track.states, track.gates).detach().abs() > SATURATED
    return _share(flat, track.mask)


def _gates(track: Track) -> dict[str, dict[str, float]]:
    """Means, smallest and largest means of a unit, shares closed and open, of every gate."""
    found = {}
    unlimited, whole, count = between(track), bool(track.mask.all()), int(track.mask.sum())
    for name, gate in track.gates.items():
        values = gate.detach()
        real = values if whole else torch.where(track.mask[..., None], values, 0.0)
        units = real.flatten(0, 1).sum(0).double() / count
        numbers = {
            "gate_mean": float(units.mean()),
            "gate_low": float(units.min()),
            "gate_high": float(units.max()),
        }
        if name not in unlimited:
            numbers["gate_closed"] = _share(values < GATE_CLOSED, track.mask)
            numbers["gate_open"] = _share(values > GATE_OPEN, track.mask)
        found[name] = numbers
    return found


def _share(marks: Tensor, mask: Tensor) -> float:
    """Of the real entries of (T, B, width); where there is padding it is NaN, which no comparison marks."""
    real = int(mask.sum()) * marks.shape[-1]
    return int(torch.count_nonzero(marks)) / real if real else math.nan
