"""What checkpoints cost a run: the share of its time in which training waits for them, and how much longer a step takes.

    scripts/bench checkpoints [--steps 100] [--every 50] [--hidden 256] [--layers 4] [--runs 3] [--kept FILE] [--limit-s 600]

Trains all weights of a random model in this process, on the first GPU if there is one, without checkpoints (but the last), with
them, and with them written while training continues, in rounds. Prints JSON: the size of a checkpoint, and of each kind of run
the median seconds a step with the checkpoints of its steps, the share of them in which training waited, and how much longer a
step took than without (`over_last_only`: 0.03 is 3%).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks._rounds import add_arguments, measured
from benchmarks._rows import write_sums
from raytune_llm import api, load_config


def trained(folder: Path, asked: argparse.Namespace, every: int, asynchronous: bool) -> dict[str, float]:
    """Every run has a last checkpoint, at its end."""
    shape = {"hidden_size": asked.hidden, "intermediate_size": 3 * asked.hidden, "num_hidden_layers": asked.layers}
    words = ["model=tiny_random", *(f"model.config.{setting}={value}" for setting, value in shape.items())]
    words += ["adapter=none", "data=chat", f"data.path={folder}/rows.jsonl", f"data.cache={folder}/tokens", "resources=inline"]
    words += ["tracking=none", "train.epochs=1000", f"train.max_steps={asked.steps}", "data.max_length=512", "resume=never"]
    words += ["train.global_batch_size=2", "train.compile=false"]
    words += ["data.eval_fraction=0", "checkpoint.keep=1", "optimizer.lr=1e-4", f"output_dir={folder}/run"]
    words += [f"checkpoint.every_steps={every}", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    wall = api.train(load_config("train", words)).summary.wall_s
    return {"step_s": (wall.train + wall.save) / asked.steps, "share": wall.save / (wall.train + wall.save)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    add_arguments(parser, runs=3)
    asked = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # one core writes, and threads that lack a core wait for each other
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        folder = Path(name)
        write_sums(folder / "rows.jsonl")
        trained(folder, argparse.Namespace(**{**vars(asked), "steps": 2}), 1, False)  # warm
        [state] = (folder / "run" / "checkpoints").glob("step-*/state")
        checkpoint_mib = round(sum(file.stat().st_size for file in state.iterdir()) / 2**20, 1)
        cases = {
            "last_only": partial(trained, folder, asked, 1_000_000, False),
            "waiting": partial(trained, folder, asked, asked.every, False),
            "asynchronous": partial(trained, folder, asked, asked.every, True),
        }
        results = measured(cases, asked)
        shutil.rmtree(folder / "run")
    if "step_s" in results["last_only"]:
        for found in results.values():
            if "step_s" in found:
                found["over_last_only"] = round(found["step_s"] / results["last_only"]["step_s"] - 1, 3)
    print(json.dumps(results | {"checkpoint_mib": checkpoint_mib, "load_average": round(os.getloadavg()[0], 1)}, indent=2))


if __name__ == "__main__":
    main()
