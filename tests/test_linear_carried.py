"""A state carried from call to call: one track, joined or cut, against one loop under autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_oracles import random, unit
from seam import LinearSteps, Scanned
from torch import Tensor, nn

import gradflow
from gradflow.hooks import patch

B, CHUNKS, T, H = 3, 3, 5, 4


def steps_of(write: Tensor, chunk: int, initial: Tensor | None) -> LinearSteps:
    """The chunk of a gated delta rule whose writes are a leaf of the graph."""
    time = slice(chunk * T, (chunk + 1) * T)
    keys = unit(random(CHUNKS * T, B, 1, H, seed=1, low=-1.0))[time]
    decay, beta = random(CHUNKS * T, B, 1, 1, seed=2, low=0.7)[time], 0.4
    return LinearSteps(
        shape=(1, H, 2),
        decay=decay.unsqueeze(-1),
        left=-decay * beta * keys,
        right=keys,
        write=(write[time],),
        initial=initial,
        read=lambda states: states.sum(-2),
    )


def run(
    write: Tensor,
    initial: Tensor | None,
    chunk: int,
    cut: str = "",
    inputs: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """A function of a library that is observed: (y, last state)."""
    steps = steps_of(write, chunk, initial)
    state = torch.zeros(B, 1, H, 2).double() if initial is None else initial
    states = []
    for t in range(T):
        moved = steps.push(t, state.flatten(1).unsqueeze(1)).squeeze(1)
        state = moved.unflatten(1, steps.shape) + steps.write[0][t]
        states.append(state)
    y, final = torch.stack(states).sum(-2), states[-1] * 1
    made = LinearSteps(
        **vars(steps)
        | {
            "write": (steps.write[0].detach(),),
            "initial": None if initial is None else initial.detach(),
        }
    )
    scanned = Scanned(
        name="mixer",
        cell="delta",
        steps=T,
        batch=B,
        shape=steps.shape,
        make=lambda: made,
        output=y,
        final=final,
        initial=initial,
        cut=cut,
        inputs=inputs,
    )
    for observer in patch.observers_here():
        observer.saw_scan(scanned)
    return y, final


def carried(
    between: Callable[[Tensor], Tensor], **kwargs: Any
) -> tuple[gradflow.Recording, Tensor]:
    """All chunks, what happens to the state between them, and a loss on every chunk's end."""
    write = random(CHUNKS * T, B, 1, H, 2, seed=3, low=-1.0).requires_grad_()
    with gradflow.record(nn.Identity()) as recording:
        state, loss = None, torch.zeros(()).double()
        for chunk in range(CHUNKS):
            y, last = run(write, state, chunk, **kwargs)
            loss = loss + (y[-1] ** 2).sum() * (chunk + 1)
            state = between(last)
        loss.backward()
    assert write.grad is not None
    return recording, write.grad


def test_a_state_that_is_handed_on_makes_one_track() -> None:
    recording, grad = carried(lambda state: state)
    assert list(recording.tracks) == ["mixer"]
    track = recording["mixer"]
    assert track.steps == CHUNKS * T
    assert not bool(track.cuts.any())
    # B_t is added to the state: its gradient is the total at S_t
    torch.testing.assert_close(track.grad_h, grad.flatten(2), rtol=1e-10, atol=0)
    ends = track.grad_h_direct.any(2).any(1).nonzero().flatten().tolist()
    assert ends == [T - 1, 2 * T - 1, 3 * T - 1]


def test_its_last_loss_step_reaches_back_across_the_calls() -> None:
    recording, _ = carried(lambda state: state)
    track = recording["mixer"]
    write = random(CHUNKS * T, B, 1, H, 2, seed=3, low=-1.0).requires_grad_()
    state: Tensor | None = None
    for chunk in range(CHUNKS):
        y, state = run(write, state, chunk)
    (y[-1] ** 2).sum().mul(CHUNKS).backward()
    assert write.grad is not None
    assert track.grad_h_last is not None
    torch.testing.assert_close(track.grad_h_last, write.grad.flatten(2), rtol=1e-10, atol=0)


def test_a_detached_state_is_a_cut() -> None:
    recording, grad = carried(lambda state: state.detach())
    track = recording["mixer"]
    assert track.steps == CHUNKS * T
    assert track.cuts.all(1).nonzero().flatten().tolist() == [T, 2 * T]
    torch.testing.assert_close(track.grad_h, grad.flatten(2), rtol=1e-10, atol=0)
    assert any("no gradient comes back" in note for note in track.notes)
    layer = gradflow.analyze(recording)["mixer"]
    assert "cut off from its past at 2 steps" in layer.sentence
    assert float(layer.data["segment_length"].max()) == T


def test_calls_whose_inputs_descend_from_what_the_call_before_returned_have_no_gains() -> None:
    """A closed loop: what its decays pass on is not all that goes around."""
    write = random(CHUNKS * T, B, 1, H, 2, seed=3, low=-1.0).requires_grad_()
    for returned in (0, 1):  # y, the last state
        with gradflow.record(nn.Identity()) as recording:
            given = (write,)
            state = None
            for chunk in range(CHUNKS):
                found = run(write, state, chunk, inputs=given)
                state, given = found[1], (torch.tanh(found[returned]),)
            state.square().sum().backward()
        layer = gradflow.analyze(recording)["mixer"]
        assert "no gains" in layer.labels and "its output fed back" in layer.sentence
        assert recording["mixer"].steps == CHUNKS * T


