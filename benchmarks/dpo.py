"""DPO on this machine: SmolLM2, LoRA rank 8, dpo_en_demo.json at 1,024 tokens, two pairs a step; beside LLaMA-Factory.

    scripts/bench dpo --llamafactory /path/to/its/python

Four runs of ours on the same rows (as it comes; with a copy of the request for each answer; with the reference in each step; with
activations computed again) and one of theirs, one after the other, as whole commands. Pairs per second are over the time between
the first and the last logged step; memory is the process's peak.

LLaMA-Factory computes activations again by default, so what is set beside it is our run that does so too: its speed and its
memory (times_llamafactory, memory_of_llamafactory). Each of ours says the same of itself.

Three epochs are counted from a command's loading to its last step: the epoch that was run, with warming up and, where there is
one, the pass of the reference, and two more at the measured rate.

What sharing requests can save is in the rows: most_times_copied_requests is the ratio of products in the two forms, body and
head, attention's own left out (its share is smaller in the shared form, too).
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
from typing import Any

from raytune_llm import packaged
from raytune_llm.data.store import Store

DATA = Path(__file__).resolve().parents[2] / "shared/data/dpo_en_demo.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIRS_A_STEP = 2
BODY_WEIGHTS, HEAD_WEIGHTS = 106_168_320, 28_311_552
"""Of SmolLM2-135M's products: in its thirty layers, and in its head, which only sees answers."""
VARIANTS = {
    "ours": [],
    "copied_requests": ["data.share_prompts=false"],
    "online": ["stage.reference=online"],
    "checkpointed": ["train.activation_checkpointing=full"],
}


def ours(name: str, folder: Path, rows: Path, precision: str) -> dict[str, float]:
    output = folder / name
    command = [
        sys.executable, "-m", "raytune_llm", "model=smollm2_135m", "data=sharegpt_pairs", f"data.path={rows}", "stage=dpo",
        f"data.cache={folder / 'stores' / name}", "data.max_length=1024", "data.packing=false", "adapter.rank=8",
        "train.epochs=1",
        f"train.micro_batch_size={PAIRS_A_STEP}", f"train.global_batch_size={PAIRS_A_STEP}", f"train.precision={precision}",
        "train.log_every_steps=1", "resources=inline", "tracking=none", f"output_dir={output}", *VARIANTS[name],
    ]  # fmt: skip
    times, peak_gib = _watch(command, output / "metrics.jsonl", folder / f"{name}.out", os.environ)
    wall_s = json.loads((output / "summary.json").read_text())["wall_s"]
    return {
        "pairs_per_s": _rate(times),
        "peak_memory_gib": peak_gib,
        "load_s": round(wall_s["load"], 1),
        "train_s": round(wall_s["train"], 1),
    }


def llamafactory(python: str, folder: Path, rows: Path, precision: str) -> dict[str, float]:
    known = json.loads((DATA.parent / "dataset_info.json").read_text())["dpo_en_demo"]
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": {**known, "file_name": str(rows)}}))
    settings = {
        "model_name_or_path": packaged.resolve(MODEL), "stage": "dpo", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all", "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "pairs", "dataset_dir": str(folder),
        "template": "smollm2", "cutoff_len": 1024, "output_dir": str(folder / "theirs"), "num_train_epochs": 1,
        "per_device_train_batch_size": PAIRS_A_STEP, "gradient_accumulation_steps": 1, "learning_rate": 2e-4, "logging_steps": 1,
        "save_steps": 10_000, "bf16": precision == "bf16", "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    (folder / "theirs.yaml").write_text(json.dumps(settings))  # JSON is YAML
    command = [str(Path(python).with_name("llamafactory-cli")), "train", str(folder / "theirs.yaml")]
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    times, peak_gib = _watch(command, folder / "theirs/trainer_log.jsonl", folder / "theirs.out", environment)
    return {"pairs_per_s": _rate(times), "peak_memory_gib": peak_gib}


def _watch(command: list[str], log: Path, printed: Path, environment: Mapping[str, str]) -> tuple[list[float], float]:
    """When each line with a loss of the training steps came to the log, and the peak memory of the process in GiB."""
    times, peak_gib = [], 0.0
    with printed.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
            steps = sum("loss" in line for line in lines)
            times += [time.perf_counter()] * (steps - len(times))
            peak_gib = max(peak_gib, _peak_gib(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(printed.read_text(errors="replace")[-3000:])
    return times, round(peak_gib, 2)


def _peak_gib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return max((int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM")), default=0.0)


def _rate(times: list[float]) -> float:
    return round(PAIRS_A_STEP * (len(times) - 1) / (times[-1] - times[0]), 4)


def _three_epochs_s(run: Mapping[str, float], pairs: int) -> float:
    return run["load_s"] + run["train_s"] + 2 * pairs / run["pairs_per_s"]


def _most_times_copied_requests(stores: Path) -> float:
    """From the lengths of the rows, as they were cut to 1,024 tokens."""
    store = Store.open(next(stores.glob("[!r]*/manifest.json")).parent)
    requests, copied = int(store.list_lengths("prompt_ids").sum()), int(store.lengths.sum())
    head = HEAD_WEIGHTS * (copied - 2 * requests)
    return (BODY_WEIGHTS * copied + head) / (BODY_WEIGHTS * (copied - requests) + head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llamafactory", help="the Python that has LLaMA-Factory 0.9.5")
    parser.add_argument("--precision", default="fp32", choices=["bf16", "fp32"])
    parser.add_argument("--pairs", type=int, default=10)
    asked = parser.parse_args()
    result: dict[str, Any] = {"precision": asked.precision, "pairs": asked.pairs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everything = json.loads(DATA.read_text())
        rows = folder / "pairs.json"
        rows.write_text(json.dumps(everything[:: len(everything) // asked.pairs][: asked.pairs]))
        for variant in VARIANTS:
            result[variant] = ours(variant, folder, rows, asked.precision)
        rate = {variant: result[variant]["pairs_per_s"] for variant in VARIANTS}
        result["most_times_copied_requests"] = round(_most_times_copied_requests(folder / "stores/ours"), 2)
        result["times_copied_requests"] = round(rate["ours"] / rate["copied_requests"], 2)
        result["times_online_a_step"] = round(rate["ours"] / rate["online"], 2)
        online_s, ours_s = (_three_epochs_s(result[variant], asked.pairs) for variant in ("online", "ours"))
        result["times_online_over_three_epochs"] = round(online_s / ours_s, 2)
        if asked.llamafactory:
            theirs = result["llamafactory"] = llamafactory(asked.llamafactory, folder, rows, asked.precision)
            for variant in VARIANTS:
                beside = {
                    "times_llamafactory": round(rate[variant] / theirs["pairs_per_s"], 2),
                    "memory_of_llamafactory": round(result[variant]["peak_memory_gib"] / theirs["peak_memory_gib"], 2),
                }
                result[variant] |= beside
            result |= {key: result["checkpointed"][key] for key in ("times_llamafactory", "memory_of_llamafactory")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
