"""A lock on an output folder: one process uses it at a time.

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
from typing import Any

from raytune_llm.errors import ConfigError

LOCK = ".owner.json"
RENEWED_EVERY_S, STALE_AFTER_S = 10.0, 60.0
TAKEN_AFTER_S = 0.2
"""Two processes that take the same stale lock both write the file; after this time its content decides."""


def check_writable(folder: Path) -> None:
    """Raises ConfigError if the folder doesn't exist and can't be created, or can't be written to."""
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


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the folder inside the block. It is created, and removed at the end if it is empty.

    Raises ConfigError if a running process owns it.
    """
    path, mine = folder / LOCK, _new_lock()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _take(path, mine)
    stop = threading.Event()
    keeper = threading.Thread(target=_renew, args=(path, mine, stop), name="owner", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if _read(path).get("token") == mine["token"]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            for place in made:
                place.rmdir()


def wait_until_free(folder: Path) -> None:
    """Until the process that owned the folder, and is gone, is known to be; of another host that is so when its lock is old."""
    path, until = folder / LOCK, time.monotonic() + STALE_AFTER_S + RENEWED_EVERY_S
    while path.exists() and _alive(path, _read(path)) and time.monotonic() < until:
        time.sleep(TAKEN_AFTER_S)


def _take(path: Path, mine: dict[str, Any]) -> None:
    text = json.dumps(mine)
    try:
        with path.open("x") as file:
            file.write(text)
        return
    except FileExistsError:
        pass
    holder = _read(path)
    if _alive(path, holder):
        raise ConfigError(
            "output_dir",
            f"is in use by process {holder.get('pid')} on {holder.get('host')}: two runs can't share a folder",
            got=str(path.parent),
            fix="Wait for it, stop it, or choose another output_dir.",
        )
    beside = path.with_name(f"{path.name}.{mine['token']}")
    beside.write_text(text)
    beside.replace(path)
    time.sleep(TAKEN_AFTER_S)
    if _read(path).get("token") != mine["token"]:
        raise ConfigError(
            "output_dir", "was just taken by another process", got=str(path.parent), fix="Choose another output_dir."
        )


def _new_lock() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    if not holder:
        return _age_s(path) < RENEWED_EVERY_S  # the file may be empty because it is just being written
    here = holder.get("host") == socket.gethostname() and holder.get("boot") == _boot()
    if here:
        return _started(holder.get("pid")) is not None and _started(holder.get("pid")) == holder.get("started")
    return _age_s(path) < STALE_AFTER_S


def _age_s(path: Path) -> float:
    """Seconds since the file was modified, by the clock of the file system, which hosts may share."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _renew(path: Path, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(RENEWED_EVERY_S):
        try:
            if _read(path).get("token") == mine["token"]:
                os.utime(path)
        except OSError:
            continue  # storage that is unavailable for a moment


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _boot() -> str:
    """An id of the machine's current boot, since process ids start again with each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: object) -> str | None:
    """When a process started, in the kernel's clock ticks. None: there is no such process."""
    if not isinstance(pid, int):
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:  # without /proc
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return None
    return "unknown"
