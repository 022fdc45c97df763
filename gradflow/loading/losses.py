"""Which tensor of a model's output the loss reads, and the losses that ``--loss`` names.

Letters: T timesteps, B sequences, F features, C classes. Every loss is a mean over real steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from gradflow.errors import InputError, must_be
from gradflow.loading.batch import check_lengths
from gradflow.loading.words import article

IGNORED = -100  # target of cross-entropy that counts for nothing, as in PyTorch


def choose_output(output: object, key: str | None = None) -> tuple[Tensor, str]:
    """Pick the tensor that the loss reads: the first floating one, or the one ``key`` names.

    ``key`` is an index, a name or a path of them: ``"0"``, ``"logits"``, ``"1.0"``. A packed
    sequence is padded, time first, sequences in the user's order; `output_lengths` gives its
    lengths. Returns the tensor and its name in words. Raises InputError.

    >>> choose_output((torch.tensor([1]), {"logits": torch.ones(2)}))[1]
    "output[1]['logits']"
    """
    value, name = _find(output, key)
    if isinstance(value, PackedSequence):
        return pad_packed_sequence(value)[0], f"{name} (padded, time first)"
    assert isinstance(value, Tensor)
    return value, name


def output_lengths(output: object, key: str | None = None) -> Tensor | None:
    """Lengths (B,) of the chosen output where it is a packed sequence, else None."""
    value, _ = _find(output, key)
    return pad_packed_sequence(value)[1] if isinstance(value, PackedSequence) else None


def _find(output: object, key: str | None) -> tuple[object, str]:
    name = "output"
    if key is not None:
        for part in key.split("."):
            output, name = _step(output, part, name, key)
    for value, place in _leaves(output, name):
        tensor = value.data if isinstance(value, PackedSequence) else value
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return value, place
    seen = ", ".join(place for _, place in _leaves(output, name)) or article(type(output).__name__)
    what = "the model's output" if key is None else f"the output that --output {key} names"
    raise InputError(
        must_be(what, "a floating-point tensor", f"none among {seen}", _choices(output))
    )


def _choices(output: object) -> str:
    named = [place for _, place in _children(output, "output")]
    return f"choose one of {', '.join(named)} with --output" if named else "return one"


def _step(value: object, part: str, name: str, key: str) -> tuple[object, str]:
    for child, place in _children(value, name):
        if place in (f"{name}[{part}]", f"{name}['{part}']", f"{name}.{part}"):
            return child, place
    known = ", ".join(place for _, place in _children(value, name)[:8])
    raise InputError(
        must_be(
            "--output",
            f"the place of a tensor in the model's output ({known or 'a single tensor'})",
            repr(key),
            "leave it out for the first floating tensor, or use 0, logits or 1.0",
        )
    )


def _children(value: object, name: str) -> list[tuple[object, str]]:
    if isinstance(value, PackedSequence | Tensor):
        return []
    if isinstance(value, Mapping):
        return [(v, f"{name}[{k!r}]") for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [(v, f"{name}[{i}]") for i, v in enumerate(value)] + [
            (getattr(value, f), f"{name}.{f}") for f in getattr(value, "_fields", ())
        ]
    if is_dataclass(value) and not isinstance(value, type):
        return [(getattr(value, f.name), f"{name}.{f.name}") for f in fields(value)]
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        return [(v, f"{name}.{k}") for k, v in vars(value).items() if not k.startswith("_")]
    return []


def _leaves(value: object, name: str, depth: int = 0) -> Iterator[tuple[object, str]]:
    children = _children(value, name) if depth < 8 else []
    if isinstance(value, Tensor | PackedSequence):
        yield value, name
    for child, place in children:
        yield from _leaves(child, place, depth + 1)


def time_axis(model: nn.Module) -> int:
    """The axis of time in the model's batches, 0 or 1, by ``batch_first`` of its first RNN layer.

    Models without a stock layer are taken to be batch first, as most training code is.

    >>> time_axis(nn.LSTM(3, 5)), time_axis(nn.GRU(3, 5, batch_first=True))
    (0, 1)
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            return 1 if module.batch_first else 0
    return 1


