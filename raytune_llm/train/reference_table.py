"""Log-probabilities of answers under the reference, computed once by a run's own workers and kept beside the token store.

The table stands under a key of all that decides its numbers, and later runs read it by row. Some rows are computed again then.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raytune_llm import packaged
from raytune_llm.config.run import TrainRun
from raytune_llm.config.section import settings_of
from raytune_llm.config.stage import DPO, KTO
from raytune_llm.data.batches import to_device
from raytune_llm.data.loader import Samples
from raytune_llm.data.store import write_whole
from raytune_llm.errors import DataError
from raytune_llm.records import Batch
from raytune_llm.stages import AnswerLogprobs

VERSION = 1
CHECKED_ROWS = 10
MANIFEST, KEYS, VALUES = "manifest.json", "keys.npy", "values.npy"
TOLERANCE = {torch.float32: (0.02, 1e-4), torch.bfloat16: (1.0, 0.02), torch.float16: (0.5, 0.01)}
"""By what products are computed in: nats, and the part of the value, by which a row may differ when it is computed again."""
Told = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True)
class Table:
    """Reference log-probabilities by row (and by the row whose answer is the mismatched one, where there is one)."""

    keys_E: np.ndarray
    """int64, ascending: see `keys_of`."""
    values_E2: np.ndarray
    """float32, memory-mapped."""
    num_rows: int
    """Of the store."""

    def attach(self, batch: Any) -> Any:
        places_P = np.searchsorted(self.keys_E, keys_of(batch, self.num_rows))
        reference_P2 = torch.from_numpy(np.array(self.values_E2[places_P]))
        return replace(batch, per_answer={**batch.per_answer, "reference": reference_P2})


def keys_of(batch: Batch, num_rows: int) -> np.ndarray:
    """int64 [P]: a number for each row and its partner."""
    rows = np.array(batch.rows, np.int64)
    return rows * num_rows + np.array(batch.partners or batch.rows, np.int64)


# What decides the numbers ---------------------------------------------------------------------------------------------


def key_of(
    run: TrainRun, logps: AnswerLogprobs, samples: Sequence[Samples], manifest_hash: str, compute: torch.dtype
) -> dict[str, Any]:
    """As a JSON object."""
    assert isinstance(logps, partial)
    assert isinstance(run.stage, DPO | KTO)
    other = run.stage.reference_model is not None or run.stage.reference_adapter is not None
    adapter = run.stage.reference_adapter if other else run.adapter.path
    model = run.stage.reference_model or run.model.path
    seed = run.train.seed if run.model.weights == "random" and run.stage.reference_model is None else None
    return {
        "version": VERSION,
        "model": [
            model and _files(packaged.resolve(model)),
            run.model.config,
            run.model.revision,
            seed,
        ],
        "adapter": adapter and _files(adapter, content=True),
        "computed": [str(compute), run.quantization.name, *settings_of(run.quantization).values()],
        "formula": [logps.func.__name__, logps.keywords],
        "data": [manifest_hash, run.data.max_length, [_rows(one) for one in samples]],
    }


def _files(path: str, *, content: bool = False) -> Any:
    """What is in a model's folder; of weights by size and time, or by content. A hub id stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    weights = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))
    files = [*weights, *folder.glob("*config.json")]
    if content:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _rows(samples: Samples) -> Any:
    """None where all rows are computed. What a row's partner is depends on the rows and their order."""
    return (
        None if not samples.store.kind.has_partners else hashlib.sha256(np.asarray(samples.rows, np.int64).tobytes()).hexdigest()
    )


def precomputed(
    model: nn.Module,
    logps: AnswerLogprobs,
    samples: Sequence[Samples],
    folder: Path,
    key: Mapping[str, Any],
    *,
    micro_batch_size: int,
    pad_id: int,
    device: torch.device,
    compute: torch.dtype,
    tell: Told,
) -> tuple[Table, str]:
    """The table of these samples' rows, and where it is from. All workers call it together."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    target = folder / f"reference-{digest}"
    found = [(target / MANIFEST).exists(), secrets.randbits(32)]
    if world > 1:
        dist.broadcast_object_list(found)  # another run may finish it in between
    there, drawn = found
    num_rows = len(samples[0].store)
    run_pass = partial(_pass, model, logps, micro_batch_size=micro_batch_size, pad_id=pad_id, device=device)
    if there:
        table = Table(np.load(target / KEYS, mmap_mode="r"), np.load(target / VALUES, mmap_mode="r"), num_rows)
        some = _some_rows(samples[0], drawn)
        _compare(table, *run_pass([(samples[0], some)], 0, 1, tell=lambda done, total: None), target, TOLERANCE[compute])
        return table, f"read from {target}"
    parts: list[Any] = [run_pass([(one, np.arange(len(one))) for one in samples], rank, world, tell=tell)]
    if world > 1:
        mine = parts[0]
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    keys_E, first = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
    table = Table(keys_E, np.concatenate([values for _, values in parts])[first], num_rows)
    if rank == 0:
        _write(table, target, key)
    return table, f"computed, and kept in {target}"


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
    tell: Told,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of this worker's share. Every worker calls the model as often."""
    was_training = model.training
    model.eval()
    keys: list[np.ndarray] = []
    values: list[torch.Tensor] = []
    done, total = 0, sum(int(samples.num_rows[numbers].sum()) for samples, numbers in shares)
    tell(0, total)
    for samples, numbers in shares:
        for at in range(0, len(numbers), micro_batch_size * world):
            mine = numbers[at + rank * micro_batch_size :][:micro_batch_size]
            batch: Any = samples.batch(mine, micro_batch_size=micro_batch_size, pad_id=pad_id)
            keys.append(keys_of(batch, len(samples.store)))
            values.append(logps(model, to_device(batch, device)).float())
            done += int(samples.num_rows[numbers[at : at + micro_batch_size * world]].sum())
            tell(done, total)
    model.train(was_training)
    return np.concatenate(keys), torch.cat(values).cpu().numpy()


def _some_rows(samples: Samples, seed: int) -> np.ndarray:
    """Random samples that hold as many rows as are checked."""
    numbers = np.random.default_rng(seed).permutation(len(samples))
    return numbers[: int(np.searchsorted(np.cumsum(samples.num_rows[numbers]), CHECKED_ROWS)) + 1]


def _compare(table: Table, keys: np.ndarray, values: np.ndarray, folder: Path, tolerance: tuple[float, float]) -> None:
    stored = table.values_E2[np.searchsorted(table.keys_E, keys)]
    nats, part = tolerance
    wrong = np.flatnonzero((np.abs(stored - values) > nats + part * np.abs(values)).any(1))
    if len(wrong):
        at = wrong[0]
        raise DataError(
            str(folder),
            f"holds other reference log-probabilities than this run computes: {len(wrong)} of {len(keys)} rows differ, row "
            f"{keys[at] // table.num_rows + 1} has {stored[at].tolist()} there and {values[at].tolist()} now, though model, "
            "adapter, data and formula are the same by name",
            "The weights must have changed under their name, or the file is broken: delete the folder, and it is computed again.",
        )


def _write(table: Table, target: Path, key: Mapping[str, Any]) -> None:
    """Beside, then renamed. Where another run was first, its table stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        np.save(beside / KEYS, table.keys_E)
        np.save(beside / VALUES, table.values_E2)
        write_whole(beside / MANIFEST, json.dumps(key, indent=1, sort_keys=True))
        beside.rename(target)
    except OSError:
        if not (target / MANIFEST).exists():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
