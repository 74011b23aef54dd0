"""The phases of a run, for those who ask where time went and where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range in traces. Where the GPU's memory runs out inside, the error carries the name as its note."""
    with record_function(name):
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.add_note(name)
            raise
