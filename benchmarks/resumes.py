"""Does a run that is killed again and again end as one that never was? Kills at random moments, seeded, by SIGKILL.

    scripts/bench resumes [--kills 1000] [--seed 0]

A process that has imported everything forks one that trains a tiny run (8 steps, a checkpoint a step), kills it after a random
time, and forks the next, which resumes, until the run is complete; then the next run begins, until there were so many kills.
Prints JSON: how many runs ended with the weights and the records of an undisturbed run, and what the kills met.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import matplotlib.figure  # noqa: F401  # what a forked process would import each time, as below

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs import launch, output, remote_output, together  # noqa: F401
from raytune_llm.train import remote_checkpoints  # noqa: F401

MACHINE = {"tokens_per_s", "mfu", "memory_gib"}
STEPS = 8


def run_of(rows: Path, folder: Path, name: str) -> TrainRun:
    settings = [f"data.path={rows}", f"data.cache={folder}/tokens", f"output_dir={folder}/{name}", f"train.max_steps={STEPS}"]
    settings += ["model=tiny_random", "data=chat", "resources=inline", "tracking=none", "train.precision=fp32", "train.epochs=9"]
    settings += ["train.log_every_steps=1", "train.global_batch_size=4", "train.micro_batch_size=2", "data.max_length=64"]
    return load_config("train", [*settings, "checkpoint.every_steps=1", "optimizer.lr=1e-2"])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, found, kills, runs, equal = random.Random(asked.seed), Counter(), 0, 0, 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="resumes-") as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        texts = (
            {"messages": [{"role": "user", "content": f"What is {n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
            for n in range(40)
        )
        rows.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
        trained(run_of(rows, folder, "first"), None)  # makes the token store
        at = time.monotonic()
        trained(run_of(rows, folder, "undisturbed"), None)
        lasts, expected = time.monotonic() - at, end_of(folder / "undisturbed")
        while kills < asked.kills:
            run = run_of(rows, folder, f"run-{runs}")
            while not trained(run, draw.uniform(0.05, 1.0) * lasts if kills < asked.kills else None):
                kills += 1
                found[met(Path(run.output_dir))] += 1
            runs += 1
            equal += end_of(Path(run.output_dir)) == expected
            print(f"\r{kills} kills, {runs} runs, {equal} as undisturbed", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    took = time.monotonic() - began
    print(
        json.dumps(
            {
                "kills": kills,
                "runs": runs,
                "equal": equal,
                "kills_met": dict(found),
                "undisturbed_s": round(lasts, 2),
                "minutes": round(took / 60, 1),
                "load_average": round(os.getloadavg()[0], 1),
            },
            indent=2,
        )
    )
    sys.exit(0 if equal == runs else 1)


if __name__ == "__main__":
    main()
