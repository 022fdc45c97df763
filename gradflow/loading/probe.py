"""Inputs to try a recurrent module with when there are weights and no data.

The input decides the rate, so a verdict from weights alone is tried under several probes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.errors import InputError, must_be, printable
from gradflow.limits import PROBE_BYTES
from gradflow.loading.recurrent import RecurrentModule


@dataclass(frozen=True)
class Probe:
    """One input for a recurrent module, and the direction its loss reads."""

    name: str  # in words, "inputs 0.1·N(0, 1)"
    inputs: Tensor  # (T, B, I), or (B, T, I) where the module is batch first
    r: Tensor  # (B, P·D), for the loss ⟨r, h_T⟩


def probes(
    recurrent: RecurrentModule, seq_len: int = 100, batch: int | None = None, seed: int = 0
) -> tuple[Probe, ...]:
    """Make the probes of a module: random tokens where an embedding is known, else three noises.

    The three are inputs 0, 0.1·N(0, 1) and N(0, 1). The same seed gives the same probes. Without a
    batch it has 16 sequences, or fewer where the module's input is very wide.
    Raises InputError for a length or batch below 1, and for ones too large for the memory.

    >>> from gradflow.loading.recurrent import from_tensors
    >>> (module,) = from_tensors(torch.nn.LSTM(3, 5).state_dict())
    >>> [probe.name for probe in probes(module, seq_len=7, batch=2)]
    ['inputs 0', 'inputs 0.1·N(0, 1)', 'inputs N(0, 1)']
    """
    _require_whole("--seed", seed, 0)
    batch = probe_batch(_bytes_of_one(recurrent, seq_len), seq_len, batch)
    generator = torch.Generator().manual_seed(seed)
    dtype = recurrent.dtype
    # Drawn first and in float64, so that r is the same for every probe, length and dtype.
    r = torch.randn(batch, recurrent.width, generator=generator, dtype=torch.float64).to(dtype)
    if recurrent.embedding is not None:
        size = recurrent.embedding.shape[0]
        tokens = torch.randint(size, (seq_len, batch), generator=generator)
        table = printable(recurrent.embedding_name or "the embedding")
        name = f"uniform random tokens through {table}"
        inputs = {name: recurrent.embedding[tokens].to(dtype)}
    else:
        shape = (seq_len, batch, recurrent.input_size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs = {
            "inputs 0": torch.zeros(shape, dtype=dtype),
            "inputs 0.1·N(0, 1)": (0.1 * noise).to(dtype),
            "inputs N(0, 1)": noise.to(dtype),
        }
    swap = recurrent.module.batch_first
    return tuple(
        Probe(name, x.transpose(0, 1).contiguous() if swap else x, r) for name, x in inputs.items()
    )


def _require_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        large = isinstance(value, int) and value >= 2**63
        expected = f"a whole number of at least {least}{' and below 2**63' if large else ''}"
        raise InputError(must_be(name, expected, repr(value), "leave it out for the default"))


def _bytes_of_one(recurrent: RecurrentModule, seq_len: int) -> int:
    """What one sequence of the probes takes, until it is analyzed."""
    item = recurrent.dtype.itemsize
    # Of a number of the input: noise in float64, three inputs, and copies that a recording makes and
    # reads in float64; or tokens, what they embed, and the same copies
    copies = recurrent.input_size * (8 + 2 * item)
    tokens = recurrent.embedding is not None
    step = copies + (
        8 + recurrent.input_size * item if tokens else recurrent.input_size * (8 + 3 * item)
    )
    step += recurrent.width * recurrent.layers * item  # what every layer puts out
    return seq_len * step + recurrent.width * 8


def probe_batch(each: int, seq_len: int, batch: int | None) -> int:
    """B of a probe: as asked for, else 16, or fewer where one sequence takes so many bytes.

    Raises InputError, before anything is made, for more than half of the machine's memory, and for
    more than `PROBE_BYTES` where the file alone asks for it.
    """
    _require_whole("--seq-len", seq_len, 1)
    _require_whole("--batch", 1 if batch is None else batch, 1)
    most, whose = (physical_memory() or 2**64) // 2, ", half of the memory here"
    if batch is None and most > PROBE_BYTES:
        most, whose = PROBE_BYTES, " unless --batch is given"
    chosen = (
        max(1, min(16, most // max(1, each))) if batch is None else batch
    )  # 16: design, section 8
    if each * chosen > most:
        raise InputError(
            f"the probe needs about {each * chosen / 2**30:,.1f} GiB for --seq-len {seq_len} and --batch "
            f"{chosen}, which must be at most {most / 2**30:,.1f} GiB{whose}; lower --seq-len or --batch"
        )
    return chosen


def physical_memory() -> int | None:
    """Bytes of memory in this machine, or None where the system does not say."""
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    return pages * size if pages > 0 and size > 0 else None


def probe_loss(
    output: Tensor, r: Tensor, batch_first: bool = False, bidirectional: bool = False
) -> Tensor:
    """The loss ⟨r, h_T⟩ summed over sequences, of an output (T, B, P·D).

    With two directions h_T is where each of them ends: the forward half at the last step, the
    reverse half at the first. Raises InputError where r does not fit.

    >>> probe_loss(torch.ones(7, 2, 5), torch.ones(2, 5))
    tensor(10.)
    """
    steps = output.transpose(0, 1) if batch_first else output
    if steps.ndim != 3 or steps.shape[1:] != r.shape:
        expected = f"(B, P·D) = {tuple(steps.shape[1:])} for this output"
        raise InputError(must_be("r", expected, tuple(r.shape), "make it with probes(...)"))
    final = steps[-1]
    if bidirectional:
        half = final.shape[-1] // 2
        final = torch.cat([final[..., :half], steps[0][..., half:]], dim=-1)
    return (r * final).sum()
