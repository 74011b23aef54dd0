"""Loss of each adapter, quantized base and optimizer after some steps on the demo's data: the mean of the last tenth of them.

    scripts/bench losses [--short] [--steps 200] [--model smollm2_135m] [--only lora,muon] [--lr-factor 5] [--processes 1]
        [--kept FILE] [--set data.max_length=128 ...]

Prints JSON, with the mean loss of each tenth. Adapters are trained with AdamW, optimizers train all weights; each with a rate of
its own, since 1e-4 for AdamW is not 1e-4 for Lion or SGD. Quantized bases are LoRA's run over another base; `curve_off`
is the largest difference of a tenth of their curve from LoRA's, over LoRA's. A run that a change makes worse shows beside the
committed result of the same arguments.

--short: of optimizers alone, in less than a minute each on a CPU: they train the attention of the last two layers, with a pack of
64 tokens a step. tests/invariant/test_optimizers_learn.py holds these losses.
--lr-factor: of all rates, where fewer weights are trained, as by --set adapter=freeze.
--kept: each curve is written to this file when its run ends. After an interruption, the same command resumes from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from raytune_llm import api
from raytune_llm.config.load import load_config

ADAPTERS = {
    "none": ["optimizer.lr=5e-5"],
    "freeze": ["adapter.last_layers=4", "adapter.first_layers=null", "adapter.layers=null", "optimizer.lr=1e-4"],
    "lora": ["optimizer.lr=5e-4"],
    "rslora": ["optimizer.lr=2e-4"],
    "lora_plus": ["optimizer.lr=1e-4"],
    "dora": ["optimizer.lr=5e-4"],
    "pissa": ["optimizer.lr=1e-4"],
    "loftq": ["quantization=bnb_nf4", "optimizer.lr=5e-4"],
    "eva": ["optimizer.lr=5e-4"],
    "oft": ["optimizer.lr=5e-4"],
    "vera": ["adapter.rank=64", "optimizer.lr=1e-2"],
    "ia3": ["optimizer.lr=1e-2"],
}
LAYERWISE = ("train.max_grad_norm=null", "train.micro_batch_size=8")
"""Whole steps in one pass, whose gradients are not clipped."""
OPTIMIZERS = {
    "adamw": ["optimizer.lr=5e-5"],
    "adamw_8bit": ["optimizer.lr=5e-5"],
    "adamw_bf16": ["optimizer.lr=5e-5"],
    "adam_mini": ["optimizer.lr=5e-5"],
    "adafactor": ["optimizer.lr=1e-3"],
    "apollo": ["optimizer.lr=5e-4"],
    "apollo_mini": ["optimizer.lr=5e-4"],
    "badam": ["optimizer.lr=1e-4"],
    "galore": ["optimizer.lr=5e-4"],
    "lion": ["optimizer.lr=1e-5"],
    "muon": ["optimizer.lr=1e-3"],
    "schedule_free": ["schedule=constant", "optimizer.lr=1e-4"],
    "sgd": ["optimizer.lr=1e-2"],
    "lomo": [*LAYERWISE, "optimizer.lr=1e-2"],
    "adalomo": [*LAYERWISE, "optimizer.lr=5e-4"],
}
TRAINS_ALL = OPTIMIZERS | {"paged_adamw_8bit": OPTIMIZERS["adamw_8bit"]}  # which needs a GPU
SHORT = [
    "data.max_samples=24",
    "data.max_length=64",
    "train.global_batch_size=1",
    "train.micro_batch_size=1",
    "train.precision=fp32",
    "schedule.warmup_ratio=0",
    "adapter=freeze",
    "adapter.last_layers=2",
    "adapter.modules=[self_attn,input_layernorm]",
    "adapter.extra_modules=[norm]",
]
"""What the layers below give for the few packs is computed once for each, since they come again in every epoch."""
SHORT_RATES = {
    "adamw": 2e-4,
    "adamw_8bit": 2e-4,
    "adamw_bf16": 2e-4,
    "adam_mini": 2e-4,
    "adafactor": 2e-4,
    "apollo": 2e-4,
    "apollo_mini": 2e-4,
    "badam": 5e-4,
    "galore": 2e-4,
    "lion": 1e-4,
    "muon": 1e-3,
    "schedule_free": 2e-4,
    "sgd": 2e-2,
    "lomo": 5e-2,
    "adalomo": 1e-3,
}
SHORT_OWN = {"badam": ["optimizer.outside_layers=true", "optimizer.switch_every=10"]}
LR = "optimizer.lr="
QUANTIZATIONS = dict.fromkeys(("bnb_nf4", "bnb_fp4", "bnb_int8", "hqq"), ADAPTERS["lora"])
CASES = {
    **{f"adapter={name}": [f"adapter={name}", *settings] for name, settings in ADAPTERS.items()},
    **{f"quantization={name}": [f"quantization={name}", *settings] for name, settings in QUANTIZATIONS.items()},
    **{f"optimizer={name}": ["adapter=none", f"optimizer={name}", *settings] for name, settings in TRAINS_ALL.items()},
}


def short_run(optimizer: str) -> list[str]:
    """The settings of an optimizer's run with --short."""
    own = [*OPTIMIZERS[optimizer], *SHORT, *SHORT_OWN.get(optimizer, [])]
    return [f"optimizer={optimizer}", *own, f"{LR}{SHORT_RATES[optimizer]:g}"]


