"""A table of the answers' log-probabilities under the reference. A run computes it once and keeps it beside the token store.

Its key is a hash of everything that the numbers depend on. Later runs read it by row, after they have computed a few rows again
to compare them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_llm.atomic_file import write_atomically
from raytune_llm.data.batches import to_device
from raytune_llm.data.samples import Samples
from raytune_llm.data.shared_stores import fetch_folder, has_folder, local_folder, place_in, publish_folder
from raytune_llm.data.steps import Step
from raytune_llm.data.store import MANIFEST, locked
from raytune_llm.errors import DataError
from raytune_llm.file_hash import sha256_of
from raytune_llm.object_store import is_address
from raytune_llm.records import Batch
from raytune_llm.stages import AnswerLogprobs

CHECKED_ROWS = 10
KEYS, VALUES = "keys.npy", "values.npy"
FILES = "files"
"""In the manifest: name -> sha256 of both."""
TOLERANCE = {torch.float32: (0.02, 1e-4), torch.bfloat16: (1.0, 0.02), torch.float16: (0.5, 0.01)}
"""Compute dtype -> absolute (in nats) and relative tolerance when a row is computed again."""
OnRows = Callable[[int, int], None]
"""Called with the rows done and the total."""


@dataclass(frozen=True)
class ReferenceTable:
    """Log-probabilities under the reference, by row (and by its partner, if it has one)."""

    keys_E: np.ndarray
    """int64, ascending: see `keys_of`."""
    values_E2: np.ndarray
    """float32, memory-mapped."""
    num_rows: int
    """The number of rows of the token store."""

    def of(self, batch: Batch) -> Tensor:
        """float32 [P, 2], on the CPU."""
        places_P = np.searchsorted(self.keys_E, keys_of(batch, self.num_rows))
        return torch.from_numpy(np.array(self.values_E2[places_P]))


@dataclass(frozen=True)
class ReferenceTables:
    """Adds `reference`: float32 [P, 2]."""

    by_store: Mapping[str, ReferenceTable]
    """Hash of a token store -> the table for its rows."""
    phase = "reference"

    def attach(self, policy: nn.Module, batches: Sequence[Batch], step: Step) -> list[Batch]:
        table = self.by_store[step.store]
        return [
            batch.with_answers({"reference": table.of(batch).to(batch.ids_BT.device, non_blocking=True)}) for batch in batches
        ]

    def state(self) -> None:
        """The tables are files."""

    def load(self, state: None) -> None:
        pass


def keys_of(batch: Batch, num_rows: int) -> np.ndarray:
    """int64 [P]: a number for each row and its partner."""
    rows = np.array(batch.rows, np.int64)
    return rows * num_rows + np.array(batch.partners or batch.rows, np.int64)


def precomputed(
    model: nn.Module,
    logps: AnswerLogprobs,
    samples: Sequence[Samples],
    cache: str,
    key: Mapping[str, Any],
    *,
    micro_batch_size: int,
    pad_id: int,
    device: torch.device,
    compute: torch.dtype,
    on_rows: OnRows,
) -> tuple[ReferenceTable, str]:
    """The table of these samples' rows, and a text that says where it is from. Collective over all workers.

    cache: the folder or address that holds tables. If several runs of one process each want the same table, one computes it and
    the others wait.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    place = place_in(cache, f"reference-{digest}")
    target = local_folder(place)
    waits = world == 1 and not has_folder(place)  # one that is there may be another user's, in a cache that can't be written
    with locked(target.parent, target.name) if waits else nullcontext():
        found = [rank == 0 and has_folder(place), secrets.randbits(32)]
        if world > 1:
            dist.broadcast_object_list(found)  # all follow rank 0, since another run may finish the table in between
        there, drawn = found
        num_rows = len(samples[0].store)
        run_pass = partial(_pass, model, logps, micro_batch_size=micro_batch_size, pad_id=pad_id, device=device)
        if there:
            fetch_folder(place)
            _check_files(target, place)
            table = ReferenceTable(np.load(target / KEYS, mmap_mode="r"), np.load(target / VALUES, mmap_mode="r"), num_rows)
            some = _some_rows(samples[0], drawn)
            _compare(table, *run_pass([(samples[0], some)], 0, 1, on_rows=lambda done, total: None), target, TOLERANCE[compute])
            return table, f"read from {place}"
        parts: list[Any] = [run_pass([(one, np.arange(len(one))) for one in samples], rank, world, on_rows=on_rows)]
        if world > 1:
            mine = parts[0]
            parts = [None] * world
            dist.all_gather_object(parts, mine)
        keys_E, first = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
        table = ReferenceTable(keys_E, np.concatenate([values for _, values in parts])[first], num_rows)
        if rank == 0:
            _write(table, target, key)
            publish_folder(place)
        return table, f"computed, and kept in {place}"


