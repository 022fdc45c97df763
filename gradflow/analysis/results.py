"""What one layer turned out to be: its verdict, its numbers with their intervals, findings, predictions."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import stdtrit  # scipy.stats takes a second to import

from gradflow.errors import InputError, must_be
from gradflow.limits import CONFIDENCE, LAG_TOLERANCE, RATE_ROUNDING
from gradflow.recording.source import Parity


def kaplan_yorke_dimension(exponents: Any, size: int | None = None) -> float:
    """How many dimensions of the state the motion fills: j + (λ_1 + … + λ_j) / |λ_{j+1}|.

    j is the largest number of leading exponents whose sum is not negative (Kaplan & Yorke 1979;
    Engelken, Wolf & Abbott 2023 for recurrent networks). It is not the number of units that matter.

    Args:
        exponents: (k,) nats per step or per any time, in any order.
        size: the state's width, where only its largest k exponents are given.

    Returns:
        From 0 (every direction contracts) to the state's width; NaN where an exponent is unknown, or
        so few are given that their sum is not yet negative.

    Raises:
        InputError: they are not one spectrum.

    >>> from gradflow.analyzer import kaplan_yorke_dimension
    >>> round(kaplan_yorke_dimension([0.9056, 0.0, -14.5723]), 3)    # Lorenz 1963
    2.062
    """
    values = _spectrum(exponents)
    if not len(values) or np.isnan(values).any():
        return math.nan
    sums = np.cumsum(values)
    negative = np.flatnonzero(sums < 0)
    if not len(negative):
        return float(len(values)) if len(values) == (size or len(values)) else math.nan
    kept = int(negative[0])
    before = float(sums[kept - 1]) if kept else 0.0
    return kept + before / abs(float(values[kept]))


def entropy_rate(exponents: Any, size: int | None = None) -> float:
    """Sum of the positive exponents: how much per step nearby states tell themselves apart.

    The most that the Kolmogorov–Sinai entropy can be (Ruelle 1978), and the entropy itself where
    Pesin's identity holds (Pesin 1977). It is not the entropy of the outputs.

    Args:
        exponents: (k,) nats per step, in any order.
        size: the state's width, where only its largest k exponents are given.

    Returns:
        Nats per step, 0 where nothing grows; NaN where an exponent is unknown, or so few are given
        that the last is still positive.

    Raises:
        InputError: they are not one spectrum.

    >>> from gradflow.analyzer import entropy_rate
    >>> round(entropy_rate([0.9624, -0.9624]), 4)                    # Arnold's cat map
    0.9624
    """
    values = _spectrum(exponents)
    cut_short = len(values) != (size or len(values)) and bool((values > 0).all())
    if not len(values) or np.isnan(values).any() or cut_short:
        return math.nan
    return float(values[values > 0].sum())


def _spectrum(exponents: Any) -> np.ndarray:
    """The exponents of one spectrum, the largest first."""
    values = np.asarray(exponents, dtype=float)
    if values.ndim != 1:
        advice = "give those of one sequence, or their mean over sequences"
        raise InputError(must_be("exponents", "one spectrum, (k,)", str(values.shape), advice))
    return -np.sort(-values)


WINDOW_OF = "weight_hh"  # the weight whose gradient flows through time
FIRST = (  # findings on what the loss reads, which stand before those of all layers
    "unread",
    "reads-one-sequence",
    "reads-past-packed",
    "reads-first-step",
    "reads-after-end",
)


def display_form(name: str, value: object) -> str:
    """What a notebook shows of a value: the reporter draws it, and is loaded only then."""
    return str(getattr(importlib.import_module("gradflow.reporter.notebook"), name)(value))


@dataclass(frozen=True)
class Rate:
    """Growth of ln gain per step in nats, with its 95 % interval over sequences."""

    value: float
    low: float
    high: float

    def wider(self, *more: float) -> Rate:
        """The same around its value, with these half-widths on top of its own, as independent errors add.

        >>> Rate(0.0, -3.0, 3.0).wider(4.0)
        Rate(value=0.0, low=-5.0, high=5.0)
        """
        half = math.hypot((self.high - self.low) / 2, *more)
        return Rate(self.value, self.value - half, self.value + half)


@dataclass(frozen=True)
class Gain:
    """ln of the largest gain of any direction over the span, with its 95 % interval over sequences.

    What the verdict judges: below −ln 10 a layer vanishes, above ln 10 it explodes.

    >>> gain = Gain(-2.302585, -2.4, -2.2, 99)
    >>> round(gain.decades, 3)
    -1.0
    """

    value: float  # nats, mean over sequences; −inf where exact zeros or cuts leave nothing
    low: float
    high: float
    steps: int  # that it was measured over: the span, or what sequences and cuts leave of it

    @property
    def decades(self) -> float:
        """In powers of ten; negative is lost."""
        return self.value / math.log(10)

    @property
    def pace(self) -> float:
        """Nats per step of these steps, NaN without one; the rate is what this settles to."""
        return self.value / self.steps if self.steps else math.nan


UNMEASURED = Gain(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, the evidence for it, and what to try.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(50, 2, 1))[0][-1].sum().backward()
    >>> finding = gradflow.analyze(recording).findings[0]
    >>> finding.name, round(finding.value, 4), round(finding.severity, 1)     # 49 and 50 log10 0.5
    ('vanishing', -14.7505, -15.1)
    """

    name: str  # stable, e.g. "vanishing", "forget-gates-leak"
    layer: str  # its name
    message: str  # one sentence with numbers
    where: str = ""  # steps, units or sequences
    value: float | None = None  # what was measured, in the units that the message names
    low: float | None = None  # its 95 % interval over sequences, if there is one
    high: float | None = None  # the same interval's other end
    threshold: float | None = None  # what the value was held against
    source: str = ""  # author and year of the remedy, or of what the finding rests on
    severity: float | None = None  # decades over the span; negative = lost
    advice: str = ""  # one sentence
    code: str = ""  # a line to paste
    basis: str = ""  # where the threshold comes from: author and year, or a definition in words

    def __repr__(self) -> str:
        tried = f"; try: {self.advice}" if self.advice else ""
        return f"<{self.name} in {self.layer}: {self.message}{tried}>"

    def _repr_html_(self) -> str:
        return display_form("finding_html", self)


