"""Training steps on one GPU or several: random weights in the shape of a published model, documents as long as Alpaca's in packs.

    scripts/bench gpu [--variants NAME ...] [--steps 8] [--workers N] [--limit-s 180] [--profile FOLDER] [--set KEY=VALUE ...]

Variants of several workers take all GPUs of the machine, or --workers of them: processes of their own, which are ended when the
limit is over. One that would not fit by the project's estimate, runs out of memory or fails says so, and the others run. --tiny
tries the script: small shapes, on a CPU too.

Prints JSON: for each variant real tokens/s of a worker (padding not counted), the median step, peak memory and mfu: 4 operations
a frozen weight and token (6 a trained one), and 12 for each number of the query heads as often as there are query-key pairs,
against the rate of a bf16 8192 x 8192 x 8192 product measured just before (memory/flops.py). Steps are the loop's own
(`train.loop.one_step`): forward, backward, clipping, fused AdamW, metrics.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
from transformers import PretrainedConfig

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import collate, pinned
from raytune_llm.data.packing import plan
from raytune_llm.data.samples import JOINED_MULTIPLE
from raytune_llm.data.steps import Step
from raytune_llm.memory.footprint import GIB
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.report.profile import TABLE, StepProfile
from raytune_llm.runs.build import Builder
from raytune_llm.runs.ray_group import COLLECTIVES
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
SHAPES: dict[str, dict[str, Any]] = {
    "llama3_8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama3_2_1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "tiny": LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 1024},
    "llama3_70b": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
    },
}
"""Llama-3-8B and 70B, Llama-3.2-1B, Qwen3-30B-A3B, entry by entry."""
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def shape_of(name: str, *, tiny: bool) -> dict[str, Any]:
    """A shape by its name, or the same kind of model with TINY's numbers."""
    shape = SHAPES[name]
    return shape | {key: value for key, value in TINY.items() if key in shape} if tiny else shape


def shape_setting(shape: Mapping[str, Any]) -> str:
    return "++model.config={" + ",".join(f"{key}:{str(value).lower()}" for key, value in shape.items()) + "}"


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
    several: bool = False
    """On as many workers as there are, or are asked for."""


LORA = ("adapter=lora", "adapter.rank=8", "adapter.alpha=16", "adapter.dropout=0.0")
ALL_FP8 = ("quantization=fp8", "quantization.skip_modules=[]")
RANK_16 = ("adapter=lora", "adapter.rank=16", "adapter.alpha=32", "adapter.dropout=0.0", "strategy=fsdp")
FULL_8B = ("adapter=none", "strategy=fsdp")
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
    "lora_ddp": Variant("llama3_8b", LORA, several=True),
    "full_8b": Variant("llama3_8b", FULL_8B, 1, 8192, True, several=True),
    "full_8b_fp8": Variant("llama3_8b", (*FULL_8B, *ALL_FP8), 1, 8192, True, several=True),
    "lora_70b": Variant("llama3_70b", RANK_16, 1, several=True),
    "lora_70b_fp8": Variant("llama3_70b", (*RANK_16, *ALL_FP8), 1, several=True),
    "lora_30b_a3b": Variant("qwen3_30b_a3b", RANK_16, several=True),
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
    *(name for name, variant in VARIANTS.items() if variant.several),
)


def make_run(variant: Variant, settings: list[str], *, tiny: bool) -> TrainRun:
    base = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", "data.path=none"]
    config = [shape_setting(shape_of(variant.shape, tiny=tiny))]
    resources = "resources=inline" if variant.workers == 1 else "resources=local"
    sizes = [f"train.global_batch_size={variant.packs * variant.workers}", f"train.micro_batch_size={variant.packs}"]
    lengths = [f"data.max_length={variant.length}", "train.seed=0"]
    return load_config("train", [*base, *config, resources, *sizes, *lengths, *variant.overrides, *settings])


def config_of(run: TrainRun) -> PretrainedConfig:
    config = load_model_config(None, run.model.config)
    if config.model_type == "qwen3_moe":
        config.head_dim = 128  # in its config.json, though its class does not declare it
    return config


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


