"""The gradient of single loss steps, and the weights' gradient by lag, against autograd.

Every loss step is pulled back alone on an unrolled float64 loop; every truncated gradient is one
that autograd takes of short runs that start from a detached state.
"""

from __future__ import annotations

import cases
import compare
import loops
import oracles
import pytest
import torch
from cases import GRU, LSTM, RELU, TANH, Case
from loops import State
from torch import Tensor, nn

import gradflow
from gradflow.errors import RecordingError
from gradflow.recording import Contributions, Track

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64

ONE_WAY = [
    Case(LSTM, loss="both"),
    Case(GRU),
    Case(TANH, loss="middle"),
    Case(RELU, loss="last"),
    Case(LSTM, layers=2, loss="both", initial=True),
    Case(GRU, layers=3),
    Case(TANH, layers=2, layout="batch_first"),
    Case(LSTM, packed="unsorted", loss="both"),
    Case(GRU, layers=2, packed="sorted"),
    Case(LSTM, proj=2, layers=2, loss="both"),
    Case(GRU, layers=2, dropout=0.4),
    Case(LSTM, layout="unbatched", bias=False),
    Case(TANH, steps=60, scale=1e-2, batch=2),
]
TWO_WAYS = [
    Case(LSTM, bidirectional=True, loss="both"),
    Case(GRU, bidirectional=True, packed="unsorted"),
    Case(LSTM, bidirectional=True, layers=2, proj=2, packed="unsorted", loss="both"),
    Case(TANH, bidirectional=True, layers=3, loss="last"),
]
every_case = pytest.mark.parametrize("case", ONE_WAY + TWO_WAYS, ids=str)


def oracle_steps(case: Case) -> list[dict[str, oracles.LayerGrads]]:
    """Every loss step alone, pulled back by autograd on the unrolled graph."""
    lengths = cases.build(case).lengths
    found = []
    for step in range(case.steps):
        kept = torch.full_like(lengths, step)
        one = oracles.keep_steps(cases.arriving(case), kept, lengths, case.bidirectional)
        found.append(oracles.pull_back(cases.oracle(case), one))
    return found


def tracks(case: Case) -> list[tuple[Track, oracles.UnrolledLayer]]:
    layers = cases.oracle(case).layers
    return [(track, layers[track.name]) for track in cases.seen(case).recording.values()]


# ---------------------------------------------------------------------------- single loss steps


@every_case
def test_every_loss_step_alone(case: Case) -> None:
    oracle = oracle_steps(case)
    for track, layer in tracks(case):
        found = track.loss_steps(range(case.steps))
        assert found is not None
        assert found.direct is None
        for step, one in enumerate(oracle):
            want, mask = one[layer.name], layer.mask
            compare.assert_steps_close(found.grads["h"][step], want.h, mask, what="h")
            if want.c is not None:
                compare.assert_steps_close(found.grads["c"][step], want.c, mask, what="c")
            assert found.delta is not None
            assert found.delta_hh is not None
            compare.assert_steps_close(found.delta[step], want.delta, mask, what="delta")
            compare.assert_steps_close(found.delta_hh[step], want.delta_hh, mask, what="delta_hh")


@every_case
def test_loss_steps_add_up_to_the_total(case: Case) -> None:
    for track, _ in tracks(case):
        check_sum(track)


def check_sum(track: Track) -> None:
    """Σ_t' ∂L_t'/∂s_t = ∂L/∂s_t as vectors, to 1e-12 of the largest term of each step."""
    found = track.loss_steps(range(track.steps))
    assert found is not None
    for name, parts in found.grads.items():
        got, want = parts.sum(0)[track.mask], track.grads[name][track.mask]
        size = parts.abs().sum(0)[track.mask].amax(1, keepdim=True)
        assert bool(((got - want).abs() <= 1e-12 * size).all())
        assert not bool(((got * (1 + 1e-9) - want).abs() <= 1e-12 * size).all())


@every_case
def test_reached_are_the_steps_at_which_something_arrives(case: Case) -> None:
    lengths = cases.build(case).lengths
    output = cases.arriving(case)[0]
    want = torch.zeros(case.steps, len(lengths), dtype=torch.bool)
    if output is not None:
        want |= (output != 0).any(2) & (torch.arange(case.steps)[:, None] < lengths)
    if case.loss in ("both", "final"):
        for ends in oracles.final_steps(lengths, case.bidirectional):
            want[ends, torch.arange(len(lengths))] = True
    for track, _ in tracks(case):
        assert torch.equal(track.reached, want)


