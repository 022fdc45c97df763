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

from gradflow.analyzer.blocks import Blocks, Sweep
from gradflow.analyzer.jacobians import DenseOperator, transposed_step
from gradflow.errors import InputError, must_be
from gradflow.limits import BLOCK_BYTES, EXACT_ROWS, NORM_KEPT, SEED
from gradflow.recording.source import Operator

# norm, 1 of the identity -> ln of it of every block, (B, n), from the blocks and their ln ‖V‖_F
NORMS: dict[str, Callable[[Blocks, Tensor], Tensor]] = {
    "spectral": lambda blocks, frobenius: blocks.spectral(),
    "rms": lambda blocks, frobenius: frobenius - math.log(blocks.size) / 2,
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
    seed: int = SEED,
) -> dict[str, Tensor]:
    """ln gain from each source to every target: norm -> (B, n, T) float64.

    With the `widths` of k states also "blocks", (k·k, B, n, T): ln (‖P_ba‖_F/√columns) of the blocks
    of the product, rows first ("hh", "hc", "ch", "cc" for h and c).

    Blocks take at most 768 MiB at a time, or those of one start.
    """
    starts = torch.as_tensor(list(sources), dtype=torch.long)
    shape = (operator.batch, len(starts), operator.length)
    gains = {norm: torch.full(shape, torch.nan, dtype=torch.float64) for norm in norms}
    if widths:
        gains["blocks"] = torch.full((len(widths) ** 2, *shape), torch.nan, dtype=torch.float64)
    rows = 2 * operator.size + 3 * NORM_KEPT  # two buffers, and what the spectral norms carry
    each = operator.batch * rows * operator.size * torch.finfo(operator.dtype).bits // 8
    many = max(1, BLOCK_BYTES // each)
    for first in range(0, len(starts), many):
        chosen = slice(first, first + many)
        sweep = Sweep(
            operator,
            starts[chosen],
            torch.Generator().manual_seed(seed),
            {name: values[..., chosen, :] for name, values in gains.items()},
            tuple(widths),
        )
        _run(sweep)
    return gains


def _run(sweep: Sweep) -> None:
    """Fill in the gains."""
    operator, sources = sweep.operator, sweep.sources
    places = {int(t): place for place, t in enumerate(sources)}
    for t in range(int(sources[0]), operator.length):
        _advance(sweep, t, places.get(t - 1))
        if t in places:
            _write_identity(sweep, places[t], t)
        _write(sweep, t)


def _advance(sweep: Sweep, t: int, begun: int | None) -> None:
    """Push every block through A_t; the block of a start one step back is A_tᵀ itself."""
    operator, blocks = sweep.operator, sweep.blocks
    if (
        begun is None and blocks.count * blocks.height < operator.size
    ):  # cheaper than to write A_t out
        if blocks.count:
            blocks.replace(operator.push(t, blocks.rows))
        return
    step = transposed_step(operator, t)
    if blocks.count:
        blocks.advance(step)
    if begun is not None:
        _begin(sweep, begun, step)


def _begin(sweep: Sweep, place: int, step: Tensor) -> None:
    batch, size, blocks = sweep.operator.batch, sweep.operator.size, sweep.blocks
    if blocks.count:  # the step before is much like this one
        guess = blocks.guess[:, -1:]
    else:
        shape = (batch, 1, size, NORM_KEPT)
        guess = torch.randn(shape, generator=sweep.generator, dtype=step.dtype)
    nothing = torch.zeros(batch, 1, size, dtype=torch.float64)
    blocks.add(step[:, None], nothing, torch.tensor([place]), guess)


def _write_identity(sweep: Sweep, place: int, t: int) -> None:
    """P(t←t) = I: all gains 1, and nothing from one state to another."""
    for name, values in sweep.result.items():
        if name == "blocks":
            k = len(sweep.widths)
            values[:, :, place, t] = torch.eye(k).double().log().view(-1, 1)
        else:
            values[:, place, t] = 0.0


def _write(sweep: Sweep, t: int) -> None:
    blocks = sweep.blocks
    if blocks.count == 0:
        return
    frobenius = blocks.rescale()
    for norm in sweep.result.keys() & NORMS.keys():
        sweep.result[norm][:, blocks.start, t] = NORMS[norm](blocks, frobenius)
    if "blocks" in sweep.result:
        columns = torch.tensor(sweep.widths, dtype=torch.float64).log() / 2
        each = blocks.between_states() - columns.view(1, -1, 1, 1)
        sweep.result["blocks"][:, :, blocks.start, t] = each.flatten(0, 1)


def spectral_work(rank: int, size: int) -> float:
    """Operations that one spectral norm of a (rank, size) block is worth."""
    if rank == 1:
        return 0.0
    if rank <= EXACT_ROWS:
        return 2.0 * rank**2 * size + 14.0 * rank**3 + 2e5
    return 350.0 * rank * size + 4e6
