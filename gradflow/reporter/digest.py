"""What terminal, page and JSON all say: the findings in one order, and the machine-readable summary."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from gradflow._version import __version__
from gradflow.analysis import (
    SCHEMA,
    WINDOW_OF,
    Analysis,
    Finding,
    Gain,
    LayerAnalysis,
    Prediction,
    Rate,
)
from gradflow.limits import LAG_TOLERANCE
from gradflow.recording.track import unnumbered

SHOWN = 3  # findings a reader sees first
PREDICTED = ("vanishing", "exploding")  # findings below which predictions are said


def top_findings(analysis: Analysis, most: int = SHOWN) -> list[Finding]:
    """The findings to show first: of the worst layers, one of each name before a second of any.

    One for a whole stack where its layers have the same and one line of code mends all of them.
    """
    return _said_once(_one_of_each_first(_for_stacks(analysis.findings)))[:most]


def other_findings(analysis: Analysis, most: int = SHOWN) -> list[Finding]:
    """All the findings that `top_findings` leaves out."""
    return top_findings(analysis, len(analysis.findings))[most:]


def _said_once(findings: Sequence[Finding]) -> list[Finding]:
    """The same, without code that stands below an earlier one."""
    found: list[Finding] = []
    for one in findings:
        again = one.code and any(one.code == other.code for other in found)
        same = replace(one, advice="the same as above", source="", code="")
        found.append(same if again else one)
    return found


def _one_of_each_first(findings: Sequence[Finding]) -> list[Finding]:
    first: list[Finding] = []
    again: list[Finding] = []
    seen: set[str] = set()
    for finding in findings:
        (again if finding.name in seen else first).append(finding)
        seen.add(finding.name)
    return first + again


def _for_stacks(findings: Sequence[Finding]) -> list[Finding]:
    """The same, in the place of its worst layer one for all layers of a stack that need the same."""
    alike: dict[tuple[object, ...], list[tuple[Finding, InStack]]] = {}
    names = {unnumbered(finding.layer) for finding in findings}
    for place, finding in enumerate(findings):
        found = _in_stack(finding, names)
        own = "" if found.stack and finding.code else place
        key = finding.name, found.stack, found.code, own
        alike.setdefault(key, []).append((finding, found))
    return [_of_all(some) for some in alike.values()]


class InStack(NamedTuple):
    """A finding on a layer of a stack, or of a list of modules."""

    stack: str  # its name; "" for none
    code: str  # with a name for the layer
    layer: str | int = ""  # what that name stands for


def _in_stack(finding: Finding, names: set[str]) -> InStack:
    """Where a layer stands among layers of these names."""
    name = unnumbered(finding.layer)
    found = re.fullmatch(r"((?:.*\.)?)(\d+)((?:\..*)?)", name)
    stack = rf"{re.escape(found[1])}\d+{re.escape(found[3])}" if found else ""
    if found and sum(bool(re.fullmatch(stack, other)) for other in names) > 1:
        path = rf"'{re.escape(found[1] + found[2])}(?=[.'])"
        code = re.sub(path, f"f'{found[1]}{{number}}", finding.code)
        return InStack(stack, code, int(found[2]))
    found = re.fullmatch(r"(.*?)(l\d+(?:_reverse)?)", name)
    if found is None:
        return InStack("", finding.code)
    code = re.sub(
        rf"\b(model[^\s=]*?)\.(\w+)_{found[2]}\b", r'getattr(\1, f"\2_{layer}")', finding.code
    )
    return InStack(found[1] or "model", code, found[2])


def _of_all(some: Sequence[tuple[Finding, InStack]]) -> Finding:
    """One finding for the same one of several layers, whose numbers are those of the worst."""
    worst, place = some[0]
    code, layers = worst.code, sorted({one.layer for _, one in some}, key=str)
    if place.code != code and len(layers) > 1:
        lines = "\n".join(f"    {line}" for line in place.code.splitlines())
        each = "layer" if isinstance(place.layer, str) else "number"
        code = f"for {each} in ({', '.join(map(repr, layers))}):\n{lines}"
    others = ", ".join(sorted(one.layer for one, _ in some if one.layer != worst.layer))
    return (
        replace(worst, message=f"{worst.message}; likewise {others}", code=code)
        if others
        else worst
    )


def predictions(analysis: Analysis, finding: Finding) -> tuple[Prediction, ...]:
    """What remedies for a finding would do; a layer's predictions stand below its verdict."""
    layer = analysis.layers.get(finding.layer)
    return layer.predictions if layer is not None and finding.name in PREDICTED else ()


