"""Findings: what is wrong with a layer, the evidence, and what to try; none without evidence.

Causes of a lost or exploding gradient are looked for only where the verdict is not stable. What
makes numbers unusable (NaN, cuts, one step, parity) is always reported. The menu is `FINDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradflow.analysis import Finding
from gradflow.analyzer.activity import CANDIDATES, CLOSED, OPEN, over_all, sigmoid_and_other
from gradflow.analyzer.evidence import Evidence, counted, number, parameter
from gradflow.analyzer.finite import bad_gradient, bad_input, bad_weight, first_not_finite
from gradflow.analyzer.order import cuts_before, input_time
from gradflow.recording import GATES

MOST = 0.5  # share of units from which on saturation is called a cause
SATURATED = 0.95  # |tanh| above this passes on less than a tenth of the gradient
NO_BIAS = "# the layer has no bias to raise: build it with bias=True"
CLIP = "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # before optimizer.step()"


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Every finding on one layer, the most telling first."""
    finders = SPOILERS if "not finite" in evidence.labels else FINDERS
    return tuple(finding for find in finders for finding in find(evidence))


# ---------------------------------------------------------------------- what spoils the numbers


def not_finite(e: Evidence) -> Iterator[Finding]:
    """The first NaN or Inf, forward in the states, else backward in the gradients."""
    bad, direction = first_not_finite(e.track, e.track.states), "forward"
    if bad is None:
        bad, direction = bad_gradient(e.track), "backward"
    if bad is None:
        return
    symbol = bad.name if direction == "forward" else f"∂L/∂{bad.name}"
    origin = bad_weight(e.track) or bad_input(e.track)
    if origin and direction == "forward":
        yield Finding(
            name="not-finite",
            layer=e.track.name,
            message=f"{origin.what}, and {symbol} is {bad.value} from step {bad.step + 1} on",
            where=bad.where,
            value=float(bad.step + 1),
            advice=origin.advice,
            code=origin.code,
        )
        return
    yield Finding(
        name="not-finite",
        layer=e.track.name,
        message=f"{symbol} is {bad.value} first at {bad.where}, in the {direction} pass",
        where=bad.where,
        value=float(bad.step + 1),
        advice="find the operation that makes it: an overflow, a division by zero, a logarithm of "
        "zero, a learning rate too large",
        code="torch.autograd.set_detect_anomaly(True)",
    )


def no_recurrence(e: Evidence) -> Iterator[Finding]:
    """One step: no recurrence is exercised."""
    if "no recurrence" in e.labels:
        by_hand = e.track.cell not in GATES
        yield Finding(
            name="no-recurrence",
            layer=e.track.name,
            message="every sequence has one step, so the recurrent weights carry no gradient",
            value=1.0,
            advice="mark the states inside the loop, once per step"
            if by_hand
            else "give longer sequences; perhaps the time and the batch axis are swapped",
            code="h, c = gradflow.tap(h=h, c=c)"
            if by_hand
            else f"nn.{e.kind}(..., batch_first=True)  # where the input is (batch, time, features)",
        )


def parity_failed(e: Evidence) -> Iterator[Finding]:
    """Gradients that contradict those of the recorded backward."""
    parity = e.track.parity
    if parity.status == "failed" and bad_gradient(e.track) is None:
        yield Finding(
            name="parity-failed",
            layer=e.track.name,
            message=f"parameter gradients rebuilt from the recorded ones are off: {parity.reason}",
            value=parity.error,
            advice="the results that rest on the loss are withheld; please report this with the "
            "model that shows it",
        )


def cut(e: Evidence) -> Iterator[Finding]:
    """Steps at which nothing of the previous state arrives."""
    inside = cuts_before(e.track).diff(dim=0, prepend=torch.zeros(1, e.track.batch).int()) > 0
    inside &= torch.arange(e.track.steps)[:, None] < e.track.lengths.cpu()
    where = input_time(e.track)[inside]
    steps = sorted(set(where.tolist()))
    if not steps or (e.kind == "tap" and steps == [1]):  # a constant start, said in a note
        return
    shown = ", ".join(str(t + 1) for t in steps[:5]) + (", …" if len(steps) > 5 else "")
    noun = "step" if len(steps) == 1 else "steps"
    yield Finding(
        name="cut",
        layer=e.track.name,
        message=f"the state is cut off from its past at {noun} {shown}: no gradient crosses there",
        where=f"{noun} {shown}",
        value=float(len(steps)),
        advice="carry the state without detach() if the task reaches across, or use a longer window",
    )


