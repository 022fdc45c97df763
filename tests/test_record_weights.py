"""Calls with any weights: by hand through torch's functions, computed, normed, dropped, parametrized."""

# ruff: noqa: SIM117  (what is awaited comes as the recording's block ends)

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import compare
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import gradflow
from gradflow.errors import GradflowWarning
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def data(steps: int = 5) -> Tensor:
    return torch.randn(steps, 2, 3, dtype=torch.float64)


def check_totals(recording: Recording, prefix: str, twin: nn.RNNBase, x: Tensor) -> None:
    """Every layer's totals for L = Σ of the top layer's h_T, with the weights that were used."""
    with torch.no_grad():
        for suffix in oracles.suffixes(twin):
            for name, value in recording[f"{prefix}{suffix}"].weights.items():
                getattr(twin, f"{name}_{suffix}").copy_(value)
    unrolled = oracles.unroll(twin, x.detach())
    at_output = torch.zeros_like(unrolled.output)
    at_output[-1] = 1.0
    found = oracles.pull_back(unrolled, (at_output, None, None))
    for suffix in oracles.suffixes(twin):
        track, want = recording[f"{prefix}{suffix}"], found[suffix]
        compare.assert_steps_close(track.grad_h, want.h, track.mask, what="grad_h")
        if want.c is not None:
            compare.assert_steps_close(track.grad_c, want.c, track.mask, what="grad_c")
        assert track.parity.status == "passed", track.parity


# ---------------------------------------------------------------- functions of torch, by hand


class Holder(nn.Module):
    """Holds a module that is never called: its weights go to a function of torch."""

    def __init__(self, kind: str = "LSTM", layers: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.rnn = KINDS[kind](3, 4, layers, dtype=torch.float64)
        self.other = nn.Linear(3, 3, dtype=torch.float64)

    def run(self, x: Tensor, change: Callable[[Tensor], Tensor], space: Any) -> Tensor:
        rnn = self.encoder.rnn
        h = torch.zeros(rnn.num_layers, x.shape[1], 4, dtype=x.dtype)
        weights = [change(weight) for weight in rnn._flat_weights]
        function = getattr(space, rnn.mode.lower())
        hidden = (h, h) if rnn.mode == "LSTM" else h
        settings = (True, rnn.num_layers, 0.0, True, False, False)
        return function(self.other(x), hidden, weights, *settings)[0]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "themselves": lambda weight: weight,
    "dropped": lambda weight: F.dropout(weight, 0.3),
    "normed": lambda weight: weight / weight.norm() * 2,
    "copied": lambda weight: weight.clone().view_as(weight) + 0,
}


