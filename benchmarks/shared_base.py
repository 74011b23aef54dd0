"""Trials in one pass over one base (tune.share_base) against a trial alone: tokens a second of all of them, by tokens a step.

    scripts/bench shared_base [--trials 8] [--tokens 256 512 1024 4096] [--layers N] [--set KEY=VALUE ...]

Random weights: on a GPU in the shape of Llama-3-8B, on a CPU in that of SmolLM2-135M with 4 of its 30 layers. LoRA of rank 8 on
all linear layers; documents of at most 512 tokens, the last quarter of each trained. Steps are the loops' own (one_step of
train.loop and of train.together): forward, backward, clipping, AdamW. Both kinds take turns, and the best step of each counts.
`gain`: how many times the tokens of a trial alone all trials together make; trials one after another make 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from gpu import LORA, SHAPES

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import collate
from raytune_llm.data.steps import Step
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.models.shared_pass import OneOfSeveral, SharedPass
from raytune_llm.runs.build import Builder
from raytune_llm.stages import STAGES
from raytune_llm.train import loop, together
from raytune_llm.train.checkpoint import Progress
from raytune_llm.train.clock import Clock
from raytune_llm.train.optimizers import optimizer_of
from raytune_llm.train.strategies.base import Precision
from raytune_llm.train.strategies.in_bank import InBank
from raytune_llm.train.window import Window

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
DOCUMENT = 512
"""Tokens, at most."""


def make_run(shape: dict[str, Any], tokens: int, settings: Sequence[str]) -> TrainRun:
    config = "++model.config={" + ",".join(f"{key}:{str(value).lower()}" for key, value in shape.items()) + "}"
    return load_config(
        "train",
        [
            "model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", "data.path=none", "resources=inline",
            "train.global_batch_size=1", "train.micro_batch_size=1", f"data.max_length={tokens}", config, *LORA, *settings,
        ],
    )  # fmt: skip


def make_step(tokens: int, vocab_size: int) -> Step:
    random = np.random.default_rng(0)
    lengths = [min(DOCUMENT, tokens)] * (tokens // min(DOCUMENT, tokens))
    line = [(random.integers(0, vocab_size, length), np.array([length - length // 4, length])) for length in lengths]
    batch = collate([line], length=tokens, pad_id=0, sample_ids=(0,))
    return Step(
        epoch=0, cursor=0, fraction=0.0, batches=[batch], first_rows=[0], num_rows=1, count=len(batch.trained_N), tokens=tokens,
        sample_ids=(0,),
    )  # fmt: skip


def alone(run: TrainRun, step: Step, device: torch.device) -> Callable[[], None]:
    """One step of a trial by itself."""
    built = Builder(run, load_model_config(None, run.model.config), device).build()
    built.strategy.model.train()
    learner = loop.Learner(strategy=built.strategy, objective=STAGES["sft"].objective(run.stage), device=device)
    return partial(loop.one_step, learner, step, Window(device, {}), lr=1e-5, seed=0)


def in_one_pass(run: TrainRun, step: Step, trials: int, device: torch.device) -> Callable[[], Any]:
    """One step of all trials."""
    policy, _, _ = Builder(run, load_model_config(None, run.model.config), device, together=[run] * trials).policy()
    assert isinstance(policy, CausalLM)
    policy.train()
    pass_, members = SharedPass(policy), []
    settings: Any = loop.LoopSettings(
        total_steps=10**6, pause_step=None, learning_rate=lambda step: 1e-5, log_every=10**6, eval_every=None,
        eval_on_start=False, save_every=None, save_best=False, early_stopping=None, max_nonfinite_steps=0, seed=0,
    )  # fmt: skip
    for number in range(trials):
        pass_.bank.add(f"trial{number}", run.adapter, seed=number)
        strategy = InBank(
            pass_,
            OneOfSeveral(pass_, f"trial{number}", None),
            partial(optimizer_of, run.optimizer, fused=True),
            device=device,
            precision=Precision(policy.compute),
            max_grad_norm=run.train.max_grad_norm,
        )
        members.append(
            together.Member(
                strategy=strategy,
                objective=STAGES["sft"].objective(run.stage),
                enrichers=(),
                progress=Progress(),
                settings=settings,
                hooks=loop.Hooks(log=print, save=print, sample=print),
                clock=Clock(),
                window=Window(device, {}),
            )
        )
    return partial(together.one_step, pass_, members, step)


def timed(step: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_gib(device: torch.device) -> dict[str, float]:
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if device.type == "cuda" else {}


def measure(
    shape: dict[str, Any], tokens: int, trials: int, steps: int, settings: Sequence[str], device: torch.device
) -> dict[str, float]:
    run = make_run(shape, tokens, settings)
    step = make_step(tokens, shape["vocab_size"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    many = in_one_pass(run, step, trials, device)
    timed(many, device)
    memory = peak_gib(device)
    one = alone(run, step, device)
    timed(one, device)
    seconds = [(timed(one, device), timed(many, device)) for _ in range(steps)]
    one_s, many_s = (min(times) for times in zip(*seconds, strict=True))
    return {
        "alone_tokens_per_s": round(tokens / one_s, 1),
        "together_tokens_per_s": round(trials * tokens / many_s, 1),
        "gain": round(trials * one_s / many_s, 2),
        **memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 4096])
    parser.add_argument("--steps", type=int, default=None, help="that are timed of each kind: 8, on a GPU 20")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the run, as on the command line")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    shape = dict(SHAPES["llama3_8b"] if on_gpu else SMOLLM2)
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    steps = arguments.steps or (20 if on_gpu else 8)
    results: dict[str, Any] = {"trials": arguments.trials, "layers": shape["num_hidden_layers"]}
    for tokens in arguments.tokens:
        results[f"tokens_{tokens}"] = measure(shape, tokens, arguments.trials, steps, arguments.set, device)
        print(tokens, results[f"tokens_{tokens}"], file=sys.stderr, flush=True)
        gc.collect()
        if on_gpu:
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
