"""A recording that is opened and closed by calls, where no block can be put around a training step."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.hooks.guard import Point, guarded, lenient
from gradflow.hooks.lengths import Lengths
from gradflow.hooks.mistakes import gradient_marks
from gradflow.hooks.observe import OpenRecording
from gradflow.hooks.recorder import Recorder
from gradflow.recording import Recording

AMBIGUOUS = "several GradScalers were used in one update: gradients are perhaps scaled"


class Stepwise:
    """One recording of one update of a model, open from `open` to `close`.

    Args:
        model: any module.
        layers: patterns of the names of the tracks to keep, None for all.
        lengths: as of `gradflow.record`.
        scaler: a GradScaler that is given; else one that scales a loss meanwhile is found.
        jacobians: as of `gradflow.record`.
        reached: called after each backward that brought something to a parameter's ``.grad``, with
            the scale that its loss was multiplied by.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[str] | None,
        lengths: Lengths,
        scaler: Any,
        jacobians: bool | None,
        reached: Callable[[float], object],
    ) -> None:
        self.recorder = StepRecorder(model, layers, lengths, scaler, jacobians, reached)
        self.recording: Recording = self.recorder.recording
        self._block = OpenRecording(self.recorder)

    def open(self) -> None:
        """Listen from here on."""
        self._thread = threading.get_ident()
        lenient.add(self._thread)
        self._block.open()

    def close(self) -> list[str]:
        """Put everything back; gives the sentences that `gradflow.record` would warn of."""
        sentences = self._block.close()
        lenient.discard(self._thread)
        return [one for one in sentences if one != AMBIGUOUS] + self.recorder.doubts

    @property
    def loss(self) -> float:
        """The sum of what the backwards began from, without a scale; NaN where it was no number."""
        return self.recorder.loss

    @property
    def backwards(self) -> int:
        """How many brought something to a parameter."""
        return self.recorder.counted


class StepRecorder(Recorder):
    """The observer of one update, which also notes the loss and finds the scaler by itself."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[str] | None,
        lengths: Lengths,
        scaler: Any,
        jacobians: bool | None,
        reached: Callable[[float], object],
    ) -> None:
        super().__init__(model, layers, lengths, scaler, jacobians)
        self.loss, self.counted, self.doubts = 0.0, 0, list[str]()
        self._given = scaler is not None
        self._reached = reached
        self._before: tuple[float, Any] = math.nan, None  # of the backward under way

    def saw_scaler(self, scaler: Any) -> None:
        """Divide out the scale of the one scaler that is used."""
        if self._given or not scaler.is_enabled():
            return
        if self.scaler is not None and self.scaler is not scaler:
            self.doubts = [AMBIGUOUS]
        self.scaler = scaler

    def before_backward(self, roots: tuple[Any, ...], create_graph: bool) -> None:
        """Note what it begins from."""
        if torch._C._current_graph_task_id() == -1:
            self._before = _number(roots), gradient_marks(self.model)
        super().before_backward(roots, create_graph)

    def after_backward(self) -> None:
        """Count it, where it is one that trains."""
        super().after_backward()
        if torch._C._current_graph_task_id() != -1:
            return
        value, marks = self._before
        if marks == gradient_marks(self.model):
            return  # torch.autograd.grad, or another model's
        self.counted += 1
        self.loss += value / self.scale()
        guarded(Point.GRADIENT, self.withheld.remark, self._reached, self.scalers())

    def forget(self) -> None:
        """Hold on to nothing."""
        super().forget()
        self._reached = _nothing


def _number(roots: tuple[Any, ...]) -> float:
    """The sum of scalar roots, NaN where one is none."""
    if not all(isinstance(root, Tensor) and root.numel() == 1 for root in roots):
        return math.nan
    return float(sum(float(root.detach()) for root in roots))


def _nothing(scale: float) -> None:
    """What is called in place of what was forgotten."""
