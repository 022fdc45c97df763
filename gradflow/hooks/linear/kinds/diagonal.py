"""Scans of a state by its entries: RG-LRU, minGRU, minLSTM, HGRN, a bare parallel scan.

h_t = a_t ⊙ h_{t−1} + b_t, and what the function returns is h itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradflow.cells.linear import LinearSteps
from gradflow.hooks.linear.kinds.tensors import time_first, wide
from gradflow.hooks.linear.registry import Entry, Seen

Coefficients = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]  # a, b, each (B, T, ...)


def of_states(
    coefficients: Coefficients,
    over: str,
    first: str = "",
    last: str = "",
    *,
    resets: str = "",
    single: bool = False,
) -> Callable[[Seen], dict[str, Any]]:
    """The mapping of a scan over an argument (B, T, ...) that returns all of its states.

    ``first`` names the argument with the first state. The last one is returned beside the states,
    always ("always") or where the argument of the name ``last`` is true. Some compute in float32
    whatever they are given: ``single``. ``resets`` names an argument (B, T, 1), true at steps that
    begin anew, whose a_t is 0: cuts, and at the first step of a state that was not given no cut at all,
    since nothing comes before it.
    """

    def read(seen: Seen) -> dict[str, Any]:
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


def min_gru(seen: Seen) -> dict[str, Any]:
    """Fields of `Scanned` of minGRU's and minLSTM's scan, whose arguments are logarithms."""

    def factors(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return wide(given["log_coeffs"]).exp(), wide(given["log_values"]).exp()

    return of_states(factors, "log_values")(seen) | {"cell": seen.kind}


def _cuts(resets: Tensor) -> Tensor:
    """(T, B) where a step begins anew."""
    return time_first(resets).flatten(2).all(-1)


ENTRIES = (
    Entry(
        ("transformers.models.recurrent_gemma",),
        "RecurrentGemmaRglru._rnn_scan",
        "RG-LRU",
        "hidden_states recurrent_gate reset recurrent_states",
        of_states(
            lambda given: (given["recurrent_gate"], given["hidden_states"]),
            "hidden_states",
            first="recurrent_states",
            last="always",
            resets="reset",
            single=True,
        ),
        ignores="acc_dtype",
    ),
    Entry(
        ("minGRU_pytorch",),
        "heinsen_associative_scan_log",
        "minGRU",
        "log_coeffs log_values",
        min_gru,
    ),
    Entry(
        ("mambapy",),
        "pscan",
        "parallel scan",
        "A X",
        of_states(lambda given: (given["A"], given["X"]), "X"),
    ),
    *(
        Entry(
            ("fla",),
            f"{how}_hgrn",
            "HGRN",
            "x g initial_state output_final_state",
            of_states(
                lambda given: (wide(given["g"]).exp(), given["x"]),
                "x",
                first="initial_state",
                last="output_final_state",
                single=True,
            ),
            refuses=("cu_seqlens",),
        )
        for how in ("chunk", "fused_recurrent")
    ),
)
