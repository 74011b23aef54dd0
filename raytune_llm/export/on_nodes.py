"""A merged model whose files are written by Ray tasks, one a file, on whatever nodes have room. [ray]

The base, the adapters and the export's folder lie on storage that the nodes share. The index, and the name by which the export is
whole, come last and from this process.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from raytune_llm.config.resources import Cluster, Local, on_cluster
from raytune_llm.errors import ResourceError, RunLost, first_line
from raytune_llm.export.source import Source
from raytune_llm.export.tensors import Shard, TensorFact, shards_of, write_file, write_index
from raytune_llm.runs.group_size import check_fits, group_size, warn_without_room
from raytune_llm.runs.nodes import check_nodes
from raytune_llm.session import connect

GIVEN_UP = ".given-up"
"""A file beside the others, from which tasks see that the export has failed."""
ENDS_WITHIN_S = 10.0
"""Longest wait for tasks that were given up."""
NO_FILE_S = 3600.0
"""A file takes minutes. One that a frozen process writes never ends, and Ray would wait for it without limit."""
PARTIAL = ".partial"
"""The end of the name of a file that is being written."""


def write_on_nodes(
    source: Source,
    facts: Sequence[TensorFact],
    shard_bytes: int,
    folder: Path,
    resources: Local | Cluster,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the merged model's files: resources.num_workers at a time, with `auto` as many as the cluster has room for. on_bytes:
    called with the size of each written tensor.

    Raises ResourceError if a node does not see the folders, or if a task's process dies again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    connect(resources)
    size = group_size(resources)
    cpus = 1.0 if resources.cpus_per_worker == "auto" else size.cpus
    if on_cluster(resources):
        folders = {"export.output_dir": str(folder.parent.parent)}
        check_nodes(resources, folders, workers=1, each={"CPU": cpus}, report=lambda line: None)
    if resources.num_workers != "auto":
        check_fits(size)
    warn_without_room(1, {"CPU": cpus})
    task = ray.remote(num_cpus=cpus, scheduling_strategy="SPREAD")(_write)
    shards = shards_of(facts, shard_bytes)
    shared = ray.put(source)
    waiting = list(reversed(shards))
    running: dict[ray.ObjectRef, Shard] = {}
    at_once = len(shards) if resources.num_workers == "auto" else size.workers
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                shard = waiting.pop()
                running[task.remote(shared, shard.facts, folder / shard.name)] = shard
            if not (ended := ray.wait(list(running), timeout=NO_FILE_S)[0]):
                what = f"no file of the export was written in {NO_FILE_S:g} s: a process, a node or the storage stands still"
                raise RunLost(what, "See `ray status` and `ray list tasks`, and repeat the command.")
            (done,) = ended
            ray.get(done)
            on_bytes(running.pop(done).num_bytes)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        what = f"a process that wrote a file of the export died, or its node is gone ({first_line(error)})"
        raise ResourceError(what, "Lower resources.num_workers or export.shard_size, and repeat the command.") from error
    finally:
        if running:  # not by ray.cancel: Ray 2.60 aborts this process where a task that it cancelled begins in the same moment
            with suppress(OSError):
                (folder / GIVEN_UP).touch()
            ray.wait(list(running), num_returns=len(running), timeout=ENDS_WITHIN_S)
    for left in folder.glob(f"*{PARTIAL}"):  # of a process that died
        left.unlink()
    write_index(folder, shards)


def _write(source: Source, facts: Sequence[TensorFact], path: Path) -> None:
    """Write a file under another name, and rename it once it is complete: a process that was given up may still be writing."""
    adapters = [*source.under, *(adapter for adapter, _ in source.adapters)]
    folders = [source.folder, path.parent, *(Path(adapter.folder) for adapter in adapters)]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        what = f"{missing[0]} is not on {os.uname().nodename}, a node of the cluster"
        raise ResourceError(what, "Name folders on storage that all nodes share.")
    dtypes = {fact.name: fact.dtype for fact in facts}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")

    def tensor(name: str) -> Tensor:
        if (path.parent / GIVEN_UP).exists():
            raise ResourceError("the export was given up", "The reason is that of the task which failed first.")
        return source.tensor(name, dtypes[name])

    try:
        write_file(partial, facts, tensor, lambda num_bytes: None)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
