"""`gradflow.scan`: the states of a parallel scan of one's own, against the loop under autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.errors import GradflowWarning, InputError

B, T, H = 3, 9, 4


def parallel(decay: Tensor, written: Tensor) -> Tensor:
    """h_t = a_t h_{t−1} + b_t without a loop, (B, T, H): by the matrix of all products of a."""
    logs = decay.log().cumsum(1)
    ratio = (logs.unsqueeze(2) - logs.unsqueeze(1)).exp()  # (B, T, T, H)
    causal = torch.ones(decay.shape[1], decay.shape[1]).tril().to(decay)
    return torch.einsum("btsh,ts,bsh->bth", ratio, causal, written)


def sequential(decay: Tensor, written: Tensor) -> Tensor:
    """The same by a loop, its states stacked."""
    h, states = torch.zeros_like(written[:, 0]), []
    for t in range(decay.shape[1]):
        h = decay[:, t] * h + written[:, t]
        states.append(h)
    return torch.stack(states, 1)


class MinGRU(nn.Module):
    """h_t = (1 − z_t) h_{t−1} + z_t n_t (Feng et al. 2024), its states marked."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], mark: bool = True) -> None:
        super().__init__()
        self.gate, self.new, self.out = nn.Linear(2, H), nn.Linear(2, H), nn.Linear(H, 2)
        self.run, self.mark = run, mark

    def forward(self, x: Tensor) -> Tensor:
        z = self.gate(x).sigmoid()
        h = self.run(1 - z, z * self.new(x))
        if self.mark:
            h = gradflow.scan(h, decay=1 - z, name="mixer")
        return self.out(h)


def made(run: Callable[[Tensor, Tensor], Tensor], mark: bool = True) -> MinGRU:
    torch.manual_seed(0)
    return MinGRU(run, mark).double()


def unrolled(model: MinGRU, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """States of the explicit loop, each with its total gradient after a backward, and y."""
    z = model.gate(x).sigmoid()
    written, h, states = z * model.new(x), torch.zeros(len(x), H).double(), []
    for t in range(x.shape[1]):
        h = (1 - z[:, t]) * h + written[:, t]
        h.retain_grad()
        states.append(h)
    return states, model.out(torch.stack(states, 1))


@pytest.mark.parametrize("run", [parallel, sequential])
@pytest.mark.parametrize("last", [True, False], ids=["last step", "every step"])
def test_totals_are_those_of_the_loop(run: Callable[..., Tensor], last: bool) -> None:
    model, x = made(run), torch.randn(B, T, 2).double()
    with gradflow.record(model) as recording:
        y = model(x)
        (y[:, -1] if last else y).square().sum().backward()
    states, y = unrolled(model, x)
    (y[:, -1] if last else y).square().sum().backward()
    track = recording["mixer"]
    for t, state in enumerate(states):
        assert state.grad is not None
        torch.testing.assert_close(track.grad_h[t], state.grad, rtol=1e-10, atol=0)
        torch.testing.assert_close(track.h[t], state.detach(), rtol=1e-10, atol=0)
    direct = track.grad_h_direct
    if last:
        assert not bool(direct[:-1].any())
        torch.testing.assert_close(track.grad_h_last, track.grad_h, rtol=1e-12, atol=0)
    assert torch.equal(direct[-1], track.grad_h[-1])


def test_a_wrong_decay_gives_other_totals() -> None:
    model, x = made(parallel, mark=False), torch.randn(B, T, 2).double()
    grads = []
    for off in (0.0, 1e-6):
        with gradflow.record(model) as recording:
            z = model.gate(x).sigmoid()
            h = gradflow.scan(parallel(1 - z, z * model.new(x)), decay=1 - z + off)
            model.out(h)[:, -1].sum().backward()
        grads.append(recording["scan"].grad_h[0])
    assert not torch.allclose(*grads, rtol=1e-10, atol=0)


def test_the_gain_of_a_mingru_is_the_product_of_what_it_keeps() -> None:
    model, x = made(parallel), torch.randn(B, T, 2).double()
    with gradflow.record(model) as recording:
        model(x).sum().backward()
    keep = 1 - model.gate(x).sigmoid().detach()
    found = gradflow.analyze(recording)["mixer"].data["log_gain"].sel(norm="spectral")
    b = int(found["sequence"][0])
    for source, target in ((0, 1), (0, T - 1), (3, 7)):
        expected = keep[b, source + 1 : target + 1].prod(0).max().log().item()
        value = float(found.isel(sequence=0).sel(source=source, target=target))
        assert value == pytest.approx(expected, rel=1e-10, abs=0)


def run_of(model: MinGRU, x: Tensor, record: bool) -> list[Tensor]:
    """Output, loss and parameter gradients, with or without a recording."""
    model.zero_grad()
    torch.manual_seed(3)
    if record:
        with gradflow.record(model):
            y = model(x)
            loss = y.square().mean()
            loss.backward()
    else:
        y = model(x)
        loss = y.square().mean()
        loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), loss.detach(), *grads, torch.randn(2)]


