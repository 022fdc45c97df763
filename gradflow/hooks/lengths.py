"""Real steps of every sequence of a padded batch: as `record` was given them, and as padding shows itself.

Letters: T timesteps, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import InputError, must_be
from gradflow.hooks.graph import is_hooked
from gradflow.hooks.own.returned import leaves
from gradflow.hooks.seen import SeenCall
from gradflow.hooks.unrolled.values import signed
from gradflow.limits import FIRST_NODES, INPUT_NODES, SHOWN_CALLS
from gradflow.recording.padding import Padding, padding_of

Lengths = Tensor | list[int] | Callable[..., Any] | None


class GivenLengths:
    """What stood in ``record(..., lengths=)``, checked where a call shows what it has to fit."""

    def __init__(self, given: Lengths) -> None:
        self._given = given

    @property
    def known(self) -> bool:
        """Whether any were given."""
        return self._given is not None

    def of_call(self, seen: SeenCall) -> Tensor | None:
        """(B,) of a call over whole sequences; None where none were given, or input is packed."""
        if self._given is None or seen.batch_sizes is not None:
            return None
        batch, steps = (0, 1) if seen.batch_first else (1, 0)
        batch, steps = seen.data.shape[batch], seen.data.shape[steps]
        if steps == 1:  # a step of a loop, whose real steps they are: see `of_steps`
            return None
        data = seen.data if seen.module_input is None else seen.module_input
        lengths = self._given(data) if callable(self._given) else self._given
        found = _whole(lengths)
        if found is None or found.shape != (batch,) or bool(((found < 1) | (found > steps)).any()):
            raise _unfit(f"{batch} whole numbers between 1 and {steps}", lengths)
        return found

    def of_steps(self, batch: int) -> Tensor | None:
        """(B,) of a loop over single steps of a batch of this size."""
        found = self.of_loop()
        if found is not None and (found.shape != (batch,) or bool((found < 1).any())):
            raise _unfit(f"{batch} whole numbers of at least 1", self._given)
        return found

    def of_loop(self) -> Tensor | None:
        """The same, unchecked: empty where they are no whole numbers."""
        if self._given is None or callable(self._given):
            return None
        found = _whole(self._given)
        return torch.empty(0, dtype=torch.long) if found is None else found

    @property
    def notes(self) -> list[str]:
        """What a reader of a loop over single steps should know of them."""
        said = (
            "lengths= was a function, which is asked of whole sequences and not of single steps: all steps "
            "count as real; give the lengths themselves"
        )
        return [said] if callable(self._given) else []


def _whole(lengths: Any) -> Tensor | None:
    """As whole numbers, or None where they are none."""
    try:
        found = torch.as_tensor(lengths).cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    return found.long() if bool((found == found.long()).all()) else None


def _unfit(expected: str, lengths: Any) -> InputError:
    given = lengths.tolist() if isinstance(lengths, Tensor) else repr(lengths)
    return InputError(
        must_be("lengths", expected, given, "give one length per sequence of the batch")
    )


# nodes that make every step of their result from the same step of what they are given
_STEPWISE = (
    "Add Addmm Cat Clone Div Elu FusedRmsNorm Gelu Hardtanh LeakyRelu Mm Mul NativeBatchNorm "
    "NativeDropout NativeLayerNorm Neg Permute Pow Relu ReshapeAlias Rsqrt Sigmoid Silu Softplus "
    "Squeeze Sub T Tanh ToCopy Transpose UnsafeView Unsqueeze View"
)
STEPWISE = frozenset(f"{name}Backward0" for name in _STEPWISE.split())
UNBIND = "UnbindBackward0"
TURNING = {"TransposeBackward0", "PermuteBackward0"}
REORDERING = {
    f"{name}Backward0" for name in ("Flip", "Roll", "Index", "IndexSelect", "Gather", "Take")
}


def is_readable(tensor: Tensor) -> bool:
    """Whether it has plain numbers: a sparse, nested, quantised or wrapped one shows no padding."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not (tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta")


