"""Lyapunov exponents by QR, and what happens to the leading direction step by step.

Letters: T timesteps, B sequences, S the state's width, k exponents, L a sequence's real steps, q the
leading direction of the QR iteration, W = W_hh, D_t = diag(φ'(a_t)), so that an RNN's A_t = D_t W: two
factors, whose growth along q is told apart. Processing order unless it says input time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.jacobians import DenseOperator, checked_stack
from gradflow.analyzer.loss import masked_median
from gradflow.analyzer.timeline import input_time
from gradflow.errors import InputError, must_be
from gradflow.limits import SEED, SHORT
from gradflow.recording.source import Operator
from gradflow.recording.track import Track


@dataclass(frozen=True)
class Growth:
    """ln |R_jj| of every step: what the QR iteration yields before any average."""

    log_growth: Tensor  # (T, B, k) nats; −inf for an exact zero, NaN where a step does not count
    counted: Tensor  # (T, B) true on steps past the burn-in that are real and no cut

    @property
    def exponents(self) -> Tensor:
        """Mean over the counted steps of every sequence, (B, k) nats per step."""
        counted = self.counted[..., None]
        total = torch.where(counted, self.log_growth, torch.zeros_like(self.log_growth)).sum(0)
        # 0/0 is NaN: a sequence none of whose steps counts has no rate
        return total / self.counted.sum(0)[:, None]


def burn_in(steps: int) -> int:
    """Steps left out at the front of a sequence: ⌈T/5⌉, none when T < 10.

    >>> burn_in(100), burn_in(11), burn_in(9)
    (20, 3, 0)
    """
    return math.ceil(steps / 5) if steps >= SHORT else 0


def lyapunov_spectrum(jacobians: Tensor, k: int | None = None) -> Tensor:
    """Largest k Lyapunov exponents of every sequence, λ_j = mean over t of ln |R_t,jj|.

    A_t Q_{t−1} = Q_t R_t (Benettin et al. 1980; Shimada & Nagashima 1979), from a seeded random
    basis, leaving out the first ⌈T/5⌉ steps (none when T < 10), up to a sequence's first NaN.

    Feed it the tangent maps of a flow and divide by the time of one step. Exponents of a finite
    product scatter; feed many stretches as sequences, and their spread gives the interval.

    Args:
        jacobians: (T, B, S, S), A_t of any map, floating point; computed with in float64.
        k: how many, S by default.

    Returns:
        (B, k) float64 nats per step, largest first; −inf where exact zeros leave nothing.

    Raises:
        InputError: another shape, or k out of 1 … S.

    >>> import math, torch, gradflow
    >>> doubling = torch.full((50, 1, 1, 1), 2.0, dtype=torch.float64)
    >>> round(gradflow.analyzer.lyapunov_spectrum(doubling).item(), 9) == round(math.log(2), 9)
    True
    """
    stack = checked_stack(jacobians).double()
    size = stack.shape[-1]
    if k is None:
        k = size
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= size:
        raise InputError(must_be("k", f"a whole number from 1 to {size}", repr(k), "lower it"))
    bad = stack.isnan().flatten(2).any(-1)  # (T, B)
    lengths = torch.where(bad.any(0), bad.int().argmax(0), len(stack))
    growth = log_growth(DenseOperator(stack), lengths, k)
    return growth.exponents.sort(dim=1, descending=True).values


def log_growth(
    operator: Operator,
    lengths: Tensor,
    k: int,
    *,
    cuts: Tensor | None = None,
    seed: int = SEED,
    leading: Leading | None = None,
    progress: Callable[[float], None] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Growth:
    """Run the QR iteration over all sequences at once, step by step.

    Every sequence starts from the same random basis, so identical sequences give identical rates;
    `leading`, pulled back to the first step, takes the place of the first of that basis.
    At a cut (T, B), in processing order, nothing of the past arrives: the step is left out, and a
    basis that had lost directions to exact zeros starts again.
    `watch` is shown the step and the leading direction (B, S) that it is about to push.
    """
    steps, batch, size = operator.length, operator.batch, operator.size
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(k, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(first.T)[0].T.to(operator.dtype)
    lengths = lengths.cpu()
    # sequence b skips its own ⌈L/5⌉ steps
    skipped = torch.tensor([burn_in(int(length)) for length in lengths])
    when = torch.arange(steps)[:, None]
    live = when < lengths
    if cuts is not None:
        live = live & ~cuts
    rows = basis.expand(batch, -1, -1).clone()
    if leading is not None:
        rows = _led_by(leading.at_the_start(operator, live), rows)
    begun = rows
    growth = torch.full((steps, batch, k), torch.nan, dtype=torch.float64)
    fresh = torch.ones(batch, dtype=torch.bool)  # whose basis is still the random one
    for t in range(steps):
        usable = live[t]
        if t and cuts is not None:  # what an exact zero took before a cut is not missed behind it
            lost = (cuts[t] & (when[t] < lengths)) & (rows == 0).all(-1).any(-1)
            rows[lost], fresh[lost] = begun[lost], True
        if not bool(usable.any()):
            continue
        if watch is not None:
            watch(t, rows[:, 0])
        pushed = operator.push(t, rows)
        logs, turned = _factor(pushed, rows, fresh)
        growth[t, usable] = logs[usable]
        fresh &= ~usable
        rows = torch.where(usable[:, None, None], turned, rows)
        if progress is not None:
            progress((t + 1) / steps)
    return Growth(growth, live & (when >= skipped))


@dataclass(frozen=True)
class Leading:
    """The direction of every sequence that is to grow first, and the step that is to push it."""

    rows: Tensor  # (B, S); 0 where there is none
    at: Tensor  # (B,)

    def at_the_start(self, operator: Operator, live: Tensor) -> Tensor:
        """(B, S) before the first step: pulled back through the steps (T, B) that count."""
        rows = self.rows.to(operator.dtype)
        for t in reversed(range(int(self.at.max()))):
            back = operator.pull(t, rows[:, None])[:, 0]
            length = torch.linalg.vector_norm(back, dim=-1)
            usable = live[t] & (t < self.at) & (length > 0) & torch.isfinite(length)
            safe = torch.where(usable, length, 1.0)
            rows = torch.where(usable[:, None], back / safe[:, None], rows)
        return rows


def _led_by(leading: Tensor, rows: Tensor) -> Tensor:
    """Orthonormal rows (B, k, S), the first along `leading`, the others from the basis given."""
    led = torch.cat([leading[:, None], rows[:, 1:]], 1)
    turned = torch.linalg.qr(led.mT)[0].mT
    given = (leading != 0).any(-1) & torch.isfinite(leading).all(-1)
    return torch.where(given[:, None, None], turned, rows)


def _factor(pushed: Tensor, old: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """ln |diag R| (B, k) and the rows of Q (B, k, S); a vanished direction is −inf and stays.

    One below rounding counts as vanished, but for a sequence's first step, when the basis is still
    random and large growth hides small.
    """
    finite = torch.isfinite(pushed).all(-1).all(-1)
    peak = pushed.abs().amax(-1).amax(-1)
    scale = torch.where(finite & (peak > 0), peak, torch.ones_like(peak))
    safe = torch.where(finite[:, None, None], pushed, old) / scale[:, None, None]
    if pushed.shape[1] == 1:
        lengths = torch.linalg.vector_norm(safe, dim=-1)
        divisor = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        # a direction that was cut keeps its zero, so that it cannot come back
        turned = safe / divisor[..., None]
    else:
        basis, triangle = torch.linalg.qr(safe.mT)
        lengths = triangle.diagonal(dim1=-2, dim2=-1).abs()
        real = _without_rounding(lengths, safe)
        alive = torch.where(fresh[:, None], lengths, real) > 0
        turned = torch.where(alive[..., None], basis.mT, torch.zeros_like(safe))
        lengths = real
    logs = lengths.double().log() + scale.double().log()[:, None]
    logs = torch.where(finite[:, None], logs, torch.full_like(logs, torch.nan))
    return logs, turned


def _without_rounding(lengths: Tensor, rows: Tensor) -> Tensor:
    """Zero the entries of R's diagonal that are nothing but rounding: an exact zero upstream."""
    own = torch.linalg.vector_norm(rows, dim=-1)
    noise = 4 * torch.finfo(rows.dtype).eps * rows.shape[-1] ** 0.5
    return torch.where(lengths > noise * own, lengths, torch.zeros_like(lengths))


