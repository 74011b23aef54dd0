"""LoftQ: LoRA is initialized as the error of the quantization (Li et al. 2023, arXiv 2310.08659).

B A begins as the truncated SVD of W - Q(W), divided by the scale. This is one iteration of the paper's algorithm. The base stays
the plain quantization of the original weights, on which other programs can load the adapter; more iterations would change it.
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
    """Initialize the adapter. Does nothing without a quantization or without weights (meta device), when the initial values don't
    matter: the adapter will be loaded, or only its sizes are needed."""
    if quantization is None:
        return
    replaced = {linear for *_, linear in linears_but(layers(model), quantization.skip_modules)}
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and key in layer.lora_A:
            base: Any = layer.get_base_layer()
            if base in replaced and not base.weight.is_meta:
                _approximate(layer, key, _lost(base, quantization))


def _lost(linear: nn.Linear, quantization: Quantization) -> Tensor:
    """The quantization error W - Q(W) of the layer's weight, [N, K] float32."""
    weight = linear.weight.read(torch.device("cpu")) if isinstance(linear.weight, Stored) else linear.weight
    return weight.float() - quantization.held(weight)


def _approximate(layer: Any, key: str, lost_NK: Tensor) -> None:
    rank = layer.r[key]
    u, s, vh = torch.linalg.svd(lost_NK, full_matrices=False)
    root_R = (s[:rank] / layer.scaling[key]).sqrt()
    layer.lora_A[key].weight.copy_(root_R[:, None] * vh[:rank])
    layer.lora_B[key].weight.copy_(u[:, :rank] * root_R)


LOFTQ = Method(config=lora, describes=describes, check=check, continues=continues, begin=begin, lr_factor=lr_factor)