def test_chosen_steps_and_sequences_in_any_order() -> None:
    track = tracks(Case(LSTM, layers=2, packed="unsorted", loss="both"))[0][0]
    every, some = track.loss_steps(range(7)), track.loss_steps([5, 2], [2, 0])
    assert every is not None
    assert some is not None
    torch.testing.assert_close(
        some.grads["c"], every.grads["c"][[5, 2]][:, :, [2, 0]], rtol=1e-13, atol=0, equal_nan=True
    )
    for wrong in ([7], [-1], [[1]]):
        with pytest.raises(RecordingError, match=r"every loss step must be .* from 0 to 6, got"):
            track.loss_steps(wrong)
    with pytest.raises(RecordingError, match=r"every sequence must be .* from 0 to 2, got \[3\]"):
        track.loss_steps([0], [3])


def test_float32_does_not_underflow() -> None:
    """The recorded gradient is 0 in float32 long before it is in float64."""
    rnn = nn.RNN(1, 1, nonlinearity="relu", bias=False)
    nn.init.constant_(rnn.weight_hh_l0, 2.0**-10)
    with gradflow.record(rnn) as recording:
        rnn(torch.ones(40, 1, 1).abs() * rnn.weight_ih_l0.sign().item())[0][-1].sum().backward()
    track = recording["l0"]
    found = track.loss_steps([39])
    assert found is not None
    assert track.grad_h[0].item() == 0.0
    assert found.grads["h"].flatten().log2().tolist() == [-10.0 * k for k in reversed(range(40))]


def test_without_a_backward_there_is_none() -> None:
    lstm = nn.LSTM(2, 3)
    with pytest.warns(UserWarning, match="no backward"), gradflow.record(lstm) as recording:
        lstm(torch.ones(4, 1, 2))
    track = recording["l0"]
    assert track.loss_steps([3]) is None
    assert track.reached is None
    assert track.contributions() is None


# ------------------------------------------------------------------------------- gradient by lag


def lags(found: Contributions, steps: int) -> dict[str, list[Tensor]]:
    """C_0, C_1, … filled up with zeros."""
    parts = list(found.by_lag())
    assert len(parts) <= steps
    made = [{name: outer.matrix() for name, outer in part.items()} for part in parts]
    zero = {name: torch.zeros_like(value) for name, value in made[0].items()}
    filled = made + [zero] * (steps - len(parts))
    return {name: [part[name] for part in filled] for name in zero}


@every_case
def test_lags_against_single_loss_steps(case: Case) -> None:
    """C_k = Σ_t' δ_{t'→t} v_tᵀ, t the step that is processed k steps before t', by autograd's δ."""
    oracle = oracle_steps(case)
    for track, layer in tracks(case):
        found = track.contributions()
        if case.bidirectional and not layer.name.startswith(f"l{case.layers - 1}"):
            assert found is None  # loss steps come from both sides
            continue
        assert found is not None
        sign = -1 if layer.reverse else 1
        vectors = {"weight_hh": layer.h_before, "weight_ih": layer.inputs}
        for name, parts in lags(found, case.steps).items():
            total = torch.zeros_like(parts[0])
            size = max(float(part.abs().max()) for part in parts)
            for k, part in enumerate(parts):
                want = torch.zeros_like(part)
                for target, one in enumerate(oracle):
                    t = target - sign * k
                    if 0 <= t < case.steps:
                        grads = one[layer.name]
                        delta = grads.delta_hh if name == "weight_hh" else grads.delta
                        want += (delta[t] * layer.mask[t][:, None]).T @ vectors[name][t].detach()
                limit = 1e-10 * want.abs().max() + 1e-16 * size
                assert bool(((part - want).abs() <= limit).all()), (name, k)
                total += part
            grad = cases.seen(case).param_grads[f"{name}_{layer.name}"]
            compare.assert_whole_close(total, grad, what=name)
            compare.assert_whole_close(found.total()[name].matrix(), grad, what=name)