def test_a_kernel_that_returns_no_gradient_for_its_first_state_is_a_cut_and_says_so() -> None:
    words = "the kernel returns no gradient for its initial state"
    recording, _ = carried(lambda state: state.detach(), cut=words)
    track = recording["mixer"]
    assert words in track.notes
    assert track.cuts.all(1).nonzero().flatten().tolist() == [T, 2 * T]


def test_sequences_that_start_anew_are_cut_alone() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0]).double().view(B, 1, 1, 1)
    recording, grad = carried(lambda state: state * mask)
    track = recording["mixer"]
    assert track.cuts[T].tolist() == [False, True, False]
    torch.testing.assert_close(track.grad_h, grad.flatten(2), rtol=1e-10, atol=0)


def test_a_state_that_was_changed_between_starts_a_track_of_its_own() -> None:
    recording, grad = carried(lambda state: state * 0.5)
    assert list(recording.tracks) == ["mixer", "mixer@2", "mixer@3"]
    for number, track in enumerate(recording.values()):
        part = grad.flatten(2)[number * T : (number + 1) * T]
        torch.testing.assert_close(track.grad_h, part, rtol=1e-10, atol=0)


def test_what_does_not_give_what_was_returned_is_refused() -> None:
    write = random(T, B, 1, H, 2, seed=3).requires_grad_()
    with gradflow.record(nn.Identity()) as recording:
        steps = steps_of(write.detach(), 0, None)
        y = (steps.states().sum(-2) * 1.01).requires_grad_()
        scanned = Scanned(
            name="mixer", cell="delta", steps=T, batch=B, shape=steps.shape, make=lambda: steps,
            output=y,
        )  # fmt: skip
        for observer in patch.observers_here():
            observer.saw_scan(scanned)
        y.sum().backward()
    with pytest.raises(gradflow.errors.RecordingError, match=r"^mixer: run again from what"):
        _ = recording["mixer"].h


def chunked(
    between: Callable[[Tensor], Tensor], layers: int = 1
) -> tuple[gradflow.Recording, list[Tensor]]:
    """Parallel scans of chunks, each from what is left of the state before, marked; and every b_t."""
    decays = random(layers, B, CHUNKS * T, H, seed=4, low=0.6)
    writes = [random(B, T, H, seed=5 + c, low=-1.0).requires_grad_() for c in range(CHUNKS)]
    inner: list[Tensor] = []
    with gradflow.record(nn.Identity()) as recording:
        states, loss = [torch.zeros(B, H).double()] * layers, torch.zeros(()).double()
        for chunk, x in enumerate(writes):
            for layer in range(layers):
                a = decays[layer, :, chunk * T : (chunk + 1) * T]
                x = x * 1  # a leaf of its own for every layer
                x.retain_grad()
                inner.append(x)
                kept = a.cumprod(1)
                h = kept * (states[layer].unsqueeze(1) + (x / kept).cumsum(1))
                h = gradflow.scan(h, decay=a, initial=states[layer])
                states[layer], x = between(h[:, -1]), h
            loss = loss + (h[:, -1] ** 2).sum() * (chunk + 1)
        loss.backward()
    return recording, [x.grad for x in inner if x.grad is not None]


MASK = torch.tensor([1.0, 0.0, 1.0]).double().unsqueeze(1)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("between", "cut"),
    [
        (lambda state: state, [False] * B),
        (lambda state: state.detach(), [True] * B),
        (lambda state: state * MASK, [False, True, False]),
    ],
    ids=["attached", "detached", "masked"],
)
def test_marked_chunks_that_hand_on_their_state_are_one_track(
    between: Callable[[Tensor], Tensor], cut: list[bool], layers: int
) -> None:
    recording, grads = chunked(between, layers)
    assert list(recording.tracks) == ["scan", "scan@2"][:layers]
    for layer, track in enumerate(recording.values()):
        assert track.steps == CHUNKS * T
        assert track.cuts[T].tolist() == track.cuts[2 * T].tolist() == cut
        expected = torch.cat(grads[layer::layers], 1).transpose(0, 1)
        torch.testing.assert_close(track.grad_h, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(track.h0, torch.zeros(B, H).double(), rtol=0, atol=0)
    if layers == 1:
        arrives = track.grad_h_direct.any(2).any(1).nonzero().flatten().tolist()
        assert arrives == [T - 1, 2 * T - 1, 3 * T - 1]


def test_a_first_state_that_is_not_the_last_one_begins_anew() -> None:
    recording, _ = chunked(lambda state: state * 0.5)
    assert list(recording.tracks) == ["scan", "scan@2", "scan@3"]


@pytest.mark.parametrize("given", [False, True], ids=["left out", "given"])
def test_chunks_without_their_first_state_are_told(given: bool) -> None:
    with gradflow.record(torch.nn.Identity()) as recording:
        last = None
        for _ in range(2):
            h = torch.ones(2, 5, 3, requires_grad=True).cumsum(1)
            initial = torch.zeros(2, 3) if last is None else last
            h = gradflow.scan(h, decay=1.0, time=1, initial=initial if given else None)
            last = h[:, -1].detach()
            h.sum().backward()
    said = [any("give scan" in note for note in track.notes) for track in recording.values()]
    assert said == ([False] if given else [False, True])
