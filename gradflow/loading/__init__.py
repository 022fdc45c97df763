"""Loading: from files to models, batches, losses and probes. Nothing in a file runs unasked."""

from gradflow.loading.batch import (
    Batch,
    as_batch,
    batch_files,
    files_of,
    fit_batch,
    natural,
    read_batch,
)
from gradflow.loading.contents import read_json
from gradflow.loading.description import Description, describe, save_snippet
from gradflow.loading.labels import read_labels
from gradflow.loading.losses import Loss, choose_output, make_loss, output_lengths, time_axis
from gradflow.loading.model_spec import build_loss, source_of
from gradflow.loading.opened import Opened, check_layers, no_model_to_run, open_model
from gradflow.loading.pretrained import is_pretrained, open_pretrained, read_tokens
from gradflow.loading.probe import Probe, probe_batch, probe_loss, probes
from gradflow.loading.recurrent import RecurrentModule, from_model
from gradflow.loading.training_step import run_folder, step_in_name

__all__ = [
    "Batch", "Description", "Loss", "Opened", "Probe", "RecurrentModule", "as_batch",
    "batch_files", "build_loss", "check_layers", "choose_output", "describe", "files_of", "fit_batch",
    "from_model", "is_pretrained", "make_loss", "natural", "no_model_to_run", "open_model", "open_pretrained",
    "output_lengths", "probe_batch", "probe_loss", "probes", "read_batch", "read_json", "read_labels",
    "read_tokens", "run_folder", "save_snippet", "source_of", "step_in_name", "time_axis",
]  # fmt: skip