@pytest.mark.parametrize("run", [parallel, sequential])
def test_nothing_changes_what_the_model_computes(run: Callable[..., Tensor]) -> None:
    model, x = made(run).float(), torch.randn(B, T, 2)
    plain, recorded = run_of(model, x, False), run_of(model, x, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    unmarked = made(run, mark=False).float()
    unmarked.load_state_dict(model.state_dict())
    without = run_of(unmarked, x, False)
    assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))


def test_it_returns_the_very_tensor() -> None:
    h = torch.ones(1, 2, 3, requires_grad=True)
    assert gradflow.scan(h, decay=0.5) is h
    with gradflow.record(nn.Identity()):
        assert gradflow.scan(h, decay=0.5) is h
        h.sum().backward()


def recorded(*args: Any, **kwargs: Any) -> gradflow.Track:
    with gradflow.record(nn.Identity()) as recording:
        h = gradflow.scan(*args, **kwargs)
        (h.abs() ** 2).sum().backward()
    return recording["scan"]


def test_the_axis_of_time_is_told_from_the_graph_or_given() -> None:
    x = torch.randn(6, 2, 3, requires_grad=True)
    assert recorded(x.cumsum(0), decay=1.0).steps == 6
    assert recorded(torch.stack(list(x), 0), decay=1.0).steps == 6
    assert recorded(x * 1, decay=1.0).steps == 2  # batch first, by default
    assert recorded(x * 1, decay=1.0, time=0).steps == 6
    assert recorded(x[:, 0] * 1, decay=1.0).steps == 6  # no batch
    assert recorded(x.cumsum(2), decay=1.0, time=-3).steps == 6


@pytest.mark.parametrize(
    "shape", [(), (H,), (B, T, H), (1, T, 1), (B, T)], ids=["0", "1", "all", "time", "front"]
)
def test_decay_broadcasts(shape: tuple[int, ...]) -> None:
    h = torch.randn(B, T, H, requires_grad=True)
    track = recorded(h * 1, decay=torch.full(shape, 0.5))
    expected = torch.zeros(B, H)
    for t in reversed(range(T)):
        expected = 2 * h.detach()[:, t] + (0.5 * expected if t < T - 1 else 0)
        torch.testing.assert_close(track.grad_h[t], expected, rtol=1e-5, atol=0)


def test_complex_states() -> None:
    decay = torch.polar(torch.full((H,), 0.9), torch.arange(H) * 0.7).to(torch.complex128)
    x = torch.randn(B, T, H, dtype=torch.complex128, requires_grad=True)
    h, states = torch.zeros(B, H, dtype=torch.complex128), []
    for t in range(T):
        h = decay * h + x[:, t]
        h.retain_grad()
        states.append(h)
    loss = (torch.stack(states, 1)[:, -1].real * torch.arange(H)).sum()
    loss.backward()
    powers = decay.view(1, 1, H) ** (torch.arange(T).view(T, 1, 1) - torch.arange(T).view(1, T, 1))
    kernel = powers * torch.ones(T, T).tril().unsqueeze(-1)
    with gradflow.record(nn.Identity()) as recording:
        h = gradflow.scan(torch.einsum("tsh,bsh->bth", kernel, x), decay=decay)
        (h[:, -1].real * torch.arange(H)).sum().backward()
    for t, state in enumerate(states):
        assert state.grad is not None
        difference = (recording["scan"].grad_h[t] - state.grad).abs().amax()
        assert float(difference) <= 1e-10 * float(state.grad.abs().amax())


def test_delta_rule() -> None:
    heads, d_k, d_v = 2, 3, 2
    keys = nn.functional.normalize(torch.randn(B, T, heads, d_k).double(), dim=-1)
    beta, decay = torch.rand(B, T, heads).double(), torch.rand(B, T, heads).double()
    values = torch.randn(B, T, heads, d_v).double().requires_grad_()
    state, states = torch.zeros(B, heads, d_k, d_v).double(), []
    for t in range(T):
        k, strong = keys[:, t, :, :, None], beta[:, t, :, None, None]
        state = decay[:, t, :, None, None] * state
        state = state - strong * k * (k * state).sum(-2, keepdim=True)
        state = state + strong * k * values[:, t, :, None, :]
        state.retain_grad()
        states.append(state)
    with gradflow.record(nn.Identity()) as recording:
        stacked = torch.stack(states, 1)
        h = gradflow.scan(stacked, decay=decay, keys=keys, beta=beta)
        h[:, -1].square().sum().backward()
    track = recording["scan"]
    assert track.state_shape == (heads, d_k, d_v)
    for t, state in enumerate(states):
        assert state.grad is not None
        torch.testing.assert_close(track.grad_h[t], state.grad.flatten(1), rtol=1e-9, atol=1e-300)


def test_reading_the_stack_alone_or_the_states_themselves() -> None:
    """A loss that reads h_t before they are stacked is not seen by the stack's own gradient."""
    model, x = made(sequential), torch.randn(B, T, 2).double()
    with gradflow.record(model) as recording:
        model(x)[:, -1].sum().backward()
    assert bool(recording["mixer"].grad_h[0].any())


