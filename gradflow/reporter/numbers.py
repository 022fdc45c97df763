"""Numbers as people read them, the same in the terminal and on the page."""

from __future__ import annotations

import math

from gradflow.analysis import LayerAnalysis, Prediction, Rate
from gradflow.cells import CELLS
from gradflow.limits import power


def gain_words(layer: LayerAnalysis | Prediction) -> str:
    """The largest gain over the span in decades, with half the width of its 95 % interval."""
    gain = layer.gain
    if math.isnan(gain.value):
        return "none"
    if math.isinf(gain.value):
        return "0" if gain.value < 0 else "∞"
    value, low, high = (end / math.log(10) for end in (gain.value, gain.low, gain.high))
    return f"{rate_words(Rate(value, low, high))} decades"


def rate_words(rate: Rate) -> str:
    """A rate in nats per step with half the width of its 95 % interval.

    >>> rate_words(Rate(-0.98, -1.01, -0.95)), rate_words(Rate(0.1, 0.1, 0.1))
    ('−0.98 ± 0.03', '+0.100')
    """
    if math.isnan(rate.value):
        return "none"
    if math.isinf(rate.value):
        return "−∞" if rate.value < 0 else "+∞"
    half = (rate.high - rate.low) / 2
    if not math.isfinite(half) or half < 1e-5:
        return _signed(rate.value, rate.value / 100)
    # an interval that is not symmetric is said in full, never averaged
    if abs(rate.high + rate.low - 2 * rate.value) > 0.1 * half:
        low, high = _signed(rate.low, half), _signed(rate.high, half)
        return f"{_signed(rate.value, half)} [{low}, {high}]"
    return f"{_signed(rate.value, half)} ± {_plain(half, half)}"


def _plain(value: float, unit: float) -> str:
    """The size of a number, with as many decimals as ``unit`` needs for one digit."""
    digits = 1 if unit == 0 else max(1, min(5, -math.floor(math.log10(abs(unit)))))
    return f"{abs(value):.{digits}f}"


def _signed(value: float, unit: float) -> str:
    """The same with a true minus, or a plus."""
    rounded = _plain(value, unit)
    return rounded if float(rounded) == 0 else ("−" if value < 0 else "+") + rounded


def steps_words(value: float | int | None) -> str:
    """A number of steps, or never.

    >>> steps_words(6.578), steps_words(3), steps_words(None)
    ('6.6', '3', 'never')
    """
    if value is None or value == math.inf:
        return "never"
    if math.isnan(value):
        return "none"
    if isinstance(value, int) or value >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def channel_words(layer: LayerAnalysis, found: LayerAnalysis | Prediction | None = None) -> str:
    """How many directions survive, and so many steps; of a prediction for the layer, likewise."""
    channels = (found or layer).channels
    if channels is None:
        return "unknown"
    steps = layer.channel_steps
    return f"{channels} of {layer.size}" + ("" if steps is None else f" at {steps}")


def cell_words(layer: LayerAnalysis) -> str:
    """The kind of cell and its width.

    A plain RNN says its nonlinearity only where it is not tanh.
    """
    spec = CELLS.get(layer.cell)
    return f"{layer.cell if spec is None else spec.shown or spec.kind} {layer.hidden}"


def half_life_words(layer: LayerAnalysis | Prediction) -> str:
    """The half-life; nothing was measured where the rate is not a number."""
    return "none" if math.isnan(layer.rate.value) else steps_words(layer.half_life)


def gone_words(layer: LayerAnalysis | Prediction) -> str:
    """After how many steps the gain is gone; beyond what was searched, or never."""
    if layer.horizon is None and math.isnan(layer.rate.value):
        return "none"
    if layer.horizon is None and not layer.never_gone:
        return f"> {layer.searched}"
    return steps_words(layer.horizon)


def window_words(layer: LayerAnalysis) -> str:
    """Steps back that keep the gradient of the recurrent weights within 5 %."""
    return "unknown" if layer.window is None else str(layer.window)


def number_words(value: float) -> str:
    """A number with two digits, as a power of ten where it is far from 1.

    >>> number_words(0.527), number_words(1234.0), number_words(3.2e-7), number_words(-0.0)
    ('0.53', '1234', '3·10⁻⁷', '0')
    """
    if not math.isfinite(value):
        return "none" if math.isnan(value) else ("−∞" if value < 0 else "∞")
    if value == 0:
        return "0"
    sign, size = ("−" if value < 0 else ""), abs(value)
    if 1e-3 <= size < 1e5:
        rounded = f"{size:.0f}" if size >= 100 else f"{float(f'{size:.2g}'):g}"
        return sign + rounded
    return sign + ratio_words(math.log10(size))


def ratio_words(log10: float) -> str:
    """The same for a number given by its log10, which may be far out of a float's range.

    >>> ratio_words(-0.3), ratio_words(-400.2), ratio_words(-math.inf)
    ('0.5', '6·10⁻⁴⁰¹', '0')
    """
    if math.isnan(log10):
        return "none"
    if math.isinf(log10):
        return "0" if log10 < 0 else "∞"
    if -3 <= log10 < 5:
        return number_words(10**log10)
    whole = math.floor(log10)
    digit = round(10 ** (log10 - whole))
    whole, digit = (whole + 1, 1) if digit == 10 else (whole, digit)
    return ("" if digit == 1 else f"{digit}·") + power(whole)


def percent_words(share: float) -> str:
    """A share as people say it; what is not nothing is not said as 0 %.

    >>> percent_words(0.126), percent_words(0.001), percent_words(0.9999), percent_words(0)
    ('13 %', 'below 1 %', 'over 99 %', '0 %')
    """
    if math.isnan(share):
        return "none"
    if 0 < share < 0.005:
        return "below 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def count_words(count: int, noun: str) -> str:
    """A count with its noun.

    >>> count_words(1, "step"), count_words(3, "step")
    ('1 step', '3 steps')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