@torch.no_grad()
def _pass(
    model: nn.Module,
    logps: AnswerLogprobs,
    shares: Sequence[tuple[Samples, np.ndarray]],
    rank: int,
    world: int,
    *,
    micro_batch_size: int,
    pad_id: int,
    device: torch.device,
    on_rows: OnRows,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of this worker's share of the samples. All workers call the model equally often."""
    was_training = model.training
    model.eval()
    keys: list[np.ndarray] = []
    values: list[torch.Tensor] = []
    done, total = 0, sum(int(samples.num_rows[numbers].sum()) for samples, numbers in shares)
    on_rows(0, total)
    for samples, numbers in shares:
        for at in range(0, len(numbers), micro_batch_size * world):
            mine = numbers[at + rank * micro_batch_size :][:micro_batch_size]
            batch: Any = samples.batch(mine, micro_batch_size=micro_batch_size, pad_id=pad_id)
            keys.append(keys_of(batch, len(samples.store)))
            values.append(logps(model, to_device(batch, device)).float())
            done += int(samples.num_rows[numbers[at : at + micro_batch_size * world]].sum())
            on_rows(done, total)
    model.train(was_training)
    return np.concatenate(keys), torch.cat(values).cpu().numpy()


def _some_rows(samples: Samples, seed: int) -> np.ndarray:
    """Random samples that hold at least CHECKED_ROWS rows."""
    numbers = np.random.default_rng(seed).permutation(len(samples))
    return numbers[: int(np.searchsorted(np.cumsum(samples.num_rows[numbers]), CHECKED_ROWS)) + 1]


def _check_files(folder: Path, place: str) -> None:
    """Raises DataError if the table's files differ from the hashes in its manifest."""
    fix = f"Delete {place} to compute them again."
    try:
        hashes = json.loads((folder / MANIFEST).read_bytes())[FILES]
        damaged = [name for name in (KEYS, VALUES) if sha256_of(folder / name) != hashes[name]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        damaged = [MANIFEST]
    if damaged:
        fix += f" This machine has a copy in {folder}, which goes with it." if is_address(place) else ""
        raise DataError(f"{place}/{damaged[0]}", "is missing or damaged: reference log-probabilities can't be read", fix)


def _compare(table: ReferenceTable, keys: np.ndarray, values: np.ndarray, folder: Path, tolerance: tuple[float, float]) -> None:
    stored = table.values_E2[np.searchsorted(table.keys_E, keys)]
    nats, part = tolerance
    wrong = np.flatnonzero((np.abs(stored - values) > nats + part * np.abs(values)).any(1))
    if len(wrong):
        at = wrong[0]
        raise DataError(
            str(folder),
            f"holds other reference log-probabilities than this run computes: {len(wrong)} of {len(keys)} rows differ, row "
            f"{keys[at] // table.num_rows + 1} has {stored[at].tolist()} there and {values[at].tolist()} now, although model, "
            "adapter, data and formula have the same names",
            "The weights changed under the same name, or the file is damaged. Delete the folder to compute them again.",
        )


def _write(table: ReferenceTable, target: Path, key: Mapping[str, Any]) -> None:
    """Writes to a temporary folder, then renames it. If another run was first, its table stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    beside.mkdir()  # not tempfile's, whose permissions would keep other users out
    try:
        np.save(beside / KEYS, table.keys_E)
        np.save(beside / VALUES, table.values_E2)
        hashes = {name: sha256_of(beside / name) for name in (KEYS, VALUES)}
        write_atomically(beside / MANIFEST, json.dumps({**key, FILES: hashes}, indent=1, sort_keys=True))
        beside.rename(target)
    except OSError:
        if not (target / MANIFEST).exists():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
