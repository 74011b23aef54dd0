"""Memory of preparing 1,000,000 generated chat rows through Ray, all processes together.

scripts/bench memory [--rows 1000000] [--resources local]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prepare import memory_mib

WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his"]


def write_rows(path: Path, num_rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            asked, answer = (" ".join(draw.choices(WORDS, k=draw.randint(4, 40))) for _ in range(2))
            row = {"messages": [{"role": "user", "content": f"{number}: {asked}"}, {"role": "assistant", "content": answer}]}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--resources", default="local", choices=["inline", "local"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, asked.rows)
        settings = ["model=smollm2_135m", f"data.path={path}", f"data.cache={folder}/stores", f"resources={asked.resources}"]
        started, peak_mib = time.perf_counter(), 0.0
        process = subprocess.Popen([sys.executable, "-m", "raytune_llm", "prepare", *settings], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak_mib = max(peak_mib, memory_mib(process.pid))
            time.sleep(1)
        if process.returncode:
            raise SystemExit(process.returncode)
        wall_s = time.perf_counter() - started
    print(json.dumps({"rows": asked.rows, "peak_mib": round(peak_mib), "wall_s": round(wall_s, 1)}))


if __name__ == "__main__":
    main()
