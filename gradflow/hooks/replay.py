"""Replay: from what was seen of one fused call to every state, gate and gradient inside it.

The inner layers are run again one by one, without gradient, with the same dropout. Since every
h_{t−1} is then known, the gates of all steps come from one matrix product, `Scans` goes on
from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradflow.cells import CELLS, Steps, Weights
from gradflow.errors import RecordingError
from gradflow.hooks.call import Call
from gradflow.hooks.kernels import autocast_of, dropout_of, initial, one_layer
from gradflow.limits import REPLAY_FLOAT32, REPLAY_FLOAT64, REPLAY_HALF

TOLERANCES = {torch.float64: REPLAY_FLOAT64, torch.float32: REPLAY_FLOAT32}


@dataclass(frozen=True)
class Layer:
    """One layer and direction; arrays in processing order, sequences in the user's order."""

    weights: Weights
    x: Tensor  # (T, B, I)
    h: Tensor  # (T, B, P)
    initial: dict[str, Tensor]  # state name -> (B, width)
    order: Tensor | None  # (T, B) processing step -> input step, its own inverse; None: the same
    valid: Tensor  # (T, B) true where the kernel ran a step

    def turned(self, array: Tensor, columns: Tensor | None = None) -> Tensor:
        """From processing order to input time, or back; columns are its sequences, all by default."""
        if self.order is None:
            return array
        return take_steps(array, self.order if columns is None else self.order[:, columns])

    def linearise(self, cell: str, dtype: torch.dtype, sequences: Tensor | None = None) -> Steps:
        """The layer's steps at its recorded states; steps the kernel did not run are zero."""

        def pick(array: Tensor, dim: int) -> Tensor:
            array = array if sequences is None else array.index_select(dim, sequences)
            return array.to(dtype)

        initial = {name: pick(state, 0) for name, state in self.initial.items()}
        steps = CELLS[cell].linearise(
            self.weights.to(dtype), pick(self.x, 1), pick(self.h, 1), initial
        )
        valid = self.valid if sequences is None else self.valid.index_select(1, sequences)
        return (
            steps if bool(valid.all()) else steps.each_step(lambda array: masked(array, valid, 0.0))
        )


