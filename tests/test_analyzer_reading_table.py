"""Every finding of what the loss reads × every way of capture: there where it is true, else absent.

The code of a finding is run as it stands, on this batch: afterwards the finding is gone, and a
gradient comes to the recurrent weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradflow
from gradflow.analysis import Finding, LayerAnalysis
from gradflow.errors import GradflowWarning

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS, HIDDEN, STEPS, LENGTHS = 3, 5, 12, [12, 10, 8, 7, 4]
BATCH, ROWS = len(LENGTHS), torch.arange(len(LENGTHS))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.around = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.into(x) + self.around(h))


def looped(step: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    h, outputs = x.new_zeros(x.shape[1], HIDDEN), []
    for x_t in x:
        h = step(x_t, h)
        outputs.append(h)
    return torch.stack(outputs)


def way_of(kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A model, and its outputs (T, B, H) of a batch (T, B, I)."""
    torch.manual_seed(0)
    if kind in ("fused", "packed", "pooled"):
        layer = nn.GRU(INPUTS, HIDDEN)
        if kind == "fused":
            return layer, lambda x: layer(x)[0]
        if kind == "packed":
            packed = lambda x: pack_padded_sequence(x, torch.tensor(LENGTHS))  # noqa: E731
            return layer, lambda x: pad_packed_sequence(layer(packed(x))[0])[0]
        return layer, lambda x: torch.cat([layer(x[:, b : b + 1])[0] for b in range(BATCH)], 1)
    if kind == "cell":
        cell = nn.GRUCell(INPUTS, HIDDEN)
        return cell, lambda x: looped(cell, x)
    own = Own()
    if kind == "own":
        return own, lambda x: looped(own, x)
    if kind == "tap":

        def tapped(x: Tensor, h: Tensor) -> Tensor:
            return gradflow.tap(h=torch.tanh(own.into(x) + own.around(h)))

        return nn.ModuleList([own.into, own.around]), lambda x: looped(tapped, x)
    cell, back = nn.GRUCell(INPUTS, HIDDEN), nn.Linear(HIDDEN, INPUTS)
    closed = lambda x, h: cell(x + back(h), h)  # noqa: E731
    return nn.ModuleDict({"cell": cell, "back": back}), lambda x: looped(closed, x)


WAYS = ("fused", "packed", "cell", "own", "tap", "closed", "pooled")
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "own last": lambda out: out[torch.tensor(LENGTHS) - 1, ROWS],
    "every step": lambda out: out,
    "first step": lambda out: out[0],
    "last row": lambda out: out[-1],
    "one sequence": lambda out: out[:, 0],
    "other sequence": lambda out: out[:, -1],
    "two": lambda out: out[torch.tensor(LENGTHS) - 1, ROWS][1:3],
    "zero": lambda out: out * 0.0,
}
FOUND = {
    "first step": "reads-first-step",
    "one sequence": "reads-one-sequence",
    "other sequence": "reads-one-sequence",
    "two": "reads-few-sequences",
    "zero": "unread",
}


def expected(way: str, read: str) -> str:
    """The finding, "" for none."""
    if read == "last row":
        return {"packed": "reads-past-packed"}.get(way, "")  # all steps are real but in the packed
    if way == "pooled" and read.endswith("sequence"):
        return "reads-few-sequences"  # one run of several
    return FOUND.get(read, "")


def analyzed(model: nn.Module, run: Callable[[], Tensor]) -> tuple[LayerAnalysis, nn.Module]:
    with warnings.catch_warnings(), gradflow.record(model) as recording:
        warnings.simplefilter("ignore", GradflowWarning)  # some runs of the pooled are not read
        run().pow(2).sum().backward()
    (layer,) = gradflow.analyze(recording).values()
    return layer, model


def of_reading(layer: LayerAnalysis) -> list[Finding]:
    return [found for found in layer.findings if found.name.startswith(("reads", "unread"))]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("way", WAYS)
def test_a_finding_is_there_where_it_is_true_and_its_code_mends_it(way: str, read: str) -> None:
    model, outputs_of = way_of(way)
    x = torch.randn(STEPS, BATCH, INPUTS)
    layer, _ = analyzed(model, lambda: READS[read](outputs_of(x)))
    found = of_reading(layer)
    assert [f.name for f in found] == ([expected(way, read)] if expected(way, read) else [])
    if not found or found[0].name in ("unread", "reads-few-sequences"):
        return
    later = [f.advice for f in layer.findings if f is not found[0]]
    assert all(advice.startswith(("first mend", "nothing")) for advice in later)
    code = found[0].code.split("\n")[
        -1
    ]  # the line for an index of the wrong axis, where there are two

    def mended() -> Tensor:
        if "h_n" in code:
            given: dict[str, Any] = {
                "model": model,
                "packed": pack_padded_sequence(x, torch.tensor(LENGTHS)),
            }
            code_of = found[0].code
        else:
            out = outputs_of(x)
            given = {"output": out, "outputs": out, "lengths": torch.tensor(LENGTHS)}
            code_of = code
        names = {"torch": torch, **given}
        exec(code_of, names)  # noqa: S102  (as a user would)
        return names["last"]

    model.zero_grad()
    layer, model = analyzed(model, mended)
    assert not of_reading(layer)
    recurrent = [
        weight
        for name, weight in model.named_parameters()
        if "weight_hh" in name or "around.weight" in name or name == "1.weight"
    ]
    assert any(bool((weight.grad != 0).any()) for weight in recurrent)
