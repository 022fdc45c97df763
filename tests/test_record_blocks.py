"""What a block may hold: names, several calls and backwards, options; what stays alive after."""

# ruff: noqa: PT031, SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import gc
import pickle
import weakref

import compare
import oracles
import pytest
import torch
from conftest import BFLOAT16_LSTM
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence

import gradflow
from gradflow.errors import GradflowWarning, RecordingError

pytestmark = pytest.mark.usefixtures("one_thread")


def data(steps: int = 5, batch: int = 2, width: int = 3) -> Tensor:
    return torch.randn(steps, batch, width, dtype=torch.float64)


def lstm(**options: object) -> nn.LSTM:
    return nn.LSTM(3, 4, dtype=torch.float64, **options)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- names


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm(num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.rnn = nn.RNN(8, 4, dtype=torch.float64)
        self.stack = nn.ModuleList([nn.GRU(4, 4, dtype=torch.float64) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.encoder(x))
        for layer in self.stack:
            y, _ = layer(y)
        return y


NAMES = [
    "encoder.lstm.l0",
    "encoder.lstm.l0_reverse",
    "encoder.lstm.l1",
    "encoder.lstm.l1_reverse",
    "rnn.l0",
    "stack.0.l0",
    "stack.1.l0",
]


def test_names_follow_pytorchs_suffixes_in_running_order() -> None:
    model = Seq2Seq()
    with gradflow.record(model) as recording:
        model(data()).sum().backward()
    assert list(recording.tracks) == NAMES
    assert [track.name for track in recording.values()] == NAMES
    assert recording["rnn"].name == "rnn.l0"
    assert recording["encoder.lstm.l1"].name == "encoder.lstm.l1"  # exact before prefix
    assert recording["encoder.lstm.l1_reverse"].reverse


def test_wrappers_are_dropped_from_names() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Seq2Seq()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = Wrapped()
    with gradflow.record(model) as recording:
        model(data()).sum().backward()
    assert list(recording.tracks) == NAMES
    parallel = nn.DataParallel(Seq2Seq())
    with gradflow.record(parallel) as recording:
        parallel(data()).sum().backward()
    assert list(recording.tracks) == NAMES


def test_repeated_calls_are_numbered() -> None:
    model = Encoder()
    with gradflow.record(model) as recording:
        for _ in range(3):
            model(data()).sum().backward()
    firsts = [f"lstm.l{layer}{end}" for layer in (0, 1) for end in ("", "_reverse")]
    assert list(recording.tracks) == [f"{name}{run}" for run in ("", "@2", "@3") for name in firsts]
    assert [track.backwards for track in recording.values()] == [1] * 12
    assert recording["lstm.l0@3"].name == "lstm.l0@3"


def test_a_module_registered_twice_is_one_module() -> None:
    shared = lstm()
    model = nn.ModuleDict({"a": shared, "b": shared})
    with gradflow.record(model) as recording:
        (model["a"](data())[0].sum() + model["b"](data())[0].sum()).backward()
    assert list(recording.tracks) == ["a.l0", "a.l0@2"]
    assert [track.parity.status for track in recording.values()] == ["passed", "passed"]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("rnn.l0", {"rnn.l0"}),
        ("rnn", {"rnn.l0"}),
        ("encoder.*", {name for name in NAMES if name.startswith("encoder")}),
        ("*_reverse", {"encoder.lstm.l0_reverse", "encoder.lstm.l1_reverse"}),
        (["rnn", "stack.1*"], {"rnn.l0", "stack.1.l0"}),
        ("encoder", {name for name in NAMES if name.startswith("encoder")}),
    ],
    ids=lambda value: "names" if isinstance(value, set) else str(value),
)
def test_layers_picks_by_name_or_glob(layers: str | list[str], names: set[str]) -> None:
    model = Seq2Seq()
    with gradflow.record(model) as recording:
        model(data()).sum().backward()
    torch.manual_seed(0)
    with gradflow.record(model, layers=layers) as picked:
        model(data()).sum().backward()
    assert set(picked.tracks) == names
    for track in picked.values():
        assert track.parity.status == "passed", track.name
        assert track.h.shape == recording[track.name].h.shape


