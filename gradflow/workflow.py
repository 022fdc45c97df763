"""Joins the stages: load, record, analyze, show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradflow import loading
from gradflow.analysis import Analysis, LayerAnalysis, checked_labels
from gradflow.analyzer import analyze
from gradflow.analyzer.agreement import agreed, agreed_by_votes, batches_words, votes
from gradflow.analyzer.assemble import analyze_among
from gradflow.analyzer.rates import Vote, steps_in_common
from gradflow.cells import layer_names
from gradflow.errors import FileError, InputError, collected_warnings, must_be
from gradflow.history import History
from gradflow.hooks import record
from gradflow.passes import (
    LossSettings,
    check_options,
    loss_settings,
    probed_pass,
    recorded_pass,
    user_code,
    with_notes,
)
from gradflow.prediction import with_predictions
from gradflow.process import random_numbers_kept
from gradflow.recording import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Progress = Callable[[str, float], None]
PROBE_STEPS = 100  # design, section 8


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
        inputs: what the model takes, as it takes it: x of shape (T, B, I), say.
        target: passed to the loss as its second argument.
        loss: takes (output, target), or (output) without a target. By default the mean squared
            error, or cross-entropy for whole targets; without a target ½‖output at the last step‖².
        lengths: (B,) real steps of each sequence of a padded batch.
        span: the distance of interest in steps; by default the median length.

    Returns:
        An `Analysis`, with `predictions` for layers that vanish or explode.

    Raises:
        RecordingError: no recurrent layer ran.
        InputError: no loss can be taken of the model's output, or the span is out of its range.

    >>> import torch, gradflow
    >>> _ = torch.manual_seed(0)
    >>> run = gradflow.diagnose(torch.nn.LSTM(3, 8), torch.randn(40, 4, 3))
    >>> run["l0"].verdict
    'vanishing'
    """
    held = None if lengths is None else torch.as_tensor(lengths)
    batch = loading.Batch(inputs=inputs, target=target, lengths=held)
    recording = recorded_pass(model, batch, LossSettings(loss=loss))
    return with_predictions(recording, analyze(recording, span=span))


def plot(
    x: Recording | Analysis | History | Sequence[Analysis] | Sequence[History],
    kind: str | None = None,
    *,
    layer: str | None = None,
    by: str = "seed",
    ax: Axes | None = None,
    limits: Sequence[float] | None = None,
    captions: bool = True,
) -> Figure:
    """Draw a recording, an analysis, the history of a training, or several of a kind on one scale.

    Colours are log10 ratios, ± six powers of ten, the same for every model: navy vanished, pale
    yellow as at the loss, dark red exploded. The figure is unknown to pyplot: a notebook shows it,
    ``figure.savefig("overview.png")`` writes it.

    Args:
        x: a `Recording`, which is analyzed first, an `Analysis`, or a list of them; a `History`, or
            a list of histories.
        kind: "overview", the default, or another of `gradflow.reporter.KINDS`, such as "gain-map" or
            "states"; of a history "waterfall", the default, "rates", "horizons", "gates", "norms", and of
            a sweep "groups". The README lists them, and so does the error on a kind that there is not.
        layer: one layer by name; by default all, in an overview the twelve with the worst verdicts.
        by: of the kind "groups", what the runs of one group differ in, as their folders name it.
        ax: axes of your own for the main panel of one layer; its colour bar stands beside it, and a
            figure made with ``layout="constrained"`` has room for both.
        limits: powers of ten at which the colours end instead, such as (-2, 2), to tell apart what is
            alike on the fixed scale; the picture says so.
        captions: whether it is explained below the panels how to read them.

    Returns:
        The figure, a `matplotlib.figure.Figure`.

    Raises:
        InputError: the kind or the layer is unknown, ``ax`` is given for more than one layer, or the
            limits are wider than the fixed ones.

    >>> import torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> len(gradflow.plot(run).axes) >= 2
    True
    """
    from gradflow import reporter

    if isinstance(x, Recording):
        x = analyze(x)
    histories = _histories(x)
    if histories:
        chosen = "waterfall" if kind is None else kind
        return reporter.plot_histories(
            histories, chosen, layer=layer, by=by, ax=ax, limits=limits, captions=captions
        )
    of_batches = cast("Analysis | Sequence[Analysis]", x)
    chosen = "overview" if kind is None else kind
    return reporter.plot(of_batches, chosen, layer=layer, ax=ax, limits=limits, captions=captions)


