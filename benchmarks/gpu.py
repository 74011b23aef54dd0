"""Training steps on one GPU: random weights in the shape of a published model, packs of documents as long as Alpaca's.

    python benchmarks/gpu.py [--variants NAME ...] [--steps 8] [--workers N] [--profile FOLDER] [--set KEY=VALUE ...]

A variant over several workers runs where there are as many GPUs; one that fails says so, and the others run. Prints JSON: for
each variant real tokens/s of a worker (padding not counted), the median step, peak memory and mfu: 4 operations a frozen weight
and token (6 a trained one), and 12 for each number of the query heads as often as there are query-key pairs, against the rate of
a bf16 8192 x 8192 x 8192 product measured just before (memory/flops.py). Steps are the loop's own (`train.loop.one_step`):
forward, backward, clipping, fused AdamW, metrics.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import collate, pinned
from raytune_llm.data.packing import plan
from raytune_llm.data.samples import JOINED_MULTIPLE
from raytune_llm.data.steps import Step
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.report.profile import TABLE, StepProfile
from raytune_llm.runs.build import Builder
from raytune_llm.stages import STAGES
from raytune_llm.train.loop import Learner, one_step
from raytune_llm.train.window import Window

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES = {
    "llama3_8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama3_2_1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
}
"""Llama-3-8B and Llama-3.2-1B, entry by entry."""


@dataclass(frozen=True)
class Variant:
    shape: str
    overrides: tuple[str, ...]
    packs: int = 2
    length: int = 4096
    one_document: bool = False
    joined_rows: int | None = None
    """Rows as they come, so many end to end, in place of packs."""
    warmup: int = 6
    """Steps after the first and before those that are timed, of which there are at most two more."""
    workers: int = 1


LORA = ("adapter=lora", "adapter.rank=8", "adapter.alpha=16", "adapter.dropout=0.0")
ALL_FP8 = ("quantization=fp8", "quantization.skip_modules=[]")
FULL_8B = ("adapter=none", "strategy=fsdp", "train.activation_checkpointing=none")
VARIANTS = {
    "lora": Variant("llama3_8b", LORA),
    "lora_eager": Variant("llama3_8b", (*LORA, "train.compile=false")),
    "lora_unpacked": Variant("llama3_8b", LORA, joined_rows=40, warmup=10),
    "lora_selective": Variant("llama3_8b", (*LORA, "train.activation_checkpointing=selective")),
    "lora_full": Variant("llama3_8b", (*LORA, "train.activation_checkpointing=full")),
    "lora_offload": Variant("llama3_8b", (*LORA, "train.activation_checkpointing=offload")),
    "lora_fp8": Variant("llama3_8b", (*LORA, *ALL_FP8)),
    "lora_fp8_wide": Variant("llama3_8b", (*LORA, "quantization=fp8")),
    "qlora": Variant("llama3_8b", (*LORA, "quantization=bnb_nf4")),
    "qlora_full": Variant("llama3_8b", (*LORA, "quantization=bnb_nf4", "train.activation_checkpointing=full")),
    "lora_131072": Variant("llama3_8b", (*LORA, "train.activation_checkpointing=offload"), 1, 131072, True, warmup=-1),
    "lora_fp8_131072": Variant(
        "llama3_8b", (*LORA, "train.activation_checkpointing=offload", *ALL_FP8), 1, 131072, True, warmup=-1
    ),
    "full_1b": Variant("llama3_2_1b", ("adapter=none",), packs=4),
    "full_1b_fp8": Variant("llama3_2_1b", ("adapter=none", *ALL_FP8), packs=4),
    "lora_2": Variant("llama3_8b", LORA, workers=2),
    "full_8b_2": Variant("llama3_8b", FULL_8B, 1, 8192, True, workers=2),
    "full_8b_fp8_2": Variant("llama3_8b", (*FULL_8B, *ALL_FP8), 1, 8192, True, workers=2),
}

COMPARED = (
    "lora",
    "lora_full",
    "lora_fp8",
    "lora_fp8_wide",
    "qlora",
    "qlora_full",
    "full_1b",
    "lora_unpacked",
    "lora_131072",
    "lora_fp8_131072",
    "lora_2",
    "full_8b_2",
    "full_8b_fp8_2",
)


def make_run(variant: Variant, settings: list[str]) -> TrainRun:
    base = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", "data.path=none"]
    shape = ["++model.config={" + ",".join(f"{key}:{str(value).lower()}" for key, value in SHAPES[variant.shape].items()) + "}"]
    resources = "resources=inline" if variant.workers == 1 else "resources=local"
    sizes = [f"train.global_batch_size={variant.packs * variant.workers}", f"train.micro_batch_size={variant.packs}"]
    lengths = [f"data.max_length={variant.length}", "train.seed=0"]
    return load_config("train", [*base, *shape, resources, *sizes, *lengths, *variant.overrides, *settings])


def make_steps(variant: Variant, vocab_size: int) -> Iterator[Step]:
    """One micro-batch a step, with documents of the recorded lengths and trained tokens, four times over."""
    random = np.random.default_rng(0)
    rows = np.array(json.loads((Path(__file__).parent / "_alpaca_lengths.json").read_text())["rows"] * 4)
    if variant.one_document:
        rows = np.array([[variant.length, variant.length // 2]])
    packs, per_step, length = plan(rows[:, 0], variant.length), variant.packs, variant.length
    if variant.joined_rows is not None:
        packs, per_step = [np.array([row]) for row in range(len(rows))], variant.joined_rows
    order = random.permutation(len(packs)) if len(packs) > 1 else np.zeros(variant.packs, int)
    for start in range(0, len(order) - per_step + 1, per_step):
        lines = [
            [
                (random.integers(0, vocab_size, tokens), np.array([tokens - trained, tokens]))
                for tokens, trained in rows[packs[pack]]
            ]
            for pack in order[start : start + per_step]
        ]
        tokens = sum(len(ids) for line in lines for ids, _ in line)
        if variant.joined_rows is not None:
            lines = [[row for line in lines for row in line]]
            length = -(-tokens // JOINED_MULTIPLE) * JOINED_MULTIPLE
        batch = collate(lines, length=length, pad_id=0, sample_ids=(start,))
        if torch.cuda.is_available():
            batch = pinned(batch)
        yield Step(
            epoch=0,
            cursor=0,
            fraction=0.0,
            batches=[batch],
            first_rows=[0],
            num_rows=len(lines),
            count=len(batch.trained_N),
            tokens=tokens,
            sample_ids=(start,),
        )


def measure(
    name: str,
    variant: Variant,
    settings: list[str],
    num_steps: int,
    matmul: float,
    trace: Path | None,
    device: torch.device,
) -> dict[str, Any]:
    began = time.perf_counter()
    run = make_run(variant, settings)
    config = load_model_config(None, run.model.config)
    built = Builder(run, config, device).build()
    built.strategy.model.train()
    window = Window(device, {})
    steps = list(make_steps(variant, config.vocab_size))
    endless = cycle(steps)
    made = time.perf_counter()

    objective = STAGES[run.stage.name].objective(run.stage)
    learner = Learner(strategy=built.strategy, objective=objective, device=device)

    def advance(number: int) -> tuple[int, int]:
        """Tokens and attention_pairs of so many steps."""
        done = list(islice(endless, number))
        for step in done:
            one_step(learner, step, window, lr=1e-5, seed=0)
        return sum(step.tokens for step in done), sum(batch.attention_pairs for step in done for batch in step.batches)

    advance(1)
    first_loss = window.read()["loss"]
    ready = time.perf_counter()
    advance(max(variant.warmup, 0))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    num_steps = min(num_steps, variant.warmup + 2)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    started = time.perf_counter()
    tokens = attention_pairs = 0
    marks[0].record()
    for mark in marks[1:]:
        tokens, attention_pairs = (a + b for a, b in zip((tokens, attention_pairs), advance(1), strict=True))
        mark.record()
    issued = time.perf_counter() - started
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    steps_s = [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
    result = {
        "tokens_per_s": round(tokens / seconds),
        "step_s": round(median(steps_s), 4),
        "issue_s": round(issued / num_steps, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "mfu": round(built.operations.of(tokens, attention_pairs) / seconds / matmul, 4),
        "tokens": round(tokens / num_steps),
        "loss": round(first_loss[0] / first_loss[1], 4),
        "loss_after": round((lambda pair: pair[0] / pair[1])(window.read()["loss"]), 4),
        "build": round(made - began, 1),
        "first_step": round(ready - made, 1),
        "choices": built.choices,
    }
    if trace is not None:
        profile = StepProfile(trace / name, device, first_step=0, total_steps=3, thin=32)
        for step in range(1, 4):
            advance(1)
            profile.stepped(step)
        print(name, (trace / name / TABLE).read_text(), sep="\n", file=sys.stderr)
    return result


def measure_in_group(rank: int, port: int, world: int, folder: str, trace: Path | None, *measured: Any) -> None:
    """One of several workers of this machine, a GPU each. The first writes the result."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, device_id=device)
    result = measure(*measured, None if trace is None else trace / f"rank_{rank}", device)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measured(
    name: str, variant: Variant, settings: list[str], num_steps: int, matmul: float, trace: Path | None
) -> dict[str, Any]:
    """Tokens/s are a worker's where there are several."""
    if variant.workers > torch.cuda.device_count():
        return {"not_run": f"needs {variant.workers} GPUs"}
    arguments = (name, variant, settings, num_steps, matmul)
    if variant.workers == 1:
        return measure(*arguments, trace, torch.device("cuda", 0))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(measure_in_group, (port, variant.workers, folder, trace, *arguments), nprocs=variant.workers)
        return json.loads((Path(folder) / "result.json").read_text())


