"""Calls of the observed functions, each beside the explicit loop of its equations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import explicit
import pytest
import torch
from torch import Tensor, nn

B, T, D, N = 2, 13, 6, 4
H, DK, DV = 4, 3, 5
GROUPS = 2


@dataclass
class Case:
    """One call of one function."""

    name: str  # of the test
    module: str
    function: str  # in it, or "Class.method"
    make: Callable[
        [torch.dtype], tuple[dict[str, Any], dict[str, Any]]
    ]  # its arguments, the loop's
    loop: Callable[..., tuple[Tensor, list[Tensor]]]
    single: bool = False  # computes in float32 whatever it is given
    final: Callable[[Any], Tensor | None] = field(default=lambda results: None)
    turned: Callable[[Tensor], Tensor] = field(default=lambda final: final)  # (B, *state) of it

    first: str = ""  # the argument with the first state, which the function's last state may be

    def function_of(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Call it as a method or a function of that module does."""
        here = importlib.import_module(self.module)
        holder, _, name = self.function.rpartition(".")
        function = getattr(getattr(here, holder) if holder else here, name)
        return function(module, **arguments) if holder else function(**arguments)

    def call(self, arguments: dict[str, Any]) -> nn.Module:
        """A module that calls it, as models do."""
        case = self
        importlib.import_module(self.module)  # before a recording opens

        class Layer(nn.Module):
            def forward(self) -> Any:
                return case.function_of(self, arguments)

        return Layer()


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def _mamba(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    u, dt, z = (normal(B, D, T, dtype=dtype) for _ in "abc")
    a = -normal(D, N, dtype=dtype).exp()
    b, c = (normal(B, N, T, dtype=dtype) for _ in "bc")
    with torch.no_grad():  # the function makes them float32
        u.copy_(u.float()), b.copy_(b.float())
    d, bias = normal(D, dtype=dtype), normal(D, dtype=dtype)
    given = {"hidden_states": u, "dt": dt, "A": a, "B": b, "C": c, "D": d, "z": z}
    given |= {"delta_bias": bias, "delta_softplus": True, "return_last_state": True}
    loop = {"u": u, "dt": dt, "a": a, "b": b, "c": c, "d": d, "z": z, "bias": bias}
    return given, loop


def _mamba2(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    u, dt = normal(B, T, H, DV, dtype=dtype), normal(B, T, H, dtype=dtype)
    a, d, bias = -normal(H, dtype=dtype).exp(), normal(H, dtype=dtype), normal(H, dtype=dtype)
    b, c = (normal(B, T, GROUPS, DK, dtype=dtype) for _ in "bc")
    first = normal(B, H, DV, DK, dtype=dtype)
    given = {"hidden_states": u, "dt": dt, "A": a, "B": b, "C": c, "chunk_size": 5, "D": d}
    given |= {"dt_bias": bias, "dt_softplus": True, "initial_states": first}
    given |= {"return_final_states": True}
    loop = {"u": u, "dt": dt, "a": a, "b": b, "c": c, "d": d, "bias": bias, "first": first}
    return given, loop


def _delta(by_key: bool, normed: bool) -> Any:
    def make(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        heads = H if by_key else GROUPS
        q, k = (normal(B, T, heads, DK, dtype=dtype) for _ in "qk")
        v = normal(B, T, H, DV, dtype=dtype)
        g = -normal(B, T, H, *([DK] if by_key else []), dtype=dtype).exp()
        beta = torch.sigmoid(normal(B, T, H, dtype=dtype))
        first = normal(B, H, DK, DV, dtype=dtype)
        given = {"query": q, "key": k, "value": v, "g": g, "beta": beta, "initial_state": first}
        given |= {"output_final_state": True, "use_qk_l2norm_in_kernel": normed}
        loop = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "first": first, "normed": normed}
        return given, loop

    return make


def _rg_lru(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    gate, x = torch.sigmoid(normal(B, T, D, dtype=dtype)), normal(B, T, D, dtype=dtype)
    reset = torch.zeros(B, T, 1, dtype=torch.bool)
    reset[0, 0], reset[1, 5] = True, True
    first = normal(B, D, dtype=dtype)
    given = {"hidden_states": x, "recurrent_gate": gate, "reset": reset, "recurrent_states": first}
    given |= {"acc_dtype": dtype}
    return given, {"gate": gate, "x": x, "reset": reset, "first": first}


def _min_gru(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    keep = -normal(B, T, D, dtype=dtype).exp()
    write = normal(B, T, D, dtype=dtype)
    return {"log_coeffs": keep, "log_values": write}, {"log_keep": keep, "log_write": write}


def _mambapy(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    given, loop = _mamba(dtype)
    delta = torch.nn.functional.softplus(given["dt"] + given["delta_bias"][:, None])
    turned = {"x": given["hidden_states"], "delta": delta, "B": given["B"], "C": given["C"]}
    arguments = {name: x.transpose(1, 2) for name, x in turned.items()}
    return arguments | {"A": given["A"], "D": given["D"]}, {
        **{name: loop[name] for name in "uabcd"},
        "delta": delta,
    }


def _mambapy_loop(delta: Tensor, **loop: Tensor) -> tuple[Tensor, list[Tensor]]:
    raw = delta + torch.log(-torch.expm1(-delta))  # the softplus of it is delta
    open_gate = torch.full_like(delta, 1e4) * 0 + 1.2784645427610738  # silu of it is 1
    y, states = explicit.mamba(dt=raw, z=open_gate, bias=torch.zeros_like(loop["d"]), **loop)
    return y.transpose(1, 2), states


def _rwkv(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    w, u = normal(D, dtype=dtype), normal(D, dtype=dtype)
    k, v = (normal(B, T, D, dtype=dtype) for _ in "kv")
    given = {"time_decay": w, "time_first": u, "key": k, "value": v}
    return given, {"w": w, "u": u, "k": k, "v": v}


def _mlstm(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    q, k, v = (normal(B, H, T, DK, dtype=dtype) for _ in "qkv")
    i, f = (normal(B, H, T, 1, dtype=dtype) for _ in "if")
    given = {"queries": q, "keys": k, "values": v, "igate_preact": i, "fgate_preact": f}
    return given, {"q": q, "k": k, "v": v, "i": i, "f": f}


def second(results: Any) -> Tensor:
    found: Tensor = results[1]
    return found


def _modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


CASES = [
    *(
        Case(name, _modeling(name), "mamba_selective_scan", _mamba, explicit.mamba, final=second)
        for name in ("mamba", "falcon_mamba", "jamba", "zamba")
    ),
    *(
        Case(
            name,
            _modeling(name),
            "mamba2_chunk_scan",
            _mamba2,
            explicit.mamba2,
            single=True,
            final=second,
            turned=lambda final: final.transpose(-1, -2),
            first="initial_states",
        )
        for name in ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
    ),
    *(
        Case(
            f"{name}-{how}{'-normed' if normed else ''}",
            _modeling(name),
            f"torch_{how}_gated_delta_rule",
            _delta(by_key=False, normed=normed),
            explicit.delta_rule,
            single=True,
            final=second,
            first="initial_state",
        )
        for name in ("qwen3_next", "qwen3_5", "olmo_hybrid")
        for how, normed in (("chunk", True), ("recurrent", False))
    ),
    *(
        Case(
            f"{name}-{how}",
            _modeling(name),
            f"{how}_kimi_delta_attention",
            _delta(by_key=True, normed=True),
            explicit.delta_rule,
            single=True,
            final=second,
            first="initial_state",
        )
        for name in ("kimi_linear",)
        for how in ("chunk", "recurrent")
    ),
    Case(
        "recurrent_gemma",
        _modeling("recurrent_gemma"),
        "RecurrentGemmaRglru._rnn_scan",
        _rg_lru,
        explicit.rg_lru,
        final=second,
        first="recurrent_states",
    ),
    Case("rwkv", _modeling("rwkv"), "rwkv_linear_attention", _rwkv, explicit.rwkv, single=True),
    Case(
        "minGRU",
        "minGRU_pytorch.minGRU",
        "heinsen_associative_scan_log",
        _min_gru,
        explicit.min_gru,
    ),
    *(
        Case(f"mambapy-{name}", "mambapy.mamba", f"MambaBlock.{name}", _mambapy, _mambapy_loop)
        for name in ("selective_scan",)
    ),
    Case(
        "mLSTM", "xlstm.blocks.mlstm.backends", "parallel_stabilized_simple", _mlstm, explicit.mlstm
    ),
]
IDS = [case.name for case in CASES]


def loaded(case: Case) -> None:
    """Skip where the package is not installed."""
    pytest.importorskip(case.module.partition(".")[0])
