"""Memory of each optimizer's state, over AdamW's, in a full fine-tune of SmolLM2-135M's shape. Goals: 8 bits at most 0.3, GaLore
and APOLLO of rank 64 at most 0.45, Adam-mini 0.55, BAdam 0.2, Muon 0.55.

    python benchmarks/optimizers.py

Prints JSON. Each takes one step with random gradients, and the tensors that it then holds are counted; `planned` is what plan
counts with.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.config.load import load_config
from raytune_llm.config.optimizer import TrainedShape
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.optimizers.groups import trained_in

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


def main() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SMOLLM2, dtype=torch.float32)
    results = {name: measured(model, overrides) for name, overrides in CASES.items()}
    adamw = results["adamw"]["state_mib"]
    print(
        json.dumps(
            {name: {**found, "over_adamw": round(found["state_mib"] / adamw, 3)} for name, found in results.items()}, indent=2
        )
    )


if __name__ == "__main__":
    main()
