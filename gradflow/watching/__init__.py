"""Watch a training: some of its steps are measured by themselves and written into a `History`."""

from gradflow.watching.alerts import Event
from gradflow.watching.watched import Watch, watch

__all__ = ["Event", "Watch", "watch"]