class Marks:
    """Moments of a device's work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def record(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def between(self) -> list[float]:
        """Seconds between them, once the device has come to the last."""
        if not self._on_gpu:
            return [b - a for a, b in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(self._marks)]


def measure(
    name: str,
    variant: Variant,
    settings: list[str],
    num_steps: int,
    matmul: float,
    trace: Path | None,
    tiny: bool,
    device: torch.device,
) -> dict[str, Any]:
    began = time.perf_counter()
    run = make_run(variant, settings, tiny=tiny)
    config = config_of(run)
    builder = Builder(run, config, device)
    if not builder.fits:
        fits = f"an estimated {builder.estimated_bytes / GIB:.1f} GiB of {builder.usable_bytes / GIB:.1f} usable"
        return {"would_not_fit": f"{fits} a worker, with activation checkpointing {builder.needs.checkpointing}"}
    built = builder.build()
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
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    num_steps = max(1, min(num_steps, variant.warmup + 2))
    marks = Marks(device)
    started = time.perf_counter()
    tokens = attention_pairs = 0
    marks.record()
    for _ in range(num_steps):
        tokens, attention_pairs = (a + b for a, b in zip((tokens, attention_pairs), advance(1), strict=True))
        marks.record()
    issued = time.perf_counter() - started
    steps_s = marks.between()
    seconds = time.perf_counter() - started
    result = {
        "tokens_per_s": round(tokens / seconds),
        "step_s": round(median(steps_s), 4),
        "issue_s": round(issued / num_steps, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else 0.0,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else 0.0,
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


def measure_in_group(rank: int, world: int, folder: str, trace: Path | None, *measured: Any) -> None:
    """One of several workers of this machine, in a process group of its own. The first writes the result."""
    os.setsid()
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(COLLECTIVES[device.type], init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    name, variant, settings, num_steps, matmul, tiny = measured
    result = measure(name, variant, settings, num_steps, matmul, None if trace is None else trace / f"rank_{rank}", tiny, device)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def measured(
    name: str,
    variant: Variant,
    settings: list[str],
    num_steps: int,
    matmul: float,
    trace: Path | None,
    *,
    tiny: bool,
    limit_s: float,
) -> dict[str, Any]:
    """Tokens/s are a worker's where there are several. limit_s: for those, after which they are ended."""
    if torch.cuda.is_available() and variant.workers > torch.cuda.device_count():
        return {"not_run": f"needs {variant.workers} GPUs"}
    if not variant.several:
        return measure(name, variant, settings, num_steps, matmul, trace, tiny, device_of(0))
    with tempfile.TemporaryDirectory() as folder:
        together(variant.workers, limit_s, folder, trace, name, variant, settings, num_steps, matmul, tiny)
        return json.loads((Path(folder) / "result.json").read_text())


def together(workers: int, limit_s: float, *arguments: Any) -> None:
    """measure_in_group in so many processes. Raises what one of them raises; none is left, nor what they started."""
    ends = time.monotonic() + limit_s
    context = torch.multiprocessing.spawn(measure_in_group, (workers, *arguments), nprocs=workers, join=False)
    assert context is not None  # without join, there is one
    try:
        while not context.join(timeout=1):
            if time.monotonic() > ends:
                raise TimeoutError(f"not done after {limit_s:g} s")
    finally:
        for process in filter(None, context.processes):
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


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
    """Operations a second of a large bf16 product on the GPU, the best of five rounds."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            torch.matmul(a, b)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1000))
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="+", default=list(COMPARED), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, help="of the variants of several; all GPUs")
    parser.add_argument("--limit-s", type=float, default=180, help="of a variant of several workers")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the run, as on the command line")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        sys.exit("benchmarks/gpu.py needs a GPU, or --tiny")
    matmul = matmul_flops() if on_gpu else 1e12
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "matmul_tflops": round(matmul / 1e12, 1),
        "mfu_counts": "4N a token for LoRA, 6N where all is trained, attention within documents added; of matmul_tflops",
    }
    workers = arguments.workers or max(2, torch.cuda.device_count())
    variants = {name: VARIANTS[name] for name in arguments.variants}
    variants = {name: replace(found, workers=workers) if found.several else found for name, found in variants.items()}
    measures = {
        name: partial(
            measured,
            *(name, variant, arguments.set, arguments.steps, matmul, arguments.profile),
            tiny=arguments.tiny,
            limit_s=arguments.limit_s,
        )
        for name, variant in variants.items()
    }
    for name, result in each(measures):
        results[name] = result | ({"workers": workers} if variants[name].several else {})
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    one, several = (results.get(name, {}).get("tokens_per_s") for name in ("lora", "lora_ddp"))
    if one and several:
        results["lora_ddp"]["times_one"] = round(workers * several / one, 3)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
