"""Which steps back from the loss a probe keeps: all of the first ones, then ever fewer.

Beyond the first ones they are even in their logarithm. The grid does not depend on the length of the
sequences, so that probes and runs can be laid upon each other.
"""

from __future__ import annotations

import numpy as np

from gradflow.limits import HISTORY_DENSE, HISTORY_LAGS, HISTORY_RATIO


def lag_grid(steps: int) -> np.ndarray:
    """The lags kept of sequences of so many steps, at most 64, from 0 on.

    Args:
        steps: T of the longest sequence.

    Returns:
        Lags in steps; of longer sequences a part of the same grid.

    >>> lag_grid(5).tolist(), lag_grid(24).tolist()[-4:]
    ([0, 1, 2, 3, 4], [16, 18, 20, 22])
    >>> len(lag_grid(4000)), len(lag_grid(1_000_000)), set(lag_grid(50)) <= set(lag_grid(300))
    (63, 63, True)
    """
    near = list(range(min(steps, HISTORY_DENSE + 1)))
    far: list[int] = []
    place = HISTORY_DENSE * HISTORY_RATIO
    while place < steps:
        far.append(int(place))
        place *= HISTORY_RATIO
    every = 1
    while len(near) + len(far) // every > HISTORY_LAGS:
        every *= 2
    return np.array(near + far[every - 1 :: every], dtype=np.int64)
