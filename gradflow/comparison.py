"""Several runs on one scale: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from gradflow import reporter
from gradflow.analysis import Analysis, load

COLUMNS = [
    "run",
    "layer",
    "verdict",
    "rate",
    "rate_low",
    "rate_high",
    "half_life",
    "horizon",
    "channels",
]


def compare(runs: Mapping[str, Analysis]) -> pd.DataFrame:
    """One row per run and layer, in the order given.

    >>> import torch, gradflow
    >>> x = torch.randn(20, 4, 3)
    >>> runs = {c.__name__: gradflow.diagnose(c(3, 8), x) for c in (torch.nn.RNN, torch.nn.GRU)}
    >>> list(compare(runs)["run"])
    ['RNN', 'GRU']
    """
    tables = []
    for name, run in runs.items():
        table = run.frame("layers")
        table.insert(0, "run", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def compare_runs(paths: Sequence[Path], folder: Path | None) -> str:
    """Compare saved runs; write comparison.png and comparison.csv; return what to print."""
    folder = folder or reporter.free_folder(Path("reports") / "comparison")
    runs = {str(path): load(path) for path in paths}
    table = compare(runs)
    with reporter.whole_folder(folder) as work:
        figure = reporter.plot([run.titled(name) for name, run in runs.items()])
        (work / "comparison.png").write_bytes(reporter.png(figure))
        table.to_csv(work / "comparison.csv", index=False)
    text = table[COLUMNS].to_string(index=False, float_format="%.4g")
    return f"{text}\n\npicture: {folder / 'comparison.png'}\nnext: gradflow report {paths[0]}"
