"""How many directions of a linear recurrence survive, over the span and against the distance.

Letters: S the numbers of a state, m copies of each distinct decay, G heads, d_k keys, d_v columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gradflow.analyzer.linear.logs import Logs, LogsOf, linear_steps
from gradflow.analyzer.linear.ranked import on_key_axis
from gradflow.analyzer.ranks import Ranks, dyadic, effective_rank, longest_stretch, medians, starts
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.singular import log_singular_along, survivors
from gradflow.cells.linear import LinearSteps
from gradflow.limits import CHANNEL_WORK
from gradflow.recording import Track


def linear_ranks(
    track: Track, logs: LogsOf, mapped: Sequence[int], span: int, settings: Settings
) -> Ranks:
    """Singular values of the mapped sequences: of each distinct decay, or each head's key axis.

    Every one stands as often as the state has it.
    """
    stretches = [longest_stretch(track, b) for b in mapped]
    reach = min(span, max(last - first for first, last in stretches))
    size = int(np.prod(track.state_shape))
    if reach < 1:
        nothing = np.zeros(0)
        return Ranks(np.full((len(mapped), size), np.nan), 0, nothing, nothing, nothing)
    lags = dyadic(reach)
    found, singular = [], []
    first_of = linear_steps(track, [mapped[0]])
    keys = None
    if first_of.left is not None:
        every = linear_steps(track)
        keys = on_key_axis(every)
    for b, (first, last) in zip(mapped, stretches, strict=True):
        most = CHANNEL_WORK / settings.layers / len(mapped)
        for start in starts(first, last):
            end = min(start + reach, last)
            if keys is None:
                values = _elementwise(logs(b), start, end, lags, size)
            else:
                values = _ranked(keys, track.state_shape, b, (start, end), lags, most)
            found.append(values)
            if start == first:
                singular.append(values[-1])
    stacked = np.stack(found)
    return Ranks(
        np.stack(singular),
        reach,
        np.array(lags),
        medians(stacked, effective_rank),
        medians(stacked, survivors),
    )


def _elementwise(logs: Logs, start: int, end: int, lags: list[int], size: int) -> np.ndarray:
    """(K, S) ln of the entries of P, largest first; NaN past the end."""
    found = np.full((len(lags), size), np.nan)
    for place, lag in enumerate(lags):
        if start + lag <= end:
            row = logs.between(torch.tensor([start]), torch.tensor([start + lag]))[0].numpy()
            found[place] = np.sort(np.repeat(row, logs.copies))[::-1]
    return found


def _ranked(
    keys: LinearSteps,
    shape: tuple[int, ...],
    b: int,
    ends: tuple[int, int],
    lags: list[int],
    most_work: float,
) -> np.ndarray:
    """The same of all heads, each as often as there are value columns."""
    heads, _, columns = shape
    steps = range(ends[0] + 1, ends[1] + 1)
    each = []
    for head in range(heads):
        one = keys.of(torch.tensor([b * heads + head]))
        values, _ = log_singular_along(one, steps, lags, most_work=most_work / heads)
        each.append(values)
    joined = np.repeat(np.concatenate(each, axis=1), columns, axis=1)
    # −inf sorts last, and what lies under the rounding of larger ones, NaN, behind it
    return -np.sort(-joined, axis=1)
