"""`record(exact=False)`: one backward through torch's own kernel gives all totals, equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.errors import InputError
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-13
SETTINGS = [
    cases.Case(cell, 2, both, layout, packed, dropout=0.4, initial=True, loss="both", proj=proj)
    for cell, both, (layout, packed) in product(
        cases.CELLS,
        (False, True),
        [("time_first", "no"), ("batch_first", "no"), ("time_first", "unsorted")],
    )
    for proj in ((0, 2) if cell == cases.LSTM else (0,))
]


def recorded(case: cases.Case, exact: bool) -> tuple[Recording, list[Tensor]]:
    """The recording, and loss and gradients of the step itself."""
    setup = cases.build(case)
    torch.manual_seed(5)
    with gradflow.record(setup.module, exact=exact) as recording:
        loss = cases.loss_of(setup, cases.call(setup)[0])
        loss.backward()
    return recording, [loss.detach(), *(p.grad for p in setup.module.parameters())]


def off(one: Tensor | None, other: Tensor | None) -> float:
    """The largest difference over the largest entry."""
    assert one is not None
    assert other is not None
    assert torch.equal(one.isnan(), other.isnan())
    one, other = one.nan_to_num(), other.nan_to_num()
    return float((one - other).abs().max() / one.abs().max().clamp(min=torch.finfo(one.dtype).tiny))


def came_through_phantoms(recording: Recording) -> bool:
    """Whether no total is computed by a scan of ours over the steps."""
    return all(
        group.call.inner_known
        for track in recording.values()
        for group in track.source.loop.groups  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_all_numbers_are_those_of_an_exact_recording(case: cases.Case) -> None:
    (plain, step), (phantom, other) = recorded(case, True), recorded(case, False)
    assert came_through_phantoms(phantom)
    assert not came_through_phantoms(plain)
    assert max(map(off, step, other)) < ROUNDING
    for track, same in zip(plain.values(), phantom.values(), strict=True):
        numbers = ["h", "grad_h", "grad_h_direct", "grad_h_last", "delta", "delta_hh"]
        for name in [*numbers, *["grad_c"] * (case.cell == cases.LSTM)]:
            assert off(getattr(track, name), getattr(same, name)) < ROUNDING, name
        assert same.parity.status == "passed"


class Reader(nn.Module):
    """An LSTM of two layers with a head, read in chunks whose state goes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(3, 4, 2, batch_first=True).double()
        self.head = nn.Linear(4, 1).double()

    def forward(self, x: Tensor, chunk: int = 6, cut: bool = False) -> Tensor:
        outputs, state = [], None
        for part in x.split(chunk, dim=1):
            output, state = self.rnn(part, state)
            outputs.append(self.head(output))
            state = tuple(one.detach() for one in state) if cut else state
        return torch.cat(outputs, dim=1)


X = torch.randn(5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def twice(model: Reader) -> None:
    loss = model(X).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def of_some(model: Reader) -> None:
    torch.autograd.grad(model(X).square().mean(), [model.rnn.weight_ih_l0, model.head.weight])


def frozen(model: Reader) -> None:
    model.rnn.requires_grad_(False)
    model(X.clone().requires_grad_()).square().mean().backward()


def frozen_below(model: Reader) -> None:
    for name, weight in model.rnn.named_parameters():
        weight.requires_grad_("l1" in name)
    model(X).square().mean().backward()


def checkpointed(model: Reader) -> None:
    checkpoint(model, X, use_reentrant=False).square().mean().backward()


def reentrant(model: Reader) -> None:
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).square().mean().backward()


def in_chunks(model: Reader) -> None:
    model(X, chunk=2).square().mean().backward()


def in_uneven_chunks(model: Reader) -> None:
    model(X, chunk=4).square().mean().backward()


def in_cut_chunks(model: Reader) -> None:
    model(X, chunk=3, cut=True).square().mean().backward()


def without_head(model: Reader) -> None:
    model.rnn(X)[1][1][0].square().sum().backward()  # c of the lower layer alone


STEPS = [
    twice, of_some, frozen, frozen_below, checkpointed, reentrant, in_chunks, in_uneven_chunks,
    in_cut_chunks, without_head,
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_kind_of_step_gives_the_exact_totals(step: Callable[[Reader], None]) -> None:
    found = []
    for exact in (True, False):
        with gradflow.record(model := Reader(), exact=exact) as recording:
            step(model)
        found.append(recording)
    assert came_through_phantoms(found[1])
    for track, same in zip(*(recording.values() for recording in found), strict=True):
        for name in ("grad_h", "grad_c", "grad_h_direct"):
            assert off(getattr(track, name), getattr(same, name)) < ROUNDING, name


def test_where_phantoms_got_no_gradient_totals_are_scanned() -> None:
    with gradflow.record(model := Reader(), exact=False) as recording:
        model(X).square().mean().backward()
    with gradflow.record(model := Reader()) as plain:
        model(X).square().mean().backward()
    for inner in recording["rnn.l0"].source.loop.groups[0].call.inner:  # type: ignore[attr-defined]
        inner.graph_tasks.clear()
    assert not came_through_phantoms(recording)
    assert off(plain["rnn.l0"].grad_h, recording["rnn.l0"].grad_h) < ROUNDING


def test_a_gradient_that_a_phantom_got_wrong_would_be_seen() -> None:
    with gradflow.record(model := Reader(), exact=False) as recording:
        model(X).square().mean().backward()
    for inner in recording["rnn.l0"].source.loop.groups[0].call.inner:  # type: ignore[attr-defined]
        inner.grads["phantom"] *= 1.01
    with gradflow.record(model := Reader()) as plain:
        model(X).square().mean().backward()
    assert off(plain["rnn.l0"].grad_h, recording["rnn.l0"].grad_h) > ROUNDING
    assert recording["rnn.l0"].parity.status == "failed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_as_it_is(dtype: torch.dtype) -> None:
    outputs = []
    for exact in (True, False):
        rnn = Reader().rnn.to(dtype)
        with gradflow.record(rnn, exact=exact) as recording:
            outputs.append(rnn(X.to(dtype))[0])
            outputs[-1].sum().backward()
    assert torch.equal(*outputs)
    assert not came_through_phantoms(recording)


def test_random_numbers_go_on_as_in_a_plain_step() -> None:
    numbers = []
    for exact in (True, False):
        torch.manual_seed(3)
        rnn = nn.LSTM(3, 4, 3, dropout=0.5)
        with gradflow.record(rnn, exact=exact):
            rnn(torch.randn(5, 2, 3))[0].sum().backward()
        numbers.append(torch.rand(1))
    assert torch.equal(*numbers)


def test_a_wrong_call_fails_as_it_does_without() -> None:
    rnn = nn.LSTM(3, 4).double()
    words = []
    for exact in (True, False):
        with gradflow.record(rnn, exact=exact):
            rnn(X)[0].sum().backward()
            with pytest.raises(RuntimeError) as error:
                torch._VF.lstm(X[..., :2], (X[:1, :, :1],) * 2, rnn._flat_weights, *FLAGS)
        words.append(str(error.value))
    assert words[0] == words[1]


FLAGS = (True, 1, 0.0, True, False, False)


def test_exact_is_true_or_false() -> None:
    with (
        pytest.raises(InputError, match="exact must be True or False"),
        gradflow.record(Reader(), exact=1),
    ):  # type: ignore[arg-type]
        pass