# ----------------------------------------------------------------------- several calls, backwards


def test_the_gradients_of_several_backwards_add_up() -> None:
    model, x = lstm(num_layers=2), data()
    with gradflow.record(model) as together:
        out, (h_n, _) = model(x)
        (out[-1].sum() + 2 * (h_n**2).sum()).backward()
    with gradflow.record(model) as recording:
        out, (h_n, _) = model(x)
        out[-1].sum().backward(retain_graph=True)
        first = recording["l0"].grad_h.clone()
        assert recording["l0"].backwards == 1
        (2 * (h_n**2).sum()).backward()
    for track, once in zip(recording.values(), together.values(), strict=True):
        assert track.backwards == 2
        assert once.backwards == 1
        mask = track.mask
        compare.assert_steps_close(track.grad_h, once.grad_h, mask, what="grad_h")
        compare.assert_steps_close(track.grad_c, once.grad_c, mask, what="grad_c")
        compare.assert_steps_close(track.delta, once.delta, mask, what="delta")
        assert track.parity.status == "passed"
    assert not torch.equal(first, recording["l0"].grad_h)


def test_autograd_grad_counts_as_a_backward() -> None:
    model, x = lstm(), data().requires_grad_()
    with gradflow.record(model) as recording:
        torch.autograd.grad(model(x)[0][-1].sum(), x)
    assert recording["l0"].backwards == 1
    assert recording["l0"].grad_h.isfinite().all()


def test_a_frozen_layer_with_something_to_train_below_it_has_gradients() -> None:
    model, x = lstm(), data()
    expected = oracle_totals(model, x)
    model.requires_grad_(False)
    x.requires_grad_()
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    track = recording["l0"]
    compare.assert_steps_close(track.grad_h, expected.h, track.mask, what="grad_h")
    assert track.parity.status == "not applicable"


def oracle_totals(model: nn.RNNBase, x: Tensor) -> oracles.LayerGrads:
    """Layer 0's totals for L = Σ of the top layer's h_T."""
    unrolled = oracles.unroll(model, x.detach())
    at_output = torch.zeros_like(unrolled.output)
    at_output[-1] = 1.0
    return oracles.pull_back(unrolled, (at_output, None, None))["l0"]


def test_two_layers_that_share_the_loss_have_parity_although_one_call_has_no_gradient() -> None:
    model, x = lstm(), data()
    with pytest.warns(GradflowWarning, match=r"l0: .*not reach"):
        with gradflow.record(model) as recording:
            model(x)
            model(x)[0].sum().backward()
    assert recording["l0"].backwards == 0
    assert recording["l0@2"].parity.status == "passed"