def _histories(x: Any) -> list[History]:
    """The histories, where there is nothing else among what was given."""
    many = list(x) if isinstance(x, list | tuple) else [x]
    found = [one for one in many if isinstance(one, History)]
    if found and len(found) < len(many):
        other = next(type(one).__name__ for one in many if not isinstance(one, History))
        advice = "draw them in two figures: a history is a whole training, an analysis one batch"
        raise InputError(must_be("what is plotted", "histories only", f"a {other} as well", advice))
    return found


def report(
    x: Recording | Analysis | History,
    folder: str | Path,
    *,
    formats: Iterable[str] | None = None,
    force: bool = False,
) -> dict[str, Path]:
    """Write page, summary, tables, pictures and run into a folder.

    The folder appears whole or not at all. An existing one is not touched, unless ``force`` is given
    and it holds nothing but an earlier report, which is then replaced as a whole.

    Args:
        x: an `Analysis`, a `Recording`, which is analyzed first, or the `History` of a training.
        folder: where the files go; it is made.
        formats: which of "html" (one page, offline), "json" (summary.json), "csv" (tables), "png"
            (figures/) and "nc" (run.nc, which `load` reads back; not of a history, which has its own
            file); all of them by default. Where asked for, "pdf" and "svg" too (figures/).
        force: replace an earlier report.

    Returns:
        Name in the folder -> path of every file.

    Raises:
        InputError: a format is unknown, or there are no layers to report on.
        FileError: the folder exists, or cannot be written.

    >>> import tempfile, torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     sorted(gradflow.report(run, f"{place}/run", formats=["json", "nc"]))
    ['run.nc', 'summary.json']
    """
    from gradflow import reporter

    if isinstance(x, Recording):
        x = analyze(x)
    if isinstance(x, History):
        of_history = reporter.HISTORY_FORMATS if formats is None else formats
        return reporter.report_history(x, Path(folder), formats=of_history, force=force)
    chosen = reporter.FORMATS if formats is None else formats
    return reporter.report(x, folder, formats=chosen, force=force)


@dataclass(frozen=True)
class FileRequest:
    """What `gradflow analyze` was asked for."""

    path: Path
    spec: str | None = None
    member: str | None = None
    input: Path | None = None  # a batch, or a folder or pattern of several
    tokens: Path | None = None  # for a folder of transformers; None: random ones
    target: Path | None = None
    loss: str | None = None
    output: str | None = None
    labels: Path | None = None
    span: int | None = None
    train: bool | None = None  # the mode the model runs in; None: evaluation
    seq_len: int | None = None  # of a probe; None: 100
    batch: int | None = None  # of a probe; None: 16, or fewer
    seed: int = 0
    trust: bool = False

    @property
    def probe_steps(self) -> int:
        """T of a probe."""
        return PROBE_STEPS if self.seq_len is None else self.seq_len


def analyze_file(request: FileRequest, progress: Progress | None = None) -> Analysis:
    """Analyze a model file: on the user's batch where one is given, else from its weights alone.

    Warnings of the recording become part of the analysis.
    """
    if not 0 <= request.seed < 2**63:
        whole = "a whole number of at least 0 and below 2**63"
        raise InputError(must_be("--seed", whole, request.seed, "leave it out for 0"))
    if loading.is_pretrained(request.path):
        return _from_pretrained(request, progress)
    if request.tokens is not None:
        raise InputError(
            f"--tokens is for a folder of transformers, got {request.path}; give --input for a batch"
        )
    labels = None if request.labels is None else loading.read_labels(request.labels)
    if labels is not None and request.input is None:
        checked_labels(labels, request.probe_steps)
    reading = ("seq_len", "batch", "target", "loss", "output", "train")
    check_options(request.input, **{name: getattr(request, name) for name in reading})
    opened = loading.open_model(request.path, request.spec, request.trust, request.member)
    loading.check_layers(opened)
    with collected_warnings() as sentences:
        if request.input is None:
            analysis = _from_weights(opened, request, progress)
        else:
            analysis = _from_batch(opened, request, progress, labels)
    if labels is not None:
        analysis = analysis.labelled(labels)
    return replace(
        analysis,
        title=opened.title,
        warnings=tuple(dict.fromkeys([*opened.said, *analysis.warnings, *sentences])),
        provenance={
            "file": opened.path.name,
            "kind": opened.kind,
            **with_notes(analysis.provenance, opened.notes),
        },
    )


