"""Loops over stacked cells, drawn: each against autograd on an unrolled float64 twin of the loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import compare
import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import Run, State
from torch import Tensor, nn

import gradflow
from gradflow.recording import Track

pytestmark = pytest.mark.usefixtures("one_thread")

BETWEEN = ("nothing", "done masks", "detached", "state dropout", "zoneout", "masks and detached")
LOSSES = ("all", "last", "middle", "two steps")


@dataclass(frozen=True)
class LoopCase:
    """One loop over a stack of cells; the defaults are left out of the id."""

    kind: str
    layers: int = 1
    between: str = "nothing"
    dropout: bool = False  # on the way from one layer to the next
    bias: bool = True
    initial: bool = False
    loss: str = "all"
    reads_c: bool = False
    dtype: str = "float64"
    steps: int = 6
    batch: int = 3
    seed: int = 0

    def __str__(self) -> str:
        words = [self.kind]
        for setting in fields(self)[1:]:
            value = getattr(self, setting.name)
            if value != setting.default:
                words.append(setting.name if value is True else f"{setting.name}={value}")
        return "-".join(words)

    @property
    def zoned_out(self) -> bool:
        return self.between == "zoneout"


class Stack(nn.Module):
    """What a user writes: one state per cell, changed between two steps, upper cells on top."""

    def __init__(self, case: LoopCase) -> None:
        super().__init__()
        self.case = case
        self.cells = nn.ModuleList(
            loops.cell_of(case.kind, bias=case.bias, inputs=loops.HIDDEN if layer else loops.INPUTS)
            for layer in range(case.layers)
        )
        generator = torch.Generator().manual_seed(50 + case.seed)
        with torch.no_grad():
            for weight in self.parameters():
                drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_((drawn * 2 - 1) * 0.8)

    def draw(self, *key: int) -> Tensor:
        """(B, H) of numbers between 0 and 1 that depend on the key alone."""
        number = sum(place * 7919**power for power, place in enumerate((self.case.seed, *key)))
        generator = torch.Generator().manual_seed(number)
        return torch.rand(self.case.batch, loops.HIDDEN, generator=generator, dtype=torch.float64)

    def between(self, layer: int, t: int, state: State, before: State) -> State:
        """The state that step t starts from, out of what step t − 1 returned and began with."""
        kind, dtype = self.case.between, state[0].dtype
        if kind in ("done masks", "masks and detached"):
            alive = (self.draw(t)[:, :1] > 0.25).to(dtype)
            state = tuple(s * alive for s in state)
        if kind in ("detached", "masks and detached") and t % 3 == 2:
            state = tuple(s.detach() for s in state)
        if kind == "state dropout":
            keep = (self.draw(t, layer) > 0.3).to(dtype) / 0.75  # exact in both precisions
            state = (state[0] * keep, *state[1:])
        if kind == "zoneout":
            old = (self.draw(t, layer) > 0.6).to(dtype) * 0.75
            state = tuple((1 - old) * s + old * b for s, b in zip(state, before, strict=True))
        return state

    def forward(self, x: Tensor) -> list[Run]:
        runs = [Run() for _ in self.cells]
        for t, x_t in enumerate(x):
            data = x_t
            for layer, (cell, found) in enumerate(zip(self.cells, runs, strict=True)):
                state = self.start(layer, x.dtype)
                if t:
                    began = found.began[-1]
                    assert began is not None
                    state = self.between(layer, t, found.returned[-1], began)
                found.began.append(state)
                returned = loops.as_state(cell(data, loops.as_argument(state)))
                found.returned.append(returned)
                found.read.append(tuple(s.clone() for s in returned))
                data = found.read[-1][0]
                if self.case.dropout:
                    data = data * (self.draw(t, layer, 1) > 0.3).to(x.dtype) / 0.75
        return runs

    def start(self, layer: int, dtype: torch.dtype) -> State:
        states = 2 if self.case.kind == "LSTM" else 1
        scale = 1.0 if self.case.initial else 0.0
        return tuple((scale * (self.draw(layer, s, 2) - 0.5)).to(dtype) for s in range(states))

    def loss(self, runs: list[Run]) -> Tensor:
        steps = self.case.steps
        chosen = {
            "all": None,
            "last": [steps - 1],
            "middle": [steps // 2],
            "two steps": [0, steps - 2],
        }[self.case.loss]
        return loops.loss_of(runs[-1], chosen, self.case.reads_c)


def seen(case: LoopCase) -> tuple[list[Track], list[Run], Stack]:
    """The tracks of a recorded loop, and the runs of its float64 twin with all gradients kept."""
    twin = Stack(case)
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.steps, case.batch, loops.INPUTS)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).float().double()
    dtype = getattr(torch, case.dtype)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.copy_(weight.float())  # what both precisions can hold
    model = copy.deepcopy(twin).to(dtype)
    with gradflow.record(model) as recording:
        model.loss(model(x.to(dtype))).backward()
    runs = [found.keep() for found in twin(x)]
    twin.loss(runs).backward(retain_graph=True)
    assert list(recording.tracks) == [f"cells.{layer}" for layer in range(case.layers)]
    return list(recording.values()), runs, twin


def check(case: LoopCase) -> None:
    """Everything a track of the loop says."""
    tracks, runs, twin = seen(case)
    single = case.dtype == "float32"
    for layer, (track, found) in enumerate(zip(tracks, runs, strict=True)):
        assert (track.cell, track.steps, track.batch) == (case.kind, case.steps, case.batch)
        for place, name in enumerate(track.states):
            want = found.grad("returned", place)
            compare.assert_steps_close(
                track.states[name], found.values(place), track.mask, what=name
            )
            compare.assert_steps_close(track.grads[name], want, track.mask, what=f"grad_{name}")
        # a difference of totals: in float32 its rounding is that of the totals
        if not single:
            want = found.grad("read", 0)
            compare.assert_steps_close(track.grad_h_direct, want, track.mask, what="direct")
        assert track.parity.status == "passed", track.parity
        check_cuts_and_operator(case, layer, track, found, twin, bound=1e-4 if single else None)


def check_cuts_and_operator(
    case: LoopCase, layer: int, track: Track, found: Run, twin: Stack, bound: float | None
) -> None:
    """Step Jacobians with what happens between two calls, dense by autograd."""
    operator, cell = track.operator(), twin.cells[layer]
    size = operator.size
    eye = torch.eye(size, dtype=torch.float64).expand(case.batch, size, size)
    cuts = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    one = torch.ones(1, case.batch, dtype=torch.bool)
    for t in range(1, case.steps):
        data = track.inputs[t].double()
        returned, began = found.returned, found.began

        def step(*s: Tensor, data: Tensor = data) -> State:
            return loops.as_state(cell(data, loops.as_argument(s)))

        if case.zoned_out:

            def advance(*s: Tensor, t: int = t) -> State:
                after = step(*s)
                return twin.between(layer, t + 1, after, s) if t + 1 < case.steps else after

            dense = loops.dense_map(advance, began[t])
        else:
            before, earlier = returned[t - 1], began[t - 1]
            link = loops.dense_map(lambda *s, t=t, b=earlier: twin.between(layer, t, s, b), before)
            cuts[t] = (link == 0).all(2).all(1)
            dense = loops.dense_map(step, began[t]) @ link
        pushed = operator.push(t, eye).transpose(1, 2)
        pulled = operator.pull(t, eye)
        compare.assert_steps_close(pushed[None], dense[None], one, what=f"A_{t}", bound=bound)
        compare.assert_steps_close(pulled[None], dense[None], one, what=f"A_{t}ᵀ", bound=bound)
    assert torch.equal(track.cuts, cuts)


LISTED = [
    LoopCase("LSTM", layers=2, between="done masks", loss="last"),
    LoopCase("GRU", layers=3, between="masks and detached", dropout=True),
    LoopCase("RNN_TANH", layers=2, between="zoneout", initial=True, bias=False),
    LoopCase("RNN_RELU", between="state dropout", loss="two steps", batch=1),
    LoopCase("LSTM", layers=2, between="zoneout", reads_c=True, dropout=True, loss="last"),
    LoopCase("GRU", between="detached", dtype="float32", layers=2),
]


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_listed_loops(case: LoopCase) -> None:
    check(case)


@st.composite
def drawn_loops(draw: st.DrawFn) -> LoopCase:
    kind = draw(st.sampled_from(loops.CELLS))
    return LoopCase(
        kind=kind,
        layers=draw(st.integers(1, 3)),
        between=draw(st.sampled_from(BETWEEN)),
        dropout=draw(st.booleans()),
        bias=draw(st.booleans()),
        initial=draw(st.booleans()),
        loss=draw(st.sampled_from(LOSSES)),
        reads_c=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float64", "float64", "float32"])),
        steps=draw(st.integers(2, 7)),
        batch=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 50)),
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=drawn_loops())
def test_any_drawn_loop(case: LoopCase) -> None:
    check(case)


def test_the_comparison_fails_where_one_mask_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above could not see that what lies between two calls is part of it."""
    case = LoopCase("LSTM", between="done masks")
    tracks, _, _ = seen(case)
    monkeypatch.setattr(Stack, "between", lambda self, layer, t, state, before: state)
    _, unmasked, _ = seen(case)
    want = unmasked[0].grad("returned", 0)
    with pytest.raises(AssertionError, match="grad_h"):
        compare.assert_steps_close(tracks[0].grad_h, want, tracks[0].mask, what="grad_h")