@pytest.mark.parametrize("reads", ["penalty", "tied"])
def test_a_loss_that_reads_the_weight_elsewhere_is_not_a_failed_parity(reads: str) -> None:
    model, x = lstm(), data()
    other = nn.Linear(4, 16, bias=False, dtype=torch.float64)
    both = nn.ModuleDict({"lstm": model, "other": other})
    if reads == "tied":
        other.weight = model.weight_hh_l0
    with gradflow.record(both) as recording:
        out = model(x)[0]
        extra = (model.weight_hh_l0**2).sum() if reads == "penalty" else other(out).sum()
        (out[-1].sum() + extra).backward()
    parity = recording["lstm.l0"].parity
    assert parity.status == "not applicable"
    assert "shared" in parity.reason or "elsewhere" in parity.reason


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"])
def test_parity_fails_when_a_rebuilt_gradient_is_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or "passed" would say nothing."""
    model, x = lstm(proj_size=2), data()
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    (part,) = recording["l0"].source.parts()  # type: ignore[attr-defined]
    right = part.rebuilt()
    largest = right[name].abs().max()
    wrong = right | {name: right[name] + 1e-7 * largest}
    monkeypatch.setattr(type(part), "rebuilt", lambda self: wrong)
    parity = recording["l0"].parity
    assert parity.status == "failed"
    assert parity.error == pytest.approx(1e-7, rel=1e-3)


def test_parity_is_of_this_block_not_of_gradients_gathered_before() -> None:
    model, x = lstm(), data()
    model(x)[0].sum().backward()
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        model.zero_grad()
    assert recording["l0"].parity.status == "passed"


def test_the_recording_can_be_read_inside_the_block() -> None:
    model, x = lstm(), data()
    with gradflow.record(model) as recording:
        out = model(x)[0]
        with pytest.raises(RecordingError, match=r"(?i)no backward"):
            _ = recording["l0"].grad_h
        out[-1].sum().backward()
        inside = recording["l0"].grad_h
    assert torch.equal(inside, recording["l0"].grad_h)


# ------------------------------------------------------------------------------- padded, scaled


@pytest.mark.parametrize("given", ["list", "tensor", "callable"])
def test_lengths_of_a_padded_batch(given: str) -> None:
    """Real steps as without padding; the steps after them are NaN."""
    model, x, lengths = lstm(num_layers=2), data(6, 3), [6, 2, 4]
    seed = torch.zeros(6, 3, 4, dtype=torch.float64)
    for b, length in enumerate(lengths):
        seed[length - 1, b] = torch.arange(1.0, 5.0)
    forms = {"list": lengths, "tensor": torch.tensor(lengths), "callable": lambda _: lengths}
    with gradflow.record(model, lengths=forms[given]) as recording:
        model(x)[0].backward(seed)
    unrolled = oracles.unroll(model, x)
    found = oracles.pull_back(unrolled, (seed, None, None))
    for name in ("l0", "l1"):
        track = recording[name]
        assert track.lengths.tolist() == lengths
        compare.assert_steps_close(track.grad_h, found[name].h, track.mask, what="grad_h")
        h = torch.stack(unrolled.layers[name].h)
        compare.assert_steps_close(track.h, h, track.mask, what="h")
        compare.assert_steps_close(track.grad_h_last, found[name].h, track.mask, what="last")
        assert track.parity.status == "passed"


class Scaler:
    """What `record` needs of a GradScaler."""

    def __init__(self) -> None:
        self.value = 1024.0

    def get_scale(self) -> float:
        return self.value


def test_a_scaler_is_divided_out_with_its_scale_at_the_backward() -> None:
    model, x, scaler = lstm(), data(), Scaler()
    with gradflow.record(model) as plain:
        model(x)[0][-1].sum().backward()
    with gradflow.record(model, scaler=scaler) as recording:
        (model(x)[0][-1].sum() * scaler.value).backward()
        scaler.value *= 2  # scaler.update() comes after the backward
    assert torch.equal(recording["l0"].grad_h, plain["l0"].grad_h)
    assert recording["l0"].parity.status == "passed"


def test_gradients_are_those_before_clipping() -> None:
    model, x = lstm(), data()
    expected = oracle_totals(model, x)
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-6)
    track = recording["l0"]
    compare.assert_steps_close(track.grad_h, expected.h, track.mask)


# ------------------------------------------------------------------------- unusual ways to call


def test_a_weight_dropped_wrapper_that_calls_forward_with_plain_tensors() -> None:
    class WeightDrop(nn.Module):
        """As in awd-lstm: the raw weight is the parameter, the module gets a plain tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.module = lstm()
            raw = self.module.weight_hh_l0
            del self.module._parameters["weight_hh_l0"]
            self.weight_hh_raw = nn.Parameter(raw.data)

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            dropped = nn.functional.dropout(self.weight_hh_raw, 0.5, self.training)
            self.module._flat_weights[1] = dropped
            self.module.weight_hh_l0 = dropped
            return self.module.forward(x)

    model, x = WeightDrop(), data()
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    (track,) = recording.values()
    assert track.name == "l0"  # `module.` is dropped
    used = track.weights["weight_hh"]
    assert used.count_nonzero() < used.numel()
    twin = lstm()
    with torch.no_grad():
        for name, value in track.weights.items():
            getattr(twin, f"{name}_l0").copy_(value)
    expected = oracle_totals(twin, x)
    compare.assert_steps_close(track.grad_h, expected.h, track.mask, what="grad_h")
    compare.assert_steps_close(track.grad_c, expected.c, track.mask, what="grad_c")
    assert track.parity.status == "passed"


