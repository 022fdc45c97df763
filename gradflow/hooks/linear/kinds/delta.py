"""Matrix memories of keys and values: the delta rule, gated or not, and linear attention with a decay.

Gated delta rule (Yang et al. 2024):   S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ
Kimi delta attention (a decay a key):  S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t−1} + β_t k_t v_tᵀ
RWKV-7 (Peng et al. 2025):             S_t = (diag(e^{g_t}) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ
Linear attention, GLA, RetNet:         S_t = e^{g_t} S_{t−1} + k_t v_tᵀ
read as y_t = S_tᵀ (s q_t), with the scale s = d_k^{−1/2} where none is given; S (H, d_k, d_v).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradflow.cells.linear import LinearSteps
from gradflow.hooks.linear.kinds.tensors import repeated, time_first, wide
from gradflow.hooks.linear.registry import Entry, Seen

SMALLEST = 1e-6  # added to the square of a key before its root is taken, in all these packages


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

    def __call__(self, seen: Seen) -> dict[str, Any]:
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
                q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + SMALLEST) for x in (q, k))
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


def _of_transformers(name: str, cell: str, *, chunks: bool) -> Entry:
    reads = f"query key value g beta {_ENDS} use_qk_l2norm_in_kernel"
    ignores = "chunk_size" if chunks else ""
    return Entry(
        ("transformers.models",), name, cell, reads, Rule(), refuses=_PACKED, ignores=ignores
    )


def _of_fla(name: str, cell: str, terms: str, rule: Rule, ignores: str = "") -> Entry:
    reads = f"q k v {terms} scale {_ENDS}"
    ignored = f"cu_seqlens_cpu chunk_indices disable_recompute safe_gate {ignores}"
    return Entry(("fla",), name, cell, reads, rule, refuses=_PACKED, ignores=ignored)


_QKV = "q k v"
_GLA = "gated linear attention"
_SIMPLE = "linear attention"
_BOUND = "lower_bound chunk_size"
_NORMED = "use_qk_l2norm_in_kernel"

ENTRIES = (
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