def _from_pretrained(request: FileRequest, progress: Progress | None) -> Analysis:
    """Run a language model of transformers on tokens; the loss is that of the next token."""
    for option in ("spec", "member", "input", "target", "loss", "output"):
        if getattr(request, option) is not None:
            named = {"spec": "model"}.get(option, option)
            raise InputError(
                f"--{named} has no effect on a folder of transformers, whose model is its own and whose "
                "loss is that of the next token; leave it out, and give --tokens FILE for a batch"
            )
    if request.tokens is not None and (request.seq_len is not None or request.batch is not None):
        said = "are the size of random tokens and have no effect with --tokens; leave them out"
        raise InputError(f"--seq-len and --batch {said}")
    labels = None if request.labels is None else loading.read_labels(request.labels)
    with collected_warnings() as sentences:
        model = loading.open_pretrained(request.path)
        model.train(bool(request.train))
        of_folder = f"the model of {request.path}", "save the folder again, or take another"
        with user_code(True, *of_folder):
            vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        steps, batch = request.probe_steps, 1
        if request.tokens is None:
            each = 20 * steps * vocabulary  # bytes of the logits, their loss and gradients
            batch = loading.probe_batch(each, steps, request.batch)
        tokens = loading.read_tokens(request.tokens, vocabulary, (batch, steps), request.seed)
        with random_numbers_kept(devices=None):
            torch.manual_seed(request.seed)
            with record(model) as recording, user_code(True, *of_folder):
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        given = "random" if request.tokens is None else request.tokens.name
        recording.provenance |= {"tokens": given, "seed": request.seed}
        analysis = analyze(recording, span=request.span, seed=request.seed, progress=progress)
    if labels is not None:
        analysis = analysis.labelled(labels)
    return replace(
        analysis,
        title=f"{request.path.name} ({type(model).__name__})",
        warnings=tuple(dict.fromkeys([*analysis.warnings, *sentences])),
        provenance={"file": request.path.name, "kind": "transformers", **analysis.provenance},
    )


def _from_batch(
    opened: loading.Opened,
    request: FileRequest,
    progress: Progress | None,
    labels: tuple[str, ...] | None,
) -> Analysis:
    """Run the whole model on the user's batch."""
    if opened.aged:
        raise FileError(opened.aged)
    if opened.model is None:
        raise InputError(loading.no_model_to_run(opened, request.input))
    assert request.input is not None
    if request.train is not None:
        opened.model.train(request.train)
    paths = loading.batch_files(request.input, request.target)
    if len(paths) > 1:
        return _from_batches(opened.model, paths, request, progress, labels)
    recording = _recorded(opened.model, paths[0], request)
    if labels is not None:  # before the long part
        checked_labels(labels, max(track.steps for track in recording.values()))
    recording.provenance |= {"input": request.input.name, "seed": request.seed}
    analysis = analyze(recording, span=request.span, seed=request.seed, progress=progress)
    return with_predictions(recording, analysis, seed=request.seed)


def _recorded(model: nn.Module, path: Path, request: FileRequest) -> Recording:
    """One batch, recorded."""
    batch = loading.fit_batch(loading.read_batch(path, request.target), model)
    with random_numbers_kept(devices=None):
        torch.manual_seed(request.seed)
        return recorded_pass(model, batch, loss_settings(request.loss, request.output))


