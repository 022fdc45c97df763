"""Paths through h that drown the cell's own path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradflow.analysis import Finding
from gradflow.analyzer.evidence import Evidence, number


def hidden_paths(e: Evidence) -> Iterator[Finding]:
    """An LSTM that grows, at most steps through the gates and h rather than along its cells.

    ‖∂c_t/∂c_{t−1}‖ minus that of its forget path is the least that the paths through h can have; a
    step counts where this alone exceeds the forget path.
    """
    grows = e.verdict.name == "exploding" or "transient growth" in e.labels
    if e.spec is None or e.spec.paths is None or e.verdict.name == "stable" or not grows:
        return
    gain = e.data["path_gain"]
    total, forget = gain.sel(path="total").values, gain.sel(path="forget gate").values
    known = ~np.isnan(total)
    if not known.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (total[known] - forget[known]) / forget[known]
    if not np.median(ratio) > 1:
        return
    through = {name: float(np.nanmedian(gain.sel(path=f"through {name}"))) for name in "fig"}
    widest = max(through, key=lambda name: through[name])
    low, middle, high = (float(value) for value in np.quantile(ratio, [0.1, 0.5, 0.9]))
    yield Finding(
        name="hidden-paths-drown-cell",
        layer=e.track.name,
        message=f"∂c/∂c of one step has norm {number(float(np.median(total[known])))}, of which the "
        f"forget gates give {number(float(np.median(forget[known])))}: the paths through h carry the "
        f"growth, chiefly through {widest} ({number(through[widest])})",
        where=f"{float((ratio > 1).mean()):.0%} of the steps",
        value=middle,
        low=low,
        high=high,
        threshold=1.0,
        basis="the paths through h exceed the cell's own",
        source="Kanuparthi et al. 2019",
        advice="block the gradient through h at random steps (h-detach), or shrink the recurrent "
        "weights",
        code="h = h.detach() if torch.rand(()) < 0.25 else h  # at every step of the loop",
    )
