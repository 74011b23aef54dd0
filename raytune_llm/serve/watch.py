"""serve.watch: polls a folder of output folders and serves the adapters that runs write there.

A run's `final/` is served under the run's name, its newest complete checkpoint as `<name>@<step>`. Incomplete folders are never
read: `final/` is written to another folder and renamed, and a checkpoint has its file COMPLETE.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from raytune_llm.errors import ConfigError, UserError
from raytune_llm.runs.checkpoint_adapter import adapter_of_checkpoint
from raytune_llm.serve.adapters import checked_folder, checked_name
from raytune_llm.train.checkpoint_files import complete_steps, path_of

log = logging.getLogger("raytune_llm.serve")
INTERVAL_S = 1.0
REPLACED_S = 0.05
"""A folder that is replaced is back after this time: two renames are between the old one and the new one."""
Stamp = tuple[tuple[int, int, int], ...]
"""Identifies a version of a folder: inode, size and modification time (ns) of its files."""


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
        adapters: Mapping[str, str] | None = None,
        notify: Callable[[str], None] = log.info,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """adapters: name -> folder of those that the settings name. A run of such a name is served only if that is its folder."""
        self._folder, self._engine, self._base_name, self._notify = folder, engine, base_name, notify
        self._interval_s, self._adapters = interval_s, adapters or {}
        self._served: dict[str, tuple[Path, Stamp]] = {}
        self._versions: dict[str, str] = {}
        """Of those that are served."""
        self._refused: dict[str, tuple[Path, Stamp]] = {}
        """Adapters that can't be served; they are tried again only when they change."""
        self._told: dict[str, str] = {}
        """The last message of each adapter or run that could not be read: it is tried again and again, and said once."""
        self._written = tempfile.TemporaryDirectory(prefix="raytune-llm-watch-")
        self._folders: dict[str, Path] = {}
        """In it, the folders of the checkpoints' adapters that are served."""
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

    def version_of(self, name: str) -> str | None:
        """The version of an adapter that it loaded last. None: it serves none of this name."""
        return self._versions.get(name)

    def scan(self) -> None:
        """Scan once: load new and changed adapters, unload deleted ones. May be called from any thread. What is wrong with one
        folder is said, and the others are served."""
        with self._scanning:
            try:
                runs = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
            except OSError as error:  # the folder was deleted meanwhile, or a network share is unavailable
                self._tell("", f"{self._folder} can't be read: {error}")
                return
            found: dict[str, tuple[Path, Stamp]] = {}
            unreadable: set[str] = set()
            for run in runs:
                try:
                    found |= _adapters_of(run)
                except OSError as error:  # what is served of it stays
                    found |= {name: served for name, served in self._served.items() if run in served[0].parents}
                    unreadable.add(str(run))
                    self._tell(str(run), f"{run} can't be read: {error}")
            for name, (place, stamp) in found.items():
                if (place, stamp) not in (self._served.get(name), self._refused.get(name)):
                    self._serve(name, place, stamp)
            for name in self._gone(self._served.keys() - found.keys()):
                self._end(name)
            for kept in (self._refused, self._told):
                for name in kept.keys() - found.keys() - unreadable:
                    del kept[name]

    def _serve(self, name: str, place: Path, stamp: Stamp) -> None:
        try:
            version = self._add(name, place)
        except OSError as error:
            self._tell(name, f"{name} can't be read, and is tried again: {error}")
            return
        except UserError as error:
            self._refused[name] = (place, stamp)
            self._notify(f"{name} is not served: {error}")
            return
        except Exception as error:
            log.exception("%s is not served", name)
            self._refused[name] = (place, stamp)
            self._notify(f"{name} is not served: {type(error).__name__}: {error}")
            return
        self._told.pop(name, None)
        if version is None:
            self._refused[name] = (place, stamp)
            return
        self._served[name], self._versions[name] = (place, stamp), version
        self._notify(f"{name} is served ({place}, version {version[:12]})")

    def _add(self, name: str, place: Path) -> str | None:
        """Load the adapter and return its version; None for a checkpoint without an adapter."""
        checked_name(name, self._base_name)
        folder = checked_folder(str(place), [self._folder])
        if name in self._adapters and Path(self._adapters[name]).resolve() != folder:
            rule = "must not be that of another adapter in serve.adapters"
            raise ConfigError("a run's name", rule, got=name, fix="Rename one of them.")
        if place.parent.name != "checkpoints":
            return self._engine.add_adapter(name, folder)
        # A folder of its own, as PEFT writes it, from which the engine can also read it again later.
        folder = Path(tempfile.mkdtemp(dir=self._written.name))
        version = None
        try:
            if adapter_of_checkpoint(place.parent.parent, int(place.name.removeprefix("step-")), folder):
                version = self._engine.add_adapter(name, folder)
        finally:
            unused = folder if version is None else self._folders.pop(name, None)
            if unused is not None:
                shutil.rmtree(unused, ignore_errors=True)
        if version is not None:
            self._folders[name] = folder
        return version

    def _gone(self, missing: Set[str]) -> list[str]:
        """The names that stay missing, and are not just being replaced."""
        if missing:
            time.sleep(REPLACED_S)
        return sorted(name for name in missing if not self._is_back(name))

    def _is_back(self, name: str) -> bool:
        place, _ = self._served[name]
        try:
            return name in _adapters_of(place.parent if place.name == "final" else place.parent.parent)
        except OSError:
            return False

    def _end(self, name: str) -> None:
        del self._served[name], self._versions[name]
        with suppress(ConfigError):  # it has been unloaded through the API
            self._engine.remove_adapter(name)
        if (folder := self._folders.pop(name, None)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
        self._notify(f"{name} is no longer served: its folder was deleted")

    def _tell(self, name: str, message: str) -> None:
        if self._told.get(name) != message:
            self._told[name] = message
            self._notify(message)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self.scan()


def _adapters_of(run: Path) -> dict[str, tuple[Path, Stamp]]:
    """Name under which an adapter of the run's folder is served -> its folder and stamp. Raises OSError."""
    found = {}
    if (stamp := _stamp(run / "final", "adapter_model.safetensors", "adapter_config.json")) is not None:
        found[run.name] = (run / "final", stamp)
    steps = complete_steps(run / "checkpoints")
    if steps and (stamp := _stamp(place := path_of(run / "checkpoints", steps[-1]), "progress.json")) is not None:
        found[f"{run.name}@{steps[-1]}"] = (place, stamp)
    return found


def _stamp(folder: Path, *files: str) -> Stamp | None:
    """Inode, size and time of each of these files; None unless all exist."""
    try:
        found = [(folder / name).stat() for name in files]
    except OSError:
        return None
    return tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in found)
