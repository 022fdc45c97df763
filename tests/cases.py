"""The matrix of recordings as data: what a user can ask of nn.RNN, nn.LSTM and nn.GRU.

A `Case` is a line of settings with an id; `build` makes the module and its inputs, `call` runs it
as a user would, `loss_of` is the loss, `seen` records it once and `oracle` unrolls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product

import oracles
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.recording import Recording

LSTM, GRU, TANH, RELU = "LSTM", "GRU", "RNN_TANH", "RNN_RELU"
CELLS = (LSTM, GRU, TANH, RELU)
LOSSES = ("all", "last", "final", "both", "middle")
INPUTS, HIDDEN = 3, 4


@dataclass(frozen=True)
class Case:
    """One way to call a recurrent module; the defaults are left out of the id."""

    cell: str
    layers: int = 1
    bidirectional: bool = False
    layout: str = "time_first"  # "time_first", "batch_first" or "unbatched"
    packed: str = "no"  # "no", "sorted" or "unsorted"
    proj: int = 0
    bias: bool = True
    dropout: float = 0.0
    initial: bool = False
    loss: str = "all"
    dtype: str = "float64"
    steps: int = 7
    batch: int = 3
    scale: float = 1.0  # of weight_hh
    seed: int = 0

    def __str__(self) -> str:
        words = [self.cell]
        for setting in fields(self)[1:]:
            value = getattr(self, setting.name)
            if value != setting.default:
                words.append(setting.name if value is True else f"{setting.name}={value}")
        return "-".join(words)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


@dataclass(frozen=True)
class Setup:
    """A module with its inputs, time first and in the user's order: x (T, B, I), lengths (B,)."""

    case: Case
    module: nn.RNNBase
    x: Tensor
    lengths: Tensor
    hx: tuple[Tensor, Tensor | None] | None  # (layers*D, B, P), (layers*D, B, H)


Returned = tuple[Tensor, Tensor, Tensor | None]  # padded output (T, B, D*P), h_n, c_n


def build(case: Case) -> Setup:
    """Make the module and its inputs from the case's seed."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    module = make_module(case)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            bound = 0.6 * (case.scale if "weight_hh" in name else 1.0)
            uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_((uniform * 2 - 1) * bound)
    batch = 1 if case.layout == "unbatched" else case.batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.torch_dtype)

    hx = None
    if case.initial:
        rows = case.layers * (2 if case.bidirectional else 1)
        h_0 = normal(rows, batch, case.proj or HIDDEN) * 0.5
        hx = (h_0, normal(rows, batch, HIDDEN) if case.cell == LSTM else None)
    return Setup(case, module, normal(case.steps, batch, INPUTS), lengths_of(case, batch), hx)


def make_module(case: Case) -> nn.RNNBase:
    """An nn.LSTM, nn.GRU or nn.RNN with the case's settings, in training mode."""
    options = {
        "num_layers": case.layers,
        "bidirectional": case.bidirectional,
        "batch_first": case.layout == "batch_first",
        "bias": case.bias,
        "dropout": case.dropout,
        "dtype": case.torch_dtype,
    }
    if case.cell == LSTM:
        return nn.LSTM(INPUTS, HIDDEN, proj_size=case.proj, **options)
    if case.cell == GRU:
        return nn.GRU(INPUTS, HIDDEN, **options)
    return nn.RNN(INPUTS, HIDDEN, nonlinearity=case.cell[4:].lower(), **options)