def predicted(prediction: Prediction) -> str:
    """The heading of predictions, in words."""
    return f"Prediction without training, for the present weights and {prediction.batch}:"


def summary(analysis: Analysis) -> dict[str, Any]:
    """Everything a script wants to know, ready for strict JSON: NaN and infinity become null.

    A half-life or horizon that is never reached is ``{"value": null, "never": true}``; a rate of −∞
    (exact zeros) is null beside ``"zero": true``. ``schema`` rises when a reader would be misled.
    """
    made = {
        "schema": SCHEMA,
        "gradflow": __version__,
        "title": analysis.title,
        "verdicts": {layer.name: layer.verdict for layer in analysis.values()},
        "layers": [_layer(layer) for layer in analysis.values()],
        "findings": [asdict(finding) for finding in _one_of_each_first(analysis.findings)],
        "warnings": list(analysis.warnings),
        "unseen": [asdict(one) for one in analysis.unseen],
        "provenance": dict(analysis.provenance),
    }
    return strict(made)


def _layer(layer: LayerAnalysis) -> dict[str, Any]:
    return {
        "name": layer.name,
        "cell": layer.cell,
        "reverse": layer.reverse,
        "hidden": layer.hidden,
        "state_size": layer.size,
        "steps": layer.steps,
        "sequences": layer.sequences,
        "span": layer.span,
        "verdict": layer.verdict,
        "labels": list(layer.labels),
        "gain": _gain(layer.gain),
        "rate": _rate(layer.rate),
        "decades_over_span": layer.decades_over_span,
        "window": {"value": layer.window, "of": WINDOW_OF, "tolerance": LAG_TOLERANCE},
        "loss_reach": {"value": layer.loss_reach, "never": layer.loss_reach == math.inf},
        **_reach(layer),
        "channel_steps": layer.channel_steps,
        "lyapunov": None if layer.lyapunov is None else layer.lyapunov.tolist(),
        "kaplan_yorke": layer.kaplan_yorke,
        "entropy_rate": layer.entropy_rate,
        "parity": asdict(layer.parity),
        "gradient_note": layer.gradient_note,
        "method": layer.method,
        "title": layer.title,
        "sentence": layer.sentence,
        "findings": [finding.name for finding in layer.findings],
        "predictions": [_prediction(prediction) for prediction in layer.predictions],
    }


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "remedy": prediction.remedy,
        "value": prediction.value,
        "batch": prediction.batch,
        "verdict": prediction.verdict,
        "gain": _gain(prediction.gain),
        "rate": _rate(prediction.rate),
        **_reach(prediction),
        "decades_won": prediction.helps,
        "message": prediction.message,
    }


def _gain(gain: Gain) -> dict[str, Any]:
    return {
        "value": gain.value,
        "low": gain.low,
        "high": gain.high,
        "steps": gain.steps,
        "zero": gain.value == -math.inf,
    }


def _rate(rate: Rate) -> dict[str, Any]:
    return {
        "value": rate.value,
        "low": rate.low,
        "high": rate.high,
        "zero": rate.value == -math.inf,
    }


def _reach(found: LayerAnalysis | Prediction) -> dict[str, Any]:
    return {
        "half_life": {"value": found.half_life, "never": found.half_life == math.inf},
        "horizon": {"value": found.horizon, "never": found.never_gone, "searched": found.searched},
        "channels": found.channels,
    }


def strict(value: Any) -> Any:
    """The same value in the types strict JSON knows.

    >>> strict({"rate": float("-inf"), "steps": (1, 2)})
    {'rate': None, 'steps': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(part) for part in value]
    if value is None or isinstance(value, bool | str | int):
        return value
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return strict(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return strict(value.tolist()) if hasattr(value, "tolist") else str(value)
