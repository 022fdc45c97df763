"""Memories of keys and values: the delta rule, linear attention with a decay, RWKV's and the mLSTM's means.

Gated delta rule (Yang et al. 2024):   S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ
Kimi delta attention (a decay a key):  S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t−1} + β_t k_t v_tᵀ
RWKV-7 (Peng et al. 2025):             S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ
Linear attention, GLA, RetNet:         S_t = e^{g_t} S_{t−1} + k_t v_tᵀ
read as y_t = S_tᵀ (s q_t), with the scale s = d_k^{−1/2} where none is given; S (H, d_k, d_v).

Weighted means have a numerator and a denominator of one decay.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.cells.linear import LinearSteps
from gradflow.hooks.linear.scanned import (
    LibraryCall,
    LibraryFunction,
    Unread,
    repeated,
    time_first,
    time_third,
    wide,
)
from gradflow.limits import HIGHEST

KEY_FLOOR = 1e-6  # added to the square of a key before its root is taken, in all these packages


@dataclass(frozen=True)
class Rule:
    """How one of these functions names its arguments, and which of its terms it has."""

    names: str = "query key value"  # of q, k and v, each (B, T, H, d)
    # of ln of the decay: (B, T, H) or, a key each, (B, T, H, d_k); "" where there is none
    decay: str = "g"
    # of the strength of the correction, (B, T, H); "" where there is no correction
    beta: str = "beta"
    # of a and b, (B, T, H, d_k), where A_t = diag(e^{g_t}) + b_t a_tᵀ; "" elsewhere
    pair: str = ""

    def __call__(self, seen: LibraryCall) -> dict[str, Any]:
        """Fields of `Scanned`."""
        given = seen.given
        query, key, value = (given[name] for name in self.names.split())
        batch, steps, heads, d_v = value.shape
        d_k = key.shape[-1]

        def over_time(tensor: Tensor) -> Tensor:
            return repeated(time_first(wide(tensor)), heads, 2)

        def make() -> LinearSteps:
            q, k, v = over_time(query), over_time(key), over_time(value)
            if given.get("use_qk_l2norm_in_kernel"):
                q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + KEY_FLOOR) for x in (q, k))
            scale = given.get("scale")
            q = q * (d_k**-0.5 if scale is None else scale)
            decay = self._decay(given, k[..., 0])
            left, right, write = None, None, (k.unsqueeze(-1), v.unsqueeze(-2))
            by_key = decay.dim() == 4
            if self.pair:
                right, left = (over_time(given[name]) for name in self.pair.split())
            elif self.beta:
                beta = torch.ones_like(k[..., :1])
                if given.get(self.beta) is not None:
                    beta = time_first(wide(given[self.beta])).unsqueeze(-1)
                write = ((beta * k).unsqueeze(-1), v.unsqueeze(-2))
                left = -beta * k if by_key else -beta * k * decay.unsqueeze(-1)
                right = k * decay if by_key else k
            first = given.get("initial_state")
            return LinearSteps(
                shape=(heads, d_k, d_v),
                decay=decay.unsqueeze(-1) if by_key else decay[..., None, None],
                left=left,
                right=right,
                write=write,
                initial=None if first is None else wide(first),
                read=lambda states: time_first((states * q.unsqueeze(-1)).sum(-2)),
                read_back=lambda grad: q.unsqueeze(-1) * time_first(grad).unsqueeze(-2),
            )

        return {
            "steps": steps,
            "batch": batch,
            "shape": (heads, d_k, d_v),
            "make": make,
            "precision": torch.float32,
            "output": seen.result(0),
            "final": seen.result(1) if given.get("output_final_state") else None,
            "initial": seen.initial("initial_state"),
        }

    def _decay(self, given: dict[str, Any], like: Tensor) -> Tensor:
        """a_t, (T, B, H) like this tensor or, a key each, (T, B, H, d_k)."""
        logs = torch.zeros_like(like)
        if given.get("g_gamma") is not None:  # the same at every step: (H,)
            logs = logs + wide(given["g_gamma"])
        if given.get(self.decay) is not None:
            known = time_first(wide(given[self.decay]))
            logs = known if known.dim() == 4 else logs + known
        return logs.exp()


_ENDS = "initial_state output_final_state"
_PACKED = ("cu_seqlens", "cu_seq_lens_q", "head_first")
_GATED = "gated delta rule"
_KIMI = "Kimi delta attention"


def _of_transformers(name: str, cell: str, *, chunks: bool) -> LibraryFunction:
    reads = f"query key value g beta {_ENDS} use_qk_l2norm_in_kernel"
    ignores = "chunk_size" if chunks else ""
    return LibraryFunction(
        ("transformers.models",), name, cell, reads, Rule(), refuses=_PACKED, ignores=ignores
    )


def _of_fla(name: str, cell: str, terms: str, rule: Rule, ignores: str = "") -> LibraryFunction:
    reads = f"q k v {terms} scale {_ENDS}"
    ignored = f"cu_seqlens_cpu chunk_indices disable_recompute safe_gate {ignores}"
    return LibraryFunction(("fla",), name, cell, reads, rule, refuses=_PACKED, ignores=ignored)


_QKV = "q k v"
_GLA = "gated linear attention"
_SIMPLE = "linear attention"
_BOUND = "lower_bound chunk_size"
_NORMED = "use_qk_l2norm_in_kernel"

_OF_THE_DELTA_RULE = (
    _of_transformers("torch_chunk_gated_delta_rule", _GATED, chunks=True),
    _of_transformers("torch_recurrent_gated_delta_rule", _GATED, chunks=False),
    _of_transformers("chunk_kimi_delta_attention", _KIMI, chunks=True),
    _of_transformers("recurrent_kimi_delta_attention", _KIMI, chunks=False),
    *(
        _of_fla(f"{how}_{name}", cell, f"{terms} {normed}", rule)
        for name, cell, terms, normed, rule in (
            ("gated_delta_rule", _GATED, "g beta", _NORMED, Rule(_QKV)),
            ("kda", _KIMI, "g beta", _NORMED, Rule(_QKV)),
            ("delta_rule", "delta rule", "beta", _NORMED, Rule(_QKV, decay="")),
            ("simple_gla", _SIMPLE, "g g_gamma", "", Rule(_QKV, beta="")),
        )
        for how in ("chunk", "fused_recurrent")
    ),
    _of_fla("chunk_gla", _GLA, "g", Rule(_QKV, beta="")),
    _of_fla("fused_recurrent_gla", _GLA, "gk", Rule(_QKV, decay="gk", beta="")),
    *(
        _of_fla(name, "RWKV-7", "a b gk", Rule(_QKV, decay="gk", beta="", pair="a b"), _BOUND)
        for name in ("chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule")
    ),
)


def _too_high(exponents: Tensor) -> Tensor:
    """What to take off all exponents of a sequence: 0 unless they are too high. Time is the first axis."""
    return (exponents.amax(0) - HIGHEST).clamp_min(0.0)


def _with_one(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], -1)


def rwkv(seen: LibraryCall) -> dict[str, Any]:
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

    return {
        "steps": steps,
        "batch": batch,
        "shape": (channels, 2),
        "make": make,
        "precision": torch.float32,
        "output": seen.result(0),
        **_handed_on(seen.live["state"], seen.result(1)),
    }


def _handed_on(before: Any, after: Any) -> dict[str, Tensor | None]:
    """First and last state of three parts each, as rows by which a call is known to go on from another."""
    if before is not None and any(part.requires_grad for part in before):
        raise Unread(
            "its state came from the call before as three tensors, and a gradient that goes on through "
            "them is not followed; detach them"
        )
    ends = {"initial": before, "final": after}
    return {
        name: None if parts is None else torch.cat([p.detach().flatten(1) for p in parts], 1)
        for name, parts in ends.items()
    }


def mlstm(names: str, *, keys: bool, start: float) -> Callable[..., dict[str, Any]]:
    """The mapping of an mLSTM whose q, k, v, ĩ and f̃ have these names: (B, H, T, d), (B, H, T[, 1]).

    d_k^{−1/2} is on the keys, or else on the queries. The stabiliser m starts from ``start``.
    """

    def read(seen: LibraryCall, before: Sequence[Tensor] | None = None) -> dict[str, Any]:
        given, returned = seen.given, seen.result(0)
        query, key, value, into, forget = (given[name] for name in names.split())
        if key.dim() == 3:  # a single step, without an axis of time
            query, key, value = (x.unsqueeze(2) for x in (query, key, value))
        batch, heads, steps, d_k = key.shape
        d_v = value.shape[-1]

        def make() -> LinearSteps:
            q, k, v = (time_third(wide(x)) for x in (query, key, value))
            i, f = (time_third(wide(x).reshape(batch, heads, steps)) for x in (into, forget))
            q, k = (q, k / math.sqrt(d_k)) if keys else (q / math.sqrt(d_k), k)
            kept = F.logsigmoid(f).cumsum(0)
            begun = torch.full_like(i[:1], start)
            if before is not None:
                begun = wide(before[2]).reshape(1, batch, heads)
            stabiliser = kept + torch.maximum((i - kept).cummax(0).values, begun)
            high = _too_high(torch.cat([i, begun]))
            first = None
            if before is not None:
                beside = before[1].reshape(batch, heads, d_k, 1)
                first = wide(torch.cat([before[0], beside], -1))
                first = first * torch.exp(begun[0] - high)[..., None, None]
            lowest = torch.exp(-high)[..., None]
            small = given["eps"] * torch.exp(stabiliser - high)[..., None]

            def read_states(states: Tensor) -> Tensor:
                sums = (states * q.unsqueeze(-1)).sum(-2)  # (T, B, H, d_v + 1)
                above, below = sums[..., :-1], sums[..., -1:]
                read = above / (torch.maximum(below.abs(), lowest) + small)
                return read.movedim(0, 2).reshape(returned.shape)

            return LinearSteps(
                shape=(heads, d_k, d_v + 1),
                decay=torch.sigmoid(f)[..., None, None],
                write=(
                    torch.exp(i - high)[..., None, None],
                    k.unsqueeze(-1),
                    _with_one(v).unsqueeze(-2),
                ),
                initial=first,
                read=read_states,
            )

        return {
            "steps": steps,
            "batch": batch,
            "shape": (heads, d_k, d_v + 1),
            "make": make,
            "output": returned,
        }

    return read


def mlstm_from(names: str, first: str) -> Callable[[LibraryCall], dict[str, Any]]:
    """The mapping of an mLSTM that may be given its first state, C and n divided by e^m, and m.

    m starts from 0 elsewhere, and d_k^{−1/2} is on the queries.
    """
    inner = mlstm(names, keys=False, start=0.0)

    def read(seen: LibraryCall) -> dict[str, Any]:
        before = [seen.given[name] for name in first.split()]
        live = [seen.live[name] for name in first.split()]
        known = before[0] is not None
        ends = _handed_on(live if known else None, seen.result(1))
        precision = seen.given.get("autocast_kernel_dtype") or torch.float32
        return inner(seen, before if known else None) | ends | {"precision": precision}

    return read


_HOW = (  # the mLSTM is computed, which changes nothing
    "autocast_kernel_dtype chunk_size chunk_size_inter chunk_size_intra siz_b_L_parallel siz_b_L_loop "
    "siz_b_DH_parallel siz_b_DH_loop num_warps_intra num_warps_inter num_stages_intra num_stages_inter "
    "recompute_states_in_bw return_last_states dtype_state"
)
_MLSTM = "queries keys values igate_preact fgate_preact"

# fmt: off
MATRIX_MEMORIES = (
    LibraryFunction(
        # which its lightning attention calls
        ("transformers.models.minimax",), "apply_mask_to_padding_states", "lightning attention",
        fused="its recurrence runs within its own forward, where its states cannot be seen; a head keeps "
        "exp(−slope_rate) a step, whatever it reads",
    ),
    *_OF_THE_DELTA_RULE,
    LibraryFunction(
        ("transformers.models.rwkv",), "rwkv_linear_attention", "RWKV",
        "time_decay time_first key value state", rwkv, ignores="return_state",
    ),
    LibraryFunction(
        ("xlstm.blocks.mlstm",), "parallel_stabilized_simple", "mLSTM", f"{_MLSTM} eps",
        mlstm(_MLSTM, keys=True, start=-math.inf), ignores="lower_triangular_matrix",
    ),
    *(
        LibraryFunction(
            (package,), name, "mLSTM", f"{names} {first} eps", mlstm_from(names, first), ignores=_HOW
        )
        for package, names, start, step, known in (
            ("mlstm_kernels", "q k v i f", "_initial", "", (
                "chunkwise__native_autograd", "chunkwise__native_custbw", "chunkwise__limit_chunk",
                "chunkwise__xl_chunk", "recurrent_step__native",
            )),
            ("transformers.models.xlstm", "query key value igate fgate", "_initial", "state",
             ("chunkwise_native_autograd", "recurrent_step_native")),
        )
        for name in (f"mlstm_{how}" for how in known)
        for first in (" ".join(f"{x}{step if 'step' in name else start}" for x in "cnm"),)
    ),
)
# fmt: on
