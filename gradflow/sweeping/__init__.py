"""Sweep saved checkpoints: each is measured by itself, anywhere, and all become the rows of one `History`."""

from gradflow.sweeping.standing import held_in
from gradflow.sweeping.swept import (
    SweepRequest,
    gather,
    run_sweep,
    sweep,
    sweep_request,
)

__all__ = ["SweepRequest", "gather", "held_in", "run_sweep", "sweep", "sweep_request"]
