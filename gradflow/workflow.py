"""The only place that joins the stages: load, record, analyze, show."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow import loading
from gradflow.analysis import Analysis, LayerAnalysis, checked_labels
from gradflow.analyzer import analyze
from gradflow.analyzer.agreement import agreed
from gradflow.errors import GradflowError, GradflowWarning, InputError, UserCodeError, must_be
from gradflow.hooks import record
from gradflow.prediction import with_predictions
from gradflow.recording import GATES, Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Progress = Callable[[str, float], None]


def diagnose(
    model: nn.Module,
    *inputs: Any,
    target: Tensor | None = None,
    loss: Callable[..., Tensor] | None = None,
    lengths: Tensor | list[int] | None = None,
    span: int | None = None,
) -> Analysis:
    """Record one forward and backward pass of a model and analyze it.

    The model is left as found: gradients, buffers and the random state are put back.

    Args:
        model: any module with recurrent layers; it is called as ``model(*inputs)``.
        target: passed to the loss as its second argument.
        loss: takes (output, target), or (output) without a target. By default the mean squared
            error, or cross-entropy for whole targets; without a target ½‖output at the last step‖².
        lengths: (B,) real steps of each sequence of a padded batch.
        span: the distance of interest in steps; by default the median length.

    Raises:
        RecordingError: no recurrent layer ran.

    >>> import torch, gradflow
    >>> _ = torch.manual_seed(0)
    >>> run = gradflow.diagnose(torch.nn.LSTM(3, 8), torch.randn(40, 4, 3))
    >>> run["l0"].verdict
    'vanishing'
    """
    held = None if lengths is None else torch.as_tensor(lengths)
    batch = loading.Batch(inputs=inputs, target=target, lengths=held)
    recording = _run(model, batch, _Settings(loss=loss))
    return with_predictions(recording, analyze(recording, span=span))


def plot(
    x: Recording | Analysis | Sequence[Analysis],
    kind: str = "overview",
    *,
    layer: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a recording, an analysis, or several analyses on one scale.

    >>> import torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> len(gradflow.plot(run).axes) >= 2
    True
    """
    from gradflow import reporter

    if isinstance(x, Recording):
        x = analyze(x)
    return reporter.plot(x, kind, layer=layer, ax=ax)


@dataclass(frozen=True)
class FileRequest:
    """What `gradflow analyze` was asked for."""

    path: Path
    spec: str | None = None
    input: Path | None = None
    target: Path | None = None
    loss: str | None = None
    output: str | None = None
    labels: Path | None = None
    seq_len: int = 100
    batch: int = 16
    seed: int = 0
    trust: bool = False


def analyze_file(request: FileRequest, progress: Progress | None = None) -> Analysis:
    """Analyze a model file: on the user's batch where one is given, else from its weights alone.

    Warnings of the recording become part of the analysis.
    """
    labels = None if request.labels is None else loading.read_labels(request.labels)
    if labels is not None and request.input is None:
        checked_labels(labels, request.seq_len)
    opened = loading.open_model(request.path, request.spec, request.trust)
    with _collected_warnings() as sentences:
        if request.input is None:
            analysis = _from_weights(opened, request, progress)
        else:
            analysis = _from_batch(opened, request, progress, labels)
    if labels is not None:
        analysis = analysis.labelled(labels)
    return replace(
        analysis,
        title=opened.title,
        warnings=tuple(dict.fromkeys([*analysis.warnings, *sentences])),
        provenance={
            "file": opened.path.name,
            "kind": opened.kind,
            **_with_notes(analysis.provenance, opened.notes),
        },
    )


