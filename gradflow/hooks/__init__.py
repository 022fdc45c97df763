"""Hooks: observe the calls of an unmodified model, then replay them."""

from gradflow.hooks.observe import record

__all__ = ["record"]
