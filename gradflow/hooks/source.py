"""What a `Track` reads its numbers from: one layer and direction of a replayed call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.hooks.kernels import weight_gradients
from gradflow.hooks.parity import WeightUses
from gradflow.hooks.replay import Replay, masked, take_steps
from gradflow.hooks.scans import Scans
from gradflow.recording import Backward, Forward, Operator, Parity


@dataclass(eq=False)
class LayerSource:
    """What a `Track` reads its numbers from: one layer and direction of a replay."""

    replay: Replay
    scans: Scans
    layer: int
    direction: int
    uses: WeightUses
    ran_backward: bool = False  # some backward ran in the block, perhaps not through here

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
        scans = self.scans.scanned("total")
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
        if not self.replay.call.grads:
            return None
        grads = weight_gradients(self.replay.call)
        places = self.replay.by_name(
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
