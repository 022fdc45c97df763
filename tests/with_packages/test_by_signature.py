"""Kernels for a GPU, which do not run here: functions of the same signature in their place.

Each stands in a made-up module of the package's name and computes the explicit loop of its equations, as
the package's own reference does (fla's ``naive`` forms, mamba_ssm's ``selective_scan_ref``).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import explicit
import pytest
import torch
import torch.nn.functional as F
from compare import assert_steps_close
from functions import DK, DV, B, D, H, N, T, normal
from torch import Tensor, nn

import gradflow
from gradflow.errors import RecordingError


def _last(states: list[Tensor], wanted: bool) -> Tensor | None:
    return states[-1] if wanted else None


KEPT: list[list[Tensor]] = []  # states of the last call


def _kept(y: Tensor, states: list[Tensor], output_final_state: bool) -> tuple[Tensor, Any]:
    for state in states:
        state.retain_grad()
    KEPT[:] = [states]
    return y, _last(states, output_final_state)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    scale = DK**-0.5 if scale is None else scale
    y, states = explicit.delta_rule(
        q * scale * DK**0.5, k, v, g, beta, initial_state, normed=use_qk_l2norm_in_kernel
    )
    return _kept(y, states, output_final_state)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    return chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    beta = torch.ones_like(q[..., 0]) if beta is None else beta
    none = torch.zeros_like(q[..., 0])
    return chunk_gated_delta_rule(
        q, k, v, none, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
    )


def _attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, first: Tensor | None, final: bool
) -> tuple[Tensor, Any]:
    """decay (B, T, H, d_k or 1)."""
    steps = range(q.shape[1])
    states = explicit.run(
        [decay[:, t].exp()[..., None] for t in steps],
        [torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t]) for t in steps],
        first,
    )
    y = [torch.einsum("bhij,bhi->bhj", s, q[:, t]) * DK**-0.5 for t, s in enumerate(states)]
    return _kept(torch.stack(y, 1), states, final)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    return _attention(q, k, v, g, initial_state, output_final_state)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    decay = torch.zeros_like(q[..., 0])
    decay = decay if g is None else decay + g
    decay = decay if g_gamma is None else decay + g_gamma
    return _attention(q, k, v, decay[..., None], initial_state, output_final_state)


def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    state = v.new_zeros(*v.shape[:1], *v.shape[2:3], q.shape[-1], v.shape[-1])
    states, y = [], []
    for t in range(q.shape[1]):
        step = torch.diag_embed(gk[:, t].exp()) + b[:, t, :, :, None] * a[:, t, :, None, :]
        write = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = (step @ state + write).requires_grad_()
        states.append(state)
        y.append(torch.einsum("bhij,bhi->bhj", state, q[:, t]) * DK**-0.5)
    return _kept(torch.stack(y, 1), states, output_final_state)


def chunk_hgrn(
    x: Tensor, g: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Any]:
    steps = range(x.shape[1])
    states = explicit.run([g[:, t].exp() for t in steps], [x[:, t] for t in steps], initial_state)
    return _kept(torch.stack(states, 1), states, output_final_state)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    assert D is not None
    assert z is not None
    assert delta_bias is not None
    y, states = explicit.mamba(u, delta, A, B, C, D, z, delta_bias)
    y, last = _kept(y, states, return_last_state)
    return (y, last) if return_last_state else y


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    assert D is not None
    assert z is not None
    assert dt_bias is not None
    assert initial_states is not None
    y, states = explicit.mamba2(x, dt, A, B, C, D, dt_bias, initial_states, limit=dt_limit)
    y, last = _kept(y, states, return_final_states)
    y = y * F.silu(z)
    return (y, last.transpose(-1, -2)) if return_final_states else y


def mamba_inner_fn(xz: Tensor, *weights: Tensor) -> Tensor:
    return xz * 2


def _qkv() -> dict[str, Tensor]:
    sizes = {"q": DK, "k": DK, "v": DV}
    return {n: normal(B, T, H, size, dtype=torch.float64) for n, size in sizes.items()}


def _beta() -> Tensor:
    return torch.sigmoid(normal(B, T, H, dtype=torch.float64))


def _logs(*last: int) -> Tensor:
    return -normal(B, T, H, *last, dtype=torch.float64).exp()


def _first() -> dict[str, Any]:
    return {"initial_state": normal(B, H, DK, DV, dtype=torch.float64), "output_final_state": True}


def _selective() -> dict[str, Any]:
    given: dict[str, Any] = {n: normal(B, D, T, dtype=torch.float64) for n in ("u", "delta", "z")}
    given |= {n: normal(B, N, T, dtype=torch.float64) for n in ("B", "C")}
    given |= {n: normal(D, dtype=torch.float64) for n in ("D", "delta_bias")}
    given["A"] = -normal(D, N, dtype=torch.float64).exp()
    return given | {"delta_softplus": True, "return_last_state": True}


def _by_head() -> dict[str, Any]:
    given: dict[str, Any] = {n: normal(B, T, H, DV, dtype=torch.float64) for n in ("x", "z")}
    given |= {n: normal(B, T, 2, DK, dtype=torch.float64) for n in ("B", "C")}
    given |= {n: normal(H, dtype=torch.float64) for n in ("D", "dt_bias")}
    given |= {
        "dt": normal(B, T, H, dtype=torch.float64),
        "A": -normal(H, dtype=torch.float64).exp(),
    }
    given["initial_states"] = normal(B, H, DV, DK, dtype=torch.float64)
    return given | {"dt_softplus": True, "chunk_size": 4, "dt_limit": (0.1, 0.9)}


CALLS: dict[str, tuple[str, Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "gated delta rule": (
        "fla.ops.gated_delta_rule.chunk",
        chunk_gated_delta_rule,
        lambda: _qkv() | {"g": _logs(), "beta": _beta(), "scale": 0.3} | _first(),
    ),
    "Kimi delta attention": (
        "fla.ops.kda.chunk",
        chunk_kda,
        lambda: _qkv() | {"g": _logs(DK), "beta": _beta(), "use_qk_l2norm_in_kernel": True},
    ),
    "delta rule": (
        "fla.ops.delta_rule.fused_recurrent",
        fused_recurrent_delta_rule,
        lambda: {n: x * 0.5 for n, x in _qkv().items()},
    ),
    "gated linear attention": (
        "fla.ops.gla.chunk",
        chunk_gla,
        lambda: _qkv() | {"g": _logs(DK)} | _first(),
    ),
    "linear attention": (
        "fla.ops.simple_gla.chunk",
        chunk_simple_gla,
        lambda: _qkv() | {"g": _logs(), "g_gamma": -normal(H, dtype=torch.float64).exp()},
    ),
    "RWKV-7": (
        "fla.ops.generalized_delta_rule.dplr.chunk",
        chunk_dplr_delta_rule,
        lambda: (
            _qkv()
            | {"gk": _logs(DK)}
            | {n: normal(B, T, H, DK, dtype=torch.float64) * 0.3 for n in ("a", "b")}
        ),
    ),
    "HGRN": (
        "fla.ops.hgrn.chunk",
        chunk_hgrn,
        lambda: {
            "x": normal(B, T, D, dtype=torch.float64),
            "g": -normal(B, T, D, dtype=torch.float64).exp(),
            "initial_state": normal(B, D, dtype=torch.float64),
            "output_final_state": True,
        },
    ),
    "Mamba": ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn, _selective),
    "Mamba-2": ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined, _by_head),
}


def put_in(module: str, function: Callable[..., Any], patch: pytest.MonkeyPatch) -> ModuleType:
    """A made-up module that holds the function, with the packages around it."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        patch.setitem(sys.modules, name, ModuleType(name))
    setattr(sys.modules[module], function.__name__, function)
    return sys.modules[module]


