"""Asks the operating system to read a model's weights while Python imports packages, so that the two overlap.

The weights are then in the page cache when they are loaded, by this process or by another one on this machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from raytune_llm.config.resources import on_cluster
from raytune_llm.config.run import ChatRun, EvaluateRun, PredictRun, ServeRun, TrainRun
from raytune_llm.packaged import folders_here

PIECE = 128 * 2**10
"""Bytes of one request. Linux cuts a larger request to the device's read-ahead size, which is 128 KiB by default."""
PART_OF_MEMORY = 0.5
"""Weights larger than this fraction of memory are not read ahead, since the first pages would be evicted before they are used."""


def read_ahead_for(run: TrainRun | ServeRun | ChatRun | PredictRun | EvaluateRun) -> None:
    """Start to read ahead if this machine will load the run's model from files."""
    elsewhere = run.chat.url is not None if isinstance(run, ChatRun) else on_cluster(run.resources)
    if elsewhere or run.model.path is None or run.model.weights == "random":
        return
    for folder in folders_here(run.model.path)[:1]:
        read_ahead(folder)


def read_ahead(folder: Path) -> threading.Thread | None:
    """Start to read the folder's safetensors. None if there are none, if they are too large, or if the system lacks fadvise."""
    sizes = {file: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not 0 < sum(sizes.values()) < PART_OF_MEMORY * memory or not hasattr(os, "posix_fadvise"):
        return None
    thread = threading.Thread(target=_read, args=(list(sizes),), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _read(files: Sequence[Path]) -> None:
    for file in files:
        try:
            with file.open("rb") as opened:
                for start in range(0, os.fstat(opened.fileno()).st_size, PIECE):
                    os.posix_fadvise(opened.fileno(), start, PIECE, os.POSIX_FADV_WILLNEED)
        except OSError:  # loading the model will report it
            return