# --------------------------------------------------------------------------------- the verdicts


def dead(e: Evidence) -> Iterator[Finding]:
    """Exact zeros on every path."""
    if e.verdict.name != "dead":
        return
    cut_off = int(sum(rate == -math.inf for rate in e.sequence_rates))
    share = f"{cut_off} of {counted(len(e.sequence_rates), 'sequence')}"
    extra = ""
    if e.track.cell == "RNN_RELU":
        idle = _idle_units(e)
        extra = f"; {idle} of {e.track.hidden} ReLU units are 0 at every step" if idle else ""
    yield Finding(
        name="dead",
        layer=e.track.name,
        message=f"exact zeros cut every path in {share}{extra}",
        where=share,
        value=-math.inf,
        advice="start from an identity recurrent matrix and zero biases, lower the learning rate, "
        "or use a gated cell"
        if e.track.cell == "RNN_RELU"
        else "look for gates or activations that saturate to exactly 0: scale inputs and weights down",
        source="Le et al. 2015" if e.track.cell == "RNN_RELU" else "",
        severity=-math.inf,
        code=f"torch.nn.init.eye_({parameter(e.track.name, 'weight_hh')})"
        if e.track.cell == "RNN_RELU"
        else "",
    )


def _idle_units(e: Evidence) -> int:
    h = e.track.h.detach().cpu()
    active = ((h > 0) & e.track.mask.cpu()[..., None]).any(0).any(0)
    return int((~active).sum())


def vanishing(e: Evidence) -> Iterator[Finding]:
    """The rate lies below the band, with the remedy for this kind of cell."""
    if e.verdict.name != "vanishing":
        return
    advice, source, code = _REMEDIES.get(e.kind, _any_remedy)(e)
    yield Finding(
        name="vanishing",
        layer=e.track.name,
        message=f"the gradient loses {number(-e.decades)} decades over {counted(e.span, 'step')}: "
        f"rate {_interval(e)} per step, below −{number(e.band)}",
        where=_sequences(e),
        value=e.rate.value,
        low=e.rate.low,
        high=e.rate.high,
        threshold=-e.band,
        source=source,
        severity=e.decades,
        advice=advice,
        code=code,
    )


def _rnn_remedy(e: Evidence) -> tuple[str, str, str]:
    weight = parameter(e.track.name, "weight_hh")
    return (
        "start the recurrent weights orthogonal, or use a gated cell (nn.LSTM, nn.GRU)",
        "Arjovsky et al. 2016; Le et al. 2015",
        f"torch.nn.init.orthogonal_({weight})",
    )


def _lstm_remedy(e: Evidence) -> tuple[str, str, str]:
    forget = _mean_gate(e, "f")
    return (
        f"raise the forget gate's bias by 1: the gate's mean is {forget:.2f}",
        "Jozefowicz et al. 2015",
        _bias_code(e),
    )


def _gru_remedy(e: Evidence) -> tuple[str, str, str]:
    update = _mean_gate(e, "z")
    return (
        f"raise the update gate's bias by 1: the gate's mean is {update:.2f}, and PyTorch's z is the "
        "share of the old state that is kept",
        "Tallec & Ollivier 2018",
        _bias_code(e),
    )


def _bias_code(e: Evidence) -> str:
    """Raise the second block of the input bias: f of an LSTM, z of a GRU."""
    if "bias_ih" not in e.track.weights:
        return NO_BIAS
    hidden = e.track.hidden
    return f"{parameter(e.track.name, 'bias_ih')}.data[{hidden}:{2 * hidden}] += 1.0"