def truncated(module: nn.RNNBase, x: Tensor, seeds: Tensor, k: int) -> dict[str, Tensor]:
    """Gradients if every loss step may look back k steps: short runs from detached states."""
    module.zero_grad()
    lstm = isinstance(module, nn.LSTM)
    state, states = None, []
    with torch.no_grad():
        for x_t in x:
            states.append(state)
            _, state = module(x_t[None], state)
    for step in range(len(x)):
        first = max(0, step - k)
        output, _ = module(x[first : step + 1], states[first])
        (output[-1] * seeds[step]).sum().backward()
    assert lstm == isinstance(state, tuple)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [LSTM, GRU, TANH])
def test_truncated_gradients_are_those_of_detached_runs(kind: str, layers: int) -> None:
    steps, case = 6, Case(kind, layers=layers, steps=6)
    setup = cases.build(case)
    seeds = torch.randn(steps, case.batch, cases.HIDDEN, dtype=F64)
    with gradflow.record(setup.module) as recording:
        (setup.module(setup.x)[0] * seeds).sum().backward()
    for track in recording.values():
        found = track.contributions()
        assert found is not None
        sums: dict[str, Tensor] = {}
        for k, part in enumerate(found.by_lag()):
            want = truncated(setup.module, setup.x, seeds, k)
            for name, outer in part.items():
                value = outer.matrix()
                sums[name] = sums[name] + value if name in sums else value
                compare.assert_whole_close(sums[name], want[f"{name}_{track.name}"], what=name)
        assert k == steps - 1


def test_one_loss_step_costs_one_row() -> None:
    """With a loss at the last step alone C_k is the outer product at step T − 1 − k."""
    case = Case(LSTM, loss="last")
    track = tracks(case)[0][0]
    found = track.contributions([1])
    assert found is not None
    before = torch.cat([track.h0[None], track.h[:-1]])[:, 1]
    for k, part in enumerate(found.by_lag()):
        t = case.steps - 1 - k
        want = torch.outer(track.delta_hh[t, 1], before[t])
        compare.assert_whole_close(part["weight_hh"].matrix(), want)


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("reads_padding", [True, False])
def test_the_users_own_lengths(ways: int, reads_padding: bool) -> None:
    """The kernel runs on through the padding: a loss that reads it is a loss step like any other."""
    module, x = nn.GRU(3, 4, bidirectional=ways == 2, dtype=F64), torch.randn(6, 2, 3, dtype=F64)
    with gradflow.record(module, lengths=[4, 6]) as recording:
        out = module(x)[0]
        kept = torch.ones(6, 2, 1, dtype=F64)
        kept[4:, 0] = float(reads_padding)
        (out * kept).pow(2).sum().backward()
    for track in recording.values():
        check_sum(track)
        found = track.contributions()
        assert found is not None
        for name, parts in lags(found, 6).items():
            grad = getattr(module, f"{name}_{track.name}").grad
            compare.assert_whole_close(torch.stack(parts).sum(0), grad, what=name)


# ------------------------------------------------------------------------------------------ loops


def recorded(kind: str, between: loops.Between | None, **loss: object) -> tuple[Track, nn.Module]:
    cell, x = loops.cell_of(kind), torch.randn(7, 3, loops.INPUTS, dtype=F64)
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, between)
        loops.loss_of(found, **loss).backward(retain_graph=True)
    track = recording["cell"]
    single = track.loss_steps(range(7))
    assert single is not None
    for step in range(7):
        for place, name in enumerate(track.states):
            want = found.last(torch.full((3,), step), place)
            compare.assert_steps_close(single.grads[name][step], want, track.mask, what=name)
    check_sum(track)
    return track, cell


def masked(t: int, state: State, _: State) -> State:
    mask = torch.ones(3, 1, dtype=F64)
    mask[t % 3] = 0.0 if t % 2 else 0.5
    return tuple(s * mask for s in state)


def mixed(_: int, state: State, __: State) -> State:
    return (state[0] @ (torch.eye(loops.HIDDEN, dtype=F64) + 0.1), *state[1:])


