"""What to try, as lines of Python on the user's `model`; only what helps on the recorded batch.

The layer is run again with the change of weights, and the same few vectors are pushed through its
steps before and after; nothing is trained. A remedy that does not help here is not advised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gradflow.analyzer.activity import over_all, sigmoid_and_other
from gradflow.analyzer.blocks import SPEED
from gradflow.analyzer.evidence import Evidence, module, parameter
from gradflow.analyzer.jacobians import operator_of, state_size
from gradflow.analyzer.timeline import cuts_before
from gradflow.cells import layer_names
from gradflow.cells.spec import Keeper
from gradflow.errors import RecordingError
from gradflow.limits import (
    BAND,
    BAND_WORDS,
    GATE_CLOSED,
    LARGE_INPUT,
    LESS_SHUT,
    TRIED_LEAST,
    TRIED_SECONDS,
    TRIED_SEQUENCES,
    TRIED_VECTORS,
)
from gradflow.recording.track import Track


@dataclass(frozen=True)
class Try:
    """What a change of weights did on the recorded batch."""

    won: float  # decades, or a share of a gate's values; NaN: not tried
    least: float  # from which on that is worth an advice
    why_not: str = ""  # in words, where it was not tried
    left: float = math.inf  # decades over the span that the gain is still away from 1

    @property
    def helps(self) -> bool:
        """Whether it did enough to be advised."""
        return self.won >= self.least


def tried(e: Evidence, *, opens: str = "", **changes: float) -> Try:
    """Run a layer again with changed weights, and see whether it does what the remedy promises.

    Args:
        e: of the layer.
        opens: a gate that is to be shut less often; by default the gain is to come nearer to 1.
        changes: see `Track.changed`.
    """
    key = (opens, *sorted(changes.items()))
    if key not in e.tries:
        e.tries[key] = _try(e, changes, opens)
    return e.tries[key]


def _try(e: Evidence, changes: dict[str, float], opens: str) -> Try:
    least = LESS_SHUT if opens else TRIED_LEAST
    seconds = _seconds(e.track)
    if seconds > TRIED_SECONDS * e.share:
        return Try(math.nan, least, f"that would take about {max(1, round(seconds))} s")
    others = [b for b in range(e.track.batch) if b not in e.mapped]
    sequences = [*e.mapped, *others][:TRIED_SEQUENCES]

    def amiss(track: Track) -> float:
        """What the change is to make smaller."""
        if opens:
            return over_all((track.gates[opens] < GATE_CLOSED).double(), track.mask)
        return abs(decades(track, sequences, e.span))

    try:
        was, now = amiss(e.track), amiss(e.track.changed(**changes))
    except RecordingError as error:
        return Try(math.nan, least, str(error))
    if math.isnan(now):
        return Try(-math.inf, least)
    return Try(0.0 if was == now else was - now, least, left=math.inf if opens else now)


def decades(track: Track, sequences: list[int], span: int) -> float:
    """log10 of the gain over the span of a few random vectors, the mean over some sequences.

    Growth per step over all steps that no cut precedes, times the span; −inf where exact zeros end
    every vector of a sequence.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(5, 2, 1))[0].sum().backward()
    >>> round(decades(recording["l0"], [0, 1], 10), 6)
    -10.0
    """
    operator = operator_of(track, torch.float64, sequences)
    segments, lengths = cuts_before(track)[:, sequences], track.lengths.cpu()[sequences]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(TRIED_VECTORS, operator.size, generator=generator, dtype=torch.float64)
    block = (start / start.norm()).expand(len(sequences), -1, -1)
    total, count = torch.zeros(2, len(sequences), dtype=torch.float64)
    for t in range(1, operator.length):
        pushed = operator.push(t, block)
        size = torch.linalg.vector_norm(pushed, dim=(1, 2))
        counted = (lengths > t) & (segments[t] == segments[t - 1])
        total += torch.where(counted, size.log(), 0.0)
        count += counted
        going = (counted & (size > 0)).view(-1, 1, 1)
        block = torch.where(going, pushed / size.view(-1, 1, 1), block)
    known = (total / count)[count > 0]
    return float(known.mean()) * span / math.log(10) if len(known) else math.nan


def _seconds(track: Track) -> float:
    """Predicted: the calls again and their gates in float64, then the pushes, twice."""
    weights = sum(weight.numel() for weight in track.weights.values())
    length = int(track.lengths.max())
    again = 8.0 * length * track.batch * weights
    pushes = (
        4.0 * length * min(TRIED_SEQUENCES, track.batch) * TRIED_VECTORS * state_size(track) ** 2
    )
    return (again + pushes) / SPEED[torch.float64] + length * 4e-4


LONG = 24  # letters of a module's path that several lines need not repeat
OVER_BAND = f"{BAND_WORDS} over the span"  # the band of the verdict's equivalence test
MAJORITY = "more than half of them"
CLIP_CODE = (
    "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # before optimizer.step()"
)
NO_BIAS = "# the layer has no bias to raise: build it with bias=True"
NORMALISE = "x = (x - x.mean()) / x.std()"
GATED = f"a gated cell ({', '.join(layer_names(gated=True))})"
NOT_CALMER = (
    f"add layer normalisation, or use {GATED}, and train it: smaller inputs alone "
    "do not mend this batch"
)


FOREIGN = (
    "change what makes its weights: it ran with weights that are no parameters of its own, so nothing "
    "set on the module would change it"
)


def own(track: Track, name: str) -> bool:
    """Whether a weight is the module's own parameter, so that changing it there changes the layer."""
    return name in track.weights and name not in track.foreign


