"""The versions of adapters by name, and which of them have their weights in host memory.

`add` reads and checks a folder in the caller's thread, so that the engine's loop never waits for a disk. If there are more than
`max_host` versions, the least recently used ones are dropped from host memory. A thread reads them again when a row needs them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raytune_llm.engines.apart import apart
from raytune_llm.engines.native.slots import Adapter
from raytune_llm.engines.pins import check_pin
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.file_hash import sha256_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class AdapterStore:
    """Safe to call from any thread."""

    def __init__(
        self, read: Callable[[Path], tuple[Any, int]], *, max_host: int, num_slots: int, on_read: Callable[[], None]
    ) -> None:
        """read: folder -> (weights in the bank's form, rank); raises UserError if they don't fit. on_read: called from another
        thread when weights were read again. num_slots: the number of slots on the device."""
        self._read, self._max_host, self._num_slots, self._on_read = read, max_host, num_slots, on_read
        self._lock = threading.Lock()
        self._current: dict[str, Adapter] = {}
        self._in_host: OrderedDict[Adapter, None] = OrderedDict()
        self._reading: set[Adapter] = set()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="adapters")

    def add(self, name: str, folder: Path, *, pinned: bool) -> tuple[Adapter, Adapter | None]:
        """The name's new version, and the one that it replaces. Unchanged content keeps its version, unless that could not be
        read again. A pinned name stays pinned."""
        stamp, version = _stamp_of(folder), digest_of(folder)
        with self._lock:
            before = self._current.get(name)
            if before is not None and before.version == version and before.failure is None:
                self._pin(before, pinned or before.pinned)
                before.folder = folder
                return before, None
        weights, rank = apart(lambda: self._read(folder))
        if _stamp_of(folder) != stamp:
            raise DataError(str(folder), "changed while it was read", "Write the adapter to another folder, then rename that.")
        adapter = Adapter(name=name, version=version, rank=rank, folder=folder, weights=weights)
        with self._lock:
            before = self._current.get(name)
            self._pin(adapter, pinned or (before is not None and before.pinned))
            self._current[name] = adapter
            if before is not None:
                self._in_host.pop(before, None)  # rows that run with it hold it still
            self._kept(adapter)
        return adapter, before

    def pin(self, name: str, pinned: bool) -> None:
        """Set the pin. Raises ConfigError if no adapter has the name, or if no unpinned slot would be left."""
        with self._lock:
            if (adapter := self._current.get(name)) is None:
                raise ConfigError("the adapter", "must be one that is loaded", got=name)
            self._pin(adapter, pinned)

    def _pin(self, adapter: Adapter, pinned: bool) -> None:
        """Called with the lock."""
        if pinned:
            check_pin(adapter.name, (one.name for one in self._current.values() if one.pinned), self._num_slots)
        adapter.pinned = pinned

    def remove(self, name: str) -> Adapter | None:
        with self._lock:
            adapter = self._current.pop(name, None)
            if adapter is not None:
                self._in_host.pop(adapter, None)  # rows that run with it hold it still
            return adapter

    def get(self, name: str) -> Adapter | None:
        with self._lock:
            return self._current.get(name)

    def all(self) -> list[Adapter]:
        with self._lock:
            return list(self._current.values())

    def ready(self, adapter: Adapter) -> bool:
        """Whether its weights are in host memory. If not, this starts reading them."""
        with self._lock:
            if adapter.weights is not None:
                self._in_host.move_to_end(adapter) if adapter in self._in_host else None
                return True
            if adapter not in self._reading and adapter.failure is None:
                self._reading.add(adapter)
                self._threads.submit(self._read_again, adapter)
            return False

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_again(self, adapter: Adapter) -> None:
        try:
            if digest_of(adapter.folder) != adapter.version:
                raise DataError(str(adapter.folder), f"holds another version than {adapter.name} had", "Load it again.")
            weights, _ = apart(lambda: self._read(adapter.folder))
        except Exception as error:  # raised for the requests that wait for it
            adapter.failure, weights = error, None
        with self._lock:
            adapter.weights = weights
            self._reading.discard(adapter)
            if weights is not None and self._current.get(adapter.name) is adapter:
                self._kept(adapter)
        self._on_read()

    def _kept(self, adapter: Adapter) -> None:
        """Keep it in host memory. If that is full, drop the least recently used adapter that is not on the device."""
        self._in_host[adapter] = None
        for old in list(self._in_host):
            if len(self._in_host) <= self._max_host:
                return
            if old is not adapter and not old.users and not old.pinned and old.slot is None:
                del self._in_host[old]
                old.weights = None


def _stamp_of(folder: Path) -> list[tuple[int, int, int]]:
    """Size, modification time and inode of its files, to notice that one was written or replaced."""
    try:
        found = [(folder / name).stat() for name in (WEIGHTS, CONFIG)]
    except OSError as error:
        raise DataError(str(folder), f"is no folder with an adapter ({error.strerror}: {error.filename})") from None
    return [(file.st_ino, file.st_size, file.st_mtime_ns) for file in found]


def digest_of(folder: Path) -> str:
    """SHA-256 of an adapter's weights and config, in hex."""
    digest = hashlib.sha256()
    try:
        for name in (WEIGHTS, CONFIG):
            digest.update(bytes.fromhex(sha256_of(folder / name)))
    except OSError as error:
        raise DataError(str(folder), f"is no folder with an adapter ({error.strerror}: {error.filename})") from None
    return digest.hexdigest()
