"""Memory of each optimizer's state, over AdamW's, in a full fine-tune of SmolLM2-135M's shape. Goals: 8 bits at most 0.3, GaLore
and APOLLO of rank 64 at most 0.45, Adam-mini 0.55, BAdam 0.2, Muon 0.55. And of gradients, with optimizer.layerwise and without.

    python benchmarks/optimizers.py

Prints JSON. Each takes one step with random gradients, and the tensors that it then holds are counted; `planned` is what plan
counts with. Gradients are counted whenever one more is complete in a backward pass over 16 tokens.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.config.load import load_config
from raytune_llm.config.optimizer import TrainedShape
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.optimizers.groups import trained_in
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.ddp import DDPStrategy

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
CASES = {
    "adamw": ["optimizer=adamw"],
    "adafactor": ["optimizer=adafactor"],
    "adam_mini": ["optimizer=adam_mini"],
    "adamw_8bit": ["optimizer=adamw_8bit"],
    "adamw_bf16": ["optimizer=adamw_bf16"],
    "apollo": ["optimizer=apollo"],
    "apollo_mini": ["optimizer=apollo_mini"],
    "badam": ["optimizer=badam"],
    "galore": ["optimizer=galore"],
    "lion": ["optimizer=lion"],
    "muon": ["optimizer=muon"],
    "muon_bf16_moments": ["optimizer=muon", "optimizer.adamw_moments=bfloat16"],
    "schedule_free": ["optimizer=schedule_free", "schedule=constant"],
    "sgd": ["optimizer=sgd"],
    "adalomo": ["optimizer=adalomo", "train.max_grad_norm=null"],
    "lomo": ["optimizer=lomo", "train.max_grad_norm=null"],
}


def measured(model: torch.nn.Module, overrides: list[str]) -> dict[str, Any]:
    settings = load_config("train", ["data.path=rows.jsonl", *overrides]).optimizer
    optimizer = build_optimizer(settings, model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    shapes = [TrainedShape(tuple(one.parameter.shape), one.layer) for one in trained_in(model)]
    return {"state_mib": round(held / 2**20, 1), "planned": round(sum(settings.state_bytes(shapes)) / 2**20, 1)}


def gradients(*, layerwise: bool) -> float:
    """The most MiB that are there at once."""
    torch.manual_seed(0)
    policy = CausalLM(AutoModelForCausalLM.from_config(SMOLLM2, dtype=torch.float32))
    settings = load_config("train", ["data.path=rows.jsonl", "optimizer=adamw"]).optimizer
    parameters, held = list(policy.parameters()), [0]
    for parameter in parameters:  # before the hooks of the strategy, which free it
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        )
    strategy = DDPStrategy(
        policy,
        partial(build_optimizer, settings),
        Training(torch.device("cpu"), torch.float32, max_grad_norm=None, layerwise=layerwise),
    )
    strategy.backward(policy.base(torch.arange(16)[None]).logits.logsumexp(-1).mean(), settings.lr)
    strategy.step(settings.lr)
    return round(max(held) / 2**20, 1)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SMOLLM2, dtype=torch.float32)
    results = {name: measured(model, overrides) for name, overrides in CASES.items()}
    adamw = results["adamw"]["state_mib"]
    found = {name: {**one, "over_adamw": round(one["state_mib"] / adamw, 3)} for name, one in results.items()}
    del model
    found["gradients"] = {"plain_mib": gradients(layerwise=False), "layerwise_mib": gradients(layerwise=True)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
