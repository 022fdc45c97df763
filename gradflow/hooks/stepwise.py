"""A recording that is opened and closed by calls, where no block can be put around a training step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.hooks.guard import Point, cut_short, guarded, lenient
from gradflow.hooks.lengths import Lengths
from gradflow.hooks.mistakes import gradient_marks
from gradflow.hooks.observe import OpenRecording
from gradflow.hooks.recorder import Recorder
from gradflow.recording.track import Track, unnumbered
from gradflow.recording.tracks import Recording

AMBIGUOUS = "several GradScalers were used in one update: gradients are perhaps scaled"


class Stepwise:
    """One recording of one update of a model, open from `open` to `close`.

    Arguments are those of `StepRecorder`.
    """

    def __init__(self, *given: Any) -> None:
        self.recorder = StepRecorder(*given)
        self.recording: Recording = self.recorder.recording
        self._block = OpenRecording(self.recorder)

    def open(self) -> None:
        """Listen from here on."""
        lenient.add(self.recorder.thread)
        cut_short.discard(self.recorder.thread)
        self._block.open()

    def close(self) -> list[str]:
        """Put everything back; gives the sentences that `gradflow.record` would warn of."""
        sentences = self._block.close()
        return [one for one in sentences if one != AMBIGUOUS] + self.recorder.doubts

    def put_back(self) -> None:
        """Its last call: nothing is replaced any more, also where Ctrl-C came before `close` was over."""
        try:
            lenient.discard(self.recorder.thread)
            self._block.put_back()
        finally:  # where Ctrl-C came before that line
            lenient.discard(self.recorder.thread)
            self._block.put_back()


class StepRecorder(Recorder):
    """The observer of one update, which also notes the loss.

    Arguments are as of `gradflow.record`; where no scaler is given one that scales a loss meanwhile is found.
    reached is called after each backward that brought something to a parameter's ``.grad``, with the scale
    that its loss was multiplied by.
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
        super().__init__(model, layers, lengths, scaler, jacobians)
        self.loss = 0.0  # the sum of what the backwards began from, without a scale; NaN: no number
        self.counted, self.doubts = 0, list[str]()
        self._given = scaler is not None
        self._reached = reached
        self._before: tuple[float, Any] = math.nan, None  # of the backward under way
        self._zeroed: list[Track] = []  # that a backward reached whose gradients were zeroed
        self._under_way = False  # whether a backward has begun and not ended
        self.thrown_away: Callable[[], bool] = bool  # whether what the last one left was zeroed

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
            if self.counted and self.thrown_away():
                self._forget_gradients()
            self._before = _number(roots), gradient_marks(self.model)
            self._under_way = True
        super().before_backward(roots, create_graph)

    def after_backward(self) -> None:
        """Count it, where it is one that trains."""
        super().after_backward()
        if torch._C._current_graph_task_id() != -1:
            return
        self._under_way = False
        value, marks = self._before
        if marks == gradient_marks(self.model):
            return  # torch.autograd.grad, or another model's
        self.counted += 1
        self.loss += value / self.scale()
        guarded(Point.GRADIENT, self.withheld.remark, self._reached, self.scalers())

    def is_cut_short(self) -> bool:
        """Whether an exception ended a backward, or met gradflow's work: what was seen is not whole."""
        unended = self._under_way and torch._C._current_graph_task_id() == -1
        return unended or self.thread in cut_short

    def _forget_gradients(self) -> None:
        """What backwards so far have brought was zeroed, and is no part of the update."""
        self.loss, self.counted = 0.0, 0
        self._zeroed += [track for track in self.recording.values() if track.backwards]
        self.uses.forget()
        for call in self.calls:
            for brought in (call.grads, call.entering, call.graph_tasks):
                brought.clear()
        joint = [loop.source for loop in self.closed.loops]
        for source in (*self.marked, *self.linears, *joint):
            source.forget()

    def close(self) -> None:
        """Stop listening; runs that no backward reached, beside others that one did, are let go."""
        super().close()
        reached = {unnumbered(track.name) for track in self.recording.values() if track.backwards}
        gone = [
            track
            for track in self.recording.values()
            if not track.backwards and (track in self._zeroed or unnumbered(track.name) in reached)
        ]
        self._zeroed.clear()
        if not gone:
            return
        bases = {unnumbered(track.name) for track in gone}
        kept = [track for track in self.recording.values() if track not in gone]
        for track in self.recording.tracks.values():
            self.recording.drop(track)
        count, names = Counter[str](), {}
        for track in kept:
            base = unnumbered(track.name)
            count[base] += 1
            if base in bases:
                names[track.name] = base if count[base] == 1 else f"{base}@{count[base]}"
        for track in kept:
            track.name = names.get(track.name, track.name)
            track.above = tuple(names.get(name, name) for name in track.above)
            track.below = tuple(names.get(name, name) for name in track.below)
            self.recording.add(track)

    def forget(self) -> None:
        """Hold on to nothing."""
        super().forget()
        self._reached, self.thrown_away = bool, bool


def _number(roots: tuple[Any, ...]) -> float:
    """The sum of scalar roots, NaN where one is none."""
    if not all(isinstance(root, Tensor) and root.numel() == 1 for root in roots):
        return math.nan
    return float(sum(float(root.detach()) for root in roots))