def _from_batch(
    opened: loading.Opened,
    request: FileRequest,
    progress: Progress | None,
    labels: tuple[str, ...] | None,
) -> Analysis:
    """Run the whole model on the user's batch."""
    if opened.model is None:
        raise InputError(
            f"--input needs a model to run, but {opened.path} is {opened.kind}, which holds weights "
            f"only; name your class too: gradflow analyze {opened.path} --model 'pkg.mod:Net(10, 20)' "
            f"--input {request.input}"
        )
    assert request.input is not None
    batch = loading.fit_batch(loading.read_batch(request.input, request.target), opened.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        settings = _Settings(loss_name=request.loss, output=request.output, guard=True)
        recording = _run(opened.model, batch, settings)
    if labels is not None:  # before the long part
        checked_labels(labels, max(track.steps for track in recording))
    recording.provenance |= {"input": request.input.name, "seed": request.seed}
    analysis = analyze(recording, seed=request.seed, progress=progress)
    return with_predictions(recording, analysis, seed=request.seed)


def _from_weights(
    opened: loading.Opened, request: FileRequest, progress: Progress | None
) -> Analysis:
    """Run every recurrent module alone under several probes; a verdict stands if all agree."""
    for option, value in (
        ("--target", request.target),
        ("--loss", request.loss),
        ("--output", request.output),
    ):
        if value is not None:
            raise InputError(
                f"{option} needs a batch to run the model on; give --input FILE as well"
            )
    if not opened.recurrent:
        raise InputError(
            f"{opened.title} holds no nn.RNN, nn.LSTM or nn.GRU whose weights could be probed; "
            "give a batch to run it on: --input batch.pt"
        )
    layers: dict[str, LayerAnalysis] = {}
    notes: list[str] = []
    tried: list[str] = []
    assumed: list[str] = []
    provenance: dict[str, Any] = {}
    for module in opened.recurrent:
        runs = []
        probes = loading.probes(module, request.seq_len, request.batch, request.seed)
        for number, probe in enumerate(probes):
            recording = _run_probe(module, probe)
            step = _part(
                progress, number, len(probes), f"{module.name or module.kind} under {probe.name}"
            )
            runs.append(analyze(recording, seed=request.seed, progress=step))
        run = agreed(runs, [probe.name for probe in probes])
        run = with_predictions(recording, run, batch=probes[-1].name, seed=request.seed)
        layers |= {
            _probed_name(module, name): _renamed(module, layer)
            for name, layer in run.layers.items()
        }
        notes += [s for s in module.ambiguous if "tanh" in s] + list(run.warnings)
        assumed += [s for s in module.ambiguous if "tanh" not in s]
        tried += [probe.name for probe in probes]
        provenance |= run.provenance
    names = ", ".join(dict.fromkeys(tried))
    told = (
        f"analyzed from the weights alone, under {names}; the input decides the rate, so give --input "
        "for your own data"
    )
    provenance |= {
        "input": f"probes: {names}; B = {request.batch}, T = {request.seq_len}",
        "loss": "⟨r, h_T⟩ with seeded r",
        "seed": request.seed,
        "snippet": loading.save_snippet(opened.path, opened),
    }
    provenance = _with_notes(provenance, assumed)
    return Analysis(opened.title, layers, tuple(dict.fromkeys([told, *notes])), provenance)


def _run_probe(module: loading.RecurrentModule, probe: loading.Probe) -> Recording:
    """Record the module alone, under the path it has in the whole model."""
    model: nn.Module = module.module
    for part in reversed(module.path_parts):
        outer = nn.Module()
        outer.add_module(part, model)
        model = outer
    with _left_as_found(model), record(model) as recording:
        output = module.module(probe.inputs)[0]
        loading.probe_loss(
            output, probe.r, module.module.batch_first, module.bidirectional
        ).backward()
    return recording


def _probed_name(module: loading.RecurrentModule, name: str) -> str:
    """A cell was probed as a one-layer module; its track has the cell's own path."""
    return (module.name or "cell") if module.from_cell else name


def _renamed(module: loading.RecurrentModule, layer: LayerAnalysis) -> LayerAnalysis:
    name = _probed_name(module, layer.name)
    if name == layer.name:
        return layer
    return replace(
        layer,
        name=name,
        sentence=layer.sentence.replace(layer.name, name),
        title=layer.title.replace(layer.name, name),
        findings=tuple(
            replace(
                f,
                layer=name,
                message=f.message.replace(layer.name, name),
                code=re.sub(r"((?:weight|bias)_[ih]h)_l0\b", r"\1", f.code),
            )
            for f in layer.findings
        ),
    )


def _part(progress: Progress | None, number: int, count: int, words: str) -> Progress | None:
    """The progress of one part of several."""
    if progress is None:
        return None
    return lambda what, done: progress(f"{words}: {what}", (number + done) / count)


# ----------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class _Settings:
    """How to get a loss out of a model's output."""

    loss: Callable[..., Tensor] | None = None  # the user's own
    loss_name: str | None = None
    output: str | None = None  # which part of a tuple or dict
    guard: bool = False  # quote errors of the user's code instead of letting them through


def _run(model: nn.Module, batch: loading.Batch, settings: _Settings) -> Recording:
    """One recorded forward and backward pass; gradients and buffers are put back."""
    kwargs = dict(batch.kwargs)
    if batch.lengths is not None and "lengths" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("lengths", batch.lengths)
    given = [*batch.inputs, *batch.kwargs.values(), batch.target]
    with _left_as_found(model, given), record(model, lengths=batch.lengths) as recording:
        with _user_code(settings.guard, "the model", "check --input, or save the batch again"):
            result = model(*batch.inputs, **kwargs)
        value, words = _loss(result, model, batch, settings, recording)
        recording.provenance["loss"] = words
        if value.requires_grad:
            with _user_code(settings.guard, "the backward pass", "the same loss must train"):
                value.backward()
    dropout = [m for m in model.modules() if getattr(m, "p", 0) or getattr(m, "dropout", 0)]
    if not model.training and dropout:
        recording.notes.append("the model ran in evaluation mode, so its dropout was off")
    recording.provenance |= {"loss": words, "input": _shapes(batch.inputs)}
    recording.provenance = _with_notes(recording.provenance, batch.notes)
    return recording


def _loss(
    result: Any, model: nn.Module, batch: loading.Batch, settings: _Settings, recording: Recording
) -> tuple[Tensor, str]:
    """The loss and its name in words."""
    if settings.loss is not None:
        arguments = (result,) if batch.target is None else (result, batch.target)
        try:
            value = settings.loss(*arguments)
        except (TypeError, AttributeError) as error:
            if isinstance(result, Tensor):
                raise
            kind = type(result).__name__
            raise InputError(
                f"the loss cannot read the model's output, which is a {kind} ({error}); "
                "choose its part: loss=lambda output, target: criterion(output[0], target)"
            ) from error
        name = getattr(settings.loss, "__name__", type(settings.loss).__name__)
        return _scalar(value), name
    output, where = loading.choose_output(result, settings.output)
    lengths = loading.output_lengths(result, settings.output)
    lengths = batch.lengths if lengths is None else lengths
    loss = loading.make_loss(
        settings.loss_name, batch.target is not None, _time_axis(model, recording, output)
    )
    if loss.note:
        recording.notes.append(loss.note)
    with _user_code(settings.guard, "the loss", "check --target and --loss"):
        value = loss(output, batch.target, lengths)
    return value, f"{loss.name} of {where}"


def _time_axis(model: nn.Module, recording: Recording, output: object) -> int:
    """Where time is in the model's output: where the layer that ran last had it."""
    tracks = list(recording)
    if tracks and tracks[-1].cell in GATES:
        return int(tracks[-1].batch_first)
    if tracks and isinstance(output, Tensor) and output.ndim >= 2:  # a loop by hand does not say
        steps, batch = tracks[-1].steps, tracks[-1].batch
        fits = [(steps, batch), (batch, steps)]
        if steps != batch and tuple(output.shape[:2]) in fits:
            return fits.index((output.shape[0], output.shape[1]))
    return loading.time_axis(model)


def _with_notes(provenance: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """What was done to the input on the way: told, but no reason to doubt a number."""
    known = [*notes, *provenance.get("notes", [])]
    return {**provenance, "notes": list(dict.fromkeys(known))} if known else dict(provenance)


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            must_be("the loss", "one number in a tensor", got, "reduce it, e.g. by .mean()")
        )
    return value.reshape(())


def _shapes(inputs: tuple[Any, ...]) -> str:
    found = [str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor)]
    return "shape " + ", ".join(found) if found else "given by the caller"


@contextmanager
def _user_code(guard: bool, what: str, advice: str) -> Iterator[None]:
    """Quote what the user's own code raises, where a command line would show a traceback."""
    if not guard:
        yield
        return
    try:
        yield
    except GradflowError:
        raise
    except SystemExit as error:
        raise UserCodeError(f"{what} ended the program (sys.exit); {advice}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserCodeError(
            f"{what} raised {type(error).__name__} on this input: {text}; {advice}"
        ) from error


@contextmanager
def _left_as_found(model: nn.Module, inputs: Sequence[Any] = ()) -> Iterator[None]:
    """Put back gradients, buffers and random state."""
    tensors = [*model.parameters(), *(x for x in inputs if isinstance(x, Tensor) and x.is_leaf)]
    grads = [(tensor, tensor.grad) for tensor in tensors]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for tensor, _ in grads:
        tensor.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for tensor, grad in grads:
            tensor.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Turn gradflow's own warnings into sentences; others pass as they are."""
    sentences: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradflowWarning)
        yield sentences
    for warning in caught:
        if isinstance(warning.message, GradflowWarning):
            sentences.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
