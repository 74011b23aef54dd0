"""Several workers of one run without Ray: processes with a gloo group that stay up for many runs."""

from __future__ import annotations

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from raytune_llm.config.run import TrainRun


class Group:
    """`world` processes. `run` trains in all of them and gives each rank's outcome."""

    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.jobs = [context.SimpleQueue() for _ in range(world)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, world, port, self.jobs[rank], self.results), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def run(self, run: TrainRun, store: str, eval_store: str | None = None) -> list[Any]:
        for jobs in self.jobs:
            jobs.put((run, store, eval_store))
        answers = dict(self.results.get(timeout=300) for _ in self.processes)
        for answer in answers.values():
            if isinstance(answer, str):
                raise AssertionError(answer)
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, world: int, port: int, jobs: Any, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from raytune_llm.train.worker import work

    while (job := jobs.get()) is not None:
        run, store, eval_store = job
        try:
            outcome: Any = work(run, store, eval_store, device=torch.device("cpu"))
        except BaseException:
            outcome = traceback.format_exc()
        results.put((rank, outcome))
    torch.distributed.destroy_process_group()


def metrics(output_dir: str) -> list[dict[str, Any]]:
    from raytune_llm.train.report import read_metrics

    return read_metrics(Path(output_dir) / "metrics.jsonl")
