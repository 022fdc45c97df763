"""One measurement: what was compared with what, the number, and the goal where there is one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.timing import Ratio


@dataclass(frozen=True)
class Row:
    """A number with its unit; `least` or `most` is the goal."""

    group: str  # the table it stands in
    what: str  # in words
    value: float
    unit: str  # "×", "%", "s", "MiB", "power"
    case: dict[str, Any] = field(default_factory=dict)
    low: float | None = None  # quartiles over the pairs
    high: float | None = None
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if self.least is not None:
            return self.value >= self.least
        return None if self.most is None else self.value <= self.most

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"met": self.met}


def ratio_row(group: str, what: str, ratio: Ratio, case: dict[str, Any], **goal: Any) -> Row:
    """A ratio of two times as a row."""
    note = f"{ratio.seconds:.3g} s against {ratio.against:.3g} s, {ratio.pairs} pairs"
    return Row(group, what, ratio.median, "×", case, ratio.low, ratio.high, note=note, **goal)
