"""What the driver, the data and the checkpoints of a large run cost: unit costs, measured here, and what follows for many GPUs.

    scripts/bench scale [--workers 200] [--seconds 15] [--rows 500000] [--shards 1000]

Workers are pretended by four processes, which send what so many workers send, through the code of a run: its inbox, the
heartbeats of `runs/faults.py`, records of a real run, and the driver's end of it (`runs/channel.py`). Stores, index and stream
are those of `data/`. Checkpoints are saved by `train/checkpoint.py` in 1, 2 and 4 processes: small
ones, with as many tensors as an 8B model's, on which coordination depends.

Prints JSON: `costs`, and `at`, the figures of a run by the number of its GPUs, which `run_on` computes from the costs and from
what is `assumed`: 8B parameters, all trained under FSDP in packs of 8,192 tokens, at the rate of a GPU in
benchmarks/results/gpu-2x-nvidia-h200-2026-11-28.json, on 10^12 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks._rows import write_sums
from raytune_llm import api, load_config
from raytune_llm.data import store as token_store
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import Store
from raytune_llm.data.streaming import Stream
from raytune_llm.report.metrics import JsonLines, read_metrics
from raytune_llm.train.checkpoint_writer import PART_BYTES, PARTS

PLACES = 4
"""Processes that stand for the workers."""
BEAT_S = 0.5
"""Heartbeats are faster than a run's, so that there is something to measure."""
GPUS = (8, 128, 1024)
ASSUMED = {
    "tokens": 1e12,
    "tokens_per_s_of_a_gpu": 9583.0,
    "pack_tokens": 8192,
    "micro_batches_per_step": 1,
    "log_every_steps": 10,
    "gpus_of_a_node": 8,
    "row_tokens": 205,
    "parameters": 8.03e9,
    "bytes_of_a_parameter": 12,
    "disk_bytes_per_s_of_a_node": 1.7e9,
    "controller_polls_every_s": 2.0,
    "beats_every_s": 5.0,
    "inbox_read_every_s": 0.2,
}
TENSORS = 291 * 3
"""Of an 8B Llama: its parameters, and two moments of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--shards", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        costs = {
            **records(folder),
            **index(folder, asked.rows),
            **shards(folder, asked.shards),
            **hashing(folder),
            **checkpoints(folder),
            **control(folder, asked.workers, asked.seconds),
        }
    at = {str(gpus): {name: figure(value) for name, value in run_on(gpus, costs).items()} for gpus in GPUS}
    rounded = {name: figure(value) for name, value in costs.items()}
    loaded = round(os.getloadavg()[0], 1)
    print(
        json.dumps({"workers": asked.workers, "costs": rounded, "assumed": ASSUMED, "at": at, "load_average": loaded}, indent=2)
    )


def figure(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


# The figures of a run ---------------------------------------------------------------------------------------------------


def run_on(gpus: int, costs: dict[str, float]) -> dict[str, float]:
    """By arithmetic."""
    nodes = gpus / ASSUMED["gpus_of_a_node"]
    rate = gpus * ASSUMED["tokens_per_s_of_a_gpu"]
    step_tokens = gpus * ASSUMED["pack_tokens"] * ASSUMED["micro_batches_per_step"]
    step_s = step_tokens / rate
    steps = ASSUMED["tokens"] / step_tokens
    beats, reads = gpus / ASSUMED["beats_every_s"], 1 / ASSUMED["inbox_read_every_s"]
    records, polls = 1 / (step_s * ASSUMED["log_every_steps"]), gpus / ASSUMED["controller_polls_every_s"]
    driver_us = (
        reads * (costs["inbox_read_us"] + gpus * costs["inbox_read_of_a_worker_us"])
        + records * costs["record_us"]
        + polls * costs["controller_poll_us"]
    )
    rows, store_bytes = ASSUMED["tokens"] / ASSUMED["row_tokens"], ASSUMED["tokens"] * costs["bytes_of_a_token"]
    num_shards = store_bytes / costs["shard_bytes"]
    state = ASSUMED["parameters"] * ASSUMED["bytes_of_a_parameter"]
    written_s = state / (nodes * ASSUMED["disk_bytes_per_s_of_a_node"])
    hashed_s = state / gpus / costs["hashed_bytes_per_s"]
    coordinated_s = costs["checkpoint_rank_0_s"] + gpus * costs["checkpoint_rank_0_of_a_worker_s"]
    return {
        "days": ASSUMED["tokens"] / rate / 86400,
        "step_seconds": step_s,
        "beats_a_second": beats,
        "records_a_second": records,
        "controller_polls_a_second": polls,
        "inbox_cpu_fraction": beats * costs["beat_us"] / 1e6,
        "driver_cpu_fraction": driver_us / 1e6,
        "log_bytes_a_day": 86400 * records * costs["record_bytes"],
        "log_bytes_in_all": steps / ASSUMED["log_every_steps"] * costs["record_bytes"],
        "log_read_at_a_resume_at_the_end_seconds": steps / ASSUMED["log_every_steps"] * costs["resumed_record_us"] / 1e6,
        "data_bytes_a_second_of_a_node": rate / nodes * costs["bytes_of_a_token"],
        "data_bytes_a_second_in_all": rate * costs["bytes_of_a_token"],
        "store_bytes": store_bytes,
        "shards": num_shards,
        "index_bytes_of_a_worker": rows * costs["index_bytes_of_a_row"],
        "index_bytes_of_a_node": rows * costs["index_bytes_of_a_row"] * ASSUMED["gpus_of_a_node"],
        "index_seconds": rows * costs["index_us_of_a_row"] / 1e6,
        "stream_index_bytes_of_a_worker": costs["stream_bytes"],
        "stream_packing_seconds": rows * costs["stream_us_of_a_row"] / 1e6,
        "open_seconds": num_shards * costs["open_us_of_a_shard"] / 1e6,
        "memory_maps": num_shards * costs["maps_of_a_shard"],
        "checkpoint_bytes": state,
        "checkpoint_files": gpus * max(1, min(PARTS, int(state / gpus) // PART_BYTES)) + 3,
        "checkpoint_metadata_bytes": costs["metadata_bytes"] + gpus * costs["metadata_bytes_of_a_worker"],
        "checkpoint_write_seconds": written_s,
        "checkpoint_hash_seconds": hashed_s,
        "checkpoint_coordination_seconds": coordinated_s,
        "resume_hash_by_one_core_seconds": state / costs["hashed_bytes_per_s"],
        "start_bytes_from_the_driver": gpus * costs["settings_bytes"],
        "start_weight_bytes_read_of_a_node": 2 * ASSUMED["parameters"] / nodes,
    }


# Records and settings ---------------------------------------------------------------------------------------------------


def records(folder: Path) -> dict[str, float]:
    """Of a real run: the bytes of a record, what a worker is sent at the start, and what a record costs at a resume."""
    import ray.cloudpickle

    write_sums(folder / "rows.jsonl")
    words = ["model=tiny_random", "data=chat", f"data.path={folder}/rows.jsonl", f"data.cache={folder}/tokens", "tracking=none"]
    words += ["resources=inline", f"output_dir={folder}/run", "train.max_steps=20", "train.log_every_steps=1"]
    run = load_config("train", words)
    api.train(run)
    found = [record for record in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in record]
    sizes = [len(json.dumps(record)) + 1 for record in found]
    path, number = folder / "long.jsonl", 100_000
    with path.open("w") as file:
        file.writelines(json.dumps({**found[-1], "step": step}) + "\n" for step in range(1, number + 1))
    began = time.perf_counter()
    JsonLines(path, from_step=number).close()
    seconds = time.perf_counter() - began
    settings = {"run": run, "stores": (words[3], None), "inbox": None, "yields": True, "threads": 1}
    return {
        "record_bytes": statistics.mean(sizes),
        "resumed_record_us": seconds / number * 1e6,
        "settings_bytes": len(ray.cloudpickle.dumps(settings)),
    }


# Data -------------------------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, rows_of_a_shard: int, number: int) -> Path:
    """A store of conversations of `row_tokens` tokens on average, of many lengths."""
    draw = np.random.default_rng(0)
    kind, spread = KINDS["conversations"], 0.9
    mean = np.log(ASSUMED["row_tokens"]) - spread**2 / 2
    lengths = np.clip(draw.lognormal(mean, spread, rows_of_a_shard), 2, ASSUMED["pack_tokens"]).astype(int).tolist()
    rows = [ConversationRow(draw.integers(0, 9999, length), [length // 2, length]) for length in lengths]
    with token_store.under_construction(folder, name) as place:
        assert place is not None
        made = [token_store.write_shard(place / token_store.shard_name(at), rows, Dropped(), kind=kind) for at in range(number)]
        token_store.complete(place, made, {"name": name}, folder / name, kind="conversations")
    return folder / name


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes that were allocated in the block and are in use."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    yield lambda: tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()


def index(folder: Path, rows: int) -> dict[str, float]:
    """Bytes of a token on disk, and memory and time of the plan of an epoch: of the whole store, and of a stream's window."""
    number = 20
    place = written(folder, "index", rows // number, number)
    shard = place / token_store.shard_name(0)
    packed = partial(Samples, max_length=int(ASSUMED["pack_tokens"]), packing=True)
    store = Store.open(place)
    tokens = store.num_tokens / number
    began = time.perf_counter()
    packed(store, np.arange(len(store)))
    seconds = time.perf_counter() - began
    with traced() as used:
        kept = packed(Store.open(place), np.arange(len(store)))
        index_bytes = used()
    del kept
    stream = Stream(place, window_rows=16_384, samples=packed)
    began = time.perf_counter()
    for _ in stream.ordered(0, 0, 8, threading.Event()):
        pass
    stream_seconds = time.perf_counter() - began
    with traced() as used:
        parts = stream.ordered(0, 0, 8, threading.Event())
        held = next(parts)
        stream_bytes = used()
    del held, parts
    return {
        "bytes_of_a_token": shard.stat().st_size / tokens,
        "shard_bytes": shard_bytes(),
        "index_bytes_of_a_row": index_bytes / len(store),
        "index_us_of_a_row": seconds / len(store) * 1e6,
        "stream_bytes": stream_bytes,
        "stream_us_of_a_row": stream_seconds / len(store) * 1e6,
    }


def shard_bytes() -> float:
    """Of the largest shards of a store of so many tokens, at the bytes of English text that a token has."""
    from raytune_llm.data.readers.sources import chunk_bytes_of

    text_bytes_of_a_token, bytes_of_a_token = 4.4, 4.0
    return chunk_bytes_of(int(ASSUMED["tokens"] * text_bytes_of_a_token)) / text_bytes_of_a_token * bytes_of_a_token


def shards(folder: Path, number: int) -> dict[str, float]:
    """What one more shard costs a process that opens the store."""
    place = written(folder, "shards", 4, number)
    process = psutil.Process()
    maps, files = len(Path("/proc/self/maps").read_text().splitlines()), process.num_fds()
    began = time.perf_counter()
    store = Store.open(place)
    seconds = time.perf_counter() - began
    more_maps, more_files = len(Path("/proc/self/maps").read_text().splitlines()) - maps, process.num_fds() - files
    assert len(store.shards) == number
    return {
        "open_us_of_a_shard": seconds / number * 1e6,
        "maps_of_a_shard": more_maps / number,
        "open_files_of_a_shard": more_files / number,
        "manifest_bytes_of_a_shard": (place / token_store.MANIFEST).stat().st_size / number,
    }


# Checkpoints ------------------------------------------------------------------------------------------------------------


def hashing(folder: Path) -> dict[str, float]:
    from raytune_llm.train.checkpoint_files import digest

    path, size = folder / "large", 2**28
    path.write_bytes(os.urandom(2**20) * (size // 2**20))
    took = []
    for _ in range(3):
        began = time.perf_counter()
        digest(path)
        took.append(time.perf_counter() - began)
    path.unlink()
    return {"hashed_bytes_per_s": size / statistics.median(took)}


def checkpoints(folder: Path) -> dict[str, float]:
    """Files and coordination by the number of workers; both grow with it, and the slope is taken."""
    worlds = (1, 2, 4)
    found = [saved_by(world, folder / f"world-{world}") for world in worlds]
    cpu, metadata = (np.polyfit(worlds, [one[name] for one in found], 1) for name in ("rank_0_cpu_s", "metadata_bytes"))
    assert [one["state_files"] for one in found] == [world + 1 for world in worlds], "a file of each worker, and .metadata"
    return {
        "checkpoint_rank_0_s": max(0.0, cpu[1]),
        "checkpoint_rank_0_of_a_worker_s": cpu[0],
        "metadata_bytes": max(0.0, metadata[1]),
        "metadata_bytes_of_a_worker": metadata[0],
    }


def saved_by(world: int, folder: Path) -> dict[str, float]:
    import torch.multiprocessing as mp

    folder.mkdir()
    mp.start_processes(_save, (world, str(folder)), nprocs=world, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]
    return json.loads((folder / "result.json").read_text())


def _save(rank: int, world: int, folder: str) -> None:
    """The median processor time of rank 0 for a save, by one worker of several."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from raytune_llm.train.checkpoint import Checkpoints
    from raytune_llm.train.checkpoint_files import METADATA
    from raytune_llm.train.progress import Progress

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, torch.Tensor] = {
        f"tensor.{number}": distribute_tensor(torch.zeros(8 * 16), mesh, [Shard(0)]) for number in range(TENSORS)
    }
    checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1, asynchronous=False)
    took = []
    for step in range(1, 6):
        dist.barrier()
        began = time.process_time()
        checkpoints.save(state, Progress(step=step), {})
        took.append(time.process_time() - began)
    if rank == 0:
        written = list((Path(folder) / "checkpoints" / "step-5" / "state").iterdir())
        result = {
            "rank_0_cpu_s": statistics.median(took[1:]),
            "state_files": len(written),
            "metadata_bytes": next(file for file in written if file.name == METADATA).stat().st_size,
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    checkpoints.close()
    dist.destroy_process_group()


# Control ----------------------------------------------------------------------------------------------------------------


class Place:
    """A process that stands for some workers. An actor."""

    def __init__(self, inbox: Any, ranks: Sequence[int]) -> None:
        from raytune_llm.runs.faults import Heartbeat

        self._inbox, self._ranks, self._made = inbox, ranks, Heartbeat
        self._beats: dict[int, int] = dict.fromkeys(ranks, 0)
        self._heartbeats: list[Any] = []
        self._ended = threading.Event()

    def join(self) -> None:
        import ray

        ray.get([self._inbox.join.remote(rank, f"10.0.{rank // 256}.{rank % 256}") for rank in self._ranks])

    def beat(self) -> None:
        """Send heartbeats until `end`."""
        self._heartbeats = [self._made(rank, 4 * BEAT_S, self._one_beat, self._inbox.put.remote) for rank in self._ranks]
        threading.Thread(target=self._step, daemon=True).start()

    def _one_beat(self, rank: int) -> None:
        self._beats[rank] += 1
        self._inbox.beat.remote(rank)

    def _step(self) -> None:
        step = 0
        while not self._ended.wait(BEAT_S):
            step += 1
            for heartbeat in self._heartbeats:
                heartbeat.stepped(step)

    def beats(self) -> int:
        return sum(self._beats.values())

    def end(self) -> None:
        self._ended.set()
        for heartbeat in self._heartbeats:
            heartbeat.close()

    def storm(self, number: int) -> None:
        """So many heartbeats at once."""
        import ray

        for _ in range(number):
            self._inbox.beat.remote(self._ranks[0])
        ray.get(self._inbox.beat.remote(self._ranks[0]))

    def status(self) -> Any:
        """What Ray Train's controller asks each worker for."""
        from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

        return WorkerStatus(running=True, error=None, training_report=None)

    def log(self, record: dict[str, Any], number: int, every_s: float) -> None:
        for _ in range(number):
            self._inbox.put.remote(record)
            time.sleep(every_s)


def control(folder: Path, workers: int, seconds: float) -> dict[str, float]:
    """Processor time of the driver and of the inbox, a message."""
    import ray

    from raytune_llm.runs.channel import Channel

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=PLACES, include_dashboard=False, log_to_driver=False, configure_logging=False)
    output = folder / "channel"
    output.mkdir()
    got: list[Any] = []
    channel = Channel(
        output,
        saved_steps=list,
        stall_timeout_s=3600.0,
        sinks=[got.append],
        on_update=got.append,
        on_samples=got.append,
    )
    try:
        of_place = [list(range(first, workers, PLACES)) for first in range(PLACES)]
        places: list[Any] = [ray.remote(num_cpus=1)(Place).remote(channel.inbox, ranks) for ranks in of_place]
        ray.get([place.beats.remote() for place in places])
        inbox = psutil.Process(ray.get(channel.inbox.__ray_call__.remote(lambda inbox: os.getpid())))
        reads = seconds / ASSUMED["inbox_read_every_s"]
        idle_s, _ = during(inbox, lambda: time.sleep(seconds))
        ray.get([place.join.remote() for place in places])
        joined_s, joined_inbox_s = during(inbox, lambda: time.sleep(seconds))

        def beat() -> None:
            ray.get([place.beat.remote() for place in places])
            time.sleep(seconds)

        _, beating_inbox_s = during(inbox, beat)
        beats = sum(ray.get([place.beats.remote() for place in places]))
        ray.get([place.end.remote() for place in places])

        record = {"step": 1, **dict.fromkeys(("epoch", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_gib"), 0.5)}
        number = int(seconds * 50)
        logged_s, _ = during(inbox, lambda: ray.get(places[0].log.remote(record, number, 1 / 50)))
        assert len([one for one in got if one == record]) >= number - 50, "records reach the driver"

        began = time.perf_counter()
        ray.get([place.storm.remote(5000) for place in places])
        storm_s = time.perf_counter() - began

        ray.get([place.status.remote() for place in places])
        rounds = 10
        polled_s, _ = during(
            inbox, lambda: [ray.get([places[rank % PLACES].status.remote() for rank in range(workers)]) for _ in range(rounds)]
        )
    finally:
        channel.close()
        ray.shutdown()
    return {
        "inbox_read_us": idle_s / reads * 1e6,
        "inbox_read_of_a_worker_us": max(0.0, joined_s - idle_s) / reads / workers * 1e6,
        "beat_us": max(0.0, beating_inbox_s - joined_inbox_s) / beats * 1e6,
        "beats_measured": beats,
        "beats_at_most_per_s": PLACES * 5000 / storm_s,
        "record_us": max(0.0, logged_s - joined_s * number / 50 / seconds) / number * 1e6,
        "controller_poll_us": polled_s / rounds / workers * 1e6,
    }


def during(inbox: psutil.Process, does: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of processor time of this process and of the inbox while `does` runs."""
    before, inbox_before = time.process_time(), inbox.cpu_times()
    does()
    after = inbox.cpu_times()
    spent = after.user + after.system - inbox_before.user - inbox_before.system
    return time.process_time() - before, spent


if __name__ == "__main__":
    main()
