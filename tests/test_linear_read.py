"""Channels and heads of a linear recurrence that the loss never reads have no vote.

Oracle: the recurrence without them, analyzed by itself.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from linear_oracles import random, unit
from seam import votes
from torch import Tensor, nn

import gradflow
from gradflow.analysis import Analysis

pytestmark = pytest.mark.filterwarnings("ignore::gradflow.errors.GradflowWarning")
B, T = 3, 40


def elementwise() -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T, channels): the last two of five keep everything."""
    decay = random(B, T, 5, seed=1, low=0.7)
    decay[..., 3:] = random(B, T, 2, seed=2, low=0.9999)
    return random(B, T, 5, seed=3, low=-1.0), {"decay": decay}


def selective() -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T, channels, N), as in Mamba."""
    decay = random(B, T, 4, 3, seed=1, low=0.6)
    decay[:, :, 2:] = random(B, T, 2, 3, seed=2, low=0.9999)
    return random(B, T, 4, 3, seed=3, low=-1.0), {"decay": decay}


def gated_delta() -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T, heads, d_k, d_v): the last head keeps everything but what it writes over."""
    decay = random(B, T, 3, 1, 1, seed=1, low=0.6)
    decay[:, :, 2] = 1.0
    keys = unit(random(B, T, 3, 4, seed=4, low=-1.0))
    beta = random(B, T, 3, seed=5, high=0.1)
    return random(B, T, 3, 4, 2, seed=3, low=-1.0), {"decay": decay, "keys": keys, "beta": beta}


MADE = {"elementwise": (elementwise, 3), "Mamba": (selective, 2), "delta rule": (gated_delta, 2)}


def recorded(name: str, read: int | None) -> gradflow.Recording:
    """The loss reads the first ones; with None the others are not there at all."""
    make, count = MADE[name]
    h, given = make()
    if read is None:
        h, given = h[:, :, :count], {key: value[:, :, :count] for key, value in given.items()}
    h.requires_grad_()
    with gradflow.record(nn.Identity()) as recording:
        gradflow.scan(h * 1, **given)[:, -1, :read].square().sum().backward()
    return recording


@functools.cache
def analyzed(name: str, read: int | None) -> Analysis:
    return gradflow.analyze(recorded(name, read))


@pytest.mark.parametrize("name", MADE)
def test_the_verdict_is_that_of_what_is_read(name: str) -> None:
    run, alone = analyzed(name, MADE[name][1]), analyzed(name, None)
    layer, wanted = run["scan"], alone["scan"]
    assert (layer.verdict, wanted.verdict) == ("vanishing", "vanishing")
    assert analyzed(name, 99)["scan"].verdict == "stable"  # where all is read it decides
    for found, right in ((layer.gain, wanted.gain), (layer.rate, wanted.rate)):
        close([found.value, found.low, found.high], [right.value, right.low, right.high])
    assert (layer.channels, layer.horizon, layer.size) == (
        wanted.channels,
        wanted.horizon,
        wanted.size,
    )
    for norm in ("spectral", "rms", "loss"):
        close(*(one.data["log_gain"].sel(norm=norm).to_numpy() for one in (layer, wanted)))
    close(layer.lyapunov, wanted.lyapunov)


def close(found: object, wanted: object) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("elementwise", "scan carries channels 4, 5 of h from step to step, but the loss never"),
        ("Mamba", "scan carries channels 3, 4 of h"),
        ("delta rule", "scan carries head 3 of h"),
    ],
)
def test_what_has_no_vote_is_named_and_shown(name: str, words: str) -> None:
    run = analyzed(name, MADE[name][1])
    (said,) = [one for one in run.warnings if "no vote" in one]
    assert said.startswith(words)
    layer, whole = run["scan"].data, analyzed(name, 99)["scan"].data
    assert np.array_equal(layer["time_scale"], whole["time_scale"])
    assert np.array_equal(layer["head_gain"], whole["head_gain"])
    assert not [one for one in analyzed(name, 99).warnings if "no vote" in one]


@pytest.mark.parametrize("name", MADE)
def test_two_runs_are_compared_by_the_same_votes(name: str) -> None:
    recording = recorded(name, MADE[name][1])
    assert (
        votes(recording, span=None, seed=0)["scan"].gain == gradflow.analyze(recording)["scan"].gain
    )
