"""Print the largest error of the recorded totals per cell and dtype, over all listed cases.

    python tests/largest_errors.py

Errors are relative to the largest entry of their step and sequence, against autograd on an unrolled
float64 loop; in float32 steps whose largest entry is below 1e-30 are left out.
"""

from __future__ import annotations

from collections import defaultdict

import cases
import torch
from torch import Tensor


def largest(got: Tensor, want: Tensor, mask: Tensor) -> float:
    """The largest |got − want| over the largest |want| of each real step (T, B, width)."""
    got, want = got.double(), want.double()
    scale = want.abs().amax(-1)
    error = (got - want).abs().amax(-1) / scale
    return float(error[mask].max()) if bool(mask.any()) else 0.0


def main() -> None:
    """Collect and print the table."""
    torch.set_num_threads(1)
    worst: dict[tuple[str, str], float] = defaultdict(float)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for case in cases.CASES:
        tracks = cases.seen(case).recording.tracks
        key = (case.cell, case.dtype)
        count[key] += 1
        for name, want in cases.oracle_grads(case).items():
            track = tracks[name]
            pairs = [(track.grad_h, want.h)] + (
                [] if track.grad_c is None else [(track.grad_c, want.c)]
            )
            floor = 1e-30 if case.dtype == "float32" else 0.0
            for got, exact in pairs:
                real = track.mask & (exact.abs().amax(-1) > floor)
                worst[key] = max(worst[key], largest(got, exact, real))
    print(f"{'cell':<10}{'dtype':<10}{'cases':>6}{'largest error':>16}")
    for (cell, dtype), error in sorted(worst.items()):
        print(f"{cell:<10}{dtype:<10}{count[cell, dtype]:>6}{error:>16.1e}")


if __name__ == "__main__":
    main()