@pytest.mark.parametrize("name", ["output", "h_n", "c_n"])
def test_a_users_hook_that_changes_the_gradient_is_part_of_it(name: str) -> None:
    """Clipping by a hook on what the layer returned: the total is of what passes the hook."""
    model, x = lstm(), data()
    with gradflow.record(model) as recording:
        output, (h_n, c_n) = model(x)
        returned = {"output": output, "h_n": h_n, "c_n": c_n}[name]
        returned.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        returned.sum().backward()
    with gradflow.record(model) as expected:
        output, (h_n, c_n) = model(x)
        (0.1 * {"output": output, "h_n": h_n, "c_n": c_n}[name].sum()).backward()
    track = recording["l0"]
    compare.assert_steps_close(track.grad_h, expected["l0"].grad_h, track.mask, what="grad_h")
    compare.assert_steps_close(track.grad_c, expected["l0"].grad_c, track.mask, what="grad_c")
    assert track.parity.status == "passed"


def test_functional_call_with_other_weights() -> None:
    model, x = lstm(num_layers=2), data()
    other = lstm(num_layers=2)
    weights = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    with gradflow.record(model) as recording:
        torch.func.functional_call(model, weights, (x,))[0][-1].sum().backward()
    track = recording["l0"]
    compare.assert_steps_close(track.grad_h, oracle_totals(other, x).h, track.mask, what="grad_h")
    assert torch.equal(track.weights["weight_hh"], other.weight_hh_l0)
    assert track.parity.status == "passed"


def test_weights_that_are_computed_from_parameters() -> None:
    """Pruning: the kernel's weight is no parameter."""
    model, x = lstm(), data()
    prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    track = recording["l0"]
    assert track.weights["weight_hh"].count_nonzero() == 32
    assert track.parity.status == "passed"
    compare.assert_steps_close(track.grad_h, oracle_totals(model, x).h, track.mask, what="grad_h")


def test_a_learned_initial_state_of_a_frozen_layer() -> None:
    model, x = nn.GRU(3, 4, dtype=torch.float64).requires_grad_(False), data()
    h0 = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    with gradflow.record(model) as recording:
        model(x, h0)[1].sum().backward()
    unrolled = oracles.unroll(model, x, hx=(h0.detach(), None))
    ones = torch.ones(1, 2, 4, dtype=torch.float64)
    expected = oracles.pull_back(unrolled, (None, ones, None))["l0"]
    track = recording["l0"]
    compare.assert_steps_close(track.grad_h, expected.h, track.mask, what="grad_h")
    assert track.parity.status == "not applicable"
    assert "frozen" in track.parity.reason


def test_a_dead_relu_gives_exact_zeros() -> None:
    """At the kink torch's own derivative is 0; nothing is clamped to a floor."""
    model = nn.RNN(3, 4, nonlinearity="relu", bias=False, dtype=torch.float64)
    with gradflow.record(model) as recording:
        model(torch.zeros(5, 2, 3, dtype=torch.float64))[0].sum().backward()
    track = recording["l0"]
    assert track.delta.count_nonzero() == 0
    assert torch.equal(track.grad_h, torch.ones(5, 2, 4, dtype=torch.float64))
    assert track.operator().push(1, torch.ones(2, 1, 4, dtype=torch.float64)).count_nonzero() == 0


