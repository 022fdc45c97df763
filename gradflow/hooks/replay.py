"""Replay: from what was seen of one fused call to every state, gate and gradient inside it.

The inner layers are run again one by one, without gradient, with the same dropout. Since every
h_{t−1} is then known, the gates of all steps come from one matrix product, and one backward scan
over precomputed factors gives the total gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradflow.cells import CELLS, Scan, Steps, Weights
from gradflow.errors import RecordingError
from gradflow.hooks.parity import WeightUses
from gradflow.recording import Backward, Forward, Operator, Parity

if TYPE_CHECKING:
    from gradflow.hooks.observe import Call

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of a replayed output; else 5e-2
_VF: Any = torch._C._VariableFunctions  # never patched
_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": _VF.lstm,
    "GRU": _VF.gru,
    "RNN_TANH": _VF.rnn_tanh,
    "RNN_RELU": _VF.rnn_relu,
}


@dataclass(frozen=True)
class Layer:
    """One layer and direction; arrays in processing order, sequences in the user's order."""

    weights: Weights
    x: Tensor  # (T, B, I)
    h: Tensor  # (T, B, P)
    h0: Tensor  # (B, P)
    c0: Tensor | None  # (B, H)
    order: Tensor | None  # (T, B) processing step -> input step, its own inverse; None: the same
    valid: Tensor  # (T, B) true where the kernel ran a step

    def turned(self, array: Tensor) -> Tensor:
        """From processing order to input time, or back."""
        return array if self.order is None else take_steps(array, self.order)

    def linearise(self, cell: str, dtype: torch.dtype, sequences: Tensor | None = None) -> Steps:
        """The layer's steps at its recorded states; steps the kernel did not run are zero."""

        def pick(array: Tensor, dim: int) -> Tensor:
            array = array if sequences is None else array.index_select(dim, sequences)
            return array.to(dtype)

        steps = CELLS[cell].linearise(
            self.weights.to(dtype),
            pick(self.x, 1),
            pick(self.h, 1),
            pick(self.h0, 0),
            None if self.c0 is None else pick(self.c0, 0),
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
            self.kernel_lengths = self._unsort(sorted_lengths, 0)
        lengths = self.kernel_lengths if call.lengths is None else call.lengths
        self.lengths = lengths.to(device)
        self.kernel_lengths = self.kernel_lengths.to(device)
        time = torch.arange(steps, device=device).unsqueeze(1)
        self.mask = time < self.lengths
        self.kernel_mask = time < self.kernel_lengths
        mirrored = self.kernel_lengths - 1 - time
        self.mirror = torch.where(self.kernel_mask, mirrored, time)
        self._scans: dict[str, tuple[int, list[list[tuple[Tensor, Scan]]] | None]] = {}

    def _extent(self) -> tuple[int, int]:
        call = self.call
        if call.batch_sizes is not None:
            return len(call.batch_sizes), int(call.batch_sizes[0])
        steps, batch = call.data.shape[:2]
        return (batch, steps) if call.batch_first else (steps, batch)

    def _unsort(self, array: Tensor, dim: int) -> Tensor:
        """From the kernel's order of sequences to the user's."""
        if self.call.unsorted is None:
            return array
        return array.index_select(dim, self.call.unsorted.to(array.device))

    def _padded(self, data: Tensor) -> Tensor:
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
        return self._unsort(padded, 1)

    def _time_first(self, data: Tensor) -> Tensor:
        return data.transpose(0, 1).contiguous() if self.call.batch_first else data

    # -- forward -----------------------------------------------------------------------------

    def weights(self, layer: int, direction: int) -> Weights:
        """The weights of one layer and direction."""
        return Weights(**self._by_name(self.call.weights, layer, direction))

    def weight_keys(self, layer: int, direction: int) -> dict[str, int]:
        """Weight name -> key in `WeightUses`."""
        return self._by_name(self.call.weight_keys, layer, direction)

    def _by_name(self, flat: tuple[Any, ...], layer: int, direction: int) -> dict[str, Any]:
        names = ["weight_ih", "weight_hh"]
        if self.call.has_biases:
            names += ["bias_ih", "bias_hh"]
        directions = 1 + self.call.bidirectional
        count = len(flat) // (self.call.layers * directions)
        if count > len(names):
            names.append("weight_hr")
        start = (layer * directions + direction) * count
        return dict(zip(names, flat[start : start + count], strict=True))

    @cached_property
    def _run(self) -> tuple[list[list[Layer]], list[Tensor]]:
        """All layers, and the dropout between them as factors (T, B, ·), input-time order."""
        call = self.call
        data, layers, factors = self._time_first(call.data), [], []
        with torch.no_grad(), self._as_recorded():
            for number in range(call.layers):
                top = number == call.layers - 1
                inner = call.layers > 1  # a single layer's states are its output
                output = (
                    self._kernel(number, data)
                    if inner
                    else self._time_first(call.returned["output"])
                )
                if top and inner:
                    self._compare(output)
                layers.append(self._directions(number, data, output))
                if top:
                    break
                if call.rng is not None:
                    factor = F.dropout(torch.ones_like(output), call.dropout, training=True)
                    factors.append(self._padded(factor))
                    data = output * factor
                else:
                    factors.append(output.new_ones(()))
                    data = output
        return layers, factors

    @property
    def layers(self) -> list[list[Layer]]:
        """layers[layer][direction]."""
        return self._run[0]

    @contextlib.contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """The random numbers and the autocast of the recorded call."""
        call = self.call
        device, enabled, dtype = call.autocast
        with contextlib.ExitStack() as stack:
            if call.rng is not None:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(call.rng)
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=enabled, dtype=dtype))
            yield

    def _initial(self, number: int) -> tuple[Tensor, ...]:
        directions = 1 + self.call.bidirectional
        rows = slice(number * directions, (number + 1) * directions)
        states = (self.call.h0,) if self.call.c0 is None else (self.call.h0, self.call.c0)
        return tuple(state[rows] for state in states)

    def _kernel(self, number: int, data: Tensor) -> Tensor:
        """The output of one layer, both directions, by torch's own function."""
        call = self.call
        count = len(call.weights) // call.layers
        weights = list(call.weights[number * count : (number + 1) * count])
        hidden = self._initial(number)
        state = hidden if call.cell == "LSTM" else hidden[0]
        tail = (weights, call.has_biases, 1, 0.0, call.training, call.bidirectional)
        if call.batch_sizes is not None:
            return _FUNCTIONS[call.cell](data, call.batch_sizes, state, *tail)[0]
        return _FUNCTIONS[call.cell](data, state, *tail, False)[0]

    def _compare(self, output: Tensor) -> None:
        """Refuse a replay that does not give what the call returned."""
        returned = self._time_first(self.call.returned["output"])
        finite = returned.isfinite()
        scale = returned[finite].abs().max() if bool(finite.any()) else returned.new_tensor(1.0)
        difference = (output - returned)[finite].abs().max() if bool(finite.any()) else scale * 0
        tolerance = TOLERANCES.get(returned.dtype, 5e-2)
        if not bool(difference <= tolerance * scale):
            raise RecordingError(
                f"the layers of {self.call.owner or 'the model'} cannot be replayed: run again, the "
                f"call returns other values than it did (off by {float(difference):.3g}); on this "
                "backend the dropout between layers is not reproducible, so call model.eval() or "
                "record the layers one by one"
            )

    def _directions(self, number: int, data: Tensor, output: Tensor) -> list[Layer]:
        x, h = self._padded(data), self._padded(output)
        if number == self.call.layers - 1:
            h = self._padded(self._time_first(self.call.returned["output"]))
        initial = [self._unsort(state, 1) for state in self._initial(number)]
        layers = []
        for direction, part in enumerate(h.chunk(1 + self.call.bidirectional, dim=2)):
            order = self.mirror if direction else None
            layers.append(
                Layer(
                    weights=self.weights(number, direction),
                    x=take_steps(x, order) if order is not None else x,
                    h=take_steps(part, order) if order is not None else part,
                    h0=initial[0][direction],
                    c0=initial[1][direction] if len(initial) == 2 else None,
                    order=order,
                    valid=self.kernel_mask,
                )
            )
        return layers

    # -- backward ----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """How many backwards have come by; results of older ones are stale."""
        return len(self.call.graph_tasks)

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

    def scanned(self, which: str) -> list[list[tuple[Tensor, Scan]]] | None:
        """(direct gradient, scan) of every layer and direction, or None without a backward.

        which is "total"; "from the end", the last input step that the loss reads; or "from the
        start", the first.
        """
        known = self._scans.get(which)
        if known is not None and known[0] == self.version:
            return known[1]
        result = None
        if self.call.grads and not self.call.second_order:
            with torch.no_grad():
                arrived = self._arrived()
                if which != "total":
                    arrived = self._only_one_step(*arrived, from_end=which == "from the end")
                result = self._scan(*arrived)
        self._scans[which] = (self.version, result)
        return result

    def _arrived(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients at output (T, B, P·D), at h_n and at c_n (layers·D, B, ·), user's order."""
        call, dtype = self.call, self.work_dtype
        found = {
            name: call.grads[name].to(dtype)
            if name in call.grads
            else torch.zeros_like(tensor, dtype=dtype)
            for name, tensor in call.returned.items()
        }
        output = self._padded(self._time_first(found["output"]))
        c_n = self._unsort(found["c_n"], 1) if "c_n" in found else None
        return output, self._unsort(found["h_n"], 1), c_n

    def _only_one_step(
        self, output: Tensor, h_n: Tensor, c_n: Tensor | None, *, from_end: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep only the gradients that arrive at each sequence's last (or first) step."""
        directions = 1 + self.call.bidirectional
        steps = output.shape[0]
        time = torch.arange(steps, device=output.device).unsqueeze(1)
        arrives = (output != 0).any(2)  # (T, B)
        # the final state of a forward direction sits at the last input step, of a reverse at the first
        sites = [self.kernel_lengths - 1, torch.zeros_like(self.kernel_lengths)][:directions]
        finals = [(h_n[d::directions] != 0).any(2).any(0) for d in range(directions)]
        if c_n is not None:
            finals = [
                final | (c_n[d::directions] != 0).any(2).any(0) for d, final in enumerate(finals)
            ]
        for site, final in zip(sites, finals, strict=True):
            arrives = arrives | ((time == site) & final)
        if from_end:
            chosen = torch.where(arrives, time, -1).max(0).values
        else:
            chosen = torch.where(arrives, time, steps).min(0).values
        output = output * (time == chosen).unsqueeze(2)
        keep = torch.stack([site == chosen for site in sites]).repeat(self.call.layers, 1)
        h_n = torch.where(keep.unsqueeze(2), h_n, 0.0)
        return output, h_n, None if c_n is None else torch.where(keep.unsqueeze(2), c_n, 0.0)

    def _scan(
        self, output: Tensor, h_n: Tensor, c_n: Tensor | None
    ) -> list[list[tuple[Tensor, Scan]]]:
        """Scan the stack from its top down; a layer's input gradient is the one below's direct one."""
        directions = 1 + self.call.bidirectional
        last = self.kernel_lengths - 1
        sequences = torch.arange(len(last), device=last.device)
        flow, results = output, []
        for number in reversed(range(self.call.layers)):
            row, below = [], torch.zeros((), dtype=output.dtype, device=output.device)
            for direction, part in enumerate(flow.chunk(directions, dim=2)):
                layer, steps = self.layers[number][direction], self.steps(number, direction)
                place = number * directions + direction
                direct = layer.turned(part).clone()
                direct[last, sequences] += h_n[place]
                scan = steps.scan(direct, None if c_n is None else c_n[place], last)
                row.append((direct, scan))
                if number:
                    below = below + layer.turned(
                        scan.delta @ layer.weights.weight_ih.to(output.dtype)
                    )
            results.append(row)
            if number:
                flow = below * self._run[1][number - 1].to(output.dtype)
        return results[::-1]

    def from_kernel(self) -> dict[int, Tensor] | None:
        """Gradients of the weights by torch's own backward, from the same direct gradients.

        Place in the flat list of weights -> gradient: the second opinion that `parity` asks for.
        """
        call = self.call
        if not call.grads:
            return None
        with torch.enable_grad(), self._as_recorded():
            weights = [weight.detach().clone().requires_grad_() for weight in call.weights]
            state = call.h0 if call.c0 is None else (call.h0, call.c0)
            tail = (
                weights, call.has_biases, call.layers, call.dropout, call.training, call.bidirectional,
            )  # fmt: skip
            function = _FUNCTIONS[call.cell]
            if call.batch_sizes is not None:
                results = function(call.data, call.batch_sizes, state, *tail)
            else:
                results = function(call.data, state, *tail, call.batch_first)
            named = dict(zip(("output", "h_n", "c_n"), results, strict=False))
            grads = torch.autograd.grad(
                [named[name] for name in call.grads],
                weights,
                list(call.grads.values()),
                allow_unused=True,
            )
        return {place: grad for place, grad in enumerate(grads) if grad is not None}


@dataclass(eq=False)
class LayerSource:
    """What a `Track` reads its numbers from: one layer and direction of a replay."""

    replay: Replay
    layer: int
    direction: int
    uses: WeightUses
    ran_backward: bool = False  # some backward ran in the block, perhaps not through here

    @property
    def version(self) -> int:
        """How many backwards reached the call."""
        return self.replay.version

    def _in_input_time(self, array: Tensor) -> Tensor:
        layer = self.replay.layers[self.layer][self.direction]
        dtype = self.replay.call.returned["output"].dtype  # the scan may compute in a wider one
        return masked(layer.turned(array).to(dtype), self.replay.mask, float("nan"))

    def _named(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._in_input_time(array) for name, array in arrays.items()}

    def forward(self) -> Forward:
        """States, gates and inputs."""
        layer = self.replay.layers[self.layer][self.direction]
        steps = self.replay.steps(self.layer, self.direction)
        initial = {"h": layer.h0} | ({} if layer.c0 is None else {"c": layer.c0})
        return Forward(
            states=self._named(steps.states | {"h": layer.h}),
            initial=initial,
            gates=self._named(steps.gates),
            inputs=self._in_input_time(layer.x),
        )

    def backward(self) -> Backward | None:
        """Total gradients; None without a backward."""
        return self._read("total")

    def last(self) -> Backward | None:
        """Total gradients of the last loss step alone; last in processing order."""
        return self._read("from the start" if self.direction else "from the end")

    def _read(self, which: str) -> Backward | None:
        scans = self.replay.scanned(which)
        if scans is None:
            return None
        direct, scan = scans[self.layer][self.direction]
        return Backward(
            grads=self._named(scan.grads),
            direct=self._in_input_time(direct),
            delta=self._in_input_time(scan.delta),
            delta_hh=self._in_input_time(scan.delta_hh),
        )

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Step Jacobians in processing order, starting at each sequence's first real step."""
        replay = self.replay
        sequences = sequences.to(replay.mask.device)
        layer = replay.layers[self.layer][self.direction]
        with torch.no_grad():
            steps = layer.linearise(replay.call.cell, dtype, sequences)
            if replay.call.lengths is None:
                return steps
            lengths = replay.lengths[sequences]
            time = torch.arange(replay.mask.shape[0], device=lengths.device).unsqueeze(1)
            valid = time < lengths
            if self.direction:  # the kernel ran through the padding first
                skip = replay.kernel_lengths[sequences] - lengths
                index = (time + skip).clamp(max=len(time) - 1)
                steps = steps.each_step(lambda array: take_steps(array, index))
            return steps.each_step(lambda array: masked(array, valid, 0.0))

    def parity(self) -> Parity:
        """See `WeightUses.check`."""
        return self.uses.check(self)

    def weight_keys(self) -> dict[str, int]:
        """Weight name -> key in `WeightUses`."""
        return self.replay.weight_keys(self.layer, self.direction)

    def rebuilt(self) -> dict[str, Tensor] | None:
        """Weight name -> gradient rebuilt from δ_t; None without a backward."""
        scans = self.replay.scanned("total")
        if scans is None:
            return None
        layer = self.replay.layers[self.layer][self.direction]
        steps = self.replay.steps(self.layer, self.direction)
        scan = scans[self.layer][self.direction][1]
        delta, delta_hh = scan.delta.flatten(0, 1), scan.delta_hh.flatten(0, 1)
        dtype = delta.dtype
        before = torch.cat([layer.h0.unsqueeze(0), layer.h[:-1]]).to(dtype)
        found = {
            "weight_ih": delta.T @ layer.x.to(dtype).flatten(0, 1),
            "weight_hh": delta_hh.T @ before.flatten(0, 1),
        }
        if layer.weights.bias_ih is not None:
            found |= {"bias_ih": delta.sum(0), "bias_hh": delta_hh.sum(0)}
        if layer.weights.weight_hr is not None:
            emitted = steps.gates["o"] * steps.states["c"].tanh()
            found["weight_hr"] = scan.grads["h"].flatten(0, 1).T @ emitted.flatten(0, 1)
        return found

    def from_kernel(self) -> dict[str, Tensor] | None:
        """Weight name -> gradient by torch's own backward on the recorded call."""
        grads = self.replay.from_kernel()
        if grads is None:
            return None
        places = self.replay._by_name(
            tuple(range(len(self.replay.call.weights))), self.layer, self.direction
        )
        return {name: grads[place] for name, place in places.items() if place in grads}

    def why_no_gradient(self) -> str:
        """Why there is no gradient here, and what to do."""
        call = self.replay.call
        if call.second_order:
            return (
                "a backward with create_graph=True came through it, and what it brings is not a total; "
                "record a backward of the loss alone"
            )
        if not call.grad_enabled:
            return "it ran inside torch.no_grad(); run it with gradients enabled"
        if not call.differentiable:
            return (
                "its weights are frozen and its input needs no gradient; "
                "call requires_grad_() on the weights or on the input"
            )
        if self.ran_backward:
            return (
                "a backward ran but did not reach this layer: its output is detached, or the loss "
                "ignores it; make the loss depend on it"
            )
        return "no backward ran inside the block; call loss.backward() before the block ends"


def take_steps(array: Tensor, index: Tensor) -> Tensor:
    """array[index[t, b], b] for every t and b; array (T, B, ...), index (T, B)."""
    return array[index, torch.arange(index.shape[1], device=index.device)]


def masked(array: Tensor, keep: Tensor, value: float) -> Tensor:
    """The array with `value` where keep (T, B) is false; keep is read over the leading two axes."""
    if bool(keep.all()):
        return array
    return array.masked_fill(~keep.view(*keep.shape, *[1] * (array.dim() - 2)), value)
