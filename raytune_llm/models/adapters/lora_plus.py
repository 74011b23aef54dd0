"""LoRA whose B learns faster than its A (Hayou et al. 2024, arXiv 2402.12354).

It is saved as LoRA, which it is: a folder with one is continued as either.
"""

from __future__ import annotations

from peft import LoraConfig

from raytune_llm.config.adapter import Layered, LoRAPlus
from raytune_llm.models.adapters.lora import describes, lora, ranks_fit
from raytune_llm.models.adapters.method import Method


def config(*, lr_ratio: float, embedding_lr_ratio: float, **settings) -> LoraConfig:
    return lora(**settings)


def lr_factor(name: str, section: Layered) -> float:
    assert isinstance(section, LoRAPlus)
    if ".lora_embedding_" in name:
        return section.embedding_lr_ratio
    return section.lr_ratio if ".lora_B." in name else 1.0


LORA_PLUS = Method(config=config, describes=describes, check=ranks_fit, lr_factor=lr_factor)
