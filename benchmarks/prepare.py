"""Raw rows to a token store, as a user runs it: 20,000 Alpaca rows with SmolLM2's tokenizer.

    scripts/bench prepare [--rows 20000] [--resources inline local] [--llamafactory /path/to/its/python]

Prints JSON: for each way the steady rate that the command itself reports, the wall time of the whole command, and the most
memory that it and its children held together. Beside them, from the same minute, the rate of the tokenizer's Rust alone on
one core (ids with offsets, as transformers calls it), so that results from machines under different load can be compared.
LLaMA-Factory, where it is installed, converts and tokenizes the same rows with two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from raytune_llm import packaged

SOURCE = Path(__file__).parents[2] / "shared" / "data" / "alpaca_en_demo.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_rows(path: Path, num_rows: int) -> None:
    """The demo's rows over and over, each made distinct."""
    rows = json.loads(SOURCE.read_text())
    with path.open("w") as stream:
        stream.write("[")
        for number in range(num_rows):
            row = rows[number % len(rows)]
            distinct = row | {"instruction": f"{row['instruction']} ({number})", "output": f"{row['output']} [{number}]"}
            stream.write(("," if number else "") + "\n" + json.dumps(distinct))
        stream.write("\n]\n")


def run_command(path: Path, cache: Path, resources: str, *more: str) -> dict[str, float]:
    settings = ["model=smollm2_135m", "data=alpaca", f"data.path={path}", f"data.cache={cache}", f"resources={resources}", *more]
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "raytune_llm", "prepare", *settings], stdout=subprocess.PIPE, text=True
    ) as process:
        peak_mib = 0.0
        while process.poll() is None:
            peak_mib = max(peak_mib, memory_mib(process.pid))
            time.sleep(0.5)
        wall_s = time.perf_counter() - started
        assert process.stdout is not None
        rate = re.search(r"([\d,]+) rows/s", process.stdout.read())
    assert rate is not None
    return {"rows_per_s": int(rate[1].replace(",", "")), "wall_s": round(wall_s, 2), "peak_mib": round(peak_mib)}


LLAMAFACTORY = """
import json, sys, time
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

model, data, training, *_ = get_train_args(json.load(open(sys.argv[1])))
tokenizer = load_tokenizer(model)
template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
started = time.perf_counter()
rows = get_dataset(template, model, data, training, stage="sft", **tokenizer)["train_dataset"]
seconds = time.perf_counter() - started
rows.select_columns(["input_ids", "labels"]).to_parquet(sys.argv[2])
print("RESULT", json.dumps({"rows": len(rows), "seconds": seconds}))
"""


def run_llamafactory(python: str, path: Path, folder: Path, **entry: str) -> dict[str, float]:
    """The ids and labels that it makes go to folder/theirs.parquet. `entry`: more of its dataset_info.json."""
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": str(path), **entry}}))
    settings = {
        "model_name_or_path": packaged.resolve(MODEL), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": "rows", "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 2048, "use_cpu": True,
        "output_dir": str(folder / "theirs"), "preprocessing_num_workers": 2, "overwrite_cache": True, "report_to": "none",
    }  # fmt: skip
    (folder / "theirs.json").write_text(json.dumps(settings))
    environment = {
        **os.environ,
        "DISABLE_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": "",
    }
    started = time.perf_counter()
    command = [python, "-c", LLAMAFACTORY, str(folder / "theirs.json"), str(folder / "theirs.parquet")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    wall_s = time.perf_counter() - started
    made = json.loads(done.stdout.split("RESULT")[1])
    return {"rows_per_s": round(made["rows"] / made["seconds"]), "seconds": round(made["seconds"], 2), "wall_s": round(wall_s, 2)}


def memory_mib(pid: int) -> float:
    """Of a process and all below it, shared pages counted once (PSS)."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0.0  # one ended while it was looked at
    return total / 2**20


def rust_rows_per_s(num_rows: int = 999) -> float:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from raytune_llm.config.load import load_config
    from raytune_llm.data.formats import convert
    from raytune_llm.data.templates.chat_template import ChatTemplate
    from raytune_llm.data.tokens.tokenizer import load_tokenizer
    from raytune_llm.records import Conversation

    tokenizer = load_tokenizer(MODEL)
    template = ChatTemplate(tokenizer)
    columns = load_config("prepare", ["data=alpaca", f"data.path={SOURCE}"]).data.format
    records = (convert(row, columns) for row in json.loads(SOURCE.read_text())[:num_rows])
    texts = [template.render(record).text for record in records if isinstance(record, Conversation)]
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        best = min(best, time.perf_counter() - started)
    return len(texts) / best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--resources", nargs="+", default=["inline", "local"])
    parser.add_argument("--llamafactory", help="the Python that has LLaMA-Factory 0.9.5")
    arguments = parser.parse_args()
    results: dict[str, object] = {"rows": arguments.rows, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        write_rows(path, arguments.rows)
        for resources in arguments.resources:
            results[resources] = run_command(path, Path(folder) / resources, resources)
        if arguments.llamafactory:
            results["llamafactory"] = run_llamafactory(arguments.llamafactory, path, Path(folder))
    results["rust_alone_one_thread_rows_per_s"] = round(rust_rows_per_s())
    results |= {
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
