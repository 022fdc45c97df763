"""No remedy that cannot help: each is tried on the recorded batch, or asks to train again.

Oracle: the line of advice is run on the model, and the model is recorded and analyzed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from seam import decades
from torch import Tensor, nn

import gradflow
from gradflow.analysis import LayerAnalysis
from gradflow.analyzer import analyze
from gradflow.prediction import with_predictions
from gradflow.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SEQUENCES, INPUTS, HIDDEN = 40, 5, 3, 8


def recorded(module: nn.Module, x: Tensor) -> Recording:
    with gradflow.record(module) as recording:
        module(x)[0][-1].sum().backward()
    return recording


def with_weights(
    module: nn.RNNBase, fill: Callable[[nn.RNNBase], object] = lambda module: None
) -> nn.RNNBase:
    with torch.no_grad():
        fill(module)
    return module


def x(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(STEPS, SEQUENCES, INPUTS)


def shut(module: nn.RNNBase) -> None:
    module.bias_ih_l0[:HIDDEN] -= 8.0


SICK = {
    "LSTM": lambda: (nn.LSTM(INPUTS, HIDDEN), x()),
    "GRU": lambda: (nn.GRU(INPUTS, HIDDEN), x()),
    "LSTM without biases": lambda: (nn.LSTM(INPUTS, HIDDEN, bias=False), x()),
    "LSTM, input gates shut": lambda: (with_weights(nn.LSTM(INPUTS, HIDDEN), shut), x()),
    "RNN": lambda: (nn.RNN(INPUTS, HIDDEN), x()),
    "RNN, saturated": lambda: (
        with_weights(nn.RNN(INPUTS, HIDDEN), lambda m: nn.init.orthogonal_(m.weight_hh_l0)),
        x(30.0),
    ),
    "RNN, exploding": lambda: (
        with_weights(
            nn.RNN(INPUTS, HIDDEN, bias=False), lambda m: nn.init.orthogonal_(m.weight_hh_l0, 1.6)
        ),
        x(1e-9),
    ),
    "RNN, chaotic": lambda: (
        with_weights(
            nn.RNN(INPUTS, 32, bias=False), lambda m: nn.init.normal_(m.weight_hh_l0, std=0.6)
        ),
        x(0.1),
    ),
}


@pytest.mark.parametrize("make", SICK.values(), ids=SICK)
def test_every_line_helps_or_asks_to_train(make: Callable[[], tuple[nn.RNNBase, Tensor]]) -> None:
    module, given = make()
    recording = recorded(module, given)
    layer = analyze(recording)["l0"]
    before = abs(decades(recording["l0"], list(range(SEQUENCES)), STEPS))
    assert layer.findings
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for finding in layer.findings:
        promises = finding.code and "train" not in finding.advice and "clip" not in finding.code
        if not promises or finding.code.startswith("# the layer has no bias"):
            continue
        names = {"model": module, "x": given.clone(), "torch": torch}
        exec(finding.code, names)  # noqa: S102
        again = recorded(module, names["x"])  # type: ignore[arg-type]
        after = abs(decades(again["l0"], list(range(SEQUENCES)), STEPS))
        assert after < before - 0.05, (finding.name, finding.code, before, after)
        module.load_state_dict(state)


def test_a_bias_that_does_not_help_is_not_advised() -> None:
    def far_open(module: nn.RNNBase) -> None:
        """Forget gates at 1, and cells that a wide W_hh turns over: opening them more does nothing."""
        for weight in module.parameters():
            nn.init.zeros_(weight)
        module.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 60.0
        # the paths through h cancel the cell path, so that ∂c/∂c is near 0
        module.weight_hh_l0[2 * HIDDEN : 3 * HIDDEN] = -3.4 * torch.eye(HIDDEN)

    module = with_weights(nn.LSTM(INPUTS, HIDDEN, dtype=torch.float64), far_open)
    recording = recorded(module, torch.zeros(STEPS, SEQUENCES, INPUTS).double())
    layer = analyze(recording)["l0"]
    assert layer.verdict == "vanishing"
    (finding,) = [f for f in layer.findings if f.name == "vanishing"]
    assert "raise" not in finding.advice and "uniform_(1, 39)" in finding.code  # what helps is
    every = list(range(SEQUENCES))
    before = abs(decades(recording["l0"], every, STEPS))
    exec(finding.code, {"model": module})  # noqa: S102
    again = recorded(module, torch.zeros(STEPS, SEQUENCES, INPUTS).double())
    assert abs(decades(again["l0"], every, STEPS)) < before - 0.05


@pytest.mark.parametrize(
    ("kind", "said"), [(nn.GRU, "raised by 1, or drawn"), (nn.RNN, "orthogonal")]
)
def test_where_nothing_helps_nothing_is_advised(
    kind: type[nn.RNNBase], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradflow.analyzer.causes.remedies.TRIED_LEAST", math.inf)
    layer = analyze(recorded(kind(INPUTS, HIDDEN), x()))["l0"]
    (finding,) = [f for f in layer.findings if f.name == "vanishing"]
    assert (finding.code, finding.source) == ("", "")
    assert said in finding.advice and "do not bring the gain nearer to 1" in finding.advice


def bias_lines(layer: LayerAnalysis) -> list[str]:
    return [f.code for f in layer.findings if "bias" in f.code]


def test_no_bias_of_the_module_is_advised_where_other_weights_ran() -> None:
    lstm = nn.LSTM(INPUTS, HIDDEN)
    other = {n: p.detach().clone().requires_grad_() for n, p in lstm.named_parameters()}
    with gradflow.record(lstm) as recording:
        torch.func.functional_call(lstm, other, (x(),))[0][-1].sum().backward()
    assert recording["l0"].foreign == {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    layer = with_predictions(recording, analyze(recording))["l0"]
    assert layer.verdict == "vanishing"
    assert bias_lines(layer) == []
    assert "bias" not in " ".join(f.advice for f in layer.findings)
    assert layer.predictions == ()
    # and with its own it is
    with gradflow.record(lstm) as recording:
        torch.func.functional_call(lstm, dict(lstm.named_parameters()), (x(),))[0][
            -1
        ].sum().backward()
    assert recording["l0"].foreign == frozenset()
    assert bias_lines(analyze(recording)["l0"])


def test_weights_that_a_hypernetwork_makes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.hyper = nn.GRU(INPUTS, HIDDEN), nn.Linear(2, 1)

        def forward(self, given: Tensor) -> tuple[Tensor]:
            factor = self.hyper(torch.ones(2))
            weights = {n: p * factor for n, p in self.rnn.named_parameters()}
            return (torch.func.functional_call(self.rnn, weights, (given,))[0],)

    layer = analyze(recorded(Net(), x()))["rnn.l0"]
    assert layer.verdict == "vanishing"
    assert bias_lines(layer) == []


def test_dropped_recurrent_weights_keep_the_advice_on_their_own_biases() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.LSTM(INPUTS, HIDDEN), "weight_hh_l0")
    recording = recorded(module, x())
    assert recording["l0"].foreign == {"weight_hh"}
    layer = analyze(recording)["l0"]
    assert bias_lines(layer)
    assert not any("weight_hh" in f.code for f in layer.findings)
    plain = nn.utils.parametrizations.weight_norm(nn.RNN(INPUTS, HIDDEN), "weight_hh_l0")
    assert not any("weight_hh" in f.code for f in analyze(recorded(plain, x()))["l0"].findings)


def test_too_dear_to_try_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradflow.analyzer.causes.remedies.TRIED_SECONDS", 0.0)
    (finding,) = [
        f
        for f in analyze(recorded(nn.LSTM(INPUTS, HIDDEN), x()))["l0"].findings
        if f.name == "vanishing"
    ]
    assert "was not tried here" in finding.advice
    assert finding.code == "print(gradflow.what_if(recording, forget_bias=1.0))"


def test_a_layer_changed_alone_is_the_changed_module() -> None:
    module, given = nn.LSTM(INPUTS, HIDDEN, 2, dtype=torch.float64), x().double()
    recording = recorded(module, given)
    changed = recording["l1"].changed(forget_bias=1.0, scale_hh=0.5, scale_ih=0.25)
    with torch.no_grad():
        module.bias_ih_l1[HIDDEN : 2 * HIDDEN] += 1.0
        module.weight_hh_l1 *= 0.5
        module.weight_ih_l1 *= 0.25
    again = recorded(module, given)["l1"]
    assert torch.equal(changed.h, again.h)
    assert torch.equal(changed.weights["weight_ih"], again.weights["weight_ih"])
    every = list(range(SEQUENCES))
    assert decades(changed, every, STEPS) == decades(again, every, STEPS)
    assert not math.isclose(decades(recording["l1"], every, STEPS), decades(again, every, STEPS))


def test_loops_of_the_users_own_are_not_run_again() -> None:
    with gradflow.record(nn.Linear(1, 1)) as recording:
        h = torch.ones(2, 3, requires_grad=True)
        for _ in range(STEPS):
            h = gradflow.tap(h=0.5 * h)
        h.sum().backward()
    with pytest.raises(gradflow.GradflowError, match="user's own code, which is not run again"):
        recording["loop"].changed(scale_hh=0.5)
    (finding,) = [f for f in analyze(recording)["loop"].findings if f.name == "vanishing"]
    assert finding.code == ""
    assert "train again" in finding.advice
