"""Selective state spaces, Mamba and Mamba-2 (Gu & Dao 2023; Dao & Gu 2024), and other scans by entries.

Mamba:   S_t = exp(Δ_t A) ⊙ S_{t−1} + Δ_t B_t u_t,  y_t = C_t S_t + D u_t,    S (D, N), A (D, N)
Mamba-2: S_t = exp(Δ_t A) S_{t−1} + B_t (Δ_t u_t)ᵀ, y_t = S_tᵀ C_t + D u_t,  S (H, N, P), A (H,)

Δ is softplus of what was given plus a bias where the arguments say so, and y is multiplied by silu(z)
where a gate z is given.

RG-LRU, minGRU, minLSTM, HGRN and a bare parallel scan go by the entries of the state:
h_t = a_t ⊙ h_{t−1} + b_t, and what the function returns is h itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    swapped,
    time_first,
    time_last,
    wide,
)

FUSED_MIXER = (
    "{} computes the whole mixer in one kernel, whose arguments do not show the scan inside; record it "
    "in evaluation mode with a cache, on the CPU, or without that kernel's package"
)


def _delta(given: dict[str, Any], bias: str, softplus: str, shape: tuple[int, ...]) -> Tensor:
    delta: Tensor = given["dt"]
    if given.get(bias) is not None:
        delta = delta + given[bias].to(delta.dtype).view(shape)
    return F.softplus(delta) if given.get(softplus) else delta


def _by_channel(
    names: str, given: dict[str, Any], output: Tensor, final: Tensor | None, *, rounds: bool
) -> dict[str, Any]:
    """Fields of `Scanned` of a selective scan over (B, D, T).

    It rounds where u and B are made float32 before they are written, whatever the rest is in.
    """
    u, delta, b, c = (given[name] for name in names.split())
    if given["A"].is_complex():
        raise Unread("a complex A is not understood")
    batch, channels, steps = u.shape
    size = given["A"].shape[-1]

    def over_time(tensor: Tensor) -> Tensor:
        """B or C as (T, B, 1 or D, N)."""
        if tensor.dim() == 2:  # the same at every step: (D, N)
            return wide(tensor).expand(steps, batch, *tensor.shape)
        if tensor.dim() == 4:  # groups of channels: (B, G, N, T)
            return wide(repeated(tensor, channels, 1)).permute(3, 0, 1, 2)
        return wide(tensor).permute(2, 0, 1).unsqueeze(2)

    def written(tensor: Tensor) -> Tensor:
        return tensor.float().to(tensor.dtype) if rounds else tensor

    def make() -> LinearSteps:
        dt = time_last(wide(_delta(given | {"dt": delta}, "delta_bias", "delta_softplus", (-1, 1))))
        x, reads = time_last(wide(u)), over_time(c)
        gate = None if given.get("z") is None else F.silu(time_last(wide(given["z"])))
        skip = None if given.get("D") is None else wide(given["D"])

        def read(states: Tensor) -> Tensor:
            y = (states * reads).sum(-1)
            y = y if skip is None else y + x * skip
            return (y if gate is None else y * gate).permute(1, 2, 0)

        def read_back(grad: Tensor) -> Tensor:
            back = time_last(grad) if gate is None else time_last(grad) * gate
            return back.unsqueeze(-1) * reads

        return LinearSteps(
            shape=(channels, size),
            decay=torch.exp(wide(given["A"]) * dt.unsqueeze(-1)),
            write=(dt.unsqueeze(-1), written(over_time(b)), written(x).unsqueeze(-1)),
            read=read,
            read_back=read_back,
        )

    return {
        "steps": steps,
        "batch": batch,
        "shape": (channels, size),
        "make": make,
        "output": output,
        "final": final,
    }


def _part(a: Tensor) -> str:
    """Which of the heads of a mixer, each scanned by itself with an A that is a part of all, or ""."""
    whole = a._base
    if whole is None or whole.dim() != a.dim() + 1 or not a.is_contiguous():
        return ""
    return f".{a.storage_offset() // a.numel()}"


def selective_scan(names: str, *, rounds: bool) -> Callable[[LibraryCall], dict[str, Any]]:
    """The mapping of a selective scan whose u, Δ, B and C have these names."""

    def read(seen: LibraryCall) -> dict[str, Any]:
        final = seen.result(1) if seen.given["return_last_state"] else None
        fields = _by_channel(names, seen.given, seen.result(0), final, rounds=rounds)
        fields["part"] = _part(seen.live["A"])
        return fields if rounds else fields | {"precision": torch.float32}  # the kernel's own

    return read


def mambapy_scan(seen: LibraryCall) -> dict[str, Any]:
    """mambapy's own: (B, T, D) throughout, Δ finished."""
    given = seen.given
    turned = {name: given[name].transpose(1, 2) for name in ("x", "delta", "B", "C")}
    fields = _by_channel("x delta B C", given | turned, seen.result(0), None, rounds=False)
    inner: Callable[[], LinearSteps] = fields["make"]

    def make() -> LinearSteps:
        steps = inner()
        read, back = steps.read, steps.read_back
        return dataclasses.replace(
            steps,
            read=read and (lambda states: read(states).transpose(1, 2)),
            read_back=back and (lambda grad: back(grad.transpose(1, 2))),
        )

    return fields | {"make": make}


