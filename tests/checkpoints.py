"""Folders of checkpoints of the adding task: a seed is a folder, and in it are files of one training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from seam import AddingModel, adding_batch

UNITS, LENGTH, SEQUENCES = 12, 30, 8
SPEC = f"gradflow.demo:AddingModel('RNN', {UNITS})"


def write_batch(path: Path, *, seed: int = 1, batch: int = SEQUENCES, steps: int = LENGTH) -> Path:
    """A batch that no model was trained on."""
    x, y = adding_batch(batch, steps, generator=torch.Generator().manual_seed(seed))
    torch.save({"input": x, "target": y}, path)
    return path


def write_runs(
    folder: Path,
    *,
    seeds: int = 8,
    saves: int = 8,
    every: int = 5,
    cell: Literal["RNN", "LSTM"] = "RNN",
    units: int = UNITS,
) -> list[Path]:
    """Train so many seeds for a while, and save each so many times, the first time before the training."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = AddingModel(cell, units)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(seed)
        place = folder / f"seed={seed}"
        place.mkdir(parents=True)
        for update in range(every * (saves - 1) + 1):
            if update % every == 0:
                path = place / f"{update}.pt"
                torch.save({"state_dict": model.state_dict(), "global_step": update}, path)
                found.append(path)
            x, y = adding_batch(SEQUENCES, LENGTH, generator=generator)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    return found
