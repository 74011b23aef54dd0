"""Training speed on this machine: SmolLM2, LoRA rank 8, packs of 1,024, four a step; beside LLaMA-Factory where it is installed.

    scripts/bench train --llamafactory /path/to/its/python --precision bf16

Both run as whole commands on the same rows (../shared/data/alpaca_en_demo.json), one after the other. Tokens per second
are real tokens over the time between the first and the last logged step; the time to the first step is until it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from raytune_llm import packaged

DATA = Path(__file__).resolve().parents[2] / "shared/data/alpaca_en_demo.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def ours(folder: Path, steps: int, precision: str, resources: str) -> dict[str, float]:
    started = time.time()
    command = [
        sys.executable, "-m", "raytune_llm", "model=smollm2_135m", "data=alpaca", f"data.path={DATA}",
        f"data.cache={folder / 'stores'}", "data.max_length=1024",
        "train.micro_batch_size=4", "train.global_batch_size=4", f"train.max_steps={steps}",
        f"train.precision={precision}", "train.log_every_steps=1", "adapter.rank=8", f"resources={resources}", "tracking=none",
        f"output_dir={folder / 'ours'}",
    ]  # fmt: skip
    begun, times = _watch(command, folder / "ours/metrics.jsonl", "attention:", started, os.environ)
    tokens = [json.loads(line)["tokens_seen"] for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    return _rate(begun, times, tokens)


def llamafactory(python: str, folder: Path, steps: int, precision: str) -> dict[str, float]:
    info = {"alpaca": {"file_name": str(DATA)}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    settings = {
        "model_name_or_path": packaged.resolve(MODEL), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all", "dataset": "alpaca", "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 1024,
        "packing": True, "output_dir": str(folder / "theirs"), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4, "max_steps": steps, "logging_steps": 1, "save_steps": 10_000, "bf16": precision == "bf16",
        "include_num_input_tokens_seen": "non_padding", "report_to": "none", "use_cpu": True, "preprocessing_num_workers": 2,
    }  # fmt: skip
    (folder / "theirs.yaml").write_text(json.dumps(settings))  # JSON is YAML
    started = time.time()
    command = [str(Path(python).with_name("llamafactory-cli")), "train", str(folder / "theirs.yaml")]
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    begun, times = _watch(command, folder / "theirs/trainer_log.jsonl", "***** Running training", started, environment)
    lines = [json.loads(line) for line in (folder / "theirs/trainer_log.jsonl").read_text().splitlines()]
    tokens = [line.get("total_tokens", 4096 * line["current_steps"]) for line in lines if "loss" in line]
    return _rate(begun, times[: len(tokens)], tokens)


def _watch(
    command: list[str], log: Path, marker: str, started: float, environment: Mapping[str, str]
) -> tuple[float, list[float]]:
    """Seconds since `started` until the first step began (the output said `marker`) and until each line of the log."""
    begun, times = 0.0, []
    printed = log.parent.parent / f"{log.stem}.out"
    with printed.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**environment, "PYTHONUNBUFFERED": "1"})
        while process.poll() is None:
            begun = begun or (time.time() - started if marker in printed.read_text(errors="replace") else 0.0)
            lines = log.read_text().count("\n") if log.exists() else 0
            times += [time.time() - started] * (lines - len(times))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(printed.read_text(errors="replace")[-3000:])
    return begun, times


def _rate(begun: float, times: list[float], tokens: list[int]) -> dict[str, float]:
    return {
        "tokens_per_s": round((tokens[-1] - tokens[0]) / (times[len(tokens) - 1] - times[0]), 1),
        "command_to_first_step_s": round(begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llamafactory", help="the Python that has LLaMA-Factory 0.9.5")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resources", default="inline", choices=["inline", "local"])
    asked = parser.parse_args()
    result: dict[str, object] = {"precision": asked.precision}
    with tempfile.TemporaryDirectory() as folder:
        result["ours"] = ours(Path(folder), asked.steps, asked.precision, asked.resources)
        if asked.llamafactory:
            result["llamafactory"] = llamafactory(asked.llamafactory, Path(folder), asked.steps, asked.precision)
            rates = [result[name]["tokens_per_s"] for name in ("ours", "llamafactory")]  # type: ignore[index]
            result["times_llamafactory"] = round(rates[0] / rates[1], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