def by_head(values: str) -> Callable[[LibraryCall], dict[str, Any]]:
    """The mapping of Mamba-2's scan in chunks whose u has this name: (B, T, H, P), B and C (B, T, G, N)."""

    def read(seen: LibraryCall) -> dict[str, Any]:
        given = seen.given
        u, a = given[values], given["A"]
        batch, steps, heads, width = u.shape
        size = given["B"].shape[-1]
        if a.dim() != 1:
            raise Unread("A is more than one number a head")

        def make() -> LinearSteps:
            low, high = given.get("dt_limit") or (0.0, float("inf"))
            delta = _delta(given, "dt_bias", "dt_softplus", (1, 1, -1)).clamp(low, high)
            dt, x = time_first(wide(delta)), time_first(wide(u))
            writes, reads = (
                repeated(time_first(wide(given[name])), heads, 2).unsqueeze(-1) for name in "BC"
            )
            skip = given.get("D")
            if skip is not None:
                skip = wide(skip).view(heads, -1)
            gate = None if given.get("z") is None else F.silu(time_first(wide(given["z"])))
            first = given.get("initial_states")

            def read_states(states: Tensor) -> Tensor:
                y = (states * reads).sum(-2)
                y = y if skip is None else y + x * skip
                return time_first(y if gate is None else y * gate)

            def read_back(grad: Tensor) -> Tensor:
                back = time_first(grad) if gate is None else time_first(grad) * gate
                return back.unsqueeze(-2) * reads

            return LinearSteps(
                shape=(heads, size, width),
                decay=torch.exp(wide(a) * dt)[..., None, None],
                write=(writes, (x * dt.unsqueeze(-1)).unsqueeze(-2)),
                initial=None if first is None else swapped(wide(first)),
                read=read_states,
                read_back=read_back,
            )

        return {
            "steps": steps,
            "batch": batch,
            "shape": (heads, size, width),
            "make": make,
            "precision": torch.float32,
            "output": seen.result(0),
            "final": seen.result(1) if given.get("return_final_states") else None,
            "final_back": swapped,
            "initial": seen.initial("initial_states"),
        }

    return read


_SELECTIVE = "A B C D z delta_bias delta_softplus return_last_state"
_CHUNKED = "dt A B C chunk_size D"
_CHUNKED_ENDS = "dt_bias initial_states dt_softplus dt_limit return_final_states"

# fmt: off
_MAMBAS = (
    LibraryFunction(
        ("transformers.models",), "mamba_selective_scan", "Mamba", f"hidden_states dt {_SELECTIVE}",
        selective_scan("hidden_states dt B C", rounds=True), ignores="use_mambapy use_associative_scan",
    ),
    LibraryFunction(
        ("mamba_ssm",), "selective_scan_fn", "Mamba", f"u delta {_SELECTIVE}",
        selective_scan("u delta B C", rounds=False),
    ),
    *(
        LibraryFunction(("mambapy",), f"MambaBlock.{name}", "Mamba", "x delta A B C D", mambapy_scan)
        for name in ("selective_scan", "selective_scan_seq")
    ),
    LibraryFunction(
        ("transformers.models",), "mamba2_chunk_scan", "Mamba-2", f"hidden_states {_CHUNKED} {_CHUNKED_ENDS}",
        by_head("hidden_states"), refuses=("z", "seq_idx", "cu_seqlens"),
    ),
    LibraryFunction(
        ("mamba_ssm",), "mamba_chunk_scan_combined", "Mamba-2", f"x {_CHUNKED} z {_CHUNKED_ENDS}",
        by_head("x"), refuses=("seq_idx", "cu_seqlens", "return_varlen_states"),
    ),
    *(
        LibraryFunction((package,), name, cell, fused=FUSED_MIXER.format(name))
        for package, name, cell in (
            ("mamba_ssm", "mamba_inner_fn", "Mamba"),
            ("mamba_ssm", "mamba_split_conv1d_scan_combined", "Mamba-2"),
            ("transformers.models", "mamba_inner_fn", "Mamba"),
            ("transformers.models", "mamba2_split_conv1d_scan_combined", "Mamba-2"),
        )
    ),
)
# fmt: on