class ShownPadding:
    """What one model shows of the padding of its batches."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = [
            m for m in nn.Module.modules(model) if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        ]
        self.tokens = {m.padding_idx for m in embeddings if m.padding_idx is not None}
        self._calls = 0
        # number of a node -> the tracks that it is made of
        self._made: dict[int, tuple[str, ...]] = {}

    def of_model(self, args: Any, kwargs: Any) -> list[Padding]:
        """Of every tensor that the model was given, its axes in both orders."""
        self._calls += 1
        if self._calls > SHOWN_CALLS:  # a loop that calls the model step by step
            return []
        every = leaves((args, kwargs)).values()
        given = [t.detach() for t in every if is_readable(t) and not t.is_complex()]
        found = []
        for rows in _sequences(given):
            padding = padding_of(rows, self.tokens)
            if padding is not None:
                found.append(replace(padding, sure=padding.sure or _is_said(padding, given)))
        return found

    def made(self, results: Iterable[Tensor], names: Iterable[str]) -> None:
        """These tensors are what some tracks returned."""
        for result in results:
            if result.grad_fn is not None:
                self._made[result.grad_fn._sequence_nr()] = tuple(names)

    def of_input(self, data: Tensor, batch_first: bool) -> tuple[Padding | None, tuple[str, ...]]:
        """Of the ids that the input of a layer was looked up with, and the tracks it is made of.

        Nothing of either where an operation in between may bring steps to other places.
        """
        ids: list[tuple[Any, bool]] = []
        names: list[str] = []
        waiting, seen = [(data.grad_fn, False)], set()
        while waiting:
            node, turned = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            made = self._made.get(node._sequence_nr())
            if made is not None:
                names += made
            elif node.name() == "EmbeddingBackward0":
                ids.append((node, turned))
            elif node.name() in STEPWISE and len(seen) < INPUT_NODES:
                turned |= node.name() in TURNING
                waiting += [(child, turned) for child, _ in node.next_functions]
            elif node.name() != "torch::autograd::AccumulateGrad":
                return None, ()
        each = [self._of_ids(node, turned, data, batch_first) for node, turned in ids]
        known = [padding for padding in each if padding is not None]
        same = all(torch.equal(padding.lengths, known[0].lengths) for padding in known)
        return (known[0] if known and same else None), tuple(dict.fromkeys(names))

    def is_made(self, data: Tensor) -> bool:
        """Whether an input was made from what some track returned, as far as is looked."""
        waiting, seen = [data.grad_fn], set[Any]()
        while waiting and len(seen) < FIRST_NODES:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node._sequence_nr() in self._made:
                return True
            waiting += [child for child, _ in node.next_functions]
        return bool(waiting)

    def turns(self, first: Iterable[Any]) -> bool:
        """Whether the first step of a loop, made by these nodes, may read another than the first.

        It does where something on the way to it reorders, or takes the last of several.
        """
        waiting, seen = list(first), set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if len(seen) > FIRST_NODES or node.name() in REORDERING or _takes_the_last(node):
                return True
            if node._sequence_nr() not in self._made:
                waiting += [child for child, _ in node.next_functions]
                if any(
                    child and child.name() == UNBIND and nr for child, nr in node.next_functions
                ):
                    return True
        return False

    def _of_ids(self, node: Any, turned: bool, data: Tensor, batch_first: bool) -> Padding | None:
        """Of the ids of an embedding, laid out as the layer's input."""
        if is_hooked(node):
            return None
        ids = node._saved_indices
        if ids.dim() != 2 or (turned and ids.shape[0] == ids.shape[1]):
            return None
        here = data.shape[:2] if data.dim() == 3 else data.shape[:1]
        if ids.shape != here and ids.T.shape == here:
            ids = ids.T
        if ids.shape != here:
            return None
        return padding_of((ids.T if batch_first else ids).unsqueeze(2), {node._saved_padding_idx})

    def close(self) -> None:
        """Release the numbers of nodes."""
        self._made.clear()


def _takes_the_last(node: Any) -> bool:
    """Whether it selects the last of several entries."""
    if node.name() != "SelectBackward0":
        return False
    size = node._saved_self_sym_sizes[node._saved_dim]
    return size > 2 and signed(node._saved_index) in (size - 1, -1)


def _sequences(given: list[Tensor]) -> Iterator[Tensor]:
    """(T, B, I): token ids and rows of numbers, in both orders of their axes."""
    for tensor in given:
        if tensor.dtype == torch.bool or tensor.dim() not in (2, 3):
            continue
        rows = tensor.unsqueeze(2) if tensor.dim() == 2 else tensor
        yield rows
        yield rows.transpose(0, 1)


def _is_said(padding: Padding, given: list[Tensor]) -> bool:
    """Whether the model was also given these very lengths, or a mask that is true up to them."""
    real = torch.arange(padding.steps) < padding.lengths.unsqueeze(1)  # (B, T)
    for tensor in given:
        if tensor.shape == padding.lengths.shape and not tensor.is_floating_point():
            if torch.equal(tensor.cpu().long(), padding.lengths):
                return True
        elif tensor.shape in (real.shape, real.T.shape):
            mask = (tensor if tensor.shape == real.shape else tensor.T).cpu()
            two = bool(((mask == 0) | (mask == 1)).all())
            if two and (torch.equal(mask.bool(), real) or torch.equal(~mask.bool(), real)):
                return True
    return False
