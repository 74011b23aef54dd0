"""A folder of output folders, looked at again and again: what a run writes becomes a model, without anybody asking for it.

A run's `final/` is served by the run's name, its newest complete checkpoint as `<name>@<step>`. A folder is taken when it is
whole: final/ is written beside and renamed, a checkpoint has its COMPLETE.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from raytune_llm.errors import UserError
from raytune_llm.serve.adapters import checked_folder, checked_name

log = logging.getLogger("raytune_llm.serve")
INTERVAL_S = 1.0
Stamp = tuple[int, int, int]
"""By which a changed folder is known: inode, size and time of its weights."""


class Adapters(Protocol):
    """An engine's, as far as they are changed here."""

    def add_adapter(self, name: str, folder: str | Path) -> str: ...

    def remove_adapter(self, name: str) -> None: ...


class Watcher:
    def __init__(
        self,
        folder: Path,
        engine: Adapters,
        *,
        base_name: str,
        told: Callable[[str], None] = log.info,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._folder, self._engine, self._base_name, self._told = folder, engine, base_name, told
        self._interval_s = interval_s
        self._served: dict[str, tuple[Path, Stamp]] = {}
        self._refused: dict[str, tuple[Path, Stamp]] = {}
        """What did not fit is not tried again until it changes."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Once: what is new, what changed, and what went."""
        found = dict(self._found())
        for name, (place, stamp) in found.items():
            if (place, stamp) in (self._served.get(name), self._refused.get(name)):
                continue
            try:
                checked_name(name, self._base_name)
                version = self._engine.add_adapter(name, checked_folder(str(place), [self._folder]))
            except UserError as error:
                self._refused[name] = (place, stamp)
                self._told(f"{name} is not served: {error}")
                continue
            self._served[name] = (place, stamp)
            self._told(f"{name} is served ({place}, version {version[:12]})")
        for name in self._served.keys() - found.keys():
            del self._served[name]
            self._engine.remove_adapter(name)
            self._told(f"{name} is no longer served: its folder went")

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self.look()
            except OSError as error:  # a folder that went while it was looked at, a share that is away
                self._told(f"{self._folder} can't be looked at: {error}")

    def _found(self) -> Iterator[tuple[str, tuple[Path, Stamp]]]:
        if not self._folder.is_dir():
            return
        for run in sorted(self._folder.iterdir()):
            if (stamp := _stamp(run / "final")) is not None:
                yield run.name, (run / "final", stamp)
            if (newest := _newest_checkpoint(run)) is not None and (stamp := _stamp(newest[1])) is not None:
                yield f"{run.name}@{newest[0]}", (newest[1], stamp)


def _stamp(folder: Path) -> Stamp | None:
    """None where there is no adapter."""
    try:
        weights = (folder / "adapter_model.safetensors").stat()
        (folder / "adapter_config.json").stat()
    except OSError:
        return None
    return weights.st_ino, weights.st_size, weights.st_mtime_ns


def _newest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """Its step, and the adapter in it."""
    steps = [
        int(number)
        for folder in (run / "checkpoints").glob("step-*")
        if (number := folder.name.removeprefix("step-")).isdigit() and (folder / "COMPLETE").exists()
    ]
    return (max(steps), run / "checkpoints" / f"step-{max(steps)}" / "adapter") if steps else None
