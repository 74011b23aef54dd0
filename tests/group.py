"""Several workers of one run without Ray: processes with a group, gloo's or NCCL's, that stay up for many runs."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from raytune_llm.config.run import TrainRun
from raytune_llm.runs.ray_group import COLLECTIVES
from tests.runs import PowerCut, power_cut_at


class Group:
    """`world` processes, on a GPU each or on the CPU. `run` trains in all of them and gives each rank's outcome."""

    def __init__(self, world: int, device_type: str = "cpu") -> None:
        context = mp.get_context("spawn")
        self.meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # has its port from the start
        self.jobs = [context.SimpleQueue() for _ in range(world)]
        self.results = context.Queue()
        self.processes = [
            context.Process(
                target=_serve, args=(rank, world, self.meeting.port, device_type, self.jobs[rank], self.results), daemon=True
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def run(self, run: TrainRun, store: str, eval_store: str | None = None, *, stop_after: int | None = None) -> list[Any]:
        """stop_after: all workers fall over after that step, before anything is made of it."""
        return self.call(partial(_work, run, store, eval_store, stop_after))

    def call(self, job: Callable[[torch.device], Any]) -> list[Any]:
        """What a function that the workers can import gives on each rank."""
        for jobs in self.jobs:
            jobs.put(job)
        answers: dict[int, Any] = {}
        while len(answers) < len(self.processes):
            rank, answer = self.results.get(timeout=120)
            if isinstance(answer, str):
                self.close()  # the others may wait for this one for ever
                raise AssertionError(answer)
            answers[rank] = answer
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(3)
            process.kill()


def _serve(rank: int, world: int, port: int, device_type: str, jobs: Any, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": device_type,
    }  # fmt: skip
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(COLLECTIVES[device.type], store=TCPStore("127.0.0.1", port), rank=rank, world_size=world)
    while (job := jobs.get()) is not None:
        try:
            outcome: Any = job(device)
        except PowerCut:
            outcome = None
        except BaseException:
            outcome = traceback.format_exc()
        results.put((rank, outcome))
    torch.distributed.destroy_process_group()


def _work(run: TrainRun, store: str, eval_store: str | None, stop_after: int | None, device: torch.device) -> Any:
    from raytune_llm.runs.worker import work

    return work(run, store, eval_store, device=device, on_step=power_cut_at(stop_after))


def metrics(output_dir: str) -> list[dict[str, Any]]:
    from raytune_llm.report.metrics import read_metrics

    return read_metrics(Path(output_dir) / "metrics.jsonl")
