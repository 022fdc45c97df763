"""Functions of other packages against explicit loops: states, what is read of them, totals.

The oracle is autograd on the loop of the paper's equations, in float64. Functions that compute in
float32 whatever they are given are held to float32 in what they return, their states and totals to
float64, since those come from the arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import explicit
import pytest
import torch
from compare import FLOAT32_BOUND, assert_steps_close, assert_whole_close
from functions import CASES, IDS, Case, loaded
from seam import Scanned
from torch import Tensor, nn

import gradflow
from gradflow.hooks import patch


class Ear:
    """Hears of scans alone."""

    def __init__(self, model: nn.Module) -> None:
        self.thread = threading.get_ident()
        self.model = model
        self.heard: list[Scanned] = []
        self.missed: list[str] = []

    def modules(self) -> Iterable[nn.Module]:
        return self.model.modules()

    def path_of(self, module: nn.Module) -> str | None:
        return "layer" if module is self.model else None

    def saw_scan(self, scanned: Scanned, code: Any = ()) -> None:
        self.heard.append(scanned)

    def missed_scan(self, name: str, why: str) -> None:
        self.missed.append(why)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def hear(layer: nn.Module) -> tuple[Any, Ear]:
    """What the layer returned, and what was heard of it."""
    ear = Ear(layer)
    patch.listen(ear)  # type: ignore[arg-type]
    try:
        return layer(), ear
    finally:
        patch.stop_listening(ear)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_function_is_its_equations(case: Case, dtype: torch.dtype) -> None:
    loaded(case)
    given, of_loop = case.make(dtype)
    results, ear = hear(case.call(given))
    assert ear.missed == []
    (scanned,) = ear.heard
    output = results[0] if isinstance(results, tuple) else results
    in_double = {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in of_loop.items()
    }
    y, states = case.loop(**in_double)
    # the gradient of a loss that reads y, and the last state where the function returns it
    r = torch.randn_like(y)
    loss = (r * y).sum()
    final = case.final(results)
    if final is not None:
        q = torch.randn(states[-1].shape, dtype=torch.float64)
        loss = loss + (q * states[-1]).sum()
    wanted = torch.autograd.grad(loss, states, allow_unused=True)
    totals = torch.stack([torch.zeros_like(states[0]) if g is None else g for g in wanted])

    made = scanned.make()
    found = made.states()
    mask = torch.ones(found.shape[:2], dtype=torch.bool)
    assert scanned.steps == len(states)
    assert (scanned.batch, *scanned.shape) == tuple(states[0].shape)
    assert_steps_close(found, torch.stack(states).detach(), mask, what="states")
    bound = FLOAT32_BOUND if case.single else None
    assert made.read is not None
    assert_whole_close(made.read(found).to(dtype), y.detach(), what="y")
    assert_whole_close(output.to(dtype), y.detach(), what="what it returned", bound=bound)
    direct = made.direct(found, r.to(found.dtype))
    if final is not None:
        assert scanned.final is final
        assert_whole_close(case.turned(final).to(dtype), states[-1].detach(), bound=bound)
        back = scanned.final_back or (lambda grad: grad)
        given_back = case.turned(q) if scanned.final_back else q
        direct = direct.clone()
        direct[-1] += back(given_back).to(direct.dtype)
    got = made.totals(direct)
    assert_steps_close(got, totals, mask, what="totals")
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_steps_close(got * (1 + 3 * FLOAT32_BOUND), totals, mask)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_recording_has_the_totals_of_what_is_read_and_of_the_last_state(case: Case) -> None:
    loaded(case)
    given, of_loop = case.make(torch.float64)
    y, states = case.loop(**of_loop)
    r, q = torch.randn_like(y), torch.randn_like(states[-1])
    layer = case.call(given)
    with gradflow.record(layer) as recording:
        results = layer()
        loss = (r * (results[0] if isinstance(results, tuple) else results)).sum()
        final = case.final(results)
        if final is not None:
            loss = loss + (q * case.turned(final)).sum()
        loss.backward()
    of_loop_too = (r * y).sum() + (0.0 if final is None else (q * states[-1]).sum())
    wanted = torch.autograd.grad(of_loop_too, states, allow_unused=True)
    totals = [torch.zeros_like(states[0]) if g is None else g for g in wanted]
    (track,) = recording.values()
    assert track.grad_h is not None
    mask = torch.ones(track.grad_h.shape[:2], dtype=torch.bool)
    bound = FLOAT32_BOUND if case.single else None
    expected = torch.stack(totals).flatten(2)
    assert_steps_close(track.grad_h, expected, mask, what="totals", bound=bound)


CARRYING = [case for case in CASES if case.first]


@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("case", CARRYING, ids=[case.name for case in CARRYING])
def test_a_state_that_is_carried_on(case: Case, detached: bool) -> None:
    loaded(case)
    (one, loop_one), (two, loop_two) = case.make(torch.float64), case.make(torch.float64)

    class Both(nn.Module):
        def forward(self) -> tuple[Tensor, Tensor]:
            y, final = self.call(one)
            final = final.detach() if detached else final
            again, _ = self.call(two | {case.first: final})
            return y, again

        def call(self, arguments: dict[str, Any]) -> Any:
            return case.function_of(self, arguments)

    model = Both()
    y, states = case.loop(**loop_one)
    last = states[-1].detach().requires_grad_() if detached else states[-1]
    later, more = case.loop(**(loop_two | {"first": case.turned(last)}))
    r, s = torch.randn_like(y), torch.randn_like(later)
    with gradflow.record(model) as recording:
        first, second = model()
        ((r * first).sum() + (s * second).sum()).backward()
    every = [*states, *more]
    totals = torch.autograd.grad((r * y).sum() + (s * later).sum(), every)
    (track,) = recording.values()
    assert bool(track.cuts[len(states)].all()) == detached
    assert any("no gradient comes back to it" in note for note in track.notes) == detached
    assert track.grad_h is not None
    mask = torch.ones(track.grad_h.shape[:2], dtype=torch.bool)
    bound = FLOAT32_BOUND if case.single else None
    expected = torch.stack(totals).flatten(2)
    assert_steps_close(track.grad_h, expected, mask, what="totals", bound=bound)


class Chunks(nn.Module):
    """RWKV-4's attention over two chunks, the three parts of its state handed on."""

    def forward(self, given: list[dict[str, Any]], detached: bool) -> Tensor:
        function = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
        read, state = [], None
        for arguments in given:
            attention = function.rwkv_linear_attention
            y, state = attention(**arguments, state=state, return_state=True)
            state = [part.detach() for part in state] if detached else state
            read.append(y)
        return torch.cat(read, 1)


