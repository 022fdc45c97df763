"""From a recording to an analysis: Jacobians, products, exponents, verdicts, causes, words."""

from gradflow.analysis.results import entropy_rate, kaplan_yorke_dimension
from gradflow.analyzer.assemble import analyze
from gradflow.analyzer.exponents import lyapunov_spectrum
from gradflow.analyzer.jacobians import step_jacobians
from gradflow.analyzer.products import log_gain_map

__all__ = [
    "analyze", "entropy_rate", "kaplan_yorke_dimension", "log_gain_map", "lyapunov_spectrum",
    "step_jacobians",
]  # fmt: skip