def _chrono_code(e: Evidence) -> str:
    """Biases log(u), u uniform in [1, span − 1]; the LSTM's input gate gets the opposite."""
    if "bias_ih" not in e.track.weights:
        return NO_BIAS
    hidden, bias = e.track.hidden, parameter(e.track.name, "bias_ih")
    longest = max(e.span - 1, 2)
    lines = [
        f"{parameter(e.track.name, 'bias_hh')}.data[:{2 * hidden}] = 0.0",
        f"{bias}.data[{hidden}:{2 * hidden}].uniform_(1, {longest}).log_()",
    ]
    if e.kind == "LSTM":
        lines.append(f"{bias}.data[:{hidden}] = -{bias}.data[{hidden}:{2 * hidden}]")
    return "\n".join(lines)


def _any_remedy(_: Evidence) -> tuple[str, str, str]:
    return (
        "give the state a path that adds to it instead of overwriting it: a forget gate that starts "
        "open, or recurrent weights that start orthogonal",
        "Jozefowicz et al. 2015; Arjovsky et al. 2016",
        "",
    )


_REMEDIES: dict[str, Callable[[Evidence], tuple[str, str, str]]] = {
    "RNN": _rnn_remedy,
    "LSTM": _lstm_remedy,
    "GRU": _gru_remedy,
}


def exploding(e: Evidence) -> Iterator[Finding]:
    """The rate lies above the band."""
    if e.verdict.name != "exploding":
        return
    steps = max(1, round(math.log(2) / e.rate.value))
    yield Finding(
        name="exploding",
        layer=e.track.name,
        message=f"the gradient gains {number(e.decades)} decades over {counted(e.span, 'step')}: "
        f"rate {_interval(e)} per step, above {number(e.band)}",
        where=_sequences(e),
        value=e.rate.value,
        low=e.rate.low,
        high=e.rate.high,
        threshold=e.band,
        source="Pascanu et al. 2013; Mikhaeil et al. 2022",
        severity=e.decades,
        advice="clip the norm of the gradient, never its parts; that does not cure chaos: a positive "
        f"rate also asks to cut or teacher-force every ln 2/λ₁ = {counted(steps, 'step')}",
        code=CLIP,
    )


def transient(e: Evidence) -> Iterator[Finding]:
    """Growth by more than a decade that the rate does not show."""
    if "transient growth" not in e.labels or e.verdict.name in ("exploding", "stable"):
        return
    peak = float(max(value for value in e.curve.median if not math.isnan(value)))
    lag = int(list(e.curve.median).index(peak))
    yield Finding(
        name="transient-growth",
        layer=e.track.name,
        message=f"before it fades, the gain rises to 10^{number(peak / math.log(10))} at a distance of "
        f"{counted(lag, 'step')}",
        where=f"lag {lag}",
        value=peak,
        threshold=math.log(10),
        severity=peak / math.log(10),
        source="Pascanu et al. 2013",
        advice="clip the norm of the gradient, or shrink the norm of the recurrent weights",
        code=CLIP,
    )


