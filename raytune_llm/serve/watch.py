"""A folder of output folders, looked at again and again: what a run writes becomes a model, without anybody asking for it.

A run's `final/` is served by the run's name, its newest complete checkpoint as `<name>@<step>`. A folder is taken when it is
whole: final/ is written beside and renamed, a checkpoint has its COMPLETE.
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
"""By which a changed folder is known: inode, size and time of its first file."""


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
        self._written = tempfile.TemporaryDirectory(prefix="raytune-llm-watch-")
        self._looking = threading.Lock()
        """A request for an adapter that isn't here looks too."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._written.cleanup()

    def look(self) -> None:
        """Once: what is new, what changed, and what went. From any thread."""
        with self._looking:
            self._look()

    def _look(self) -> None:
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
                self._told(f"{name} is not served: {error}")
                continue
            self._served[name] = (place, stamp)
            self._told(f"{name} is served ({place}, version {version[:12]})")
        for name in self._served.keys() - found.keys():
            del self._served[name]
            with suppress(ConfigError):  # it was unloaded through the API
                self._engine.remove_adapter(name)
            self._told(f"{name} is no longer served: its folder went")

    def _of_checkpoint(self, place: Path) -> Path | None:
        """Its adapter in a folder of this server's own, from which weights that left host memory are read again."""
        run, step = place.parent.parent, int(place.name.removeprefix("step-"))
        folder = Path(self._written.name) / f"{run.name}-{step}"
        return folder if adapter_of_checkpoint(run, step, folder) else None

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
            if (stamp := _stamp(run / "final", "adapter_model.safetensors", "adapter_config.json")) is not None:
                yield run.name, (run / "final", stamp)
            steps = complete_steps(run / "checkpoints")
            if steps and (stamp := _stamp(place := path_of(run / "checkpoints", steps[-1]), "progress.json")) is not None:
                yield f"{run.name}@{steps[-1]}", (place, stamp)


def _stamp(folder: Path, *files: str) -> Stamp | None:
    """Of the first of these files; None where they are not all there."""
    try:
        first, *_ = [(folder / name).stat() for name in files]
    except OSError:
        return None
    return first.st_ino, first.st_size, first.st_mtime_ns
