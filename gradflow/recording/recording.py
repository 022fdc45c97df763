"""A `Recording`: all tracks of one block, by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from html import escape

from gradflow.errors import RecordingError
from gradflow.recording.by_name import ByName
from gradflow.recording.padding import Padding
from gradflow.recording.track import Track
from gradflow.recording.unseen import Unseen

SHOWN_TRACKS = 12  # tracks of a repr that fits a screen


class Recording(ByName[Track]):
    """All tracks that were seen inside one ``with gradflow.record(model) as recording:`` block.

    ``recording[name]`` is a `Track`; the start of a name does if it fits one only. It is filled
    while the block runs and stays readable afterwards.

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
