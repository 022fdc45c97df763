"""Weighted means: a numerator and a denominator of one decay, RWKV's and the mLSTM's.

RWKV-4 (Peng et al. 2023), by channel:  s_t = e^{−e^w} s_{t−1} + e^{k_t} (v_t, 1), and
    y_t = (s_{t−1} + e^{u + k_t} (v_t, 1)), its first entry divided by its second.
mLSTM (Beck et al. 2024), by head:      S_t = f_t S_{t−1} + i_t k_t (v_t, 1)ᵀ, f = σ(f̃), i = e^{ĩ}, and
    y_t = C_tᵀ q_t / (max(|n_tᵀ q_t|, 1) + ε e^{m_t}), C the columns of S but the last, n the last.

Both packages carry the states divided by e^{m_t} and m_t beside them, so that no exponential overflows.
m is made of the gates alone, m_t = max(ln f_t + m_{t−1}, ĩ_t), and but for the small ε it cancels: the
states here are those of the equations above. Where their exponents are above `HIGHEST` they are divided
by one number for all steps of a sequence, which changes neither y nor any gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.cells.linear import LinearSteps
from gradflow.hooks.linear.kinds.tensors import time_first, time_third, wide
from gradflow.hooks.linear.registry import Entry, Seen, Unread

HIGHEST = 40.0  # an exponent that leaves room for a sum of many steps in float32


def _too_high(exponents: Tensor) -> Tensor:
    """What to take off all exponents of a sequence: 0 unless they are too high. Time is the first axis."""
    return (exponents.amax(0) - HIGHEST).clamp_min(0.0)


def _with_one(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], -1)


def rwkv(seen: Seen) -> dict[str, Any]:
    """Fields of `Scanned` of RWKV-4's attention: key and value (B, T, D), w and u (D,)."""
    given = seen.given
    batch, steps, channels = given["key"].shape
    before = given.get("state")

    def make() -> LinearSteps:
        key, value = time_first(wide(given["key"])), time_first(wide(given["value"]))
        decay = torch.exp(-torch.exp(wide(given["time_decay"])))
        ahead = key + wide(given["time_first"])
        high = _too_high(torch.stack([key, ahead]).amax(0))
        pairs = _with_one(value.unsqueeze(-1))  # (T, B, D, 2)
        first = pairs.new_zeros(batch, channels, 2)
        if before is not None:
            above, below, exponent = (wide(each) for each in before)
            first = torch.stack([above, below], -1) * torch.exp(exponent - high).unsqueeze(-1)

        def read(states: Tensor) -> Tensor:
            earlier = torch.cat([first.unsqueeze(0), states[:-1]])
            sums = earlier + torch.exp(ahead - high).unsqueeze(-1) * pairs
            return time_first(sums[..., 0] / sums[..., 1])

        return LinearSteps(
            shape=(channels, 2),
            decay=decay.view(-1, 1).expand(steps, batch, channels, 1),
            write=(torch.exp(key - high).unsqueeze(-1), pairs),
            initial=None if before is None else first,
            read=read,
        )

    notes: tuple[str, ...] = ()
    if before is not None:
        notes = (
            "its state came from the call before as three tensors: where a gradient goes on through "
            "them it is not followed, and the totals are those of this call",
        )
    return {
        "steps": steps,
        "batch": batch,
        "shape": (channels, 2),
        "make": make,
        "precision": torch.float32,
        "output": seen.result(0),
        "notes": notes,
    }


def mlstm(names: str, *, keys: bool, start: float) -> Callable[[Seen], dict[str, Any]]:
    """The mapping of an mLSTM whose q, k, v, ĩ and f̃ have these names: (B, H, T, d), (B, H, T[, 1]).

    d_k^{−1/2} is on the keys, or else on the queries. The stabiliser m starts from ``start``.
    """

    def read(seen: Seen) -> dict[str, Any]:
        given = seen.given
        query, key, value, into, forget = (given[name] for name in names.split())
        batch, heads, steps, d_k = key.shape
        d_v = value.shape[-1]

        def make() -> LinearSteps:
            q, k, v = (time_third(wide(x)) for x in (query, key, value))
            i, f = (time_third(wide(x).reshape(batch, heads, steps)) for x in (into, forget))
            q, k = (q, k / math.sqrt(d_k)) if keys else (q / math.sqrt(d_k), k)
            kept = F.logsigmoid(f).cumsum(0)
            stabiliser = kept + (i - kept).cummax(0).values.clamp_min(start)
            high = _too_high(i)
            lowest = torch.exp(-high)[..., None]
            small = given["eps"] * torch.exp(stabiliser - high)[..., None]

            def read_states(states: Tensor) -> Tensor:
                sums = (states * q.unsqueeze(-1)).sum(-2)  # (T, B, H, d_v + 1)
                above, below = sums[..., :-1], sums[..., -1:]
                return (above / (torch.maximum(below.abs(), lowest) + small)).movedim(0, 2)

            return LinearSteps(
                shape=(heads, d_k, d_v + 1),
                decay=torch.sigmoid(f)[..., None, None],
                write=(
                    torch.exp(i - high)[..., None, None],
                    k.unsqueeze(-1),
                    _with_one(v).unsqueeze(-2),
                ),
                read=read_states,
            )

        return {
            "steps": steps,
            "batch": batch,
            "shape": (heads, d_k, d_v + 1),
            "make": make,
            "output": seen.result(0),
        }

    return read


def mlstm_in_chunks(names: str) -> Callable[[Seen], dict[str, Any]]:
    """The mapping of an mLSTM in chunks: m starts from 0, and d_k^{−1/2} is on the queries."""
    inner = mlstm(names, keys=False, start=0.0)

    def read(seen: Seen) -> dict[str, Any]:
        if any(seen.given[name] is not None for name in _FIRST.split()):
            raise Unread(
                "a first state that is given, divided by its stabiliser, is not understood"
            )
        precision = seen.given.get("autocast_kernel_dtype") or torch.float32
        return inner(seen) | {"precision": precision}

    return read


_FIRST = "c_initial n_initial m_initial"
_KERNELS = ("native_autograd", "native_custbw", "limit_chunk", "xl_chunk")
_TILES = (
    "chunk_size chunk_size_inter chunk_size_intra siz_b_L_parallel siz_b_L_loop siz_b_DH_parallel"
)
_REST = (
    "siz_b_DH_loop num_warps_intra num_warps_inter num_stages_intra num_stages_inter "
    "recompute_states_in_bw return_last_states"
)
_MLSTM = "queries keys values igate_preact fgate_preact"

ENTRIES = (
    Entry(
        ("transformers.models.rwkv",),
        "rwkv_linear_attention",
        "RWKV",
        "time_decay time_first key value state",
        rwkv,
        ignores="return_state",
    ),
    Entry(
        ("xlstm.blocks.mlstm",),
        "parallel_stabilized_simple",
        "mLSTM",
        f"{_MLSTM} eps",
        mlstm(_MLSTM, keys=True, start=-math.inf),
        ignores="lower_triangular_matrix",
    ),
    *(
        Entry(
            (package,),
            name,
            "mLSTM",
            f"{names} {_FIRST} eps",
            mlstm_in_chunks(names),
            ignores=f"autocast_kernel_dtype {_TILES} {_REST}",
        )
        for package, name, names in (
            *(("mlstm_kernels", f"mlstm_chunkwise__{kernel}", "q k v i f") for kernel in _KERNELS),
            (
                "transformers.models.xlstm",
                "mlstm_chunkwise_native_autograd",
                "query key value igate fgate",
            ),
        )
    ),
)
