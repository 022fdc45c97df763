"""Copies of what a call was given and returned, made while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradflow.cells import CELLS
from gradflow.distributed import local_part
from gradflow.hooks.call import Call, Inner
from gradflow.hooks.seen import SeenCall
from gradflow.limits import SAMPLED

if TYPE_CHECKING:
    from gradflow.hooks.lengths import GivenLengths


class Copies:
    """Makes the copies, and keeps those of the weights, which many calls share.

    ``key`` gives the name under which the gradient of a weight is caught.
    """

    def __init__(self, lengths: GivenLengths, key: Callable[[Tensor], int]) -> None:
        self.lengths, self._key = lengths, key
        self._known: dict[object, Tensor] = {}  # weights, by id, or by owner and place

    def call(self, seen: SeenCall, owner: str) -> Call:
        """One call; a single step as a fused call of one layer and T = 1."""

        def taken(tensors: tuple[Tensor, ...]) -> list[Tensor]:
            every = map(copied, tensors)
            return [tensor.unsqueeze(0) for tensor in every] if seen.single else list(every)

        states, results = CELLS[seen.cell].states, taken(seen.results)
        if seen.single:  # h stands as output and as the last h
            results.insert(0, results[0])
        return Call(
            cell=seen.cell,
            owner=owner,
            data=taken((seen.data,))[0],
            batch_sizes=seen.batch_sizes,
            unsorted=seen.unsorted,
            initial=dict(zip(states, taken(seen.initial), strict=True)),
            weights=self._weights(owner, seen.weights),
            weight_keys=tuple(self._key(weight) for weight in seen.weights),
            has_biases=seen.has_biases,
            layers=seen.layers,
            dropout=seen.dropout,
            training=seen.training,
            bidirectional=seen.bidirectional,
            batch_first=seen.batch_first,
            rng=seen.rng,
            autocast=_autocast(seen.data.device.type),
            returned=dict(zip(("output", *states), results, strict=True)),
            grad_enabled=torch.is_grad_enabled(),
            differentiable=any(tensor.requires_grad for tensor in seen.results),
            lengths=None if seen.single else self.lengths.of_call(seen),
            single=seen.single,
            inner=tuple(
                Inner(x.shape[-1], copied(output) if output is not seen.results[0] else None)
                for x, _, output in seen.inner
            ),
            # a step in parts (on a CPU) makes h of the other states' own tensors; one kernel does not
            totals=seen.single and len({tensor.grad_fn for tensor in seen.results}) > 1,
        )

    def _weights(self, owner: str, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copies of the weights as they are now; one copy serves all calls that saw the same values.

        A weight is known by itself or, where it is computed anew for every call, by its place.
        """
        found = []
        for place, weight in enumerate(weights):
            one, other = self._known.get(id(weight)), self._known.get((owner, place))
            if one is not None and _equal(one, weight):
                found.append(one)
            elif other is not None and other is not one and _equal(other, weight):
                found.append(other)
            else:
                found.append(copied(weight))
            self._known[id(weight)] = self._known[owner, place] = found[-1]
        return tuple(found)

    def clear(self) -> None:
        """Keep no weight any longer."""
        self._known.clear()


def _autocast(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def stamp_of(module: nn.Module) -> tuple[object, ...]:
    """A few entries of every parameter, what an optimizer's step changes; () where none can be read."""
    found: list[object] = []
    try:
        for name, parameter in nn.Module.named_parameters(module):
            flat = local_part(parameter.detach()).reshape(-1)
            some = flat[:: max(1, flat.numel() // SAMPLED)][: 2 * SAMPLED]
            held = copied(
                some.cpu()
            )  # numpy takes the storage: of a weight, FSDP2 could not free it
            found.append((name, held.view(torch.uint8).numpy().tobytes()))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # without values, for one
        return ()
    return tuple(found)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy outside any graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