def test_a_padded_batch_read_in_both_directions() -> None:
    """Without packing the reverse direction runs through the padding first."""
    lengths = [6, 3]
    model, x = nn.GRU(3, 4, 2, bidirectional=True, dtype=torch.float64), data(6)
    seed = torch.zeros(6, 2, 8, dtype=torch.float64)
    seed[0], seed[2, 1] = 1.0, 2.0
    with gradflow.record(model, lengths=lengths) as recording:
        model(x)[0].backward(seed)
    unrolled = oracles.unroll(model, x)
    found = oracles.pull_back(unrolled, (seed, None, None))
    for track in recording.values():
        compare.assert_steps_close(track.grad_h, found[track.name].h, track.mask, what="grad_h")
        assert track.parity.status == "passed"
        dense = oracles.dense_jacobians(unrolled.layers[track.name])
        skip = 3 if track.reverse else 0  # padded steps the second sequence processes first
        operator, ones = track.operator(), torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
        for p in range(3):
            pushed = operator.push(p, ones)
            compare.assert_whole_close(pushed[0].T, dense[p, 0], what=f"A_{p}")
            compare.assert_whole_close(pushed[1].T, dense[p + skip, 1], what=f"A_{p}")


@pytest.mark.parametrize("shape", ["permuted", "expanded", "strided"])
def test_inputs_that_are_not_contiguous(shape: str) -> None:
    model = lstm(num_layers=2)
    x = {
        "permuted": data(2, 5).transpose(0, 1),
        "expanded": data(5, 1).expand(5, 2, 3),
        "strided": data(10, 2)[::2],
    }[shape]
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    expected = oracle_totals(model, x)
    compare.assert_steps_close(recording["l0"].grad_h, expected.h, recording["l0"].mask)


def test_states_carried_from_call_to_call_keep_the_numbers_of_one_long_call() -> None:
    """Two calls, the second from the first's states: the gradients are those of one unrolled graph."""
    model, x = lstm(), data(8)
    expected = oracle_totals(model, x)
    with gradflow.record(model) as recording:
        _, state = model(x[:5])
        out, _ = model(x[5:], state)
        out[-1].sum().backward()
    tracks = list(recording.values())
    assert sum(track.steps for track in tracks) == 8
    compare.assert_steps_close(
        torch.cat([track.grad_h for track in tracks]),
        expected.h,
        torch.ones(8, 2, dtype=torch.bool),
    )
    assert not torch.cat([track.cuts for track in tracks]).any()


def test_packed_data_with_its_own_sorting() -> None:
    """Packed once by the user and passed through two modules; order is the user's in both."""
    first, second, x = lstm(), nn.GRU(4, 4, dtype=torch.float64), data(6, 3)
    both = nn.ModuleList([first, second])
    with gradflow.record(both) as recording:
        packed = pack_padded_sequence(x, torch.tensor([2, 6, 4]), enforce_sorted=False)
        second(first(packed)[0])[1].sum().backward()
    assert [track.lengths.tolist() for track in recording.values()] == [[2, 6, 4]] * 2
    assert torch.equal(recording["1.l0"].inputs.nan_to_num(), recording["0.l0"].h.nan_to_num())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", [nn.GRU, *[nn.LSTM][: int(BFLOAT16_LSTM)]])
