"""ln gain of the products P(t'←t) = A_t' … A_{t+1} for many starts at once.

Letters: T timesteps, B sequences, S the state's width, t source, t' target, k = t' − t lag, all in
processing order. All starts advance together: at step t' one matrix product pushes the blocks of
every start t < t'. A block is carried as (matrix, log-scale), so nothing under- or overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradflow.analyzer.blocks import SPEED, Blocks, Sweep, known, log_dropped, truncate
from gradflow.analyzer.jacobians import DenseOperator, transposed_step
from gradflow.errors import InputError, must_be
from gradflow.limits import (
    BLOCK_BYTES,
    EXACT_ROWS,
    NORM_KEPT,
    RANK_CALL_SECONDS,
    SEED,
    SKETCH_FIRST,
)
from gradflow.recording.source import Operator

# norm, 1 of the identity -> ln of it of every block, (B, n), from ln ‖V‖_F and ln ‖what was dropped‖_F
NORMS: dict[str, Callable[[Blocks, Tensor, Tensor | None], Tensor]] = {
    "spectral": lambda level, frobenius, dropped: known(level.spectral(), dropped),
    "rms": lambda level, frobenius, dropped: frobenius - math.log(level.size) / 2,
}


def log_gain_map(jacobians: Tensor, norm: str = "spectral") -> Tensor:
    """ln gain of every product P(t'←t) = A_t' … A_{t+1}.

    Spectral is ln ‖P‖₂, exact for S ≤ 64 and beyond within 1e-4; rms is ln ‖P‖_F/√S, exact.
    The map is not ∂h_t'/∂h_t of an LSTM unless the Jacobians are those of the joint state (h, c).

    Args:
        jacobians: (T, B, S, S), A_t in processing order; padded steps are NaN matrices.
        norm: "spectral" or "rms".

    Returns:
        (B, T, T) float64 nats: [b, t, t'] is 0 at t' = t, NaN where t' < t or at padding, −inf
        where the product is exactly 0. A at index 0 leads into s_0 and takes part in none.

    Raises:
        InputError: another shape or another norm.

    >>> import math, torch, gradflow
    >>> decay = torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)
    >>> gradflow.analyzer.log_gain_map(decay)[0, 0].div(math.log(2)).round(decimals=9).tolist()
    [0.0, -1.0, -2.0, -3.0]
    """
    if norm not in NORMS:
        raise InputError(must_be("norm", " or ".join(map(repr, NORMS)), repr(norm), "choose one"))
    operator = _computable(DenseOperator(jacobians))
    result = log_gains(operator, range(operator.length), (norm,))[norm]
    padded = jacobians.isnan().flatten(2).any(-1).T  # (B, T)
    result.diagonal(dim1=1, dim2=2)[padded] = torch.nan
    return result


def _computable(operator: DenseOperator) -> DenseOperator:
    if operator.dtype in (torch.float32, torch.float64):
        return operator
    return DenseOperator(operator.jacobians.float())  # no half-precision decompositions on a CPU


def log_gains(
    operator: Operator,
    sources: Iterable[int],
    norms: Iterable[str] = tuple(NORMS),
    *,
    widths: Sequence[int] = (),
    sketch: bool = False,
    seed: int = SEED,
    spend: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """ln gain from each source to every target: norm -> (B, n, T) float64.

    With the `widths` of k states also "blocks", (k·k, B, n, T): ln (‖P_ba‖_F/√columns) of the blocks
    of the product, rows first ("hh", "hc", "ch", "cc" for h and c).

    With `sketch` a block is truncated as it loses rank, dropping at most SKETCH_TRUNCATION of its
    norm a time; what was dropped is followed, and a gain is NaN where that may be more than 5 % of
    it. A gain is then too small by at most (0.05)²/2 in ln, a block's by at most 5 %, both as
    estimated by two random vectors a start.

    Blocks take at most 768 MiB at a time, or those of one start. `spend` is told the predicted
    seconds of each step.
    """
    starts = torch.as_tensor(list(sources), dtype=torch.long)
    shape = (operator.batch, len(starts), operator.length)
    gains = {norm: torch.full(shape, torch.nan, dtype=torch.float64) for norm in norms}
    if widths:
        gains["blocks"] = torch.full((len(widths) ** 2, *shape), torch.nan, dtype=torch.float64)
    rows = 2 * operator.size + 3 * NORM_KEPT  # two buffers, and what the spectral norms carry
    each = operator.batch * rows * operator.size * torch.finfo(operator.dtype).bits // 8
    many = len(starts) if sketch else max(1, BLOCK_BYTES // each)
    waiting = [slice(first, first + many) for first in range(0, len(starts), many)]
    while waiting:
        chosen = waiting.pop()
        sweep = Sweep(
            operator,
            starts[chosen],
            sketch,
            torch.Generator().manual_seed(seed),
            {name: values[..., chosen, :] for name, values in gains.items()},
            tuple(widths),
        )
        if not _run(sweep, spend):  # blocks that keep their rank: fewer starts at a time
            middle = chosen.start + (len(starts[chosen]) + 1) // 2
            waiting += [slice(chosen.start, middle), slice(middle, chosen.stop)]
    return gains


def _run(sweep: Sweep, spend: Callable[[float], None] | None) -> bool:
    """Fill in the gains; False, and only some of them, where the blocks outgrow the memory."""
    operator, sources = sweep.operator, sweep.sources
    places = {int(t): place for place, t in enumerate(sources)}
    for t in range(int(sources[0]), operator.length):
        before = sweep.spent
        _advance(sweep, t, places.get(t - 1))
        if t in places:
            _write_identity(sweep, places[t], t)
        dropped = log_dropped(sweep)
        for level in sweep.levels.values():
            _write(sweep, level, t, dropped)
        if sweep.sketch:
            truncate(sweep, t)
        if spend is not None:
            spend(sweep.spent - before)
        if len(sources) > 1 and sum(level.bytes for level in sweep.live) > BLOCK_BYTES:
            return False
    return True


def _advance(sweep: Sweep, t: int, begun: int | None) -> None:
    """Push every block through A_t; the block of a start one step back is A_tᵀ itself."""
    operator, live = sweep.operator, sweep.live
    rows = sum(level.count * level.height for level in live)
    if begun is None and rows < operator.size:  # cheaper than to write A_t out
        if live:
            pushed = operator.push(t, torch.cat([level.rows for level in live], 1))
            shares = pushed.split([level.count * level.height for level in live], 1)
            for level, share in zip(live, shares, strict=True):
                level.replace(share)
    else:
        step = transposed_step(operator, t)
        rows += operator.size
        for level in live:
            level.advance(step)
        if begun is not None:
            _begin(sweep, begun, step)
    work = 2.0 * rows * operator.size**2 * operator.batch
    sweep.spent += work / SPEED[operator.dtype] + RANK_CALL_SECONDS


def _begin(sweep: Sweep, place: int, step: Tensor) -> None:
    batch, size = sweep.operator.batch, sweep.operator.size
    level = sweep.level(size, 4 if sweep.sketch else len(sweep.sources))
    if level.count:  # the step before is much like this one
        guess = level.guess[:, -1:]
    else:
        shape = (batch, 1, size, NORM_KEPT)
        guess = torch.randn(shape, generator=sweep.generator, dtype=step.dtype)
    level.add(
        step[:, None],
        torch.zeros(batch, 1, size, dtype=torch.float64),
        torch.tensor([place]),
        sweep.sources[place : place + 1] + SKETCH_FIRST,
        guess,
    )


def _write_identity(sweep: Sweep, place: int, t: int) -> None:
    """P(t←t) = I: all gains 1, and nothing from one state to another."""
    for name, values in sweep.result.items():
        if name == "blocks":
            k = len(sweep.widths)
            values[:, :, place, t] = torch.eye(k).double().log().view(-1, 1)
        else:
            values[:, place, t] = 0.0


def _write(sweep: Sweep, level: Blocks, t: int, dropped: Tensor | None) -> None:
    if level.count == 0:
        return
    sweep.spent += RANK_CALL_SECONDS
    operator, places = sweep.operator, level.start
    lost = None if dropped is None else dropped[:, places]
    frobenius = known(level.rescale(), lost)
    for norm in sweep.result.keys() & NORMS.keys():
        sweep.result[norm][:, places, t] = NORMS[norm](level, frobenius, lost)
    if "spectral" in sweep.result:
        work = spectral_work(level.rank, level.size) * level.count * operator.batch
        sweep.spent += work / SPEED[torch.float64]  # small matrices: no faster in float32
    if "blocks" in sweep.result:
        columns = torch.tensor(sweep.widths, dtype=torch.float64).log() / 2
        each = known(level.between_states(), lost) - columns.view(1, -1, 1, 1)
        sweep.result["blocks"][:, :, places, t] = each.flatten(0, 1)
        work = 2.0 * level.rank**2 * level.size if level.mixed else 0.0
        sweep.spent += work * level.count * operator.batch / SPEED[operator.dtype]


def spectral_work(rank: int, size: int) -> float:
    """Operations that one spectral norm of a (rank, size) block is worth."""
    if rank == 1:
        return 0.0
    if rank <= EXACT_ROWS:
        return 2.0 * rank**2 * size + 14.0 * rank**3 + 2e5
    return 350.0 * rank * size + 4e6
