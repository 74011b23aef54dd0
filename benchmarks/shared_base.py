"""Trials in one pass over one base (tune.share_base) against a trial alone: tokens a second of all of them, by tokens a step.

    scripts/bench shared_base [--trials 8] [--tokens 256 512 1024 4096] [--layers N] [--steps N] [--set KEY=VALUE ...]

Random weights: on a GPU in the shape of Llama-3-8B, on a CPU in that of SmolLM2-135M with 4 of its 30 layers. LoRA of rank 8 on
all linear layers; documents of at most 512 tokens, the last quarter of each trained. Steps are the loops' own (one_step of
train.loop and of train.together): forward, backward, clipping, AdamW. The best step of each kind counts.

- `alone_tokens_per_s`, `together_tokens_per_s`, and on a GPU, for 256 tokens, both again with train.cuda_graphs=true.
- `gain`: how many times the tokens of a trial alone all trials together make; trials one after another make 1. `graphs_gain`:
  a trial alone with graphs against one without; `together_graphs_gain`: all together with graphs against one without.
- `peak_gib` of each kind: bytes of tensors at the highest. `nf4_together`: with `--nf4`, all trials over a base in 4 bits.
- `error` in place of a figure, where a kind could not be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from gpu import LORA, SHAPES, shape_setting

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
from raytune_llm.train.clock import Clock
from raytune_llm.train.optimizers import optimizer_of
from raytune_llm.train.progress import Progress
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.in_bank import InBank
from raytune_llm.train.window import Window

GRAPHS = ("train.cuda_graphs=true",)
GRAPHS_UP_TO = 256
"""Tokens of a step."""
NF4 = ("quantization=bnb_nf4",)
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
WARM_UP = 2
"""Steps that are not timed: layers are compiled, and graphs captured."""
DOCUMENT = 512
"""Tokens, at most."""


def make_run(shape: dict[str, Any], tokens: int, settings: Sequence[str]) -> TrainRun:
    config = shape_setting(shape)
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
    builder = Builder(run, load_model_config(None, run.model.config), device, together=[run] * trials)
    policy, _, _ = builder.policy()
    assert isinstance(policy, CausalLM)
    policy.train()
    pass_, members = SharedPass(policy, at_once=builder.at_once), []
    settings: Any = loop.LoopSettings(
        total_steps=10**6, pause_step=None, learning_rate=lambda step: 1e-5, log_every=10**6, eval_every=None, eval_steps=None,
        eval_on_start=False, save_every=None, save_best=False, early_stopping=None, max_nonfinite_steps=0, seed=0,
    )  # fmt: skip
    for number in range(trials):
        pass_.bank.add(f"trial{number}", run.adapter, seed=number)
        strategy = InBank(
            pass_,
            OneOfSeveral(pass_, f"trial{number}", None),
            partial(optimizer_of, run.optimizer, fused=True),
            Training(device, policy.compute, run.train.max_grad_norm),
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


def best_s(make: Callable[[], Callable[[], Any]], steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the fastest step and, on a GPU, the peak of memory; or the error. Nothing stays in memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        step, seconds = make(), []
        for _ in range(WARM_UP + steps):
            before = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - before)
        ready_s = time.perf_counter() - began - sum(seconds[WARM_UP:])
        found: dict[str, Any] = {"step": min(seconds[WARM_UP:]), "ready_s": round(ready_s, 1)}
    except Exception as error:  # of one kind: the others are measured all the same
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    step = None
    gc.collect()
    if on_gpu:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return found


def measure(
    kinds: Mapping[str, tuple[int, Sequence[str]]], shape: dict[str, Any], tokens: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """kinds: so many trials, with these settings, by name."""
    step, results = make_step(tokens, shape["vocab_size"]), {}
    for name, (trials, settings) in kinds.items():
        run = make_run(shape, tokens, settings)
        make = partial(alone, run, step, device) if trials == 1 else partial(in_one_pass, run, step, trials, device)
        found = best_s(make, steps, device)
        print(tokens, name, found, file=sys.stderr, flush=True)
        if "error" in found:
            results[f"{name}_error"] = found["error"]
        else:
            results[f"{name}_tokens_per_s"] = round(trials * tokens / found["step"], 1)
        if "peak_gib" in found:
            results[f"{name}_peak_gib"] = found["peak_gib"]
    return results


def with_gains(results: dict[str, Any]) -> dict[str, Any]:
    rates = {name.removesuffix("_tokens_per_s"): value for name, value in results.items() if name.endswith("_tokens_per_s")}
    names = {"together": "gain", "alone_graphs": "graphs_gain", "together_graphs": "together_graphs_gain"}
    gains = {gain: round(rates[name] / rates["alone"], 2) for name, gain in names.items() if {name, "alone"} <= rates.keys()}
    return results | gains


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 4096])
    parser.add_argument("--steps", type=int, default=None, help="that are timed of each kind: 8, on a GPU 20")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--nf4", action="store_true", help="measure the memory with a base in 4 bits, too")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the run, as on the command line")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    shape = dict(SHAPES["llama3_8b"] if on_gpu else SMOLLM2)
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    steps = arguments.steps or (20 if on_gpu else 8)
    plain, trials, tokens = tuple(arguments.set), arguments.trials, arguments.tokens
    found: dict[int, dict[str, Any]] = {}
    for length in tokens:
        found[length] = measure({"together": (trials, plain), "alone": (1, plain)}, shape, length, steps, device)
    if arguments.nf4:
        found[tokens[0]] |= measure({"nf4_together": (trials, (*plain, *NF4))}, shape, tokens[0], steps, device)
    graphs = (*plain, *GRAPHS)
    for length in tokens if on_gpu else ():  # last: a capture that fails may leave the device in disorder
        if length <= GRAPHS_UP_TO:
            kinds = {"alone_graphs": (1, graphs), "together_graphs": (trials, graphs)}
            found[length] |= measure(kinds, shape, length, steps, device)
    by_tokens = {f"tokens_{length}": with_gains(results) for length, results in found.items()}
    print(json.dumps({"trials": trials, "layers": shape["num_hidden_layers"], **by_tokens}, indent=2))


if __name__ == "__main__":
    main()