def test_autocast_on_the_cpu(layer: type[nn.RNNBase], batch_first: bool) -> None:
    """Run again in another layout a call rounds otherwise, in the bits of the autocast."""
    model, x = layer(12, 20, 2, batch_first=batch_first), data(10, 4, 12).float()
    with gradflow.record(model) as recording, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x.transpose(0, 1) if batch_first else x)[0]
        (out[:, -1] if batch_first else out[-1]).float().sum().backward()
    model.batch_first = False
    expected = oracle_totals(model.double(), x)
    track = recording["l0"]
    compare.assert_steps_close(track.grad_h.float(), expected.h, track.mask, bound=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model, x = nn.GRU(3, 4, 2).to(dtype), data().to(dtype)
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    track = recording["l0"]
    expected = oracle_totals(model, x.double())
    assert track.grad_h.dtype == track.h.dtype == dtype
    compare.assert_steps_close(track.grad_h.float(), expected.h, track.mask, bound=0.1)
    assert track.parity.status == "passed"


# ---------------------------------------------------------------------------- what stays alive


def test_nothing_stays_alive_when_the_recording_is_dropped() -> None:
    model, x = lstm(num_layers=2), data()
    with gradflow.record(model) as recording:
        out = model(x)[0]
        loss = out[-1].sum()
        loss.backward()
    track = recording["l0"]
    _ = (track.grad_h, track.grad_h_last, track.parity, track.gates)
    references = {
        "recording": weakref.ref(recording),
        "track": weakref.ref(track),
        "source": weakref.ref(track.source),
        "output": weakref.ref(out),
        "loss": weakref.ref(loss),
        "model": weakref.ref(model),
        "input": weakref.ref(x),
    }
    del recording, track, out, loss, model, x
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == []


def test_the_users_graph_does_not_live_as_long_as_the_recording() -> None:
    """Outputs, graph, model and input go when the user lets go of them; the numbers stay."""
    model, x = lstm(num_layers=2), data()
    with gradflow.record(model) as recording:
        out = model(x)[0]
        loss = out[-1].sum()
        loss.backward()
    references = {
        "output": weakref.ref(out),
        "loss": weakref.ref(loss),
        "model": weakref.ref(model),
        "input": weakref.ref(x),
    }
    del out, loss, model, x
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == []
    assert recording["l0"].grad_h.isfinite().all()
    assert recording["l0"].parity.status == "passed"


def test_dropping_a_recording_does_not_need_the_garbage_collector_to_run_in_training() -> None:
    """A hundred recorded steps hold no more tensors than one."""

    def live_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model, x = lstm(), data()

    def step() -> None:
        with gradflow.record(model) as recording:
            model(x)[0][-1].sum().backward()
        _ = recording["l0"].grad_h

    step()
    before = live_tensors()
    for _ in range(20):
        step()
    assert live_tensors() <= before


@pytest.mark.parametrize("kind", ["layer", "cell", "tap"])
def test_a_recording_that_is_dropped_goes_at_once(kind: str) -> None:
    """Without the garbage collector, which may let many large recordings pile up."""
    model = {"layer": lstm(num_layers=2), "cell": nn.GRUCell(3, 3).double()}.get(kind, nn.Module())
    state, x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True), data()

    def run() -> Tensor:
        if kind == "layer":
            return model(x)[0]
        h = state
        for x_t in x:
            h = model(x_t, h) if kind == "cell" else gradflow.tap(h=torch.tanh(h + x_t))
        return h

    gc.collect()
    gc.disable()
    try:
        with gradflow.record(model) as recording:
            run().sum().backward()
        track = next(iter(recording.values()))
        _ = (track.grads, track.last_grads, track.h, track.parity)
        held = {name: weakref.ref(thing) for name, thing in vars(track).items() if name == "source"}
        held |= {"recording": weakref.ref(recording), "h": weakref.ref(track.h)}
        del recording, track, _
        assert [name for name, reference in held.items() if reference() is not None] == []
    finally:
        gc.enable()


def test_a_recording_prints_on_one_screen_and_escapes_its_html() -> None:
    model = Seq2Seq()
    with gradflow.record(model) as recording:
        model(data()).sum().backward()
    assert len(repr(recording).splitlines()) <= 24
    assert all(name in repr(recording) for name in NAMES)
    assert "encoder.lstm.l0" in recording._repr_html_()


def test_a_model_can_be_pickled_after_and_inside_a_recording() -> None:
    model, x = lstm(), data()
    with gradflow.record(model):
        model(x)[0].sum().backward()
        inside = pickle.dumps(model.state_dict())
    assert pickle.dumps(model)
    assert inside
