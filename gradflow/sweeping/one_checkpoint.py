"""One checkpoint measured: what a worker of a sweep does, in whichever process it runs.

Everything that is sent to it and comes back can be pickled. It runs on one thread, so that the numbers are
the same whichever engine runs it, and as many workers as cores do not stand in each other's way.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from gradflow import loading
from gradflow.analyzer.rates import steps_in_common
from gradflow.errors import FileError, GradflowError, InputError, collected_warnings
from gradflow.history import LayerProbe, Note, Probe, row_text
from gradflow.passes import loss_settings, probed_pass, recorded_pass
from gradflow.process import fitting_threads, printed_to_stderr, random_numbers_kept
from gradflow.sweeping.batches import agreed, pooled_batches
from gradflow.sweeping.checkpoints import (
    VERSIONS,
    CheckpointTask,
    Outcome,
    SweepSettings,
    other_versions,
    state_of,
)
from gradflow.watching.gradnorms import GradNorms
from gradflow.watching.probing import MeasuredUpdate, measure


def measure_checkpoint(task: CheckpointTask) -> Outcome:
    """Measure one checkpoint: its row, or why there is none.

    Raises:
        InputError: this worker has another version of gradflow or torch.
    """
    if task.versions != VERSIONS:
        raise InputError(other_versions(VERSIONS, task.versions))
    opened = None
    try:
        with fitting_threads(0), printed_to_stderr(), collected_warnings() as sentences:
            opened = _opened(task)
            loading.check_layers(opened)
            if task.path is not None and state_of(task.path) != task.state:
                return Outcome(changed=True)
            probe, cells = _measured(opened, task.settings, sentences)
    except GradflowError as error:
        if task.path is not None and _changed(task):
            return Outcome(changed=True)
        return Outcome(failed=str(error), trained=opened.trained if opened else None)
    header = {
        "name": task.name,
        "title": opened.title,
        "trained": None if opened.trained is None else vars(opened.trained),
        # what tells two architectures of the same names apart
        "widths": [layer.width for layer in opened.recurrent],
        "gradflow": VERSIONS[0],
        "torch": VERSIONS[1],
    }
    return Outcome(text=row_text(probe, cells, **header))


def _changed(task: CheckpointTask) -> bool:
    try:
        return task.path is not None and state_of(task.path) != task.state
    except OSError:
        return False  # gone: the error of reading it says so


def _opened(task: CheckpointTask) -> loading.Opened:
    """The model of a checkpoint."""
    settings = task.settings
    if task.model is not None:
        kind = type(task.model).__name__
        recurrent = loading.from_model(task.model)
        return loading.Opened(Path(task.name), "a model", kind, task.model, recurrent)
    assert task.path is not None
    spec = settings.spec
    if isinstance(spec, nn.Module):
        spec = functools.partial(copy.deepcopy, spec)
    try:
        return loading.open_model(task.path, spec, settings.trust, settings.member)
    except OSError as error:
        raise FileError(f"cannot read {task.path}: {error.strerror or error}") from error


def _measured(
    opened: loading.Opened, settings: SweepSettings, sentences: list[str]
) -> tuple[Probe, dict[str, str]]:
    """All numbers of one checkpoint, and the kinds of its cells."""
    if settings.batches:
        values, updates = _on_batches(opened, settings)
        found, (layers, said) = updates[0], pooled_batches([one.layers for one in updates])
        said += [note for one in updates for note in one.notes]
    else:
        values = {}
        found, layers, said = _on_probes(opened, settings)
    notes = [*opened.said, *sentences, *said]
    cells = {name: cell for name, cell in found.cells.items() if name in layers}
    told = tuple(Note(0, "warning", text) for text in dict.fromkeys(notes))
    return Probe(0, values, layers, notes=told), cells


def _on_batches(
    opened: loading.Opened, settings: SweepSettings
) -> tuple[dict[str, float], list[MeasuredUpdate]]:
    """The model run on every batch, one after the other."""
    if opened.aged:
        raise FileError(opened.aged)
    first = settings.batches[0]
    if opened.model is None:
        raise InputError(
            loading.no_model_to_run(opened, first if isinstance(first, Path) else None)
        )
    if settings.train is not None:
        opened.model.train(settings.train)
    span, updates, values = settings.span, list[MeasuredUpdate](), list[dict[str, float]]()
    for _ in range(2):
        measured = [_on_batch(opened.model, one, settings, span) for one in settings.batches]
        values, updates = [one[0] for one in measured], [one[1] for one in measured]
        layers = dict.fromkeys(name for one in updates for name in one.layers)
        steps = {
            name: [
                one.layers[name].values.get("gain_steps", math.nan)
                for one in updates
                if name in one.layers
            ]
            for name in layers
        }
        fewest = steps_in_common(steps)
        if fewest is None:
            break
        span = fewest
    names = dict.fromkeys(name for one in values for name in one)
    return {name: statistics.fmean(one[name] for one in values) for name in names}, updates


def _on_batch(
    model: nn.Module, given: Path | loading.Batch, settings: SweepSettings, span: int | None
) -> tuple[dict[str, float], MeasuredUpdate]:
    batch = loading.read_batch(given, settings.target) if isinstance(given, Path) else given
    batch = loading.fit_batch(batch, model)
    norms: list[GradNorms] = []
    values: dict[str, float] = {"forwards": 1.0, "updated": 0.0}

    def told(loss: Tensor) -> None:
        norms.append(GradNorms(model, 1.0))
        values.update(loss=float(loss), grad_norm_all=norms[0].all)

    with random_numbers_kept(devices=None):
        torch.manual_seed(settings.seed)
        recording = recorded_pass(model, batch, loss_settings(settings.loss, settings.output, told))
    found = measure(recording, settings.preset, span)
    for name, layer in found.layers.items():
        layer.values["grad_norm"] = norms[0].of_layer(name) if norms else math.nan
    return values, found


def _on_probes(
    opened: loading.Opened, settings: SweepSettings
) -> tuple[MeasuredUpdate, dict[str, LayerProbe], list[str]]:
    """Every recurrent module alone under several probes; a verdict stands where all agree."""
    if not opened.recurrent:
        raise InputError(
            f"{opened.title} holds no recurrent layer whose weights could be probed; give a batch to "
            "run it on: --input batch.pt"
        )
    layers: dict[str, LayerProbe] = {}
    cells: dict[str, str] = {}
    said: list[str] = []
    for module in opened.recurrent:
        under = loading.probes(module, settings.probe_steps, settings.probe_batch, settings.seed)
        found = [measure(probed_pass(module, one), settings.preset, settings.span) for one in under]
        joined, doubts = agreed([one.layers for one in found], [one.name for one in under])
        layers |= joined
        cells |= found[-1].cells
        said += [*module.doubts, *doubts, *found[-1].notes]
    return MeasuredUpdate(layers, cells, {}, {}), layers, said
