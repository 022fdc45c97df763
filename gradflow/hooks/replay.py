"""Replay: from what was seen of one fused call to every state, gate and gradient inside it.

The inner layers are run again one by one by torch's own functions, without gradient, with the same
dropout. Since every h_{t−1} is then known, the gates of all steps come from one matrix product.
`Scans` goes on from there, from the gradients that reached what the call returned to those inside it:
one backward scan over time per layer and direction, over the factors that the replay prepared, from
the top of the stack down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradflow.cells import CELLS
from gradflow.cells.spec import Scan, Steps, Weights
from gradflow.errors import RecordingError
from gradflow.hooks.call import Call
from gradflow.limits import REPLAY_FLOAT32, REPLAY_FLOAT64, REPLAY_HALF
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
                # a single layer's states are its output
                again = call.layers > 1 and not call.inner
                kept = None if top or again else call.inner[number].output
                if again:
                    output = one_layer(call, number, data)
                else:
                    output = self.time_first(call.returned["output"] if kept is None else kept)
                if top and again:
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
        _, enabled, dtype = self.call.autocast
        tolerance = TOLERANCES.get(dtype if enabled else returned.dtype, REPLAY_HALF)
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


Arrived = tuple[Tensor, dict[str, Tensor]]  # at the output, at the last states by name
Stack = list[list[tuple[Tensor, Scan]]]  # [layer][direction]: direct gradient, scan


class Scans:
    """The backward scans of one replayed call."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self._known: dict[str, tuple[int, Stack | None]] = {}

    @property
    def version(self) -> int:
        """How many backwards reached the call; results from before the last are stale."""
        return len(self.replay.call.graph_tasks)

    def scanned(self, which: str) -> Stack | None:
        """(direct gradient, scan) of every layer and direction, or None without a backward.

        which is "total"; "from the end", the last input step that the loss reads; or "from the
        start", the first.
        """
        known = self._known.get(which)
        if known is not None and known[0] == self.version:
            return known[1]
        result = None
        if self.replay.call.grads and not self.replay.call.lost:
            with torch.no_grad():
                arrived = self.arrived()
                if which != "total":
                    arrived = self._only_one_step(arrived, from_end=which == "from the end")
                whole = which == "total" and self.replay.call.inner_known
                result = self._scan(arrived, inner=self._inner() if whole else None)
        self._known[which] = (self.version, result)
        return result

    def arrived(self) -> Arrived:
        """The gradients at output (T, B, P·D), at the last states (layers·D, B, ·), user's order."""
        call, dtype = self.replay.call, self.replay.work_dtype
        found = {
            name: call.grads[name].to(dtype)
            if name in call.grads
            else torch.zeros_like(tensor, dtype=dtype)
            for name, tensor in call.returned.items()
        }
        output = self.replay.padded(self.replay.time_first(found["output"]))
        return output, {name: self.replay.unsort(found[name], 1) for name in call.initial}

    def _inner(self) -> list[dict[str, Tensor]]:
        """Of every layer what its phantom inputs got, (T, B, ·), and its output from above."""
        replay = self.replay
        return [
            {n: replay.padded(replay.time_first(grad)) for n, grad in inner.grads.items()}
            for inner in replay.call.inner
        ]

    def reached(self) -> Tensor | None:
        """(T, B): where a gradient arrives at what the call returned, input time; None without one."""
        if self.scanned("total") is None:
            return None
        return self._arrives(*self.arrived())

    def _sites(self) -> list[Tensor]:
        """Where the final state of each direction sits: at the last input step, or at the first."""
        ends = [self.replay.kernel_lengths - 1, torch.zeros_like(self.replay.kernel_lengths)]
        return ends[: 1 + self.replay.call.bidirectional]

    def _arrives(self, output: Tensor, ends: dict[str, Tensor]) -> Tensor:
        time = torch.arange(output.shape[0], device=output.device).unsqueeze(1)
        arrives = (output != 0).any(2)
        sites = self._sites()
        for state in ends.values():
            for direction, site in enumerate(sites):
                final = (state[direction :: len(sites)] != 0).any(2).any(0)
                arrives = arrives | ((time == site) & final)
        return arrives

    def _only_one_step(self, arrived: Arrived, *, from_end: bool) -> Arrived:
        """Keep only the gradients that arrive at each sequence's last (or first) step."""
        arrives = self._arrives(*arrived)
        time = torch.arange(len(arrives), device=arrives.device).unsqueeze(1)
        if from_end:
            return self._at(arrived, torch.where(arrives, time, -1).max(0).values)
        return self._at(arrived, torch.where(arrives, time, len(arrives)).min(0).values)

    def _at(self, arrived: Arrived, chosen: Tensor, columns: Tensor | None = None) -> Arrived:
        """Keep only what arrives at the chosen step (B,) of each sequence, or of each column."""
        output, ends = arrived if columns is None else _of(arrived, columns)
        sites = [site if columns is None else site[columns] for site in self._sites()]
        time = torch.arange(output.shape[0], device=output.device).unsqueeze(1)
        output = output * (time == chosen).unsqueeze(2)
        keep = torch.stack([site == chosen for site in sites]).repeat(self.replay.call.layers, 1)
        return output, {n: torch.where(keep.unsqueeze(2), end, 0.0) for n, end in ends.items()}

    def of_steps(self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype) -> Stack | None:
        """The same of each of the given loss steps alone, as columns: loss step · m + sequence."""
        if self.scanned("total") is None:
            return None
        columns = sequences.repeat(len(loss_steps))
        chosen = loss_steps.repeat_interleave(len(sequences))
        with torch.no_grad():
            arrived = self._at(self._arrived_as(dtype), chosen, columns)
            return self._scan(arrived, self._steps_of(sequences, dtype, len(loss_steps)), columns)

    def of_sequences(self, sequences: Tensor, dtype: torch.dtype) -> Stack:
        """The same of all loss steps together, of the given sequences in the given dtype."""
        with torch.no_grad():
            arrived = _of(self._arrived_as(dtype), sequences)
            return self._scan(arrived, self._steps_of(sequences, dtype, 1), sequences)

    def _arrived_as(self, dtype: torch.dtype) -> Arrived:
        output, ends = self.arrived()
        return output.to(dtype), {name: end.to(dtype) for name, end in ends.items()}

    def _steps_of(
        self, sequences: Tensor, dtype: torch.dtype, count: int
    ) -> Callable[[int, int], Steps]:
        """The steps of some sequences, side by side as often as counted."""
        places = torch.arange(len(sequences), device=sequences.device).repeat(count)

        def steps_of(layer: int, direction: int) -> Steps:
            steps = self.replay.steps_of(layer, direction, dtype, sequences)
            return steps if count == 1 else steps.each_step(lambda array: array[:, places])

        return steps_of

    def _scan(
        self,
        arrived: Arrived,
        steps_of: Callable[[int, int], Steps] | None = None,
        columns: Tensor | None = None,
        inner: list[dict[str, Tensor]] | None = None,
    ) -> Stack:
        """Scan the stack from its top down; a layer's input gradient is the one below's direct one.

        columns are the sequences that are scanned, all of them once by default; inner is what came to the
        phantom inputs, where it is known.
        """
        flow, ends = arrived
        directions = 1 + self.replay.call.bidirectional
        last = self.replay.kernel_lengths - 1
        last = last if columns is None else last[columns]
        sequences = torch.arange(len(last), device=last.device)
        results: Stack = []
        for number in reversed(range(self.replay.call.layers)):
            row, below = [], torch.zeros((), dtype=flow.dtype, device=flow.device)
            for direction, part in enumerate(flow.chunk(directions, dim=2)):
                layer = self.replay.layers[number][direction]
                steps = (steps_of or self.replay.steps)(number, direction)
                place = number * directions + direction
                direct = layer.turned(part, columns).clone()
                direct[last, sequences] += ends["h"][place]
                final = {name: end[place] for name, end in ends.items() if name != "h"}
                phantom = None
                if inner is not None:
                    phantom = layer.turned(
                        inner[number]["phantom"].chunk(directions, dim=2)[direction]
                    )
                totals = self.replay.call.totals
                scan = steps.scan(direct, final, last, totals=totals, phantom=phantom)
                row.append((direct, scan))
                if number and inner is None:
                    passed = scan.delta @ layer.weights.weight_ih.to(flow.dtype)
                    below = below + layer.turned(passed, columns)
            results.append(row)
            if number and inner is not None:
                flow = inner[number - 1]["output"]
            elif number:
                factor = self.replay.dropout_factor(number - 1).to(flow.dtype)
                flow = below * (
                    factor[:, columns] if columns is not None and factor.dim() else factor
                )
        return results[::-1]


def _of(arrived: Arrived, columns: Tensor) -> Arrived:
    """What arrives at some sequences."""
    output, ends = arrived
    return output[:, columns], {name: end[:, columns] for name, end in ends.items()}