@dataclass(frozen=True)
class Prediction:
    """What a remedy would make of a layer, tried on the recorded batch without training.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
    >>> run = gradflow.diagnose(rnn, torch.zeros(50, 2, 1), loss=lambda output: output[-1].sum())
    >>> prediction = run["l0"].predictions[0]
    >>> prediction.words, prediction.verdict
    ('W_hh orthogonal', 'stable')
    """

    remedy: str  # an argument of `gradflow.what_if`: "forget_bias", "chrono", "orthogonal" or "scale_hh"
    value: float  # of that argument
    words: str  # the remedy as people write it: "forget bias + 1"
    verdict: str  # one of gradflow.limits.VERDICTS
    rate: Rate  # nats per step
    half_life: float  # steps; inf if the gain never halves, NaN if not known
    horizon: int | None  # first lag with gain < 1e-3; None if not reached
    searched: int  # how many lags the horizon was searched over
    channels: int | None  # directions that survive the span
    helps: float  # powers of ten over the span by which the gain comes nearer to 1
    batch: str  # what it was tried on
    message: str  # one line, before and after
    gain: Gain = UNMEASURED  # nats over the span

    @property
    def never_gone(self) -> bool:
        """Whether the gain stays above 1e-3 for good; see `LayerAnalysis.never_gone`."""
        return _never_gone(self)


@dataclass(frozen=True)
class Alone:
    """A layer of a closed loop with its inputs held fixed: what its own equations do, no verdict.

    >>> import torch, gradflow
    >>> cell = torch.nn.RNNCell(1, 1, bias=False)
    >>> for weight in cell.parameters():
    ...     _ = torch.nn.init.constant_(weight, 0.5)
    >>> with gradflow.record(cell) as recording:
    ...     h = x = torch.zeros(2, 1)
    ...     for _ in range(30):
    ...         x = h = cell(x, h)
    ...     h.sum().backward()
    >>> layer = gradflow.analyze(recording)["cell"]
    >>> round(layer.rate.value, 4), round(layer.alone.rate.value, 4)     # ln 1, ln 0.5
    (0.0, -0.6931)
    """

    rate: Rate  # nats per step
    half_life: float  # steps; inf if the gain never halves, NaN if not known
    horizon: int | None  # first lag with gain < 1e-3; None if not reached
    searched: int  # how many lags the horizon was searched over
    channels: int | None  # directions that survive the span
    gain: Gain = UNMEASURED  # nats over the span
    sentence: str = ""  # these numbers in words


