"""What one layer's arrays, findings and words are made from: every measured quantity, gathered once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from gradflow.analysis.results import Rate
from gradflow.analyzer.contributions import Contributed, Triangle
from gradflow.analyzer.core import Core
from gradflow.analyzer.loss import Profile
from gradflow.analyzer.rates import band, rate_over_sequences
from gradflow.analyzer.read_steps import Reading
from gradflow.analyzer.spectrum import Spectrum
from gradflow.analyzer.timeline import typical_segment
from gradflow.cells.spec import CellSpec, Keeper
from gradflow.limits import LN_BAND, LN_TELLING
from gradflow.recording.track import Track


@dataclass(frozen=True, kw_only=True)
class Measured(Core):
    """The numbers of the verdict, and everything else measured on one track."""

    track: Track
    factors: np.ndarray  # (B, 2) what weights and activations add to the rate of an RNN
    spectrum: Spectrum  # every exponent with its interval
    profile: Profile
    triangle: Triangle  # how each loss step is felt at each step
    contributed: Contributed  # the gradient of the weights by lag
    withheld: bool  # parity failed: what rests on the loss is not shown
    share: float  # of every time budget that this layer may use


@dataclass(frozen=True, kw_only=True)
class Evidence(Measured):
    """Everything measured on one track, and how it was judged."""

    alone: bool  # the only layer of its recording
    probed: bool  # see `Settings`
    reading: Reading  # at which steps of which sequences the loss reaches it
    size: int  # S
    labels: tuple[str, ...]
    half_life: float
    channels: int | None
    gradient_note: str
    data: xr.Dataset
    tries: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # see `tried`

    @property
    def kind(self) -> str:
        """What people call the cell: RNN, tap, or the class name of a user's cell."""
        return self.track.cell if self.spec is None else self.spec.kind

    @property
    def spec(self) -> CellSpec | None:
        """What is known of the cell in closed form; None for a loop of the user's own."""
        return self.track.spec

    @property
    def keeper(self) -> Keeper | None:
        """The gate that keeps the state, if the cell has one."""
        return None if self.spec is None else self.spec.keeper

    @property
    def cut_throughout(self) -> bool:
        """Whether the state is cut off from its past at every step: no weight of the layer is why."""
        return self.verdict.name == "dead" and not self.gain.steps

    @property
    def fused(self) -> bool:
        """Whether the layer is one of torch's fused ones, not a cell called step by step."""
        return _suffix(self.track.owner, self.track.name) != ""

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
        """The rate that makes the band of the verdict over the span."""
        return band(self.span)

    @property
    def decades(self) -> float:
        """The gain over the span in powers of ten; negative is lost."""
        return self.gain.decades

    @property
    def severity(self) -> float:
        """Decades over the span: by the rate where it tells, else those that were measured."""
        return self.rate.value * self.span / math.log(10) if self.told else self.decades

    @property
    def over(self) -> str:
        """The steps that the gain was measured over, in words."""
        return counted(self.gain.steps, "step")

    @property
    def span_words(self) -> str:
        """The span in words: a stretch between cuts is nobody's wish."""
        steps = counted(self.span, "step")
        between = self.span == typical_segment(self.track)
        return f"the {steps} of a typical stretch" if between else f"your {steps}"

    @property
    def told(self) -> bool:
        """Whether there is a rate to speak of: it has settled, and the gain over the span follows it."""
        return self.settled and math.isfinite(self.rate.value) and not self.apart

    @property
    def apart(self) -> bool:
        """Whether the rate over these steps makes another gain than was measured, beyond both intervals."""
        low, high = self.rate.low * self.gain.steps, self.rate.high * self.gain.steps
        off = abs(self.rate.value - self.gain.pace) * self.gain.steps
        return off > LN_TELLING and (low > self.gain.high or high < self.gain.low)

    @property
    def fades(self) -> bool:
        """Whether the gradient is lost: vanishing, dead, or open but lost by more than the band."""
        low = self.verdict.name == "inconclusive" and self.gain.value < -LN_BAND
        return self.verdict.name in ("vanishing", "dead") or low


def parameter(owner: str, track_name: str, parameter_name: str) -> str:
    """Where the user finds a parameter of a track whose module has the path `owner`.

    >>> parameter("encoder.lstm", "encoder.lstm.l0_reverse", "bias_ih")
    'model.encoder.lstm.bias_ih_l0_reverse'
    >>> parameter("", "cell", "bias_ih"), parameter("cell", "cell@2", "bias_ih")
    ('model.bias_ih', 'model.cell.bias_ih')
    >>> parameter("", "l1@2", "weight_hh"), parameter("1", "1.l0", "bias_ih")
    ('model.weight_hh_l1', "model.get_submodule('1').bias_ih_l0")
    """
    return f"{module(owner)}.{parameter_name}{_suffix(owner, track_name)}"


def _suffix(owner: str, track_name: str) -> str:
    """What PyTorch ends the names of a layer's parameters with; "" for a cell."""
    tail = track_name.split("@")[0].removeprefix(owner).removeprefix(".")
    return f"_{tail}" if re.fullmatch(r"l\d+(_reverse)?", tail) else ""


def module(path: str) -> str:
    """Python for a module of the model; a number in an nn.Sequential is no attribute name.

    >>> module(""), module("encoder.lstm"), module("layers.0")
    ('model', 'model.encoder.lstm', "model.get_submodule('layers.0')")
    """
    if all(part.isidentifier() for part in path.split(".") if path):
        return f"model.{path}" if path else "model"
    return f"model.get_submodule({path!r})"


def over_sequences(values: Tensor, track: Track) -> Rate:
    """Mean over units and real steps of (T, B, width), with its t-interval over sequences."""
    mask = track.mask.cpu()
    each = [float(values[mask[:, b], b].double().mean()) for b in range(track.batch)]
    return rate_over_sequences(np.array(each))


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
