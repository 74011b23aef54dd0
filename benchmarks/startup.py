"""How long a user waits for help and for the answer to a mistyped setting: goal, under 1.5 s each.

    python benchmarks/startup.py [--runs 5]

Prints JSON: the median wall time of the whole command, interpreter included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def median_s(arguments: list[str], exit_code: int, runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "raytune_llm", *arguments], capture_output=True)
        times.append(time.perf_counter() - started)
        assert done.returncode == exit_code, done.stderr.decode()
    return round(statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    results = {
        "help_s": median_s(["--help"], 0, runs),
        "config_error_s": median_s(["optimizer.lrr=1e-4"], 2, runs),
    }
    print(json.dumps(results | {"runs": runs, "load_average": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main()
