"""Hooks: observe the calls of an unmodified model, then replay them."""

from gradflow.hooks.linear.scan import scan
from gradflow.hooks.observe import record
from gradflow.hooks.taps import tap

__all__ = ["record", "scan", "tap"]
