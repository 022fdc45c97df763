"""Run torch's own recurrent functions on what was recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gradflow.cells import CELLS
from gradflow.hooks.call import Call
from gradflow.process import autocast, random_numbers_kept


@contextlib.contextmanager
def autocast_of(call: Call) -> Iterator[None]:
    """The autocast of the recorded call."""
    device, enabled, dtype = call.autocast
    with contextlib.ExitStack() as stack:
        if enabled or torch.is_autocast_enabled(device):
            stack.enter_context(autocast(device, enabled=enabled, dtype=dtype))
        yield


@contextlib.contextmanager
def as_recorded(call: Call) -> Iterator[None]:
    """The random numbers and the autocast of the recorded call."""
    with contextlib.ExitStack() as stack:
        if call.rng is not None:
            graphic = [call.data.device] if call.data.device.type == "cuda" else []
            stack.enter_context(random_numbers_kept(graphic))
            torch.set_rng_state(call.rng)
        stack.enter_context(autocast_of(call))
        yield


def dropout_of(call: Call) -> Callable[[Tensor], Tensor] | None:
    """Gives the masks that the call drew between its layers again, one after the other.

    They come from a generator of their own, so nothing is drawn from anybody's; on a GPU, where the
    masks of a call cannot be had again, they are others. None where nothing was drawn.
    """
    if call.rng is None:
        return None
    device = call.data.device
    numbers = torch.Generator(device)
    if device.type == "cpu":
        numbers.set_state(call.rng)

    def factor(output: Tensor) -> Tensor:
        kept = 1 - call.dropout
        if kept <= 0:  # nothing is drawn
            return torch.zeros_like(output)
        return torch.empty_like(output).bernoulli_(kept, generator=numbers).div_(kept)

    return factor


def one_layer(call: Call, number: int, data: Tensor) -> Tensor:
    """The output of one layer, both directions, from its input (T, B, ·) or packed (N, ·)."""
    per_layer = len(call.weights) // call.layers
    weights = call.weights[number * per_layer : (number + 1) * per_layer]
    states = initial(call, number)
    alone = replace(call, data=data, initial=states, weights=weights, layers=1, dropout=0.0)
    return _run(replace(alone, batch_first=False))[0]


def whole_call(call: Call) -> tuple[Tensor, ...]:
    """What the call returns, all layers at once: output and the last states."""
    with torch.no_grad(), as_recorded(call):
        return _run(call)


def initial(call: Call, number: int) -> dict[str, Tensor]:
    """The initial states of one layer, (directions, B, width) each."""
    directions = 1 + call.bidirectional
    rows = slice(number * directions, (number + 1) * directions)
    return {name: state[rows] for name, state in call.initial.items()}


def weight_gradients(call: Call, beside: dict[str, Tensor]) -> dict[int, Tensor]:
    """Gradients of the weights by torch's own backward, from the gradients that were caught.

    Place in the flat list of weights -> gradient. What is given takes the place of what was caught at
    the states beside h, where that was more than what came from outside the call.
    """
    caught = call.grads | {name: grad.to(call.h0.dtype) for name, grad in beside.items()}
    with torch.enable_grad(), as_recorded(call):
        weights = tuple(weight.detach().clone().requires_grad_() for weight in call.weights)
        results = _run(replace(call, weights=weights))
        named = dict(zip(call.returned, results, strict=True))
        grads = torch.autograd.grad(
            [named[name] for name in caught], weights, list(caught.values()), allow_unused=True
        )
    return {place: grad for place, grad in enumerate(grads) if grad is not None}


def _run(call: Call) -> tuple[Tensor, ...]:
    if call.single:
        return _step(call)
    hidden = tuple(call.initial.values()) if len(call.initial) > 1 else call.h0
    weights, layers = list(call.weights), call.layers
    tail = (weights, call.has_biases, layers, call.dropout, call.training, call.bidirectional)
    function = CELLS[call.cell].whole
    assert function is not None
    if call.batch_sizes is not None:
        return function(call.data, call.batch_sizes, hidden, *tail)
    return function(call.data, hidden, *tail, call.batch_first)


def _step(call: Call) -> tuple[Tensor, ...]:
    """A single step by the function that made it, its results as those of a call of T = 1."""
    first = tuple(state[0] for state in call.initial.values())
    hidden = first if len(first) > 1 else first[0]
    found = CELLS[call.cell].step(call.data[0], hidden, *call.weights)
    rows = [state.unsqueeze(0) for state in (found if isinstance(found, tuple) else (found,))]
    return (rows[0], *rows)
