"""Hides packages that libraries import whenever they are installed, which takes seconds, although few runs use them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """A context in which these packages seem not to be installed, unless they are already imported."""
    absent = [package for package in packages if package not in sys.modules]
    for package in absent:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # None makes an import fail
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
