"""A lock on an output folder, on a file system or in an object store: one process uses it at a time.

The owner writes a lock file and renews its modification time. A lock is stale if its process no longer exists (on this host) or
if the modification time is old (on any host, by the clock of the file system), so a crash leaves nothing to clean up.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.object_store import RemoteFolder

LOCK = ".owner.json"
RENEWED_EVERY_S, STALE_AFTER_S = 10.0, 60.0
TAKEN_AFTER_S = 0.2
"""Two processes that take the same stale lock both write the file; after this time its content decides."""


def check_writable(folder: Path, *names: str) -> None:
    """Raises ConfigError if the folder doesn't exist and can't be created, or can't be written to, or if one of the files that
    will be written there is a folder, or a link that leads nowhere.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        probe = there / f".probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "output_dir", f"must be a folder that can be written ({reason})", got=str(folder), fix="Choose another one."
        ) from None
    for name in names:
        file = folder / name
        if os.path.lexists(file) and not (file.exists() and not file.is_dir()):
            rule = f"must be a folder where the file {name} can be written, which is a folder or a broken link there"
            raise ConfigError("output_dir", rule, got=str(folder), fix="Choose another one, or remove it.")


class Lock(Protocol):
    """Where the lock of a folder is kept."""

    place: str
    """The folder, for messages."""

    def create(self, text: str) -> bool:
        """Create the lock. False: it exists already."""
        ...

    def read(self) -> str: ...

    def replace(self, text: str) -> None: ...

    def renew(self, text: str) -> None: ...

    def remove(self) -> None: ...

    def age_s(self) -> float:
        """Seconds since it was written or renewed, by the clock of the storage that hosts share; infinite if there is none."""
        ...


class FileLock:
    def __init__(self, folder: Path) -> None:
        self.place, self.path = str(folder), folder / LOCK

    def create(self, text: str) -> bool:
        try:
            with self.path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def read(self) -> str:
        return self.path.read_text()

    def replace(self, text: str) -> None:
        beside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        beside.write_text(text)
        beside.replace(self.path)

    def renew(self, text: str) -> None:
        os.utime(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def age_s(self) -> float:
        probe = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        try:
            probe.touch()
            now = probe.stat().st_mtime
            return now - self.path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)


class ObjectLock:
    """A store writes an object that is not there for one of those who ask at once (If-None-Match)."""

    def __init__(self, folder: RemoteFolder) -> None:
        self.place, self._folder = folder.address, folder

    def create(self, text: str) -> bool:
        return self._folder.create(LOCK, text.encode())

    def read(self) -> str:
        return (self._folder.read(LOCK) or b"").decode()

    def replace(self, text: str) -> None:
        self._folder.write(LOCK, text.encode())

    def renew(self, text: str) -> None:
        self._folder.write(LOCK, text.encode())

    def remove(self) -> None:
        self._folder.remove(LOCK)

    def age_s(self) -> float:
        probe = f"{LOCK}.{secrets.token_hex(4)}"
        self._folder.write(probe, b"")
        try:
            return self._folder.modified(probe) - self._folder.modified(LOCK)
        except FileNotFoundError:
            return float("inf")
        finally:
            self._folder.remove(probe)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the folder inside the block. It is created, and removed at the end if it is empty.

    Raises ConfigError if a running process owns it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(FileLock(folder)):
            yield
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


@contextmanager
def owned_remotely(folder: RemoteFolder) -> Iterator[None]:
    """`owned` for a folder in an object store."""
    with _held(ObjectLock(folder)):
        yield


@contextmanager
def _held(lock: Lock) -> Iterator[None]:
    mine = _new_lock()
    _take(lock, mine)
    stop = threading.Event()
    keeper = threading.Thread(target=_renew, args=(lock, mine, stop), name="owner", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if _read(lock).get("token") == mine["token"]:
            lock.remove()


def wait_until_free(folder: Path) -> None:
    """Wait until the lock of a process that has died is stale: at once on this host, else when it was not renewed."""
    lock, until = FileLock(folder), time.monotonic() + STALE_AFTER_S + RENEWED_EVERY_S
    while lock.path.exists() and _alive(lock, _read(lock)) and time.monotonic() < until:
        time.sleep(TAKEN_AFTER_S)


def _take(lock: Lock, mine: dict[str, Any]) -> None:
    text = json.dumps(mine)
    if lock.create(text):
        return
    holder = _read(lock)
    if _alive(lock, holder):
        raise ConfigError(
            "output_dir",
            f"is in use by process {holder.get('pid')} on {holder.get('host')}: two runs can't share a folder",
            got=lock.place,
            fix="Wait for it, stop it, or choose another output_dir.",
        )
    lock.replace(text)
    time.sleep(TAKEN_AFTER_S)
    if _read(lock).get("token") != mine["token"]:
        raise ConfigError("output_dir", "was just taken by another process", got=lock.place, fix="Choose another output_dir.")


def _new_lock() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _alive(lock: Lock, holder: dict[str, Any]) -> bool:
    if not holder:
        return lock.age_s() < RENEWED_EVERY_S  # the file may be empty because it is just being written
    here = holder.get("host") == socket.gethostname() and holder.get("boot") == _boot()
    if here:
        return _started(holder.get("pid")) is not None and _started(holder.get("pid")) == holder.get("started")
    return lock.age_s() < STALE_AFTER_S


def _renew(lock: Lock, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(RENEWED_EVERY_S):
        try:
            if _read(lock).get("token") == mine["token"]:
                lock.renew(json.dumps(mine))
        except (OSError, ResourceError):
            continue  # storage that is unavailable for a moment


def _read(lock: Lock) -> dict[str, Any]:
    try:
        found = json.loads(lock.read())
    except (OSError, ValueError, ResourceError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _boot() -> str:
    """An id of the machine's current boot, since process ids start again with each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: object) -> str | None:
    """When a process started, in the kernel's clock ticks. None: there is no such process, or it is a zombie: it has ended, and
    its parent (the first process of some containers) never asks how."""
    if not isinstance(pid, int):
        return None
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in ("Z", "X") else others[18]
    except (OSError, IndexError):
        pass
    try:  # without /proc
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return None
    return "unknown"
