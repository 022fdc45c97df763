"""How many steps back: the answers of a layer's arrays to a trainer, each under a name of its own.

The window and this loss's gradient are of the recorded loss; the horizon, which stands with the
verdict, is of the best direction there is, whatever the loss reads.
"""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from gradflow.limits import LAG_TOLERANCE

WINDOW_OF = "weight_hh"  # the weight whose gradient flows through time


def window_of(data: xr.Dataset) -> int | None:
    """Steps back from every loss step that keep ∂L/∂W_hh within 5 %; None where it is not known."""
    if WINDOW_OF not in data.get("parameter", ()):
        return None
    # a dict, for xarray's own sel has an argument named tolerance
    chosen = data["truncation_window"].sel(parameter=WINDOW_OF)
    found = float(chosen.sel({"tolerance": LAG_TOLERANCE}, method="nearest"))
    return None if math.isnan(found) or not (data["lag_contribution"] > 0).any() else int(found)


def loss_reach_of(data: xr.Dataset) -> float:
    """Steps before the last loss step at which its gradient is gone; inf if never, NaN if unknown."""
    return float(data["loss_reach"]) if "loss_reach" in data else np.nan