Coefficients = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]  # a, b, each (B, T, ...)


def of_states(
    coefficients: Coefficients,
    over: str,
    first: str = "",
    last: str = "",
    *,
    resets: str = "",
    single: bool = False,
) -> Callable[[LibraryCall], dict[str, Any]]:
    """The mapping of a scan over an argument (B, T, ...) that returns all of its states.

    ``first`` names the argument with the first state. The last one is returned beside the states,
    always ("always") or where the argument of the name ``last`` is true. Some compute in float32
    whatever they are given: ``single``. ``resets`` names an argument (B, T, 1), true at steps that
    begin anew, whose a_t is 0: cuts, and at the first step of a state that was not given no cut at all,
    since nothing comes before it.
    """

    def read(seen: LibraryCall) -> dict[str, Any]:
        batch, steps, *shape = seen.given[over].shape
        given = seen.given

        def make() -> LinearSteps:
            decay, write = (time_first(wide(x)) for x in coefficients(given))
            start = given.get(first)
            if resets:
                anew = time_first(given[resets]).clone()
                anew[0] &= start is not None and bool(start.any())
                decay = decay * ~anew
            return LinearSteps(
                shape=tuple(shape),
                decay=decay.expand(steps, batch, *shape),
                write=(write,),
                initial=None if start is None else wide(start),
                read=time_first,
                read_back=time_first,
            )

        return {
            "steps": steps,
            "batch": batch,
            "shape": tuple(shape),
            "make": make,
            "precision": torch.float32 if single else None,
            "output": seen.result(0),
            "final": seen.result(1) if last == "always" or given.get(last) else None,
            "initial": seen.initial(first),
            "cuts": _cuts(given[resets]) if resets else None,
        }

    return read


def min_gru(seen: LibraryCall) -> dict[str, Any]:
    """Fields of `Scanned` of minGRU's and minLSTM's scan, whose arguments are logarithms."""

    def factors(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return wide(given["log_coeffs"]).exp(), wide(given["log_values"]).exp()

    return of_states(factors, "log_values")(seen) | {"cell": seen.kind}


def _cuts(resets: Tensor) -> Tensor:
    """(T, B) where a step begins anew."""
    return time_first(resets).flatten(2).all(-1)


# fmt: off
STATE_SPACES = (
    *_MAMBAS,
    LibraryFunction(
        ("transformers.models.recurrent_gemma",), "RecurrentGemmaRglru._rnn_scan", "RG-LRU",
        "hidden_states recurrent_gate reset recurrent_states",
        of_states(
            lambda given: (given["recurrent_gate"], given["hidden_states"]), "hidden_states",
            first="recurrent_states", last="always", resets="reset", single=True,
        ),
        ignores="acc_dtype",
    ),
    LibraryFunction(
        ("minGRU_pytorch",), "heinsen_associative_scan_log", "minGRU", "log_coeffs log_values", min_gru
    ),
    LibraryFunction(
        ("mambapy",), "pscan", "parallel scan", "A X", of_states(lambda given: (given["A"], given["X"]), "X")
    ),
    *(
        LibraryFunction(
            ("fla",), f"{how}_hgrn", "HGRN", "x g initial_state output_final_state",
            of_states(
                lambda given: (wide(given["g"]).exp(), given["x"]), "x",
                first="initial_state", last="output_final_state", single=True,
            ),
            refuses=("cu_seqlens",),
        )
        for how in ("chunk", "fused_recurrent")
    ),
)
# fmt: on
