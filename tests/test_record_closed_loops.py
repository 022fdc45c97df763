"""Closed loops: the product of all A_t against autograd over the loop run from independent states."""

from __future__ import annotations

import html
import io
from pathlib import Path

import closed_loops as loops
import pytest
import torch
from closed_loops import Loop, advanced, made
from rich.console import Console
from seam import number, render
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.analyzer import step_jacobians
from gradflow.errors import RecordingError
from gradflow.recording import Recording


def recorded(model: Loop, batch: int = loops.B, **options: object) -> tuple[object, list]:
    with gradflow.record(model, **options) as recording:
        states = model(batch)
        sum((value**2).sum() for value in states[-1].values()).backward()
    return recording, states


def rows_of(model: Loop, state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].detach() for name in model.names], dim=1)


def same(mine: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def hidden(model: Loop, name: str) -> bool:
    """Whether a kernel returns a state of which h, or a layer above, is no child in the graph."""
    fused = isinstance(model, loops.Fused | loops.Stack | loops.WholeChunks)
    return fused and (name.endswith(("c", "output")) or "l0" in name)


def product(matrices: Tensor, start: int, end: int) -> Tensor:
    """P(end ← start) of one sequence."""
    found = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    for t in range(start + 1, end + 1):
        found = matrices[t] @ found
    return found


JOINT = {
    "rnn cell": (loops.Decoder, nn.RNNCell),
    "gru cell": (loops.Decoder, nn.GRUCell),
    "lstm cell": (loops.Decoder, nn.LSTMCell),
    "fused rnn": (loops.Fused, nn.RNN, False),
    "fused gru, batch first": (loops.Fused, nn.GRU, True),
    "fused lstm": (loops.Fused, nn.LSTM, False),
    "fused lstm, batch first": (loops.Fused, nn.LSTM, True),
    "teacher forcing, then free": (loops.Forced, nn.LSTMCell),
    "scheduled sampling": (loops.Sampled, nn.GRUCell),
    "imputation": (loops.Imputing, nn.LSTMCell),
    "attention over an encoder": (loops.Attending,),
    "world model": (loops.WorldModel,),
    "running output": (loops.Running,),
    "state two steps back": (loops.Delayed,),
    "upper cell feeds lower": (loops.TwoCells,),
    "running output, a cell of one's own": (loops.Running, loops.Own),
    "state two steps back, a cell of one's own": (loops.Delayed, loops.Own),
    "a key three steps back, a cell of one's own": (loops.Late, loops.Own),
    "upper cell feeds lower, which is one's own": (loops.TwoCells, loops.Own),
    "fused stack": (loops.Stack,),
    "chunks that read whole chunks": (loops.WholeChunks, nn.GRU, 1, False),
    "the same, a stack, batch first": (loops.WholeChunks, nn.LSTM, 2, True),
}


@pytest.mark.parametrize("case", JOINT.values(), ids=JOINT)
def test_the_product_of_all_steps_is_that_of_autograd(case: tuple) -> None:
    model = made(*case)
    recording, _ = recorded(model)
    track = recording[model.track]
    assert list(track.states) == list(model.names)
    matrices = step_jacobians(track)
    start, end = model.begins - 1, loops.T - 1
    for b in range(loops.B):
        whole = model(loops.B)  # the noise and the memory of the whole batch
        rows = rows_of(model, whole[start])
        exact = torch.autograd.functional.jacobian(
            lambda one, b=b, rows=rows: advanced(
                model, torch.cat([rows[:b], one[None], rows[b + 1 :]]), start, end
            )[b],
            rows[b],
        )
        rows_known = None if model.whole else loops.H
        exact, mine = exact[:rows_known], product(matrices[:, b], start, end)[:rows_known]
        assert same(mine, exact) and not same(mine * (1 + 1e-8), exact)


@pytest.mark.parametrize("case", JOINT.values(), ids=JOINT)
def test_totals_compose_by_the_joint_steps(case: tuple) -> None:
    model = made(*case)
    recording, _ = recorded(model)
    plain = made(*case)
    twin = plain(loops.B)
    for state in twin:
        for value in state.values():
            if value.requires_grad:
                value.retain_grad()
    sum((value**2).sum() for value in twin[-1].values()).backward()
    track, compared = recording[model.track], 0
    for t, state in enumerate(twin):
        for name, value in state.items():
            known = name in track.grads and value.grad is not None
            if known and "carried" not in name and not hidden(model, name):
                assert same(track.grads[name][t], value.grad), (t, name)
                compared += 1
    assert compared
    partial = track.partial_grads
    if partial is not None:
        rows = torch.cat([partial[name] for name in model.names], dim=2)
        matrices = step_jacobians(track)
        for t in range(model.begins - 1, loops.T - 2 if model.whole else 0):
            carried = torch.einsum("bij,bi->bj", matrices[t + 1], rows[t + 1])
            assert same(rows[t], carried), t


CHANGING = {
    "gru, shrinking": (loops.Changing, nn.GRUCell, loops.SHRINKING),
    "lstm, some are kept": (loops.Changing, nn.LSTMCell, loops.KEPT),
    "fused lstm, some are kept": (loops.ChangingFused, nn.LSTM, loops.KEPT),
    "rnn, permuted": (loops.Changing, nn.RNNCell, loops.PERMUTED),
    "one's own, some are kept": (loops.Changing, loops.Own, loops.KEPT),
    "two cells, some are kept": (loops.ChangingTwo, nn.GRUCell, loops.KEPT),
    "two cells, permuted": (loops.ChangingTwo, loops.Own, loops.PERMUTED),
}


@pytest.mark.parametrize("case", CHANGING.values(), ids=CHANGING)
def test_a_closed_loop_whose_batch_changes_has_a_product_for_every_sequence(case: tuple) -> None:
    """Sequences are named by their first place; every one is followed to its own last step."""
    model, losses = made(*case), []
    with gradflow.record(model) as recording:
        states = model(loops.B)
        losses = [(value**2).sum() for state in states for value in state.values()]
        sum(losses).backward()
    track = recording[model.track]
    matrices, names = step_jacobians(track), [list(range(loops.B))]
    for rows in model.rows[1:]:
        names.append([names[-1][row] for row in rows])
    assert track.lengths.tolist() == [sum(b in alive for alive in names) for b in range(loops.B)]
    for b, length in enumerate(track.lengths.tolist()):
        model(loops.B)
        rows, at, last = rows_of(model, states[0]), names[0].index(b), names[length - 1].index(b)
        exact = torch.autograd.functional.jacobian(
            lambda one, rows=rows, at=at, last=last, end=length - 1: advanced(
                model, torch.cat([rows[:at], one[None], rows[at + 1 :]]), 0, end
            )[last],
            rows[at],
        )
        mine = product(matrices[:, b], 0, length - 1)
        assert same(mine, exact) and not same(mine * (1 + 1e-8), exact)
    assert gradflow.analyze(recording)[model.track].sentence
    if track.last_grads is not None:
        model.zero_grad()
        with gradflow.record(model) as again:
            ends = {b: (n - 1, names[n - 1].index(b)) for b, n in enumerate(track.lengths.tolist())}
            states = model(loops.B)
            sum(
                (v[at] ** 2).sum() for t, at in ends.values() for v in states[t].values()
            ).backward()
        for name, grad in again[model.track].grads.items():
            assert torch.allclose(
                track.last_grads[name], grad, rtol=1e-9, atol=1e-12, equal_nan=True
            )


def test_open_loops_stay_as_they_are() -> None:
    model = made(loops.Open)
    recording, _ = recorded(model)
    for name in ("lower", "upper"):
        track = recording[name]
        assert track.alone is None and track.notes == []


def test_detached_feedback_is_no_loop() -> None:
    model = made(loops.Detached, nn.GRUCell)
    recording, _ = recorded(model)
    assert recording["cell"].alone is None and recording["cell"].notes == []


@pytest.mark.parametrize("nodes", [12, 20])  # written out, and by products
@pytest.mark.parametrize("kind", [nn.GRUCell, loops.Own])
def test_a_ring_of_nodes_is_one_system(kind: type[nn.Module], nodes: int) -> None:
    model = made(loops.Ring, kind)
    recording, states = recorded(model, nodes)
    track = recording["loop"]
    assert track.batch == 1
    exact = torch.autograd.functional.jacobian(
        lambda row: advanced(model, row.view(nodes, -1), 0, loops.T - 1).flatten(),
        rows_of(model, states[0]).flatten(),
    )
    assert same(product(step_jacobians(track)[:, 0], 0, loops.T - 1), exact)
    with pytest.raises(RecordingError, match="a part of loop, a closed loop that is judged as one"):
        recording["cell"].operator()


@pytest.mark.parametrize(
    ("case", "batch", "words"),
    [
        ((loops.Remembering,), 3, "attention over all earlier steps"),
        ((loops.Remembering, loops.Own), 3, "attention over all earlier steps"),
    ],
    ids=["own attention", "the same over an own cell"],
)
def test_what_has_no_gain_is_refused_in_its_words(case: tuple, batch: int, words: str) -> None:
    model = made(*case)
    recording, _ = recorded(model, batch)
    track = recording["cell"]
    with pytest.raises(RecordingError, match=words):
        track.operator()
    assert track.has_gradient
    assert any(words in note for note in track.notes)
    layer = gradflow.analyze(recording)["cell"]
    assert words in layer.sentence and layer.verdict == "inconclusive"
    assert "no gains" in layer.labels
    assert (layer.alone is None) == (track.cell == "Own")


def test_chunks_have_one_step_per_call() -> None:
    model = made(loops.Chunks)
    recording, states = recorded(model)
    closed = [track for track in recording.values() if track.cell == "loop"]
    assert [track.steps for track in closed] == [loops.T]
    exact = torch.autograd.functional.jacobian(
        lambda row: advanced(
            model, torch.cat([row[None], rows_of(model, states[0])[1:]]), 0, loops.T - 1
        )[0],
        rows_of(model, states[0])[0],
    )
    assert same(product(step_jacobians(closed[0])[:, 0], 0, loops.T - 1), exact)


@pytest.mark.parametrize(
    "case",
    [
        *(JOINT[name] for name in ("fused lstm", "lstm cell", "fused gru, batch first")),
        JOINT["fused stack"],
        (loops.Chunks,),
    ],
)
def test_the_last_loss_step_alone_is_that_of_a_loss_at_the_last_step(case: tuple) -> None:
    alone, _ = recorded(made(*case))
    model = made(*case)
    with gradflow.record(model) as every:
        states = model(loops.B)
        sum((value**2).sum() for state in states for value in state.values()).backward()
    last = every[model.track].last_grads
    assert last is not None
    for name, grad in alone[model.track].grads.items():
        assert same(last[name], grad), name
    for track in every.values():  # of a chunk all steps are not known
        if track.last_grads is not None or not isinstance(model, loops.Chunks):
            for name, grad in alone[track.name].grads.items():
                assert same(track.last_grads[name], grad), (track.name, name)
    assert gradflow.analyze(every)[model.track].sentence


def fed_back(kind: type[nn.Module]) -> Loop:
    """A decoder whose recurrent weights are small, while what is fed back keeps its length."""
    model = made(loops.Decoder, kind)
    cell = model.cell
    own = isinstance(cell, loops.Own)
    weights = (cell.into.weight, cell.back.weight) if own else (cell.weight_ih, cell.weight_hh)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for weight in (*weights, model.out.weight):
            nn.init.orthogonal_(weight)
        weights[1].mul_(0.02)
    return model


def test_the_verdict_is_of_the_loop_and_not_of_the_cell() -> None:
    layers = {}
    for kind in (nn.RNNCell, loops.Own):
        torch.manual_seed(0)
        model = fed_back(kind)
        with gradflow.record(model) as recording:
            torch.manual_seed(0)
            model.noise = 0.02 * torch.randn(40, 4, loops.H, dtype=torch.float64)
            state, found = model.begin(4), []
            for t in range(40):
                state = model.step(state, t)
                found.append(state["h"])
            found[-1].sum().backward()
        layers[kind] = gradflow.analyze(recording)["cell"]
    stock, own = layers[nn.RNNCell], layers[loops.Own]
    assert stock.verdict == own.verdict == "stable" and stock.channels == own.channels
    assert abs(stock.rate.value) < 0.03 and stock.alone is not None
    assert stock.alone.rate.value == pytest.approx(-3.9, abs=0.1)  # ln 0.02
    assert stock.alone.horizon == 2


def test_truncation_cuts_a_closed_loop_where_state_and_input_are_detached() -> None:
    model = made(loops.Decoder, nn.GRUCell)
    with gradflow.record(model) as recording:
        model.noise = torch.ones(1, 2, loops.H, dtype=torch.float64)
        state = model.begin(2)
        for t in range(9):
            x = model.feed(state["h"], t)
            if t % 3 == 0:
                x = x.detach()
            start = state["h"].detach() if t % 3 == 0 else state["h"]
            state = {"h": model.cell(x, start)}
            if t % 3 == 2:
                state["h"].sum().backward()
                state = {"h": state["h"].detach()}
    assert recording["cell"].cuts.all(1).nonzero().flatten().tolist() == [3, 6]
    assert len(recording["cell"].notes) == 1


def test_a_detached_state_whose_output_is_fed_back_is_no_cut() -> None:
    model = made(loops.Decoder, nn.GRUCell)
    with gradflow.record(model) as recording:
        model.noise = torch.ones(1, 2, loops.H, dtype=torch.float64)
        state = model.begin(2)
        for t in range(6):
            state = {"h": model.cell(model.feed(state["h"], t), state["h"].detach())}
        state["h"].sum().backward()
    assert not bool(recording["cell"].cuts.any())


def without_a_graph(cell: nn.Module, x: Tensor, *, given: bool) -> Recording:
    with gradflow.record(cell) as recording, torch.no_grad():
        h = torch.zeros(2, 3)
        for x_t in x:
            h = cell(x_t if given else h, h)
    return recording


@pytest.mark.parametrize(("given", "told"), [(True, False), (False, True)])
def test_without_a_graph_it_is_said_that_nothing_can_be_told(given: bool, told: bool) -> None:
    with pytest.warns(gradflow.errors.GradflowWarning, match="no_grad"):
        recording = without_a_graph(nn.GRUCell(3, 3), torch.randn(6, 2, 3), given=given)
    assert ("cannot be told" in recording["cell"].inputs_unknown) == told
    assert ("cannot be told" in gradflow.analyze(recording)["cell"].sentence) == told


@pytest.mark.parametrize("fed_back", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "step by step"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_closed_loop_in_a_checkpoint_gets_no_verdict_and_is_told_how_to_get_one(
    reentrant: bool, whole: bool, fed_back: bool
) -> None:
    """An open loop keeps its verdict: the second run shows that its inputs were given."""
    model = made(loops.Decoder, nn.GRUCell)
    given = torch.randn(12, 2, loops.H, dtype=torch.float64)

    def run(x: Tensor, h: Tensor, steps: range) -> tuple[Tensor, Tensor]:
        for t in steps:
            h = model.cell(x if fed_back else model.out(given[t]), h)
            x = model.out(h) if fed_back else x
        return x, h

    x = torch.ones(2, loops.H, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(2, loops.H, dtype=torch.float64)
    with gradflow.record(model) as recording:
        for steps in [range(12)] if whole else [range(t, t + 1) for t in range(12)]:
            x, h = checkpoint(run, x, h, steps, use_reentrant=reentrant)
        (h**2).sum().backward()
    layer, track = gradflow.analyze(recording)["cell"], recording["cell"]
    if not fed_back:
        assert "no gains" not in layer.labels and track.inputs_unknown == ""
        return
    assert layer.verdict == "inconclusive" and "no gains" in layer.labels
    assert "record one step without the checkpoint" in layer.sentence
    assert track.has_gradient and track.last_grads is None


def test_what_is_alone_is_saved_and_read_again(tmp_path: Path) -> None:
    recording, _ = recorded(made(loops.Decoder, nn.GRUCell))
    analysis = gradflow.analyze(recording)
    again = gradflow.load(analysis.save(tmp_path / "run.nc"))
    assert again["cell"].alone == analysis["cell"].alone is not None
    assert (
        "\n    cell alone, its inputs held fixed, which is not what the loss sees, would"
        in repr(again)
    )


def test_the_verdict_of_several_cells_is_said_once_and_what_each_does_alone_after_it(
    tmp_path: Path,
) -> None:
    recording, _ = recorded(made(loops.TwoCells))
    analysis = gradflow.analyze(recording)
    printed = io.StringIO()
    render(analysis, Console(file=printed, width=400))
    files = gradflow.report(analysis, tmp_path / "run")
    page = html.unescape(files["report.html"].read_text()).partition("<h2>")[0]
    said = analysis["loop"].sentence.removeprefix("loop (over lower, upper)")
    for shown in (repr(analysis), printed.getvalue(), page):
        text = " ".join(shown.split())  # the terminal wraps long lines
        places = [text.find(f"{name} alone, its inputs held fixed") for name in ("lower", "upper")]
        assert text.count(said) == 1 and text.index(said) < places[0] < places[1]
    assert [layer.name for layer in analysis.told] == ["loop"]
    assert {name for name in files if "gain-map" in name} == {"figures/loop-gain-map.png"}
    assert [layer.part_of for layer in gradflow.load(files["run.nc"]).values()] == [
        "loop",
        "loop",
        "",
    ]


@pytest.mark.parametrize("case", [JOINT["gru cell"], JOINT["upper cell feeds lower"]])
def test_what_is_said_of_a_cell_alone_are_its_gain_and_horizon(case: tuple) -> None:
    """The same words as of a verdict, and the numbers of the cell run open on the same inputs."""
    recording, _ = recorded(made(*case))
    name = "cell" if case[0] is loops.Decoder else "upper"
    alone = gradflow.analyze(recording)[name].alone
    matrices = step_jacobians(recording[name].alone)
    gains = [
        float(torch.linalg.matrix_norm(product(matrices[:, b], 0, loops.T - 1), 2).log10())
        for b in range(loops.B)
    ]
    assert alone.gain.decades == pytest.approx(sum(gains) / len(gains), rel=1e-6)
    verb = "lose" if alone.gain.value < 0 else "win"
    assert f"would {verb} {number(abs(alone.gain.decades))} decades over 7 steps" in alone.sentence


def test_every_run_of_a_closed_loop_has_its_own_joint_track() -> None:
    model = made(loops.TwoCells)
    with gradflow.record(model) as recording:
        for _ in range(2):
            sum((value**2).sum() for value in model()[-1].values()).backward()
    assert [t.loop for t in recording.values() if t.loop] == ["loop", "loop", "loop@2", "loop@2"]
    with pytest.raises(RecordingError, match="upper@2: it is a part of loop@2"):
        recording["upper@2"].operator()
    layers = gradflow.analyze(recording)
    assert [layer.sequences for layer in layers.values()] == [loops.B] * 6
    assert layers["upper@2"].rate == layers["loop@2"].rate


class LstmOfOnes(nn.Module):
    """A cell of one's own; what follows it changes its h before the next call, and not its c."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 16), nn.Linear(4, 16)
        self.kept: list[Tensor] | None = None  # what crosses besides c: the gate that makes h

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.a(x) + self.b(state[0])).chunk(4, 1)
        if self.kept is not None:
            o.retain_grad()
            self.kept.append(o)
        c = state[1] * f.sigmoid() + i.sigmoid() * g.tanh()
        return c.tanh() * o.sigmoid(), c


def changed_between() -> tuple[Recording, list[Tensor]]:
    """The recording of such a loop, and ∂L/∂o of every step by autograd."""
    torch.manual_seed(0)
    cell, after, x = LstmOfOnes().double(), nn.Linear(4, 4).double(), torch.randn(7, 2, 3).double()
    model = nn.ModuleDict({"cell": cell, "after": after})

    def run() -> None:
        h = c = torch.zeros(2, 4).double()
        for x_t in x:
            h, c = cell(x_t, (h, c))
            h = torch.tanh(after(h))
        h.sum().backward()

    with gradflow.record(model) as recording:
        run()
    cell.kept = []
    run()
    return recording, [o.grad for o in cell.kept if o.grad is not None]


def test_what_crosses_is_known_from_the_first_step() -> None:
    recording, expected = changed_between()
    (note,) = recording["loop"].notes
    assert "at its first step" not in note
    found = recording["loop"].grads["carried"]
    assert bool(found[0].abs().min() > 0)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found * (1 + 1e-8), torch.stack(expected), rtol=1e-12, atol=0)


def test_what_is_not_known_at_the_first_step_of_a_joint_loop_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gradflow.hooks.closed.joint_steps.crossing_any", lambda *_: set())
    recording, _ = changed_between()
    (note,) = recording["loop"].notes
    assert "at its first step they are not known" in note
    assert not bool(recording["loop"].grads["carried"][0].any())


# ------------------------------------------------------- what reaches a lower layer of a closed loop


def two_layers(kind: str, fused: bool, last: bool) -> tuple[Recording, list[Tensor]]:
    """A decoder of two layers that runs on its own output; ∂L_t/∂h_t of every step by autograd."""
    torch.manual_seed(7)
    rnn, out = getattr(nn, kind)(4, 5, 2), nn.Linear(5, 4)
    cells = nn.ModuleList(getattr(nn, f"{kind}Cell")(wide, 5) for wide in (4, 5))
    for n, cell in enumerate(cells):
        for name, weight in cell.named_parameters():
            weight.data.copy_(getattr(rnn, f"{name}_l{n}"))
    model = nn.ModuleDict({"rnn": rnn, "cells": cells, "out": out}).double()
    y = torch.randn(9, 3, 4).double()

    def losses(read: list[list[Tensor]], *, fused: bool) -> list[Tensor]:
        given, state, found = y[0], None, []
        each: list = [None, None]
        for target in y:
            if fused:
                top, state = rnn(given.unsqueeze(0), state)
                top = top[0]
            else:
                top = given
                for n, cell in enumerate(cells):
                    each[n] = cell(top, each[n])
                    top = each[n][0] if kind == "LSTM" else each[n]
                    read[n].append(top)
            given = out(top)
            found.append((given - target).pow(2).mean())
        return found

    with gradflow.record(model) as recording:
        every = losses([[], []], fused=fused)
        (every[-1] if last else torch.stack(every).sum()).backward()
    read: list[list[Tensor]] = [[], []]
    every = losses(read, fused=False)
    wanted = []
    for states in read:
        grads = [torch.autograd.grad(one, h, retain_graph=True)[0]
                 for one, h in zip(every, states, strict=True)]  # fmt: skip
        wanted.append(torch.stack([g * float(t == 8 or not last) for t, g in enumerate(grads)]))
    return recording, wanted


@pytest.mark.parametrize("last", [False, True], ids=["every step", "last step"])
@pytest.mark.parametrize("fused", [True, False], ids=["stack", "cells"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_what_comes_down_from_the_layer_above_is_direct(kind: str, fused: bool, last: bool) -> None:
    """It was exactly 0, and "nothing of it comes down to rnn.l0" was said."""
    recording, wanted = two_layers(kind, fused, last)
    for name, expected in zip(["rnn.l0", "rnn.l1"] if fused else ["cells.0", "cells.1"], wanted,
                              strict=True):  # fmt: skip
        assert same(recording[name].grad_h_direct, expected)
        assert bool(expected[-1].abs().min() > 0)
    found = gradflow.analyze(recording)
    assert "lost-between-layers" not in {f.name for layer in found.values() for f in layer.findings}
