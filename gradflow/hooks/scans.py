"""Scans: from the gradients that reached what a call returned to those inside it.

One backward scan over time per layer and direction, over the factors that the replay prepared, from
the top of the stack down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.cells import Scan
from gradflow.hooks.replay import Replay

Stack = list[list[tuple[Tensor, Scan]]]  # [layer][direction]: direct gradient, scan


class Scans:
    """The backward scans of one replayed call."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self._known: dict[str, tuple[int, Stack | None]] = {}

    @property
    def version(self) -> int:
        """How many backwards have come by; results of older ones are stale."""
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
        if self.replay.call.grads and not self.replay.call.second_order:
            with torch.no_grad():
                arrived = self.arrived()
                if which != "total":
                    arrived = self._only_one_step(*arrived, from_end=which == "from the end")
                result = self._scan(*arrived)
        self._known[which] = (self.version, result)
        return result

    def arrived(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients at output (T, B, P·D), at h_n and at c_n (layers·D, B, ·), user's order."""
        call, dtype = self.replay.call, self.replay.work_dtype
        found = {
            name: call.grads[name].to(dtype)
            if name in call.grads
            else torch.zeros_like(tensor, dtype=dtype)
            for name, tensor in call.returned.items()
        }
        output = self.replay.padded(self.replay.time_first(found["output"]))
        c_n = self.replay.unsort(found["c_n"], 1) if "c_n" in found else None
        return output, self.replay.unsort(found["h_n"], 1), c_n

    def _only_one_step(
        self, output: Tensor, h_n: Tensor, c_n: Tensor | None, *, from_end: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep only the gradients that arrive at each sequence's last (or first) step."""
        directions = 1 + self.replay.call.bidirectional
        steps = output.shape[0]
        time = torch.arange(steps, device=output.device).unsqueeze(1)
        arrives = (output != 0).any(2)  # (T, B)
        # the final state of a forward direction sits at the last input step, of a reverse at the first
        sites = [self.replay.kernel_lengths - 1, torch.zeros_like(self.replay.kernel_lengths)][
            :directions
        ]
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
        keep = torch.stack([site == chosen for site in sites]).repeat(self.replay.call.layers, 1)
        h_n = torch.where(keep.unsqueeze(2), h_n, 0.0)
        return output, h_n, None if c_n is None else torch.where(keep.unsqueeze(2), c_n, 0.0)

    def _scan(self, output: Tensor, h_n: Tensor, c_n: Tensor | None) -> Stack:
        """Scan the stack from its top down; a layer's input gradient is the one below's direct one."""
        directions = 1 + self.replay.call.bidirectional
        last = self.replay.kernel_lengths - 1
        sequences = torch.arange(len(last), device=last.device)
        flow, results = output, []
        for number in reversed(range(self.replay.call.layers)):
            row, below = [], torch.zeros((), dtype=output.dtype, device=output.device)
            for direction, part in enumerate(flow.chunk(directions, dim=2)):
                layer, steps = (
                    self.replay.layers[number][direction],
                    self.replay.steps(number, direction),
                )
                place = number * directions + direction
                direct = layer.turned(part).clone()
                direct[last, sequences] += h_n[place]
                scan = steps.scan(
                    direct,
                    None if c_n is None else c_n[place],
                    last,
                    c_is_total=self.replay.call.c_is_total,
                )
                row.append((direct, scan))
                if number:
                    below = below + layer.turned(
                        scan.delta @ layer.weights.weight_ih.to(output.dtype)
                    )
            results.append(row)
            if number:
                flow = below * self.replay.dropout_factor(number - 1).to(output.dtype)
        return results[::-1]
