"""Opens and lists files on this machine (by path) and in object stores (by address: s3://, gs://, any that fsspec knows).

Each store's own package takes credentials and endpoints from the environment (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...). On a cluster, every node needs them.
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
"""The first bytes of a compressed file -> pyarrow's name of the compression."""
ARCHIVES = {b"PK\x03\x04": "zip", b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf": "7z"}
PACKED_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2")
UNPACKED_TIMES = 4
"""About how many times larger text is when it is decompressed."""


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns an OSError from reading a file into a DataError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(path, f"can't be read ({reason})", "Check the file and its permissions.") from None


def open_file(path: str) -> BinaryIO:
    """Open a file for reading, decompressed if it is compressed. A compressed file can only be rewound to its start."""
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
    """The compression of a file with these first bytes; None if it is not compressed."""
    return next((way for magic, way in PACKED.items() if start.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """The decompressed content of a file. Raises DataError if the file is damaged or truncated."""

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
    """Skip a byte-order mark, and return the position after it (0 if there is none)."""
    if stream.read(len(BOM_UTF8)) != BOM_UTF8:
        stream.seek(0)
    return stream.tell()


def size(path: str) -> int:
    """The size in bytes."""
    return _info(path)["size"] if is_address(path) else os.path.getsize(path)


def contents_hash(path: str) -> bytes:
    """Bytes that identify a file's content: the store's checksum or ETag if it has one, else a hash of the content."""
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
    """All files in a folder and below it, in order, without hidden ones. Raises DataError if a folder can't be read."""

    def refuse(error: OSError) -> None:
        raise DataError(str(error.filename), f"can't be read ({error.strerror})", "Check its permissions, or remove it.")

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        with readable(where):
            here = os.stat(where)
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back to a folder above it
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