FACTORS = ("weight", "activation")


class WeightGrowth:
    """Notes ln ‖W q_{t−1}‖ while the QR iteration goes over the steps of a vanilla RNN."""

    def __init__(self, track: Track) -> None:
        self.weight = track.weights["weight_hh"].detach().cpu().double()
        shape = (track.steps, track.batch)
        self.logs = torch.full(shape, torch.nan, dtype=torch.float64)  # NaN where q is gone

    def __call__(self, t: int, leading: Tensor) -> None:
        """Take the leading direction (B, S) that step t is about to push."""
        logs = torch.linalg.vector_norm(leading.double() @ self.weight.T, dim=-1).log()
        gone = (leading == 0).all(-1)
        self.logs[t] = torch.where(gone, torch.full_like(logs, math.nan), logs)


def watcher(track: Track) -> WeightGrowth | None:
    """A `WeightGrowth` for a vanilla RNN, None for any other cell."""
    vanilla = track.spec is not None and track.spec.vanilla
    return WeightGrowth(track) if vanilla else None


def rate_factors(growth: Growth, weight: WeightGrowth | None) -> np.ndarray:
    """The two summands of the leading direction's growth, (B, 2) nats per step, as in `FACTORS`.

    ‖D W q‖ = ‖W q‖ · ‖D W q‖/‖W q‖, so mean ln ‖A_t q_{t−1}‖ is mean ln ‖W q_{t−1}‖ and mean
    ln (‖D_t W q_{t−1}‖/‖W q_{t−1}‖) over the counted steps: what the weights do and what the
    activations do to the leading direction. ‖W‖₂ and max φ' only bound the two (Pascanu et al. 2013).
    NaN for other cells; a sequence that an exact zero cuts off has −inf in the factor that cut it.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(50, 2, 1))[0][-1].sum().backward()
    >>> data = gradflow.analyze(recording)["l0"].data
    >>> [round(value, 4) for value in data["rate_factor"].values.tolist()]  # ln 0.9, ln φ'(0)
    [-0.1054, 0.0]
    """
    rates = growth.exponents[:, 0].numpy()
    result = np.full((len(rates), len(FACTORS)), math.nan)
    if weight is None:
        return result
    logs = weight.logs[: len(growth.counted)]
    used = growth.counted & ~logs.isnan()
    total = torch.where(used, logs, torch.zeros_like(logs)).sum(0)
    result[:, 0] = (total / used.sum(0)).numpy()
    both = np.isneginf(result[:, 0])  # W itself sends the direction to zero
    with np.errstate(invalid="ignore"):
        result[:, 1] = np.where(
            both, math.nan, np.where(np.isneginf(rates), -math.inf, rates - result[:, 0])
        )
    return result


def step_growth(track: Track, growth: Growth) -> np.ndarray:
    """Median over sequences of the leading direction's ln growth at every step, (T,) input time.

    Only steps that count towards the rate (no burn-in, no cut, no padding), and the step at which an
    exact zero ends a sequence, −inf, wherever it lies; nothing is left to measure after it. With one
    sequence and no exact zero the mean over steps is the rate.
    """
    return masked_median(*_by_input_time(track, growth))


def _by_input_time(track: Track, growth: Growth) -> tuple[np.ndarray, np.ndarray]:
    """Growth (T, B), and which entries of it are shown."""
    leading = growth.log_growth[..., 0]
    zero = torch.isneginf(leading)
    earlier = zero.int().cumsum(0) - zero.int()  # exact zeros before this step
    shown = (growth.counted | zero) & (earlier == 0) & ~leading.isnan()
    values = torch.full((track.steps, track.batch), math.nan, dtype=torch.float64)
    mask = torch.zeros(track.steps, track.batch, dtype=torch.bool)
    index = input_time(track)[: len(leading)]
    columns = torch.arange(track.batch).expand_as(index)
    values[index, columns] = leading
    mask[index, columns] = shown
    return values.numpy(), mask.numpy()