def curve_of(settings: list[str], *, model: str, steps: int, folder: Path) -> list[float]:
    """The loss of each step."""
    fixed = ["data=commands", "resources=inline", "tracking=none", "train.log_every_steps=1", "data.eval_fraction=0"]
    fixed += [f"model={model}", f"train.max_steps={steps}", "train.epochs=1000", f"output_dir={folder}"]
    api.train(load_config("train", [*fixed, *settings]))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def tenths(curve: Sequence[float]) -> list[float]:
    size = max(len(curve) // 10, 1)
    return [fmean(curve[start : start + size]) for start in range(0, len(curve), size)]


def at_rate(settings: Sequence[str], factor: float) -> list[str]:
    """The settings with the learning rate times the factor."""
    rates = {word: f"{LR}{float(word.removeprefix(LR)) * factor:g}" for word in settings if word.startswith(LR)}
    return [rates.get(word, word) for word in settings]


def figures(name: str, curve: Sequence[float], lora: Sequence[float] | None) -> dict[str, Any]:
    means = [round(mean, 4) for mean in tenths(curve)]
    found: dict[str, Any] = {"first_loss": round(curve[0], 4), "last_loss": means[-1], "tenths": means}
    if name.startswith("quantization=") and lora is not None:
        off = max(abs(own / other - 1) for own, other in zip(tenths(curve), tenths(lora), strict=True))
        found["curve_off"] = round(off, 4)
    return found


def kept_in(file: Path | None) -> dict[str, list[float]]:
    """Curves of an earlier command, by model, steps and settings."""
    return {} if file is None or not file.exists() else dict(json.loads(line) for line in file.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--short", action="store_true", help="a small part of the model, by each optimizer")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--only", default="", help="options, separated by commas")
    parser.add_argument("--lr-factor", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=1, help="runs side by side")
    parser.add_argument("--kept", type=Path, help="a file of curves: those of an earlier command count, new ones are added")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all runs, as on the command line")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    cases = {f"optimizer={name}": short_run(name) for name in OPTIMIZERS} if args.short else CASES
    chosen = {name: settings for name, settings in cases.items() if not only or name.partition("=")[2] in only}
    asked = {name: [*at_rate(settings, args.lr_factor), *args.set] for name, settings in chosen.items()}
    keys = {name: json.dumps([args.model, args.steps, settings]) for name, settings in asked.items()}
    kept = kept_in(args.kept)
    curves = {name: kept[key] for name, key in keys.items() if key in kept}
    spawned = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.processes, mp_context=spawned) as pool:
        runs: dict[Future[list[float]], str] = {}
        for name in (name for name in asked if name not in curves):
            own = {"model": args.model, "steps": args.steps, "folder": Path(folder) / name}
            runs[pool.submit(curve_of, asked[name], **own)] = name
        for run in as_completed(runs):
            name = runs[run]
            try:
                curves[name] = run.result()
            except Exception as error:  # such as of one that needs a GPU, or a package that isn't installed here
                print(name, f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            print(name, figures(name, curves[name], None), file=sys.stderr, flush=True)
            if args.kept is not None:
                with args.kept.open("a") as file:
                    file.write(f"{json.dumps([keys[name], curves[name]])}\n")
    lora = curves.get("adapter=lora")
    print(json.dumps({name: figures(name, curves[name], lora) for name in chosen if name in curves}, indent=2))


if __name__ == "__main__":
    main()
