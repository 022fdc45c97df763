"""A small panel of tests/rate_coverage.py: what is told of a rate holds the long-run exponent.

Oracles: eigenvalues of linear networks; of the others the exponents over 32 sequences of 3000 steps, by
`long_run` of the panel, written down for the first networks that its seed draws.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rate_coverage import KINDS, ROUNDING, System, intervals

from gradflow.analyzer import keeping

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:l0. no backward ran"),  # Jacobians need none
]

LONG_RUN = {
    "tanh": (-0.3119, -0.0224, -0.1388, -0.3436, -0.2003, -0.0876),
    "LSTM, spread time scales": (-0.0177, -0.0140, -0.0184, -0.0163, -0.0164, -0.0054),
    "GRU, slow gates": (-0.0457, -0.0938, -0.0351, -0.0962, -0.0938, -0.0974),
}


def networks(kind: str, count: int = 6) -> list[tuple[System, float]]:
    """The first networks that the panel draws of a kind, with their exponents."""
    torch.manual_seed(list(KINDS).index(kind))
    systems = [KINDS[kind]() for _ in range(count)]
    known = LONG_RUN.get(kind) or [system.exponent for system in systems]
    return [(system, float(truth or 0.0)) for system, truth in zip(systems, known, strict=True)]


def shares(kind: str, steps: int, batches: int = 6) -> tuple[float, float]:
    """Which share of batches of 8 sequences is told a rate, and which share of these rates holds."""
    torch.manual_seed(steps)
    told = held = 0
    for system, truth in networks(kind):
        for rate in intervals(system, steps, 8, batches):
            told += rate is not None
            held += rate is not None and rate.low - ROUNDING <= truth <= rate.high + ROUNDING
    return told / (6 * batches), held / max(told, 1)


@pytest.mark.parametrize(
    ("kind", "steps", "least"),
    [
        ("linear, constant", 20, 1.0),
        ("linear, constant, far from normal", 20, 1.0),
        ("linear, driven", 60, 0.7),
        ("tanh", 100, 0.7),
        ("GRU, slow gates", 20, 0.7),
    ],
)
def test_a_rate_that_has_settled_is_told_and_holds(kind: str, steps: int, least: float) -> None:
    told, held = shares(kind, steps)
    assert told >= least and held >= 0.92


def test_a_rate_of_slow_gates_is_not_told_before_the_states_have_come_to_rest() -> None:
    told, _ = shares("LSTM, spread time scales", 40)
    assert told <= 0.05


def test_without_looking_at_whether_the_steps_still_move_it_was_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing: Callable[..., float] = lambda seen, rate, steps: 0.0  # noqa: E731
    monkeypatch.setattr(keeping, "unrest", nothing)
    told, held = shares("LSTM, spread time scales", 40)
    assert told > 0.1 and held < 0.85
