"""Packages that others import wherever they are installed, for seconds, though few runs use them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Within this context, those that are not loaded yet seem not to be installed."""
    absent = [package for package in packages if package not in sys.modules]
    for package in absent:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # Python's own mark for it
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
