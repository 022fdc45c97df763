"""Reads back what gradflow wrote: the analysis of a batch, or the history of a training."""

from __future__ import annotations

import os
from pathlib import Path

from gradflow import analysis
from gradflow.analysis import Analysis
from gradflow.history import History, holds_history


def load(path: str | os.PathLike[str]) -> Analysis | History:
    """Read a run back: an `Analysis` of a report folder or its ``run.nc``, or a `History`.

    Args:
        path: of a report folder, a ``run.nc``, a folder that `gradflow.watch` writes, also while it
            is written, or its ``history.jsonl``.

    Returns:
        The analysis as it was saved, number by number, or the history as far as it is written.

    Raises:
        InputError: what was given is no path.
        FileError: there is no run, it is none of gradflow's, or another version's.

    >>> import tempfile, torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = gradflow.load(run.save(f"{folder}/run.nc"))
    >>> again["l0"].rate == run["l0"].rate
    True
    """
    if isinstance(path, str | os.PathLike) and holds_history(Path(path)):
        return History.read(path)
    return analysis.load(path)
