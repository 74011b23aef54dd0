"""Whole commands on one GPU: DPO with LoRA, and the time from a command to its first step, of a model in Llama-3-8B's shape.

    python -m benchmarks gpu_runs [--runs dpo first_step]

dpo: 300 pairs of texts as long as those of dpo_en_demo.json, each with a request of its own, to 1,024 tokens; two epochs of four
packs a step, the reference precomputed. Pairs/s are from the tokens/s of the log after the tenth step, when all is compiled.

first_step: 16 GB of random weights are written as safetensors and dropped from the page cache; the time is from starting the
command to the first record in its metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from gpu import LORA, SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

PAIRS = Path(__file__).parent / "_dpo_lengths.json"
EPOCHS, WARMUP_STEPS = 2, 10


def command(folder: Path, rows: list[dict[str, Any]], *settings: str) -> list[str]:
    data, output = folder / "rows.jsonl", folder / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        sys.executable, "-m", "raytune_llm", "model=hub", "model.tokenizer=bytes", *LORA, f"data.path={data}",
        f"data.cache={folder / 'stores'}", f"output_dir={output}", "resources=inline", "tracking=none", *settings,
    ]  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dpo(folder: Path) -> dict[str, float]:
    draw = random.Random(0)

    def message(role: str, length: int) -> dict[str, str]:
        return {"role": role, "content": "".join(draw.choices(string.ascii_letters, k=length))}

    rows = [
        {"messages": [message("user", request)], "chosen": message("assistant", better), "rejected": message("assistant", worse)}
        for request, better, worse in json.loads(PAIRS.read_text())["rows"]
    ]
    shape = ",".join(f"{key}:{str(value).lower()}" for key, value in SHAPES["llama3_8b"].items())
    settings = ["data=chat_pairs", "stage=dpo", "model.path=null", "model.weights=random", f"++model.config={{{shape}}}"]
    sizes = ["data.max_length=1024", "train.micro_batch_size=4", "train.global_batch_size=4", f"train.epochs={EPOCHS}"]
    subprocess.run(command(folder, rows, *settings, *sizes), check=True, stdout=sys.stderr)
    found = records(folder)
    tokens_per_pair = found[-1]["tokens_seen"] / (EPOCHS * len(rows))
    speed = mean(record["tokens_per_s"] for record in found if record["step"] > WARMUP_STEPS)
    return {
        "pairs_per_s": round(speed / tokens_per_pair, 2),
        "tokens_per_s": round(speed),
        "tokens_a_pair": round(tokens_per_pair),
    }


def first_step(folder: Path) -> dict[str, float]:
    weights = folder / "model"
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama3_8b"]), dtype=torch.bfloat16)
    model.save_pretrained(weights)
    del model
    torch.cuda.empty_cache()
    for file in weights.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    messages = [{"role": "user", "content": "a" * 100}, {"role": "assistant", "content": "b" * 200}]
    settings = [f"model.path={weights}", "data=chat", "data.max_length=4096", "train.micro_batch_size=2"]
    began = time.perf_counter()
    with subprocess.Popen(
        command(folder, [{"messages": messages}] * 100, *settings, "train.global_batch_size=2", "train.max_steps=1"),
        stdout=sys.stderr,
    ) as run:
        while not records(folder):
            if run.poll() not in (None, 0):
                sys.exit("the command failed")
            time.sleep(0.1)
        seconds = time.perf_counter() - began
    return {"first_step_s": round(seconds, 1)}


RUNS: dict[str, Callable[[Path], dict[str, float]]] = {"dpo": dpo, "first_step": first_step}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    for name in parser.parse_args().runs:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = RUNS[name](Path(folder))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
