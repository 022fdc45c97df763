"""What a shell completes after an option. Nothing here imports torch."""

from __future__ import annotations

from typing import Any

from gradflow.limits import VERDICTS

LOSSES = ("mse", "cross-entropy", "bce", "nll", "last")  # `gradflow.loading.losses` has them


def losses(_: Any, __: Any, typed: str) -> list[str]:
    """Names of losses.

    >>> losses(None, None, "b")
    ['bce']
    """
    return [name for name in LOSSES if name.startswith(typed)]


def verdicts(_: Any, __: Any, typed: str) -> list[str]:
    """Verdicts, after the conditions that are typed already.

    Limits are left out: a shell would read the < of one that is completed outside quotes.

    >>> verdicts(None, None, "horizon<50,s")
    ['horizon<50,stable']
    """
    before, comma, last = typed.rpartition(",")
    known = [verdict for verdict in VERDICTS if verdict not in before.split(",")]
    return [f"{before}{comma}{verdict}" for verdict in known if verdict.startswith(last)]