def _from_batches(
    model: nn.Module,
    paths: Sequence[Path],
    request: FileRequest,
    progress: Progress | None,
    labels: tuple[str, ...] | None,
) -> Analysis:
    """Run the model on one batch after the other; all have a vote, and one of them is shown."""
    span, batches = request.span, dict[str, tuple[Vote, ...]]()
    for _ in range(2):
        cast = []
        for number, path in enumerate(paths):
            if progress is not None:
                progress(f"{path.name}: rates", number / len(paths))
            recording = _recorded(model, path, request)
            cast.append(votes(recording, span=span, seed=request.seed))
        names = [name for name in cast[0] if all(name in some for some in cast)]
        batches = {name: tuple(some[name] for some in cast) for name in names}
        fewest = steps_in_common(
            {name: [v.gain.steps for v in some] for name, some in batches.items()}
        )
        if fewest is None:
            break
        span = fewest
    path = paths[_middle(batches, len(paths))]
    recording = _recorded(model, path, request)
    if labels is not None:
        checked_labels(labels, max(track.steps for track in recording.values()))
    recording.provenance |= {"input": f"{len(paths)} batches, {request.input}"}
    recording.provenance |= {"seed": request.seed}
    note = "remedies are tried on one batch: give that one alone as --input"
    recording.provenance = with_notes(recording.provenance, [note])
    analysis = analyze_among(recording, batches, span=span, seed=request.seed, progress=progress)
    said = f"{batches_words(len(paths))}; all else is of {path.name}, whose gains lie in the middle"
    return replace(analysis, warnings=(said, *analysis.warnings))


def _middle(batches: Mapping[str, Sequence[Vote]], count: int) -> int:
    """Which of so many batches lies nearest to the middle of all, in the order of their gains."""
    off = np.zeros(count)
    for some in batches.values():
        place = np.argsort(np.argsort([one.gain.value for one in some], kind="stable"))
        off += np.abs(place - (count - 1) // 2)
    return int(off.argmin())


def _from_weights(
    opened: loading.Opened, request: FileRequest, progress: Progress | None
) -> Analysis:
    """Run every recurrent module alone under several probes; a verdict stands if all agree."""
    if not opened.recurrent:
        *most, last = layer_names()
        raise InputError(
            f"{opened.title} holds no {', '.join(most)} or {last} whose weights could be probed; "
            "give a batch to run it on: --input batch.pt"
        )
    layers: dict[str, LayerAnalysis] = {}
    notes: list[str] = []
    tried: list[str] = []
    assumed: list[str] = []
    batches: set[int] = set()
    provenance: dict[str, Any] = {}
    snippet = loading.save_snippet(opened.path, opened)
    for module in opened.recurrent:
        recordings, cast = list[Recording](), list[dict[str, Vote]]()
        probes = loading.probes(module, request.probe_steps, request.batch, request.seed)
        for number, probe in enumerate(probes):
            recording = probed_pass(module, probe)
            step = _part(
                progress, number, len(probes), f"{module.name or module.kind} under {probe.name}"
            )
            recordings.append(recording)
            if number < len(probes) - 1:  # only the last probe is shown; the others have a vote
                if step is not None:
                    step("rates", 0.0)
                cast.append(votes(recording, span=request.span, seed=request.seed))
        shown = analyze(recording, span=request.span, seed=request.seed, progress=step)
        names_of_probes = [probe.name for probe in probes]
        run = agreed_by_votes(shown, cast, names_of_probes) or agreed(
            [*(_vote_in_full(one, request) for one in recordings[:-1]), shown],
            names_of_probes,
            snippet.splitlines()[-1],
        )
        run = with_predictions(recording, run, batch=probes[-1].name, seed=request.seed)
        layers |= run.layers
        notes += [*module.doubts, *run.warnings]
        assumed += module.ambiguous
        tried += [probe.name for probe in probes]
        batches.add(len(probes[-1].r))
        provenance |= run.provenance
    names = ", ".join(dict.fromkeys(tried))
    told = (
        f"probes instead of your data: analyzed from the weights alone, under {names}; the input "
        "decides the rate, so give --input for your own"
    )
    sizes = " or ".join(map(str, sorted(batches)))
    provenance |= {
        "input": f"probes: {names}; B = {sizes}, T = {request.probe_steps}",
        "loss": "⟨r, h_T⟩ with seeded r",
        "seed": request.seed,
        "snippet": snippet,
    }
    provenance = with_notes(provenance, assumed)
    return Analysis(opened.title, layers, tuple(dict.fromkeys([told, *notes])), provenance)


def _vote_in_full(recording: Recording, request: FileRequest) -> Analysis:
    """The analysis of a probe that is not shown: it needs its findings, not its maps."""
    stride = max(1, request.probe_steps)
    return analyze(recording, span=request.span, stride=stride, seed=request.seed)


def _part(progress: Progress | None, number: int, count: int, words: str) -> Progress | None:
    """The progress of one part of several."""
    if progress is None:
        return None
    return lambda what, done: progress(f"{words}: {what}", (number + done) / count)
