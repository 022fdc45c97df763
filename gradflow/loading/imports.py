"""Make the current folder importable for a while, as `python -m` does."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def current_folder_importable(*folders: str) -> Iterator[None]:
    """Put the current folder (and others) in front of ``sys.path`` and take them out again."""
    added = [os.getcwd(), *folders]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)
