"""Answers for a data set on this machine: SmolLM2 over requests to a smart home, whole commands; beside LLaMA-Factory's
`predict_with_generate` where it is installed.

    scripts/bench predict [--rows 1000] [--new-tokens 64] [--llamafactory /path/to/its/python] [--batches 1 32]

Both load the model, answer greedily in the same precision, and write answers and metrics. A row that reached its end sooner has
fewer tokens, so answers are counted, not tokens. LLaMA-Factory generates --batches rows at once: 1 is what its own example of
predictions sets. `same_answers` is the fraction of texts that are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raytune_llm import packaged

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH = 32
"""Rows that are generated at once by ours."""


def write_rows(path: Path, number: int) -> None:
    """In Alpaca's layout, so many, each with a number of its own so that no prompt comes twice."""
    talks = [json.loads(line) for line in (Path(__file__).parents[1] / "examples" / "commands.jsonl").read_text().splitlines()]
    rows = []
    for place in range(number):
        said = [message for message in talks[place % len(talks)]["messages"] if message["role"] != "system"]
        rows.append({"instruction": f"{place}: {said[0]['content']}", "input": "", "output": said[1]["content"]})
    path.write_text(json.dumps(rows))


def timed(command: list[str], printed: Path, environment: dict[str, str] | None = None) -> float:
    """Seconds of a whole command."""
    began = time.perf_counter()
    with printed.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise SystemExit(printed.read_text(errors="replace")[-3000:])
    return time.perf_counter() - began


def answers(path: Path) -> list[str]:
    return [json.loads(line)["predict"].strip() for line in path.read_text().splitlines()]


def ours(folder: Path, rows: Path, new_tokens: int, precision: str) -> tuple[float, list[str]]:
    command = [
        sys.executable, "-m", "raytune_llm", "predict", "model=smollm2_135m", "data=alpaca", f"data.path={rows}",
        f"predict.max_new_tokens={new_tokens}", f"predict.precision={precision}", f"engine.max_rows={BATCH}",
        "data.default_system=You are a helpful AI assistant named SmolLM\\, trained by Hugging Face.",
        f"output_dir={folder / 'ours'}",
    ]  # fmt: skip
    return timed(command, folder / "ours.log"), answers(folder / "ours" / "predictions.jsonl")


def llamafactory(python: str, folder: Path, rows: Path, new_tokens: int, precision: str, batch: int) -> tuple[float, list[str]]:
    (folder / "dataset_info.json").write_text(json.dumps({"asked": {"file_name": str(rows)}}))
    settings = {
        "model_name_or_path": packaged.resolve(MODEL), "stage": "sft", "do_predict": True, "predict_with_generate": True,
        "eval_dataset": "asked", "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 1024,
        "per_device_eval_batch_size": batch, "max_new_tokens": new_tokens, "do_sample": False,
        "output_dir": str(folder / f"theirs-{batch}"), "report_to": "none", "use_cpu": True, "bf16": precision == "bf16",
        "infer_dtype": {"bf16": "bfloat16", "fp32": "float32"}[precision],
    }  # fmt: skip
    (folder / "theirs.yaml").write_text(json.dumps(settings))  # JSON is YAML
    command = [str(Path(python).with_name("llamafactory-cli")), "train", str(folder / "theirs.yaml")]
    environment = {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    seconds = timed(command, folder / "theirs.log", environment)
    return seconds, answers(folder / f"theirs-{batch}" / "generated_predictions.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--llamafactory", help="the Python that has LLaMA-Factory 0.9.5")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, BATCH], help="rows at once, of LLaMA-Factory")
    asked = parser.parse_args()
    packaged.resolve(MODEL)  # its files are made once, in nobody's time
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = folder / "rows.json"
        write_rows(rows, asked.rows)
        seconds, said = ours(folder, rows, asked.new_tokens, asked.precision)
        assert len(said) == asked.rows, "each row is answered once"
        result: dict[str, Any] = {"rows": asked.rows, "ours": {"wall_s": round(seconds, 1), "rows_per_s": asked.rows / seconds}}
        for batch in asked.batches if asked.llamafactory else ():
            theirs, other = llamafactory(asked.llamafactory, folder, rows, asked.new_tokens, asked.precision, batch)
            result[f"llamafactory_batch_{batch}"] = {
                "wall_s": round(theirs, 1),
                "rows_per_s": asked.rows / theirs,
                "times": round(theirs / seconds, 2),
                "same_answers": round(sum(map(str.__eq__, said, other)) / len(said), 3),
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
