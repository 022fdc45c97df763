"""The tags under which the numbers of a history stand in other tools, and what takes them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

Figures = Mapping[str, Callable[[], Any]]  # tag -> what draws it


class Target(Protocol):
    """Takes the numbers of a probe; may have a ``close()``, called when the watching ends."""

    def __call__(self, step: int, scalars: dict[str, float], figures: Figures) -> object: ...


# name of a number of a layer -> its tag
LAYER_TAGS = {
    name: "gradflow/{layer}/" + name
    for name in ("rate", "rate_low", "rate_high", "rate_settled", "gain", "half_life", "horizon", "channels",
                 "level", "state_norm", "saturated", "cuts", "grad_norm", "grad_norm_clipped", "nonfinite")
}  # fmt: skip

# name of a number of a probe -> its tag; and "gradflow/learning_rate", of further groups with "_1", …
STEP_TAGS = {
    name: f"gradflow/{name}"
    for name in ("loss", "grad_norm_all", "grad_norm_all_clipped", "clipped", "probe_seconds",
                 "step_seconds", "interval")
}  # fmt: skip