BETWEEN = {
    "plain": None,
    "detached": lambda t, s, _: tuple(v.detach() for v in s) if t in (2, 5) else s,
    "masked": masked,
    "mixed": mixed,
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("kind", [LSTM, GRU, TANH])
def test_loops_of_cells(kind: str, between: str) -> None:
    track, cell = recorded(kind, BETWEEN[between], with_c=kind == LSTM)
    found = track.contributions()
    assert found is not None
    for name, parts in lags(found, track.steps).items():
        compare.assert_whole_close(torch.stack(parts).sum(0), getattr(cell, name).grad, what=name)
        compare.assert_whole_close(
            found.total()[name].matrix(), getattr(cell, name).grad, what=name
        )
    if between == "detached":  # stretches of 2, 3 and 2 steps
        assert len(list(found.by_lag())) == 3


def test_lags_of_a_loop_are_those_of_one_call() -> None:
    case = Case(LSTM, layers=2, loss="both", steps=8)
    setup = cases.build(case)
    with gradflow.record(setup.module) as whole:
        out, (h_n, c_n) = setup.module(setup.x)
        cases.loss_of(setup, (out, h_n, c_n)).backward()
    with gradflow.record(setup.module) as pieces:
        state, outputs = None, []
        for part in setup.x.split([1, 3, 1, 2, 1]):
            out, state = setup.module(part, state)
            outputs.append(out)
        assert state is not None
        cases.loss_of(setup, (torch.cat(outputs), *state)).backward()
    for track in pieces.values():
        one, other = whole[track.name].contributions(), track.contributions()
        assert one is not None
        assert other is not None
        for mine, theirs in zip(other.by_lag(), one.by_lag(), strict=True):
            for name, value in mine.items():
                compare.assert_whole_close(value.matrix(), theirs[name].matrix(), what=name)
        check_sum(track)
        single = track.loss_steps([6, 3], [2, 1])
        want = whole[track.name].loss_steps([6, 3], [2, 1])
        assert single is not None
        assert want is not None
        torch.testing.assert_close(single.grads["c"], want.grads["c"], rtol=1e-11, atol=0)


def test_a_dropout_of_its_own_for_every_call() -> None:
    module = nn.GRU(3, 4, 2, dropout=0.5, dtype=F64)
    with gradflow.record(module) as recording:
        state, loss = None, torch.zeros((), dtype=F64)
        for number in range(4):
            module.train(number != 2)
            out, state = module(torch.randn(2, 3, 3, dtype=F64), state)
            loss = loss + out.pow(2).sum()
        loss.backward()
    for track in recording.values():
        assert track.parity.status == "passed"
        check_sum(track)
        found = track.contributions()
        assert found is not None
        for name, parts in lags(found, 8).items():
            grad = getattr(module, f"{name}_{track.name}").grad
            compare.assert_whole_close(torch.stack(parts).sum(0), grad, what=name)


def test_where_the_way_back_is_not_known_there_is_none() -> None:
    cell, x = loops.cell_of(GRU), torch.randn(4, 3, loops.INPUTS, dtype=F64)
    with gradflow.record(cell) as recording:
        found = loops.run(cell, x, lambda t, s, b: (0.5 * s[0] + 0.5 * b[0],))
        loops.loss_of(found).backward()
    track = recording["cell"]
    assert (track.reached, track.contributions(), track.loss_steps([3])) == (None, None, None)


# ------------------------------------------------------------------------------- marked by hand


def marked(activation: str, w_i: float, w_h: float, w_o: float) -> tuple[Track, list[Tensor]]:
    """The scalar three-step system: h_t = f(w_i x_t + w_h h_{t−1}), y_t = f(w_o h_t), L = Σ y_t²/2."""
    function = getattr(torch, activation)
    weights = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (w_i, w_h, w_o)]
    x = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    h, loss = torch.full((1, 1), 0.3, dtype=F64), torch.zeros((), dtype=F64)
    with gradflow.record(nn.Module()) as recording:
        for x_t in x:
            h = gradflow.tap(h=function(weights[0] * x_t + weights[1] * h))
            loss = loss + 0.5 * function(weights[2] * h).square().sum()
        loss.backward()
    return recording["loop"], weights


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_every_pair_of_the_scalar_three_step_system(activation: str) -> None:
    """∂L_t'/∂y_t' ∂y_t'/∂h_t' ∏ ∂h_k/∂h_{k−1} ∂⁺h_t/∂w, and their sum."""
    w_i, w_h, w_o = 0.7, 1.3, -0.9
    track, weights = marked(activation, w_i, w_h, w_o)

    def slope(value: float) -> float:
        return value * (1 - value) if activation == "sigmoid" else 1 - value**2

    function = getattr(torch, activation)
    x, h = [0.5, -1.0, 2.0], [0.3]
    for x_t in x:
        h.append(float(function(torch.tensor(w_i * x_t + w_h * h[-1], dtype=F64))))
    y = [float(function(torch.tensor(w_o * v, dtype=F64))) for v in h]
    found = track.loss_steps(range(3))
    assert found is not None
    grad_h, sums = found.grads["h"][..., 0, 0], [0.0, 0.0]
    for target in range(1, 4):
        for t in range(1, 4):
            pulled = y[target] * slope(y[target]) * w_o if t <= target else 0.0
            for k in range(t + 1, target + 1):
                pulled *= slope(h[k]) * w_h
            assert grad_h[target - 1, t - 1].item() == pytest.approx(pulled, rel=1e-13, abs=0)
            got = grad_h[target - 1, t - 1].item() * slope(h[t])
            sums = [sums[0] + got * x[t - 1], sums[1] + got * h[t - 1]]
    grads = [weight.grad.item() for weight in weights[:2] if weight.grad is not None]
    assert sums == pytest.approx(grads, rel=1e-13, abs=0)
    assert track.contributions() is None


