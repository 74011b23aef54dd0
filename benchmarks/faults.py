"""What a fault costs: seconds from it to the next trained step, and steps that are repeated.

    scripts/bench faults [--runs 3] [--faults worker node ...] [--kept FILE] [--limit-s 1100]

A cluster of two nodes of one CPU on this machine (processes of their own, one kernel) trains a tiny run with two workers over
gloo, and a checkpoint every five steps. Each fault is made once in the middle of a run. One measurement takes about a minute on
two cores, and measurements go in rounds over the faults; with --kept the same command continues where it was ended:

    worker      SIGKILL to a worker
    frozen      SIGSTOP to a worker; resources.collective_timeout_s=10 is part of the time
    node        SIGKILL to all processes of a node, while another one joins
    shrink      as node, but none joins: an elastic run (resources.num_workers=[1,2]) resumes with one worker
    grow        a node joins an elastic run of one worker; counted from when the node is there
    driver      SIGKILL to the driver, and the same command at once

Prints JSON: of each the median seconds to the next step, the steps repeated, and how often it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks._rounds import add_arguments, measured
from benchmarks._rows import write_sums

FAULTS = ("worker", "frozen", "node", "shrink", "grow", "driver")
FAULT_AT = 12
"""The fault comes once so many steps are done."""
TRAIN = """
import json, sys, time
from raytune_llm import api, load_config
from raytune_llm.report.updates import EndOfRun, RunStarted

def say(**event):
    print(json.dumps({**event, "time": time.time()}), flush=True)

def update(news):
    if isinstance(news, RunStarted):
        say(started=news.first_step)

api.train(load_config("train", sys.argv[1:]), sinks=[lambda record: say(step=record["step"])], on_update=update)
"""


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A head without CPUs, and nodes with one."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            found.add_node(num_cpus=1)
        yield found
    finally:
        found.shutdown()


class Driver:
    """A training command, and what it says."""

    def __init__(self, settings: list[str], errors: Path) -> None:
        self._errors = errors
        with errors.open("w") as file:
            command = [sys.executable, "-c", TRAIN, *settings]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)

    def events(self) -> Iterator[dict[str, float]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        code = self.process.wait()
        raise AssertionError(f"the run ended with code {code} before its fault was over: {self._errors.read_text()[-2000:]}")

    def end(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.kill()
        self.process.kill()
        self.process.wait()


def workers() -> list[psutil.Process]:
    """Training workers of this machine, the oldest first."""
    found = [process for process in psutil.process_iter(["cmdline"]) if "TrainWorker" in " ".join(process.info["cmdline"] or [])]
    return sorted(found, key=lambda process: process.create_time())


def measure(fault: str, folder: Path) -> dict[str, float]:
    elastic = fault in ("shrink", "grow")
    with cluster(1 if fault == "grow" else 2) as nodes:
        settings = [
            "model=tiny_random", "data=chat", f"data.path={folder}/rows.jsonl", f"data.cache={folder}/tokens", "tracking=none",
            f"output_dir={folder}/{fault}-{time.time_ns()}", "resources=cluster", f"resources.address={nodes.address}",
            f"resources.num_workers={'[1,2]' if elastic else 2}", "resources.preflight=off", "train.precision=fp32",
            f"resources.collective_timeout_s={10 if fault == 'frozen' else 300}", "train.global_batch_size=16",
            "train.micro_batch_size=1", "train.max_steps=100000", "train.epochs=100000", "train.log_every_steps=1",
            "checkpoint.every_steps=5", "data.max_length=256",
        ]  # fmt: skip
        drivers: list[Driver] = []
        try:
            return _measured(fault, drivers, nodes, settings, folder / "errors.txt")
        finally:
            for driver in drivers:
                if driver.process.poll() is None:
                    driver.end()


def _measured(fault: str, drivers: list[Driver], nodes: Any, settings: list[str], errors: Path) -> dict[str, float]:
    drivers.append(Driver(settings, errors))
    step, events = 0.0, drivers[0].events()
    while step < FAULT_AT:
        step = next(events).get("step", step)
    worker = nodes.list_all_nodes()[-1]
    does: dict[str, Callable[[], object]] = {
        "worker": lambda: workers()[-1].kill(),
        "frozen": lambda: workers()[-1].send_signal(signal.SIGSTOP),
        "node": lambda: (nodes.remove_node(worker, allow_graceful=False), nodes.add_node(num_cpus=1)),
        "shrink": lambda: nodes.remove_node(worker, allow_graceful=False),
        "grow": lambda: nodes.add_node(num_cpus=1),
        "driver": lambda: drivers[0].process.kill(),
    }
    at = time.time()
    does[fault]()
    if fault == "grow":
        at = time.time()
    if fault == "driver":
        drivers[0].process.wait()
        drivers.append(Driver(settings, errors))
        events = drivers[1].events()
    first = None
    while True:
        event = next(events)
        if first is None:
            step = event.get("step", step)
            first = event.get("started")
        elif "step" in event:
            return {"to_next_step_s": event["time"] - at, "steps_repeated": step - first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=3)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        write_sums(folder / "rows.jsonl")
        results = measured({fault: partial(measure, fault, folder) for fault in asked.faults}, asked)
    print(json.dumps(results | {"cpus": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}, indent=2))


if __name__ == "__main__":
    main()
