"""A lock on an output folder, on a file system or in an object store: one process uses it at a time.

The owner writes a lock file and renews its modification time. A lock is stale if its process no longer exists (on this host) or
if the modification time is old (on any host, by the clock of the file system), so a crash leaves nothing to clean up: the same
command, started again elsewhere, waits until the lock is stale. An owner that could not renew its lock, and then finds another
process's lock, ends like after Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from raytune_llm.byte_size import in_units
from raytune_llm.errors import ConfigError, ResourceError, RunLost
from raytune_llm.interrupts import interrupt_main_thread
from raytune_llm.object_store import RemoteFolder
from raytune_llm.storage import no_space_in

log = logging.getLogger(__name__)
LOCK = ".owner.json"
RENEWED_EVERY_S, STALE_AFTER_S = 5.0, 20.0
LOOK_EVERY_S = 1.0
"""How often a lock of another host is checked."""
CLOCK_STEP_S = 1.0
"""Tolerance for object stores, whose times are whole seconds of clocks that may differ a little."""
TAKEN_AFTER_S = 0.2
"""Two processes that take the same stale lock both write the file; after this time its content decides."""


def check_writable(folder: Path, *names: str, folders: Sequence[str] = ()) -> None:
    """Raises ConfigError if the folder can't be created or written to, or if one of the files to be written there is a folder or
    a broken link, or one of the `folders` a file.
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
    for name in folders:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            rule = f"must be a folder where the folder {name} can be written, which is a file or a broken link there"
            raise ConfigError("output_dir", rule, got=str(folder), fix="Choose another one, or remove it.")


class Lock(Protocol):
    """A lock file in a folder or in an object store."""

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
        """Seconds since the lock was written or renewed, by the clock of the shared storage; infinite if there is no lock."""
        ...


class FileLock:
    def __init__(self, folder: Path) -> None:
        self.place, self.path = str(folder), folder / LOCK

    def create(self, text: str) -> bool:
        try:
            file = self.path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except OSError:
            self.path.unlink(missing_ok=True)  # an empty lock is anybody's, and the next start would wait until it is stale
            raise
        return True

    def read(self) -> str:
        return self.path.read_text()

    def replace(self, text: str) -> None:
        beside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        try:
            beside.write_text(text)
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)

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
    """A lock in an object store. If several processes create it at once, the store lets one succeed (If-None-Match)."""

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


class Ownership:
    """This process's ownership of a folder."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._mine = _new_lock()
        self._taken_by: dict[str, Any] = {}
        self._ended = threading.Event()

    @property
    def lost(self) -> bool:
        """Whether another process owns the folder now, so that this one must not write to it."""
        return bool(self._taken_by)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which the lock is renewed. Raises RunLost if another process takes the folder; in the main thread, at
        once."""
        _take(self._lock, self._mine)
        main = threading.current_thread() is threading.main_thread()
        keeper = threading.Thread(target=self._keep, args=(main,), name="owner", daemon=True)
        keeper.start()
        try:
            try:
                yield
            finally:
                self._ended.set()
                keeper.join()
        except (Exception, KeyboardInterrupt) as error:
            if self.lost:
                raise self._run_lost() from error
            raise
        finally:
            if _read(self._lock).get("token") == self._mine["token"]:
                self._lock.remove()
        if self.lost:
            raise self._run_lost()

    def _keep(self, main: bool) -> None:
        """main: the main thread is the one that holds the lock."""
        while not self._ended.wait(RENEWED_EVERY_S):
            holder = _read(self._lock)
            if holder.get("token", self._mine["token"]) != self._mine["token"]:
                self._taken_by = holder
                if main:
                    interrupt_main_thread()
                return
            with suppress(OSError, ResourceError):  # the storage may not answer for a moment
                if holder:
                    self._lock.renew(json.dumps(self._mine))

    def _run_lost(self) -> RunLost:
        pid, host = self._taken_by.get("pid"), self._taken_by.get("host")
        return RunLost(
            f"process {pid} on {host} has taken {self._lock.place}, which this one could not reach for {STALE_AFTER_S:g} s",
            "That process continues the run.",
        )


