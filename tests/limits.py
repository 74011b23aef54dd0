"""A disk and a memory that are too small."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Files end where a full disk would end them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LIMITED_EXPORT = """
import resource, sys, torch
from raytune_llm import api, load_config
torch.set_num_threads(1)
spare, *words = sys.argv[1:]
first = words.index("--")
api.export(load_config("export", words[:first]))  # loads all that an export loads
held = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(spare),) * 2)
api.export(load_config("export", words[first + 1 :]))
"""


def export_in_memory(spare_bytes: int, words: Sequence[str], *, after: Sequence[str]) -> None:
    """Export in a process of its own with so much memory beside what it has taken when the export `after` is done."""
    command = [sys.executable, "-c", LIMITED_EXPORT, str(spare_bytes), *after, "--", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