def started_as(track: Track, what: str) -> str:
    """Start the recurrent weights of a vanilla RNN "orthogonal" or as an "eye"."""
    code = f"torch.nn.init.{what}_({parameter_of(track, 'weight_hh')})"
    return code if own(track, "weight_hh") else ""


def parameter_of(track: Track, name: str) -> str:
    """Where the user finds one of the layer's parameters, as a line of Python on `model`."""
    return parameter(track.owner, track.name, name)


def advised(e: Evidence, *ways: tuple[str, float], otherwise: str) -> tuple[str, str, str]:
    """Advice, its source and its code: the change of weights that helps most on this batch.

    Args:
        e: of the layer.
        ways: arguments of `gradflow.what_if`; those after one that is enough are not tried.
        otherwise: the advice where none helps.
    """
    biases = ways[0][0] != "orthogonal" and "bias_ih" in e.track.weights
    if not e.track.foreign.isdisjoint({"bias_ih", "bias_hh"} if biases else {"weight_hh"}):
        return FOREIGN, "", ""
    found: dict[tuple[str, float], Try] = {}
    for name, value in ways:
        changes: dict[str, Any] = {name: value}
        one = found[name, value] = tried(e, **changes)
        if one.why_not:
            advice, source, _ = remedy(e.track, name, value)
            said = f"see whether this helps, which was not tried here ({one.why_not}): {advice}"
            return said, source, f"print(gradflow.what_if(recording, {name}={value}))"
        if one.left < BAND:
            break
    best = max(found, key=lambda way: found[way].won)
    if not found[best].helps:
        return otherwise, "", ""
    advice, source, code = remedy(e.track, *best)
    enough = f"is within {BAND_WORDS} of 1 then" if found[best].left < BAND else "comes nearer to 1"
    return f"{advice}; tried on this batch: the gain over the span {enough}", source, code


def orthogonal(e: Evidence) -> tuple[str, str, str]:
    """Recurrent weights that start orthogonal, if that helps on this batch."""
    otherwise = (
        f"use {GATED}, and train it: recurrent weights that start orthogonal do not bring the"
    )
    return advised(e, ("orthogonal", 1.0), otherwise=f"{otherwise} gain nearer to 1 on this batch")


def shrunk(e: Evidence, factor: float) -> str:
    """Multiply the recurrent weights by a factor, or by one of its powers, the first that helps."""
    if not own(e.track, "weight_hh"):
        return ""
    for power in (1, 2, 4):
        if factor**power > 0 and tried(e, scale_hh=factor**power).helps:
            return f"{parameter_of(e.track, 'weight_hh')}.data *= {factor**power:.2g}"
    return ""


def _bias(track: Track, name: str, gate: str) -> str:
    """Python for a gate's block of one of the biases."""
    assert track.spec is not None
    rows = track.spec.block(gate, track.hidden)
    return f"{parameter_of(track, name)}.data[{rows.start or ''}:{rows.stop}]"


def remedy(track: Track, name: str, value: float) -> tuple[str, str, str]:
    """Advice, its source and its code for an argument of `gradflow.what_if` that helps."""
    keeper = None if track.spec is None else track.spec.keeper
    if name == "orthogonal":
        start = "start the recurrent weights orthogonal, and train again"
        start += f" (where that is not enough, use {GATED})"
        return start, "Arjovsky et al. 2016; Le et al. 2015", started_as(track, "orthogonal")
    if keeper is None:
        start = f"start with recurrent weights {value:g} times as large, and train again"
        return start, "Pascanu et al. 2013", f"{parameter_of(track, 'weight_hh')}.data *= {value:g}"
    if name == "chrono":
        return keeper.chrono, "Tallec & Ollivier 2018", _chrono_code(track, keeper, int(value))
    raised = f"{_bias(track, 'bias_ih', keeper.gate)} += {value:.1f}"
    code = raised if "bias_ih" in track.weights else NO_BIAS
    return f"raise the {keeper.name} gate's bias by {value:g}", keeper.source, code


def chrono(e: Evidence, keeper: Keeper) -> tuple[str, str, str]:
    """Biases drawn from the range of distances, if they help on this batch."""
    otherwise = (
        f"look at what shuts them, inputs or weights: {keeper.name} biases drawn from the range of "
        "distances (chrono initialisation) do not bring the gain nearer to 1 on this batch"
    )
    return advised(e, ("chrono", max(3, e.span)), otherwise=otherwise)


