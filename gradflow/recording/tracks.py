"""A `Recording`: all tracks of one block, by name, and the recurrences of the model that are in none."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from typing import Any, Generic, TypeVar

from gradflow.errors import RecordingError
from gradflow.recording.padding import Padding
from gradflow.recording.track import Track

Value = TypeVar("Value")


class ByName(Generic[Value]):
    """Layers or tracks by their names, in the order in which they ran."""

    def _named(self) -> Mapping[str, Value]:
        """Name -> value."""
        raise NotImplementedError

    def _matches(self, name: str) -> list[str]:
        """That name, or those that begin so."""
        if name in self._named():
            return [name]
        return [known for known in self._named() if known.startswith(name)]

    def __contains__(self, name: object) -> bool:
        """Whether asking for this name gives one."""
        return isinstance(name, str) and len(self._matches(name)) == 1

    def __len__(self) -> int:
        return len(self._named())

    def keys(self) -> KeysView[str]:
        """The names, as of a dict.

        Returns:
            A view of them, in the order in which the layers ran.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> list(run.keys())
        ['l0']
        """
        return self._named().keys()

    def values(self) -> ValuesView[Value]:
        """The layers, or tracks, as of a dict.

        Returns:
            A view of them, in the order in which they ran.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> [layer.verdict for layer in run.values()]
        ['vanishing']
        """
        return self._named().values()

    def items(self) -> ItemsView[str, Value]:
        """Names and layers, or tracks, as of a dict.

        Returns:
            A view of the pairs, in the order in which they ran.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> [(name, layer.verdict) for name, layer in run.items()]
        [('l0', 'vanishing')]
        """
        return self._named().items()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._named())


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
        names = ", ".join(self.weights[:3])
        names = names or "a tensor that is no parameter of the model, or part of it after part,"
        if len(self.weights) > 3:
            names += f" and {len(self.weights) - 3} more"
        names += " are" if len(self.weights) > 1 else " is"
        kept = "." in self.insert.partition(" = ")[0]  # in an attribute: in a forward, perhaps
        place = "where it is set" if kept else "at the end of the loop's body"
        where = f"{place}, {self.line}" if self.line else "inside the loop"
        why = f"; it was not taken up by itself: {self.reason}" if self.reason else ""
        return (
            f"a recurrence of {self.module} is in no track: {names} used {self.steps} times, each "
            f"time on what came of the use before{why}; put `{self.insert}` {where}, once per step"
        )


SHOWN_TRACKS = 12  # tracks of a repr that fits a screen


class Recording(ByName[Track]):
    """All tracks that were seen inside one ``with gradflow.record(model) as recording:`` block.

    ``recording[name]`` is a `Track`; the start of a name does if it fits one only; a loop over a
    recording goes over its tracks. It is filled while the block runs and stays readable afterwards.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.ones(7, 2, 1))[0].sum().backward()
    >>> recording
    Recording of RNN: 1 track(s)
      l0  RNN_TANH  T=7  B=2  H=1  backwards=1
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.notes: list[str] = []  # sentences for the report: settings that shape the numbers
        self.provenance: dict[str, object] = {}
        self.unseen: tuple[Unseen, ...] = ()  # recurrences that are in no track
        self.lengths_given = False  # whether `record` was told the lengths
        self.paddings: list[Padding] = []  # of what the model was given
        self._tracks: dict[str, Track] = {}
        self.empty_reason = "nothing ran inside the block yet"

    @property
    def tracks(self) -> Mapping[str, Track]:
        """Name -> `Track`, in the order in which the layers ran."""
        return dict(self._tracks)

    def add(self, track: Track) -> None:
        """Take in a track under its name, in the place of one that has it.

        Args:
            track: of a layer that ran, or the same track with something replaced.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.ones(3, 1, 1))[0].sum().backward()
        >>> another = gradflow.Recording("of one layer")
        >>> another.add(recording["l0"])
        >>> list(another.tracks)
        ['l0']
        """
        self._tracks[track.name] = track

    def drop(self, track: Track) -> None:
        """Leave a track out again.

        Args:
            track: one of this recording.

        >>> import torch, gradflow
        >>> rnn = torch.nn.RNN(1, 1)
        >>> with gradflow.record(rnn) as recording:
        ...     rnn(torch.ones(3, 1, 1))[0].sum().backward()
        >>> recording.drop(recording["l0"])
        >>> len(recording)
        0
        """
        del self._tracks[track.name]

    def __getitem__(self, name: str) -> Track:
        if not self._tracks:
            raise RecordingError(self.empty_reason)
        matches = self._matches(name)
        if len(matches) == 1:
            return self._tracks[matches[0]]
        known = ", ".join(self._tracks)
        if matches:
            raise RecordingError(f"{name!r} fits several tracks; give one of {', '.join(matches)}")
        raise RecordingError(f"there is no track {name!r}; this recording has {known}")

    def __iter__(self) -> Iterator[Track]:
        return iter(self._tracks.values())

    def _named(self) -> Mapping[str, Track]:
        return self._tracks

    def require_tracks(self) -> None:
        """Raise the sentence that says why there is nothing, if there is nothing.

        Raises:
            RecordingError: there is no track.

        >>> import gradflow
        >>> gradflow.Recording("Net").require_tracks()
        Traceback (most recent call last):
        gradflow.errors.RecordingError: nothing ran inside the block yet
        """
        if not self._tracks:
            raise RecordingError(self.empty_reason)

    def __repr__(self) -> str:
        if not self._tracks:
            return f"Recording of {self.model_name}: no tracks; {self.empty_reason}"
        width = max(len(name) for name in self._tracks)
        lines = [f"Recording of {self.model_name}: {len(self._tracks)} track(s)"]
        lines += [
            f"  {track.name:<{width}}  {track.cell:<8}  T={track.steps}  B={track.batch}  "
            f"H={track.hidden}  backwards={track.backwards}"
            for track in list(self._tracks.values())[:SHOWN_TRACKS]
        ]
        if len(self._tracks) > SHOWN_TRACKS:
            lines.append(f"  and {len(self._tracks) - SHOWN_TRACKS} more, see .tracks")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def matches_any(name: str, patterns: list[str]) -> bool:
    """Whether a track or module name is picked by one of the user's names or globs."""
    return any(
        fnmatchcase(name, pattern) or name == pattern or name.startswith(pattern + ".")
        for pattern in patterns
    )