def few_channels(e: Evidence) -> Iterator[Finding]:
    """Hardly any direction survives where the verdict is open."""
    few = e.channels is not None and e.channels <= max(1, e.size // 20) and e.size >= 8
    if e.verdict.name not in ("inconclusive", "exploding") or not few:
        return
    assert e.channels is not None
    yield Finding(
        name="few-channels",
        layer=e.track.name,
        message=f"{e.channels} of {e.size} directions {'survives' if e.channels == 1 else 'survive'} "
        f"{counted(e.reach, 'step')}",
        value=float(e.channels),
        threshold=float(max(1, e.size // 20)),
        source="Engelken 2023",
        advice="start the recurrent weights orthogonal, so that more directions keep their gradient",
        code=f"torch.nn.init.orthogonal_({parameter(e.track.name, 'weight_hh')})"
        if e.kind == "RNN"
        else "",
    )


# ----------------------------------------------------------------------------------- the causes


def forget_gates(e: Evidence) -> Iterator[Finding]:
    """An LSTM whose forget gates alone shorten the memory below the span."""
    if e.kind != "LSTM" or not e.fades:
        return
    forget = sigmoid_and_other(e.track)["f"]
    mean = over_all(forget, e.track.mask)
    pace = over_all(forget.log(), e.track.mask)
    # the whole layer forgets faster than one decade over the span through this gate alone
    if not pace < -e.band:
        return
    scale = -1 / pace
    yield Finding(
        name="forget-gates-closed",
        layer=e.track.name,
        message=f"forget gates average {mean:.2f}: cells keep their memory for "
        f"{number(scale)} steps, of your {e.span}",
        where=f"{_share(forget < CLOSED, e)} of the units closed (below {CLOSED:g})",
        value=scale,
        threshold=1 / e.band,
        source="Tallec & Ollivier 2018",
        severity=pace * e.span / math.log(10),
        advice="draw the forget biases from the range of distances in the task (chrono "
        "initialisation); of the two bias vectors, which add up, set one to zero",
        code=_chrono_code(e),
    )


def update_gates(e: Evidence) -> Iterator[Finding]:
    """A GRU whose update gates overwrite the state at every step."""
    if e.kind != "GRU" or not e.fades:
        return
    update = sigmoid_and_other(e.track)["z"]
    mean = over_all(update, e.track.mask)
    pace = over_all(update.log(), e.track.mask)
    if not (pace < -e.band and mean < 0.75):
        return
    yield Finding(
        name="update-gates-overwrite",
        layer=e.track.name,
        message=f"update gates average {mean:.2f}: units keep their state for "
        f"{number(-1 / pace)} steps, of your {e.span}",
        where=f"{_share(update < CLOSED, e)} of the units below {CLOSED:g}",
        value=-1 / pace,
        threshold=1 / e.band,
        source="Tallec & Ollivier 2018",
        severity=pace * e.span / math.log(10),
        advice="draw the update biases from the range of distances in the task (chrono "
        "initialisation), so that units keep their state; of the two bias vectors set one to zero",
        code=_chrono_code(e),
    )


def saturated(e: Evidence) -> Iterator[Finding]:
    """Activations at their flat ends in most units."""
    if not e.fades or e.track.cell not in GATES or e.track.cell == "RNN_RELU":
        return  # other states may have no limits
    tensors = sigmoid_and_other(e.track) or {"h": e.track.h.detach().cpu().double()}
    for name, values in tensors.items():
        if name in ("f", "z"):
            continue  # said by their own finding; open ones are memory
        flat = values.abs() > SATURATED if name in (*CANDIDATES, "h") else values < CLOSED
        share = over_all(flat.double(), e.track.mask)
        if not share > MOST:
            continue
        what = "activations" if name in (*CANDIDATES, "h") else "gates"
        limit = f"|{name}| > {OPEN:g}" if what == "activations" else f"{name} < {CLOSED:g}"
        yield Finding(
            name=f"saturated-{what}",
            layer=e.track.name,
            message=f"{share:.0%} of the {what} {name} are saturated ({limit})",
            where=f"{what} {name}",
            value=share,
            threshold=MOST,
            advice="scale the inputs or the weights down, or add layer normalisation",
            code="x = (x - x.mean()) / x.std()",
            source="Pascanu et al. 2013" if what == "activations" else "",
        )


def _mean_gate(e: Evidence, gate: str) -> float:
    return over_all(sigmoid_and_other(e.track)[gate], e.track.mask)


def _share(which: Tensor, e: Evidence) -> str:
    return f"{over_all(which.double(), e.track.mask):.0%}"


def _interval(e: Evidence) -> str:
    return f"{number(e.rate.value)} [{number(e.rate.low)}, {number(e.rate.high)}]"


def _sequences(e: Evidence) -> str:
    return "one sequence" if e.track.batch == 1 else f"{e.track.batch} sequences"


Finder = Callable[[Evidence], Iterator[Finding]]
SPOILERS: tuple[Finder, ...] = (not_finite, no_recurrence, parity_failed)
FINDERS: tuple[Finder, ...] = (
    *SPOILERS,
    dead,
    vanishing,
    exploding,
    forget_gates,
    update_gates,
    saturated,
    transient,
    few_channels,
    cut,
)