@dataclass(frozen=True)
class LayerAnalysis:
    """The verdict on one layer in one direction, and the numbers behind it.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> layer = gradflow.diagnose(rnn, torch.zeros(100, 2, 1))["l0"]
    >>> layer.verdict, round(layer.rate.value, 4), layer.horizon              # ln 0.9
    ('vanishing', -0.1054, 66)
    >>> round(layer.data["lag_median"].sel(lag=10).item(), 4)                 # 10 ln 0.9
    -1.0536
    """

    name: str  # of its track: "rnn.l0", "encoder.lstm.l1_reverse"
    cell: str  # "LSTM", "GRU", "RNN_TANH", "RNN_RELU"; a user's class name; "tap"
    reverse: bool  # true: the past of a step is the larger t
    hidden: int  # H
    size: int  # S
    steps: int  # T of the longest sequence
    sequences: int  # B
    span: int  # the distance of interest, in steps
    verdict: str  # one of gradflow.limits.VERDICTS
    labels: tuple[str, ...]  # what else it is: "transient growth", "not exponential"
    rate: Rate  # the largest Lyapunov exponent, nats per step
    half_life: float  # steps; inf if the gain never halves, NaN if not known
    horizon: int | None  # first lag with gain < 1e-3; None if not reached
    searched: int  # how many lags the horizon was searched over
    channels: int | None  # directions that survive the span; None where undefined
    lyapunov: np.ndarray | None  # (k,) nats per step: the rate, then the others, largest first
    findings: tuple[Finding, ...]  # what is wrong and what to try; none in a healthy layer
    parity: Parity  # parameter gradients rebuilt from what was recorded, against the model's own
    sentence: str  # the verdict in words with numbers
    title: str  # the overview's headline for this row
    gradient_note: str  # "" or why there is no gradient of the loss here
    method: str  # of the gain map: how it was made, and why so
    data: xr.Dataset = field(repr=False)  # every array; see `gradflow.analysis`
    predictions: tuple[Prediction, ...] = ()  # remedies that help, the best first
    alone: Alone | None = None  # of a layer in a closed loop: the same with its inputs held fixed
    part_of: str = ""  # name of the layer that holds the joint state of its closed loop
    step_labels: tuple[str, ...] = ()  # T words for the steps in input time, or none
    gain: Gain = UNMEASURED  # nats over the span: what the verdict judges

    @property
    def decades(self) -> float:
        """The gain over the span in powers of ten; negative is lost."""
        return _decades(self)

    @property
    def decades_over_span(self) -> float:
        """The same over the whole span where sequences are shorter: by the rate if it has settled."""
        if self.rate_told:
            return self.rate.value * self.span / math.log(10)
        return self.decades

    @property
    def pace(self) -> float:
        """Nats per step that the gain over the span comes to."""
        return self.rate.value if math.isnan(self.gain.value) else self.gain.pace

    @property
    def kaplan_yorke(self) -> float:
        """Dimension of the attractor under these inputs, from `lyapunov`: 0 where every direction contracts,
        NaN if not known."""
        return (
            math.nan if self.lyapunov is None else kaplan_yorke_dimension(self.lyapunov, self.size)
        )

    @property
    def entropy_rate(self) -> float:
        """Sum of the positive exponents of `lyapunov`, nats per step; NaN if not known."""
        return math.nan if self.lyapunov is None else entropy_rate(self.lyapunov, self.size)

    @property
    def rate_told(self) -> bool:
        """Whether there is a rate that has settled."""
        return math.isfinite(self.rate.value) and "not settled" not in self.labels

    @property
    def never_gone(self) -> bool:
        """Whether the gain stays above 1e-3 for good, as far as a verdict can say.

        A layer that vanishes, or that is open with a falling gain, is only longer-lived than what
        was measured: its horizon lies beyond ``searched``.
        """
        return _never_gone(self)

    def __repr__(self) -> str:
        return f"<{self.cell}: {self.sentence}>"

    def _repr_html_(self) -> str:
        return display_form("layer_html", self)

    @property
    def window(self) -> int | None:
        """Steps back from every loss step that keep ∂L/∂W_hh within 5 %; None where not known."""
        return window_of(self.data)

    @property
    def channel_steps(self) -> int | None:
        """Over how many steps `channels` are counted: the span, or what cuts and lengths leave of it."""
        lags = self.data["rank_lag"].values if "rank_lag" in self.data.coords else ()
        return int(max(lags)) if len(lags) else None

    @property
    def loss_reach(self) -> float:
        """Steps before the last loss step at which its gradient is gone; inf: never, NaN: not known.

        That of this loss alone, in the directions that it reads; `horizon` is that of any direction.
        """
        return loss_reach_of(self.data)

    @property
    def main_state(self) -> str:
        """The state the overview shows: c where there is one, else h, else the first."""
        names = [str(name) for name in self.data["state"].values]
        return next((name for name in ("c", "h") if name in names), names[0])


