"""A folder in an object store (s3://, gs://, any other that fsspec knows), such as a run's output folder.

An object is written whole or not at all, and can't be renamed. So the file that marks others as complete (COMPLETE,
finished.json) is written last. The store's own package takes credentials and endpoints from the environment (AWS_PROFILE,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from raytune_llm.byte_size import in_units
from raytune_llm.disk import DISK_FULL, free_bytes
from raytune_llm.errors import ConfigError, ResourceError, RunLost, first_line

T = TypeVar("T")
log = logging.getLogger(__name__)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> extra of this package that installs its client."""
NO_STORES = ("file", "local", "http", "https", "ftp", "github", "data")
"""Protocols of fsspec that are not writable object stores."""
PATIENCE_S = 120.0
"""How long a failed request is retried."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
AT_ONCE = 8
"""Files that one process transfers at the same time."""
FINAL_ERRORS = (FileNotFoundError, FileExistsError, NotImplementedError, IsADirectoryError, NotADirectoryError)
"""Errors that are not retried, because the result would be the same."""
RESUMES = "The same command resumes from the newest checkpoint"


def is_address(path: str) -> bool:
    return "://" in path


class RemoteFolder:
    """One folder. File names are relative to it and use slashes."""

    def __init__(self, address: str, *, patience_s: float = PATIENCE_S) -> None:
        """Raises ImportError if the store's package is missing, and ValueError if fsspec does not know the protocol."""
        self.address, self._patience_s = address.rstrip("/"), patience_s
        # Another process may write to the same folder, so a listing is never cached.
        self.store, root = fsspec.url_to_fs(self.address, use_listings_cache=False)
        self._root = str(root).rstrip("/")

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.address}/{name}", patience_s=self._patience_s)

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def files(self) -> dict[str, int]:
        """The sizes in bytes of all files in the folder and below it, by name."""

        def found() -> dict[str, int]:
            self.store.invalidate_cache()
            entries: dict[str, Any] = self.store.find(self._root, detail=True)
            return {path[len(self._root) + 1 :]: int(entry["size"]) for path, entry in entries.items()}

        try:
            return self._persist("listed", "", found)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is no such file."""
        try:
            return self._persist("read", name, lambda: self.store.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._persist("written", name, lambda: self.store.pipe_file(self.path(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists. Returns whether this call wrote it; of two processes at the same moment, one gets False.

        content must differ from what any other process writes: if the store's answer was lost, it shows whose file is there.
        """

        def put() -> None:
            try:
                self.store.pipe_file(self.path(name), content, mode="create")
            except FINAL_ERRORS:
                raise
            except Exception as error:  # stores other than S3 itself refuse with errors of other kinds
                self.store.invalidate_cache()
                if self.store.exists(self.path(name)):
                    raise FileExistsError(name) from error
                raise

        try:
            self._persist("written", name, put)
        except FileExistsError:
            return self.read(name) == content
        return True

    def modified(self, name: str) -> float:
        """When the file was written, in seconds since 1970 by the store's clock. Raises FileNotFoundError."""

        def asked() -> float:
            self.store.invalidate_cache()
            return self.store.modified(self.path(name)).timestamp()

        return self._persist("looked at", name, asked)

    def upload(self, folder: Path, names: list[str]) -> None:
        """Upload files of a local folder. One that has another size in the store is uploaded again."""

        def one(name: str) -> None:
            def put() -> None:
                self.store.put_file(str(folder / name), self.path(name))
                self._check_size(name, folder / name)

            self._persist("written", name, put)

        self._at_once(one, names)

    def download(self, names: list[str], folder: Path) -> None:
        """Download files to a local folder. A local file is replaced only by a complete one. Raises ResourceError if the local
        disk is full."""

        def one(name: str) -> None:
            target = folder / name
            beside = target.with_name(f".{target.name}.part")

            def get() -> None:
                self.store.get_file(self.path(name), str(beside))
                self._check_size(name, beside)

            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._persist("read", name, get)
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)

        try:
            self._at_once(one, names)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            free = in_units(free_bytes(folder))
            raise ResourceError(
                f"files of {self.address} can't be copied to {folder}: {error.strerror} ({free} are free)",
                "Free some space, or let XDG_CACHE_HOME name a folder on a larger disk.",
            ) from error

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with its files, if it exists."""

        def gone() -> None:
            self.store.invalidate_cache()
            if self.store.exists(self.path(name)):
                self.store.rm(self.path(name), recursive=True)

        try:
            self._persist("removed", name, gone)
        except FileNotFoundError:
            return

    def _check_size(self, name: str, local: Path) -> None:
        """Raises OSError if a file has another size here than in the store."""
        self.store.invalidate_cache()
        here, there = local.stat().st_size, self.store.info(self.path(name))["size"]
        if here != there:
            raise OSError(f"it has {there} bytes in the store and {here} here")

    def _at_once(self, does: Callable[[str], None], names: list[str]) -> None:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="object-store") as pool:
            list(pool.map(does, names))

    def _persist(self, done: str, name: str, ask: Callable[[], T]) -> T:
        """Retry while the store fails (throttling, timeouts, no network), for patience_s. done: the past participle for
        messages."""
        until, pause = time.monotonic() + self._patience_s, PAUSE_S
        while True:
            try:
                return ask()
            except PermissionError as error:
                if _is_local(error):
                    raise
                raise self._lost(name, done, error, "once that is permitted (credentials may have expired)") from error
            except Exception as error:  # each store has errors of its own, of no common kind
                # Of a write: a store that has lost an upload in parts asks for all of them again. Or there is no such bucket.
                lacks_place = done == "written" and isinstance(error, FileNotFoundError) and not _is_local(error)
                if isinstance(error, FINAL_ERRORS) and not lacks_place:
                    raise
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise  # the local disk
                if time.monotonic() + pause > until:
                    then = "once there is such a bucket" if lacks_place else "once the store answers"
                    raise self._lost(name, done, error, then) from error
                what = f"{self.address}/{name}".rstrip("/")
                log.warning("%s can't be %s (%s); trying again in %.1f s", what, done, first_line(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _lost(self, name: str, done: str, error: Exception, then: str) -> RunLost:
        what = f"{self.address}/{name}".rstrip("/")
        return RunLost(f"{what} can't be {done} ({type(error).__name__}: {first_line(error)})", f"{RESUMES} {then}.")


def _is_local(error: OSError) -> bool:
    """Whether the error is about the local file and not about the store: the system then names the file."""
    return error.filename is not None


def check_writable(address: str, setting: str) -> None:
    """Raises ConfigError or ResourceError unless a file can be written to the folder, listed, read and removed."""
    protocol = address.partition("://")[0]
    if protocol in NO_STORES:
        raise ConfigError(
            setting, "must be a folder, or the address of an object store (s3://, gs://)", got=address, fix="Choose another one."
        )
    name = f".probe-{time.time_ns():x}"
    try:
        folder = RemoteFolder(address, patience_s=0.0)
        folder.write(name, b"probe")
        readable = folder.read(name) == b"probe" and name in folder.files()
        folder.remove(name)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'raytune-llm[{extra}]'." if extra else "Install it."
        raise ResourceError(f"{protocol}:// needs another package ({first_line(error)})", fix) from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ResourceError) and error.__cause__ is not None else error
        raise ConfigError(
            setting,
            f"must be a folder that can be written ({type(cause).__name__}: {first_line(cause)})",
            got=address,
            fix="Check the bucket, and the credentials and the endpoint in the environment (AWS_PROFILE, AWS_ENDPOINT_URL, ...).",
        ) from None
    if not readable:
        raise ConfigError(setting, "must be a folder that can be read and listed", got=address, fix="Check the permissions.")
