"""Does a run that is killed again and again end as one that never was? Kills at random moments, seeded, by SIGKILL.

    scripts/bench resumes [--runs 1000] [--processes 2] [--seed 0] [--minutes 60]

A process that has imported everything forks one that trains a tiny run (8 steps, a checkpoint a step), kills it after a random
part of the time that an undisturbed run takes, and forks the next, which resumes. Each run is killed at least once, and each next
attempt with a probability of a half. Prints JSON: how many runs ended with the weights and the records of an undisturbed run, and
what the kills met.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import matplotlib.figure  # noqa: F401  # what a forked process would import each time, as below
import torch
import torch._dynamo  # what a forked process would import each time, as the next

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs import launch, output, preflight, remote_output, together  # noqa: F401
from raytune_llm.train import remote_checkpoints  # noqa: F401

MACHINE = {"tokens_per_s", "mfu", "memory_gib"}
STEPS = 8
TIMED_EVERY = 25
"""Runs after which an undisturbed one is timed again: the machine may have become slower, and kills would all come early."""


def write_rows(path: Path) -> None:
    texts = (
        {"messages": [{"role": "user", "content": f"What is {n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
        for n in range(40)
    )
    path.write_text("".join(f"{json.dumps(text)}\n" for text in texts))


def run_of(folder: Path, name: str) -> TrainRun:
    settings = [f"data.path={folder}/rows.jsonl", f"data.cache={folder}/tokens", f"output_dir={folder}/{name}"]
    settings += ["model=tiny_random", "data=chat", "resources=inline", "tracking=none", "train.precision=fp32", "train.epochs=9"]
    settings += ["train.log_every_steps=1", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_length=64"]
    return load_config("train", [*settings, f"train.max_steps={STEPS}", "checkpoint.every_steps=1", "optimizer.lr=1e-2"])


def trained(run: TrainRun, after_s: float | None) -> bool:
    """Train in another process, and kill it after a time. Whether it came to its end before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            api.train(run)
            code = 0
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a run failed with code {os.WEXITSTATUS(status)}, in {run.output_dir}")
    return os.WIFEXITED(status)


def undisturbed(folder: Path, name: str) -> tuple[float, str]:
    """The seconds that a run takes, and a hash of its end."""
    at = time.monotonic()
    trained(run_of(folder, name), None)
    took, end = time.monotonic() - at, end_of(folder / name)
    shutil.rmtree(folder / name)
    return took, end


def end_of(folder: Path) -> str:
    """A hash of the weights and of the records."""
    records = [{key: value for key, value in one.items() if key not in MACHINE} for one in read_metrics(folder / "metrics.jsonl")]
    found = hashlib.sha256(json.dumps(records, sort_keys=True).encode())
    found.update((folder / "final" / "adapter_model.safetensors").read_bytes())
    return found.hexdigest()


def met(folder: Path) -> str:
    """What a kill met."""
    steps = list((folder / "checkpoints").glob("step-*"))
    if any(not (step / "COMPLETE").exists() for step in steps):
        return "while a checkpoint was written"
    if (folder / "checkpoints" / f"step-{STEPS}").exists():
        return "after the last step"
    return "between checkpoints" if steps else "before the first checkpoint"


def killed_until_complete(run: TrainRun, draw: random.Random, lasts: float) -> Counter[str]:
    """Returns what the kills met. An attempt that ended before its kill does not count as killed."""
    found: Counter[str] = Counter()
    kill = True
    while not trained(run, draw.uniform(0.05, 0.95) * lasts if kill else None):
        found[met(Path(run.output_dir))] += 1
        kill = draw.random() < 0.5
    return found


def resumed(numbers: range, seed: int, until: float, results: multiprocessing.Queue[tuple[Counter[str], bool]]) -> None:
    """Kill and resume these runs. Puts what the kills of a run met, and whether it ended as an undisturbed one."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="resumes-") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        preflight.check(run_of(folder, "first"))  # imports what the check of a run does
        trained(run_of(folder, "first"), None)  # makes the token store
        lasts, expected = undisturbed(folder, "undisturbed")
        for turn, number in enumerate(numbers):
            if time.monotonic() > until:
                return
            if turn % TIMED_EVERY == TIMED_EVERY - 1:
                lasts, again = undisturbed(folder, "undisturbed")
                assert again == expected, "two undisturbed runs differ"
            run = run_of(folder, f"run-{number}")
            found = killed_until_complete(run, random.Random(f"{seed}-{number}"), lasts)
            results.put((found, end_of(Path(run.output_dir)) == expected))
            shutil.rmtree(run.output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    asked = parser.parse_args()
    began = time.monotonic()
    until = began + 60 * asked.minutes
    fork = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[Counter[str], bool]] = fork.Queue()
    shares = [range(first, asked.runs, asked.processes) for first in range(asked.processes)]
    processes = [fork.Process(target=resumed, args=(share, asked.seed, until, results)) for share in shares]
    for process in processes:
        process.start()
    found, runs, killed, equal = Counter[str](), 0, 0, 0
    while any(process.is_alive() for process in processes) or not results.empty():
        while not results.empty():
            of_run, same = results.get()
            found += of_run
            runs, killed, equal = runs + 1, killed + bool(of_run), equal + same
            print(f"\r{found.total()} kills, {runs} runs, {equal} as undisturbed", end="", file=sys.stderr, flush=True)
        time.sleep(0.1)
    print(file=sys.stderr)
    print(
        json.dumps(
            {
                "runs": runs,
                "equal": equal,
                "killed_at_least_once": killed,
                "kills": found.total(),
                "kills_met": dict(found),
                "minutes": round((time.monotonic() - began) / 60, 1),
                "load_average": round(os.getloadavg()[0], 1),
            },
            indent=2,
        )
    )
    sys.exit(0 if equal == runs and not any(process.exitcode for process in processes) else 1)


if __name__ == "__main__":
    main()
