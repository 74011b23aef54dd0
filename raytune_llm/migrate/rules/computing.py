"""Precision, compilation, and the strategy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_llm.migrate.argument_rules import Refusal, Settings
from raytune_llm.migrate.rules.values import LATER, Find, listed


def precision(bf16: bool, fp16: bool, pure_bf16: bool) -> Settings:
    if fp16 and (bf16 or pure_bf16):
        raise Refusal("can't be combined with bf16", "fp16")
    return {"train.precision": "bf16" if bf16 or pure_bf16 else "fp16" if fp16 else "auto"}


def activation_checkpointing(disable_gradient_checkpointing: bool, use_unsloth_gc: bool) -> Settings:
    """There, it is on unless it is disabled. `auto` takes it where the model would not fit without."""
    chosen = "offload" if use_unsloth_gc else "none" if disable_gradient_checkpointing else "auto"
    return {"train.activation_checkpointing": chosen}


def compiled(torch_compile: bool) -> Settings:
    return {"train.compile": True if torch_compile else "auto"}


SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "ds_z0_config.json": {"zero_optimization": {"stage": 0}},
    "ds_z2_config.json": {"zero_optimization": {"stage": 2}},
    "ds_z2_offload_config.json": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "ds_z2_autotp_config.json": {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}},
    "ds_z3_config.json": {"zero_optimization": {"stage": 3}},
    "ds_z3_fp8_config.json": {"zero_optimization": {"stage": 3}},
    "ds_z3_offload_config.json": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
}
"""What matters in the files of examples/deepspeed of LLaMA-Factory, for where they are not at hand."""


def strategy(
    deepspeed: str | Mapping[str, Any] | None,
    fsdp: str | bool | Sequence[str] | None,
    fsdp_config: str | Mapping[str, Any] | None,
    find: Find,
) -> Settings:
    if deepspeed and fsdp:
        raise Refusal("can't be combined with deepspeed", "fsdp")
    if deepspeed:
        return _zero(_read_json(deepspeed, "deepspeed", find))
    if fsdp:
        config = {} if fsdp_config is None else _read_json(fsdp_config, "fsdp_config", find)
        return _fsdp("full_shard" if fsdp is True else fsdp, config)
    return {"strategy": "ddp"}


def _zero(config: Mapping[str, Any]) -> Settings:
    if sections := [name for name in ("optimizer", "scheduler") if name in config]:
        raise Refusal(f"its section {sections[0]} would override the arguments; leave it out", "deepspeed")
    if int(config.get("tensor_parallel", {}).get("autotp_size", 1)) > 1:
        raise Refusal(f"tensor parallelism {LATER}", "deepspeed")
    zero = config.get("zero_optimization", {})
    level = int(zero.get("stage", 0))
    devices = {str((zero.get(part) or {}).get("device", "none")) for part in ("offload_optimizer", "offload_param")}
    if "nvme" in devices:
        raise Refusal("offloading to disks (nvme) is not here", "deepspeed")
    if not level:
        return {"strategy": "ddp"}
    return {"strategy": f"zero{level}", "strategy.offload": "cpu" in devices}


def _fsdp(fsdp: str | Sequence[str], config: Mapping[str, Any]) -> Settings:
    options = listed(fsdp, separator=r"[\s,]+")
    if hybrid := [option for option in options if option.startswith("hybrid")]:
        raise Refusal(f"{hybrid[0]}: say full_shard here and set strategy.shard_workers to the GPUs of a node", "fsdp")
    if "no_shard" in options:
        return {"strategy": "ddp"}
    said = {key.removeprefix("fsdp_"): str(value).lower() for key, value in config.items()}
    kept = "shard_grad_op" in options or said.get("reshard_after_forward") in ("false", "shard_grad_op")
    offload = "offload" in options or said.get("offload_params") == "true"
    return {"strategy": "fsdp", "strategy.reshard": "grad_only" if kept else "full", "strategy.offload": offload}


def _read_json(value: str | Mapping[str, Any], argument: str, find: Find) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    found = find(value)
    if found is None:
        if Path(value).name not in SHIPPED:
            raise Refusal("there is no such file", argument)
        return SHIPPED[Path(value).name]
    try:
        read = json.loads(Path(found).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"can't be read ({error})", argument) from None
    if not isinstance(read, dict):
        raise Refusal("must hold a JSON object", argument)
    return read