def test_the_state_of_rwkv_that_is_handed_on_detached_is_a_cut() -> None:
    pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    (case,) = [case for case in CASES if case.name == "rwkv"]
    one, two = case.make(torch.float64)[0], case.make(torch.float64)[0]
    two |= {name: one[name] for name in ("time_decay", "time_first")}
    model = Chunks()
    with gradflow.record(model) as recording:
        model([one, two], detached=True).square().sum().backward()
    (track,) = recording.values()
    half = track.steps // 2
    assert track.cuts.all(1).nonzero().flatten().tolist() == [half]
    with gradflow.record(model) as recording:
        model([one], detached=True).square().sum().backward()
    (alone,) = recording.values()
    mask = torch.ones(half, track.batch, dtype=torch.bool)
    assert alone.grad_h is not None and track.grad_h is not None
    assert_steps_close(track.grad_h[:half], alone.grad_h, mask, what="totals")
    with (
        pytest.warns(gradflow.GradflowWarning, match="detach them"),
        gradflow.record(model) as recording,
    ):
        model([one, two], detached=False).square().sum().backward()
    assert "RWKV" not in {each.cell for each in recording.values()}


class Parts(nn.Module):
    """An mLSTM over parts of a sequence, or step by step, its three states handed on without gradient."""

    def forward(self, given: dict[str, Tensor], cuts: list[int]) -> Tensor:
        kernels = pytest.importorskip("mlstm_kernels.torch.chunkwise.native")
        steps = pytest.importorskip("mlstm_kernels.torch.recurrent.native_step")
        read, state = [], (None, None, None)
        for start, end in pairwise(cuts):
            part = [x[:, :, start:end] for x in given.values()]
            if end - start > 1:
                ends = dict(zip(("c_initial", "n_initial", "m_initial"), state, strict=True))
                y, state = kernels.mlstm_chunkwise__native_autograd(
                    *part, **ends, return_last_states=True, eps=0.0, chunk_size=end - start
                )
            else:
                one = [*(x[:, :, 0] for x in part[:3]), *part[3:]]
                y, state = steps.mlstm_recurrent_step__native(
                    *one, *state, eps=0.0, dtype_state=torch.float64
                )
                y = y.unsqueeze(2)
            state = tuple(each.detach() for each in state)
            read.append(y)
        return torch.cat(read, 2)


@pytest.mark.parametrize("cuts", [[0, 8, 16], [0, 8, 9, 10]], ids=["chunks", "then steps"])
def test_an_mlstm_goes_on_from_a_state_that_is_given(cuts: list[int]) -> None:
    for name in ("chunkwise.native", "recurrent.native_step"):  # before a recording opens
        pytest.importorskip(f"mlstm_kernels.torch.{name}")
    given = {name: torch.randn(2, 3, cuts[-1], 4, dtype=torch.float64) for name in "qkv"}
    given |= {name: torch.randn(2, 3, cuts[-1], dtype=torch.float64) for name in "if"}
    given["v"].requires_grad_()
    model = Parts()
    with gradflow.record(model) as recording:
        y = model(given, cuts)
        y.square().sum().backward()
    gates = {name: given[name].unsqueeze(-1) for name in "if"}
    loop = (
        given | gates | {"q": given["q"] / 2, "k": given["k"] * 2}
    )  # √d_k is on the other one there
    again, states = explicit.mlstm(**loop, eps=0.0)
    assert_whole_close(y.detach(), again.detach(), what="y", bound=FLOAT32_BOUND)
    (track,) = recording.values()
    cut = [int(t) for t in track.cuts.all(1).nonzero()]
    assert cut == cuts[1:-1]
    mask = torch.ones(track.h.shape[:2], dtype=torch.bool)
    assert_steps_close(track.h, torch.stack(states).detach().flatten(2), mask, what="states")
    assert track.grad_h is not None
    end = cuts[-2]  # nothing comes back to what was before
    wanted = torch.autograd.grad(again[:, :, end:].square().sum(), states[end:])
    expected = torch.stack(wanted).flatten(2)
    assert_steps_close(track.grad_h[end:], expected, mask[end:], what="totals", bound=1e-6)
