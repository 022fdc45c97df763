"""Calls of fused modules that carry their state on: one track per layer, as of one long call."""

# ruff: noqa: PT031, SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

import compare
import loops
import oracles
import pytest
import torch
from loops import Run, State
from test_record_cells import Stacked, check_direct, check_totals, check_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.errors import GradflowWarning, RecordingError
from gradflow.recording import CUT_KINDS, Recording, Track

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, INPUTS, HIDDEN = 3, 3, 4


@dataclass(frozen=True)
class Case:
    """One way to carry a state through calls of the given numbers of steps."""

    cell: str
    chunks: tuple[int, ...]
    layers: int = 1
    proj: int = 0
    batch_first: bool = False
    dropout: float = 0.0
    loss: str = "all"  # "all", "last", "middle", "final": of output, or of h_n and c_n
    carry: str = "attached"  # "attached", "detached", "in place", "data", "clone"
    initial: bool = False

    def __str__(self) -> str:
        words = [self.cell, "+".join(map(str, self.chunks))]
        for setting in fields(self)[2:]:
            value = getattr(self, setting.name)
            if value != setting.default:
                words.append(setting.name if value is True else f"{setting.name}={value}")
        return "-".join(words)

    @property
    def steps(self) -> int:
        return sum(self.chunks)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return list(pairwise(accumulate(self.chunks, initial=0)))


