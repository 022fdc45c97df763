"""What to try, as lines of Python on the user's `model`, and where thresholds come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.analyzer.activity import over_all, sigmoid_and_other
from gradflow.analyzer.evidence import Evidence, module

LONG = 24  # letters of a module's path that several lines need not repeat
BAND = "one decade over the span"  # the band of the verdict's equivalence test
MAJORITY = "more than half of them"
CLIP = "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # before optimizer.step()"
NO_BIAS = "# the layer has no bias to raise: build it with bias=True"
NORMALISE = "x = (x - x.mean()) / x.std()"


def orthogonal(e: Evidence) -> str:
    """Start the recurrent weights of a vanilla RNN orthogonal."""
    return f"torch.nn.init.orthogonal_({e.parameter('weight_hh')})"


def identity(e: Evidence) -> str:
    """Start the recurrent weights of a vanilla RNN as the identity."""
    return f"torch.nn.init.eye_({e.parameter('weight_hh')})"


def shrunk(e: Evidence, factor: float) -> str:
    """Multiply the recurrent weights by a factor."""
    return f"{e.parameter('weight_hh')}.data *= {factor:.2g}"


def raised_bias(e: Evidence) -> str:
    """Raise the second block of the input bias: f of an LSTM, z of a GRU."""
    if "bias_ih" not in e.track.weights:
        return NO_BIAS
    hidden = e.track.hidden
    return f"{e.parameter('bias_ih')}.data[{hidden}:{2 * hidden}] += 1.0"


def chrono(e: Evidence) -> str:
    """Biases log(u), u uniform in [1, span − 1]; the LSTM's input gate gets the opposite."""
    if "bias_ih" not in e.track.weights:
        return NO_BIAS
    hidden, bias = e.track.hidden, e.parameter("bias_ih")
    longest = max(e.span - 1, 2)
    lines = [
        f"{e.parameter('bias_hh')}.data[:{2 * hidden}] = 0.0",
        f"{bias}.data[{hidden}:{2 * hidden}].uniform_(1, {longest}).log_()",
    ]
    if e.kind == "LSTM":
        lines.append(f"{bias}.data[:{hidden}] = -{bias}.data[{hidden}:{2 * hidden}]")
    path = module(e.track.owner)
    if len(path) > LONG:  # said once
        lines = [f"layer = {path}", *(line.replace(path, "layer") for line in lines)]
    return "\n".join(lines)


def calmer_input(e: Evidence) -> str:
    """Smaller inputs: of the model where it is this layer, else through the layer's own weights.

    A layer inside a model reads what others make, and the model may read tokens, which have no mean.
    """
    lowest = not e.fused or e.track.name.startswith("l0")
    if "weight_ih" not in e.track.weights or (not e.track.owner and lowest):
        return NORMALISE
    return f"{e.parameter('weight_ih')}.data *= 0.5  # as if it read half of its input"


def inputs_at(e: Evidence, steps: Iterable[int]) -> str:
    """Show what the model reads at some steps, which count from 0."""
    chosen = ", ".join(str(step) for step in steps)
    where = f":, [{chosen}]" if e.track.batch_first else f"[{chosen}]"
    return f"print(x[{where}])  # what is read there"


def against_vanishing(e: Evidence) -> tuple[str, str, str]:
    """Advice, its source and its code for this kind of cell."""
    return _REMEDIES.get(e.kind, _any_cell)(e)


def mean_gate(e: Evidence, gate: str) -> float:
    """Mean of a gate over all real entries."""
    return over_all(sigmoid_and_other(e.track)[gate], e.track.mask)


def _rnn(e: Evidence) -> tuple[str, str, str]:
    weight, activation = (float(value) for value in e.data["rate_factor"].values)
    if activation < weight:  # orthogonal weights would change little
        return (
            "bring the activations back to where they are steep: scale the inputs down, or use a "
            "gated cell (nn.LSTM, nn.GRU)",
            "Pascanu et al. 2013",
            calmer_input(e),
        )
    return (
        "start the recurrent weights orthogonal, or use a gated cell (nn.LSTM, nn.GRU)",
        "Arjovsky et al. 2016; Le et al. 2015",
        orthogonal(e),
    )


def _lstm(e: Evidence) -> tuple[str, str, str]:
    return (
        f"raise the forget gate's bias by 1: the gate's mean is {mean_gate(e, 'f'):.2f}",
        "Jozefowicz et al. 2015",
        raised_bias(e),
    )


def _gru(e: Evidence) -> tuple[str, str, str]:
    return (
        f"raise the update gate's bias by 1: the gate's mean is {mean_gate(e, 'z'):.2f}, and "
        "PyTorch's z is the share of the old state that is kept",
        "Tallec & Ollivier 2018",
        raised_bias(e),
    )


def _any_cell(_: Evidence) -> tuple[str, str, str]:
    return (
        "give the state a path that adds to it instead of overwriting it: a forget gate that starts "
        "open, or recurrent weights that start orthogonal",
        "Jozefowicz et al. 2015; Arjovsky et al. 2016",
        "",
    )


_REMEDIES: dict[str, Callable[[Evidence], tuple[str, str, str]]] = {
    "RNN": _rnn,
    "LSTM": _lstm,
    "GRU": _gru,
}
