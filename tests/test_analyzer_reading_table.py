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


# ------------------------------------------------------- lines that change the call, not what is read


def run_line(layer: LayerAnalysis, name: str, **names: Any) -> dict[str, Any]:
    """What a user has after the first line of the code of the only finding of this name."""
    (found,) = of_reading(layer)
    assert found.name == name
    exec(found.code.split("\n")[0], names)  # noqa: S102  (as a user would)
    return names


@pytest.mark.parametrize(
    ("read", "name"),
    [(-1, "reads-one-sequence"), (slice(-2, None), "reads-few-sequences")],
    ids=["one", "few"],
)
def test_the_line_that_lets_batch_and_time_change_places_mends_it(read: Any, name: str) -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(INPUTS, HIDDEN), torch.randn(BATCH, STEPS, INPUTS)  # batch first
    layer, _ = analyzed(gru, lambda: gru(x)[0][:, read])
    run_line(layer, name, model=gru)
    gru.zero_grad()
    layer, _ = analyzed(gru, lambda: gru(x)[0][:, read])
    assert gru.batch_first
    assert not of_reading(layer)
    assert bool((gru.weight_hh_l0.grad != 0).any())


@pytest.mark.parametrize("kind", ["fused", "cell"])
def test_the_line_for_a_layer_that_nobody_reads_gives_it_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    layers = {"fused": nn.GRU(INPUTS, HIDDEN), "cell": nn.GRUCell(INPUTS, HIDDEN)}
    model = nn.ModuleDict({"rnn": layers[kind], "head": nn.Linear(HIDDEN, 1)})
    x = torch.randn(STEPS, BATCH, INPUTS)

    def given(line: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if kind == "fused":
            return model["head"](line(x, x)[-1])
        return model["head"](looped(line, x)[-1])

    def detached(x_t: Tensor, h: Tensor) -> Tensor:
        return (model["rnn"](x_t)[0] if kind == "fused" else model["rnn"](x_t, h)).detach()

    layer, _ = analyzed(model, lambda: given(detached))

    def mended(x_t: Tensor, h: Tensor) -> Tensor:
        found = run_line(layer, "unread", model=model, x=x_t, x_t=x_t, h=h)
        return found["output" if kind == "fused" else "h"]

    model.zero_grad()
    after, _ = analyzed(model, lambda: given(mended))
    assert not of_reading(after)
    weights = dict(model["rnn"].named_parameters())
    recurrent = weights["weight_hh_l0" if kind == "fused" else "weight_hh"]
    assert bool((recurrent.grad != 0).any())


def test_the_line_for_runs_that_the_loss_leaves_out_lets_it_read_all() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(INPUTS, HIDDEN), torch.randn(BATCH, STEPS, 1, INPUTS)

    def losses() -> list[Tensor]:
        return [gru(one)[0][-1].pow(2).sum() for one in x]

    layer, _ = analyzed(gru, lambda: losses()[0])
    gru.zero_grad()
    after, _ = analyzed(
        gru, lambda: run_line(layer, "reads-few-sequences", losses=losses())["loss"]
    )
    assert not of_reading(after)
    assert bool((gru.weight_hh_l0.grad != 0).any())
