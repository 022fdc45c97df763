"""What one layer's findings and words are made from: every measured quantity, gathered once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import xarray as xr

from gradflow.analyzer.measured import Measured
from gradflow.analyzer.rates import Verdict, band
from gradflow.recording import GATES


@dataclass(frozen=True)
class Evidence(Measured):
    """Everything measured on one track, and how it was judged."""

    alone: bool  # the only layer of its recording
    size: int  # S
    verdict: Verdict
    labels: tuple[str, ...]
    half_life: float
    channels: int | None
    gradient_note: str
    data: xr.Dataset

    @property
    def kind(self) -> str:
        """RNN, LSTM, GRU, tap, or the class name of a user's cell."""
        cell = self.track.cell
        return cell.split("_")[0] if cell in GATES else cell

    @property
    def main_state(self) -> str:
        """c where there is one, else h, else the first."""
        return self.track.main_state

    @property
    def main_profile(self) -> np.ndarray:
        """log10_grad of the main state, (unit, back)."""
        return self.profile.log10_grad[list(self.track.states).index(self.main_state)]

    @property
    def band(self) -> float:
        """The rate that makes one decade over the span."""
        return band(self.span)

    @property
    def decades(self) -> float:
        """Rate over the span in powers of ten; negative is lost."""
        return self.rate.value * self.span / math.log(10)

    @property
    def fades(self) -> bool:
        """Whether the gradient is lost: vanishing, dead, or open but below the band."""
        low = self.verdict.name == "inconclusive" and self.rate.value < -self.band
        return self.verdict.name in ("vanishing", "dead") or low


def parameter(track_name: str, parameter_name: str) -> str:
    """Where the user finds a parameter of a track.

    >>> parameter("encoder.lstm.l0_reverse", "bias_ih")
    'model.encoder.lstm.bias_ih_l0_reverse'
    >>> parameter("cell", "bias_ih"), parameter("l1@2", "weight_hh"), parameter("lstm1", "bias_hh")
    ('model.bias_ih', 'model.weight_hh_l1', 'model.lstm1.bias_hh')
    >>> parameter("1.l0", "bias_ih")
    "model.get_submodule('1').bias_ih_l0"
    """
    name = track_name.split("@")[0]
    head, _, tail = name.rpartition(".")
    if re.fullmatch(r"l\d+(_reverse)?", tail):
        return f"{_module(head)}.{parameter_name}_{tail}"
    return f"{_module('' if name == 'cell' else name)}.{parameter_name}"


def _module(path: str) -> str:
    """Python for a submodule; a number in an nn.Sequential is no attribute name."""
    if all(part.isidentifier() for part in path.split(".") if path):
        return f"model.{path}" if path else "model"
    return f"model.get_submodule({path!r})"


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "step"), counted(3, "step")
    ('1 step', '3 steps')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one.

    >>> number(6.5788), number(1235.4), number(-0.00123), number(2.0)
    ('6.58', '1235', '−0.00123', '2')
    """
    whole = 1000 <= abs(value) < 1e6
    text = f"{value:.0f}" if whole else f"{value:.3g}"
    return "−" + text[1:] if text.startswith("-") else text
