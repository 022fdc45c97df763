"""A `History`: the ordered series of what was measured of one model during its training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from gradflow.analysis.results import display_form
from gradflow.errors import InputError, checked_path, must_be
from gradflow.history import table
from gradflow.history.lines import layout_of, probe_line
from gradflow.history.probe import Note, Probe, Source
from gradflow.history.reader import ProbeBlock, Read, Reader
from gradflow.recording.tracks import ByName

LAYERS_SHOWN = 12  # layers of a repr that fits a screen


class History(ByName[xr.Dataset]):
    """What was measured of a model at some of its training steps; `gradflow.watch` writes one.

    ``history.data`` holds every number, ``history[layer]`` those of one layer; a loop goes over the
    names of the layers, and ``len(history)`` counts the probes.

    >>> from gradflow.history import History, LayerProbe, Probe
    >>> history = History.of("LSTM", [Probe(1, {"loss": 0.5}, {"l0": LayerProbe({"rate": -0.1})})])
    >>> history.data["rate"].sel(step=1, layer="l0").item(), history.layers
    (-0.1, ('l0',))
    """

    def __init__(self, read: Read, reader: Reader | None = None) -> None:
        self._read = read
        self._reader = reader
        self._data: xr.Dataset | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """Read the history in a run's folder as far as it is written; `refresh` reads on.

        Args:
            path: of the folder that was given to `gradflow.watch`, or of its ``history.jsonl``.

        Returns:
            The history.

        Raises:
            FileError: there is none, or it is another version's.
        """
        reader = Reader(checked_path(path))
        reader.more()
        return cls(reader.read, reader)

    @classmethod
    def of(
        cls, title: str, probes: Sequence[Probe], cells: dict[str, str] | None = None, **header: Any
    ) -> History:
        """A history of probes that are at hand, in no file.

        Args:
            title: the model's name.
            probes: in the order of their steps.
            cells: layer name -> kind of cell.
            header: what else is known of the run.

        Returns:
            The history.
        """
        read = Read(headers=[{"title": title} | header])
        for probe in probes:
            layout = layout_of(probe, cells or {})
            if not read.blocks or not read.blocks[-1].layout.holds(layout):
                joined = read.blocks[-1].layout.joined(layout) if read.blocks else layout
                read.blocks.append(ProbeBlock(joined))
            text = probe_line(probe, read.blocks[-1].layout).strip().encode()
            read.blocks[-1].take(text, probe.source)
            read.notes += probe.notes
        return cls(read)

    def detached(self) -> History:
        """The same without its file, which may go: `refresh` finds nothing more."""
        return History(self._read)

    def refresh(self) -> int:
        """Read what was written to the file meanwhile.

        Returns:
            How many probes that are; 0 of a history that is in no file.
        """
        found = 0 if self._reader is None else self._reader.more()
        if found:
            self._data = None
        return found

    @property
    def data(self) -> xr.Dataset:
        """Every number, dims (step, layer, lag, gate, group); see `gradflow.history`."""
        if self._data is None:
            self._data = table.dataset(self._read)
        return self._data

    @property
    def title(self) -> str:
        """The model's name."""
        return str(self.header.get("title", ""))

    @property
    def header(self) -> dict[str, Any]:
        """How the run is watched: ``title``, ``preset``, ``every``, ``budget``, versions, …."""
        return self._read.headers[-1] if self._read.headers else {}

    @property
    def notes(self) -> tuple[Note, ...]:
        """What was said during the training, in order."""
        return tuple(self._read.notes)

    @property
    def ended(self) -> bool:
        """Whether the one who wrote it closed it; not after a kill, and not while it is written."""
        return self._read.ended

    @property
    def damaged(self) -> int:
        """How many lines of the file were cut off, by a kill or a full disk."""
        return self._read.damaged

    @property
    def sources(self) -> tuple[Source | None, ...]:
        """Of every probe the checkpoint that it is of, in a sweep; None in a training."""
        return tuple(source for block in self._read.blocks for source in block.sources)

    @property
    def swept(self) -> bool:
        """Whether its rows are of saved checkpoints, not of a training."""
        return any(self.sources)

    @property
    def counted_in(self) -> str:
        """What its training steps count: "update", or "epoch", "checkpoint" or "training step" of a sweep.

        >>> from gradflow.history import History, Probe, Source
        >>> one = Source("a.pt", "", counts="epoch")
        >>> History.of("LSTM", [Probe(9, {}, {}, source=one)]).counted_in
        'epoch'
        """
        if not self.swept:
            return "update"
        found = {one.counts for one in self.sources if one is not None and not one.failed}
        return (found.pop() if len(found) == 1 else "") or "training step"

    @property
    def runs(self) -> dict[str, History]:
        """The runs of a sweep, by name, each as a history of its own; a training is one run.

        >>> from gradflow.history import History, Probe, Source
        >>> probes = [Probe(9, {"loss": n / 2}, {}, source=Source(f"{n}.pt", f"{n}")) for n in (1, 3)]
        >>> {name: run.data["loss"].item() for name, run in History.of("LSTM", probes).runs.items()}
        {'1': 0.5, '3': 1.5}
        """
        names = dict.fromkeys(source.run for source in self.sources if source is not None)
        return {name: self._only(name) for name in names} or {"": self}

    def _only(self, run: str) -> History:
        """One run of a sweep."""
        blocks = [one for block in self._read.blocks if (one := block.only(run)).steps]
        return History(replace(self._read, blocks=blocks, notes=[]))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order in which they ran."""
        names = (name for block in self._read.blocks if block.steps for name in block.layout.layers)
        return tuple(dict.fromkeys(names))

    @property
    def cells(self) -> dict[str, str]:
        """Layer name -> kind of cell."""
        return {
            name: cell
            for block in self._read.blocks
            if block.steps  # a kill may leave a layout without its probe
            for name, cell in zip(block.layout.layers, block.layout.cells, strict=True)
        }

    @property
    def steps(self) -> np.ndarray:
        """The training step of every probe, (probe,)."""
        return np.array([n for block in self._read.blocks for n in block.steps], dtype=np.int64)

    def __len__(self) -> int:
        return sum(len(block.steps) for block in self._read.blocks)

    def require_probes(self, name: str) -> None:
        """Refuse it, by a name, where no layer was measured; what was noted last says why."""
        if not len(self) or not self.layers:
            said = [note.text for note in self.notes if note.about in ("failed", "warning")]
            advice = f"it says: {said[-1]}" if said else "wait for the first probe"
            raise InputError(
                must_be(name, "a history with a layer that was measured", "none", advice)
            )

    def _named(self) -> dict[str, xr.Dataset]:
        return {name: self.data.sel(layer=name) for name in self.layers}

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __getitem__(self, layer: str) -> xr.Dataset:
        if layer in self.layers:
            return self.data.sel(layer=layer)
        matches = self._matches(layer)
        if len(matches) == 1:
            return self.data.sel(layer=matches[0])
        known = ", ".join(self.layers) or "none yet"
        raise InputError(must_be("layer", f"one of {known}", repr(layer), "see history.layers"))

    def frame(self, kind: str = "layers") -> pd.DataFrame:
        """A tidy table.

        Args:
            kind: "layers" (a row for each probe and layer), "steps" (a row for each probe), "lags"
                (for each probe, layer and step back from the loss), "gates" (for each probe, layer and
                gate) or "notes" (a row for each sentence).

        Returns:
            The frame.

        Raises:
            InputError: another kind.
        """
        return table.frame(self, kind)

    def __repr__(self) -> str:
        kind = "sweep" if self.swept else "history"
        head = f"gradflow {kind} of {self.title}: {table.extent(self)}"
        return "\n".join([head, *table.latest(self, LAYERS_SHOWN)])

    def _repr_html_(self) -> str:
        return display_form("history_html", self)
