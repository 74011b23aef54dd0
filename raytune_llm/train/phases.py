"""The phases of a step, for profiles and for out-of-memory errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range in traces. If the GPU runs out of memory inside, the error has the name as a note."""
    with record_function(name):
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.add_note(name)
            raise
