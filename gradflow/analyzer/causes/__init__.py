"""Findings: what is wrong with a layer, the evidence, and what to try; none without evidence.

Causes of a lost or exploding gradient are looked for only where the verdict is not stable. What
makes numbers unusable (NaN, cuts, one step, parity) is always reported. The menu is `FINDERS`; a
finding that needs several layers at once is made in `gradflow.analyzer.flow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from gradflow.analysis.results import Finding
from gradflow.analyzer.causes.factors import (
    activations_contract,
    idle_units,
    keeping_gates,
    saturated_activations,
    saturated_gates,
    walls,
    weights_contract,
    weights_expand,
)
from gradflow.analyzer.causes.read_by_loss import mend_first, read_by_loss
from gradflow.analyzer.causes.recurrences import (
    decays,
    erasing_heads,
    kept_for_good,
    linear_recurrence,
)
from gradflow.analyzer.causes.spoilers import cut, no_recurrence, not_finite, parity_failed
from gradflow.analyzer.causes.verdicts import (
    dead,
    exploding,
    few_channels,
    hidden_paths,
    transient,
    vanishing,
)
from gradflow.analyzer.evidence import Evidence

__all__ = ["FINDERS", "SPOILERS", "Finder", "findings"]

Finder = Callable[[Evidence], Iterator[Finding]]
SPOILERS: tuple[Finder, ...] = (not_finite, no_recurrence, parity_failed)
ON_VERDICTS: tuple[Finder, ...] = (dead, vanishing, exploding)
WITHOUT_GAINS: tuple[Finder, ...] = (*SPOILERS, read_by_loss, cut)  # a cause needs a verdict
FINDERS: tuple[Finder, ...] = (
    *SPOILERS,
    read_by_loss,
    *ON_VERDICTS,
    linear_recurrence,
    decays,
    kept_for_good,
    erasing_heads,
    keeping_gates,
    saturated_activations,
    saturated_gates,
    idle_units,
    weights_contract,
    activations_contract,
    weights_expand,
    walls,
    hidden_paths,
    transient,
    few_channels,
    cut,
)


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Every finding on one layer, the most telling first."""
    finders = WITHOUT_GAINS if evidence.no_gains or evidence.cut_throughout else FINDERS
    if "not finite" in evidence.labels:
        finders = SPOILERS
    elif evidence.reading.amiss and not evidence.no_gains:
        return _before_the_loss_is_mended(evidence)
    return tuple(finding for find in finders for finding in find(evidence))


def _before_the_loss_is_mended(evidence: Evidence) -> tuple[Finding, ...]:
    """What the loss reads comes first; the verdict stands, without a cause and without a remedy."""
    first = [finding for find in (*SPOILERS, read_by_loss) for finding in find(evidence)]
    judged = [finding for find in ON_VERDICTS for finding in find(evidence)]
    advice = mend_first(evidence)
    judged = [replace(finding, advice=advice, code="", source="") for finding in judged]
    return (*first, *judged, *cut(evidence))
