"""What every picture has: a message, a word on how to read it, and words in place of the drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from gradflow.analysis import LayerAnalysis
from gradflow.cells import CELLS

LN10 = math.log(10)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture of one layer, made ready. Its arrays are in its subclass."""

    message: str = ""  # its title: what is seen, with numbers from the data
    reading: str = ""  # one sentence on how to read it
    note: str = ""  # words that stand in place of the drawing, or ""
    labels: tuple[str, ...] = ()  # of the steps from 1 on, as the axis runs; none: their numbers


def measured(layer: LayerAnalysis, name: str) -> xr.DataArray | None:
    """A variable that holds at least one number, or None."""
    if name not in layer.data:
        return None
    array = layer.data[name]
    return None if array.size == 0 or bool(np.isnan(array.values).all()) else array


def absent(layer: LayerAnalysis, name: str, why: str) -> str:
    """Words for a variable that holds nothing: not part of an older run, or for a reason."""
    if name not in layer.data:
        return "This run was saved without these numbers; analyze the model again to see them."
    return why


def no_gradient(layer: LayerAnalysis, why: str) -> str:
    """Words for a variable that rests on the loss, where there is none of it."""
    return layer.gradient_note or why


def own_cell(layer: LayerAnalysis) -> bool:
    """Whether a layer is a cell of the user's own, or a tapped loop: what is inside is not known."""
    return layer.cell not in CELLS


def running_median(values: np.ndarray, axis: int) -> np.ndarray:
    """The median along an axis, NaN left out; NaN only where nothing is known.

    >>> running_median(np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]]), 0)
    array([ 2., nan])
    """
    ordered = np.sort(np.moveaxis(values, axis, 0), axis=0)  # NaN go last
    count = np.sum(~np.isnan(ordered), axis=0)
    places = np.maximum(np.stack([(count - 1) // 2, count // 2]), 0)
    low, high = np.take_along_axis(ordered, places, axis=0)
    with np.errstate(invalid="ignore"):  # −inf and +inf have no middle
        middle = np.where(low == high, low, (low + high) / 2)
    return np.where(count > 0, middle, np.nan)
