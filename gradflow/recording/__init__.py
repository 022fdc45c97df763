"""What was seen: a `Recording` holds one `Track` per recurrent layer and direction.

Letters, here and everywhere in gradflow: T timesteps, B sequences, I input features, H hidden units,
P the width of h (H, or ``proj_size``), S the width of the full carried state, G gates.
Time is the first axis. Index 0 is the first step. Track arrays are in input-time order with the
sequences in the user's order; steps past a sequence's length hold NaN.
"""

from gradflow.recording.padding import Padding, padding_of
from gradflow.recording.pooled import as_one, chosen, of_all_processes, pooled
from gradflow.recording.source import (
    Backward,
    Contributions,
    Forward,
    Operator,
    Outer,
    Parity,
    Source,
    ThinOperator,
    moved,
    where_computed,
)
from gradflow.recording.track import CUT_KINDS, Track
from gradflow.recording.tracks import Recording, Unseen, matches_any

__all__ = [
    "CUT_KINDS", "Backward", "Contributions", "Forward", "Operator", "Outer", "Padding",
    "Parity", "Recording", "Source", "ThinOperator", "Track", "Unseen", "as_one", "chosen",
    "matches_any", "moved", "of_all_processes", "padding_of", "pooled", "where_computed",
]  # fmt: skip
