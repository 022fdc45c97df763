"""One layer and direction of a replayed call: what a `Track` of that call reads its numbers from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.cells.spec import Scan
from gradflow.hooks.replay import Replay, Scans, masked, take_steps, weight_gradients
from gradflow.recording.source import Backward, Forward, Operator


@dataclass(eq=False)
class LayerSource:
    """One layer and direction of a replay."""

    replay: Replay
    scans: Scans
    layer: int
    direction: int

    @property
    def version(self) -> int:
        """How many backwards reached the call."""
        return self.scans.version

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
        return Forward(
            states=self._named(steps.states | {"h": layer.h}),
            initial=dict(layer.initial),
            gates=self._named(steps.gates),
            inputs=self._in_input_time(layer.x),
        )

    def backward(self) -> Backward | None:
        """Total gradients; None without a backward."""
        return self._read("total")

    def last(self) -> Backward | None:
        """Total gradients of the last loss step alone; last in processing order."""
        return self._read("from the start" if self.direction else "from the end")

    def partial(self) -> dict[str, Tensor] | None:
        """State-partial gradients; None without a backward."""
        scans = self.scans.scanned("total")
        if scans is None:
            return None
        scan = scans[self.layer][self.direction][1]
        with torch.no_grad():
            return self._named(self.replay.steps(self.layer, self.direction).partial(scan.grads))

    def _read(self, which: str) -> Backward | None:
        scans = self.scans.scanned(which)
        if scans is None:
            return None
        direct, scan = scans[self.layer][self.direction]
        return Backward(
            grads=self._named(scan.grads),
            direct=self._in_input_time(direct),
            delta=self._in_input_time(scan.delta),
            delta_hh=self._in_input_time(scan.delta_hh),
        )

    def reached(self) -> Tensor | None:
        """Where the loss reaches what was returned, input time."""
        return self.scans.reached()

    def arriving(self) -> Tensor | None:
        """Where a gradient comes to this layer from outside it, input time, padding included."""
        scans = self.scans.scanned("total")
        if scans is None:
            return None
        direct, _ = scans[self.layer][self.direction]
        found = (direct != 0).any(2)
        place, last = self.layer * len(scans[0]) + self.direction, self.replay.kernel_lengths - 1
        for name, state in self.scans.arrived()[1].items():
            if name != "h":
                sequences = torch.arange(len(last), device=last.device)
                found[last, sequences] |= (state[place] != 0).any(1)
        layer = self.replay.layers[self.layer][self.direction]
        return layer.turned(found.unsqueeze(2)).squeeze(2)

    def loss_steps(
        self, sequences: Tensor, loss_steps: Tensor, dtype: torch.dtype
    ) -> Backward | None:
        """Total gradients of single loss steps, (n, T, m, ·)."""
        device = self.replay.mask.device
        sequences, loss_steps = sequences.to(device), loss_steps.to(device)
        stack = self.scans.of_steps(sequences, loss_steps, dtype)
        if stack is None:
            return None
        columns = sequences.repeat(len(loss_steps))
        layer = self.replay.layers[self.layer][self.direction]

        def shaped(array: Tensor) -> Tensor:
            array = masked(layer.turned(array, columns), self.replay.mask[:, columns], float("nan"))
            return by_loss_step(array, len(loss_steps))

        return alone(stack[self.layer][self.direction][1], shaped)

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """Step Jacobians in processing order, starting at each sequence's first real step."""
        replay = self.replay
        sequences = sequences.to(replay.mask.device)
        with torch.no_grad():
            steps = replay.steps_of(self.layer, self.direction, dtype, sequences)
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

    def weight_keys(self) -> dict[str, int]:
        """Weight name -> key in `WeightUses`."""
        return self.replay.weight_keys(self.layer, self.direction)

    def rebuilt(self) -> dict[str, Tensor] | None:
        """Weight name -> gradient rebuilt from δ_t; None without a backward."""
        scans = self.scans.scanned("total")
        if scans is None:
            return None
        layer = self.replay.layers[self.layer][self.direction]
        steps = self.replay.steps(self.layer, self.direction)
        scan = scans[self.layer][self.direction][1]
        delta, delta_hh = scan.delta.flatten(0, 1), scan.delta_hh.flatten(0, 1)
        dtype = delta.dtype
        before = torch.cat([layer.initial["h"].unsqueeze(0), layer.h[:-1]]).to(dtype)
        found = {
            "weight_ih": delta.T @ layer.x.to(dtype).flatten(0, 1),
            "weight_hh": delta_hh.T @ before.flatten(0, 1),
        }
        if layer.weights.bias_ih is not None:
            found |= {"bias_ih": delta.sum(0), "bias_hh": delta_hh.sum(0)}
        if layer.weights.weight_hr is not None:
            found["weight_hr"] = scan.grads["h"].flatten(0, 1).T @ steps.projected().flatten(0, 1)
        return found

    def from_kernel(self) -> dict[str, Tensor] | None:
        """Weight name -> gradient by torch's own backward on the recorded call."""
        if not self.replay.call.grads:
            return None
        grads = weight_gradients(self.replay.call, self._outside_h())
        places = self.replay.by_name(
            tuple(range(len(self.replay.call.weights))), self.layer, self.direction
        )
        return {name: grads[place] for name, place in places.items() if place in grads}

    def _outside_h(self) -> dict[str, Tensor]:
        """Where totals were listened to: what reaches the states not through h, (1, B, H)."""
        scanned = self.scans.scanned("total")
        if not self.replay.call.totals or scanned is None:
            return {}
        grads = scanned[0][0][1].grads
        through = self.replay.steps(0, 0).through_h(grads["h"])
        return {name: grads[name] - part for name, part in through.items()}


def alone(scan: Scan, shaped: Callable[[Tensor], Tensor]) -> Backward:
    """What is known of loss steps alone; how much comes from where is not asked."""
    grads = {name: shaped(grad) for name, grad in scan.grads.items()}
    return Backward(grads, None, shaped(scan.delta), shaped(scan.delta_hh))


def by_loss_step(array: Tensor, count: int) -> Tensor:
    """(n, T, m, ·) from (T, n·m, ·)."""
    return array.unflatten(1, (count, -1)).transpose(0, 1)
