"""Conditions for `--fail-on`: verdicts, and limits on a layer's numbers."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradflow.errors import InputError
from gradflow.limits import LN_GONE, VERDICTS

if TYPE_CHECKING:
    from gradflow.analysis import LayerAnalysis
    from gradflow.analyzer.paced import Paced

    JudgedLayer = LayerAnalysis | Paced  # what conditions read: an analysis, a probe, a checkpoint

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


def _horizon(layer: JudgedLayer) -> float:
    """The horizon; where a falling gain outlived what was measured, the one its pace predicts."""
    if layer.horizon is not None:
        return layer.horizon
    if layer.never_gone or not layer.pace < 0:
        return math.inf
    return max(layer.searched + 1, LN_GONE / layer.pace)


NUMBERS: dict[str, Callable[[JudgedLayer], float | None]] = {
    "horizon": _horizon,
    "half-life": lambda layer: layer.half_life,
    "channels": lambda layer: layer.channels,
    "rate": lambda layer: None if "not settled" in layer.labels else layer.rate.value,
}

UNTOLD = (
    "a rate per step has not settled in so few steps; give longer sequences, or ask for a verdict, "
    "which is of the gain"
)


NAN = "nan"  # the condition that a state is not finite


@dataclass(frozen=True)
class Condition:
    """One condition, as the user wrote it."""

    text: str
    holds: Callable[[JudgedLayer], bool]
    measured: Callable[[JudgedLayer], str] = lambda layer: ""  # for the reader of a log
    untold: Callable[[JudgedLayer], str] = lambda layer: ""  # why it cannot be told, "" if it can

    def held_by(self, layers: Iterable[JudgedLayer]) -> list[str]:
        """A sentence for every layer for which the condition holds."""
        return [
            f"{layer.name}: {self.text}{self.measured(layer)}"
            for layer in layers
            if self.holds(layer)
        ]

    def open_in(self, layers: Iterable[JudgedLayer]) -> list[str]:
        """A sentence for every layer for which nobody can tell whether it holds."""
        return [
            f"{layer.name}: {self.text} is not tested: {why}"
            for layer in layers
            if (why := self.untold(layer)) and not self.holds(layer)
        ]


def _not_finite(layer: JudgedLayer) -> bool:
    """A model of NaN passes no condition for lack of a number."""
    return "not finite" in layer.labels


def _reason(layer: JudgedLayer) -> str:
    return ", and its states are not finite" if _not_finite(layer) else ""


def parse_conditions(text: str | None, option: str = "--fail-on") -> list[Condition]:
    """Read 'vanishing,exploding,horizon<50'; the option is named where that cannot be read.

    >>> [condition.text for condition in parse_conditions("vanishing, horizon<50")]
    ['vanishing', 'horizon<50']
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    return [_parse(part, option) for part in parts]


def _parse(text: str, option: str) -> Condition:
    if text == NAN:
        return Condition(text, _not_finite, _reason)
    if text in VERDICTS:
        return Condition(text, lambda layer: layer.verdict == text or _not_finite(layer), _reason)
    match = re.fullmatch(r"([a-z_-]+)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)", text)
    name = match[1].replace("_", "-") if match else ""
    if match is None or name not in NUMBERS:
        raise InputError(
            f"{option} must be verdicts ({', '.join(VERDICTS)}), {NAN}, or limits on "
            f"{', '.join(NUMBERS)}, got {text!r}; write for example 'vanishing,horizon<50'"
        )
    try:
        limit = float(match[3])
    except ValueError as error:
        raise InputError(
            f"{option} must compare with a number, got {match[3]!r} in {text!r}; write for example "
            f"'{match[1]}{match[2]}50'"
        ) from error
    read, compare = NUMBERS[name], COMPARISONS[match[2]]

    def holds(layer: JudgedLayer) -> bool:
        if _not_finite(layer):
            return True
        value = read(layer)
        return value is not None and not math.isnan(value) and compare(value, limit)

    def measured(layer: JudgedLayer) -> str:
        return _reason(layer) or f", it is {read(layer):.4g}"

    def untold(layer: JudgedLayer) -> str:
        return UNTOLD if name == "rate" and "not settled" in layer.labels else ""

    return Condition(text, holds, measured, untold)
