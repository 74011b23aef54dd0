"""Whether fast paths learn what the plain one learns: 200 steps of SmolLM2 on one GPU, each path with three seeds.

    python -m benchmarks curves [--data alpaca_en_demo.json] [--steps 200] [--paths NAME ...]

All runs go side by side, as whole commands. For each path: the held-out loss at the end of each seed, and how far its training
loss is from the plain path's, seed by seed, over windows of 20 steps: the mean and the largest, in percent. What that is to be
compared with is the noise: how far the plain path's own seeds are from their mean.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared/data/alpaca_en_demo.json"
PLAIN = "plain"
PATHS = {
    PLAIN: ["model.attention=sdpa", "train.compile=false"],
    "fast": ["train.compile=true"],
    "fast_full": ["train.compile=true", "train.activation_checkpointing=full"],
    "fp8": ["train.compile=true", "quantization=fp8", "quantization.skip_modules=[]"],
    "fp8_wide": ["train.compile=true", "quantization=fp8"],
    "nf4": ["train.compile=true", "quantization=bnb_nf4"],
}
SEEDS = (0, 1, 2)
WINDOW = 20


def start(path: str, seed: int, data: Path, steps: int, folder: Path) -> subprocess.Popen[bytes]:
    output = folder / f"{path}-{seed}"
    command = [
        sys.executable, "-m", "raytune_llm", "model=smollm2_135m", "data=alpaca", f"data.path={data}", "data.eval_fraction=0.1",
        f"data.cache={output}-store", "data.max_length=1024", "adapter.rank=8", "adapter.alpha=16", "optimizer.lr=5e-4",
        "train.precision=bf16", f"train.seed={seed}", f"train.max_steps={steps}", "train.micro_batch_size=4",
        "train.global_batch_size=4", "train.log_every_steps=1", "resources=inline", "tracking=none", f"output_dir={output}",
        *PATHS[path],
    ]  # fmt: skip
    with open(f"{output}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def losses(output: Path) -> tuple[list[float], float]:
    """Means over windows of the training loss, and the last held-out loss."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained = [record["loss"] for record in records if "loss" in record]
    windows = [mean(trained[first : first + WINDOW]) for first in range(0, len(trained), WINDOW)]
    return windows, [record["eval_loss"] for record in records if "eval_loss" in record][-1]


def distances(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """In percent, window by window of each seed."""
    return [100 * abs(a / b - 1) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]


def summary(windows: dict[str, list[list[float]]], held_out: dict[str, list[float]]) -> dict[str, Any]:
    plain = windows[PLAIN]
    center = [mean(window) for window in zip(*plain, strict=True)]
    noise = distances(plain, [center] * len(plain))
    results: dict[str, Any] = {"seed_noise_percent": {"mean": round(mean(noise), 3), "largest": round(max(noise), 3)}}
    for path, found in windows.items():
        apart = distances(found, plain)
        results[path] = {
            "eval_loss": [round(loss, 4) for loss in held_out[path]],
            "train_loss_last": [round(one[-1], 4) for one in found],
            "percent_from_plain": {"mean": round(mean(apart), 3), "largest": round(max(apart), 3)},
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--paths", nargs="+", choices=[path for path in PATHS if path != PLAIN], default=["fast", "fp8", "fp8_wide"]
    )
    arguments = parser.parse_args()
    windows: dict[str, list[list[float]]] = {}
    held_out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            (path, seed): start(path, seed, arguments.data, arguments.steps, folder)
            for path in (PLAIN, *arguments.paths)
            for seed in SEEDS
        }
        for (path, seed), run in runs.items():
            if run.wait() != 0:
                sys.exit((folder / f"{path}-{seed}.log").read_text()[-2000:])
            one, at_end = losses(folder / f"{path}-{seed}")
            windows.setdefault(path, []).append(one)
            held_out.setdefault(path, []).append(at_end)
    print(json.dumps(summary(windows, held_out), indent=2))


if __name__ == "__main__":
    main()
