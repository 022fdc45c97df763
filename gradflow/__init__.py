"""How far back in time does the gradient of a recurrent PyTorch model really flow?

``gradflow.record`` hooks a model, ``analyze`` measures, ``plot`` and ``report`` show; ``diagnose``
does the first two in one call. Names are loaded when first used, so that importing gradflow loads
neither torch nor a plotting library.
"""

from __future__ import annotations

import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

from gradflow._version import __version__

if TYPE_CHECKING:
    from gradflow.analysis import Analysis, Finding, LayerAnalysis, Prediction
    from gradflow.analyzer import analyze
    from gradflow.errors import GradflowError, GradflowWarning, StopTraining
    from gradflow.history import History
    from gradflow.hooks import record, scan, tap
    from gradflow.prediction import what_if
    from gradflow.recording import Recording, Track
    from gradflow.runs import load
    from gradflow.sweeping import sweep
    from gradflow.watching import Watch, watch
    from gradflow.workflow import diagnose, plot, report

_HOMES = {
    "Analysis": "gradflow.analysis", "Finding": "gradflow.analysis", "GradflowError": "gradflow.errors",
    "GradflowWarning": "gradflow.errors", "History": "gradflow.history",
    "LayerAnalysis": "gradflow.analysis", "Prediction": "gradflow.analysis",
    "Recording": "gradflow.recording", "StopTraining": "gradflow.errors", "Track": "gradflow.recording",
    "Watch": "gradflow.watching", "analyze": "gradflow.analyzer", "analyzer": "gradflow",
    "compare": "gradflow.comparison", "diagnose": "gradflow.workflow", "load": "gradflow.runs",
    "plot": "gradflow.workflow", "record": "gradflow.hooks", "report": "gradflow.workflow",
    "scan": "gradflow.hooks", "sweep": "gradflow.sweeping", "tap": "gradflow.hooks",
    "watch": "gradflow.watching", "what_if": "gradflow.prediction",
}  # fmt: skip

__all__ = [
    "Analysis", "Finding", "GradflowError", "GradflowWarning", "History", "LayerAnalysis", "Prediction",
    "Recording", "StopTraining", "Track", "Watch", "__version__", "analyze", "analyzer", "compare",
    "diagnose", "load", "plot", "record", "report", "scan", "sweep", "tap", "watch", "what_if",
]  # fmt: skip

# a process forked while another thread imports would wait for that import for ever
_importing = threading.RLock()
os.register_at_fork(
    before=_importing.acquire,
    after_in_parent=_importing.release,
    after_in_child=_importing._at_fork_reinit,  # type: ignore[attr-defined]
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
    if name == "analyzer":
        return importlib.import_module("gradflow.analyzer")
    with _importing:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