@pytest.mark.parametrize("space", [torch, torch._VF], ids=["torch", "torch._VF"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_called_by_hand(
    kind: str, change: Callable[[Tensor], Tensor], space: Any
) -> None:
    """The track bears the name of the module that holds what the weights were computed from."""
    model, x = Holder(kind, layers=2), data()
    with gradflow.record(model) as recording:
        model.run(x, change, space)[-1].sum().backward()
    assert list(recording.tracks) == ["encoder.rnn.l0", "encoder.rnn.l1"]
    twin = KINDS[kind](3, 4, 2, dtype=torch.float64)
    check_totals(recording, "encoder.rnn.", twin, model.other(x))


def test_arguments_by_name() -> None:
    rnn, x = nn.RNN(3, 4, dtype=torch.float64), data()
    h = torch.zeros(1, 2, 4, dtype=torch.float64)
    cell = nn.GRUCell(3, 4, dtype=torch.float64)
    model = nn.ModuleDict({"rnn": rnn, "cell": cell})
    packed = pack_padded_sequence(x, [5, 3])
    names = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
    settings = dict(zip(names, (True, 1, 0.0, True, False), strict=True))
    weights = rnn._flat_weights
    with gradflow.record(model) as recording:
        out = torch.rnn_tanh(input=x, hx=h, params=weights, batch_first=False, **settings)[0]
        data_, sizes = packed.data, packed.batch_sizes
        more = torch.rnn_tanh(data=data_, batch_sizes=sizes, hx=h, params=weights, **settings)[0]
        state = h[0]
        for x_t in x:
            state = torch.gru_cell(
                x_t, state, cell.weight_ih, cell.weight_hh, b_hh=cell.bias_hh, b_ih=cell.bias_ih
            )
        (out[-1].sum() + more.sum() + state.sum()).backward()
    assert list(recording.tracks) == ["rnn.l0", "rnn.l0@2", "cell"]
    assert recording["rnn.l0@2"].lengths.tolist() == [5, 3]
    assert [track.parity.status for track in recording.values()] == ["passed"] * 3


class Hypernetwork(nn.Module):
    """All weights of the recurrence come out of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 16 * 3 + 16 * 4, dtype=torch.float64)
        self.code = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.net(self.code)
        h = torch.zeros(1, x.shape[1], 4, dtype=x.dtype)
        pair = [weights[:48].view(16, 3), weights[48:].view(16, 4)]
        return torch.lstm(x, (h, h), pair, False, 1, 0.0, True, False, False)[0]


def test_weights_that_come_from_several_modules_bear_the_name_of_what_holds_them_all() -> None:
    model, x = nn.ModuleDict({"head": Hypernetwork()}), data()
    with gradflow.record(model) as recording:
        model["head"](x)[-1].sum().backward()
    assert list(recording.tracks) == ["head.l0"]
    check_totals(recording, "head.", nn.LSTM(3, 4, bias=False, dtype=torch.float64), x)


def test_a_loop_over_a_cell_function_with_computed_weights() -> None:
    cell, x = nn.LSTMCell(3, 4, dtype=torch.float64), data()
    model = nn.ModuleDict({"decoder": cell})
    with gradflow.record(model) as recording:
        weights = [F.dropout(weight, 0.2) for weight in cell.parameters()]
        h = c = torch.zeros(2, 4, dtype=torch.float64)
        kept = []
        for x_t in x:
            h, c = torch.lstm_cell(x_t, (h, c), *weights)
            h.retain_grad()
            kept.append(h)
        h.sum().backward()
    (track,) = recording.values()
    assert track.name == "decoder"
    compare.assert_steps_close(track.grad_h, torch.stack([k.grad for k in kept]), track.mask)
    assert track.parity.status == "passed"


def test_weights_of_nobody_are_refused_in_words() -> None:
    """Computed without gradient, nothing says whose they are."""
    model, x = Holder(), data()
    with pytest.warns(GradflowWarning, match=r"no recurrent layer of Holder ran: a function of "):
        with gradflow.record(model), torch.no_grad():
            model.run(x, lambda weight: weight * 2, torch)


def test_a_layer_in_a_plain_list_is_refused_in_words() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.GRU(3, 4)]
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[0](x)[0])

    model = Listed()
    with pytest.warns(GradflowWarning, match=r"a module \(GRU\) ran .*not a plain list"):
        with gradflow.record(model):
            model(data().float()).sum().backward()


# --------------------------------------------------------------------------- parametrizations


def old_weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


WAYS: dict[str, Callable[[nn.Module, str], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_layers(kind: str, way: Callable[[nn.Module, str], object]) -> None:
    model, x = KINDS[kind](3, 4, 2, dtype=torch.float64), data()
    for name in ("weight_hh_l0", "weight_ih_l0", "weight_hh_l1"):
        way(model, name)
    with gradflow.record(model) as recording:
        model(x)[0][-1].sum().backward()
    assert list(recording.tracks) == ["l0", "l1"]
    check_totals(recording, "", KINDS[kind](3, 4, 2, dtype=torch.float64), x)


@every_way
@pytest.mark.parametrize("stepwise", ["cell", "fused"])
def test_parametrized_loops(stepwise: str, way: Callable[[nn.Module, str], object]) -> None:
    """One track, although the weight is computed anew for every step (and changes, in spectral norm)."""
    x, kept, state = data(), [], None
    model: nn.Module = (nn.LSTMCell if stepwise == "cell" else nn.LSTM)(3, 4, dtype=torch.float64)
    way(model, "weight_hh" if stepwise == "cell" else "weight_hh_l0")
    with gradflow.record(model) as recording:
        for x_t in x:
            if stepwise == "cell":
                state = model(x_t, state)
            else:
                _, state = model(x_t[None], state)
            state[0].retain_grad()
            kept.append(state[0])
        state[0].sum().backward()
    (track,) = recording.values()
    totals = torch.stack([h.grad.reshape(2, 4) for h in kept])
    compare.assert_steps_close(track.grad_h, totals, track.mask, what="grad_h")
    assert track.parity.status == "passed"


def test_a_cached_parametrization() -> None:
    model, x = nn.GRU(3, 4, dtype=torch.float64), data()
    parametrizations.weight_norm(model, "weight_hh_l0")
    with gradflow.record(model) as recording, parametrize.cached():
        (model(x)[0][-1].sum() + model(x)[0][-1].sum()).backward()
    assert list(recording.tracks) == ["l0", "l0@2"]
    check_totals(recording, "", nn.GRU(3, 4, dtype=torch.float64), x)


class WeightDrop(nn.Module):
    """As in AWD-LSTM: raw weights are parameters here, the module is given plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2, dtype=torch.float64)
        self.names = ["weight_hh_l0", "weight_hh_l1"]
        for name in self.names:
            raw = getattr(self.rnn, name)
            del self.rnn._parameters[name]
            self.register_parameter(f"{name}_raw", nn.Parameter(raw.data))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            dropped = F.dropout(getattr(self, f"{name}_raw"), 0.5, self.training)
            setattr(self.rnn, name, dropped)
        self.rnn._flat_weights = [getattr(self.rnn, name) for name in self.rnn._flat_weights_names]
        return self.rnn.forward(x)[0]


def test_weight_dropout_of_a_stack_called_through_forward() -> None:
    model, x = WeightDrop(), data()
    with gradflow.record(model) as recording:
        model(x)[-1].sum().backward()
    assert list(recording.tracks) == ["rnn.l0", "rnn.l1"]
    assert recording["rnn.l0"].weights["weight_hh"].count_nonzero() < 64
    check_totals(recording, "rnn.", nn.LSTM(3, 4, 2, dtype=torch.float64), x)