class Layer(nn.Module):
    """Calls a function of another module as a model does."""

    def __init__(self, module: ModuleType, name: str, given: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.name, self.given = module, name, given

    def forward(self) -> Any:
        return getattr(self.module, self.name)(**self.given)


@pytest.mark.parametrize("cell", CALLS)
def test_a_kernel_is_known_by_its_signature(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, function, make = CALLS[cell]
    layer = Layer(put_in(path, function, monkeypatch), function.__name__, make())
    with gradflow.record(layer) as recording:
        results = layer()
        every = [x for x in (results if isinstance(results, tuple) else [results]) if x is not None]
        sum((x * torch.randn_like(x)).sum() for x in every).backward()  # type: ignore[union-attr]
    (track,) = recording.values()
    assert track.cell == cell
    (states,) = KEPT
    mask = torch.ones(T, B, dtype=torch.bool)
    values = torch.stack([s.detach().flatten(1) for s in states])
    totals = torch.stack([s.grad.flatten(1) for s in states if s.grad is not None])
    assert track.grad_h is not None
    assert_steps_close(track.h, values, mask, what="states")
    assert_steps_close(track.grad_h, totals, mask, what="totals")


def said(layer: nn.Module) -> str:
    """What a recording of a layer says whose function is not read; a loop inside may be, as any by hand."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradflow.record(layer) as recording:
            results = layer()
            (results[0] if isinstance(results, tuple) else results).sum().backward()
    assert all(track.cell == "Layer" for track in recording.values())
    return " ".join(str(warning.message) for warning in caught)


def test_an_argument_that_is_not_understood_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, function, make = CALLS["gated delta rule"]
    module = put_in(path, function, monkeypatch)
    for name, value in (("cu_seqlens", torch.tensor([0, T])), ("allow_neg_eigval", True)):
        layer = Layer(module, function.__name__, make() | {name: value})
        assert f"its argument '{name}' is not understood" in said(layer)


def test_a_changed_signature_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gla(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **kwargs: Any) -> Any:
        return _attention(q, k, v, gates, None, False)

    module = put_in("fla.ops.gla.chunk", chunk_gla, monkeypatch)
    layer = Layer(module, "chunk_gla", _qkv() | {"gates": _logs(DK)})
    assert "chunk_gla of this version has no argument 'g'" in said(layer)


def test_a_function_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Any]:
        return _attention(q, k, v, 0.5 * g, initial_state, output_final_state)

    module = put_in("fla.ops.gla.chunk", chunk_gla, monkeypatch)
    layer = Layer(module, "chunk_gla", _qkv() | {"g": _logs(DK)})
    with gradflow.record(layer) as recording:
        layer()[0].sum().backward()
    (track,) = recording.values()
    with pytest.raises(RecordingError, match="run again from what it was given it differs"):
        _ = track.grad_h


def test_a_fused_mixer_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = put_in("mamba_ssm.ops.selective_scan_interface", mamba_inner_fn, monkeypatch)
    layer = Layer(module, "mamba_inner_fn", {"xz": normal(B, D, T, dtype=torch.float64)})
    assert "mamba_inner_fn computes the whole mixer in one kernel" in said(layer)


def test_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    path, function, make = CALLS["gated delta rule"]
    module = put_in(path, function, monkeypatch)
    other = ModuleType("users_own")
    other.chunk_gated_delta_rule = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_own", other)
    layer = Layer(other, function.__name__, make())
    before = set(sys.modules)
    with gradflow.record(layer) as recording:
        assert other.chunk_gated_delta_rule is not function
        with gradflow.record(layer) as inner:
            layer()[0].sum().backward()
        assert module.chunk_gated_delta_rule is not function
    assert other.chunk_gated_delta_rule is function
    assert module.chunk_gated_delta_rule is function
    assert len(recording) == len(inner) == 1
    assert {name for name in set(sys.modules) - before if not name.startswith("gradflow")} == set()