@contextmanager
def owned(folder: Path) -> Iterator[Ownership]:
    """Own the folder inside the block. It is created, and removed at the end if it is empty.

    Raises ConfigError if a running process owns it, and RunLost if another one takes it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with _full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ownership = Ownership(FileLock(folder))
    try:
        with ownership.held():
            yield ownership
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


@contextmanager
def owned_remotely(folder: RemoteFolder) -> Iterator[Ownership]:
    """`owned` for a folder in an object store."""
    ownership = Ownership(ObjectLock(folder))
    with ownership.held():
        yield ownership


def wait_until_free(folder: Path) -> None:
    """Wait until the lock of a dead process is stale. A process of this host is recognized at once; a lock of another host must
    not have been renewed for STALE_AFTER_S."""
    lock, until = FileLock(folder), time.monotonic() + STALE_AFTER_S + RENEWED_EVERY_S
    while lock.path.exists() and _alive(lock, _read(lock)) and time.monotonic() < until:
        time.sleep(TAKEN_AFTER_S)


def _take(lock: Lock, mine: dict[str, Any]) -> None:
    text = json.dumps(mine)
    with _full_disk_named(lock.place):
        if lock.create(text):
            return
    holder = _read(lock)
    in_use = _alive(lock, holder) if _is_here(holder) else _is_renewed(lock, holder)
    if in_use:
        raise ConfigError(
            "output_dir",
            f"is in use by process {holder.get('pid')} on {holder.get('host')}: two runs can't share a folder",
            got=lock.place,
            fix="Wait for it, stop it, or choose another output_dir.",
        )
    with _full_disk_named(lock.place):
        lock.replace(text)
    time.sleep(TAKEN_AFTER_S)
    if _read(lock).get("token") != mine["token"]:
        raise ConfigError("output_dir", "was just taken by another process", got=lock.place, fix="Choose another output_dir.")


@contextmanager
def _full_disk_named(place: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (reason := no_space_in(error)) is None:
            raise
        where = next(there for there in (Path(place), *Path(place).parents) if there.exists())
        free = in_units(shutil.disk_usage(where).free)
        fix = "Free some space, or choose an output_dir on another disk."
        raise ResourceError(f"{place} can't be written: {reason} ({free} are free)", fix) from error


def _is_renewed(lock: Lock, holder: dict[str, Any]) -> bool:
    """Watch another host's lock until it is renewed (True) or stale (False).

    A lock whose time is in the future, since the clock was set back, is watched for as long as one of now.
    """
    age = lock.age_s()
    watched_s = STALE_AFTER_S - max(age, 0.0)
    until = time.monotonic() + watched_s
    if watched_s > 0:
        log.warning(
            "%s was in use by process %s on %s a moment ago; checking for up to %.0f s whether it still is",
            lock.place, holder.get("pid"), holder.get("host"), watched_s,
        )  # fmt: skip
    while age < STALE_AFTER_S and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
        _read(lock)  # opening the file makes a network file system ask its server
        before, age = age, lock.age_s()
        if age < before - CLOCK_STEP_S:
            return True
    return False


def _new_lock() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the lock's process belongs to this container and to this boot of the host, so that its id can be looked up."""
    return holder.get("host") == socket.gethostname() and holder.get("boot") == _boot()


def _alive(lock: Lock, holder: dict[str, Any]) -> bool:
    if _is_here(holder):
        return _started(holder.get("pid")) is not None and _started(holder.get("pid")) == holder.get("started")
    return lock.age_s() < STALE_AFTER_S


def _read(lock: Lock) -> dict[str, Any]:
    try:
        found = json.loads(lock.read())
    except (OSError, ValueError, ResourceError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _boot() -> str:
    """An id of the machine's boot and of the container's process namespace, since process ids are only unique within these.
    Containers may share the host's name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: object) -> str | None:
    """When a process started, in the kernel's clock ticks; None if there is no such process. A zombie has ended, even if its
    parent (the first process of some containers) never reaps it."""
    if not isinstance(pid, int):
        return None
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in ("Z", "X") else others[18]
    except (OSError, IndexError):
        pass
    try:  # a system without /proc
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return None
    return "unknown"