@dataclass
class Loss:
    """A loss by name; call it with (output, target, lengths) for a scalar tensor.

    Where no loss was given the target chooses, so ``name`` and ``note`` say which loss it was only
    after the call.
    """

    name: str  # for the provenance, in words
    note: str  # a sentence for the report, or ""
    time_axis: int
    function: Callable[[Tensor, Tensor | None, Tensor | None, int], Tensor] | None
    # None: the target chooses

    def __call__(
        self, output: Tensor, target: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Compute the scalar loss; raises InputError where shapes or values do not fit."""
        function = self.function
        if function is None:
            self.name, _, function = _LOSSES[_by_target(output, target)]
            self.note = (
                f"no loss was given: the target chose {self.name}; loss= or --loss sets another"
            )
        return function(output, target, lengths, self.time_axis)


def make_loss(name: str | None, target_present: bool, time_axis: int = 0) -> Loss:
    """Look up a loss: mse, cross-entropy, bce, nll or last.

    ``time_axis`` is 0 for outputs (T, B, F), 1 for (B, T, F). Without a target the loss is
    ``last``, ½ ‖output at the last real step‖², summed over sequences; with one and no name, mse
    for floating, cross-entropy for whole targets. ``bce`` reads the output as probabilities where
    all of it lies in [0, 1], else as logits. Steps past a sequence's length count for nothing.

    Raises InputError for an unknown name, or one that needs a target where there is none.

    >>> make_loss(None, target_present=False)(torch.ones(7, 2, 3))
    tensor(3.)
    """
    if time_axis not in (0, 1):
        raise InputError(must_be("time_axis", "0 or 1", time_axis, "1 is batch first"))
    default = "target" if target_present else "last"
    key = default if name is None else name.strip().lower().replace("_", "-")
    if name is not None and key not in LOSS_NAMES:
        listed = ", ".join(LOSS_NAMES)
        raise InputError(must_be("--loss", f"one of {listed}", repr(name), "choose one of them"))
    words, note, function = _CHOSEN_LATER if key == "target" else _LOSSES[key]
    if key != "last" and not target_present:
        raise InputError(
            f"--loss {name} must have a target, got none; give --target FILE, or leave --loss out "
            f"for {_LOSSES['last'][0]}"
        )
    if key == "last" and target_present:
        note = "the loss reads the output alone: the target was not used"
    return Loss(words, note, time_axis, function)


def _last(output: Tensor, _: Tensor | None, lengths: Tensor | None, axis: int) -> Tensor:
    if output.ndim >= 3:
        output = output.transpose(0, 1) if axis == 1 else output
        steps, batch = output.shape[:2]
        check_lengths(lengths, batch, steps)
        if lengths is None:
            output = output[-1]
        else:
            rows = torch.arange(batch, device=output.device)
            output = output[lengths.to(output.device).long() - 1, rows]
    return output.pow(2).sum() / 2


def _real(
    output: Tensor, target: Tensor, lengths: Tensor | None, axis: int
) -> tuple[Tensor, Tensor]:
    """Keep the real steps of an output and a target that both have a time axis."""
    per_step = output.ndim >= 3 and target.ndim >= 2 and output.shape[:2] == target.shape[:2]
    if lengths is None or not per_step:
        return output, target
    steps, batch = output.shape[axis], output.shape[1 - axis]
    check_lengths(lengths, batch, steps)
    counts = torch.arange(steps, device=output.device)
    mask = counts[:, None] < lengths.to(output.device)[None, :]  # (T, B)
    mask = mask.T if axis == 1 else mask
    return output[mask], target[mask]


def _same_shape(loss: str, output: Tensor, target: Tensor | None) -> Tensor:
    assert target is not None
    target = target.to(output.device)
    if target.shape != output.shape and target.numel() == output.numel():
        squeezed = [tuple(n for n in shape if n != 1) for shape in (target.shape, output.shape)]
        if squeezed[0] == squeezed[1]:
            target = target.reshape(output.shape)
    if target.shape != output.shape:
        shape = tuple(output.shape)
        expected = f"of the output's shape {shape} for --loss {loss}"
        got = f"shape {tuple(target.shape)}"
        raise InputError(must_be("the target", expected, got, "choose with --output or --loss"))
    return target.to(output.dtype)


def _mse(output: Tensor, target: Tensor | None, lengths: Tensor | None, axis: int) -> Tensor:
    target = _same_shape("mse", output, target)
    return F.mse_loss(*_real(output, target, lengths, axis))


def _bce(output: Tensor, target: Tensor | None, lengths: Tensor | None, axis: int) -> Tensor:
    target = _same_shape("bce", output, target)
    output, target = _real(output, target, lengths, axis)
    if bool(((target < 0) | (target > 1)).any()):
        span = f"{float(target.min()):g} to {float(target.max()):g}"
        raise InputError(must_be("the target", "in [0, 1] for --loss bce", span, "use mse"))
    if bool(((output < 0) | (output > 1)).any()):
        return F.binary_cross_entropy_with_logits(output, target)
    if bool(torch.isnan(output).any()):
        return F.binary_cross_entropy_with_logits(output, target)  # NaN stays NaN, and is shown
    return F.binary_cross_entropy(output, target)


def _classes(loss: str, output: Tensor, target: Tensor | None) -> Tensor:
    assert target is not None
    target = target.to(output.device)
    if output.ndim < 1 or tuple(target.shape) not in (
        tuple(output.shape[:-1]),
        tuple(output.shape),
    ):
        expected = f"class numbers of shape {tuple(output.shape[:-1])} (the class axis is last)"
        advice = f"the output has shape {tuple(output.shape)}; choose with --output or --loss"
        raise InputError(must_be("the target", expected, f"shape {tuple(target.shape)}", advice))
    if output.shape[-1] == 1:
        one = f"one class only (the output has shape {tuple(output.shape)})"
        raise InputError(
            f"--loss {loss} must have two classes or more, got {one}, whose loss is always 0; "
            "use bce for one logit, mse for one number"
        )
    if tuple(target.shape) == tuple(output.shape):
        return target.to(output.dtype)  # probabilities of the classes
    if target.is_floating_point() and bool((target != target.round()).any()):
        got = "fractions"
        raise InputError(must_be("the target", "whole class numbers", got, "or use --loss mse"))
    target = target.long()
    counted = target[target != IGNORED]
    count = output.shape[-1]
    if counted.numel() == 0:
        raise InputError(
            must_be(
                "the target",
                "a class for at least one step",
                f"{IGNORED} everywhere",
                "give real classes",
            )
        )
    if int(counted.min()) < 0 or int(counted.max()) >= count:
        expected = f"in 0 … {count - 1} (or {IGNORED} to ignore) for --loss {loss}"
        got = f"{int(counted.min())} to {int(counted.max())}"
        raise InputError(must_be("the target", expected, got, "check the class axis: it is last"))
    return target


def _cross_entropy(
    output: Tensor, target: Tensor | None, lengths: Tensor | None, axis: int
) -> Tensor:
    target = _classes("cross-entropy", output, target)
    output, target = _real(output, target, lengths, axis)
    flat = output.reshape(-1, output.shape[-1])
    wanted = target.reshape(flat.shape) if target.is_floating_point() else target.reshape(-1)
    return F.cross_entropy(flat, wanted, ignore_index=IGNORED)


def _nll(output: Tensor, target: Tensor | None, lengths: Tensor | None, axis: int) -> Tensor:
    target = _classes("nll", output, target)
    output, target = _real(output, target, lengths, axis)
    if target.is_floating_point():
        expected = f"class numbers of shape {tuple(output.shape[:-1])} for --loss nll"
        advice = "or use --loss cross-entropy on logits"
        raise InputError(must_be("the target", expected, "one row per class", advice))
    flat = output.reshape(-1, output.shape[-1])
    return F.nll_loss(flat, target.reshape(-1), ignore_index=IGNORED)


def _by_target(output: Tensor, target: Tensor | None) -> str:
    if target is None:
        raise InputError(
            must_be("the target", "a tensor", "none", "give --target FILE, or use --loss last")
        )
    whole = not target.is_floating_point() and target.dtype != torch.bool
    classes = whole and tuple(target.shape) == tuple(output.shape[:-1]) and output.shape[-1] > 1
    return "cross-entropy" if classes else "mse"


LOSS_NAMES = ("mse", "cross-entropy", "bce", "nll", "last")
_LOSSES = {
    "mse": ("mean squared error", "", _mse),
    "cross-entropy": ("cross-entropy, class axis last", "", _cross_entropy),
    "bce": (
        "binary cross-entropy",
        "the output was read as probabilities if all of it lies in [0, 1], else as logits",
        _bce,
    ),
    "nll": ("negative log-likelihood of log-probabilities, class axis last", "", _nll),
    "last": (
        "½‖output at the last real step‖²",
        "no target was given: the loss is ½‖output at the last real step‖²",
        _last,
    ),
}
_CHOSEN_LATER = ("the loss that the target chooses", "", None)
