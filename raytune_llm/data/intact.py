"""Compares the shards of a token store with the hashes in its manifest: each file once, and again when its time or size changes.

What was compared is recorded beside the store, so that no run reads a large store twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    hashes = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    stamps, compared = _stamps(folder, manifest), _compared(folder)
    changed = {name: sha256 for name, sha256 in hashes.items() if compared.get(name) != stamps[name]}
    if changed:
        compare_shards(folder, changed)
        _keep(folder, stamps)


def mark_compared(folder: Path) -> None:
    """Record that all shards of a store have just been compared."""
    _keep(folder, _stamps(folder, read_manifest(folder)))


def _record_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.checked")


def _keep(folder: Path, stamps: Mapping[str, list[int]]) -> None:
    with suppress(OSError):  # another user's cache, or a full disk: compared again next time
        write_atomically(_record_of(folder), json.dumps(stamps))


def _stamps(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    return {shard["name"]: _stamp(folder / shard["name"]) for shard in manifest["shards"]}


def _stamp(file: Path) -> list[int]:
    there = file.stat()
    return [there.st_size, there.st_mtime_ns]


def _compared(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(_record_of(folder).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
