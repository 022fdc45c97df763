"""What was measured of one model during its training: a `History` is an ordered series of `Probe`s.

`gradflow.watch` writes one while a model trains, `gradflow.sweep` over saved checkpoints of any number of
runs; ``gradflow.load`` reads it back, also while it is being written. Figures, page and terminal take it as
it is; nothing of it is computed while drawing.

Dimensions of `History.data`: ``step`` (the training step, counted in updates from 1), ``layer`` (name),
``lag`` (steps back from the loss step, in the layer's processing order), ``gate`` and ``group`` (of the
optimizer's parameters). Its variables are listed in `gradflow.history.fields`, and ``learning_rate`` (step,
group). NaN where a number was not measured; ``verdict`` is a word, "" where there is none.

A sweep has four more coordinates, of every probe (step): ``run`` (the folder of its checkpoint, a seed,
say), ``checkpoint`` (its path), ``step_from`` (where its training step stands, in words) and ``failed`` (why
it could not be measured, "" where it was). Steps of several runs repeat; ``history.runs`` has each run as a
history of its own.
"""

from gradflow.history.fields import OF_GATE, OF_LAG, OF_LAYER, OF_STEP
from gradflow.history.joined import Row, join_rows, row_facts, row_text
from gradflow.history.lines import HISTORY_FILE
from gradflow.history.probe import LayerProbe, Note, Probe, Source, lag_grid
from gradflow.history.reader import holds_history, is_swept
from gradflow.history.series import History
from gradflow.history.writer import Writer

__all__ = [
    "HISTORY_FILE", "OF_GATE", "OF_LAG", "OF_LAYER", "OF_STEP", "History", "LayerProbe", "Note",
    "Probe", "Row", "Source", "Writer", "holds_history", "is_swept", "join_rows",
    "lag_grid", "row_facts", "row_text",
]  # fmt: skip