def lengths_of(case: Case, batch: int) -> Tensor:
    """Full lengths, or for packed input different ones, of which the longest is T."""
    if case.packed == "no":
        return torch.full((batch,), case.steps)
    generator = torch.Generator().manual_seed(case.seed)
    lengths = torch.randint(1, case.steps + 1, (batch,), generator=generator)
    lengths[batch // 2] = case.steps
    return lengths.sort(descending=True).values if case.packed == "sorted" else lengths


def user_input(setup: Setup) -> Tensor | PackedSequence:
    """x as the case's user passes it."""
    case, x = setup.case, setup.x
    if case.layout == "unbatched":
        return x[:, 0]
    if case.layout == "batch_first":
        x = x.transpose(0, 1).contiguous()
    if case.packed == "no":
        return x
    return pack_padded_sequence(
        x,
        setup.lengths,
        batch_first=case.layout == "batch_first",
        enforce_sorted=case.packed == "sorted",
    )


def call(setup: Setup, module: nn.Module | None = None) -> tuple[Returned, tuple[int, ...]]:
    """Run the module as a user would; also give the shape of the kernel's own output."""
    module = setup.module if module is None else module
    arguments: list[object] = [user_input(setup)]
    if setup.hx is not None:
        unbatched = setup.case.layout == "unbatched"
        states = [s[:, 0] if unbatched else s for s in setup.hx if s is not None]
        arguments.append(tuple(states) if len(states) == 2 else states[0])
    out, end = module(*arguments)
    h_n, c_n = end if isinstance(end, tuple) else (end, None)
    return _padded(setup, out, h_n, c_n)


def _padded(
    setup: Setup, out: Tensor | PackedSequence, h_n: Tensor, c_n: Tensor | None
) -> tuple[Returned, tuple[int, ...]]:
    """Bring what the module returned to time first, padded with 0, with a batch axis."""
    layout = setup.case.layout
    if isinstance(out, PackedSequence):
        shape = tuple(out.data.shape)
        out, _ = pad_packed_sequence(out, batch_first=layout == "batch_first")
        return (out.transpose(0, 1) if layout == "batch_first" else out, h_n, c_n), shape
    if layout == "unbatched":
        out, h_n, c_n = out[:, None], h_n[:, None], None if c_n is None else c_n[:, None]
    elif layout == "batch_first":
        out = out.transpose(0, 1)
    return (out, h_n, c_n), tuple(out.shape)


def loss_of(setup: Setup, returned: Returned) -> Tensor:
    """A loss with a different weight on every entry, and curved, of what the case reads."""
    output, h_n, c_n = returned
    kind, lengths = setup.case.loss, setup.lengths
    parts = []
    if kind in ("all", "both"):
        parts.append(output)
    if kind == "last":
        parts.append(output[lengths - 1, torch.arange(len(lengths))])
    if kind == "middle":
        parts.append(output[setup.case.steps // 2])
    if kind in ("final", "both"):
        parts += [h_n] if c_n is None else [h_n, c_n]
    loss = output.new_zeros(())
    for part in parts:
        generator = torch.Generator().manual_seed(77)
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
        loss = loss + (weight * part).sum() + 0.5 * (part**2).sum()
    return loss


# ---------------------------------------------------------------------------- recorded, unrolled


@dataclass(frozen=True)
class Seen:
    """One recorded run of a case."""

    setup: Setup
    recording: Recording
    returned: Returned
    loss: Tensor
    param_grads: Mapping[str, Tensor]
    dropout_masks: list[Tensor] | None


@lru_cache(maxsize=256)
def seen(case: Case) -> Seen:
    """Record one training step of the case (cached: tests only read it)."""
    setup = build(case)
    torch.manual_seed(5)
    rng_state = torch.get_rng_state()
    with gradflow.record(setup.module) as recording:
        returned, shape = call(setup)
        loss = loss_of(setup, returned)
        loss.backward()
    grads = {n: p.grad for n, p in setup.module.named_parameters() if p.grad is not None}
    masks = padded_masks(setup, rng_state, shape)
    return Seen(setup, recording, returned, loss.detach(), grads, masks)


@lru_cache(maxsize=256)
def oracle(case: Case) -> oracles.Unrolled:
    """The case, unrolled in float64 (cached)."""
    setup = build(case)
    torch.manual_seed(5)
    rng_state = torch.get_rng_state()
    _, shape = call(setup)
    return unroll(setup, padded_masks(setup, rng_state, shape))


@lru_cache(maxsize=256)
def oracle_grads(case: Case) -> dict[str, oracles.LayerGrads]:
    """The case's gradients, by autograd on the unrolled graph (cached)."""
    unrolled = oracle(case)
    return oracles.pull_back(unrolled, arriving(case))


@lru_cache(maxsize=256)
def oracle_last(case: Case, reverse: bool) -> dict[str, oracles.LayerGrads]:
    """The same for each sequence's last loss step alone, or its first for a reverse direction."""
    lengths = build(case).lengths
    one = oracles.keep_one_step(arriving(case), lengths, case.bidirectional, last=not reverse)
    return oracles.pull_back(oracle(case), one)


@lru_cache(maxsize=256)
def oracle_jacobians(case: Case) -> dict[str, Tensor]:
    """Dense step Jacobians of every layer and direction, (T, B, S, S)."""
    return {name: oracles.dense_jacobians(layer) for name, layer in oracle(case).layers.items()}


@lru_cache(maxsize=256)
def arriving(case: Case) -> oracles.Grads:
    """The gradients that reach what the module returned."""
    unrolled = oracle(case)
    returned = (unrolled.output, unrolled.h_n, unrolled.c_n)
    return oracles.returned_grads(unrolled, loss_of(build(case), returned))


def unroll(setup: Setup, masks: list[Tensor] | None) -> oracles.Unrolled:
    """The unrolled oracle on a setup."""
    return oracles.unroll(
        setup.module, setup.x, lengths=setup.lengths, hx=setup.hx, dropout_masks=masks
    )


def padded_masks(
    setup: Setup, rng_state: Tensor, kernel_shape: tuple[int, ...]
) -> list[Tensor] | None:
    """Dropout factors between layers, (T, B, D*P) each, from the RNG state before the call."""
    case = setup.case
    if not case.dropout or case.layers == 1:
        return None
    factors = oracles.dropout_factors(setup.module, rng_state, kernel_shape, case.torch_dtype)
    if case.packed == "no":
        return factors
    packed = user_input(setup)
    assert isinstance(packed, PackedSequence)
    return [
        pad_packed_sequence(
            PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        )[0]
        for data in factors
    ]


# ------------------------------------------------------------------------------------- the list


def _cases() -> list[Case]:
    listed = [Case(cell, loss=loss) for cell, loss in product(CELLS, ("all", "last"))]
    listed += [
        Case(cell, loss=loss) for cell, loss in product((LSTM, GRU), ("final", "both", "middle"))
    ]
    listed += [
        Case(cell, layers=2, bidirectional=True, loss="both", initial=True) for cell in CELLS
    ]
    listed += [
        Case(
            cell,
            layers=2,
            bidirectional=True,
            packed="unsorted",
            loss=loss,
            initial=True,
            seed=seed,
        )
        for seed, (cell, loss) in enumerate(product(CELLS, ("last", "final")))
    ]
    listed += [
        Case(cell, packed="sorted", layout=layout, loss="all", batch=4, seed=3)
        for cell, layout in product((LSTM, GRU, TANH), ("time_first", "batch_first"))
    ]
    listed += [
        Case(cell, layers=3, dropout=0.4, loss=loss, packed=packed, layout="batch_first", batch=4)
        for (cell, loss), packed in zip(
            product((LSTM, GRU, TANH), ("last", "both")), ("no", "unsorted") * 3, strict=True
        )
    ]
    listed += [
        Case(cell, layers=2, layout="unbatched", bidirectional=bidirectional, initial=bidirectional)
        for cell, bidirectional in product((LSTM, GRU, RELU), (False, True))
    ]
    listed += [Case(cell, bias=False, layers=2, loss="last") for cell in CELLS]
    listed += [Case(cell, dtype="float32", layers=2, loss="last", initial=True) for cell in CELLS]
    listed += [
        Case(LSTM, proj=2, loss="last"),
        Case(LSTM, proj=3, layers=2, bidirectional=True, loss="both", initial=True),
        Case(LSTM, proj=2, layers=2, bidirectional=True, packed="unsorted", initial=True, seed=4),
        Case(
            LSTM, proj=2, layers=2, dropout=0.5, bidirectional=True, packed="unsorted", bias=False
        ),
        Case(LSTM, proj=1, layout="unbatched", loss="final", bias=False),
        Case(LSTM, proj=2, dtype="float32", bidirectional=True, loss="both"),
        Case(GRU, layers=2, bidirectional=True, loss="middle", packed="unsorted", batch=5, seed=2),
        Case(LSTM, layers=2, bidirectional=True, loss="middle", batch=5, dropout=0.3),
        Case(LSTM, layers=2, bidirectional=True, dropout=0.3, packed="sorted", dtype="float32"),
        # gradients no absolute tolerance can see: vanished to 1e-250, exploded to 1e+100
        Case(TANH, steps=100, scale=1e-3, loss="last", batch=2),
        Case(RELU, steps=60, scale=40.0, loss="last", batch=2),
        Case(TANH, steps=40, scale=1e-2, loss="last", batch=2, dtype="float32"),
        Case(LSTM, steps=120, scale=2.0, loss="last", batch=2, packed="unsorted"),
        Case(GRU, steps=120, layers=2, scale=2.0, loss="last", batch=2),
    ]
    return listed


CASES = _cases()
EXACT_CASES = [case for case in CASES if case.dtype == "float64"]