class Replay:
    """One fused call, run again as far as needed; layers[layer][direction]."""

    def __init__(self, call: Call) -> None:
        self.call = call
        steps, batch = self._extent()
        device = call.data.device
        self.kernel_lengths = torch.full((batch,), steps)  # steps the kernel ran, user's order
        if call.batch_sizes is not None:
            ranks = torch.arange(batch)
            sorted_lengths = (call.batch_sizes.unsqueeze(1) > ranks).sum(0)
            self.kernel_lengths = self.unsort(sorted_lengths, 0)
        lengths = self.kernel_lengths if call.lengths is None else call.lengths
        self.lengths = lengths.to(device)
        self.kernel_lengths = self.kernel_lengths.to(device)
        time = torch.arange(steps, device=device).unsqueeze(1)
        self.mask = time < self.lengths
        self.kernel_mask = time < self.kernel_lengths
        mirrored = self.kernel_lengths - 1 - time
        self.mirror = torch.where(self.kernel_mask, mirrored, time)

    def _extent(self) -> tuple[int, int]:
        call = self.call
        if call.batch_sizes is not None:
            return len(call.batch_sizes), int(call.batch_sizes[0])
        steps, batch = call.data.shape[:2]
        return (batch, steps) if call.batch_first else (steps, batch)

    def unsort(self, array: Tensor, dim: int) -> Tensor:
        """From the kernel's order of sequences to the user's."""
        if self.call.unsorted is None:
            return array
        return array.index_select(dim, self.call.unsorted.to(array.device))

    def padded(self, data: Tensor) -> Tensor:
        """(T, B, ·) in the user's order from the kernel's layout; 0 where no step was run."""
        batch_sizes = self.call.batch_sizes
        if batch_sizes is None:
            return data
        padded = data.new_zeros(len(batch_sizes), int(batch_sizes[0]), data.shape[-1])
        kernel_time = torch.arange(len(batch_sizes)).unsqueeze(1)
        ran = torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)
        times = kernel_time.expand_as(ran)[ran].to(data.device)
        ranks = torch.arange(int(batch_sizes[0])).expand_as(ran)[ran].to(data.device)
        padded[times, ranks] = data
        return self.unsort(padded, 1)

    def time_first(self, data: Tensor) -> Tensor:
        """(T, B, ·) or packed, whatever the call's layout."""
        return data.transpose(0, 1).contiguous() if self.call.batch_first else data

    # -- forward -----------------------------------------------------------------------------

    def weights(self, layer: int, direction: int) -> Weights:
        """The weights of one layer and direction."""
        return Weights(**self.by_name(self.call.weights, layer, direction))

    def weight_keys(self, layer: int, direction: int) -> dict[str, int]:
        """Weight name -> key in `WeightUses`."""
        return self.by_name(self.call.weight_keys, layer, direction)

    def by_name(self, flat: tuple[Any, ...], layer: int, direction: int) -> dict[str, Any]:
        """Of a flat list over all weights of the call, those of one layer and direction."""
        directions = 1 + self.call.bidirectional
        count = len(flat) // (self.call.layers * directions)
        cell = CELLS[self.call.cell]
        names = cell.weight_names(count, has_biases=self.call.has_biases)
        start = (layer * directions + direction) * count
        return dict(zip(names, flat[start : start + count], strict=True))

    @cached_property
    def _run(self) -> tuple[list[list[Layer]], list[Tensor]]:
        """All layers, and the dropout between them as factors (T, B, ·), input-time order."""
        call = self.call
        data, layers, factors = self.time_first(call.data), [], []
        drawn = dropout_of(call)
        with torch.no_grad(), autocast_of(call):
            for number in range(call.layers):
                top = number == call.layers - 1
                inner = call.layers > 1  # a single layer's states are its output
                output = (
                    one_layer(call, number, data)
                    if inner
                    else self.time_first(call.returned["output"])
                )
                if top and inner:
                    self._compare(output)
                layers.append(self._directions(number, data, output))
                if top:
                    break
                if drawn is not None:
                    factor = drawn(output)
                    factors.append(self.padded(factor))
                    data = output * factor
                else:
                    factors.append(output.new_ones(()))
                    data = output
        return layers, factors

    def dropout_factor(self, number: int) -> Tensor:
        """What the output of a layer was multiplied by before the next one read it, (T, B, ·)."""
        return self._run[1][number]

    @property
    def layers(self) -> list[list[Layer]]:
        """layers[layer][direction]."""
        return self._run[0]

    def _compare(self, output: Tensor) -> None:
        """Refuse a replay that does not give what the call returned."""
        returned = self.time_first(self.call.returned["output"])
        finite = returned.isfinite()
        scale = returned[finite].abs().max() if bool(finite.any()) else returned.new_tensor(1.0)
        difference = (output - returned)[finite].abs().max() if bool(finite.any()) else scale * 0
        tolerance = TOLERANCES.get(returned.dtype, REPLAY_HALF)
        if not bool(difference <= tolerance * scale):
            raise RecordingError(
                f"the layers of {self.call.owner or 'the model'} cannot be replayed: run again, the "
                f"call returns other values than it did (off by {float(difference):.3g}); on this "
                "backend the dropout between layers is not reproducible, so call model.eval() or "
                "record the layers one by one"
            )

    def _directions(self, number: int, data: Tensor, output: Tensor) -> list[Layer]:
        x, h = self.padded(data), self.padded(output)
        if number == self.call.layers - 1:
            h = self.padded(self.time_first(self.call.returned["output"]))
        starts = {name: self.unsort(s, 1) for name, s in initial(self.call, number).items()}
        layers = []
        for direction, part in enumerate(h.chunk(1 + self.call.bidirectional, dim=2)):
            order = self.mirror if direction else None
            layers.append(
                Layer(
                    weights=self.weights(number, direction),
                    x=take_steps(x, order) if order is not None else x,
                    h=take_steps(part, order) if order is not None else part,
                    initial={name: start[direction] for name, start in starts.items()},
                    order=order,
                    valid=self.kernel_mask,
                )
            )
        return layers

    @property
    def work_dtype(self) -> torch.dtype:
        """What scans compute in: at least float32."""
        return torch.promote_types(self.call.weights[0].dtype, torch.float32)

    @cached_property
    def _linearised(self) -> list[list[Steps]]:
        with torch.no_grad():
            return [
                [layer.linearise(self.call.cell, self.work_dtype) for layer in directions]
                for directions in self.layers
            ]

    def steps(self, layer: int, direction: int) -> Steps:
        """One layer's linearised steps in the dtype of the scan, processing order."""
        return self._linearised[layer][direction]

    def steps_of(self, layer: int, direction: int, dtype: torch.dtype, sequences: Tensor) -> Steps:
        """The same of some sequences in another dtype; taken from those of all where they are known."""
        if dtype == self.work_dtype and "_linearised" in vars(self):
            known = self.steps(layer, direction)
            return known.each_step(lambda array: array.index_select(1, sequences))
        return self.layers[layer][direction].linearise(self.call.cell, dtype, sequences)


def take_steps(array: Tensor, index: Tensor) -> Tensor:
    """array[index[t, b], b] for every t and b; array (T, B, ...), index (T, B)."""
    return array[index, torch.arange(index.shape[1], device=index.device)]


def masked(array: Tensor, keep: Tensor, value: float) -> Tensor:
    """The array with `value` where keep (T, B) is false; keep is read over the leading two axes."""
    if bool(keep.all()):
        return array
    return array.masked_fill(~keep.view(*keep.shape, *[1] * (array.dim() - 2)), value)