def test_every_pair_by_delta() -> None:
    """The same system as an nn.RNN: δ h_{t−1} of each pair, whose sum is the weight's gradient."""
    rnn = nn.RNN(1, 1, bias=False, dtype=F64)
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(0.7)
        rnn.weight_hh_l0.fill_(1.3)
    x, h0 = torch.tensor([0.5, -1.0, 2.0], dtype=F64), torch.full((1, 1, 1), 0.3, dtype=F64)
    with gradflow.record(rnn) as recording:
        out, _ = rnn(x.view(3, 1, 1), h0)
        (0.5 * torch.tanh(-0.9 * out).square()).sum().backward()
    track = recording["l0"]
    found, by_hand = track.loss_steps(range(3)), marked("tanh", 0.7, 1.3, -0.9)[0]
    want = by_hand.loss_steps(range(3))
    assert found is not None
    assert want is not None
    torch.testing.assert_close(found.grads["h"], want.grads["h"], rtol=1e-13, atol=0)
    assert found.delta_hh is not None
    before = torch.cat([track.h0[None], track.h[:-1]])
    pairs = (found.delta_hh * before)[..., 0, 0]  # (t', t)
    assert rnn.weight_hh_l0.grad is not None
    assert pairs.sum().item() == pytest.approx(rnn.weight_hh_l0.grad.item(), rel=1e-13, abs=0)
    lag = track.contributions()
    assert lag is not None
    for k, part in enumerate(lag.by_lag()):
        assert part["weight_hh"].matrix().item() == pytest.approx(
            pairs.diagonal(-k).sum().item(), rel=1e-12
        )


def test_a_state_made_from_another_of_the_same_step() -> None:
    """h = tanh c ⊙ …: a loss step of a marked loop, against autograd on the user's own graph."""
    u, x = torch.randn(3, 3, dtype=F64, requires_grad=True), torch.randn(5, 2, 3, dtype=F64)
    with gradflow.record(nn.Module(), lengths=[5, 3]) as recording:
        h = c = torch.zeros(2, 3, dtype=F64)
        states, losses = [], []
        for x_t in x:
            c = 0.9 * c + torch.tanh(h @ u + x_t)
            h, c = gradflow.tap(h=torch.tanh(c) * x_t, c=c)
            states.append((h, c))
            losses.append(h.pow(3).sum() + (c * x_t).sum())
        sum(losses).backward(retain_graph=True)
    track = recording["loop"]
    found = track.loss_steps(range(5))
    assert found is not None
    for step, loss in enumerate(losses):
        wanted = [tensor for pair in states for tensor in pair]
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        filled = [torch.zeros(2, 3, dtype=F64) if g is None else g for g in grads]
        for place, name in enumerate(("h", "c")):
            want = torch.stack(filled[place::2])
            compare.assert_steps_close(found.grads[name][step], want, track.mask, what=name)
    for chosen in ([1], [0], [1, 0]):
        some = track.loss_steps([1, 0], chosen)
        assert some is not None
        want = found.grads["c"][[1, 0]][:, :, chosen]
        torch.testing.assert_close(some.grads["c"], want, rtol=1e-14, atol=0, equal_nan=True)