def _chrono_code(track: Track, keeper: Keeper, span: int) -> str:
    """Biases log(u), u uniform in [1, span − 1]; the input gate of a cell gets the opposite."""
    if "bias_ih" not in track.weights:
        return NO_BIAS
    assert track.spec is not None
    kept = _bias(track, "bias_ih", keeper.gate)
    end = track.spec.block(keeper.gate, track.hidden).stop
    lines = [f"{kept}.uniform_(1, {max(span - 1, 2)}).log_()"]
    if "bias_hh" in track.weights:
        lines.insert(0, f"{parameter_of(track, 'bias_hh')}.data[:{end}] = 0.0")
    if keeper.opposite:
        lines.append(f"{_bias(track, 'bias_ih', keeper.opposite)} = -{kept}")
    path = module(track.owner)
    if len(path) > LONG:  # said once
        lines = [f"layer = {path}", *(line.replace(path, "layer") for line in lines)]
    return "\n".join(lines)


def calmer_input(e: Evidence, opens: str = "") -> str:
    """Smaller inputs, where they help on this batch; "" where they do not, or it was not tried.

    They are to open a gate, or else to bring the gain nearer to 1.

    Of the model where it is this layer and reads large numbers, else through the layer's own weights:
    a layer inside a model reads what others make, and the model may read tokens, which have no mean.
    """
    lowest = not e.fused or e.track.name.startswith("l0")
    if not e.track.owner and lowest and e.track.has_inputs:
        x = e.track.inputs[e.track.mask].double()
        spread = float(x.std())
        if spread > LARGE_INPUT and tried(e, scale_ih=1 / spread, opens=opens).helps:
            return NORMALISE
    if own(e.track, "weight_ih"):
        for factor in (0.5, 0.1):
            if tried(e, scale_ih=factor, opens=opens).helps:
                share = "half" if factor == 0.5 else "a tenth"
                scaled = f"{parameter_of(e.track, 'weight_ih')}.data *= {factor}"
                return f"{scaled}  # as if it read {share} of its input"
    return ""


def calmer(e: Evidence, advice: str, opens: str = "") -> tuple[str, str]:
    """Advice with the code of `calmer_input`, or what is left where smaller inputs do not help."""
    code = calmer_input(e, opens)
    return (advice, code) if code else (NOT_CALMER, "")


def inputs_at(e: Evidence, steps: Iterable[int]) -> str:
    """Show what the model reads at some steps, which count from 0."""
    chosen = ", ".join(str(step) for step in steps)
    where = f":, [{chosen}]" if e.track.batch_first else f"[{chosen}]"
    return f"print(x[{where}])  # what is read there"


def against_vanishing(e: Evidence) -> tuple[str, str, str]:
    """Advice, its source and its code for this kind of cell."""
    if e.keeper is not None:
        return _raised(e, e.keeper)
    return _vanilla(e) if e.spec is not None and e.spec.vanilla else _any_cell(e)


def _vanilla(e: Evidence) -> tuple[str, str, str]:
    weight, activation = (float(value) for value in e.data["rate_factor"].values)
    if activation < weight:  # orthogonal weights would change little
        advice, code = calmer(
            e,
            f"bring the activations back to where they are steep: scale the inputs down, or use {GATED}",
        )
        return advice, "Pascanu et al. 2013", code
    return orthogonal(e)


def _raised(e: Evidence, keeper: Keeper) -> tuple[str, str, str]:
    """Raise the bias of the gate that keeps the state, if that helps on this batch."""
    name = keeper.name
    value = over_all(sigmoid_and_other(e.track)[keeper.gate], e.track.mask)
    mean = f"the gate's mean is {value:.2f}{keeper.note}"
    otherwise = (
        f"train with another start of the {name} gates' biases: raised by 1, or drawn from the range of "
        "distances, they do not bring the gain nearer to 1 on this batch"
    )
    ways = (("forget_bias", 1.0), ("chrono", max(3, e.span)))
    advice, source, code = advised(e, *ways, otherwise=otherwise)
    return f"{advice}; {mean}", source, code


def _any_cell(e: Evidence) -> tuple[str, str, str]:
    if e.linear is not None:  # the input writes its decay, and nothing else shortens the memory
        return (
            "start with decays nearer to 1, their time scales spread over the distances of the task "
            "(a smaller step Δ, a higher bias of the gate that keeps), and train again; not tried here",
            "Gu & Dao 2023; Orvieto et al. 2023",
            "",
        )
    return (
        "give the state a path that adds to it instead of overwriting it, and train again: a forget "
        "gate that starts open, or recurrent weights that start orthogonal; not tried here",
        "Jozefowicz et al. 2015; Arjovsky et al. 2016",
        "",
    )
