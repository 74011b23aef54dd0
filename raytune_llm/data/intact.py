"""Compares the shards of a token store with the hashes in its manifest: each file once, and again when its time or size changes.

What was compared is recorded beside the store, so that no run reads a large store twice.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.data.store import Store


def check_intact(store: Store) -> None:
    """Raises DataError for a shard that does not match its hash."""
    for member in store.members:
        check_intact(member)
    record = store.folder.with_name(f".{store.folder.name}.checked")
    stamps = {shard["name"]: _stamp(store.folder / shard["name"]) for shard in store.manifest["shards"]}
    compared = _compared(record)
    changed = [name for name, stamp in stamps.items() if compared.get(name) != stamp]
    if changed:
        store.verify(changed)
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
