"""A word at the right moment: rules that become true or cease to be, and changes of verdict that last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gradflow.conditions import Condition, parse_conditions
from gradflow.errors import InputError, must_be
from gradflow.history import Note
from gradflow.limits import LASTING
from gradflow.watching.probing import MeasuredUpdate


@dataclass(frozen=True)
class Event:
    """What a callable given as ``on=`` is told: a rule became true of a layer, or ceased to be."""

    rule: str  # as it was written: "vanishing", "horizon<20"; "verdict" where none was given
    layer: str  # its name
    step: int  # the training step
    holds: bool  # true when it begins, false when it ends
    sentence: str  # what it is, in words


Callback = Callable[[Event], object]


@dataclass
class Alerts:
    """The rules of one watch, and what holds of each layer.

    Without rules a change of verdict that has lasted three probes is an event.
    """

    conditions: list[Condition] = field(default_factory=list)  # the rules
    callbacks: list[Callback] = field(default_factory=list)  # whom to tell; none: a Python warning
    _holding: set[tuple[str, str]] = field(default_factory=set)  # rule and layer
    _told: dict[str, str] = field(default_factory=dict)  # layer -> the verdict that was last told
    _lasting: dict[str, tuple[str, int]] = field(default_factory=dict)  # layer -> verdict, probes

    def copied(self) -> Alerts:
        """The same, of which what holds changes by itself."""
        held = set(self._holding)
        return replace(self, _holding=held, _told=dict(self._told), _lasting=dict(self._lasting))

    def after(self, step: int, measured: MeasuredUpdate) -> list[Event]:
        """What changed with a probe."""
        if not self.conditions:
            return self._changes(step, measured) + self._breaks(step, measured)
        events = []
        for condition in self.conditions:
            for name, standing in measured.standings.items():
                said = condition.holds(standing)
                number = condition.measured(standing)
                words = measured.layers[name].sentence
                words += f" ({condition.text}{number})" if number else ""
                events += self._turned(condition.text, name, step, said, words)
            for name in measured.layers.keys() - measured.standings.keys():
                if condition.text == "nan":  # which needs no verdict
                    words = measured.broken.get(name, f"{name} is finite again")
                    events += self._turned("nan", name, step, name in measured.broken, words)
        return events

    def _turned(self, rule: str, layer: str, step: int, holds: bool, words: str) -> list[Event]:
        """An event where the rule holds now and did not before, or the other way round."""
        if holds == ((rule, layer) in self._holding):
            return []
        (self._holding.add if holds else self._holding.discard)((rule, layer))
        return [Event(rule, layer, step, holds, words)]

    def _changes(self, step: int, measured: MeasuredUpdate) -> list[Event]:
        """Verdicts that are other than the one told last, for three probes."""
        events = []
        for name, standing in measured.standings.items():
            verdict, count = self._lasting.get(name, ("", 0))
            count = count + 1 if verdict == standing.verdict else 1
            self._lasting[name] = standing.verdict, count
            before = self._told.setdefault(name, standing.verdict)
            if count < LASTING or standing.verdict == before:
                continue
            self._told[name] = standing.verdict
            words = f"{measured.layers[name].sentence}; it was {before} before"
            events.append(Event("verdict", name, step, True, words))
        return events

    def _breaks(self, step: int, measured: MeasuredUpdate) -> list[Event]:
        """The first NaN or Inf of a layer."""
        events = []
        for name in measured.layers:
            words = measured.broken.get(name, f"{name} is finite again")
            found = self._turned("nan", name, step, name in measured.broken, words)
            events += [event for event in found if event.holds]
        return events


def read_rules(on: object) -> Alerts:
    """What ``on=`` asks for.

    Args:
        on: rules as of ``--fail-on``, a callable, or a list of both.

    Returns:
        The rules, and whom to tell.

    Raises:
        InputError: it is something else, or a rule cannot be read.
    """
    alerts = Alerts()
    some = on if isinstance(on, list | tuple) else [] if on is None else [on]
    for one in some:
        if isinstance(one, str):
            alerts.conditions += parse_conditions(one, "on")
        elif callable(one):
            alerts.callbacks.append(one)
        else:
            expected = "rules such as 'vanishing,horizon<20', a callable, or a list of them"
            raise InputError(must_be("on", expected, repr(one), "leave it out for warnings"))
    return alerts


def notes_of(events: Sequence[Event]) -> list[Note]:
    """The same for the history."""
    about = {"verdict": "verdict", "nan": "nonfinite"}
    return [
        Note(event.step, about.get(event.rule, "alert"), _words(event), event.layer)
        for event in events
    ]


def _words(event: Event) -> str:
    return event.sentence if event.holds else f"{event.rule} no longer holds: {event.sentence}"
