"""An `Unseen`: a recurrence of the model that is in no track."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unseen:
    """One recurrence of the model that a backward went through and that is in no track.

    >>> import warnings, torch, gradflow
    >>> w = torch.nn.Linear(2, 2)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", gradflow.GradflowWarning)
    ...     with gradflow.record(w, jacobians=False) as recording:
    ...         h, memory = torch.ones(1, 2), []
    ...         for _ in range(4):
    ...             memory.append(w(h))
    ...             h = torch.stack(memory).sum(0)
    ...         h.sum().backward()
    >>> [(found.module, found.steps) for found in recording.unseen]
    [('Linear', 4)]
    """

    module: str  # path of the module that holds its weights, or the class name of the model
    weights: tuple[str, ...]  # their names in the model; () where they are no parameters of it
    steps: int  # how often they are used in a row, each time on what came of the time before
    line: str  # "file.py:12" of the loop, "" where its source is not to be had
    insert: str  # the line of code that makes it a track
    reason: str = ""  # why it was not taken up without that line

    @staticmethod
    def of(read: Mapping[str, Any]) -> Unseen:
        """The same, read back from a file.

        >>> from gradflow.recording import Unseen
        >>> read = {"module": "rnn", "weights": ["rnn.h.weight"], "steps": 9, "line": "", "insert": "…"}
        >>> Unseen.of(read).weights
        ('rnn.h.weight',)
        """
        return Unseen(**{**read, "weights": tuple(read["weights"])})

    @property
    def sentence(self) -> str:
        """All of it in words."""
        names = ", ".join(self.weights[:3]) or "a tensor that is no parameter of the model"
        if len(self.weights) > 3:
            names += f" and {len(self.weights) - 3} more"
        are = "are" if len(self.weights) > 1 else "is"
        where = f"at the end of the loop's body, {self.line}" if self.line else "inside the loop"
        why = f"; it was not taken up by itself: {self.reason}" if self.reason else ""
        return (
            f"a recurrence of {self.module} is in no track: {names} {are} used {self.steps} times, each "
            f"time on what came of the use before{why}; put `{self.insert}` {where}, once per step"
        )
