"""LoRA that begins as what quantization takes off the weights (Li et al. 2023, arXiv 2310.08659).

B A begins as the largest singular values of W - Q(W), over the scale. This is one round of the paper's: the base is still what
the quantization makes of the original weights, so that the adapter loads on it anywhere. More rounds would change the base.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from raytune_llm.models.adapters.lora import continues, describes, lora, lr_factor, ranks_fit
from raytune_llm.models.adapters.method import Layers, Method, only_linear
from raytune_llm.models.layers import layers
from raytune_llm.models.quantization import Quantization, linears_but
from raytune_llm.models.stored import Stored


def check(layers: Layers, **settings: Any) -> None:
    only_linear(layers, "loftq")
    ranks_fit(layers, spares_gates=False, **settings)


@torch.no_grad()
def begin(model: nn.Module, key: str, quantization: Quantization | None) -> None:
    """Without a quantization or without weights, what it begins as is of no account: it is loaded, or its sizes are asked."""
    if quantization is None:
        return
    replaced = {linear for *_, linear in linears_but(layers(model), quantization.skip_modules)}
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and key in layer.lora_A:
            base: Any = layer.get_base_layer()
            if base in replaced and not base.weight.is_meta:
                _approximate(layer, key, _lost(base, quantization))


def _lost(linear: nn.Linear, quantization: Quantization) -> Tensor:
    """What of the weight [N, K] its quantization lacks, in float32."""
    weight = linear.weight.read(torch.device("cpu")) if isinstance(linear.weight, Stored) else linear.weight
    return weight.float() - quantization.held(weight)


def _approximate(layer: Any, key: str, lost_NK: Tensor) -> None:
    rank = layer.r[key]
    u, s, vh = torch.linalg.svd(lost_NK, full_matrices=False)
    root_R = (s[:rank] / layer.scaling[key]).sqrt()
    layer.lora_A[key].weight.copy_(root_R[:, None] * vh[:rank])
    layer.lora_B[key].weight.copy_(u[:, :rank] * root_R)


LOFTQ = Method(config=lora, describes=describes, check=check, continues=continues, begin=begin, lr_factor=lr_factor)
