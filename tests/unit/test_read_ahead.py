"""A model's files are read while Python loads packages."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from raytune_llm import read_ahead
from raytune_llm.config.load import load_config

SIZE = 8 * 2**20


def part_in_memory(file: Path) -> float:
    """Of a file, the part that the page cache holds."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), SIZE, prot=mmap.PROT_READ) as mapped:
        pages = np.frombuffer(mapped, dtype=np.uint8)
        there = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(SIZE), there)
        del pages
    assert not failed
    return sum(page & 1 for page in there) / len(there)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file that is on the disk alone."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(SIZE))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if part_in_memory(file) > 0.5:
        pytest.skip("this file system keeps its files in memory")
    return file


def test_weights_of_a_run_are_in_memory_soon_after(weights: Path) -> None:
    (weights.parent / "config.json").write_text("{}")
    read_ahead.read_ahead_for(load_config("serve", ["model=hub", f"model.path={weights.parent}", "resources=inline"]))
    until = time.monotonic() + 60
    while part_in_memory(weights) < 1:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_is_not_read_here_or_would_not_fit_is_left(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.parent
    for override in ("resources=cluster", "model.weights=random"):
        read_ahead.read_ahead_for(load_config("serve", ["model=hub", f"model.path={folder}", override]))
    assert read_ahead.read_ahead(folder / "nothing") is None
    monkeypatch.setattr(read_ahead, "PART_OF_MEMORY", 1e-9)
    assert read_ahead.read_ahead(folder) is None
    assert part_in_memory(weights) < 0.5
