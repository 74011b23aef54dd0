"""Checks that all nodes of a run can write a folder or a store of objects, and see there what another has written."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from raytune_llm.errors import ConfigError, UserError
from raytune_llm.object_store import check_writable
from raytune_llm.runs.node_calls import answers, on_node

VISIBLE_WITHIN_S = 10.0
"""Network file systems show another node's new file with a delay."""


def check_shared(setting: str, folder: Path, ids: Sequence[str], addresses: Sequence[str]) -> None:
    """Raises ConfigError unless a file that the first node writes is visible on all nodes."""
    name = f".seen-by-all-{uuid.uuid4().hex}"
    (failure,) = answers([on_node(ids[0], write_marker).remote(folder, name)], f"write to {folder}")
    if failure:
        raise ConfigError(setting, f"must be a folder that {addresses[0]} can write ({failure})", got=str(folder))
    try:
        seen = [*answers([on_node(node, sees).remote(folder / name) for node in ids[1:]], f"read {folder}"), sees(folder / name)]
    finally:
        answers([on_node(ids[0], remove_marker).remote(folder, name)], f"clean {folder}")
    blind = [address for address, there in zip([*addresses[1:], "the driver"], seen, strict=True) if not there]
    if blind:
        raise ConfigError(
            setting,
            f"must be on storage that all nodes share: {', '.join(blind)} can't see what {addresses[0]} writes there",
            got=str(folder),
            fix="Mount the same network file system on all nodes, and name a folder in it.",
        )


def check_reached(setting: str, address: str, ids: Sequence[str], addresses: Sequence[str]) -> None:
    """Raises ConfigError unless all nodes can write to the object store: each needs its package and its credentials."""
    refusals = answers([on_node(node, refusal).remote(address, setting) for node in ids], f"write to {address}")
    for node, said in zip(addresses, refusals, strict=True):
        if said:
            raise ConfigError(setting, f"must be usable from all nodes, and {node} says: {said}", got=address)


def refusal(address: str, setting: str) -> str:
    """The reason why this node can't write to the address; empty if it can."""
    try:
        check_writable(address, setting)
    except UserError as error:
        return str(error)
    return ""


def write_marker(folder: Path, name: str) -> str:
    """Write a marker file. Returns the reason if that fails, else an empty text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def sees(path: Path) -> bool:
    until = time.monotonic() + VISIBLE_WITHIN_S
    while time.monotonic() < until:
        try:
            os.listdir(path.parent)  # so that a network file system refreshes its cache
            if path.read_text() == path.name:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def remove_marker(folder: Path, name: str) -> None:
    """Delete the marker, and then the folder if it is empty."""
    (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