def _never_gone(found: LayerAnalysis | Prediction) -> bool:
    open_and_falling = found.verdict == "inconclusive" and not _decades(found) >= 0
    return found.horizon is None and found.verdict != "vanishing" and not open_and_falling


def _decades(found: LayerAnalysis | Prediction) -> float:
    """Runs saved before there was a gain over the span have only their rate."""
    if math.isnan(found.gain.value) and isinstance(found, LayerAnalysis):
        return found.rate.value * found.span / math.log(10)
    return found.gain.decades


def window_of(data: xr.Dataset) -> int | None:
    """Steps back from every loss step that keep ∂L/∂W_hh within 5 %; None where it is not known."""
    if WINDOW_OF not in data.get("parameter", ()):
        return None
    # a dict, for xarray's own sel has an argument named tolerance
    chosen = data["truncation_window"].sel(parameter=WINDOW_OF)
    found = float(chosen.sel({"tolerance": LAG_TOLERANCE}, method="nearest"))
    return None if math.isnan(found) or not (data["lag_contribution"] > 0).any() else int(found)


def loss_reach_of(data: xr.Dataset) -> float:
    """Steps before the last loss step at which its gradient is gone; inf if never, NaN if unknown."""
    return float(data["loss_reach"]) if "loss_reach" in data else np.nan


def quantile(freedom: float, among: int = 1) -> float:
    """How many standard errors a 95 % interval reaches, by Student's t.

    Of so many intervals all hold what they are of 95 times in 100 (Bonferroni).

    >>> round(quantile(9), 3), round(quantile(9, among=5), 3)
    (2.262, 3.25)
    """
    return float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / (2 * among)))


def mean_interval(values: np.ndarray) -> Rate:
    """The mean of independent values with its t-interval; bounds NaN of fewer than two.

    >>> mean_interval(np.array([1.0, 1.0])), mean_interval(np.array([1.0]))
    (Rate(value=1.0, low=1.0, high=1.0), Rate(value=1.0, low=nan, high=nan))
    """
    mean = float(np.mean(values))
    if len(values) > 1 and float(np.ptp(values)) <= RATE_ROUNDING:
        return Rate(mean, mean, mean)  # identical sequences: a point, not an error
    if len(values) < 2:
        return Rate(mean, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = quantile(len(values) - 1) * error
    return Rate(mean, mean - half, mean + half)


def welch(before: np.ndarray, after: np.ndarray, among: int = 1) -> tuple[float, float]:
    """Welch's interval of mean(after) − mean(before), one of so many.

    NaN with fewer than two values in one.

    >>> [round(end, 3) for end in welch(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))]
    [0.733, 5.267]
    """
    if min(len(before), len(after)) < 2:
        return math.nan, math.nan
    difference = float(after.mean() - before.mean())
    errors = [float(values.var(ddof=1)) / len(values) for values in (before, after)]
    if sum(errors) <= RATE_ROUNDING**2:
        return difference, difference
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (before, after), strict=True)
    )
    half = quantile(freedom, among) * math.sqrt(sum(errors))
    return difference - half, difference + half
