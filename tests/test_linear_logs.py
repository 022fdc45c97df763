"""Pairs of an elementwise recurrence against products taken one step after the other."""

from __future__ import annotations

import math

import pytest
import torch
from seam import LinearSteps, Logs, logs_of
from torch import Tensor


def of(decay: Tensor, shape: tuple[int, ...] | None = None) -> Logs:
    """Logs of one sequence's decay (T, ·)."""
    state = shape or tuple(decay.shape[1:])
    return logs_of(LinearSteps(shape=state, decay=decay.unsqueeze(1)))


def slow(decay: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(T, T) [source, target]: ln of the largest entry, ln of the weighted sum of squares."""
    length, logs = len(decay), decay.abs().log().flatten(1)
    largest, sums = (torch.full((length, length), math.nan).double() for _ in range(2))
    for s in range(length):
        entry = torch.zeros(logs.shape[1]).double()
        for t in range(s, length):
            if t > s:
                entry = entry + logs[t]
            largest[s, t] = entry.max()
            more = 0.0 if weights is None else weights[t].log()
            sums[s, t] = torch.logsumexp(2 * entry + more, 0)
    return largest, sums


def random(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def with_zeros() -> Tensor:
    decay = random(60, 5, low=0.2)
    decay[7, :3], decay[30] = 0.0, 0.0
    decay[45, 2:] = 0.0
    return decay


def crossing() -> Tensor:
    """One entry keeps the first half and loses all in the second, the other the other way round."""
    decay = torch.full((64, 2), 0.9999).double()
    decay[:32, 0], decay[32:, 1] = 1e-12, 1e-12
    return decay


DECAYS = {
    "minGRU": random(50, 9),
    "growing": random(50, 4, low=0.5, high=1.8),
    "Mamba": (-random(70, 5, 1, high=0.2) * torch.arange(1.0, 9)).exp(),
    "zeros": with_zeros(),
    "fast": random(300, 6) ** 20,
    "crossing": crossing(),
    "one": random(33, 1),
}


@pytest.mark.parametrize("name", DECAYS)
def test_every_pair(name: str) -> None:
    decay = DECAYS[name]
    sources = torch.arange(len(decay))
    logs = of(decay)
    largest, sums = slow(decay)
    torch.testing.assert_close(
        logs.maxima(sources), largest, rtol=1e-12, atol=1e-12, equal_nan=True
    )
    torch.testing.assert_close(logs.sums(sources), sums, rtol=1e-12, atol=1e-12, equal_nan=True)
    single = logs.sums(sources, dtype=torch.float32)
    torch.testing.assert_close(single, sums, rtol=1e-6, atol=1e-5, equal_nan=True)


def test_weights_of_the_targets_and_some_sources() -> None:
    decay = DECAYS["Mamba"]
    weights = random(70, 40)
    weights[5] = 0.0  # no direction there
    sources = torch.tensor([0, 3, 40, 69])
    expected = slow(decay, weights)[1][sources]
    found = of(decay).sums(sources, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_wrong_step_would_be_seen() -> None:
    decay = DECAYS["minGRU"]
    other = decay.clone()
    other[20] *= 1 + 1e-9
    found = of(other).maxima(torch.arange(50))
    assert not torch.allclose(found, slow(decay)[0], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_heads_share_a_number() -> None:
    decay = random(20, 3, 1, 1)
    logs = of(decay, (3, 4, 2))
    assert (logs.groups, logs.copies, logs.total.shape[1]) == (3, 8, 3)
    one = logs.of_group(1).maxima(torch.arange(20))
    expected = slow(decay[:, 1:2])[0]
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_entries_below_another_of_their_channel_are_left_out() -> None:
    logs = of(DECAYS["Mamba"])
    assert logs.largest_only().total.shape[1] == 5


def test_complex_decay_counts_by_its_modulus() -> None:
    decay = torch.polar(random(20, 3), random(20, 3, high=6.0))
    found = of(decay).maxima(torch.arange(20))
    torch.testing.assert_close(found, slow(decay.abs())[0], rtol=1e-12, atol=1e-12, equal_nan=True)
