"""Training steps on one GPU: random weights in the shape of a published model, packs of documents as long as Alpaca's.

    python benchmarks/gpu.py [--variants NAME ...] [--steps 8] [--profile FOLDER] [--set KEY=VALUE ...]

Prints JSON: for each variant real tokens/s (padding not counted), the median step, peak memory and mfu, which counts 4 operations
a frozen weight and token (6 a trained one), attention left out, against the rate of a bf16 8192 x 8192 x 8192 product measured
just before. Steps are the loop's own (`train.loop.one_step`): forward, backward, clipping, fused AdamW, metrics.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import collate, pinned
from raytune_llm.data.loader import Step
from raytune_llm.data.packing import plan
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.models.policy import build_policy, compute_dtype
from raytune_llm.stages import STAGES
from raytune_llm.train.flops import flops_per_token
from raytune_llm.train.loop import one_step
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.strategies import spread
from raytune_llm.train.strategies.base import Precision
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
    warmup: int = 6


LORA = ("adapter=lora", "adapter.rank=8", "adapter.alpha=16", "adapter.dropout=0.0")
COMPILED = ("train.compile=true",)
VARIANTS = {
    "lora_eager": Variant("llama3_8b", LORA),
    "lora": Variant("llama3_8b", LORA + COMPILED),
    "lora_selective": Variant("llama3_8b", (*LORA, *COMPILED, "train.activation_checkpointing=selective")),
    "lora_full": Variant("llama3_8b", (*LORA, *COMPILED, "train.activation_checkpointing=full")),
    "lora_offload": Variant("llama3_8b", (*LORA, *COMPILED, "train.activation_checkpointing=offload")),
    "lora_fp8": Variant("llama3_8b", (*LORA, *COMPILED, "quantization=fp8")),
    "qlora": Variant("llama3_8b", (*LORA, *COMPILED, "quantization=bnb_nf4")),
    "qlora_full": Variant("llama3_8b", (*LORA, *COMPILED, "quantization=bnb_nf4", "train.activation_checkpointing=full")),
    "lora_131072": Variant("llama3_8b", (*LORA, *COMPILED, "train.activation_checkpointing=offload"), 1, 131072, True, 0),
    "full_1b": Variant("llama3_2_1b", ("adapter=none", *COMPILED), packs=4),
}

COMPARED = ("lora", "lora_full", "lora_fp8", "qlora", "qlora_full", "full_1b")


def make_run(variant: Variant, settings: list[str]) -> TrainRun:
    base = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", "data.path=none", "resources=inline"]
    shape = ["++model.config={" + ",".join(f"{key}:{str(value).lower()}" for key, value in SHAPES[variant.shape].items()) + "}"]
    return load_config("train", [*base, *shape, "strategy=ddp", *variant.overrides, *settings])


def make_steps(variant: Variant, vocab_size: int) -> Iterator[Step]:
    """One micro-batch a step, with documents of the recorded lengths and trained tokens, four times over."""
    random = np.random.default_rng(0)
    rows = np.array(json.loads((Path(__file__).parent / "_alpaca_lengths.json").read_text())["rows"] * 4)
    if variant.one_document:
        rows = np.array([[variant.length, variant.length // 2]])
    packs = plan(rows[:, 0], variant.length)
    order = random.permutation(len(packs)) if len(packs) > 1 else np.zeros(variant.packs, int)
    for start in range(0, len(order) - variant.packs + 1, variant.packs):
        lines = [
            [
                (random.integers(0, vocab_size, tokens), np.array([tokens - trained, tokens]))
                for tokens, trained in rows[packs[pack]]
            ]
            for pack in order[start : start + variant.packs]
        ]
        batch = pinned(collate(lines, length=variant.length, pad_id=0, sample_ids=(start,)))
        tokens = sum(len(ids) for line in lines for ids, _ in line)
        yield Step(epoch=0, cursor=0, batches=[batch], count=len(batch.trained_N), tokens=tokens, sample_ids=(start,))


def measure(
    name: str, variant: Variant, settings: list[str], num_steps: int, matmul: float, trace: Path | None
) -> dict[str, Any]:
    device = torch.device("cuda")
    began = time.perf_counter()
    run = make_run(variant, settings)
    config = load_model_config(None, run.model.config)
    policy, note = build_policy(
        config,
        run.model,
        run.adapter,
        compute=compute_dtype(run.train.precision, device),
        seed=0,
        device=device,
        quantization=run.quantization.name,
        compile_layers=run.train.compile,
        activation_checkpointing=run.train.activation_checkpointing,
    )
    flops = flops_per_token(policy, config)
    strategy = spread(
        run.strategy,
        policy,
        partial(build_optimizer, run.optimizer),
        device=device,
        precision=Precision(compute_dtype(run.train.precision, device)),
        max_grad_norm=run.train.max_grad_norm,
    )
    strategy.model.train()
    window = Window(device, {})
    steps = list(make_steps(variant, config.vocab_size))
    endless = cycle(steps)
    built = time.perf_counter()

    objective = STAGES["sft"].objective(load_config("train", ["data.path=rows.jsonl"]).stage)

    def advance(number: int) -> int:
        tokens = 0
        for step in islice(endless, number):
            one_step(strategy, objective, None, step, 1e-5, window, 0, device)
            tokens += step.tokens
        return tokens

    advance(1)
    first_loss = window.read()["loss"]
    ready = time.perf_counter()
    advance(variant.warmup)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    num_steps = min(num_steps, variant.warmup + 2)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    started = time.perf_counter()
    tokens = 0
    marks[0].record()
    for mark in marks[1:]:
        tokens += advance(1)
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
        "mfu": round(tokens / seconds * flops / matmul, 4),
        "tokens": round(tokens / num_steps),
        "loss": round(first_loss[0] / first_loss[1], 4),
        "loss_after": round((lambda pair: pair[0] / pair[1])(window.read()["loss"]), 4),
        "build": round(built - began, 1),
        "first_step": round(ready - built, 1),
        "attention": note,
    }
    if trace is not None:
        profiled(trace / f"{name}.txt", partial(advance, 2), 2)
    return result


KINDS = {
    "attention": ("flash", "fmha", "cudnn_generated"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK", "splitk", "gemv"),
    "optimizer and clipping": ("multi_tensor", "foreach"),
    "copies": ("Memcpy", "Memset"),
    "compiled": ("triton_",),
}
"""What a kernel is for, by a part of its name; the first that fits."""


def profiled(path: Path, work: Any, num_steps: int) -> None:
    """A table of the device's time a step by kind of kernel, then by kernel."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - started) * 1000
    kernels = [
        (event.key, event.self_device_time_total / 1000 / num_steps, event.count / num_steps)
        for event in seen.key_averages()
        if str(event.device_type).endswith("CUDA") and event.self_device_time_total > 0
    ]
    totals: dict[str, float] = {}
    for name, ms, _ in kernels:
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        totals[kind] = totals.get(kind, 0.0) + ms
    lines = [f"{ms:9.2f} ms  {kind}" for kind, ms in sorted(totals.items(), key=lambda item: -item[1])]
    lines.append(f"{wall_ms / num_steps - sum(totals.values()):9.2f} ms  idle or profiling")
    lines += [f"{ms:9.3f} ms {count:7.1f} x  {name[:170]}" for name, ms, count in sorted(kernels, key=lambda item: -item[1])[:60]]
    path.write_text("\n".join(lines) + "\n")
    print(f"-- {path.stem}", *lines[:45], sep="\n", file=sys.stderr)


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
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the run, as on the command line")
    arguments = parser.parse_args()
    matmul = matmul_flops()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "matmul_tflops": round(matmul / 1e12, 1)}
    for name in arguments.variants:
        try:
            results[name] = measure(name, VARIANTS[name], arguments.set, arguments.steps, matmul, arguments.profile)
        except torch.cuda.OutOfMemoryError as error:
            results[name] = {"out_of_memory": str(error).splitlines()[0]}
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
