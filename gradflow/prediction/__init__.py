"""What a remedy would do: tried on the recorded batch, without training.

Joins the recording (run again with changed weights) and the analyzer (measured again). Remedies that
need training are suggested by the findings, never predicted.
"""

from gradflow.prediction.suggestions import with_predictions
from gradflow.prediction.trials import what_if

__all__ = ["what_if", "with_predictions"]
