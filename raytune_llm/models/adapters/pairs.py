"""LoRA's A and B of each layer: reading them from an adapter's folder and writing one, for exports to other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.bank_weights import A, B, Misfit, more_than_lora, scale_of
from raytune_llm.models.adapters.bank_weights import write as write_tensors
from raytune_llm.models.adapters.saved import PREFIX, WEIGHTS, read_config


@dataclass(frozen=True)
class Pair:
    a_RK: Tensor
    b_OR: Tensor
    scale: float
    """The factor of B A in the layer."""

    @property
    def rank(self) -> int:
        return len(self.a_RK)


def read(folder: str, setting: str, *, fix: str) -> dict[str, Pair]:
    """Layer name in the model -> its float32 matrices. Raises ConfigError, which names the setting, for an adapter that is more
    than LoRA on linear layers."""
    config = read_config(folder, setting)
    if (more := more_than_lora(config)) is not None:
        raise ConfigError(setting, f"must be plain LoRA to be written alone, and is {more}", got=folder, fix=fix)
    assert isinstance(config, LoraConfig)
    tensors = load_file(Path(folder) / WEIGHTS[0])
    pairs = {}
    for layer in sorted({name.partition(".lora_")[0].removeprefix(PREFIX) for name in tensors}):
        a_RK, b_OR = tensors.get(PREFIX + layer + A), tensors.get(PREFIX + layer + B)
        if a_RK is None or b_OR is None:
            rule = f"must be on linear layers to be written alone, and {layer} is not one"
            raise ConfigError(setting, rule, got=folder, fix=fix)
        try:
            pairs[layer] = Pair(a_RK.float(), b_OR.float(), scale_of(config, layer, len(a_RK)))
        except Misfit as misfit:
            raise ConfigError(setting, f"must be LoRA that PEFT reads ({misfit})", got=folder, fix=fix) from None
    return pairs


def write(folder: Path, pairs: Mapping[str, Pair]) -> None:
    """Write a folder as PEFT does for LoRA, with the scales folded into B."""
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, task_type="CAUSAL_LM")
    write_tensors(folder, config, {layer: (pair.a_RK, pair.b_OR * pair.scale) for layer, pair in pairs.items()}, base_model=None)
