"""From the command to the first step of a tiny run, in this process and through Ray.

    scripts/bench start [--runs 5] [--resources inline local]

The first run of each kind, which prepares the rows, is not counted. Prints JSON: the median seconds from the start of the
command to the record of its first step and to its end, and the processor seconds of the command without Ray's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = ["+experiment=sft_full_tiny", "train.max_steps=2", "train.log_every_steps=1", "tracking=none", "log_format=json"]


def first_step_s(resources: str, folder: Path, number: int) -> dict[str, float]:
    settings = [f"resources={resources}", f"output_dir={folder}/{resources}-{number}", f"data.cache={folder}/tokens"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    command = [sys.executable, "-m", "raytune_llm", *RUN, *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event"')]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    step = next(event for event in events if event["event"] == "step" and event["step"] > 0)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"first_step_s": step["time"] - began, "wall_s": time.time() - began, "cpu_s": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--resources", nargs="+", default=["inline", "local"])
    asked = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        for resources in asked.resources:
            runs = [first_step_s(resources, Path(name), number) for number in range(asked.runs + 1)][1:]
            results[resources] = {figure: round(statistics.median(run[figure] for run in runs), 2) for figure in runs[0]}
    about = {"runs": asked.runs, "cpus": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    print(json.dumps(results | about, indent=2))


if __name__ == "__main__":
    main()
