"""serve.watch: polls a folder of output folders and serves the adapters that runs write there.

A run's `final/` is served under the run's name, its newest complete checkpoint as `<name>@<step>`. Incomplete folders are never
read: `final/` is written to another folder and renamed, and a checkpoint has its file COMPLETE.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from raytune_llm.errors import ConfigError, UserError
from raytune_llm.runs.checkpoint_adapter import adapter_of_checkpoint
from raytune_llm.serve.adapters import checked_folder, checked_name
from raytune_llm.train.checkpoint import complete_steps, path_of

log = logging.getLogger("raytune_llm.serve")
INTERVAL_S = 1.0
Stamp = tuple[int, int, int]
"""Identifies a version of a folder: inode, size and modification time (ns) of its first file."""


class Adapters(Protocol):
    """The methods of an engine that are used here."""

    def add_adapter(self, name: str, folder: str | Path) -> str: ...

    def remove_adapter(self, name: str) -> None: ...


class Watcher:
    def __init__(
        self,
        folder: Path,
        engine: Adapters,
        *,
        base_name: str,
        notify: Callable[[str], None] = log.info,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._folder, self._engine, self._base_name, self._notify = folder, engine, base_name, notify
        self._interval_s = interval_s
        self._served: dict[str, tuple[Path, Stamp]] = {}
        self._refused: dict[str, tuple[Path, Stamp]] = {}
        """Adapters that the engine rejected; they are tried again only when they change."""
        self._written = tempfile.TemporaryDirectory(prefix="raytune-llm-watch-")
        self._scanning = threading.Lock()
        """A request for an unknown adapter scans from another thread."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self.scan()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._written.cleanup()

    def scan(self) -> None:
        """Scan once: load new and changed adapters, unload deleted ones. May be called from any thread."""
        with self._scanning:
            self._scan()

    def _scan(self) -> None:
        found = dict(self._found())
        for name, (place, stamp) in found.items():
            if (place, stamp) in (self._served.get(name), self._refused.get(name)):
                continue
            try:
                checked_name(name, self._base_name)
                folder = self._of_checkpoint(place) if place.parent.name == "checkpoints" else place
                if folder is None:
                    self._refused[name] = (place, stamp)
                    continue
                version = self._engine.add_adapter(name, checked_folder(str(folder), [self._folder, Path(self._written.name)]))
            except UserError as error:
                self._refused[name] = (place, stamp)
                self._notify(f"{name} is not served: {error}")
                continue
            self._served[name] = (place, stamp)
            self._notify(f"{name} is served ({place}, version {version[:12]})")
        for name in self._served.keys() - found.keys():
            del self._served[name]
            with suppress(ConfigError):  # it has been unloaded through the API
                self._engine.remove_adapter(name)
            self._notify(f"{name} is no longer served: its folder was deleted")

    def _of_checkpoint(self, place: Path) -> Path | None:
        """Writes the checkpoint's adapter as a PEFT folder, from which the engine can also reload it later. None: it has none."""
        run, step = place.parent.parent, int(place.name.removeprefix("step-"))
        folder = Path(self._written.name) / f"{run.name}-{step}"
        return folder if adapter_of_checkpoint(run, step, folder) else None

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self.scan()
            except OSError as error:  # a folder deleted during the scan, or a network share that is unavailable
                self._notify(f"{self._folder} can't be read: {error}")

    def _found(self) -> Iterator[tuple[str, tuple[Path, Stamp]]]:
        if not self._folder.is_dir():
            return
        for run in sorted(self._folder.iterdir()):
            if (stamp := _stamp(run / "final", "adapter_model.safetensors", "adapter_config.json")) is not None:
                yield run.name, (run / "final", stamp)
            steps = complete_steps(run / "checkpoints")
            if steps and (stamp := _stamp(place := path_of(run / "checkpoints", steps[-1]), "progress.json")) is not None:
                yield f"{run.name}@{steps[-1]}", (place, stamp)


def _stamp(folder: Path, *files: str) -> Stamp | None:
    """The stamp of the first of these files; None unless all of them exist."""
    try:
        first, *_ = [(folder / name).stat() for name in files]
    except OSError:
        return None
    return first.st_ino, first.st_size, first.st_mtime_ns
