"""What checkpoints cost a run: the share of its time in which training waits for them.

    scripts/bench checkpoints [--steps 40] [--every 10] [--hidden 512] [--layers 4]

Trains all weights of a random model in this process, on the first GPU if there is one, without checkpoints (but the last), with
them, and with them written while training continues. Prints JSON: the size of a checkpoint, and of each run the seconds of
training and of waiting for checkpoints, and the share of the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks._rows import write_sums
from raytune_llm import api, load_config


def trained(folder: Path, name: str, asked: argparse.Namespace, *settings: str) -> dict[str, float]:
    shape = {"hidden_size": asked.hidden, "intermediate_size": 3 * asked.hidden, "num_hidden_layers": asked.layers}
    words = ["model=tiny_random", *(f"model.config.{setting}={value}" for setting, value in shape.items())]
    words += ["adapter=none", "data=chat", f"data.path={folder}/rows.jsonl", f"data.cache={folder}/tokens", "resources=inline"]
    words += [f"output_dir={folder}/{name}", "tracking=none", "train.epochs=1000", f"train.max_steps={asked.steps}"]
    words += ["data.eval_fraction=0", "checkpoint.keep=1", "optimizer.lr=1e-4"]
    wall = api.train(load_config("train", [*words, *settings])).summary.wall_s
    return {"train_s": wall.train, "checkpoints_s": wall.save, "share": wall.save / (wall.train + wall.save)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args()
    variants = {"last_only": 100000, "waiting": asked.every, "asynchronous": asked.every}
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        folder = Path(name)
        write_sums(folder / "rows.jsonl")
        trained(folder, "warm", asked, "train.max_steps=1")
        for variant, every in variants.items():
            settings = [f"checkpoint.every_steps={every}", f"checkpoint.asynchronous={str(variant == 'asynchronous').lower()}"]
            figures = trained(folder, variant, asked, *settings)
            results[variant] = {figure: round(value, 3) for figure, value in figures.items()}
        [state] = (folder / "last_only" / "checkpoints").glob("step-*/state")
        results["checkpoint_mib"] = round(sum(file.stat().st_size for file in state.iterdir()) / 2**20, 1)
    print(json.dumps(results | {"load_average": round(os.getloadavg()[0], 1)}, indent=2))


if __name__ == "__main__":
    main()
