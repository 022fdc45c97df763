"""When the next training step is probed: every so many steps, or ever more rarely, to keep to a budget."""

from __future__ import annotations

import math
import statistics
import time

from gradflow.limits import WATCH_REMEMBERED, WATCH_TOLD


class Schedule:
    """Measures what probes cost and says when the next one is due.

    A probe is made only where all probes so far and it together are foreseen to take no more than the
    budget of the time since the first step. The first probe is made at the first step, whatever it takes.

    Args:
        every: the fewest steps between two probes.
        budget: the share of the wall time that probes may take, None for any.
    """

    def __init__(self, every: int, budget: float | None) -> None:
        self.every = every
        self.budget = None if budget == 1 else budget  # of all the time nothing is to be kept back
        self.spent = 0.0  # seconds that probes have added
        self.interval = every
        self.due = 0  # the step of the next probe
        self._begun = math.nan  # when the first step began
        self._costs: list[float] = []  # of the last probes
        self._plain: list[float] = []  # seconds from forward to update of steps without a probe
        self._steps = math.nan  # seconds of a whole step without one, since the last probe
        self._ended, self._ended_at = math.nan, 0  # the last probe, and its step
        self._told = every
        self._unparted = 0.0  # seconds of a probe, with those of its step, which were not known

    def is_due(self, step: int) -> bool:
        """Whether the step under way is to be probed; looked at only from `due` on."""
        now = time.perf_counter()
        if math.isnan(self._begun):
            self._begun, self._ended, self._ended_at = now, now, step
            return True
        if step > self._ended_at:
            self._steps = (now - self._ended) / (step - self._ended_at)
        missing = self._missing(now)
        if missing <= 0:
            return True
        self.due = step + max(1, math.ceil(missing / self._steps))
        return False

    def _missing(self, now: float) -> float:
        """Seconds of training still to come before another probe keeps to the budget."""
        if self.budget is None or not self._costs:
            return 0.0
        return (self.spent + self._expected()) / self.budget - (now - self._begun)

    def _expected(self) -> float:
        return max(statistics.median(self._costs), self._costs[-1])

    def probed(self, step: int, seconds: float, forward_to_update: float) -> float:
        """A probe has ended.

        Args:
            step: its training step.
            seconds: from the forward pass to here.
            forward_to_update: the part of it before the measurement.

        Returns:
            What it has added to the step, in seconds.
        """
        plain = statistics.median(self._plain) if self._plain else 0.0
        self._unparted = 0.0 if self._plain else forward_to_update
        cost = seconds - min(plain, forward_to_update)
        self.spent += cost
        self._costs = [*self._costs, cost][-WATCH_REMEMBERED:]
        now = time.perf_counter()
        self._ended, self._ended_at = now, step
        missing, known = self._missing(now), math.isfinite(self._steps) and self._steps > 0
        self.interval = max(self.every, math.ceil(missing / self._steps) if known else 0)
        self.due = step + self.interval
        return cost

    def lost(self, step: int, seconds: float) -> None:
        """A probe was given up: what it cost counts, and it is tried again.

        Args:
            step: its training step.
            seconds: since it was opened.
        """
        self.spent += seconds
        self.due = step + 1

    def plain(self, seconds: float) -> None:
        """A step without a probe took so long from its forward pass to its update.

        Args:
            seconds: wall time.
        """
        self._plain = [*self._plain, seconds][-WATCH_REMEMBERED:]
        known = min(seconds, self._unparted)
        self._unparted = 0.0
        self.spent -= known
        if known:
            self._costs[-1] -= known

    @property
    def step_seconds(self) -> float:
        """Wall time of a step without a probe, NaN before the second one."""
        return self._steps

    def words(self) -> str:
        """A sentence where the interval is another than it was said to be, else ""."""
        if max(self.interval, self._told) < WATCH_TOLD * min(self.interval, self._told):
            return ""
        self._told = self.interval
        if self.interval == self.every:
            return f"probes come every {self.every} steps again"
        return (
            f"a probe takes {self._expected():.2g} s and a step {self._steps:.2g} s: to keep to "
            f"{100 * (self.budget or 1):g} % of the time the next one comes after {self.interval} steps"
        )
