"""LoRA on the direction of each row of a weight, with its length trained beside it (Liu et al. 2024, arXiv 2402.09353).

The length of the row that LoRA has changed is a constant in the backward pass (section 4.3 of the paper; PEFT does so too).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from raytune_llm.models.adapters.lora import lora, ranks_fit
from raytune_llm.models.adapters.method import Kept, Method
from raytune_llm.models.quantization.base import Quantization
from raytune_llm.models.stored import Stored


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, LoraConfig) and saved.use_dora


@torch.no_grad()
def measure_stored(model: nn.Module, key: str, quantization: Quantization | None) -> None:
    """Lengths of the rows of weights that are still in their files, where PEFT has measured what stands in their place."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or key not in module.lora_magnitude_vector:
            continue
        weight: Any = module.get_base_layer().weight
        if isinstance(weight, Stored):
            lengths: Any = module.lora_magnitude_vector[key]
            lengths.weight.copy_(torch.linalg.norm(weight.read(torch.device("cpu")), dim=1))


KEPT = Kept(alone=True, outputs=2)
"""What the base layer gave, and what A and B did: the length's gradient needs both."""
DORA = Method(config=partial(lora, use_dora=True), describes=describes, check=ranks_fit, begin=measure_stored, kept=KEPT)