ONES = (1,) * 6
CASES = [
    *(Case(cell, ONES) for cell in loops.CELLS),
    *(Case(cell, (3, 2, 4), layers=2) for cell in loops.CELLS),
    *(Case(cell, (2, 2, 2), loss="final", layers=2) for cell in loops.CELLS),
    *(Case(cell, ONES, layers=2, loss="last", initial=True) for cell in loops.CELLS),
    *(Case(cell, (3, 3), layers=3, batch_first=True, loss="middle") for cell in loops.CELLS),
    *(
        Case(cell, (3, 2, 1), layers=2, carry=carry)
        for cell, carry in zip(loops.CELLS, ("detached", "in place", "data", "clone"), strict=True)
    ),
    *(Case(cell, ONES, carry="detached", loss="last") for cell in loops.CELLS),
    *(Case(cell, (1, 2, 1, 2), layers=2, dropout=0.4) for cell in loops.CELLS),
    *(Case(cell, ONES, layers=3, dropout=0.4, batch_first=True) for cell in loops.CELLS),
    Case("LSTM", ONES, proj=2, layers=2),
    Case("LSTM", (3, 2), proj=2, loss="final", initial=True),
    Case("LSTM", ONES, proj=2, loss="final"),
    Case("LSTM", ONES, carry="in place", initial=True),
    Case("GRU", (2, 2), layers=2, dropout=0.4, carry="detached", loss="final"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass(frozen=True)
class Seen:
    """A case, recorded, and unrolled in pieces that no gradient crosses."""

    recording: Recording
    module: nn.RNNBase
    pieces: list[oracles.Unrolled]
    grads: list[dict[str, oracles.LayerGrads]]
    last: list[dict[str, oracles.LayerGrads]]


def module_of(case: Case) -> nn.RNNBase:
    options = {
        "num_layers": case.layers,
        "batch_first": case.batch_first,
        "dropout": case.dropout,
        "dtype": torch.float64,
    }
    if case.cell == "LSTM":
        return nn.LSTM(INPUTS, HIDDEN, proj_size=case.proj, **options)
    if case.cell == "GRU":
        return nn.GRU(INPUTS, HIDDEN, **options)
    return nn.RNN(INPUTS, HIDDEN, nonlinearity=case.cell[4:].lower(), **options)


def start_of(case: Case) -> State | None:
    if not case.initial:
        return None
    h = torch.randn(case.layers, BATCH, case.proj or HIDDEN, dtype=torch.float64) * 0.5
    if case.cell != "LSTM":
        return (h.requires_grad_(),)
    c = torch.randn(case.layers, BATCH, HIDDEN, dtype=torch.float64) * 0.5
    return (h.requires_grad_(), c.requires_grad_())


def carried(case: Case, state: State) -> State:
    if case.carry == "in place":
        return tuple(s.detach_() for s in state)
    ways = {
        "attached": lambda s: s,
        "detached": lambda s: s.detach(),
        "data": lambda s: s.data,
        "clone": lambda s: s.detach().clone(),
    }
    return tuple(ways[case.carry](s) for s in state)


def seeds(case: Case, steps: int, offset: int, ends: bool) -> oracles.Grads:
    """The gradients of a linear loss at (output, h_n, c_n) of the steps from `offset` on."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = case.proj or HIDDEN
    output = draw(case.steps, BATCH, width)
    h_n, c_n = draw(case.layers, BATCH, width), draw(case.layers, BATCH, HIDDEN)
    if case.loss == "final":
        return None, h_n if ends else None, c_n if ends and case.cell == "LSTM" else None
    read = {"all": range(case.steps), "last": [case.steps - 1], "middle": [2]}[case.loss]
    for t in set(range(case.steps)) - set(read):
        output[t] = 0.0
    return output[offset : offset + steps], None, None


def loss_of(case: Case, returned: list[Tensor], grads: oracles.Grads) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for tensor, seed in zip(returned, grads, strict=False):
        if seed is not None:
            loss = loss + (tensor * seed).sum()
    return loss


def record(case: Case) -> Seen:
    """Run a case as its user would, then its oracle."""
    module, x = module_of(case), torch.randn(case.steps, BATCH, INPUTS, dtype=torch.float64)
    start = start_of(case)
    masks: list[list[Tensor]] = []
    states, losses, state = [], [], start
    with gradflow.record(module) as recording:
        for number, (begin, end) in enumerate(case.bounds):
            if number:
                assert state is not None
                state = carried(case, state)
            states.append(state)
            rng, part = torch.get_rng_state(), x[begin:end]
            part = part.transpose(0, 1) if case.batch_first else part
            output, after = module(part, loops.as_argument(state))
            masks.append(dropout_masks(case, module, rng, tuple(output.shape)))
            state = loops.as_state(after)
            output = output.transpose(0, 1) if case.batch_first else output
            grads = seeds(case, end - begin, begin, end == case.steps)
            losses.append(loss_of(case, [output, *state], grads))
            if case.carry == "in place" and losses[-1].requires_grad:
                losses.pop().backward()  # before the tensors are detached
        rest = sum(losses, torch.zeros((), dtype=torch.float64))
        if rest.requires_grad:
            rest.backward()
    return unrolled(case, recording, module, x, states, masks)


def dropout_masks(
    case: Case, module: nn.RNNBase, rng: Tensor, shape: tuple[int, ...]
) -> list[Tensor]:
    if not case.dropout:
        return []
    shape = (shape[1], shape[0], shape[2]) if case.batch_first else shape
    return oracles.dropout_factors(module, rng, shape, torch.float64)


def unrolled(
    case: Case,
    recording: Recording,
    module: nn.RNNBase,
    x: Tensor,
    states: list[State | None],
    masks: list[list[Tensor]],
) -> Seen:
    bounds = case.bounds if case.carry != "attached" else [(0, case.steps)]
    pieces, grads, last = [], [], []
    for number, (begin, end) in enumerate(bounds):
        state = states[number]
        hx = None if state is None else ((*state, None)[0], (*state, None)[1])
        chosen = masks[number : number + 1] if len(bounds) > 1 else masks
        factors = [torch.cat(parts) for parts in zip(*chosen, strict=True)]
        piece = oracles.unroll(module, x[begin:end], hx=hx, dropout_masks=factors or None)
        arriving = seeds(case, end - begin, begin, end == case.steps)
        pieces.append(piece)
        grads.append(pulled_back(case, piece, arriving))
        one = oracles.keep_one_step(arriving, torch.full((BATCH,), end - begin), False, last=True)
        final = one if end == case.steps else (None, None, None)
        last.append(pulled_back(case, piece, final))
    return Seen(recording, module, pieces, grads, last)


def pulled_back(
    case: Case, piece: oracles.Unrolled, arriving: oracles.Grads
) -> dict[str, oracles.LayerGrads]:
    if all(grad is None for grad in arriving):
        arriving = (torch.zeros_like(piece.output), None, None)
    return oracles.pull_back(piece, arriving)


def joined(seen: list[dict[str, oracles.LayerGrads]], name: str, what: str) -> Tensor:
    return torch.cat([getattr(piece[name], what) for piece in seen])


@every_case
def test_every_number_is_that_of_one_long_call(case: Case) -> None:
    seen = record(case)
    names = [f"l{layer}" for layer in range(case.layers)]
    assert list(seen.recording.tracks) == names
    cuts = torch.zeros(case.steps, BATCH, dtype=torch.bool)
    if case.carry != "attached":
        for begin, _ in case.bounds[1:]:
            cuts[begin] = True
    for track in seen.recording.values():
        layers = [piece.layers[track.name] for piece in seen.pieces]
        assert torch.equal(track.cuts, cuts)
        assert track.mask.all()
        check_forward(track, layers)
        check_gradients(track, seen)
        check_operator(track, layers)
        assert track.parity.status == "passed", track.parity


def check_forward(track: Track, layers: list[oracles.UnrolledLayer]) -> None:
    wanted = {
        "h": torch.stack([h for layer in layers for h in layer.h]),
        "inputs": torch.stack([x for layer in layers for x in layer.inputs]),
    }
    if layers[0].c0 is not None:
        wanted["c"] = torch.stack([c for layer in layers for c in layer.c])
    for name, want in wanted.items():
        compare.assert_steps_close(getattr(track, name), want, track.mask, what=name)
    compare.assert_whole_close(track.h0, layers[0].h0, what="h0")
    for gate, values in track.gates.items():
        want = torch.stack([gates[gate] for layer in layers for gates in layer.gates])
        compare.assert_steps_close(values, want, track.mask, what=gate)


def check_gradients(track: Track, seen: Seen) -> None:
    arrays = {
        "h": track.grad_h,
        "c": track.grad_c,
        "direct": track.grad_h_direct,
        "delta": track.delta,
        "delta_hh": track.delta_hh,
    }
    for what, array in arrays.items():
        if array is not None:
            want = joined(seen.grads, track.name, what)
            compare.assert_steps_close(array, want, track.mask, what=what)
    assert track.last_grads is not None
    for what, array in track.last_grads.items():
        want = joined(seen.last, track.name, what)
        compare.assert_steps_close(array, want, track.mask, what=f"last {what}")


def check_operator(track: Track, layers: list[oracles.UnrolledLayer]) -> None:
    pieces = [oracles.dense_jacobians(layer).clone() for layer in layers]
    for piece in pieces[1:]:
        piece[0] = 0.0  # nothing comes over a cut
    dense, operator = torch.cat(pieces), track.operator()
    eye = torch.eye(operator.size, dtype=torch.float64).expand(BATCH, -1, -1)
    steps = range(operator.length)
    pushed = torch.stack([operator.push(t, eye).transpose(1, 2) for t in steps])
    pulled = torch.stack([operator.pull(t, eye) for t in steps])
    compare.assert_steps_close(pushed, dense, track.mask, what="push")
    compare.assert_steps_close(pulled, dense, track.mask, what="pull")


# ------------------------------------------------------------------------------ ways to carry


def lstm(**options: object) -> nn.LSTM:
    return nn.LSTM(INPUTS, HIDDEN, dtype=torch.float64, **options)  # type: ignore[arg-type]


def data(steps: int = 6) -> Tensor:
    return torch.randn(steps, BATCH, INPUTS, dtype=torch.float64)


def one_call(module: nn.RNNBase, x: Tensor) -> Track:
    """The whole sequence at once, L = Σ h_n²."""
    with gradflow.record(module) as recording:
        loops.as_state(module(x)[1])[0].pow(2).sum().backward()
    module.zero_grad()
    return recording["l0"]


def check_same(track: Track, want: Track) -> None:
    for name, grad in want.grads.items():
        compare.assert_steps_close(track.grads[name], grad, track.mask, what=name)
    compare.assert_steps_close(track.grad_h_direct, want.grad_h_direct, track.mask, what="direct")
    assert track.last_grads is not None
    for name, grad in want.grads.items():  # the loss reads one step, so that is all there is
        compare.assert_steps_close(track.last_grads[name], grad, track.mask, what=f"last {name}")
    assert track.parity.status == "passed"


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_state_carried_through_the_output(batch_first: bool) -> None:
    module, x = nn.GRU(INPUTS, HIDDEN, batch_first=batch_first, dtype=torch.float64), data()
    want = one_call(module, x.transpose(0, 1) if batch_first else x)
    with gradflow.record(module) as recording:
        h = None
        for part in x.split(2):
            out, _ = module(part.transpose(0, 1) if batch_first else part, h)
            out = out.transpose(0, 1) if batch_first else out
            h = out[-1:]
        h.pow(2).sum().backward()
    check_same(recording["l0"], want)


def test_unbatched_input_of_one_step() -> None:
    module, x = lstm(), data()[:, :1]
    want = one_call(module, x)
    with gradflow.record(module) as recording:
        state = None
        for x_t in x[:, 0]:
            out, state = module(x_t[None], state)
        out.pow(2).sum().backward()
    check_same(recording["l0"], want)


def test_the_state_of_a_module_attribute() -> None:
    """As in many tutorials: `self.hidden`, reshaped on the way."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.hidden = lstm(), None

        def forward(self, x: Tensor) -> Tensor:
            out, (h, c) = self.rnn(x[None], self.hidden)
            self.hidden = (h.view(1, BATCH, HIDDEN), c.clone())
            return out[0]

    model, x = Keeps(), data()
    want = one_call(model.rnn, x)
    with gradflow.record(model) as recording:
        for x_t in x:
            out = model(x_t)
        out.pow(2).sum().backward()
    check_same(recording["rnn.l0"], want)


def test_a_decoder_that_starts_from_an_encoder_and_reads_its_own_output() -> None:
    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.GRU(INPUTS, HIDDEN, dtype=torch.float64)
            self.decoder = nn.GRU(INPUTS, HIDDEN, dtype=torch.float64)
            self.head = nn.Linear(HIDDEN, INPUTS, dtype=torch.float64)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            _, h = self.encoder(x)
            y, results = x[-1:], []
            for _ in range(5):
                out, h = self.decoder(y, h)
                h.retain_grad()
                self.kept.append(h)
                y = self.head(out)
                results.append(y)
            return torch.cat(results)

    model, x = Seq2Seq(), data()
    with gradflow.record(model) as recording:
        for _ in range(2):
            model(x).pow(2).sum().backward()
    names = ["encoder.l0", "decoder.l0", "encoder.l0@2", "decoder.l0@2"]
    assert [(t.name, t.steps) for t in recording.values()] == list(
        zip(names, (6, 5, 6, 5), strict=True)
    )
    assert [t.parity.status for t in recording.values()] == ["passed"] * 4
    # h_n and the output are two tensors with one state: the total is more than a hook on h shows
    track, hooked = recording["decoder.l0"], torch.cat([h.grad for h in model.kept[:4]])
    assert not torch.equal(track.grad_h[:4], hooked)
    cell = nn.GRUCell(INPUTS, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in cell.named_parameters():
            weight.copy_(getattr(model.decoder, f"{name}_l0"))
    h, y, kept, loss = model.encoder(x)[1][0], x[-1], [], 0.0
    for _ in range(5):
        h = cell(y, h)
        h.retain_grad()
        kept.append(h)
        y = model.head(h)
        loss = loss + y.pow(2).sum()
    loss.backward()
    want = torch.stack([h.grad for h in kept])
    compare.assert_steps_close(track.grad_h, want, track.mask, what="grad_h")


def test_a_learned_initial_state_is_shared_by_two_loops() -> None:
    module, x = nn.GRU(INPUTS, HIDDEN, dtype=torch.float64), data()
    h0 = torch.randn(1, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    with gradflow.record(module) as recording:
        for _ in range(2):
            h = h0
            for x_t in x:
                _, h = module(x_t[None], h)
            h.sum().backward()
    assert [(t.name, t.steps, t.backwards) for t in recording.values()] == [
        ("l0", 6, 1),
        ("l0@2", 6, 1),
    ]
    assert torch.equal(recording["l0@2"].h0, h0[0].detach())


def test_masks_between_two_calls() -> None:
    module, x = lstm(num_layers=2), data()
    with gradflow.record(module) as recording:
        state, out = None, None
        for t, x_t in enumerate(x):
            if state is not None:
                mask = torch.ones(1, BATCH, 1, dtype=torch.float64)
                mask[0, t % BATCH] = float(t % 2)
                state = tuple(s * mask for s in state)
            out, state = module(x_t[None], state)
        out.pow(2).sum().backward()
    for track in recording.values():
        assert track.parity.status == "passed"
        assert track.cuts.nonzero().tolist() == [[2, 2], [4, 1]]
        assert track.grad_h[1, 2].count_nonzero() == 0
        assert track.grad_h[1, 0].count_nonzero() > 0


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of a state and (B,) which sequences end
    "masked with zeros": lambda s, done: s * ~done.unsqueeze(1),
    "reset to zeros": lambda s, done: s.detach() * ~done.unsqueeze(1),
    "reset to other values": lambda s, done: torch.where(
        done.unsqueeze(1), torch.full_like(s, 0.3), s
    ),
    "detached": lambda s, done: torch.where(done.unsqueeze(1), s.detach(), s),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.LSTM], ids=lambda c: c.__name__
)
def test_a_cut_says_what_it_is(cell: type[nn.Module], way: str) -> None:
    """Done masks of a rollout: two episodes end, each in a sequence of its own, at steps 3 and 6."""
    module, x = cell(2, 4), torch.randn(8, 3, 2)
    done = torch.zeros(8, 3, dtype=torch.bool)
    done[2, 0] = done[5, 2] = True
    with gradflow.record(module) as recording:
        state, total = None, torch.zeros(())
        for x_t, ended in zip(x, [torch.zeros_like(done[0]), *done[:-1]], strict=True):
            if state is not None:
                parts = [
                    WAYS[way](s, ended) for s in (state if isinstance(state, tuple) else (state,))
                ]
                state = tuple(parts) if len(parts) > 1 else parts[0]
            out = module(x_t[None] if cell is nn.LSTM else x_t, state)
            state = out[1] if cell is nn.LSTM else out
            total = total + (out[0] if isinstance(out, tuple) else out).sum()
        total.backward()
    (track,) = recording.values()
    kinds = track.cut_kinds
    assert kinds is not None and kinds.shape == track.cuts.shape
    named = {(t, b): CUT_KINDS[int(kinds[t, b])] for t, b in track.cuts.nonzero().tolist()}
    if way == "reset to zeros":  # of all sequences, those that go on are detached
        assert {named.pop((3, 0)), named.pop((6, 2))} == {"reset to zeros"}
        assert len(named) == 3 * 7 - 2 and set(named.values()) == {"detached"}
    else:
        assert named == {(3, 0): way, (6, 2): way}
    assert not kinds[~track.cuts].any()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_lengths_of_a_loop_over_single_steps(kind: type[nn.RNNBase]) -> None:
    """A padded batch read step by step says what the same batch says in one call."""
    model, lengths = kind(3, 4, 2, dtype=torch.float64), torch.tensor([6, 2, 4])
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    real = (torch.arange(6)[:, None] < lengths).double()[:, :, None]
    with gradflow.record(model, lengths=lengths) as expected:
        (model(x)[0] ** 2 * real).sum().backward()
    with gradflow.record(model, lengths=lengths) as recording:
        outputs, state = [], None
        for x_t in x:
            output, state = model(x_t[None], state)
            outputs.append(output[0])
        (torch.stack(outputs) ** 2 * real).sum().backward()
    assert list(recording.tracks) == ["l0", "l1"]
    for track, other in zip(recording.values(), expected.values(), strict=True):
        assert torch.equal(track.lengths, lengths)
        assert torch.equal(track.mask, other.mask)
        for name in ("h", "grad_h", "grad_h_direct", "grad_h_last", "delta", "inputs"):
            found, want = getattr(track, name), getattr(other, name)
            compare.assert_steps_close(found, want, track.mask, what=name)
        assert track.parity.status == "passed"


def test_a_function_for_lengths_is_not_asked_of_single_steps() -> None:
    def lengths(x: Tensor) -> list[int]:
        assert len(x) > 1
        return [6, 2, 4]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.GRU(3, 4, dtype=torch.float64)
            self.decoder = nn.GRUCell(3, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.encoder(x)[1][0]
            for x_t in x:
                h = self.decoder(x_t, h)
            return h

    model, x = Both(), torch.randn(6, 3, 3, dtype=torch.float64)
    with gradflow.record(model, lengths=lengths) as recording:
        model(x).sum().backward()
    assert recording["encoder.l0"].lengths.tolist() == [6, 2, 4]
    assert recording["decoder"].lengths.tolist() == [6, 6, 6]
    assert "give the lengths themselves" in recording["decoder"].notes[0]


def test_bidirectional_calls_are_never_stitched() -> None:
    module, x = lstm(bidirectional=True), data()
    with gradflow.record(module) as recording:
        _, state = module(x[:3])
        _, state = module(x[3:], state)
        state[0].sum().backward()
    assert {t.name.partition("@")[2] for t in recording.values()} == {"", "2"}
    assert all(t.steps == 3 and t.parity.status == "passed" for t in recording.values())


def test_one_step_at_a_time_without_gradient_is_one_track() -> None:
    """The evaluation of a stateful model: a hundred calls of T = 1, no recurrence missed."""
    module, x = nn.LSTM(1, 10), torch.randn(100, 1, 1)
    with pytest.warns(GradflowWarning) as said:
        with gradflow.record(module) as recording, torch.no_grad():
            state = None
            for x_t in x:
                _, state = module(x_t[None], state)
    (track,) = recording.values()
    assert (track.steps, track.batch) == (100, 1)
    assert not track.cuts.any()
    assert len(said) == 1
    assert "no_grad" in str(said[0].message)
    want, _ = module(x)
    compare.assert_steps_close(track.h, want.detach().double(), track.mask, bound=1e-4)
    assert track.operator().push(50, torch.ones(1, 1, 20, dtype=torch.float64)).any()


def test_one_step_from_zeros_each_time_exercises_no_recurrence() -> None:
    """The training of a well-known tutorial: T = 1 and fresh zeros at every point."""
    module, x = nn.LSTM(1, 10), torch.randn(70, 1, 1, 1)
    with pytest.warns(GradflowWarning) as said:
        with gradflow.record(module) as recording:
            for point in x:
                zeros = torch.zeros(1, 1, 10)
                module(point, (zeros, zeros))[0].sum().backward()
    assert len(recording) == 70
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2
    assert "l0 (70 runs) ran on T = 1 step, so no recurrence is exercised" in texts[0]
    assert list(gradflow.analyze(recording).layers) == ["l0"]
    assert "l0 started afresh 70 times" in texts[1]


def test_mixed_layers_are_refused_in_words() -> None:
    module, x = nn.GRU(INPUTS, HIDDEN, 2, dtype=torch.float64), data()
    with gradflow.record(module) as recording:
        _, h = module(x[:3])
        module(x[3:], h.flip(0))[0].sum().backward()
    track = recording["l0"]
    assert track.grad_h.isfinite().all()
    with pytest.raises(RecordingError, match="sequences or layers are mixed"):
        track.operator()


# ------------------------------------------------------------------ checkpoints, steps, memory


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_checkpointed_loops(kind: str, reentrant: bool) -> None:
    """Segments that are run again in the backward: one track, the numbers of a plain loop."""
    cell, x = loops.cell_of(kind), data().requires_grad_()
    with gradflow.record(cell) as plain:
        found = loops.run(cell, x)
        found.read[-1][0].pow(2).sum().backward(retain_graph=True)

    def segment(part: Tensor, *state: Tensor) -> State:
        held: State | None = state or None
        for x_t in part:
            held = loops.as_state(cell(x_t, loops.as_argument(held)))
        assert held is not None
        return held

    cell.zero_grad()
    with gradflow.record(cell) as recording:
        state: State = ()
        for start in (0, 2, 4):
            part = x[start : start + 2]
            state = loops.as_state(checkpoint(segment, part, *state, use_reentrant=reentrant))
        state[0].pow(2).sum().backward()
    assert list(recording.tracks) == ["cell"]
    track, want = recording["cell"], plain["cell"]
    assert not track.cuts.any()
    assert track.backwards == 1
    for name in track.grads:
        compare.assert_steps_close(track.grads[name], want.grads[name], track.mask, what=name)
    compare.assert_steps_close(track.grad_h_direct, want.grad_h_direct, track.mask, what="direct")
    assert track.parity.status == "passed"


def test_an_optimizer_step_between_chunks() -> None:
    cell, x = loops.cell_of("GRU"), data(6)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    with gradflow.record(cell) as recording:
        one = loops.run(cell, x[:3])
        loops.loss_of(one).backward(retain_graph=True)
        optimizer.step()
        two = loops.run(cell, x[3:], start=tuple(s.detach() for s in one.returned[-1]))
        loops.loss_of(two).backward(retain_graph=True)
    (track,) = recording.values()
    found = Run(one.returned + two.returned, one.began + two.began, one.read + two.read)
    check_totals(track, found)
    check_direct(track, found)
    check_weights(track, cell)


def test_training_is_bit_identical_with_and_without_a_recording() -> None:
    def train(record: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model, drop = Stacked(), nn.Dropout(0.3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        kept = []
        for _ in range(3):
            x = torch.randn(5, 2, 3, dtype=torch.float64)
            if record:
                with gradflow.record(model):
                    loss = drop(model(drop(x))[-1][2]).pow(2).sum()
                    optimizer.zero_grad()
                    loss.backward()
            else:
                loss = drop(model(drop(x))[-1][2]).pow(2).sum()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            kept += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        return [*kept, torch.get_rng_state(), *(p.detach() for p in model.parameters())]

    for plain, recorded in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, recorded)
