"""Files wherever they lie: on this machine by path, in object stores and elsewhere by address (s3://, gs://, what fsspec knows).

Credentials and endpoints are those that each store's own package takes from the environment (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...); on a cluster every node needs them.
"""

from __future__ import annotations

import hashlib
import os
from codecs import BOM_UTF8
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from raytune_llm.errors import DataError, ResourceError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extras of this package by protocol."""
TAGS = ("md5Hash", "crc32c", "ETag", "etag", "content_md5")
"""Names under which stores tell what identifies a file's contents."""


def is_address(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> BinaryIO:
    return fsspec.open(path, "rb").open() if is_address(path) else open(path, "rb")  # type: ignore[return-value]


def open_arrow(path: str) -> Any:
    """As pyarrow reads it; a file of this machine is memory-mapped."""
    import pyarrow as pa

    return pa.PythonFile(open_file(path), "r") if is_address(path) else pa.memory_map(path)


def skip_bom(stream: BinaryIO) -> int:
    """Past the byte-order mark, if there is one; the position after it."""
    if stream.read(len(BOM_UTF8)) != BOM_UTF8:
        stream.seek(0)
    return stream.tell()


def size(path: str) -> int:
    """In bytes."""
    return _info(path)["size"] if is_address(path) else os.path.getsize(path)


def contents_hash(path: str) -> bytes:
    """What its store says that identifies the contents, where it says it; else a hash of the bytes."""
    if is_address(path):
        info = _info(path)
        if tag := next((info[name] for name in TAGS if info.get(name)), None):
            return hashlib.sha256(f"{tag} {info['size']}".encode()).digest()
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]


def found_at(address: str) -> list[str]:
    """The file at an address, or all below it in order, without hidden ones. Raises DataError and ResourceError."""
    protocol = address.partition("://")[0]
    try:
        store, inside = fsspec.url_to_fs(address)
        names = [inside] if store.isfile(inside) else sorted(store.find(inside))
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'raytune-llm[{extra}]'." if extra else "Install it."
        raise ResourceError(f"{protocol}:// needs another package ({_first_line(error)})", fix) from None
    except Exception as error:  # each store has errors of its own, of no common kind
        raise DataError(
            address,
            f"can't be reached ({type(error).__name__}: {_first_line(error)})",
            "Check the address, and the credentials in the environment.",
        ) from None
    if not names:
        raise DataError(address, "there is no such file or folder", "Check data.path.")
    return [store.unstrip_protocol(name) for name in names if not PurePosixPath(name).name.startswith(".")]


def folder_of(path: str) -> str:
    """Where the file lies; a folder is its own."""
    if is_address(path):
        return path.rpartition("/")[0] if PurePosixPath(path).suffix else path
    here = Path(path).expanduser()
    return str(here if here.is_dir() else here.parent)


def _info(address: str) -> dict[str, Any]:
    store, inside = fsspec.url_to_fs(address)
    return store.info(inside)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
