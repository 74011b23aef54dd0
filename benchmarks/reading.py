"""From the store to a batch: microseconds to read a random pack, and the memory that the loader adds.

    python benchmarks/reading.py [--rows 200000]

Prints JSON. A pack is max_length tokens of rows as long as chat rows are (log-normal, mean 400).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from raytune_llm.data import store as token_store
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import Store

MAX_LENGTH = 1024
ROWS_PER_SHARD = 20_000


def make_store(folder: Path, num_rows: int) -> Store:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.67, 0.8, num_rows), 8, MAX_LENGTH).astype(int)
    with token_store.under_construction(folder, "key") as building:
        assert building is not None
        shards = []
        for start in range(0, num_rows, ROWS_PER_SHARD):
            rows = [
                ConversationRow(random.integers(0, 49_000, length, dtype=np.int32), np.array([length // 2, length]))  # type: ignore[arg-type]
                for length in lengths[start : start + ROWS_PER_SHARD]
            ]
            name = token_store.shard_name(len(shards))
            shards.append(token_store.write_shard(building / name, rows, Dropped(), kind=KINDS["conversations"]))
        token_store.complete(building, shards, {"benchmark": num_rows}, folder / "key", kind="conversations")
    return Store.open(folder / "key")


def microseconds(run, arguments) -> float:
    """The median over the arguments."""
    times = []
    for argument in arguments:
        started = time.perf_counter()
        run(argument)
        times.append(time.perf_counter() - started)
    return round(float(np.median(times)) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    num_rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), num_rows)
        before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.perf_counter()
        samples = Samples(store, np.arange(len(store)), max_length=MAX_LENGTH, packing=True)
        plan_s = time.perf_counter() - started
        random = np.random.default_rng(1)
        packs = random.integers(0, len(samples), 5000)
        results = {
            "rows": num_rows,
            "packs": len(samples),
            "fill": round(samples.tokens.sum() / (len(samples) * MAX_LENGTH), 4),
            "plan_s": round(plan_s, 2),
            "row_us": microseconds(store.row, random.integers(0, num_rows, 5000).tolist()),
            "pack_us": microseconds(samples.__getitem__, packs.tolist()),
            "batch_us": microseconds(lambda pack: samples.batch(pack, micro_batch_size=1, pad_id=0), packs[:, None]),
        }
        loader = Loader(samples, micro_batch_size=4, global_batch_size=8, rank=0, world_size=1, seed=0, pad_id=0)
        started, tokens = time.perf_counter(), 0
        for step in loader.epoch(0):
            tokens += step.tokens
        results["loader_tokens_per_s"] = round(tokens / (time.perf_counter() - started))
        results["planning_adds_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib, 1)
        print(json.dumps(results | {"load_average": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main()
