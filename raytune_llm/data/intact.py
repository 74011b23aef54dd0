"""Compares the shards of a token store with the hashes in its manifest: each file once, and again when its time or size changes.

What was compared is recorded beside the store, so that no run reads a large store twice.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.data.store import check_listed, compare_shards, read_manifest


def check_intact(folder: Path) -> None:
    """Raises DataError for a shard of the store in a folder that does not match its hash. Called before the store is opened."""
    manifest = read_manifest(folder)
    for member in manifest.get("members", ()):
        check_intact(folder.parent / member["store"])
    for shard in manifest["shards"]:
        check_listed(folder / shard["name"], shard)
    record = folder.with_name(f".{folder.name}.checked")
    hashes = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    stamps = {name: _stamp(folder / name) for name in hashes}
    compared = _compared(record)
    changed = {name: sha256 for name, sha256 in hashes.items() if compared.get(name) != stamps[name]}
    if changed:
        compare_shards(folder, changed)
        with suppress(OSError):  # another user's cache, or a full disk: compared again next time
            write_atomically(record, json.dumps(stamps))


def _stamp(file: Path) -> list[int]:
    there = file.stat()
    return [there.st_size, there.st_mtime_ns]


def _compared(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
