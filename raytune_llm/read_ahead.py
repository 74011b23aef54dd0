"""Asks the system to read a model's weights from the disk while Python still loads packages, which takes as long.

The weights are then in the page cache when they are wanted, in this process or in another one of this machine.
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
"""Of a larger piece Linux reads only what the device reads ahead, 128 KiB by default."""
PART_OF_MEMORY = 0.5
"""Larger weights are not read ahead: their first pages would be gone again."""


def read_ahead_for(run: TrainRun | ServeRun | ChatRun | PredictRun | EvaluateRun) -> None:
    """Start it where this machine loads the model of the run from files."""
    elsewhere = run.chat.url is not None if isinstance(run, ChatRun) else on_cluster(run.resources)
    if elsewhere or run.model.path is None or run.model.weights == "random":
        return
    for folder in folders_here(run.model.path)[:1]:
        read_ahead(folder)


def read_ahead(folder: Path) -> threading.Thread | None:
    """Start it for the safetensors of this folder. None where there are none, too many, or the system has no such call."""
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
        except OSError:  # whoever wants the file says what is wrong with it
            return