def each(measures: Mapping[str, Callable[[], dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The result of each, or what it failed of."""
    for name, measure_one in measures.items():
        try:
            result = measure_one()
        except Exception as error:
            traceback.print_exc()
            # of a worker's error, the last line of its traceback
            why = f"{type(error).__name__}: {error}".strip().splitlines()
            short = why[-1] if isinstance(error, torch.multiprocessing.ProcessRaisedException) else why[0]
            result = {"out_of_memory" if "OutOfMemoryError" in short else "failed": short}
        print(name, json.dumps(result), file=sys.stderr, flush=True)
        yield name, result


def matmul_flops() -> float:
    """Operations a second of a large bf16 product, the best of five rounds."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1000))
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="+", default=list(COMPARED), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, help="in place of each variant's own number")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the run, as on the command line")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a GPU")
    matmul = matmul_flops()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "matmul_tflops": round(matmul / 1e12, 1),
        "mfu_counts": "4N a token for LoRA, 6N where all is trained, attention within documents added; of matmul_tflops",
    }
    variants = {name: VARIANTS[name] for name in arguments.variants}
    if arguments.workers is not None:
        variants = {name: replace(variant, workers=arguments.workers) for name, variant in variants.items()}
    measures = {
        name: partial(measured, name, variant, arguments.set, arguments.steps, matmul, arguments.profile)
        for name, variant in variants.items()
    }
    for name, result in each(measures):
        results[name] = result
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
