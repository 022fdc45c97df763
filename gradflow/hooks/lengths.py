"""The lengths that `record` was given: real steps of every sequence of a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import InputError, must_be
from gradflow.hooks.seen import SeenCall

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
