"""One recorded forward and backward pass of a model, which is left as found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradflow import loading
from gradflow.errors import GradflowError, InputError, UserCodeError, must_be
from gradflow.hooks import record
from gradflow.process import random_numbers_kept
from gradflow.recording import Recording


@dataclass(frozen=True)
class LossSettings:
    """How to get a loss out of a model's output."""

    loss: Callable[..., Tensor] | None = None  # the user's own
    reads_part: bool = False  # whether that takes the chosen part of the output, or all of it
    loss_name: str | None = None
    output: str | None = None  # which part of a tuple or dict
    guard: bool = False  # quote errors of the user's code instead of letting them through
    told: Callable[[Tensor], None] | None = None  # called with the loss after its backward


def loss_settings(
    loss: Any, output: str | None, told: Callable[[Tensor], None] | None = None
) -> LossSettings:
    """How the command line gets a loss: one of gradflow's by its name, or the user's own."""
    of_code = isinstance(loss, str) and ":" in loss
    own = loading.build_loss(loss) if of_code else loss if callable(loss) else None
    name = loss if own is None else None
    return LossSettings(own, of_code, name, output, guard=True, told=told)


def check_options(run_on: Any, **options: Any) -> None:
    """Refuse what has no effect: the size of a probe beside a batch, what reads a batch without one."""
    for name, value in options.items():
        option = "--eval" if value is False else f"--{name.replace('_', '-')}"
        of_probe = name in ("seq_len", "batch")
        if value is not None and of_probe and run_on is not None:
            raise InputError(
                f"{option} is the size of a probe and has no effect with --input, whose batch is used as it "
                "is; leave it out, or save a smaller batch"
            )
        if value is not None and not of_probe and run_on is None:
            raise InputError(f"{option} needs a batch to run the model on; give --input as well")


def recorded_pass(
    model: nn.Module, batch: loading.Batch, settings: LossSettings, time: int | None = None
) -> Recording:
    """One recorded forward and backward pass; gradients and buffers are put back."""
    kwargs = dict(batch.kwargs)
    if batch.lengths is not None and "lengths" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("lengths", batch.lengths)
    given = [*batch.inputs, *batch.kwargs.values(), batch.target]
    with left_as_found(model, given), record(model, lengths=batch.lengths) as recording:
        with user_code(settings.guard, "the model", _about_input(model, batch.inputs)):
            result = model(*batch.inputs, **kwargs)
        value, words, read = _loss(result, model, batch, settings, recording, time)
        if value.requires_grad:
            with user_code(settings.guard, "the backward pass", "the same loss must train"):
                value.backward()
        if settings.told is not None:
            settings.told(value.detach())
    # where a loop by hand has time is known after its backward
    if read and time is None and _time_axis(model, recording, read[0]) != read[1]:
        return recorded_pass(model, batch, settings, 1 - read[1])
    # only now: what was recorded is described when the block ends
    recording.provenance |= {"input": _shapes(batch.inputs), "loss": words}
    recording.provenance = with_notes(recording.provenance, batch.notes)
    return recording


def probed_pass(module: loading.RecurrentModule, probe: loading.Probe) -> Recording:
    """Record the module alone, under the path it has in the whole model."""
    model: nn.Module = module.module
    for part in reversed(module.path_parts):
        outer = nn.Module()
        outer.add_module(part, model)
        model = outer
    with left_as_found(model), record(model) as recording:
        output = module.module(probe.inputs)[0]
        loading.probe_loss(
            output, probe.r, module.module.batch_first, module.bidirectional
        ).backward()
    recording.provenance["probe"] = probe.name
    if module.from_cell:  # it was run as a layer; its track has the cell's own path
        (track,) = recording.values()
        recording.drop(track)
        track.name = module.name or "cell"
        recording.add(track)
    return recording


def _loss(
    result: Any,
    model: nn.Module,
    batch: loading.Batch,
    settings: LossSettings,
    recording: Recording,
    time: int | None,
) -> tuple[Tensor, str, tuple[Tensor, int] | None]:
    """The loss, its name in words, and the output that it read with the axis that it took for time."""
    if settings.loss is not None and not settings.reads_part:
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
        return _scalar(value), _name_of(settings.loss), None
    output, where = loading.choose_output(result, settings.output)
    if settings.loss is not None:
        arguments = (output,) if batch.target is None else (output, batch.target)
        with user_code(settings.guard, "the loss", "check --target and --loss"):
            value = settings.loss(*arguments)
        return _scalar(value), f"{_name_of(settings.loss)} of {where}", None
    lengths = loading.output_lengths(result, settings.output)
    lengths = batch.lengths if lengths is None else lengths
    axis = _time_axis(model, recording, output) if time is None else time
    loss = loading.make_loss(settings.loss_name, batch.target is not None, axis)
    with user_code(settings.guard, "the loss", "check --target and --loss"):
        value = loss(output, batch.target, lengths)
    if loss.note:
        recording.notes.append(loss.note)
    return value, f"{loss.name} of {where}", (output, axis)


def _name_of(loss: Callable[..., Tensor]) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    return str(name).replace("<lambda>", "a lambda of the caller's")


def _time_axis(model: nn.Module, recording: Recording, output: object) -> int:
    """Where time is in the model's output: where the layer that ran last had it."""
    tracks = list(recording.values())
    if tracks and tracks[-1].spec is not None:
        return int(tracks[-1].batch_first)
    if tracks and isinstance(output, Tensor) and output.ndim >= 2:  # a loop by hand does not say
        steps, batch = tracks[-1].steps, tracks[-1].batch
        fits = [(steps, batch), (batch, steps)]
        if steps != batch and tuple(output.shape[:2]) in fits:
            return fits.index((output.shape[0], output.shape[1]))
    return loading.time_axis(model)


def with_notes(provenance: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """What was done to the input on the way: told, but no reason to doubt a number."""
    known = [*notes, *provenance.get("notes", [])]
    return {**provenance, "notes": list(dict.fromkeys(known))} if known else dict(provenance)


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        advice = "reduce it, e.g. by .mean()"
        raise InputError(must_be("the loss", "one number in a tensor", got, advice))
    return value.reshape(())


def _about_input(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """What to check where a model cannot read its input: tokens without a row, else shapes."""
    whole = [x for x in inputs if isinstance(x, Tensor) and not x.is_floating_point() and x.numel()]
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and whole:
            low, high = int(whole[0].min()), int(whole[0].max())
            if low < 0 or high >= part.num_embeddings:
                return (
                    f"its tokens are {low} to {high}, and the embedding {name} knows 0 to "
                    f"{part.num_embeddings - 1}: give tokens of the vocabulary the model was trained "
                    "with"
                )
    return f"the input has {_shapes(inputs)}: check --input, or save the batch again"


def _shapes(inputs: tuple[Any, ...]) -> str:
    found = [str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor)]
    return "shape " + ", ".join(found) if found else "given by the caller"


@contextmanager
def user_code(guard: bool, what: str, advice: str) -> Iterator[None]:
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
def left_as_found(model: nn.Module, inputs: Sequence[Any] = ()) -> Iterator[None]:
    """Put back gradients, buffers and random state."""
    tensors = [
        *nn.Module.parameters(model),
        *(x for x in inputs if isinstance(x, Tensor) and x.is_leaf),
    ]
    grads = [(tensor, tensor.grad) for tensor in tensors]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for tensor, _ in grads:
        tensor.grad = None
    try:
        with random_numbers_kept(devices=None):
            yield
    finally:
        for tensor, grad in grads:
            tensor.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
