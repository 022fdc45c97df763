"""Scans: from the gradients that reached what a call returned to those inside it.

One backward scan over time per layer and direction, over the factors that the replay prepared, from
the top of the stack down.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradflow.cells import Scan, Steps
from gradflow.hooks.replay import Replay

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
                result = self._scan(arrived)
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
    ) -> Stack:
        """Scan the stack from its top down; a layer's input gradient is the one below's direct one.

        columns are the sequences that are scanned, all of them once by default.
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
                scan = steps.scan(direct, final, last, totals=self.replay.call.totals)
                row.append((direct, scan))
                if number:
                    passed = scan.delta @ layer.weights.weight_ih.to(flow.dtype)
                    below = below + layer.turned(passed, columns)
            results.append(row)
            if number:
                factor = self.replay.dropout_factor(number - 1).to(flow.dtype)
                flow = below * (
                    factor[:, columns] if columns is not None and factor.dim() else factor
                )
        return results[::-1]


def _of(arrived: Arrived, columns: Tensor) -> Arrived:
    """What arrives at some sequences."""
    output, ends = arrived
    return output[:, columns], {name: end[:, columns] for name, end in ends.items()}
