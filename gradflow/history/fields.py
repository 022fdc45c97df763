"""What a probe measures: the names of the numbers, in which unit they are, and what they mean.

`data` of a `History` has a variable of each name. A number that is to be kept of every probe gets a line
here; files of earlier versions lack it, and it is NaN there.
"""

from __future__ import annotations

from gradflow.limits import GONE_WORDS

# fmt: off

# of one layer at one probe; dims (step, layer)
OF_LAYER: dict[str, str] = {
    "verdict": "the equivalence test on the gain over the span; kept as its place in limits.VERDICTS",
    "rate": "nats per step, the largest Lyapunov exponent",
    "rate_low": "lower end of its 95 % interval",
    "rate_high": "upper end",
    "rate_settling": "nats per step that the rates of all sequences may be off alike, in its interval too",
    "rate_settled": "1 where the rate may be told, 0 where so few steps do not show it",
    "gain": "nats over `gain_steps`: ln of the largest gain of any direction, what the verdict judges",
    "gain_low": "lower end of its 95 % interval",
    "gain_high": "upper end",
    "gain_steps": "steps that the gain is measured over",
    "span": "steps, the distance of interest",
    "half_life": "steps until the gain halves; inf where it never does",
    "horizon": f"first lag in steps with a gain below {GONE_WORDS}; inf where it never comes",
    "searched": "lags over which the horizon was looked for; where it was not reached it lies beyond",
    "channels": "directions that survive the span; preset full only",
    "sequences_rated": "sequences that gain, rate and verdict rest on",
    "batches": "batches that gain and rate are means over; above 1 they are the unit of the intervals",
    "sequences": "sequences of the update, those of all its forward passes together",
    "steps": "T of the longest sequence",
    "level": "log10 of the rms entry of ∂L/∂s of the main state at the loss step: what `profile` is over",
    "level_h": "log10 of the rms entry of the total ∂L/∂h at the loss step: what `direct` is over",
    "state_norm": "‖s_t‖₂/√width of the main state, median over sequences, mean over steps",
    "saturated": "share of the entries of the main state's tanh beyond ±0.95",
    "cuts": "steps, over all sequences, at which no previous state arrives",
    "nonfinite": "1 where a state or a gradient is NaN or Inf (a note says where), else 0",
    "nonfinite_at": "the first time step that is, counted from 1; of gradients the last",
    "grad_norm": "‖∂L/∂W‖₂ over the layer's own parameters, before clipping; NaN of loops "
                 "whose weights are not known",
    "grad_norm_clipped": "the same as the optimizer read it",
}

# of one gate of one layer; dims (step, layer, gate)
OF_GATE: dict[str, str] = {
    "gate_mean": "mean over units, steps and sequences",
    "gate_low": "the smallest mean of any unit",
    "gate_high": "the largest mean of any unit",
    "gate_closed": "share of values below 0.05",
    "gate_open": "share of values above 0.95",
}

# over steps back from the loss step, in processing order; dims (step, layer, lag)
OF_LAG: dict[str, str] = {
    "profile": "log10 of the rms over units and sequences of ∂L/∂s of the last loss step, s the main "
               "state, over its own level at the loss step; -inf exact zero, NaN no such step",
    "direct": "log10 of the rms of the direct part of ∂L/∂h of the whole loss, over the level of the total "
              "∂L/∂h at the loss step: what a hook on the layer's output would have shown",
}

# of a probe; dims (step,)
OF_STEP: dict[str, str] = {
    "loss": "as it was told to `Watch.step`; NaN where it was not",
    "grad_norm_all": "‖∂L/∂W‖₂ over all parameters of the model, before clipping",
    "grad_norm_all_clipped": "the same as the optimizer read it",
    "clipped": "1 where the optimizer read smaller gradients than the backward left, else 0",
    "scale": "what a GradScaler had multiplied the loss by; it is divided out of all numbers",
    "updated": "1 where an optimizer step followed, 0 where the gradients were thrown away",
    "forwards": "forward passes of the update",
    "probe_seconds": "wall time that the probe added to its step; of a run's first one, with the step itself",
    "step_seconds": "wall time of a step without a probe, mean since the probe before",
    "interval": "steps until the next probe, as decided at this one",
    "time": "seconds since 1970, when the probe ended",
}

# fmt: on

VERDICT = "verdict"  # the one that is a word

COUNTED = {  # numbers of a layer that count something -> the least that they can be
    **dict.fromkeys(("span", "horizon", "steps", "sequences"), 1),
    **dict.fromkeys(
        ("gain_steps", "half_life", "searched", "channels", "sequences_rated", "cuts"), 0
    ),
}
