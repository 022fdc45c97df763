"""What was measured of one model during its training: a `History` is an ordered series of `Probe`s.

`gradflow.watch` writes one while a model trains; ``gradflow.load`` reads it back, also while it is being
written. Figures, page and terminal take it as it is; nothing of it is computed while drawing.

Dimensions of `History.data`: ``step`` (the training step, counted in updates from 1), ``layer`` (name),
``lag`` (steps back from the loss step, in the layer's processing order), ``gate`` and ``group`` (of the
optimizer's parameters). Its variables are listed in `gradflow.history.fields`, and ``learning_rate`` (step,
group). NaN where a number was not measured; ``verdict`` is a word, "" where there is none.
"""

from gradflow.history.fields import OF_GATE, OF_LAG, OF_LAYER, OF_STEP
from gradflow.history.lags import lag_grid
from gradflow.history.probe import LayerProbe, Note, Probe
from gradflow.history.reader import holds_history
from gradflow.history.series import History
from gradflow.history.writer import Writer

__all__ = [
    "OF_GATE",
    "OF_LAG",
    "OF_LAYER",
    "OF_STEP",
    "History",
    "LayerProbe",
    "Note",
    "Probe",
    "Writer",
    "holds_history",
    "lag_grid",
]
