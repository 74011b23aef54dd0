"""Adapters and quantized bases on one GPU: the cost of a step beside LoRA's, and what fits. Random weights, published shapes.

    python -m benchmarks gpu_shelf [--only NAME ...] [--steps 6] [--tiny]

lora, dora, oft: Llama-3-8B's shape, one pack of 4,096 tokens, nothing recomputed. 70b, 32b: NF4, rank 16, packs of 2,048 tokens,
all recomputed; weights are drawn and quantized a layer at a time, so that it is never there in bf16. mixture, mixture_peft:
half of Qwen3-30B-A3B's layers with LoRA on attention and experts; the second is the same adapter in transformers and PEFT, over
rows padded to the longest of 16. Rows are as long as Alpaca's, and tokens/s are of real tokens. --tiny: small shapes, on a CPU
too, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from statistics import median
from typing import Any, Self

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from gpu import LLAMA, LORA, Variant, config_of, each, make_steps, shape_setting
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.models.adapters.method import new_config
from raytune_llm.models.adapters.methods import method_of
from raytune_llm.models.build import ForTraining, build_policy
from raytune_llm.models.load import load_model
from raytune_llm.models.shared import SharedModel
from raytune_llm.models.stored import Stored, bring, model_in_files
from raytune_llm.runs.build import Builder
from raytune_llm.stages import STAGES
from raytune_llm.train.loop import Learner, one_step
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.strategies import spread
from raytune_llm.train.strategies.base import Strategy, Training
from raytune_llm.train.window import Window

QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "rope_theta": 1000000.0, "max_position_embeddings": 32768}
MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "max_position_embeddings": 40960,
}
HEADS_70B = {"num_attention_heads": 64, "num_key_value_heads": 8}
HEADS_32B = {"num_attention_heads": 40, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": LLAMA | HEADS_70B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    "32b": QWEN2 | HEADS_32B | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64},
    "mixture": MIXTURE,
}
TINY = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_MIXTURE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
TINY_DENSE = {"intermediate_size": 256}

NF4 = ("adapter=lora", "adapter.rank=16", "adapter.alpha=32", "quantization=bnb_nf4", "train.activation_checkpointing=full")
ON_EXPERTS = (
    *LORA,
    "adapter.targets=[q_proj,k_proj,v_proj,o_proj]",
    "adapter.experts=true",
    "train.activation_checkpointing=full",
)
ROWS_TOGETHER = 16


@dataclass(frozen=True)
class Case:
    shape: str
    settings: tuple[str, ...]
    length: int
    packs: int = 1


ALONE = "train.activation_checkpointing=none"
CASES = {
    "lora": Case("8b", (*LORA, ALONE), 4096),
    "dora": Case("8b", ("adapter=dora", *LORA[1:], ALONE), 4096),
    "oft": Case("8b", ("adapter=oft", ALONE), 4096),
    "32b": Case("32b", NF4, 2048),
    "70b": Case("70b", NF4, 2048),
    "mixture": Case("mixture", ON_EXPERTS, 4096),
    "mixture_peft": Case("mixture", ON_EXPERTS, 4096),
}


class Drawn(Stored):
    """A weight that is drawn when it is read, in place of one in a file."""

    @classmethod
    def of(cls, weight: nn.Parameter, file: str, key: str) -> Self:
        return super().of(weight, file, key)

    def read(self, device: torch.device) -> nn.Parameter:
        drawn = torch.empty(self.shape, device=device, dtype=self.dtype)
        if self.key.endswith("norm.weight"):
            drawn.fill_(1.0)
        elif self.key.endswith("bias"):
            drawn.zero_()
        else:
            drawn.normal_(std=0.02)
        return nn.Parameter(drawn, requires_grad=self.requires_grad)


class DrawnModel(SharedModel):
    """Gives a model without weights, each of which is drawn where it is read."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self._config = config

    def copy_of(self, key: str, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        names = (
            name
            for name, _ in load_model(
                self._config, None, weights="random", dtype=torch.bfloat16, seed=0, device="meta"
            ).named_parameters()
        )
        files = dict.fromkeys(names, "")
        model = model_in_files(AutoModelForCausalLM, self._config, "", files, dtype=torch.bfloat16, trust_remote_code=False)
        for module in model.modules():
            for name, weight in module._parameters.items():
                if isinstance(weight, Stored):
                    module._parameters[name] = Drawn.of(weight, "", weight.key)
        model.tie_weights()
        return model


def make_run(case: Case, *, tiny: bool) -> tuple[TrainRun, Variant]:
    shape, length = SHAPES[case.shape], case.length
    if tiny:
        shape = shape | TINY | (TINY_MIXTURE if case.shape == "mixture" else TINY_DENSE)
        length = 2048
    base = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", "data.path=none", "resources=inline"]
    config = shape_setting(shape)
    sizes = [f"train.global_batch_size={case.packs}", f"train.micro_batch_size={case.packs}", f"data.max_length={length}"]
    run = load_config("train", [*base, config, *sizes, "train.seed=0", "train.precision=bf16", *case.settings])
    return run, Variant("", (), packs=case.packs, length=length)


def quantized(run: TrainRun, config: PretrainedConfig, device: torch.device) -> Strategy:
    """As Builder builds it, of weights that are drawn a layer at a time."""
    policy, _ = build_policy(
        config,
        run.model,
        run.adapter,
        compute=torch.bfloat16,
        seed=0,
        device=device,
        runs_on=device,
        quantization=run.quantization,
        training=ForTraining(compile_layers=device.type == "cuda", activation_checkpointing="full"),
        shared=DrawnModel(config),
    )
    bring(policy.model, device)
    optimizer = partial(build_optimizer, run.optimizer, lr_factor=policy.adapters.lr_factor)
    return spread(run.strategy, policy, optimizer, Training(device, torch.bfloat16, run.train.max_grad_norm))


def ours(case: Case, *, steps: int, tiny: bool, device: torch.device) -> dict[str, Any]:
    run, variant = make_run(case, tiny=tiny)
    config = config_of(run)
    draws = run.quantization.replaces_layers
    strategy = quantized(run, config, device) if draws else Builder(run, config, device).build().strategy
    strategy.model.train()
    learner = Learner(strategy=strategy, objective=STAGES[run.stage.name].objective(run.stage), device=device)
    window, made = Window(device, {}), cycle(list(make_steps(variant, config.vocab_size)))

    def advance() -> int:
        step = next(made)
        one_step(learner, step, window, lr=1e-5, seed=0)
        return step.tokens

    result = timed(advance, steps, device)
    total, count = window.read()["loss"]
    return {**result, "loss": round(total / count, 4), "parameters": sum(p.numel() for p in strategy.module.parameters())}


def in_peft(case: Case, *, steps: int, tiny: bool, device: torch.device) -> dict[str, Any]:
    """The loop that one writes around transformers and PEFT: rows padded to the longest, labels, AdamW."""
    run, variant = make_run(case, tiny=tiny)
    config = config_of(run)
    torch.manual_seed(0)
    with device:
        base: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.config.use_cache = False
    model: Any = get_peft_model(base, new_config(base, run.adapter, method_of(run.adapter))[0])  # type: ignore[arg-type]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    batches = cycle(list(padded(variant, config.vocab_size, device)))

    def advance() -> int:
        batch, tokens = next(batches)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens

    return timed(advance, steps, device)


def padded(variant: Variant, vocab_size: int, device: torch.device) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The rows of the packed steps, in order, ROWS_TOGETHER in a batch."""
    rows = []
    for step in make_steps(variant, vocab_size):
        batch = step.batches[0]
        ids_L, bounds = batch.ids_BT.flatten(), batch.cu_seqlens_S.tolist()
        labels_L = torch.full_like(ids_L, -100)
        labels_L[batch.trained_N + 1] = batch.targets_N
        documents = [(ids_L[a:b], labels_L[a:b]) for a, b in pairwise(bounds)]
        rows += [(ids, labels) for ids, labels in documents if (labels >= 0).any()]
        if len(rows) >= 20 * ROWS_TOGETHER:
            break
    for start in range(0, len(rows) - ROWS_TOGETHER + 1, ROWS_TOGETHER):
        some = rows[start : start + ROWS_TOGETHER]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        batch = {
            "input_ids": pad([ids for ids, _ in some]),
            "labels": pad([labels for _, labels in some], padding_value=-100),
            "attention_mask": pad([torch.ones_like(ids) for ids, _ in some]),
        }
        yield {name: value.to(device) for name, value in batch.items()}, sum(len(ids) for ids, _ in some)


def timed(advance: Callable[[], int], steps: int, device: torch.device) -> dict[str, Any]:
    """The first three steps, which compile and choose kernels, are left out."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    began = time.perf_counter()
    for _ in range(3):
        advance()
    wait()
    seconds, tokens, first_s = [], 0, time.perf_counter() - began
    for _ in range(steps):
        at = time.perf_counter()
        tokens += advance()
        wait()
        seconds.append(time.perf_counter() - at)
    peak = {}
    if device.type == "cuda":
        peak = {
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
    return {
        "step_s": round(median(seconds), 4),
        "tokens_per_s": round(tokens / sum(seconds)),
        "warmup_s": round(first_s, 1),
        **peak,
    }


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Of those that ran."""
    found: dict[str, tuple[str, str, str]] = {
        "dora_step_over_lora": ("dora", "lora", "step_s"),
        "oft_step_over_lora": ("oft", "lora", "step_s"),
        "mixture_over_peft": ("mixture", "mixture_peft", "tokens_per_s"),
    }
    return {
        name: round(results[a][key] / results[b][key], 3)
        for name, (a, b, key) in found.items()
        if key in results.get(a, {}) and key in results.get(b, {})
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("benchmarks/gpu_shelf.py needs a GPU")
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none"}
    settings = {"steps": arguments.steps, "tiny": arguments.tiny, "device": device}
    measures = {name: partial(in_peft if name == "mixture_peft" else ours, CASES[name], **settings) for name in arguments.only}
    for name, result in each(measures):
        results[name] = result
        torch._dynamo.reset()  # holds the model that it compiled
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    results |= ratios(results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
