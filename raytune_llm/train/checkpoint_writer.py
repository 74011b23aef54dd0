"""Writes a training state in torch's distributed checkpoint format: several files at once, hashed while they are written.

One thread serializes, hashes and writes about half a GB a second, less than most disks take, so a large state is divided among
several threads. torch's own writer has threads, too, but loses their errors, and its loader for GPUs waits for all of training's
queued work with every tensor.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

PARTS, PART_BYTES = 4, 2**28
"""The largest number of files that one process writes at once, and the least size of each of several."""
PIECE_BYTES = 2**26
"""After so many bytes the disk is asked to begin with them."""


class StateWriter(FileSystemWriter):
    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        """device: the GPU that holds the state. None: it is in host memory."""
        super().__init__(folder, single_file_per_rank=True, per_thread_copy_ahead=0)
        self.fs = self._hashed = HashedFiles()
        self._device = device

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each file that this process wrote."""
        return self._hashed.hashes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts = _parts(plan.items)
        if len(parts) == 1:
            plans = [plan]
        else:
            own: Any = plan.storage_data
            plans = [
                replace(plan, items=items, storage_data=replace(own, prefix=f"{own.prefix}{number}_"))
                for number, items in enumerate(parts)
            ]
        with ThreadPoolExecutor(len(plans), thread_name_prefix="checkpoint-part") as pool:
            written = [pool.submit(self._write_part, part, planner) for part in plans]
            results = [result for part in written for result in part.result()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_part(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # A stream of its own: in the default one, a copy to the host would wait for all that is queued there.
        with nullcontext() if self._device is None else torch.cuda.stream(torch.cuda.Stream(self._device)):
            return super().write_data(plan, planner).wait()


class HashedFiles(FileSystem):
    """Files that are written from the beginning to the end."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            hashed = HashedStream(stream)
            yield hashed
            self.hashes[Path(path).name] = hashed.digest.hexdigest()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.hashes[Path(new_path).name] = self.hashes.pop(Path(path).name)


class HashedStream(io.IOBase):
    """A file that is hashed and sent to the disk while it is written. By itself, Linux would begin to write once a tenth of the
    memory is waiting for it, which may be all of a checkpoint."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream = cast(Any, stream)
        self._sent = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self.digest.update(piece)
            self._stream.write(piece)
            self._send()
        return len(view)

    def _send(self) -> None:
        written = self._stream.tell()
        if written - self._sent >= PIECE_BYTES and sys.platform == "linux":
            os.posix_fadvise(self.fileno(), self._sent, written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = written

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self.flush()  # torch flushes the file with this number to the disk, without what is in the buffer
        return self._stream.fileno()


def _parts(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """The items in parts of about equal size; one if they are small."""
    sizes = {id(item): _bytes_of(item) for item in items}
    number = max(1, min(PARTS, sum(sizes.values()) // PART_BYTES))
    parts: list[list[WriteItem]] = [[] for _ in range(number)]
    filled = [0] * number
    for item in sorted(items, key=lambda item: -sizes[id(item)]):
        least = filled.index(min(filled))
        parts[least].append(item)
        filled[least] += sizes[id(item)]
    return [part for part in parts if part] or [[]]


def _bytes_of(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize
