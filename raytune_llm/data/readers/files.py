"""Files in any place: on this machine by path, in object stores and elsewhere by address (s3://, gs://, what fsspec knows).

Credentials and endpoints are those that each store's own package takes from the environment (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...); on a cluster every node needs them.
"""

from __future__ import annotations

import hashlib
import io
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec

from raytune_llm.config.paths import expanded
from raytune_llm.errors import DataError, ResourceError, first_line
from raytune_llm.object_store import EXTRAS, is_address

TAGS = ("md5Hash", "crc32c", "ETag", "etag", "content_md5")
"""Keys of a store's file info that identify the contents."""


PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh91AY&SY": "bz2"}
"""What a packed file starts with, whatever its name, and what pyarrow calls the way."""
ARCHIVES = {b"PK\x03\x04": "zip", b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf": "7z"}
PACKED_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2")
UNPACKED_TIMES = 4
"""How much larger texts are unpacked, about."""


@contextmanager
def readable(path: str) -> Iterator[None]:
    """What the system says against reading a file becomes a DataError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(path, f"can't be read ({reason})", "Check the file and its permissions.") from None


def open_file(path: str) -> BinaryIO:
    """Its bytes, decompressed if it is compressed. A compressed file can only be rewound to its start."""
    stream = open_raw(path)
    way = packing(stream.read(16))
    stream.seek(0)
    if way is None:
        return stream
    stream.close()
    return io.BufferedReader(_Unpacked(path, way), 1 << 18)


def open_raw(path: str) -> BinaryIO:
    return fsspec.open(path, "rb").open() if is_address(path) else open(path, "rb")  # type: ignore[return-value]


def packing(start: bytes) -> str | None:
    """How the file that starts so is packed."""
    return next((way for magic, way in PACKED.items() if start.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """A packed file as it was. Raises DataError where it is damaged or cut off."""

    def __init__(self, path: str, way: str) -> None:
        self._path, self._open = path, _opener(path, way)
        self._inner, self._at = self._open(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + self._at if whence == io.SEEK_CUR else offset
        assert whence != io.SEEK_END, "where a packed file ends is not known"
        if target < self._at:
            self._inner.close()
            self._inner, self._at = self._open(), 0
        while self._at < target and self._read(min(target - self._at, 1 << 20)):
            pass
        return self._at

    def close(self) -> None:
        self._inner.close()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            data = self._inner.read(size)
        except OSError as error:
            raise DataError(
                self._path,
                f"is damaged after {self._at:,} bytes of the compressed data ({first_line(error)})",
                "Fetch it again.",
            ) from None
        self._at += len(data)
        return data


def _opener(path: str, way: str) -> Callable[[], Any]:
    import pyarrow as pa

    return lambda: pa.CompressedInputStream(pa.PythonFile(open_raw(path), "r"), way)


def open_arrow(path: str) -> Any:
    """Open an Arrow file with pyarrow; a file of this machine is memory-mapped."""
    import pyarrow as pa

    return pa.PythonFile(open_raw(path), "r") if is_address(path) else pa.memory_map(path)


def skip_bom(stream: BinaryIO) -> int:
    """Past the byte-order mark, if there is one; the position after it."""
    if stream.read(len(BOM_UTF8)) != BOM_UTF8:
        stream.seek(0)
    return stream.tell()


def size(path: str) -> int:
    """The size in bytes."""
    return _info(path)["size"] if is_address(path) else os.path.getsize(path)


def contents_hash(path: str) -> bytes:
    """What its store says that identifies the contents, where it says it; else a hash of the bytes."""
    if is_address(path):
        info = _info(path)
        if tag := next((info[name] for name in TAGS if info.get(name)), None):
            return hashlib.sha256(f"{tag} {info['size']}".encode()).digest()
    with open_raw(path) as stream:
        return hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]


def found_at(address: str, setting: str = "data.path") -> list[str]:
    """The file at an address, or all below it in order. Raises DataError and ResourceError."""
    protocol = address.partition("://")[0]
    try:
        store, inside = fsspec.url_to_fs(address)
        names = [inside] if store.isfile(inside) else sorted(store.find(inside))
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'raytune-llm[{extra}]'." if extra else "Install it."
        raise ResourceError(f"{protocol}:// needs another package ({first_line(error)})", fix) from None
    except Exception as error:  # each store has errors of its own, of no common kind
        raise DataError(
            address,
            f"can't be reached ({type(error).__name__}: {first_line(error)})",
            "Check the address, and the credentials in the environment.",
        ) from None
    if not names:
        raise DataError(address, "there is no such file or folder", f"Check {setting}.")
    return [store.unstrip_protocol(name) for name in names]


def below(folder: str) -> list[str]:
    """All files of a folder and of those in it, in order; hidden ones aside. Raises DataError for what can't be read of it."""

    def refuse(error: OSError) -> None:
        raise DataError(str(error.filename), f"can't be read ({error.strerror})", "Check its permissions, or remove it.")

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        with readable(where):
            here = os.stat(where)
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [os.path.join(where, name) for name in names if not name.startswith(".")]
    return sorted(found)


def folder_of(path: str) -> str:
    """The folder of a file; a folder itself."""
    if is_address(path):
        return path.rpartition("/")[0] if PurePosixPath(path).suffix else path
    here = expanded(path)
    return str(here if os.path.isdir(here) else here.parent)  # no error for a name that is too long, which is reported elsewhere


def _info(address: str) -> dict[str, Any]:
    store, inside = fsspec.url_to_fs(address)
    return store.info(inside)