def test_no_grad_checkpoint_and_batched_gradients() -> None:
    model, x = made(parallel), torch.randn(B, T, 2).double()
    with (
        pytest.warns(GradflowWarning, match="torch.no_grad"),
        gradflow.record(model) as recording,
        torch.no_grad(),
    ):
        model(x)
    assert recording["mixer"].steps == T
    with gradflow.record(model) as plain:
        model(x).sum().backward()
    with gradflow.record(model) as recording:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert len(recording) == 1
    assert torch.equal(recording["mixer"].grad_h, plain["mixer"].grad_h)
    with gradflow.record(model) as recording:
        y = model(x).sum((0, 1))
        torch.autograd.grad(y, model.out.weight, torch.eye(2).double(), is_grads_batched=True,
                            retain_graph=True)  # fmt: skip
        y.sum().backward()
    torch.testing.assert_close(recording["mixer"].grad_h, plain["mixer"].grad_h, rtol=1e-12, atol=0)


def test_two_scans_of_one_name_are_two_tracks_and_pooled_as_one_layer() -> None:
    model, x = made(parallel), torch.randn(B, T, 2).double()
    with gradflow.record(model) as recording:
        (model(x).sum() + model(x * 2).sum()).backward()
    assert list(recording.tracks) == ["mixer", "mixer@2"]
    assert gradflow.analyze(recording)["mixer"].sequences == 2 * B


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (
            {"decay": -5 * torch.rand(B, T, H) - 2},
            "^decay of scan must be the factor a_t of the st",
        ),
        ({"decay": torch.ones(T, B, H)}, "^decay of scan must be broadcastable to h, "),
        ({"decay": "0.5"}, "^decay of scan must be a number or a tensor"),
        ({"decay": torch.ones(H, dtype=torch.complex64)}, "^decay of scan must be real beside"),
        ({"decay": 0.5, "time": 3}, "^time of scan must be an axis of h, which has 3"),
        ({"decay": 0.5, "keys": torch.ones(B, T, 1, H)}, "^h of scan with keys must be"),
        ({"decay": 0.5, "beta": 0.5}, "^beta of scan is the strength of keys"),
        ({"decay": 0.5, "initial": torch.ones(2)}, "^initial of scan must be of shape"),
        ({"decay": 0.5, "name": ""}, "^the name given to scan must be a string"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs: dict[str, Any], sentence: str) -> None:
    h = torch.randn(B, T, H, requires_grad=True) * 1
    with pytest.raises(InputError, match=sentence), gradflow.record(nn.Identity()):
        gradflow.scan(h, **kwargs)


class FedBack(nn.Module):
    """h_t = a h_{t−1} + W y_{t−1} + x_t, y = tanh(V h), marked step by step, in chunks or at once."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back, self.decay = back, nn.Parameter(torch.full((H,), 0.9, dtype=torch.float64))
        self.read, self.take = nn.Linear(H, H), nn.Linear(H, H)

    def added(self, x: Tensor, h: Tensor) -> Tensor:
        return x + self.take(self.read(h).tanh()) if self.back else x

    def forward(self, x: Tensor, size: int) -> list[Tensor]:
        """The states; size steps are marked at once, of which the first hears what came out before."""
        states = [torch.zeros(len(x), H, dtype=x.dtype)]
        for chunk in x.split(size, 1):
            first, here = states[-1], []
            for t in range(chunk.shape[1]):
                whole = size == x.shape[1]
                heard = self.added(chunk[:, t], states[-1] if whole else first)
                states.append(self.decay * states[-1] + heard)
                here.append(states[-1])
            marked = gradflow.scan(torch.stack(here, 1), decay=self.decay, initial=first)
            states[-1] = marked[:, -1]
        return states[1:]


@pytest.mark.parametrize("size", [1, 3, T])
@pytest.mark.parametrize("back", [False, True])
def test_a_scan_that_takes_in_its_own_output_has_no_gains_of_its_decay(
    size: int, back: bool
) -> None:
    """Its decay alone says 0.9 a step; autograd over the loop says another number."""
    torch.manual_seed(0)
    model, x = FedBack(back).double(), torch.randn(B, T, H).double()
    states = model(x, size)
    by_graph = torch.autograd.grad(states[-1][:, 0].sum(), states[0])[0][:, 0]
    same = torch.allclose(by_graph, torch.full_like(by_graph, 0.9 ** (T - 1)), rtol=1e-10, atol=0)
    assert same != back
    with warnings.catch_warnings(), gradflow.record(model) as recording:
        warnings.simplefilter("ignore", GradflowWarning)
        model(x, size)[-1].square().sum().backward()
    if back and size == T:
        assert "scan" not in recording
        assert any("autograd gives another derivative" in note for note in recording.notes)
        return
    layer = gradflow.analyze(recording)["scan"]
    assert ("no gains" in layer.labels) == back
    assert ("its output fed back" in layer.sentence) == back
    assert back or layer.gain.value == pytest.approx((T - 1) * math.log(0.9), rel=1e-9)
