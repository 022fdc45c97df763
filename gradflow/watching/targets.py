"""Where else a probe's numbers go: a callable of the step, its scalars and its figures."""

from __future__ import annotations

import math
from typing import Any

from gradflow.history import Probe
from gradflow.history.tags import LAYER_TAGS, STEP_TAGS, Target


def targets_of(to: object) -> list[Target]:
    """What ``to=`` asks for: callables as they are, writers of other tools through their own adapter.

    Args:
        to: one, or a list of them.

    Returns:
        Callables.

    Raises:
        InputError: it is neither a callable nor a writer that is known.
    """
    some = to if isinstance(to, list | tuple) else [] if to is None else [to]
    return [_target(one) for one in some]


def _target(one: Any) -> Target:
    if callable(one):
        return one
    from gradflow.integrations.writers import writer_for  # only these need what it imports

    return writer_for(one)


def scalars_of(probe: Probe) -> dict[str, float]:
    """The numbers of a probe by their tags; what was not measured is left out.

    Args:
        probe: of one training step.

    Returns:
        Tag -> number, finite or infinite.
    """
    found = {tag: probe.values.get(name, math.nan) for name, tag in STEP_TAGS.items()}
    for group, rate in enumerate(probe.learning_rates):
        found["gradflow/learning_rate" if group == 0 else f"gradflow/learning_rate_{group}"] = rate
    for name, layer in probe.layers.items():
        for number, tag in LAYER_TAGS.items():
            found[tag.format(layer=name)] = layer.values.get(number, math.nan)
    return {tag: value for tag, value in found.items() if not math.isnan(value)}
