"""An `Analysis`: all layers of one run, as a table, a file and a page hold them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gradflow.analysis import saved
from gradflow.analysis.frames import BUILDERS, FRAMES, HEADLINE
from gradflow.analysis.results import FIRST, Finding, LayerAnalysis, display_form
from gradflow.errors import InputError, checked_path, must_be
from gradflow.recording.track import unnumbered
from gradflow.recording.tracks import ByName, Unseen


@dataclass(frozen=True)
class Analysis(ByName[LayerAnalysis]):
    """The result of `gradflow.analyze`: prints as a table, saves to one netCDF file.

    ``analysis[name]`` is a `LayerAnalysis`; the start of a name does if it fits one only.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> run = gradflow.diagnose(rnn, torch.zeros(100, 2, 1))
    >>> [(layer.name, layer.verdict, round(layer.half_life, 2)) for layer in run.worst_first]
    [('l0', 'vanishing', 6.58)]
    """

    title: str  # the model's name
    layers: Mapping[str, LayerAnalysis]  # by name, in the order in which they ran
    warnings: tuple[str, ...]  # settings that shape or limit the numbers
    provenance: Mapping[str, Any]  # versions, settings, input and loss in words
    unseen: tuple[Unseen, ...] = ()  # recurrences that are in no layer, also among the warnings

    def __getitem__(self, name: str) -> LayerAnalysis:
        matches = self._matches(name)
        if len(matches) == 1:
            return self.layers[matches[0]]
        raise InputError(f"there is no layer {name!r}; this analysis has {', '.join(self.layers)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def _named(self) -> Mapping[str, LayerAnalysis]:
        return self.layers

    def titled(self, title: str) -> Analysis:
        """The same analysis under another name.

        Args:
            title: what pictures and tables shall call it.

        Returns:
            A new analysis with the same layers.

        >>> import gradflow
        >>> gradflow.Analysis("RNN", {}, (), {}).titled("before training").title
        'before training'
        """
        return replace(self, title=title)

    def labelled(self, labels: Sequence[str]) -> Analysis:
        """The same analysis with a word for every step: tokens, or times.

        Pictures write them along their axes of steps, tables in a column; they are saved with the
        run. A layer with fewer steps than the longest keeps its numbers.

        Args:
            labels: (T,) strings, the steps of the longest layer in input time.

        Returns:
            A copy whose layers carry the words in ``step_labels``.

        Raises:
            InputError: they are not strings, or not as many as there are steps.

        >>> import torch, gradflow
        >>> words = "the clouds are in the".split()
        >>> run = gradflow.diagnose(torch.nn.RNN(3, 4), torch.randn(5, 1, 3)).labelled(words)
        >>> run["l0"].step_labels[1]
        'clouds'
        """
        steps = max((layer.steps for layer in self.values()), default=0)
        words = checked_labels(labels, steps)
        layers = {
            name: replace(layer, step_labels=words if layer.steps == steps else ())
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    @property
    def worst_first(self) -> list[LayerAnalysis]:
        """Layers of which the loss reads the wrong steps; then by how much of the gradient is lost
        or blown up; then in order of running, a closed loop before its parts."""
        rank = {"dead": 0, "exploding": 1, "vanishing": 1, "inconclusive": 2, "stable": 3}

        def key(layer: LayerAnalysis) -> tuple[bool, int, float, bool]:
            size = abs(layer.decades) if math.isfinite(layer.decades) else 0.0
            misread = any(finding.name in FIRST for finding in layer.findings)
            return not misread, rank[layer.verdict], -size, bool(layer.part_of)

        return sorted(self.layers.values(), key=key)

    @property
    def judged(self) -> list[LayerAnalysis]:
        """In the order of running, without parts of a closed loop, whose numbers are the loop's."""
        return [layer for layer in self.values() if layer.part_of not in self.layers]

    @property
    def told(self) -> list[LayerAnalysis]:
        """The worst first, without parts of a closed loop: the loop's verdict is theirs.

        Of several runs of a layer with one verdict the worst is told, and its sentence names the others.
        """
        alike: dict[tuple[str, str], list[LayerAnalysis]] = {}
        for layer in self.worst_first:
            if layer.part_of not in self.layers:
                alike.setdefault((unnumbered(layer.name), layer.verdict), []).append(layer)
        found = []
        for first, *others in alike.values():
            names = ", ".join(sorted(layer.name for layer in others))
            same = f"; the same verdict for its other run{'s' * (len(others) > 1)} {names}"
            found.append(replace(first, sentence=first.sentence + same * bool(others)))
        return found

    def alone_of(self, layer: LayerAnalysis) -> list[str]:
        """What a layer of a closed loop, or each part of it, does with its inputs held fixed.

        Args:
            layer: one of this analysis.

        Returns:
            A sentence each, with the gain over the span in decades and the horizon in steps; none
            outside closed loops.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> run.alone_of(run["l0"])
        []
        """
        parts = [one for one in self.values() if layer.name in (one.name, one.part_of)]
        return [one.alone.sentence for one in parts if one.alone is not None]

    @property
    def findings(self) -> list[Finding]:
        """All findings: what the loss reads, then those of the worst layers first."""
        order: dict[int, list[Finding]] = {0: [], 1: [], 2: []}
        for layer in self.worst_first:
            misread = any(finding.name in FIRST for finding in layer.findings)
            for finding in layer.findings:  # what cannot be mended before the reading comes last
                order[0 if finding.name in FIRST else 1 + misread].append(finding)
        return [finding for some in order.values() for finding in some]

    def frame(self, kind: str = "layers") -> pd.DataFrame:
        """A tidy table, one row for each of the things that it is about, of all layers.

        Args:
            kind: "layers" (verdict, rate in nats per step, half-life, horizon and span in steps,
                Kaplan–Yorke dimension, entropy rate in nats per step),
                "steps" (norms of states and gradients, gates), "lags" (ln gain against distance),
                "units" (memory and time scales, saturation), "heads" (of a linear recurrence that
                has some: verdict, gain, rate, first measured distance below 10⁻³), "head_lags" (their
                ln gain against distance) or "findings".

        Returns:
            A frame with the column ``layer``; steps and units count from 1.

        Raises:
            InputError: another kind.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> len(run.frame("steps")), len(run.frame("units"))
        (20, 8)
        """
        if kind not in FRAMES:
            raise InputError(f"kind must be one of {', '.join(FRAMES)}, got {kind!r}")
        return BUILDERS[kind](self.worst_first if kind == "findings" else self.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one netCDF file, which `gradflow.load` reads back exactly.

        Args:
            path: of the file.

        Returns:
            The path.

        Raises:
            FileError: it cannot be written.

        >>> import tempfile, torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run.save(f"{folder}/run.nc").name
        'run.nc'
        """
        return saved.save(self, checked_path(path))

    def __repr__(self) -> str:
        lines = [f"gradflow analysis of {self.title}"]
        for layer in self.told:
            lines += [f"  {layer.sentence}", *(f"    {words}" for words in self.alone_of(layer))]
        lines += [f"  note: {warning}" for warning in self.warnings]
        table = self._headline()
        return "\n".join(lines) + "\n" + table.to_string(index=False, float_format="{:.4g}".format)

    def _headline(self) -> pd.DataFrame:
        """The columns of a verdict, for reading: what is never reached is said so."""
        return BUILDERS["layers"](self.judged)[HEADLINE].assign(
            half_life=list(map(_half_life, self.judged)), horizon=list(map(_horizon, self.judged))
        )

    def _repr_html_(self) -> str:
        return display_form("analysis_html", self)


def _half_life(layer: LayerAnalysis) -> str:
    if math.isnan(layer.half_life):
        return "none"
    return "never" if math.isinf(layer.half_life) else f"{layer.half_life:.4g}"


def _horizon(layer: LayerAnalysis) -> str:
    if layer.horizon is not None:
        return str(layer.horizon)
    if layer.searched == 0:
        return "none"
    return "never" if layer.never_gone else f"> {layer.searched}"


def checked_labels(labels: Sequence[str], steps: int) -> tuple[str, ...]:
    """Labels as a tuple, if there is a string for each of so many steps."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        advice = "split a text into words, e.g. text.split()"
        raise InputError(must_be("labels", "a list of strings", type(labels).__name__, advice))
    words = tuple(labels)
    wrong = next((word for word in words if not isinstance(word, str)), None)
    if wrong is not None:
        advice = "turn numbers into text first: [str(time) for time in times]"
        raise InputError(must_be("labels", "strings", type(wrong).__name__, advice))
    if len(words) != steps:
        advice = "give one for every step that the layer reads"
        raise InputError(must_be("labels", f"{steps}, one per step", len(words), advice))
    return words


def load(path: str | os.PathLike[str]) -> Analysis:
    """Read a run back: a ``run.nc`` file, or a report folder that holds one; see `gradflow.load`."""
    header, layers = saved.read(path)
    return Analysis(
        title=header.title,
        layers={layer.name: layer for layer in layers},
        warnings=header.warnings,
        provenance=header.provenance,
        unseen=header.unseen,
    )
