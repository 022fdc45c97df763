"""Runs of a layer that start afresh, each on what came of the run before: a loop that carries no state.

A decoder that gives its layer the last outputs and no state, for one. What goes around is what lies
between two runs, so each run is a track of its own and none of them is the loop. A layer that is applied
to its own output is the same on a small scale: its runs are as many layers, not sequences of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gradflow.hooks.closed.dependence import Dependence
from gradflow.hooks.closed.parts import Seen, StockPart
from gradflow.limits import RECURRENCE_USES

REASON = (
    "each call starts from a state of its own, and what goes around are its inputs; the tracks hold what "
    "flows within one call"
)

FORKED = (
    "a call starts from the states of several of its calls at once, as over a tree or a batch put together: "
    "each track is one line of calls, and gains along it hold the others fixed"
)


class Afresh:
    """How many runs in a row every layer made."""

    def __init__(self) -> None:
        self._most: dict[str, int] = {}  # path of a layer -> runs in a row
        self._forms: dict[str, tuple[bool, bool]] = {}  # path -> is it a cell, is it batch_first
        self._rows: dict[Seen, dict[str, int]] = {}  # a run -> path -> runs in the row that it ends

    def look(self, calls: Sequence[Seen]) -> None:
        """All calls so far, in the order in which they were made."""
        parts = Counter(part.path for part in dict.fromkeys(seen.part for seen in calls))
        if not parts or max(parts.values()) < 2:
            return
        dependence = Dependence(calls)
        met = {part for seen in calls for part in self._met(seen, dependence)}
        for part in met | self._joined(calls, dependence):
            for track in part.tracks:
                track.notes += [FORKED] if FORKED not in track.notes else []
        for part, depth in dependence.depths().items():
            for track in part.tracks:
                track.depth = max(track.depth, depth)
        runs = Counter(seen.part.path for seen in calls if _is_run(seen))
        if runs and max(runs.values()) >= RECURRENCE_USES:
            self._count(calls, dependence)

    @staticmethod
    def _met(seen: Seen, dependence: Dependence) -> set[Any]:
        """The parts, several of one layer, whose states a call of torch's starts from; else none."""
        found = {one.part for one in dependence.nearest(seen.starts)} if seen.call else set()
        met = {part for part in found if part.path == seen.part.path}
        return met | {seen.part} if len(met) > 1 else set()

    @staticmethod
    def _joined(calls: Sequence[Seen], dependence: Dependence) -> set[Any]:
        """Loops over one cell of one's own of which one ends in a step of the other, and in no other step.

        A loop whose every step is read by another is the layer below it.
        """
        read: dict[tuple[Any, Any], list[Seen]] = {}  # a loop, another that reads it -> its steps
        for seen in calls if any(seen.mark for seen in calls) else ():
            near = dependence.nearest(seen.starts) if seen.mark and seen.place else ()
            mine = [one for one in near if one.part.path == seen.part.path]
            if any(one.part is seen.part for one in mine):
                for one in mine:
                    read.setdefault((one.part, seen.part), []).append(one)
        lines = [k for k, v in read.items() if len(v) == 1 and v[0].place == k[0].count - 1]
        return {part for pair in lines if pair[0] is not pair[1] for part in pair}

    def _count(self, calls: Sequence[Seen], dependence: Dependence) -> None:
        rows: dict[Seen, dict[str, int]] = {}
        for seen in calls:
            if not _is_run(seen):
                continue  # what goes through a loop that has a track is told by that
            row = rows[seen] = dict(self._rows.get(seen, {}))
            if row:
                continue
            for before in dependence.nearest([*seen.starts, *seen.inputs]):
                for path, length in rows.get(before, {}).items():
                    row[path] = max(row.get(path, 0), length)
            own = seen.part.path
            row[own] = row.get(own, 0) + 1
            self._most[own] = max(self._most.get(own, 0), row[own])
            if seen.call is not None:
                self._forms[own] = seen.call.single, seen.call.batch_first
        self._rows = rows

    def found(self) -> dict[str, tuple[int, bool, bool]]:
        """Layers whose runs follow one another -> how many do; is it a cell, is it batch_first."""
        return {p: (n, *self._forms[p]) for p, n in self._most.items() if n >= RECURRENCE_USES}

    def close(self) -> None:
        """Release the calls."""
        self._rows.clear()


def _is_run(seen: Seen) -> bool:
    """Whether a step is a call that starts from a fresh state, and whose state no later call takes."""
    return isinstance(seen.part, StockPart) and seen.part.count == 1
