"""The structured way against the one that pushes blocks: the same numbers, where both can be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_oracles import gated_delta, mamba, random, rwkv7, scalar_per_head, unit
from seam import LinearSteps, Scanned, Settings, logs_of, measure_linear
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import core
from gradflow.hooks import patch

SETTINGS = Settings(None, None, 2, "exact", 1, 0, 1, lambda phase, share: None)
LONG = 24


def gated(t: int = LONG, b: int = 3) -> LinearSteps:
    """A gated delta rule of two heads."""
    heads, d_k, d_v = 2, 4, 3
    keys = unit(random(t, b, heads, d_k, seed=16, low=-1.0))
    beta = random(t, b, heads, 1, seed=17)
    decay = random(t, b, heads, 1, seed=18, low=0.8)
    return LinearSteps(
        shape=(heads, d_k, d_v),
        decay=decay.unsqueeze(-1),
        left=-decay * beta * keys,
        right=keys,
        write=(keys.unsqueeze(-1), random(t, b, heads, 1, d_v, seed=20)),
    )


MADE = {
    "Mamba": lambda: mamba(LONG, 3),
    "scalar per head": lambda: scalar_per_head(LONG, 3),
    "gated delta rule": gated,
    "RWKV-7": lambda: rwkv7(LONG, 3),
    "elementwise": lambda: LinearSteps(
        shape=(5,), decay=random(LONG, 3, 5, low=0.5), write=(random(LONG, 3, 5, seed=2),)
    ),
}


def recorded(steps: LinearSteps, lengths: list[int] | None = None) -> gradflow.Recording:
    """A recording of such a recurrence, whose last output is read."""
    weight = random(steps.size, seed=40, low=-1.0)
    with gradflow.record(nn.Identity(), lengths=lengths) as recording:
        states = steps.states().clone().requires_grad_()
        scanned = Scanned(
            name="mixer",
            cell="made",
            steps=steps.length,
            batch=steps.batch,
            shape=steps.shape,
            make=lambda: steps,
            states=states,
        )
        for observer in patch.observers_here():
            observer.saw_scan(scanned)
        ends = [steps.length] * steps.batch if lengths is None else lengths
        last = torch.stack([states[end - 1, b] for b, end in enumerate(ends)])
        (last.flatten(1) * weight).sum().backward()
    return recording


def close(found: Any, expected: Any, bound: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("lengths", [None, [LONG, 17, 12]], ids=["full", "padded"])
def test_numbers_are_those_of_pushed_blocks(name: str, lengths: list[int] | None) -> None:
    track = recorded(MADE[name](), lengths)["mixer"]
    found = measure_linear(track, SETTINGS, withheld=False)
    expected = core.measure(track, SETTINGS, withheld=False)
    assert found.mapped == expected.mapped
    for norm in ("spectral", "rms", "loss"):
        close(found.maps.log_gain[norm], expected.maps.log_gain[norm])
    close(found.sequence_gains.values, expected.sequence_gains.values)
    close(found.gain.value, expected.gain.value)
    close([found.gain.low, found.gain.high], [expected.gain.low, expected.gain.high], 1e-6)
    assert found.verdict.name == expected.verdict.name
    close(found.curve.median, expected.curve.median)
    size = min(len(found.ranks.singular[0]), 6)
    close(found.ranks.singular[0][:size], expected.ranks.singular[0][:size], 1e-6)
    assert found.ranks.reach == expected.ranks.reach


def test_rates_are_means_of_logarithms() -> None:
    steps = MADE["elementwise"]()
    analysis = gradflow.analyze(recorded(steps))["mixer"]
    counted = steps.decay[5:].log().mean(0)  # past the burn-in of ⌈24/5⌉ steps
    close(analysis.data["sequence_rate"], counted.amax(1))
    assert analysis.lyapunov is not None
    ordered = counted.sort(dim=1, descending=True).values.mean(0)
    close(analysis.lyapunov, ordered)


def test_heads_have_gains_and_verdicts_of_their_own() -> None:
    heads, t, b = 3, 60, 4
    decay = torch.tensor([0.999, 0.97, 0.5]).double().view(1, 1, heads, 1, 1)
    decay = decay * random(t, b, heads, 1, 1, low=0.999)
    steps = LinearSteps(
        shape=(heads, 2, 2),
        decay=decay,
        write=(random(t, b, heads, 2, 1), random(t, b, heads, 1, 2)),
    )
    found = measure_linear(recorded(steps)["mixer"], SETTINGS, withheld=False).linear
    assert found is not None
    assert found.heads is not None
    assert [one.name for one in found.heads.verdict] == ["stable", "stable", "vanishing"]
    whole = decay[1:, :, :, 0, 0].log().sum(0)  # (B, G)
    close([gain.value for gain in found.heads.gain], whole.mean(0))
    close(found.heads.log_gain[:, -1], np.sort(whole[[0, 1]].numpy(), axis=0).mean(0), 1.0)


def test_a_step_that_erases_is_told() -> None:
    t, b, heads, d_k = 40, 2, 2, 3
    keys = unit(random(t, b, heads, d_k, low=-1.0))
    beta = torch.tensor([1.0, 0.3]).double().view(1, 1, 2, 1).expand(t, b, 2, 1)
    steps = LinearSteps(
        shape=(heads, d_k, 2),
        decay=torch.ones(t, b, 1, 1, 1).double(),
        left=-beta * keys,
        right=keys,
        write=(keys.unsqueeze(-1), random(t, b, heads, 1, 2, seed=3)),
    )
    found = measure_linear(recorded(steps)["mixer"], SETTINGS, withheld=False).linear
    assert found is not None
    assert found.heads is not None
    close(found.heads.erased, [1.0, 0.0])


def test_the_first_step_has_no_say() -> None:
    """RG-LRU resets at position 0: what leads into the first state acts on none that is seen."""
    decay = random(8, 2, 3, low=0.8)
    decay[0] = 0.0
    steps = LinearSteps(shape=(3,), decay=decay, write=(random(8, 2, 3),))
    assert np.isfinite(gradflow.analyze(recorded(steps))["mixer"].rate.value)


def test_complex_states_are_measured_by_their_moduli() -> None:
    t, b, h = 40, 3, 4
    modulus = torch.tensor([0.99, 0.9, 0.8, 0.5]).double()
    decay = torch.polar(modulus, torch.arange(4.0).double()).expand(t, b, h)
    written = torch.complex(random(t, b, h), random(t, b, h, seed=1))
    steps = LinearSteps(shape=(h,), decay=decay, write=(written,))
    with gradflow.record(nn.Identity()) as recording:
        h_t = steps.states().movedim(0, 1).clone().requires_grad_()
        gradflow.scan(h_t, decay=modulus.to(decay.dtype) * torch.exp(1j * torch.arange(4.0)))
        h_t[:, -1].abs().square().sum().backward()
    found = gradflow.analyze(recording)["scan"]
    assert found.rate.value == pytest.approx(np.log(0.99), rel=1e-6)
    close(found.data["time_scale"], -1 / np.log(modulus.numpy()), 1e-6)
    close(found.data["log_gain"].sel(norm="spectral")[0, 0, -1], 39 * np.log(0.99), 1e-6)


def initial_mamba(channels: int) -> Tensor:
    """|a| of Mamba at its initial values: exp(−Δ n), Δ log-uniform on [0.001, 0.1], n = 1 … 16.

    Its channels at evenly spaced quantiles of Δ, which a sample of them scatters about.
    """
    share = (torch.arange(channels).double() + 0.5) / channels
    delta = 0.001 * (0.1 / 0.001) ** share
    return torch.exp(-delta.unsqueeze(1) * torch.arange(1.0, 17).double())


def test_initial_gain_of_mamba() -> None:
    """The mean over 512 channels and N = 16 at distances 1, 10, 100, 1000, within 5 %."""
    decay = initial_mamba(512).expand(1001, 1, -1, -1)
    steps = LinearSteps(shape=(512, 16), decay=decay)
    logs = logs_of(steps)
    for lag, published in ((1, 0.8569), (10, 0.4725), (100, 0.1033), (1000, 0.00389)):
        found = logs.between(torch.tensor([0]), torch.tensor([lag])).exp().mean()
        assert float(found) == pytest.approx(published, rel=0.05)


def test_a_delta_rule_without_a_gate_keeps_all_but_the_erased() -> None:
    steps = gated_delta(12, 2)
    found = measure_linear(recorded(steps)["mixer"], SETTINGS, withheld=False)
    assert found.linear is not None
    assert found.linear.rank_one
